"""Hessians of likelihoods whose distribution has parameters that are affine in η, as the logits of a regression.

With φ_i(η) the parameters of row i's distribution, and J_i their derivatives, the same everywhere,

    Σ_i ∇²ℓ_i(η) = Σ_i J_iᵀ W_i(η) J_i,    W_i = ∂²ℓ_i/∂φ_i².

So W is averaged over draws, and J and Jᵀ are applied once, whatever their number: for a regression, two products of
predictors and tangents. Differentiating the log-likelihood twice takes four for every draw.

The same holds for the other coordinates where some are *held* at the same values at all draws, such as the scale τ of
effects τz, given which logits are affine in z.
"""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from dadvi.likelihood import BoundModel, weighted
from dadvi.types import Batch

AFFINE = 1e-9
"""Difference from an affine function, beside its largest value, up to which there is none in float64."""


def has_affine_parameters(model: BoundModel, batch: Batch, points: Tensor) -> bool:
    """Return whether all parameters are one number a row, and φ(a) + φ(b) = φ(c) + φ(a + b − c) at points (3, D).

    In those coordinates in which the points differ.
    """
    a, b, c = points
    parameters = model.parameters(torch.stack([a, b, c, a + b - c]), batch)[1]  # each (rows or 1, 4)
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    return all(
        value.dim() == 2 and bool(((value.double() @ signs).abs() <= AFFINE * value.abs().max()).all())
        for value in parameters.values()
    )


def hessian_products(
    model: BoundModel, batch: Batch, points: Tensor, weights: Tensor, tangents: Tensor, held: Sequence[int] = ()
) -> Tensor:
    """Return Σ_k w_k Σ_i ∇²ℓ_i(η_k) v_t (T, D) for η (K, D), w (K,) and v (T, D).

    Parameters
    ----------
    held
        Coordinates that are the same at all points, and 0 in products and tangents.

    """
    eta = tangents.clone()
    eta[:, held] = points[0, held]
    origin = torch.zeros_like(eta[:1])
    origin[:, held] = points[0, held]
    eta.requires_grad_()
    along, at_origin = model.parameters(eta, batch)[1], model.parameters(origin, batch)[1]  # each (rows or 1, T or 1)
    pushed = {name: value.detach() - at_origin[name] for name, value in along.items() if value.requires_grad}  # J v
    back: dict[str, Tensor] = {}
    for (a, b), bend in _mean_second_derivatives(model, batch, points, weights, list(pushed)).items():
        part = bend[:, None] * pushed[b]
        part = part if len(part) == len(pushed[a]) else part.sum(0, keepdim=True)
        back[a] = back[a] + part if a in back else part
    if not back:
        return torch.zeros_like(tangents)
    (products,) = torch.autograd.grad(weighted([along[name] for name in back], back.values()), eta)
    products[:, held] = 0.0
    return products


def _mean_second_derivatives(
    model: BoundModel, batch: Batch, points: Tensor, weights: Tensor, wanted: list[str]
) -> dict[tuple[str, str], Tensor]:
    """Return Σ_k w_k ∂²ℓ_i/∂a∂b (rows,) for each two of the parameters wanted; those that are 0 may be missing."""
    make, parameters = model.parameters(points, batch)  # each (rows or 1, K)
    rows = len(next(iter(batch.values())))
    own = {name: parameters[name].expand(rows, -1).clone().requires_grad_() for name in wanted}
    log_lik = model.log_lik_of(make, {**parameters, **own}, batch)
    # Each row and draw has parameters of its own, so that the derivatives of a sum are those of its terms.
    first = torch.autograd.grad(log_lik.sum(), list(own.values()), create_graph=True, materialize_grads=True)
    found = {}
    for (a, of_a), b in product(zip(wanted, first, strict=True), wanted):
        if of_a.requires_grad:
            (second,) = torch.autograd.grad(of_a.sum(), own[b], retain_graph=True, materialize_grads=True)
            found[a, b] = second @ weights.to(second.dtype)
    return found
