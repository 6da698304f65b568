"""Gaussian variational families: q(η) = N(μ, Σ), reached from standard normal noise by a map η = t(θ, ε).

A family is the map and the shape of its parameters θ; a `Gaussian` is a family at some θ. Parameters are dictionaries
of float64 tensors, every family having at least

- ``loc`` (D,): μ,
- ``log_scale`` (D,): log of the positive diagonal of the scale,

so that solvers and stopping rules can treat families alike. Densities and entropies are torch.distributions'.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from dadvi.errors import InputError
from dadvi.likelihood import weighted
from dadvi.structure import Root, Structure

Params: TypeAlias = Mapping[str, Tensor]
"""Parameters θ of a family by name, float64."""


class Family(ABC):
    """How a Gaussian's scale is parameterised: L (or its low-rank counterpart) as a function of θ."""

    name: ClassVar[str]
    linear_scale: ClassVar[bool]
    """Whether η = μ + Lε with L triangular and ``log_scale`` its log diagonal: the entropy is Σ log_scale + const."""
    takes_rotation: ClassVar[bool] = False
    """Whether the family is closed under linear maps, and so can be fitted in coordinates that are fully whitened."""

    @abstractmethod
    def init(self, loc: Tensor, scale: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return parameters of a member centred at `loc` (D,) with sds near `scale` (D,) and hardly any correlation."""

    def noise_dim(self, dim: int) -> int:
        """Return the length of ε for a D-vector η."""
        return dim

    @abstractmethod
    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Return the draws η (K, D) = t(θ, ε) at noise ε (K, noise_dim), differentiable in θ."""

    @abstractmethod
    def distribution(self, params: Params) -> Distribution:
        """Return q as a torch distribution with event shape (D,)."""

    @abstractmethod
    def affine(self, params: Params, shift: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Return the parameters of shift + scale·η for η ~ q, with shift (D,).

        `scale` is (D,), positive and elementwise, or, for a family with `takes_rotation`, lower triangular (D, D).
        """

    def describe(self) -> dict[str, Any]:
        """Return the family's name and settings, a JSON object."""
        return {"name": self.name, **vars(self)}

    def stddev(self, params: Params) -> Tensor:
        """Return the marginal sds (D,)."""
        stddev: Tensor = self.distribution(params).stddev
        return stddev

    def log_prob(self, params: Params, eta: Tensor) -> Tensor:
        """Return log q(η) (K,) at η (K, D)."""
        log_density: Tensor = self.distribution(params).log_prob(eta)
        return log_density

    def entropy(self, params: Params) -> Tensor:
        """Return the entropy of q, a scalar in nats: D/2·(1 + log 2π) + ½ log|Σ|."""
        entropy: Tensor = self.distribution(params).entropy()
        return entropy

    def pullback(self, params: Params, noise: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Return Σ_k (∂t(θ, ε_k)/∂θ)ᵀ g_k, which carries gradients g (K, D) at the draws to θ.

        For L triangular it is Σ_k g_k for μ and tril(Σ_k g_k ε_kᵀ) for L (Kucukelbir et al. 2017, equations 8 and 9).
        """
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        grads = torch.autograd.grad(weighted([self.transform(leaves, noise)], [grad]), list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))


@dataclass(frozen=True)
class MeanField(Family):
    """Σ = diag(exp 2ω): ``log_scale`` ω (D,)."""

    name: ClassVar[str] = "mean_field"
    linear_scale: ClassVar[bool] = True

    def init(self, loc: Tensor, scale: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the member N(loc, diag(scale²))."""
        return {"loc": loc.clone(), "log_scale": scale.log()}

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Return μ + exp(ω)·ε."""
        return params["loc"] + params["log_scale"].exp() * noise

    def distribution(self, params: Params) -> Distribution:
        """Return D independent normals."""
        return Independent(Normal(params["loc"], params["log_scale"].exp()), 1)

    def affine(self, params: Params, shift: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Return the parameters of shift + scale·η."""
        return {"loc": shift + scale * params["loc"], "log_scale": params["log_scale"] + scale.log()}


@dataclass(frozen=True)
class FullRank(Family):
    """Σ = LLᵀ, L = diag(exp ω) + lower: ``log_scale`` ω (D,), ``lower`` (D, D), read below its diagonal only."""

    name: ClassVar[str] = "full_rank"
    linear_scale: ClassVar[bool] = True
    takes_rotation: ClassVar[bool] = True

    def init(self, loc: Tensor, scale: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the member N(loc, diag(scale²))."""
        return {"loc": loc.clone(), "log_scale": scale.log(), "lower": loc.new_zeros(len(loc), len(loc))}

    def scale_tril(self, params: Params) -> Tensor:
        """Return L (D, D)."""
        return params["lower"].tril(-1) + params["log_scale"].exp().diag()

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Return μ + Lε."""
        return params["loc"] + noise @ self.scale_tril(params).T

    def distribution(self, params: Params) -> Distribution:
        """Return a multivariate normal given by its Cholesky factor."""
        return MultivariateNormal(params["loc"], scale_tril=self.scale_tril(params))

    def affine(self, params: Params, shift: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Return the parameters of shift + scale·η, with `scale` (D,) or lower triangular (D, D)."""
        scale = scale.diag() if scale.dim() == 1 else scale
        tril = scale @ self.scale_tril(params)
        return {"loc": shift + scale @ params["loc"], "log_scale": tril.diagonal().log(), "lower": tril.tril(-1)}


@dataclass(frozen=True)
class LowRank(Family):
    """Σ = diag(exp 2ω) + FFᵀ: ``log_scale`` ω (D,), ``factor`` F (D, r) (Ong, Nott & Smith 2018).

    Parameters
    ----------
    rank
        Number r of columns of F, at least 1.

    Raises
    ------
    InputError
        If `rank` is below 1.

    """

    name: ClassVar[str] = "low_rank"
    linear_scale: ClassVar[bool] = False
    rank: int = 10

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"LowRank(rank={self.rank}): the rank must be at least 1; use MeanField() for rank 0")

    def init(self, loc: Tensor, scale: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return a member whose factor is small but random: at F = 0 the ELBO's gradient in F vanishes."""
        factor = torch.from_numpy(rng.standard_normal((len(loc), self.rank))) * (0.1 / self.rank**0.5)
        return {"loc": loc.clone(), "log_scale": scale.log(), "factor": scale[:, None] * factor}

    def noise_dim(self, dim: int) -> int:
        """Return D + r: noise of the diagonal first, then of the factor."""
        return dim + self.rank

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Return μ + exp(ω)·ε₁ + Fε₂."""
        dim = len(params["loc"])
        diagonal, common = noise[:, :dim], noise[:, dim:]
        return params["loc"] + params["log_scale"].exp() * diagonal + common @ params["factor"].T

    def distribution(self, params: Params) -> Distribution:
        """Return torch's low-rank multivariate normal."""
        return LowRankMultivariateNormal(params["loc"], params["factor"], (2 * params["log_scale"]).exp())

    def affine(self, params: Params, shift: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Return the parameters of shift + scale·η."""
        return {
            "loc": shift + scale * params["loc"],
            "log_scale": params["log_scale"] + scale.log(),
            "factor": scale[:, None] * params["factor"],
        }


@dataclass(frozen=True)
class Arrow(Family):
    """Σ = R Rᵀ with R the root of an arrowhead precision: what linear response makes of the effects of many groups.

    A result, not a family to search in: its parameters are those of a `dadvi.structure.Root`, with ``loc`` (D,).
    """

    name: ClassVar[str] = "arrow"
    linear_scale: ClassVar[bool] = False

    @staticmethod
    def member(loc: Tensor, root: Root) -> "Gaussian":
        """Return the Gaussian with this mean (D,) and root."""
        indices = {"dense": root.structure.dense, "groups": root.structure.groups}
        values = {"dense_root": root.dense, "group_roots": root.groups, "coupling": root.coupling}
        return Gaussian(Arrow(), {"loc": loc, **indices, **values})

    def init(self, loc: Tensor, scale: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:  # noqa: ARG002
        """Raise InputError: nothing is fitted in this family."""
        raise InputError("family 'arrow' is what linear_response() returns and cannot be fitted; use 'mean_field'")

    def root(self, params: Params) -> Root:
        """Return R."""
        dense, groups = params["dense"], params["groups"]
        structure = Structure(dense, groups, params["loc"].new_ones(len(groups)), torch.ones_like(dense).bool())
        return Root(structure, params["dense_root"], params["group_roots"], params["coupling"])

    def transform(self, params: Params, noise: Tensor) -> Tensor:
        """Return μ + Rε."""
        return params["loc"] + self.root(params).times(noise)

    def distribution(self, params: Params) -> Distribution:
        """Return q as a multivariate normal, with R in full."""
        root = self.root(params).matrix()
        return MultivariateNormal(params["loc"], covariance_matrix=root @ root.T)

    def affine(self, params: Params, shift: Tensor, scale: Tensor) -> dict[str, Tensor]:
        """Return the parameters of shift + scale·η, with `scale` (D,)."""
        dense, groups = params["dense"], params["groups"]
        return {
            **params,
            "loc": shift + scale * params["loc"],
            "dense_root": scale[dense, None] * params["dense_root"],
            "group_roots": scale[groups][..., None] * params["group_roots"],
            "coupling": params["coupling"] / scale[dense],
        }

    def stddev(self, params: Params) -> Tensor:
        """Return the marginal sds (D,)."""
        return self.root(params).stddev

    def log_prob(self, params: Params, eta: Tensor) -> Tensor:
        """Return log q(η) (K,) at η (K, D)."""
        root = self.root(params)
        standard = root.inverse_times(eta - params["loc"])
        log_density: Tensor = Normal(0.0, 1.0).log_prob(standard).sum(1) - root.log_det()
        return log_density

    def entropy(self, params: Params) -> Tensor:
        """Return the entropy of q in nats, a scalar."""
        return len(params["loc"]) / 2 * (1 + math.log(2 * math.pi)) + self.root(params).log_det()


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A member of a family: q at given parameters."""

    family: Family
    params: Params

    @property
    def dim(self) -> int:
        """D, the number of unconstrained coordinates."""
        return len(self.params["loc"])

    @property
    def loc(self) -> Tensor:
        """Mean μ (D,)."""
        return self.params["loc"]

    @property
    def stddev(self) -> Tensor:
        """Marginal sds (D,)."""
        return self.family.stddev(self.params)

    @property
    def covariance_matrix(self) -> Tensor:
        """Covariance Σ (D, D)."""
        if isinstance(self.family, MeanField):
            return self.stddev.square().diag()
        covariance: Tensor = self.family.distribution(self.params).covariance_matrix  # type: ignore[attr-defined]
        return covariance

    def transform(self, noise: Tensor) -> Tensor:
        """Return the draws (K, D) at noise ε (K, noise_dim)."""
        return self.family.transform(self.params, noise)

    def rsample(self, num_draws: int, rng: np.random.Generator) -> Tensor:
        """Return `num_draws` independent draws (K, D)."""
        return self.transform(torch.from_numpy(rng.standard_normal((num_draws, self.family.noise_dim(self.dim)))))

    def log_prob(self, eta: Tensor) -> Tensor:
        """Return log q(η) (K,)."""
        return self.family.log_prob(self.params, eta)

    def entropy(self) -> Tensor:
        """Return the entropy in nats, a scalar."""
        return self.family.entropy(self.params)


FAMILIES: Mapping[str, type[Family]] = {family.name: family for family in (MeanField, FullRank, LowRank)}
"""Families to fit in, by name."""

STORED_FAMILIES: Mapping[str, type[Family]] = {**FAMILIES, Arrow.name: Arrow}
"""Families of posteriors that can be saved and read back, by name."""


def check_known(family: Family) -> None:
    """Raise InputError for a family of the user's: there would be no way to read back what is saved of it."""
    if STORED_FAMILIES.get(family.name) is not type(family):
        known = ", ".join(STORED_FAMILIES)
        raise InputError(f"family {family.name!r} is not one of dadvi's ({known}), so it cannot be saved")


def family_from(described: Mapping[str, Any]) -> Family:
    """Return the family that `Family.describe` described."""
    settings = dict(described)
    return STORED_FAMILIES[settings.pop("name")](**settings)


def make_family(family: str | Family) -> Family:
    """Return the family of that name with its default settings, or the family itself.

    Raises
    ------
    InputError
        If there is no family of that name.

    """
    if isinstance(family, Family):
        return family
    if family not in FAMILIES:
        known = ", ".join(repr(name) for name in FAMILIES)
        raise InputError(
            f"unknown family {family!r}: use one of {known}, or a family object such as dadvi.LowRank(rank=5)"
        )
    return FAMILIES[family]()
