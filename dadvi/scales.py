"""Scales that multiply effects: a change of coordinates in which a log-likelihood hardly bends.

Where effects are τz, the likelihood sees w = z exp(log τ − log τ₀) and not τ: it is constant along curves on which τ
grows and z shrinks. The prior alone bends there, thousands of times less than the likelihood does across, and no
expansion in log τ and z follows such a curve over more than a small fraction of z. One in w has it exactly. In general

    w_i = η_i exp(Σ_b p_bi (η_b − η₀_b)),      w_b = η_b for the scales b themselves,

which is found, and not assumed, by what it says of gradients at every point: ∂ℓ/∂η_b = Σ_i p_bi η_i ∂ℓ/∂η_i.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dadvi.affine import has_affine_parameters
from dadvi.binding import CHECK_ROWS, FAR
from dadvi.passes import Gradient
from dadvi.probing import columns
from dadvi.quadrature import Rule
from dadvi.structure import Arrowhead, Structure
from dadvi.subsample import Subsample
from dadvi.types import Purpose, random_stream

MOST_COLUMNS = 64
"""Columns of latents that are tried as what a scale multiplies, at most: each costs a gradient on the subsample."""

SPARE_POINTS = 4
"""Points beyond the number of columns at which an identity must hold."""

IDENTICAL = 1e-8
"""Relative difference up to which two gradients are the same."""


@dataclass(frozen=True, eq=False)
class Scales:
    """Which coordinates b multiply which others, and by which power of their exponentials."""

    structure: Structure
    places: tuple[int, ...]  # of the scales among the dense coordinates
    powers: Tensor  # p (b, D), zero at the scales themselves
    affine: bool = False  # whether the parameters of the likelihood's distribution are affine in w

    @classmethod
    def none(cls, structure: Structure) -> "Scales":
        """Return no scales: w is η."""
        return cls(structure, (), torch.zeros(0, structure.dim, dtype=torch.float64))

    @property
    def coordinates(self) -> Tensor:
        """The coordinates b."""
        return self.structure.dense[list(self.places)]

    @cached_property
    def classes(self) -> tuple[Tensor, Tensor]:
        """The distinct columns of p (b, m), and which of them each coordinate has (D,)."""
        if not self.places:
            return self.powers[:, :1], torch.zeros(self.structure.dim, dtype=torch.int64)
        return torch.unique(self.powers, dim=1, return_inverse=True)  # type: ignore[no-any-return]

    def growth(self, eta: Tensor, origin: Tensor) -> Tensor:
        """Return w over η (K, D) at η (K, D), with η₀ = `origin` (D,)."""
        distinct, which = self.classes
        return ((eta - origin)[:, self.coordinates] @ distinct).exp()[:, which]

    def grad(self, of_w: Tensor, w: Tensor, growth: Tensor) -> Tensor:
        """Return the gradient (K, D) in η from that in w."""
        grad = growth * of_w
        grad[:, self.coordinates] += (of_w * w) @ self.powers.T
        return grad

    def hessian(self, of_w: Arrowhead, grad: Tensor, w: Tensor, growth: Tensor) -> Arrowhead:
        """Return the Hessian in η at one point, from Hessian and gradient (D,) in w, whose scales do not bend."""
        if not self.places:
            return of_w
        dense, groups, places = self.structure.dense, self.structure.groups, list(self.places)
        moved = self.powers * w  # ∂w/∂η_b (b, D)
        bent = of_w.times(moved) + self.powers * grad
        rows = growth * bent  # ∂²ℓ/∂η_b∂η_i
        corner = of_w.corner * growth[dense] * growth[dense, None]
        cross = of_w.cross * growth[dense] * growth[groups][..., None]
        blocks = of_w.blocks * growth[groups][:, None] * growth[groups][..., None]
        corner[places] += rows[:, dense]
        corner[:, places] += rows[:, dense].T
        corner[torch.tensor(places)[:, None], places] = bent @ moved.T
        cross[..., places] += rows[:, groups].permute(1, 2, 0)
        return Arrowhead(self.structure, corner, cross, blocks)

    def grad_in_w(self, mean: Tensor, rule: Rule, origin: Tensor) -> Tensor:
        """Return the gradient (D,) in w, the same at every point, whose mean in η over a rule's points is this."""
        growth = self.growth(rule.nodes, origin)
        grad = mean / rule.mean(growth)
        grad[self.coordinates] -= self.powers @ (grad * rule.mean(growth * rule.nodes))
        return grad

    def unbent(self, of_w: Arrowhead) -> Arrowhead:
        """Return a Hessian in w that does not bend along the scales, as `hessian` takes it."""
        corner, cross, places = of_w.corner.clone(), of_w.cross.clone(), list(self.places)
        corner[places] = corner[:, places] = cross[..., places] = 0
        return Arrowhead(self.structure, corner, cross, of_w.blocks)

    def at_origin(self, eta: Tensor, origin: Tensor) -> Tensor:
        """Return points (K, D) with the scales of η₀ = `origin` (D,) and the likelihood of η (K, D): w elsewhere."""
        points = self.growth(eta, origin) * eta
        points[:, self.coordinates] = origin[self.coordinates]
        return points


def find_scales(subsample: Subsample, structure: Structure, seed: int) -> Scales:
    """Return the dense coordinates that multiply others.

    A scale multiplies whole columns of latents, such as a latent with an element for every group. Gradients at random
    points, more of them than there are columns, tell the powers by least squares; where these leave no residual, the
    identity holds everywhere.
    """
    model = subsample.model.model
    parts = [column for site in model.space.sites for column in columns(site)]
    if not structure.groups.numel() or len(parts) > MOST_COLUMNS:
        return Scales.none(structure)
    noise = random_stream(seed, Purpose.CURVATURE, 3).standard_normal((len(parts) + SPARE_POINTS, model.dim))
    points = model.start + 0.3 * torch.from_numpy(noise)
    grads = torch.from_numpy(subsample.run(Gradient(points.numpy())).grad)
    features = torch.stack([(points * grads)[:, part].sum(1) for part in parts], dim=1)  # (K, columns)
    units = features.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    targets = grads[:, structure.dense]
    found = torch.linalg.lstsq(features / units, targets, driver="gelsd").solution / units[:, None]
    found = found.round(decimals=6)
    left = (targets - features @ found).norm(dim=0)
    places = ((left <= IDENTICAL * targets.norm(dim=0)) & (targets != 0).any(0)).nonzero()[:, 0].tolist()
    powers = torch.zeros(len(places), model.dim, dtype=torch.float64)
    for part, of_part in zip(parts, found[:, places], strict=True):
        powers[:, part] = of_part[:, None]
    if not places or powers[:, structure.dense[places]].any():  # a scale of scales is none of these
        return Scales.none(structure)
    scales = Scales(structure, tuple(places), powers)
    return replace(scales, affine=_is_affine(subsample, scales, points[:3]))


def _is_affine(subsample: Subsample, scales: Scales, points: Tensor) -> bool:
    """Return whether the likelihood's parameters, on the first rows of S, are affine in all but the scales."""
    model, batch = subsample.model, next(iter(subsample.batches.values()))
    if model.strategy != "parameters":
        return False
    far = points[0] + FAR * (points - points[0])
    far[:, scales.coordinates] = points[0, scales.coordinates]
    return has_affine_parameters(model, {name: values[:CHECK_ROWS] for name, values in batch.items()}, far)
