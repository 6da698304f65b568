"""Proximal gradient descent for location-scale families: a gradient step on the energy, an exact step on the entropy.

The negative ELBO is energy + negative entropy:

    l(m, L) = −E_q[log π(m + L ε)]        as smooth as log π
    h(L) = −Σ_j log L_jj + const          not smooth: its gradient explodes as a scale goes to 0

So h is not differentiated but minimised exactly, beside a quadratic. Domke (2020), "Provable Smoothness Guarantees
for Black-Box Variational Inference", has the proximal operator; Domke, Gower and Garrigos (2023), "Provable
convergence guarantees for black-box variational inference", prove convergence of the stochastic method. With step
size γ and a gradient g of the *energy alone*, for σ = diag(L):

    σ'  = σ − γ g_σ
    σ⁺  = argmin_s  −Σ_j log s_j + ‖s − σ'‖² / (2γ)  =  ( σ' + √(σ'² + 4γ) ) / 2  >  0

and plain gradient descent, x⁺ = x − γ g_x, for all else: the location and the strictly lower triangle, which h does
not contain.

The families hold ω = log σ and differentiate with respect to it, so here g_σ = g_ω / σ, and log σ⁺ is stored. A
fixed point has g_σ = 1/σ, the optimum exactly, whatever γ. Valid where the entropy is Σ_j ω_j + const: mean field
and full rank; not low rank, whose log-determinant mixes factor and diagonal.
"""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from dadvi.errors import InputError


class ProximalEntropy(Optimizer):
    """Stochastic proximal gradient descent; the gradients passed must leave the entropy out.

    Parameters
    ----------
    params
        Parameter groups. One with ``"entropy": True`` holds logs of the diagonal of the scale.
    lr
        The step size γ, in whitened coordinates; below 2 / (largest curvature of the energy).
    """

    takes_energy_gradient: ClassVar[bool] = True
    """Tells the loop to differentiate −E_q[log π] and not the ELBO; other optimisers have no such attribute."""

    def __init__(self, params: Iterable[dict[str, Any]], lr: float = 3e-3) -> None:
        if not lr > 0:
            raise InputError(f"ProximalEntropy's lr is {lr}; it must be above 0, and 0.003 is a cautious start")
        super().__init__(params, {"lr": lr, "entropy": False})
        if not any(group["entropy"] for group in self.param_groups):
            raise InputError(
                f'none of the {len(self.param_groups)} parameter groups has "entropy": True, so nothing '
                "would keep the scale from collapsing to 0; the proximal step needs one that holds the log of the "
                "diagonal of the scale: use a mean-field or full-rank family, or another optimizer"
            )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step against the energy gradients in `.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if group["entropy"]:
                    sigma = p.exp()
                    p.copy_(_entropy_prox(sigma - group["lr"] * p.grad / sigma, group["lr"]).log())
                else:
                    p.sub_(group["lr"] * p.grad)
        return loss


def _entropy_prox(sigma: Tensor, gamma: float) -> Tensor:
    """Return the minimiser over s > 0 of −log s + (s − sigma)²/(2 gamma), elementwise; sigma may have either sign."""
    # The two roots of s² − sigma s − gamma = 0 have the product −gamma. The larger in absolute value is a sum without
    # cancellation; for a negative sigma that is the wrong root, and the right one, tiny and positive, is gamma over it.
    larger = (sigma.abs() + torch.hypot(sigma, sigma.new_tensor(2 * gamma**0.5))) / 2
    return torch.where(sigma >= 0, larger, gamma / larger)
