"""Anderson acceleration: the fixed point of a map x ← F(x), from the last few of its values.

With residuals f_i = F(x_i) − x_i, the next point is that at which a combination of the last residuals, which an affine
F would have there, is smallest (Anderson 1965; Walker & Ni 2011, "Anderson acceleration for fixed-point iterations"):

    x ← x_t + f_t − Σ_i γ_i (Δx_i + Δf_i),    γ = argmin ‖f_t − Σ_i γ_i Δf_i‖

It needs no more of F. Means and sds of a hierarchy depend on one another, so that a map which finds each given the
other converges linearly; a few of its steps tell the slow directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEPTH = 4
"""Differences that the next point is made from, at most."""

RANK_TOLERANCE = 1e-4
"""Differences that add less than this to what the others span are left out."""


@dataclass(frozen=True, eq=False)
class Iterate:
    """A point and its residual, in units in which distances matter."""

    point: Tensor  # x (n,)
    residual: Tensor  # f (n,)


def accelerated(history: Sequence[Iterate]) -> Tensor:
    """Return the next point (n,) from the iterates so far, the latest last; F's own value if there is only one."""
    *earlier, last = history[-DEPTH - 1 :]
    if not earlier:
        return last.point + last.residual
    pairs = list(zip([*earlier, last], [*earlier, last][1:], strict=False))
    of_points = torch.stack([after.point - before.point for before, after in pairs], dim=1)  # (n, m)
    of_residuals = torch.stack([after.residual - before.residual for before, after in pairs], dim=1)
    gamma = torch.linalg.lstsq(of_residuals, last.residual[:, None], rcond=RANK_TOLERANCE, driver="gelsd").solution
    point: Tensor = last.point + last.residual - ((of_points + of_residuals) @ gamma)[:, 0]
    return point
