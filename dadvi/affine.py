"""Hessians of likelihoods whose distribution has parameters that are affine in η, as the logits of a regression.

With φ_i(η) the parameters of row i's distribution, and J_i their derivatives, the same everywhere,

    Σ_i ∇²ℓ_i(η) = Σ_i J_iᵀ W_i(η) J_i,    W_i = ∂²ℓ_i/∂φ_i².

So W is averaged over draws, and J and Jᵀ are applied once, whatever their number: for a regression, two products of
predictors and tangents. Differentiating the log-likelihood twice takes four for every draw.

The same holds for the other coordinates where some are *held* at the same values at all draws, such as the scale τ of
effects τz, given which logits are affine in z.

Whether it holds is looked at on every chunk: what bends may touch few rows.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from dadvi.likelihood import BoundModel, weighted
from dadvi.types import Batch

AFFINE = 1e-9
"""Difference from an affine function, beside the largest value of a row, up to which there is none in float64."""

SAME = 1e-3
"""Relative difference up to which two sums over rows are taken for the same, in float32."""


def has_affine_parameters(model: BoundModel, batch: Batch, points: Tensor) -> bool:
    """Return whether all parameters are one number a row, and φ(a) + φ(b) = φ(c) + φ(a + b − c) at points (3, D).

    In those coordinates in which the points differ. False also where the likelihood fails at such points.
    """
    a, b, c = points
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    try:
        parameters = model.parameters(torch.stack([a, b, c, a + b - c]), batch)[1]  # each (4, rows or 1)
    except Exception:  # noqa: BLE001  points far from the start are no reason to refuse a likelihood
        return False
    return all(
        value.dim() == 2 and bool(((signs @ value.double()).abs() <= AFFINE * value.abs().amax(0)).all())
        for value in parameters.values()
    )


def hessian_products(
    model: BoundModel,
    batch: Batch,
    points: Tensor,
    weights: Tensor,
    tangents: Tensor,
    *,
    held: Sequence[int] = (),
    at_once: int,
) -> Tensor | None:
    """Return Σ_k w_k Σ_i ∇²ℓ_i(η_k) v_t (T, D) for η (K, D), w (K,) and v (T, D); None if parameters are not affine.

    Parameters
    ----------
    held
        Coordinates that are the same at all points, and 0 in products and tangents.
    at_once
        Tangents taken at once.

    """
    total = tangents.sum(0, keepdim=True)
    looked_at = torch.cat([torch.zeros_like(total), total, -total, points])  # J v is by steps of v from the origin
    looked_at[:, held] = points[0, held]
    if not _is_affine(model, batch, looked_at, held):
        return None
    origin = looked_at[:1]
    bends: dict[tuple[str, str], Tensor] | None = None
    at_origin = model.parameters(origin, batch)[1]  # each (1, rows or 1)
    products = []
    for part in tangents.split(at_once):
        eta = part.clone()
        eta[:, held] = points[0, held]
        along = model.parameters(eta.requires_grad_(), batch)[1]  # each (T, rows or 1)
        pushed = {name: value.detach() - at_origin[name] for name, value in along.items() if value.requires_grad}  # J v
        if bends is None:
            bends = _mean_second_derivatives(model, batch, points, weights, list(pushed)) if pushed else {}
        back: dict[str, Tensor] = {}
        for (a, b), bend in bends.items():
            of_rows = bend * pushed[b]
            of_rows = of_rows if of_rows.shape == pushed[a].shape else of_rows.sum(1, keepdim=True)
            back[a] = back[a] + of_rows if a in back else of_rows
        found = torch.zeros_like(part)
        if back:
            (found,) = torch.autograd.grad(weighted([along[name] for name in back], back.values()), eta)
            found = _zeroed(found, held)
        products.append(found)
    return torch.cat(products)


def _zeroed(values: Tensor, coordinates: Sequence[int]) -> Tensor:
    """Return a copy of values (K, D) with 0 at some coordinates."""
    copy = values.detach().clone()
    copy[:, coordinates] = 0.0
    return copy


def _is_affine(model: BoundModel, batch: Batch, points: Tensor, held: Sequence[int]) -> bool:
    """Return whether parameters of these rows have no second derivatives at points (K, D), and the same first ones.

    By random sums over rows. That a second derivative is 0 is known exactly, whatever the scales of coordinates.
    """
    eta = points.clone().requires_grad_()
    parameters = {name: value for name, value in model.parameters(eta, batch)[1].items() if value.requires_grad}
    if not parameters:
        return True
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(value.shape[1], generator=generator, dtype=value.dtype) for value in parameters.values()]
    (first,) = torch.autograd.grad(weighted(parameters.values(), random), eta, create_graph=True)
    if first.requires_grad:
        along = torch.randn(eta.shape, generator=generator, dtype=eta.dtype)
        along[:, held] = 0.0
        (second,) = torch.autograd.grad((first * along).sum(), eta, allow_unused=True, materialize_grads=True)
        if _zeroed(second, held).any():
            return False
    first = _zeroed(first, held)
    return bool(((first - first[0]).abs() <= SAME * first.abs().amax(0)).all())


def _mean_second_derivatives(
    model: BoundModel, batch: Batch, points: Tensor, weights: Tensor, wanted: list[str]
) -> dict[tuple[str, str], Tensor]:
    """Return Σ_k w_k ∂²ℓ_i/∂a∂b (rows,) for each two of the parameters wanted; those that are 0 may be missing."""
    make, parameters = model.parameters(points, batch)  # each (K, rows or 1)
    rows = len(next(iter(batch.values())))
    own = {name: parameters[name].expand(-1, rows).clone().requires_grad_() for name in wanted}
    log_lik = model.log_lik_of(make, {**parameters, **own}, batch)
    # Each row and draw has parameters of its own, so that the derivatives of a sum are those of its terms.
    first = torch.autograd.grad(log_lik.sum(), list(own.values()), create_graph=True, materialize_grads=True)
    found = {}
    for (a, of_a), b in product(zip(wanted, first, strict=True), wanted):
        if of_a.requires_grad:
            (second,) = torch.autograd.grad(of_a.sum(), own[b], retain_graph=True, materialize_grads=True)
            found[a, b] = weights.to(second.dtype) @ second
    return found
