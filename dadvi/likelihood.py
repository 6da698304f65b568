"""The likelihood on data: a model that has met its fields, and how it is evaluated on a chunk for K draws at once.

The user writes the likelihood of a chunk's rows given *one* draw. `BoundModel` evaluates it for K draws in the
fastest of three ways that agrees with calling it once a draw:

- ``"parameters"``: vmap the function only as far as the distribution's parameters, then score all rows and draws at
  once. Under vmap a distribution's log_prob falls apart into many elementwise kernels, which costs more than the
  products before it;
- ``"vmap"``: the whole function under vmap;
- ``"loop"``: once a draw.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import ContinuousBernoulli, Distribution
from torch.distributions.constraints import Constraint

from dadvi.batching import DrawsFirst, Pick, Picked
from dadvi.errors import DataError
from dadvi.model import Model, one_by_one, unvalidated
from dadvi.types import Batch, Latents

Strategy = Literal["parameters", "vmap", "loop"]

Make = Callable[..., Distribution]
"""What makes a distribution from its parameters."""


@dataclass(frozen=True)
class BoundModel:
    """A model with its names resolved against a data set: what a pass evaluates on workers."""

    model: Model
    fields: tuple[str, ...]  # every field that a chunk must bring
    arguments: tuple[str, ...]  # fields among the likelihood's arguments
    latents: tuple[str, ...]  # latents among the likelihood's arguments
    dtype: torch.dtype  # of the arithmetic on rows
    strategy: Strategy = "loop"
    saved_bytes: float = 64.0  # by a differentiation of one row's log-likelihood at one draw, as measured
    affine: bool = False  # whether the parameters of the likelihood's distribution are affine in η
    picks: tuple[Pick, ...] = ()  # by which fields of codes the likelihood picks elements of which latents
    codes: tuple[str, ...] = ()  # integer fields by which the likelihood picks elements of anything
    support: tuple[str, Constraint] | None = None  # of which distribution, where it is the same whatever its parameters

    def log_lik(self, eta: Tensor, batch: Batch) -> Tensor:
        """Return Σ_i ℓ_i(η_k) over the batch's rows, (K,) float64, differentiable in η (K, D)."""
        latents, _ = self.model.space.constrain(eta)
        # The empty sum makes it a function of η, with gradient 0, also where the likelihood has no use for latents.
        return self.log_lik_rows(latents, batch).sum(1, dtype=torch.float64) + eta[:, :0].sum(1)

    def log_lik_rows(self, latents: Latents, batch: Batch, picked: Picked | None = None) -> Tensor:
        """Return weighted ℓ_i at K draws of the constrained latents, (K, rows) in `dtype`.

        Parameters
        ----------
        picked
            Elements (K, rows, ...) that take the place of those picked from latents.

        """
        used = {name: latents[name].to(self.dtype) for name in self.latents}
        num_draws, picked = len(next(iter(latents.values()))), picked or {}
        rows = self._cast(batch)
        with unvalidated():
            if not used or num_draws == 1:  # a likelihood free of latents is the same for every draw
                one = {name: z[0] for name, z in used.items()}
                mode = DrawsFirst(one, rows, {pick: z[0] for pick, z in picked.items()}) if picked else None
                log_lik = self._log_lik_of_one(one, rows, mode).expand(num_draws, -1)
            elif self.strategy == "parameters":
                log_lik = self._score(*self._parameters_of_all(used, rows, picked), rows)
            elif self.strategy == "vmap":

                def of_one(draw: Latents, picked: Picked) -> Tensor:
                    return self._log_lik_of_one(draw, rows, DrawsFirst(draw, rows, picked))

                log_lik = torch.func.vmap(of_one)(used, picked)
            else:
                log_lik = one_by_one(lambda z: self._log_lik_of_one(z, rows), used)
        return log_lik if self.model.weight is None else log_lik * rows[self.model.weight]

    def parameters(
        self, latents: Latents, batch: Batch, picked: Picked | None = None
    ) -> tuple[Make, dict[str, Tensor]]:
        """Return the parameters of the likelihood's distribution at K draws, by name, each (K, rows or 1, ...).

        Only with the strategy "parameters". The arguments are those of `log_lik_rows`.
        """
        used = {name: latents[name].to(self.dtype) for name in self.latents}
        with unvalidated():
            return self._parameters_of_all(used, self._cast(batch), picked)

    def log_lik_of(self, make: Make, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        """Return weighted ℓ_i by the parameters of the likelihood's distribution, (K, rows)."""
        rows = self._cast(batch)
        with unvalidated():
            log_lik = self._score(make, parameters, rows)
        return log_lik if self.model.weight is None else log_lik * rows[self.model.weight]

    def check_rows(self, batch: Batch, first_row: int, *, finite: bool = False) -> None:
        """Refuse non-finite fields, negative codes and weights, and observed values outside the support.

        Parameters
        ----------
        finite
            Whether the values are known to be finite: those of a data set that was seen to be when it was written, and
            whose checksums tell that it is what was written.

        Raises
        ------
        DataError
            With the field, the first such row (counted from the start of the data set) and how many this chunk has.

        """
        self.check_values(batch, first_row, finite=finite)
        self.check_observed(batch, first_row)

    def check_values(self, batch: Batch, first_row: int, *, finite: bool = False) -> None:
        """Refuse non-finite fields, negative codes and negative weights, as `check_rows`."""
        for name in () if finite else self.fields:
            if batch[name].is_floating_point():
                if batch[name].sum().isfinite():  # as no sum with a NaN or an infinity is, and quicker to tell
                    continue
                good = torch.isfinite(batch[name])
                _refuse(
                    ~(good.flatten(1).all(1) if good.dim() > 1 else good),
                    batch[name],
                    first_row,
                    f"field {name!r} has {{count}} rows that are not finite",
                    "drop or impute them",
                )
        for name in self.codes:
            # torch would count from the end, and take the last group for what pandas' cat.codes call missing.
            _refuse(
                (batch[name] < 0).flatten(1).any(1) if batch[name].dim() > 1 else batch[name] < 0,
                batch[name],
                first_row,
                f"field {name!r}, by which the likelihood picks, has {{count}} rows with a negative code",
                "give missing values a code of their own, such as the number of categories, or drop them",
            )
        if self.model.weight is not None:
            weight = batch[self.model.weight]
            _refuse(
                weight < 0,
                weight,
                first_row,
                f"weight {self.model.weight!r} is negative in {{count}} rows",
                "weights must be ≥ 0",
            )

    def check_observed(self, batch: Batch, first_row: int) -> None:
        """Refuse observed values outside the support of the likelihood's distribution at the start, as `check_rows`."""
        if self.model.observed is None:
            return
        observed = self._observed(self._cast(batch))
        if self.support is not None:
            kind, support = self.support
        else:
            distribution = self.at_start(batch)
            kind = type(distribution).__name__
            with unvalidated():
                try:
                    support = distribution.support
                except NotImplementedError:  # a distribution of the user's that does not tell
                    return
        inside = support.check(observed)
        inside = inside.expand(observed.shape[: inside.dim()] if inside.dim() else observed.shape[:1])
        if inside.dim() > 1:
            inside = inside.flatten(1).all(1)
        what = f"observed field {self.model.observed!r} has {{count}} rows outside the support of {kind}"
        _refuse(~inside, observed, first_row, what, "choose a likelihood whose support holds them, or mend the data")

    def at_start(self, batch: Batch) -> Any:
        """Return what the likelihood returns for these rows at the start."""
        start, _ = self.model.space.constrain(self.model.start[None])
        with unvalidated():
            return self._call({name: start[name][0].to(self.dtype) for name in self.latents}, self._cast(batch))

    def _cast(self, batch: Batch) -> dict[str, Tensor]:
        return {
            name: batch[name].to(self.dtype)
            if batch[name].is_floating_point() or name == self.model.weight
            else batch[name]
            for name in self.fields
        }

    def _observed(self, rows: Batch) -> Tensor:
        # Integer observations are cast: torch's binary and count densities take floats only.
        return rows[self.model.observed].to(self.dtype)  # type: ignore[index]

    def _call(self, latents: Latents, rows: Batch, mode: DrawsFirst | None = None) -> Any:
        with mode or nullcontext():
            return self.model.row_function(**latents, **{name: rows[name] for name in self.arguments})

    def _log_lik_of_one(self, latents: Latents, rows: Batch, mode: DrawsFirst | None = None) -> Tensor:
        result = self._call(latents, rows, mode)
        if self.strategy == "parameters":
            result = _with_one_row_for_all(result)
        log_lik: Tensor = result if self.model.observed is None else result.log_prob(self._observed(rows))
        return log_lik

    def _parameters_of_all(
        self, latents: Latents, rows: Batch, picked: Picked | None = None
    ) -> tuple[Make, dict[str, Tensor]]:
        """Return the parameters of the likelihood's distribution, computed under vmap, each (K, rows or 1, ...)."""
        make: Make = Distribution

        def parameters(draw: Latents, picked: Picked) -> dict[str, Tensor]:
            nonlocal make
            distribution = self._call(draw, rows, DrawsFirst(draw, rows, picked))
            make = type(distribution)
            if not _is_its_parameters(distribution):
                raise TypeError(f"{type(distribution).__name__} cannot be made again from its parameters")
            given = {
                name: vars(distribution)[name] for name in distribution.arg_constraints if name in vars(distribution)
            }
            return given if distribution.batch_shape else {name: value[None] for name, value in given.items()}

        spread = torch.func.vmap(parameters)(latents, picked or {})
        return make, spread

    def _score(self, make: Make, parameters: dict[str, Tensor], rows: Batch) -> Tensor:
        observed = self._observed(rows)
        # In the order in which they lie in memory: log_prob would copy them the other way round.
        if any(value.shape[1] > 1 and 0 < value.stride(0) < value.stride(1) for value in parameters.values()):
            rows_first = make(**{name: value.movedim(0, 1) for name, value in parameters.items()})
            return _with_one_row_for_all(rows_first).log_prob(observed[:, None]).T
        return _with_one_row_for_all(make(**parameters), axis=1).log_prob(observed)


def fixed_support(distribution: Distribution) -> Constraint | None:
    """Return the support of a distribution of torch that does not depend on its parameters; None if it may."""
    support = getattr(type(distribution), "support", None)
    known = type(distribution).__module__.startswith("torch.distributions.")
    return support if known and isinstance(support, Constraint) and not isinstance(support, property) else None


def _is_its_parameters(distribution: Distribution) -> bool:
    """Return whether a distribution is wholly told by its parameters, and these are cheap to hold for every row.

    Not so a subclass of the user's, which may hold anything else, nor joint distributions, with a matrix for each row.
    """
    kind = type(distribution)
    known = kind.__module__.startswith("torch.distributions.") and kind is not ContinuousBernoulli
    return known and not distribution.event_shape


def _with_one_row_for_all(distribution: Distribution, axis: int = 0) -> Distribution:
    """Return a distribution with one row, along an axis, of parameters that are the same in every row, such as a scale.

    Distributions expand their parameters to a common shape, and log_prob would then take functions of a scale or of
    degrees of freedom, and their derivatives, anew for every row.
    """
    made = copy(distribution)
    for name in made.arg_constraints:
        value = vars(made).get(name)
        if isinstance(value, Tensor) and value.dim() > axis and value.shape[axis] > 1 and value.stride(axis) == 0:
            setattr(made, name, value.narrow(axis, 0, 1))
    return made


def _refuse(bad: Tensor, values: Tensor, first_row: int, what: str, remedy: str) -> None:
    if bad.any():
        at = int(bad.nonzero()[0, 0])
        value = values[at].tolist()
        raise DataError(
            f"{what.format(count=int(bad.sum()))}, the first in row {first_row + at} (value {value}); {remedy}"
        )


def concatenated(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the rows of some batches as one."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def weighted(outputs: Iterable[Tensor], weights: Iterable[Tensor]) -> Tensor:
    """Return what has the gradient of Σ ⟨f, g⟩ over outputs f and fixed g, as large or smaller, and is itself 0.

    That gradient is to be taken of it alone: of a multiple, or of a function of it, it would be the same.
    `torch.autograd.grad` does the same with `grad_outputs`, but imports SymPy for it: half a second of the first pass,
    and 33 MiB of every process.
    """
    total: Tensor = reduce(operator.add, (_Carried.apply(f, g) for f, g in zip(outputs, weights, strict=True)))
    return total


class _Carried(torch.autograd.Function):
    """Carries g to what f is computed from, without a product of the two."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, g: Tensor) -> Tensor:
        """Return 0."""
        ctx.save_for_backward(g.expand_as(f))
        return f.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        """Return g."""
        (g,) = ctx.saved_tensors
        return g, None
