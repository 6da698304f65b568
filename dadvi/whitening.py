"""The coordinates in which a fit searches: distances in posterior sds, whatever the data's units and N."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from dadvi.elbo import Entropy, Estimate, estimate
from dadvi.families import Family, Gaussian, Params
from dadvi.quadratic import Curvature

LogJoint: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps draws η (K, D) to log π (K,) and ∇ log π (K, D), or unbiased estimates of them."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """Search parameters θ of a family, made from the curvature P = (R Rᵀ)⁻¹ at a point.

    The location is searched as v with η = center + R v: there log π has unit curvature in every direction, whatever
    the family. Everything else of the family lives in u = U⁻¹(η − center). A family closed under linear maps has U =
    R, so that its optimum is near N(0, I); others have U diagonal with 1/√P_jj, the sds of a mean-field optimum. θ
    are the family's parameters in u-space, but for ``loc``, which is v.
    """

    family: Family
    center: Tensor  # (D,)
    curvature: Curvature
    basis: Tensor  # U: (D,) for a diagonal, or lower triangular (D, D)

    @classmethod
    def around(cls, family: Family, center: Tensor, curvature: Curvature) -> "Whitening":
        """Whiten about a point by the curvature there."""
        rotated = family.takes_rotation and curvature.is_full
        basis = curvature.root if rotated else curvature.precision_diagonal.rsqrt()
        return cls(family, center, curvature, basis)

    @property
    def log_det(self) -> Tensor:
        """log|det U|, by which entropies in η exceed those in u."""
        diagonal = self.basis if self.basis.dim() == 1 else self.basis.diagonal()
        return diagonal.log().sum()

    def to_eta(self, u: Tensor) -> Tensor:
        """Return η (K, D) = center + U u at u (K, D)."""
        return self.center + (u * self.basis if self.basis.dim() == 1 else u @ self.basis.T)

    def grad_to_u(self, grad: Tensor) -> Tensor:
        """Return gradients in η (K, D) as gradients in u."""
        return grad * self.basis if self.basis.dim() == 1 else grad @ self.basis

    def params(self, theta: Params) -> dict[str, Tensor]:
        """Return the family's parameters in u-space."""
        if self.basis.dim() == 2:
            return dict(theta)
        return {**theta, "loc": self.curvature.root_times(theta["loc"]) / self.basis}

    def pull_back(self, grad: Params) -> dict[str, Tensor]:
        """Return a gradient in the family's u-space parameters as one in θ."""
        if self.basis.dim() == 2:
            return dict(grad)
        return {**grad, "loc": self.curvature.root_transpose_times(grad["loc"] / self.basis)}

    def estimate(self, theta: Params, noise: Tensor, log_joint: LogJoint, entropy: Entropy = "closed_form") -> Estimate:
        """Return the ELBO of θ, its gradient being in θ, from log π and ∇ log π at the draws that `noise` gives."""
        params = {name: value.detach() for name, value in self.params(theta).items()}
        value, grad = log_joint(self.to_eta(self.family.transform(params, noise)))
        est = estimate(self.family, params, noise, value, self.grad_to_u(grad), entropy)
        return Estimate(
            est.elbo + float(self.log_det), self.pull_back(est.energy_grad), self.pull_back(est.entropy_grad)
        )

    def member(self, theta: Params) -> Gaussian:
        """Return q over η."""
        return Gaussian(self.family, self.family.affine(self.params(theta), self.center, self.basis))
