"""The likelihood on data: a model that has met its fields, and how it is evaluated on a chunk for K draws at once.

The user writes the likelihood of a chunk's rows given *one* draw. `BoundModel` evaluates it for K draws in the
fastest of three ways that agrees with calling it once a draw:

- ``"parameters"``: vmap the function only as far as the distribution's parameters, then score all rows and draws at
  once. Under vmap a distribution's log_prob falls apart into many elementwise kernels, which costs more than the
  products before it;
- ``"vmap"``: the whole function under vmap;
- ``"loop"``: once a draw.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import ContinuousBernoulli, Distribution

from dadvi.errors import DataError, InputError, ModelError
from dadvi.model import Model, over_draws, unvalidated
from dadvi.sharding import ShardedDataset
from dadvi.types import Batch, Latents, Purpose, random_stream

Strategy = Literal["parameters", "vmap", "loop"]

CHECK_ROWS = 2_048
"""Rows of each of two chunks on which the likelihood is checked before a fit."""


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

    def log_lik(self, eta: Tensor, batch: Batch) -> Tensor:
        """Return Σ_i ℓ_i(η_k) over the batch's rows, (K,) float64, differentiable in η (K, D)."""
        latents, _ = self.model.space.constrain(eta)
        # The empty sum makes it a function of η, with gradient 0, also where the likelihood has no use for latents.
        return self.log_lik_rows(latents, batch).sum(1, dtype=torch.float64) + eta[:, :0].sum(1)

    def log_lik_rows(self, latents: Latents, batch: Batch) -> Tensor:
        """Return weighted ℓ_i at K draws of the constrained latents, (K, rows) in `dtype`."""
        used = {name: latents[name].to(self.dtype) for name in self.latents}
        num_draws = len(next(iter(latents.values())))
        rows = self._cast(batch)
        with unvalidated():
            if not used or num_draws == 1:  # a likelihood free of latents is the same for every draw
                only = self._log_lik_of_one({name: z[0] for name, z in used.items()}, rows)
                log_lik = only.expand(num_draws, -1)
            elif self.strategy == "parameters":
                log_lik = self._distribution_of_all(used, rows).log_prob(self._observed(rows)[:, None]).T
            else:
                log_lik = over_draws(lambda z: self._log_lik_of_one(z, rows), used, vectorised=self.strategy == "vmap")
        return log_lik if self.model.weight is None else log_lik * rows[self.model.weight]

    def check_rows(self, batch: Batch, first_row: int) -> None:
        """Refuse non-finite fields and observed values outside the support.

        Raises
        ------
        DataError
            With the field, the first such row (counted from the start of the data set) and how many this chunk has.

        """
        self.check_values(batch, first_row)
        self.check_observed(batch, first_row)

    def check_values(self, batch: Batch, first_row: int) -> None:
        """Refuse non-finite fields and negative weights, as `check_rows`."""
        for name in self.fields:
            if batch[name].is_floating_point():
                if batch[name].sum().isfinite():  # as no sum with a NaN or an infinity is, and quicker to tell
                    continue
                finite = torch.isfinite(batch[name])
                _refuse(
                    ~(finite.flatten(1).all(1) if finite.dim() > 1 else finite),
                    batch[name],
                    first_row,
                    f"field {name!r} has {{count}} rows that are not finite",
                    "drop or impute them",
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
        start, _ = self.model.space.constrain(self.model.start[None])
        rows = self._cast(batch)
        with unvalidated():
            distribution = self._call({name: start[name][0].to(self.dtype) for name in self.latents}, rows)
            observed = self._observed(rows)
            try:
                support = distribution.support
            except NotImplementedError:  # a distribution of the user's that does not tell
                return
            inside = support.check(observed)
        inside = inside.expand(observed.shape[: inside.dim()] if inside.dim() else observed.shape[:1])
        if inside.dim() > 1:
            inside = inside.flatten(1).all(1)
        support_of = f"the support of {type(distribution).__name__}"
        what = f"observed field {self.model.observed!r} has {{count}} rows outside {support_of}"
        _refuse(~inside, observed, first_row, what, "choose a likelihood whose support holds them, or mend the data")

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

    def _call(self, latents: Latents, rows: Batch) -> Any:
        return self.model.row_function(**latents, **{name: rows[name] for name in self.arguments})

    def _log_lik_of_one(self, latents: Latents, rows: Batch) -> Tensor:
        result = self._call(latents, rows)
        if self.strategy == "parameters":
            result = _with_one_row_for_all(result)
        log_lik: Tensor = result if self.model.observed is None else result.log_prob(self._observed(rows))
        return log_lik

    def _distribution_of_all(self, latents: Latents, rows: Batch) -> Distribution:
        """Return the likelihood's distribution with batch shape (rows, K), its parameters computed under vmap."""
        make: Callable[..., Distribution] = Distribution

        def parameters(draw: Latents) -> dict[str, Tensor]:
            nonlocal make
            distribution = self._call(draw, rows)
            make = type(distribution)
            if not _is_its_parameters(distribution):
                raise TypeError(f"{type(distribution).__name__} cannot be made again from its parameters")
            given = {
                name: vars(distribution)[name] for name in distribution.arg_constraints if name in vars(distribution)
            }
            return given if distribution.batch_shape else {name: value[None] for name, value in given.items()}

        spread = torch.func.vmap(parameters)(latents)
        # Rows first, as products of rows and latents lie in memory: the other way round log_prob would copy them.
        return _with_one_row_for_all(make(**{name: value.movedim(0, 1) for name, value in spread.items()}))


def _is_its_parameters(distribution: Distribution) -> bool:
    """Return whether a distribution is wholly told by its parameters, and these are cheap to hold for every row.

    Not so a subclass of the user's, which may hold anything else, nor joint distributions, with a matrix for each row.
    """
    kind = type(distribution)
    known = kind.__module__.startswith("torch.distributions.") and kind is not ContinuousBernoulli
    return known and not distribution.event_shape


def _with_one_row_for_all(distribution: Distribution) -> Distribution:
    """Return a distribution with one row of those parameters that are the same in every row, such as a scale.

    Distributions expand their parameters to a common shape, and log_prob would then take functions of a scale or of
    degrees of freedom, and their derivatives, anew for every row.
    """
    made = copy(distribution)
    for name in made.arg_constraints:
        value = vars(made).get(name)
        if isinstance(value, Tensor) and value.dim() and len(value) > 1 and value.stride(0) == 0:
            setattr(made, name, value[:1])
    return made


def _refuse(bad: Tensor, values: Tensor, first_row: int, what: str, remedy: str) -> None:
    if bad.any():
        at = int(bad.nonzero()[0, 0])
        value = values[at].tolist()
        raise DataError(
            f"{what.format(count=int(bad.sum()))}, the first in row {first_row + at} (value {value}); {remedy}"
        )


def end_chunks(data: ShardedDataset) -> list[int]:
    """Return the first and the last chunk, on whose rows a likelihood is checked."""
    return sorted({0, data.manifest.num_chunks - 1})


def bind_to(model: Model, data: ShardedDataset) -> BoundModel:
    """Check a model against rows of the first and the last chunk of a data set, and resolve its names."""
    chunks = []
    for chunk in end_chunks(data):
        batch = {name: values[:CHECK_ROWS] for name, values in data.read(chunk).items()}
        chunks.append((data.manifest.rows(chunk)[0], batch))
    return bind(model, {name: values.dtype for name, values in chunks[0][1].items()}, chunks)


def bind(model: Model, fields: Mapping[str, torch.dtype], chunks: Sequence[tuple[int, Batch]]) -> BoundModel:
    """Resolve a model's names against the data, check its likelihood on rows of two chunks, choose how to evaluate it.

    Parameters
    ----------
    fields
        Name to dtype of every field of the data set.
    chunks
        One or two (first row, batch), of at least one row each.

    Raises
    ------
    ModelError
        If a name is unknown or ambiguous, the likelihood fails, has the wrong shape, is not finite at the start, or
        is not additive over rows.
    DataError
        If these rows are not finite or lie outside the likelihood's support.

    """
    bound = _resolve_names(model, fields)
    for first_row, batch in chunks:
        bound.check_values(batch, first_row)
        _check_result(bound, batch, first_row)
        bound.check_observed(batch, first_row)
        _check_finite_start(bound, batch, first_row)
    _check_additive(bound, [batch for _, batch in chunks])
    _check_gradient(bound, chunks[0][1])
    bound = replace(bound, strategy=_fastest_strategy(bound, chunks[0][1]))
    return replace(bound, saved_bytes=_saved_bytes(bound, chunks[0][1]))


def _resolve_names(model: Model, fields: Mapping[str, torch.dtype]) -> BoundModel:
    latents = {site.name for site in model.space.sites}
    both = sorted(latents & set(fields) & {*model.required, *model.optional})
    if both:
        raise ModelError(f"{both[0]!r} is both a latent and a field; rename one of them")
    wanted: list[tuple[str, str]] = [(name, "the likelihood takes") for name in model.required if name not in latents]
    wanted += [
        (name, f"{role} is")
        for role, name in (("observed", model.observed), ("weight", model.weight))
        if name is not None
    ]
    for name, role in wanted:
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise ModelError(
                f"{role} {name!r}, which is neither a latent ({', '.join(sorted(latents))}) nor a field of the data "
                f"({known})"
            )
    arguments = tuple(name for name in (*model.required, *model.optional) if name in fields)
    used = tuple(dict.fromkeys((*arguments, *(name for name, role in wanted if role != "the likelihood takes"))))
    floating = [fields[name] for name in used if fields[name].is_floating_point]
    dtype = torch.float64
    if floating:
        dtype = torch.float64 if torch.float64 in floating else torch.float32
    return BoundModel(
        model=model,
        fields=used,
        arguments=arguments,
        latents=tuple(name for name in (*model.required, *model.optional) if name in latents),
        dtype=dtype,
    )


def _start_and_nearby(model: Model) -> Tensor:
    noise = random_stream(0, Purpose.CHECK).standard_normal(model.dim)
    return torch.stack([model.start, model.start + 0.1 * torch.from_numpy(noise)])


def _check_result(bound: BoundModel, batch: Batch, first_row: int) -> None:
    """Call the likelihood on one draw as the user wrote it, and check what it returns."""
    latents, _ = bound.model.space.constrain(bound.model.start[None])
    one = {name: latents[name][0].to(bound.dtype) for name in bound.latents}
    rows = bound._cast(batch)
    num_rows = len(next(iter(rows.values())))
    shapes = {name: tuple(value.shape) for name, value in {**one, **rows}.items()}
    try:
        result = bound._call(one, rows)
        if bound.model.observed is not None and not isinstance(result, Distribution):
            raise ModelError(
                f"likelihood returned a {type(result).__name__}; it must return a torch distribution (or use "
                "log_likelihood=)"
            )
        try:
            with unvalidated():  # a value outside the support has its own message, with row and count
                log_lik = bound._log_lik_of_one(one, rows)
        except (IndexError, RuntimeError):
            bound.check_observed(batch, first_row)  # some densities fail there instead of telling
            raise
    except InputError:
        raise
    except Exception as error:
        raise ModelError(
            f"the likelihood failed on {num_rows} rows: {type(error).__name__}: {error}. Shapes of its arguments: "
            f"{shapes}"
        ) from error
    if not isinstance(log_lik, Tensor) or log_lik.shape != (num_rows,):
        seen = f"shape {tuple(log_lik.shape)}" if isinstance(log_lik, Tensor) else f"type {type(log_lik).__name__}"
        raise ModelError(
            f"the log-likelihood of {num_rows} rows has {seen}; it must have shape ({num_rows},), one number a row. "
            f"Shapes of the arguments: {shapes}. Where a row holds several values, wrap the distribution in "
            f"torch.distributions.Independent(..., 1); where shapes broadcast, squeeze the field"
        )
    if bound.model.weight is not None and rows[bound.model.weight].shape != (num_rows,):
        raise ModelError(
            f"weight {bound.model.weight!r} has shape {tuple(rows[bound.model.weight].shape)}; it must be one number "
            f"a row, ({num_rows},)"
        )


def _check_finite_start(bound: BoundModel, batch: Batch, first_row: int) -> None:
    latents, _ = bound.model.space.constrain(bound.model.start[None])
    log_lik = bound.log_lik_rows(latents, batch)[0]
    if not torch.isfinite(log_lik).all():
        row = int((~torch.isfinite(log_lik)).nonzero()[0, 0])
        values = {name: z[0].tolist() for name, z in latents.items() if z[0].numel() <= 8}
        raise ModelError(
            f"the log-likelihood of row {first_row + row} is {log_lik[row].item()} at the starting point; it must be "
            "finite there. "
            f"Latents at the start: {values}. Rescale the predictors or centre the prior nearer to the data"
        )


def _check_additive(bound: BoundModel, batches: Sequence[Batch]) -> None:
    """Check that a row's log-likelihood does not depend on which rows stand beside it, in float64."""
    rows = concatenated(batches)
    num_rows = len(next(iter(rows.values())))
    if num_rows < 2:
        return
    exact = replace(bound, dtype=torch.float64)
    latents, _ = bound.model.space.constrain(_start_and_nearby(bound.model))
    try:
        together = exact.log_lik_rows(latents, rows)
    except Exception as error:
        raise ModelError(
            f"the likelihood works in {bound.dtype} and fails in float64, in which fits start: {type(error).__name__}: "
            f"{error}. Give tensors that it makes or closes over the dtype of its arguments, as by x.to(beta.dtype)"
        ) from error
    half = num_rows // 2
    parts = [{name: value[part] for name, value in rows.items()} for part in (slice(half), slice(half, None))]
    apart = torch.cat([exact.log_lik_rows(latents, part) for part in parts], dim=1)
    if not torch.allclose(together, apart, rtol=1e-6, atol=1e-8, equal_nan=True):
        row = int((together - apart).abs().nan_to_num().amax(0).argmax())
        raise ModelError(
            f"the likelihood is not additive over rows: row {row} of {num_rows} has log-likelihood "
            f"{together[0, row].item():.8g} "
            f"beside all of them and {apart[0, row].item():.8g} beside half of them. It must treat each row by "
            "itself: compute "
            f"means, standardisations and ranks when the data are written"
        )


def _check_gradient(bound: BoundModel, batch: Batch) -> None:
    """Refuse a latent that moves the log-likelihood but gets no gradient, as after .item(), .detach() or NumPy."""
    space = bound.model.space
    eta = _start_and_nearby(bound.model)[1:]
    value, grad = _value_and_grad(bound.log_lik, eta, batch)
    for site in space.sites:
        block = slice(site.offset, site.offset + site.size)
        if site.name not in bound.latents or grad[0, block].any():
            continue
        moved = eta.clone()
        moved[0, block] += 0.5
        if bound.log_lik(moved, batch).detach() != value:
            raise ModelError(
                f"latent {site.name!r} changes the log-likelihood but no gradient reaches it; keep the likelihood in "
                "torch, "
                "without .item(), .detach(), .numpy() or NumPy functions of latents"
            )


def concatenated(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the rows of some batches as one."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _fastest_strategy(bound: BoundModel, batch: Batch) -> Strategy:
    """Return the first strategy whose values and gradients agree with calling the likelihood once a draw."""
    eta = _start_and_nearby(bound.model)
    reference = _value_and_grad(bound.log_lik, eta, batch)
    candidates: tuple[Strategy, ...] = ("parameters", "vmap") if bound.model.observed is not None else ("vmap",)
    for strategy in candidates:
        try:
            candidate = _value_and_grad(replace(bound, strategy=strategy).log_lik, eta, batch)
        except Exception:  # noqa: BLE001, S112  whatever stops this way, the next one is tried; the last is the reference
            continue
        if all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)
            for a, b in zip(candidate, reference, strict=True)
        ):
            return strategy
    return "loop"


def _saved_bytes(bound: BoundModel, batch: Batch) -> float:
    """Return the bytes that a differentiation saves on its way forward, for each further row and draw."""
    eta = _start_and_nearby(bound.model).requires_grad_()
    num_rows = len(next(iter(batch.values())))

    def saved_by(rows: Batch) -> int:
        cast = bound._cast(rows)
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            value = bound.log_lik(eta, cast)  # held, so that no storage is freed and another put in its place
        fields = {each.untyped_storage().data_ptr() for each in (*rows.values(), *cast.values())}
        del value
        return sum(size for storage, size in saved.items() if storage not in fields)

    half = {name: values[: num_rows // 2] for name, values in batch.items()}
    more = saved_by(batch) - (saved_by(half) if num_rows > 1 else 0)
    return max(1.0, more / (len(eta) * (num_rows - num_rows // 2)))


def _value_and_grad(function: Callable[[Tensor, Batch], Tensor], eta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    eta = eta.clone().requires_grad_()
    value = function(eta, batch)
    (grad,) = torch.autograd.grad(value.sum(), eta, allow_unused=True, materialize_grads=True)
    return value.detach(), grad
