"""The coordinates in which a fit searches: distances in posterior sds, whatever the data's units and N."""

from dataclasses import dataclass

from torch import Tensor

from dadvi.families import Family, Gaussian
from dadvi.quadratic import Curvature, DenseCurvature


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
        rotated = family.takes_rotation and isinstance(curvature, DenseCurvature)
        basis = curvature.root if rotated else curvature.precision_diagonal.rsqrt()  # type: ignore[attr-defined]
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

    def params(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the family's parameters in u-space."""
        if self.basis.dim() == 2:
            return theta
        return {**theta, "loc": self.curvature.root_times(theta["loc"]) / self.basis}

    def pull_back(self, grad: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a gradient in the family's u-space parameters as one in θ."""
        if self.basis.dim() == 2:
            return grad
        return {**grad, "loc": self.curvature.root_transpose_times(grad["loc"] / self.basis)}

    def member(self, theta: dict[str, Tensor]) -> Gaussian:
        """Return q over η."""
        return Gaussian(self.family, self.family.affine(self.params(theta), self.center, self.basis))
