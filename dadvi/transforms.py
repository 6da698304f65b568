"""Bijections from R^n onto the supports of latents, and the space of all latents, R^D.

A latent z with density p(z) on its support, z = T(η), has the density p(T(η))·|det J_T(η)| in η ∈ R^n: automatic
differentiation variational inference fits its Gaussian there (Kucukelbir, Tran, Ranganath, Gelman & Blei 2017, JMLR 18,
section 2.3). `dadvi.supports` has the sets, `dadvi.bijections` the formulas.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to as torch_biject_to
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform, identity_transform

from dadvi.bijections import (
    CorrCholesky,
    HalfLine,
    Interval,
    LowerCholesky,
    LowerTriangular,
    Ordered,
    PositiveDefinite,
    Simplex,
    Symmetric,
)
from dadvi.errors import ModelError
from dadvi.supports import (
    USE_KNOWN_SUPPORT,
    Cat,
    Stack,
    ordered,
    resolve,
    split_shape,
)
from dadvi.types import Latents


class Bijection(Transform):
    """A bijection from R^size onto one draw of a latent: x (..., size) → y (..., *shape).

    Any number of leading dimensions; `bijection.inv(y)` is the inverse.

    Attributes
    ----------
    shape : the shape of one draw.
    unconstrained_shape : the shape of its free coordinates, which x lists in row order.
    size : their number.
    """

    domain = constraints.real_vector
    bijective = True

    def __init__(self, transform: Transform, support: Constraint, shape: torch.Size) -> None:
        super().__init__()
        self.codomain = support
        self.shape = shape
        self.unconstrained_shape = torch.Size(transform.inverse_shape(shape))
        self.size = self.unconstrained_shape.numel()
        self._transform = transform

    def _call(self, x: Tensor) -> Tensor:
        y: Tensor = self._transform(x.reshape(x.shape[:-1] + self.unconstrained_shape))
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x: Tensor = self._transform.inv(y)
        return x.reshape(self.inverse_shape(y.shape))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log|det J| of x (..., size) → y (..., *shape), one number a draw: (...,)."""
        draws = x.shape[:-1]
        log_det: Tensor = self._transform.log_abs_det_jacobian(x.reshape(draws + self.unconstrained_shape), y)
        return log_det.reshape((*draws, math.prod(log_det.shape[len(draws) :]))).sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of y for x of a shape."""
        return shape[:-1] + self.shape

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape of x for y of a shape."""
        return torch.Size((*shape[: len(shape) - len(self.shape)], self.size))


def biject_to(support: Constraint, shape: Sequence[int]) -> Bijection:
    """Return the bijection from R^n onto the draws of one shape in a support.

    A support that dadvi does not know is looked up in `torch.distributions.biject_to`; nothing is registered there.

    Parameters
    ----------
    support : Constraint
        A continuous support.
    shape : sequence of int
        The shape of one draw: `distribution.batch_shape + distribution.event_shape`.

    Raises
    ------
    ModelError
        The support is discrete, unknown, empty, or does not go with the shape.
    """
    size = torch.Size(shape)
    support = resolve(support, len(size))
    split_shape(size, support)
    return Bijection(_transform_to(support, size), support, size)


def _transform_to(support: Any, shape: torch.Size) -> Transform:
    make = _TRANSFORMS.get(type(support))
    if make is not None:
        return make(support, shape)
    try:
        transform: Transform = torch_biject_to(support)
    except NotImplementedError:
        raise ModelError(f"no bijection from R^n onto the support {support!r} is known; {USE_KNOWN_SUPPORT}") from None
    return transform


def _bound(support: Constraint, bound: float | Tensor, shape: torch.Size) -> Tensor:
    tensor = torch.as_tensor(bound, dtype=None if isinstance(bound, Tensor) else torch.float64)
    if not tensor.isfinite().all():
        raise ModelError(
            f"the support {support!r} has a bound that is not finite; use real, greater_than or less_than where there "
            "is none"
        )
    try:
        broadcast = torch.broadcast_shapes(tensor.shape, shape)
    except RuntimeError:
        broadcast = None
    if broadcast != shape:
        raise ModelError(
            f"the support {support!r} has bounds of shape {tuple(tensor.shape)}, but a draw has shape {tuple(shape)}; "
            "give the latent a shape to which its bounds broadcast"
        )
    return tensor


def _above(support: Any, shape: torch.Size) -> Transform:
    return HalfLine(_bound(support, support.lower_bound, shape), 1)


def _below(support: Any, shape: torch.Size) -> Transform:
    return HalfLine(_bound(support, support.upper_bound, shape), -1)


def _between(support: Any, shape: torch.Size) -> Transform:
    lower, upper = _bound(support, support.lower_bound, shape), _bound(support, support.upper_bound, shape)
    if not (lower < upper).all():
        raise ModelError(f"the support {support!r} is empty; give it lower bounds that lie below its upper bounds")
    return Interval(lower, upper)


def _square(transform: Transform) -> Callable[[Any, torch.Size], Transform]:
    def make(support: Any, shape: torch.Size) -> Transform:
        if shape[-1] != shape[-2]:
            raise ModelError(
                f"the support {support!r} holds square matrices, but a draw has shape {tuple(shape)}; "
                "make its last two dimensions equal"
            )
        return transform

    return make


def _always(transform: Transform) -> Callable[[Any, torch.Size], Transform]:
    return lambda support, shape: transform  # noqa: ARG005


def _independent(support: Any, shape: torch.Size) -> Transform:
    return _transform_to(support.base_constraint, shape)


def _cat(support: Any, shape: torch.Size) -> Transform:
    if sum(support.lengths) != shape[support.dim]:
        raise ModelError(
            f"a cat support has parts of lengths {support.lengths}, but dim {support.dim} of a draw of shape "
            f"{tuple(shape)} has {shape[support.dim]}; make the lengths add up to it"
        )
    axis = len(shape) + support.dim
    blocks = zip(support.cseq, support.lengths, strict=True)
    parts = [biject_to(part, (*shape[:axis], length, *shape[axis + 1 :])) for part, length in blocks]
    return _Join(parts, support.dim, stacked=False)


def _stack(support: Any, shape: torch.Size) -> Transform:
    if len(support.cseq) != shape[support.dim]:
        raise ModelError(
            f"a stack support has {len(support.cseq)} parts, but dim {support.dim} of a draw of shape {tuple(shape)} "
            f"has {shape[support.dim]}; give one part to each"
        )
    axis = len(shape) + support.dim
    return _Join(
        [biject_to(part, shape[:axis] + shape[axis + 1 :]) for part in support.cseq], support.dim, stacked=True
    )


# From the type of a support to its bijection: a table of our own, for torch's registry is shared by the whole process.
_TRANSFORMS: dict[type, Callable[[Any, torch.Size], Transform]] = {
    type(constraints.real): _always(identity_transform),
    constraints.greater_than: _above,
    constraints.greater_than_eq: _above,
    constraints.less_than: _below,
    constraints.interval: _between,
    constraints.half_open_interval: _between,
    type(ordered): _always(Ordered()),
    type(constraints.simplex): _always(Simplex()),
    type(constraints.square): _square(identity_transform),
    type(constraints.symmetric): _square(Symmetric()),
    type(constraints.lower_triangular): _square(LowerTriangular()),
    type(constraints.lower_cholesky): _square(LowerCholesky()),
    type(constraints.corr_cholesky): _square(CorrCholesky()),
    type(constraints.positive_definite): _square(PositiveDefinite()),
    type(constraints.positive_semidefinite): _square(PositiveDefinite()),
    constraints.independent: _independent,
    Cat: _cat,
    Stack: _stack,
}


class _Join(Transform):
    """Bijections of the blocks of a tensor, joined along a dim; x lists the blocks' coordinates one after another."""

    def __init__(self, parts: Sequence[Bijection], dim: int, *, stacked: bool) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.dim = dim
        self.stacked = stacked

    def _coordinates(self, x: Tensor) -> tuple[Tensor, ...]:
        coordinates: tuple[Tensor, ...] = x.split([part.size for part in self.parts], -1)
        return coordinates

    def _blocks(self, y: Tensor) -> tuple[Tensor, ...]:
        if self.stacked:
            return y.unbind(self.dim)
        blocks: tuple[Tensor, ...] = y.split([part.shape[self.dim] for part in self.parts], self.dim)
        return blocks

    def _call(self, x: Tensor) -> Tensor:
        blocks = [part(coordinates) for part, coordinates in zip(self.parts, self._coordinates(x), strict=True)]
        return torch.stack(blocks, self.dim) if self.stacked else torch.cat(blocks, self.dim)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.cat([part.inv(block) for part, block in zip(self.parts, self._blocks(y), strict=True)], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        parts = zip(self.parts, self._coordinates(x), self._blocks(y), strict=True)
        return torch.stack([part.log_abs_det_jacobian(coordinates, block) for part, coordinates, block in parts]).sum(0)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:  # noqa: ARG002 (the parts know theirs)
        return torch.Size((sum(part.size for part in self.parts),))


@dataclass(frozen=True, eq=False)
class Site:
    """One latent: its support, and its place in the vector of all latents."""

    name: str
    shape: torch.Size  # of one draw, constrained
    support: Constraint  # resolved: see dadvi.supports.resolve
    offset: int  # of its first coordinate in R^D
    bijection: Bijection  # R^size → one draw

    @classmethod
    def make(cls, name: str, shape: Sequence[int], support: Constraint, offset: int = 0) -> "Site":
        """Return the site of a latent of a shape (batch and event dimensions) and a support.

        Raises
        ------
        ModelError
            As `biject_to`, naming the latent.
        """
        try:
            bijection = biject_to(support, shape)
        except ModelError as error:
            raise ModelError(f"latent {name!r}: {error}") from None
        return cls(name, bijection.shape, bijection.codomain, offset, bijection)

    @property
    def size(self) -> int:
        """The number of its coordinates in R^D."""
        return self.bijection.size

    @property
    def unconstrained_shape(self) -> torch.Size:
        """The shape of its coordinates: that of a draw for an elementwise support."""
        return self.bijection.unconstrained_shape

    @property
    def elementwise(self) -> bool:
        """Whether each element of a draw depends on its own coordinate only."""
        support = self.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        return support.event_dim == 0 and not isinstance(support, Cat | Stack)

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each coordinate: "tau" of a scalar, "beta[3]", "W[0,2]", by its index in unconstrained_shape."""
        indices = product(*map(range, self.unconstrained_shape))
        return tuple(f"{self.name}[{','.join(map(str, index))}]" if index else self.name for index in indices)

    def constrain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map coordinates x (K, size) to draws (K, *shape), with the log-det of each (K,)."""
        z = self.bijection(x)
        return z, self.bijection.log_abs_det_jacobian(x, z)

    def unconstrain(self, z: Tensor) -> Tensor:
        """Map draws z (K, *shape) to coordinates (K, size).

        Raises
        ------
        ModelError
            z has another shape, or values outside the support or on its boundary.
        """
        draws = z.dim() - len(self.shape)
        if draws < 0 or z.shape[draws:] != self.shape:
            raise ModelError(
                f"latent {self.name!r} has shape {tuple(self.shape)}, but its values have {tuple(z.shape)}; "
                "give them that shape, with draws in front"
            )
        x: Tensor = self.bijection.inv(z)
        # Only what lies inside comes back the same: that holds for every support, where constraints' own checks differ.
        if not (x.isfinite().all() and torch.allclose(self.bijection(x), z, rtol=1e-4, atol=1e-6)):
            raise ModelError(
                f"latent {self.name!r}: values from {z.min():.6g} to {z.max():.6g} do not lie inside its support "
                f"{self.support!r}; start it strictly inside"
            )
        return x


@dataclass(frozen=True, eq=False)
class LatentSpace:
    """All latents side by side in one vector of R^D, in the order of the model."""

    sites: tuple[Site, ...]

    @classmethod
    def of(cls, latents: Mapping[str, tuple[Sequence[int], Constraint]]) -> "LatentSpace":
        """Return the space of latents given by name as (shape of one draw, support).

        Raises
        ------
        ModelError
            As `biject_to`, naming the latent.
        """
        sites: list[Site] = []
        for name, (shape, support) in latents.items():
            offset = sites[-1].offset + sites[-1].size if sites else 0
            sites.append(Site.make(name, shape, support, offset))
        return cls(tuple(sites))

    @property
    def size(self) -> int:
        """D, the number of coordinates."""
        return sum(site.size for site in self.sites)

    @property
    def names(self) -> tuple[str, ...]:
        """The latent to which each of the D coordinates belongs, and its index there: see `Site.labels`."""
        return tuple(label for site in self.sites for label in site.labels)

    def constrain(self, eta: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Map points eta (K, D) to draws, name → (K, *shape), with the log-det of each (K,).

        Raises
        ------
        ModelError
            eta has another number of coordinates.
        """
        if eta.shape[-1:] != (self.size,):
            raise ModelError(
                f"points of shape {tuple(eta.shape)} do not fit the latents, which have {self.size} coordinates; "
                f"give (K, {self.size})"
            )
        latents: dict[str, Tensor] = {}
        log_det = eta.new_zeros(eta.shape[:-1])
        for site in self.sites:
            latents[site.name], term = site.constrain(eta[..., site.offset : site.offset + site.size])
            log_det = log_det + term
        return latents, log_det

    def unconstrain(self, latents: Latents) -> Tensor:
        """Map draws, name → (K, *shape), to points (K, D).

        Raises
        ------
        ModelError
            A latent is missing or unknown, has another shape, or does not lie inside its support.
        """
        names = [site.name for site in self.sites]
        if set(latents) != set(names):
            raise ModelError(f"values of {sorted(latents)} were given, but the latents are {names}; give one for each")
        return torch.cat([site.unconstrain(latents[site.name]) for site in self.sites], -1)
