"""Third-order terms of a log-likelihood along the dense coordinates that bend it most: scales that multiply effects.

Where effects are τz, the curvature of every z goes as τ², so that a second-order expansion holds only for tiny steps of
log τ, and means and sds that are found in turn chase one another from round to round. For a coordinate b, M = ∂H/∂η_b
is an arrowhead like H, and

    f(δ) = ½ δ_b δᵀMδ − ½ δ_b² mᵀδ + ⅙ δ_b³ m_b,      m = M e_b

is the cubic with ∂³f/∂δ_b∂δ∂δᵀ = M and no term without δ_b. Terms that two such coordinates share are counted twice.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dadvi.passes import HessianVector
from dadvi.quadratic import Curvature
from dadvi.quadrature import Rule
from dadvi.structure import Arrowhead
from dadvi.subsample import Subsample

BENDING = 0.2
"""Fraction of an error that a round would leave for want of third-order terms, above which a coordinate has them."""

FARTHEST = 0.6
"""A step may change the curvature of groups by this fraction, as the third-order terms have it."""

MOST_BENDING = 4
"""Coordinates with third-order terms, at most: each costs two thirds of what the Hessian costs."""

DIFFERENCE = 4.0
"""Half the step of the finite differences, in posterior sds: wide, for rows in float32."""


@dataclass(frozen=True, eq=False)
class Cubic:
    """The third-order terms along one dense coordinate."""

    place: int  # of b among the dense coordinates
    change: Arrowhead  # M

    @property
    def coordinate(self) -> int:
        """The coordinate b."""
        return int(self.change.structure.dense[self.place])

    @property
    def row(self) -> Tensor:
        """The vector m = M e_b (D,)."""
        unit = self.change.corner.new_zeros(1, self.change.structure.dim)
        unit[0, self.coordinate] = 1
        return self.change.times(unit)[0]

    def value_and_grad(self, away: Tensor) -> tuple[Tensor, Tensor]:
        """Return f (K,) and its gradient (K, D) at δ (K, D)."""
        row, at = self.row, away[:, self.coordinate, None]  # m, δ_b (K, 1)
        moved = self.change.times(away)  # Mδ
        squared, along = (away * moved).sum(1, keepdim=True), (away @ row)[:, None]
        value = 0.5 * at * squared - 0.5 * at**2 * along + at**3 * row[self.coordinate] / 6
        grad = at * moved - 0.5 * at**2 * row
        grad[:, self.coordinate] += (0.5 * squared - at * along + 0.5 * at**2 * row[self.coordinate])[:, 0]
        return value[:, 0], grad

    def hessian(self, away: Tensor) -> Arrowhead:
        """Return ∇²f at δ (D,), in which it is linear: at a mean it is the mean."""
        row, at = self.row, float(away[self.coordinate])
        mixed = self.change.times(away[None])[0] - at * row
        structure = self.change.structure
        scaled = self.change * at
        corner, cross = scaled.corner.clone(), scaled.cross.clone()
        corner[self.place] += mixed[structure.dense]
        corner[:, self.place] += mixed[structure.dense]
        corner[self.place, self.place] += at * row[self.coordinate] - row @ away
        cross[..., self.place] += mixed[structure.groups]
        return Arrowhead(structure, corner, cross, scaled.blocks)


@dataclass(frozen=True)
class Bending:
    """The dense coordinates with third-order terms, by place, and how far an expansion with these is to be trusted."""

    places: tuple[int, ...] = ()
    radius: float = math.inf  # posterior sds


def find_bending(subsample: Subsample, factor: float, loc: Tensor, curvature: Curvature) -> Bending:
    """Return which dense coordinates need third-order terms, as the scaled subsample shows near its mean.

    A round that takes means and sds in turn leaves of an error in coordinate b the fraction ½ Σ_j σ_j⁴ (∂_b H_jj)² /
    S_bb, over the coordinates j of groups, σ_j² = 1/P_jj, with S the Schur complement of P: the product of ∂μ_b/∂σ and
    ∂σ/∂μ_b at the fixed point of a mean-field ELBO.
    """
    structure = curvature.structure
    if not structure.groups.numel():
        return Bending()
    precision = curvature.precision_diagonal[structure.groups]  # (J, C)
    inverse = (curvature.factor.dense @ curvature.factor.dense.T).diagonal()  # of S
    left, reach = [], []
    for place, at in enumerate(differences(loc, curvature, range(len(inverse)))):
        work = HessianVector(at.nodes.numpy(), structure.probes(), at.weights.numpy())
        products = torch.from_numpy(subsample.run(work).products)[:, structure.groups] * structure.signs[:, None]
        change = factor * products.diagonal(dim1=0, dim2=2)  # ∂_b H_jj (J, C)
        left.append(float(0.5 * (change / precision).square().sum() * inverse[place]))
        reach.append(FARTHEST * float(precision.sum() / (change.abs().sum() * inverse[place].sqrt())))
    most = sorted(range(len(left)), key=lambda place: -left[place])[:MOST_BENDING]
    places = tuple(sorted(place for place in most if left[place] > BENDING))
    return Bending(places, min((reach[place] for place in places), default=math.inf))


def differences(loc: Tensor, curvature: Curvature, places: Iterable[int]) -> list[Rule]:
    """Return points and weights whose weighted Hessians are M = ∂H/∂η_b, for each coordinate by place."""
    rules = []
    for coordinate in curvature.structure.dense[list(places)].tolist():
        step = DIFFERENCE * curvature.stddev[coordinate]
        points = loc.repeat(2, 1)
        points[0, coordinate] += step
        points[1, coordinate] -= step
        rules.append(Rule(points, torch.tensor([0.5, -0.5], dtype=torch.float64) / step))
    return rules
