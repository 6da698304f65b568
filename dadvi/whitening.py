"""The coordinates in which a fit searches: distances in posterior sds, whatever the data's units and N."""

from dataclasses import dataclass

from torch import Tensor

from dadvi.families import Family, Gaussian
from dadvi.quadratic import Curvature


@dataclass(frozen=True, eq=False)
class Whitening:
    """Search parameters θ of a family, made from the curvature P = (R Rᵀ)⁻¹ at a point.

    The family lives in u = (η − center) / unit with unit_j = 1/√P_jj, the sd that a mean-field optimum would have; the location is
    searched as v with η = center + R v, in which log π has unit curvature in every direction, whatever the family.
    Parameters θ are the family's, but for ``loc``, which is v.
    """

    center: Tensor  # (D,)
    unit: Tensor  # (D,)
    curvature: Curvature

    @classmethod
    def around(cls, center: Tensor, curvature: Curvature) -> "Whitening":
        """Whiten about a point by the curvature there."""
        return cls(center, curvature.precision_diagonal.rsqrt(), curvature)

    def params(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the family's parameters in u-space."""
        return {**theta, "loc": self.curvature.root_times(theta["loc"]) / self.unit}

    def pull_back(self, grad: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a gradient in the family's u-space parameters as one in θ."""
        return {**grad, "loc": self.curvature.root_transpose_times(grad["loc"] / self.unit)}

    def member(self, family: Family, theta: dict[str, Tensor]) -> Gaussian:
        """Return q over η."""
        return Gaussian(family, family.affine(self.params(theta), self.center, self.unit))
