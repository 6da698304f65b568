"""Supports: the sets that latents live in, and the densities restricted to them.

A support is a `torch.distributions.constraints.Constraint`. This module adds the one set that torch lacks (`ordered`),
two priors that are told their support (`Constrained`, `Flat`), and a JSON codec, by which a saved posterior rebuilds
its transforms without running code from the file. `dadvi.transforms` maps R^n onto each of these sets.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint, MixtureSameFamilyConstraint

from dadvi.errors import ModelError

Json: TypeAlias = dict[str, Any]

USE_KNOWN_SUPPORT = (
    "give the latent a known support with dadvi.Constrained(base, support): real, positive, interval, simplex, "
    "ordered, corr_cholesky, lower_cholesky, positive_definite, or independent, cat or stack of these; or register a "
    "bijection onto yours in torch.distributions.biject_to"
)


class _Ordered(Constraint):
    """Vectors whose entries increase strictly along the last dimension."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Tell which vectors of value (..., n) increase: (...,)."""
        return (value.diff(dim=-1) > 0).all(-1)


ordered = _Ordered()


class Cat(constraints.cat):
    """A cat support, of which one value reaches from the joined dim (< 0) to the right.

    torch's own check joins the parts' answers along a dim of the draws, and fails if parts have event dimensions.
    """

    @property
    def event_dim(self) -> int:  # type: ignore[override]  # torch too overrides the attribute
        """The number of dimensions of one value."""
        return int(max(-self.dim, *[part.event_dim for part in self.cseq]))

    def check(self, value: Tensor) -> Tensor:
        """Tell which values lie in the support: (..., *event) → (...,)."""
        return _each_holds(self.cseq, value.split(self.lengths, self.dim), value.shape[: value.dim() - self.event_dim])


class Stack(constraints.stack):
    """A stack support, of which one value reaches from the stacked dim (< 0) to the right; see `Cat`."""

    @property
    def event_dim(self) -> int:  # type: ignore[override]  # torch too overrides the attribute
        """The number of dimensions of one value."""
        return int(max(-self.dim, *[part.event_dim + 1 for part in self.cseq]))

    def check(self, value: Tensor) -> Tensor:
        """Tell which values lie in the support: (..., *event) → (...,)."""
        return _each_holds(self.cseq, value.unbind(self.dim), value.shape[: value.dim() - self.event_dim])


def _each_holds(parts: Iterable[Constraint], blocks: Iterable[Tensor], draws: torch.Size) -> Tensor:
    checks = [part.check(block).reshape((*draws, -1)).all(-1) for part, block in zip(parts, blocks, strict=True)]
    return torch.stack(checks).all(0)


# The leaves of the codec: kind -> (class, the attributes that its constructor takes, in order).
_LEAVES: dict[str, tuple[type[Constraint], tuple[str, ...]]] = {
    "real": (type(constraints.real), ()),
    "greater_than": (constraints.greater_than, ("lower_bound",)),
    "greater_than_eq": (constraints.greater_than_eq, ("lower_bound",)),
    "less_than": (constraints.less_than, ("upper_bound",)),
    "interval": (constraints.interval, ("lower_bound", "upper_bound")),
    "half_open_interval": (constraints.half_open_interval, ("lower_bound", "upper_bound")),
    "simplex": (type(constraints.simplex), ()),
    "ordered": (_Ordered, ()),
    "corr_cholesky": (type(constraints.corr_cholesky), ()),
    "lower_cholesky": (type(constraints.lower_cholesky), ()),
    "lower_triangular": (type(constraints.lower_triangular), ()),
    "positive_definite": (type(constraints.positive_definite), ()),
    "positive_semidefinite": (type(constraints.positive_semidefinite), ()),
    "symmetric": (type(constraints.symmetric), ()),
    "square": (type(constraints.square), ()),
}
_KINDS = {cls: kind for kind, (cls, _) in _LEAVES.items()}


def resolve(support: Constraint, ndim: int) -> Constraint:
    """Return the support in the form the rest of dadvi relies on, which does not change when draws are put in front.

    The dims of cat and stack are counted from the right; a mixture's support becomes that of its components.

    Parameters
    ----------
    support : Constraint
        The support of a latent.
    ndim : int
        The number of dimensions of one draw of it.

    Raises
    ------
    ModelError
        The support is discrete, or is not known before a value is seen.
    """
    if isinstance(support, constraints.independent):
        base = resolve(support.base_constraint, ndim)
        return constraints.independent(base, max(0, support.event_dim - base.event_dim))
    if isinstance(support, MixtureSameFamilyConstraint):
        return resolve(_component_support(support), ndim)
    if isinstance(support, constraints.cat):
        parts = [resolve(part, ndim) for part in support.cseq]
        return Cat(parts, _from_right(support.dim, ndim), support.lengths)
    if isinstance(support, constraints.stack):
        parts = [resolve(part, ndim - 1) for part in support.cseq]
        return Stack(parts, _from_right(support.dim, ndim))
    if not isinstance(support, Constraint) or constraints.is_dependent(support):
        raise ModelError(f"the support {support!r} does not say which values it holds; {USE_KNOWN_SUPPORT}")
    if support.is_discrete:
        raise ModelError(
            f"the support {support!r} is discrete, and variational inference by gradients needs continuous latents; "
            "sum the discrete latent out: in log_likelihood, torch.logsumexp over its values of log-weight plus "
            "log-likelihood, or a torch.distributions.MixtureSameFamily as the likelihood"
        )
    return _without_infinite_bounds(support)


def _without_infinite_bounds(support: Constraint) -> Constraint:
    """Write an interval that reaches to infinity, as GeneralizedPareto has, as the half-line that it is."""
    if isinstance(support, constraints.interval):
        if _is_everywhere(support.upper_bound, math.inf):
            return constraints.greater_than_eq(support.lower_bound)
        if _is_everywhere(support.lower_bound, -math.inf):
            return constraints.less_than(support.upper_bound)
    return support


def _is_everywhere(bound: float | Tensor, value: float) -> bool:
    return bool((torch.as_tensor(bound) == value).all())


def _from_right(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise ModelError(
            f"a cat or stack support joins its parts along dim {dim}, but a draw has {ndim} dimensions; "
            f"choose dim from {-ndim} to {ndim - 1}"
        )
    return dim if dim < 0 else dim - ndim


def _component_support(mixture: MixtureSameFamilyConstraint) -> Constraint:
    """Return the support that a mixture's components share, without the components' dimension."""
    return _without_dim(mixture.base_constraint, -1 - mixture.event_dim)


def _without_dim(support: Constraint, dim: int) -> Constraint:
    if isinstance(support, MixtureSameFamilyConstraint):
        support = _component_support(support)
    if isinstance(support, constraints.independent):
        return constraints.independent(_without_dim(support.base_constraint, dim), support.reinterpreted_batch_ndims)
    if type(support) not in _KINDS:
        return support
    cls, parameters = _LEAVES[_KINDS[type(support)]]
    return cls(*[_common_bound(getattr(support, parameter), dim) for parameter in parameters])


def _common_bound(bound: float | Tensor, dim: int) -> float | Tensor:
    """Drop the components' dimension of a bound, along which it must be constant."""
    if not isinstance(bound, Tensor) or bound.dim() < -dim:
        return bound
    first = bound.select(dim, 0)
    if not torch.equal(bound, first.unsqueeze(dim).expand_as(bound)):
        raise ModelError(
            f"the components of a mixture have supports with different bounds, {bound.tolist()}, so that its density "
            "jumps inside its support; use components with one support"
        )
    return first


def support_to_json(support: Constraint) -> Json:
    """Return a description of a support for `json.dumps`, exact to the bit; a mixture's is that of its components.

    Raises
    ------
    ModelError
        The support, or a part of it, is not one that dadvi can rebuild from data.
    """
    if isinstance(support, MixtureSameFamilyConstraint):
        return support_to_json(_component_support(support))
    if isinstance(support, constraints.independent):
        base = support_to_json(support.base_constraint)
        return {"kind": "independent", "base": base, "ndims": support.reinterpreted_batch_ndims}
    if isinstance(support, constraints.cat):
        parts = [support_to_json(part) for part in support.cseq]
        return {"kind": "cat", "parts": parts, "dim": support.dim, "lengths": support.lengths}
    if isinstance(support, constraints.stack):
        return {"kind": "stack", "parts": [support_to_json(part) for part in support.cseq], "dim": support.dim}
    support = _without_infinite_bounds(support)
    if type(support) not in _KINDS:
        raise ModelError(f"the support {support!r} cannot be saved; {USE_KNOWN_SUPPORT}")
    kind = _KINDS[type(support)]
    return {"kind": kind} | {name: _bound_to_json(getattr(support, name)) for name in _LEAVES[kind][1]}


def support_from_json(description: Mapping[str, Any]) -> Constraint:
    """Return the support that `support_to_json` described.

    Raises
    ------
    ModelError
        The description is not one of `support_to_json`.
    """
    try:
        kind = description["kind"]
        if kind == "independent":
            return constraints.independent(support_from_json(description["base"]), description["ndims"])
        if kind == "cat":
            parts = [support_from_json(part) for part in description["parts"]]
            return constraints.cat(parts, description["dim"], description["lengths"])
        if kind == "stack":
            return constraints.stack([support_from_json(part) for part in description["parts"]], description["dim"])
        cls, parameters = _LEAVES[kind]
        return cls(*[_bound_from_json(description[name]) for name in parameters])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{description!r} does not describe a support; kinds known here: {', '.join(_LEAVES)}, independent, cat, "
            "stack; read the file with the dadvi that wrote it, or a newer one"
        ) from error


def _bound_to_json(bound: float | Tensor) -> float | Json:
    # Python's json writes a float so that it reads back as the same bits.
    if isinstance(bound, Tensor):
        return {"dtype": str(bound.dtype).removeprefix("torch."), "values": bound.tolist()}
    return float(bound)


def _bound_from_json(bound: float | Json) -> float | Tensor:
    if isinstance(bound, dict):
        return torch.tensor(bound["values"], dtype=getattr(torch, bound["dtype"]))
    return float(bound)


def split_shape(shape: torch.Size, support: Constraint, event_dim: int = 0) -> tuple[torch.Size, torch.Size]:
    """Split the shape of a draw into batch and event shape, whose dimensions are the support's, or `event_dim` if more.

    Raises
    ------
    ModelError
        A draw has fewer dimensions than a value of the support.
    """
    if len(shape) < support.event_dim:
        raise ModelError(
            f"the support {support!r} holds values of {support.event_dim} dimensions, but a draw has shape "
            f"{tuple(shape)}; give the latent a shape with these dimensions at its end, as by .expand"
        )
    cut = len(shape) - max(event_dim, support.event_dim)
    return shape[:cut], shape[cut:]


class Constrained(Distribution):
    """The density of a distribution, restricted to a support: `Constrained(Normal(0.0, 2.0).expand([2]), ordered)`.

    The density is not renormalised: the constant, base's probability of the support, moves neither the posterior nor
    where the ELBO is largest, only its value. That holds while the constant is one: a base that depends on other
    latents must give the support the same probability whatever they are, as an exchangeable one gives `ordered`, or a
    centred one the positive half-line. Batch dimensions of `base` that belong to one value of `support` become event
    dimensions, as in `torch.distributions.Independent`. There is no `sample`.

    Parameters
    ----------
    base : Distribution
        Its log_prob must be finite on the support.
    support : Constraint
        A continuous support whose values have the shape of `base`'s draws.

    Raises
    ------
    ModelError
        The support is discrete, or has more dimensions than a draw of `base`.
    """

    arg_constraints: dict[str, Constraint] = {}  # noqa: RUF012 (torch reads it from the class; base checks its own)

    def __init__(self, base: Distribution, support: Constraint, validate_args: bool | None = None) -> None:
        shape = base.batch_shape + base.event_shape
        self.base_dist = base
        self._support = resolve(support, len(shape))
        batch_shape, event_shape = split_shape(shape, self._support, len(base.event_shape))
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def support(self) -> Constraint:
        """The set to which the density is restricted."""
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Constrained":
        """Return the distribution with a larger batch shape."""
        reinterpreted = self.event_shape[: len(self.event_shape) - len(self.base_dist.event_shape)]
        base = self.base_dist.expand(torch.Size(batch_shape) + reinterpreted)
        return Constrained(base, self._support, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return base's log density of value (..., *batch, *event), not renormalised: (..., *batch)."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.base_dist.log_prob(value)
        reinterpreted = len(self.event_shape) - len(self.base_dist.event_shape)
        return log_prob.flatten(-reinterpreted).sum(-1) if reinterpreted else log_prob


class Flat(Distribution):
    """The improper prior of constant density on a support: log_prob is zero.

    The density is flat in the constrained space, not in the unconstrained one. There is no `sample`.

    Parameters
    ----------
    shape : int or tuple of int
        The shape of one draw.
    support : Constraint
        A continuous support.

    Raises
    ------
    ModelError
        The support is discrete, or has more dimensions than `shape`.
    """

    arg_constraints: dict[str, Constraint] = {}  # noqa: RUF012 (torch reads it from the class)

    def __init__(
        self,
        shape: int | tuple[int, ...] = (),
        support: Constraint = constraints.real,
        validate_args: bool | None = None,
    ) -> None:
        size = torch.Size((shape,) if isinstance(shape, int) else shape)
        self._support = resolve(support, len(size))
        batch_shape, event_shape = split_shape(size, self._support)
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def support(self) -> Constraint:
        """The set on which the density is constant."""
        return self._support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Flat":
        """Return the prior with a larger batch shape."""
        return Flat(torch.Size(batch_shape) + self.event_shape, self._support, validate_args=self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return zeros, one for each event of value (..., *batch, *event): (..., *batch)."""
        if self._validate_args:
            self._validate_sample(value)
        events = value.shape[: value.dim() - len(self.event_shape)]
        return value.new_zeros(torch.broadcast_shapes(events, self.batch_shape))
