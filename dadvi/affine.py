"""Hessians of likelihoods whose distribution has parameters that are affine in η, as the logits of a regression.

With φ_i(η) the parameters of row i's distribution, and J_i their derivatives, the same everywhere,

    Σ_i ∇²ℓ_i(η) = Σ_i J_iᵀ W_i(η) J_i,    W_i = ∂²ℓ_i/∂φ_i².

So W is averaged over draws, and J and Jᵀ are applied once, whatever their number: for a regression, two products of
predictors and tangents. Differentiating the log-likelihood twice takes four for every draw.

The same holds for the other coordinates where some are *held* at the same values at all draws, such as the scale τ of
effects τz, given which logits are affine in z.

Whether it holds is looked at on every chunk: what bends may touch few rows.
"""

from collections.abc import Iterable, Sequence
from itertools import product

import torch
from torch import Tensor

from dadvi.batching import Pick, add_gradients, pick
from dadvi.likelihood import BoundModel, Make, weighted
from dadvi.types import Batch, Latents

AFFINE = 1e-9
"""Difference from an affine function, beside the largest value of a row, up to which there is none in float64."""

OTHER_POINTS = 3
"""Points that are looked at before those of the Hessian: the origin and two others."""

SAME = 1e-3
"""Relative difference up to which two sums over rows are taken for the same, in float32."""


def has_affine_parameters(model: BoundModel, batch: Batch, points: Tensor) -> bool:
    """Return whether all parameters are one number a row, and φ(a) + φ(b) = φ(c) + φ(a + b − c) at points (3, D).

    In those coordinates in which the points differ. False also where the likelihood fails at such points.
    """
    a, b, c = points
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    try:
        latents, _ = model.model.space.constrain(torch.stack([a, b, c, a + b - c]))
        parameters = model.parameters(latents, batch)[1]  # each (4, rows or 1)
    except Exception:  # noqa: BLE001  points far from the start are no reason to refuse a likelihood
        return False
    return all(
        value.dim() == 2 and bool(((signs @ value.double()).abs() <= AFFINE * value.abs().amax(0)).all())
        for value in parameters.values()
    )


class AffineHessian:
    """Σ_k w_k Σ_i ∇²ℓ_i(η_k) v_t (T, D), added up over batches whose parameters are affine.

    What grows with D is done once for all batches: these see constrained latents, and of effects those of their rows.

    Parameters
    ----------
    points, weights
        η (K, D) and w (K,).
    tangents
        v (T, D).
    held
        Coordinates that are the same at all points, and 0 in products and tangents. All of a latent, or no batch is
        added.
    numbers_at_once
        That an array may have: tangents times rows, or times the elements of a latent that is not picked from.

    """

    def __init__(
        self,
        model: BoundModel,
        points: Tensor,
        weights: Tensor,
        tangents: Tensor,
        *,
        held: Sequence[int] = (),
        numbers_at_once: int,
    ) -> None:
        self._model, self._weights, self._numbers_at_once = model, weights, numbers_at_once
        total, still = tangents.sum(0, keepdim=True), list(held)
        looked_at = torch.cat([torch.zeros_like(total), total, -total, points])  # J v is by steps of v from the first
        along = tangents.clone()
        looked_at[:, still] = along[:, still] = points[0, still]
        self._along = along.requires_grad_()
        sites = {site.name: site for site in model.model.space.sites}
        num_held = {name: sum(0 <= each - sites[name].offset < sites[name].size for each in held) for name in sites}
        self._free = [name for name in model.latents if num_held[name] < sites[name].size]
        self._outputs = self._constrained(self._along)
        self._looked_at, self._tangents = self._leaves(looked_at), self._leaves(along)
        self._products = {name: torch.zeros_like(self._outputs[name]) for name in self._free}
        self._normals: dict[tuple[int, int, torch.dtype], Tensor] = {}  # by place, length and dtype
        wholly = all(num_held[name] == 0 for name in self._free)  # a latent is held as a whole or not at all
        self._applies, self._added = wholly and self._constrains_affinely(looked_at), False

    def add(self, batch: Batch) -> bool:
        """Add the rows of a batch, and return True; if parameters are not affine there, return False."""
        if not self._applies:
            return False
        make, parameters, affine = self._looked_at_rows(batch)
        if not affine:
            return False
        self._added = True
        origin = {name: value[:1] for name, value in parameters.items()}  # each (1, rows or 1)
        at_points = {name: value[OTHER_POINTS:] for name, value in parameters.items()}
        bends: dict[tuple[str, str], Tensor] | None = None
        at_once = max(1, self._numbers_at_once // self._longest(batch))
        for first in range(0, len(self._along), at_once):
            some = slice(first, first + at_once)
            leaves = {name: z[some].requires_grad_(name in self._free) for name, z in self._tangents.items()}
            picked = self._picked(leaves, batch)
            _, along = self._model.parameters(leaves, batch, picked)  # each (T, rows or 1)
            # J v of each parameter:
            pushed = {name: value.detach() - origin[name] for name, value in along.items() if value.requires_grad}
            if bends is None:
                bends = self._mean_second_derivatives(make, at_points, batch, list(pushed))
            back: dict[str, Tensor] = {}
            for (a, b), bend in bends.items():
                of_rows = bend * pushed[b]
                of_rows = of_rows if of_rows.shape == pushed[a].shape else of_rows.sum(1, keepdim=True)
                back[a] = back[a] + of_rows if a in back else of_rows
            if back:
                value = weighted([along[name] for name in back], back.values())
                wanted = {name: leaves[name] for name in self._free}
                add_gradients(value, wanted, picked, batch, {name: z[some] for name, z in self._products.items()})
        return True

    def products(self) -> Tensor:
        """Return the products (T, D) over all batches added."""
        if not self._added:
            return torch.zeros_like(self._along)
        # The empty product makes it a function of the tangents also where all latents are held.
        value = weighted(self._outputs.values(), self._products.values()) if self._free else self._along[:, :0].sum()
        return torch.autograd.grad(value, self._along)[0]

    def _constrained(self, eta: Tensor) -> dict[str, Tensor]:
        """Return the latents that are not held."""
        latents, _ = self._model.model.space.constrain(eta)
        return {name: latents[name] for name in self._free}

    def _leaves(self, eta: Tensor) -> dict[str, Tensor]:
        """Return the latents of the likelihood, constrained, in its dtype."""
        latents, _ = self._model.model.space.constrain(eta.detach())
        return {name: latents[name].to(self._model.dtype) for name in self._model.latents}

    def _longest(self, batch: Batch) -> int:
        """Return the numbers that the longest array of a batch has for each tangent."""
        picked = {latent for latent, _ in self._picked({name: z[:1] for name, z in self._tangents.items()}, batch)}
        sizes = [self._tangents[name][0].numel() for name in self._free if name not in picked]
        return max(len(next(iter(batch.values()))), *sizes, 0)

    def _picked(self, leaves: Latents, batch: Batch) -> dict[Pick, Tensor]:
        return pick([each for each in self._model.picks if each[0] in self._free], leaves, batch)

    def _constrains_affinely(self, points: Tensor) -> bool:
        eta = points.clone().requires_grad_()
        return self._have_same_derivatives(self._constrained(eta).values(), [eta])

    def _looked_at_rows(self, batch: Batch) -> tuple[Make, dict[str, Tensor], bool]:
        """Return what makes the distribution, its parameters at all that is looked at, and whether they are affine."""
        leaves = {name: z.detach().requires_grad_(name in self._free) for name, z in self._looked_at.items()}
        picked = self._picked(leaves, batch)
        make, parameters = self._model.parameters(leaves, batch, picked)
        inputs = [*(leaves[name] for name in self._free), *picked.values()]
        affine = self._have_same_derivatives(parameters.values(), inputs)
        return make, {name: value.detach() for name, value in parameters.items()}, affine

    def _mean_second_derivatives(
        self, make: Make, parameters: dict[str, Tensor], batch: Batch, wanted: list[str]
    ) -> dict[tuple[str, str], Tensor]:
        """Return Σ_k w_k ∂²ℓ_i/∂a∂b (rows,) for each two of the parameters wanted; those that are 0 may be missing.

        `parameters` are those at the points, each (K, rows or 1).
        """
        if not wanted:
            return {}
        rows = len(next(iter(batch.values())))
        own = {name: parameters[name].expand(-1, rows).clone().requires_grad_() for name in wanted}
        log_lik = self._model.log_lik_of(make, {**parameters, **own}, batch)
        # Each row and draw has parameters of its own, so that the derivatives of a sum are those of its terms.
        first = torch.autograd.grad(log_lik.sum(), list(own.values()), create_graph=True, materialize_grads=True)
        found = {}
        for (a, of_a), b in product(zip(wanted, first, strict=True), wanted):
            if of_a.requires_grad:
                (second,) = torch.autograd.grad(of_a.sum(), own[b], retain_graph=True, materialize_grads=True)
                found[a, b] = self._weights.to(second.dtype) @ second
        return found

    def _have_same_derivatives(self, outputs: Iterable[Tensor], inputs: Sequence[Tensor]) -> bool:
        """Return whether outputs (P, ...) have no second derivatives at inputs (P, ...), and the same first ones.

        By random sums. That a second derivative is 0 is known exactly, whatever the scales of coordinates.
        """
        outputs = [output for output in outputs if output.requires_grad]
        if not outputs:
            return True
        value = weighted(outputs, (self._normal(place, output) for place, output in enumerate(outputs)))
        # An input of no use has no gradient, such as all effects of groups where those of the rows were picked.
        grads: Sequence[Tensor | None] = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
        first = [grad for grad in grads if grad is not None]
        bent = [grad for grad in first if grad.requires_grad]
        if bent:
            directions = (self._normal(place, grad) for place, grad in enumerate(bent, len(outputs)))
            second: Sequence[Tensor | None]
            second = torch.autograd.grad(weighted(bent, directions), inputs, allow_unused=True)
            if any(grad is not None and grad.any() for grad in second):
                return False
        return all(bool(((each - each[0]).abs() <= SAME * each.abs().amax(0)).all()) for each in first)

    def _normal(self, place: int, like: Tensor) -> Tensor:
        """Return normal numbers for one of P points, independent of other places' and the same for all batches."""
        key = place, like[0].numel(), like.dtype
        if key not in self._normals:
            self._normals[key] = torch.randn(key[1], generator=torch.Generator().manual_seed(place), dtype=like.dtype)
        return self._normals[key].reshape(like[0].shape)
