"""The stochastic ELBO and its gradient, from values and gradients of log π at draws.

    ELBO(θ) = E_ε[log π(t(θ, ε))] + H(q_θ),      log π(η) = log p(T(η)) + log|det J_T(η)| + Σ_i ℓ_i(η)

Everything here is the coordinator's: workers know sums of ℓ_i and their gradients only (Kucukelbir et al. 2017,
"Automatic differentiation variational inference", section 2).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dadvi.errors import InputError
from dadvi.families import Family, Params
from dadvi.model import Model

Entropy = Literal["closed_form", "stl", "monte_carlo"]
Design = Literal["random", "antithetic", "orthogonal"]


@dataclass(frozen=True)
class Estimate:
    """An ELBO estimate and its gradient in θ, split so that a proximal step can treat the entropy by itself."""

    elbo: float
    energy_grad: dict[str, Tensor]  # ∂/∂θ of E_q[log π]
    entropy_grad: dict[str, Tensor]  # ∂/∂θ of the entropy, by the chosen estimator

    @property
    def grad(self) -> dict[str, Tensor]:
        """Gradient of the ELBO in θ."""
        return {name: grad + self.entropy_grad[name] for name, grad in self.energy_grad.items()}


def log_joint(model: Model, eta: Tensor, log_lik: Tensor, log_lik_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Add the prior and the log-det, once, to (scaled) sums over rows.

    Parameters
    ----------
    eta
        Draws (K, D).
    log_lik, log_lik_grad
        Σ_i ℓ_i (K,) and its gradient (K, D) over all rows, or an unbiased estimate of them.

    Returns
    -------
    value, grad
        log π (K,) and ∇ log π (K, D).

    """
    eta = eta.detach().requires_grad_()
    prior = model.log_prior(eta)  # (K,)
    if prior.requires_grad:  # unlike a flat prior's
        (prior_grad,) = torch.autograd.grad(prior.sum(), eta)
        log_lik_grad = prior_grad + log_lik_grad
    return prior.detach() + log_lik, log_lik_grad


def estimate(
    family: Family, params: Params, noise: Tensor, value: Tensor, grad: Tensor, entropy: Entropy = "closed_form"
) -> Estimate:
    """Return the ELBO and its gradient from log π at the draws t(θ, ε_k).

    Parameters
    ----------
    noise
        ε (K, noise_dim).
    value, grad
        log π (K,) and ∇ log π (K, D) at the draws.
    entropy
        How the entropy enters:

        - ``"closed_form"``: the Gaussian entropy and its gradient;
        - ``"stl"``: the path derivative of −log q at the draws, zero in total at q = posterior for every ε
          ("sticking the landing", Roeder, Wu & Duvenaud 2017, equation 7);
        - ``"monte_carlo"``: the full derivative of −log q at the draws.

    """
    energy_grad = family.pullback(params, noise, grad / len(noise))
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    if entropy == "closed_form":
        entropy_value = family.entropy(leaves)
    else:
        draws = family.transform(leaves, noise)
        frozen = {name: leaf.detach() for name, leaf in leaves.items()} if entropy == "stl" else leaves
        entropy_value = -family.log_prob(frozen, draws).mean()
    grads = torch.autograd.grad(entropy_value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return Estimate(
        elbo=float(value.mean() + entropy_value.detach()),
        energy_grad=energy_grad,
        entropy_grad=dict(zip(leaves, grads, strict=True)),
    )


def draw_noise(design: Design, num_draws: int, dim: int, rng: np.random.Generator, *, fixed: bool = False) -> Tensor:
    """Return ε (K, dim), float64.

    Parameters
    ----------
    design
        - ``"random"``: independent N(0, I);
        - ``"antithetic"``: pairs ±ε, so that the mean is exactly 0;
        - ``"orthogonal"``: pairs ±r·q with q the rows of a random orthogonal matrix, anew for every 2·dim draws.
    fixed
        For ``"orthogonal"``: with draws that stay fixed, r = √dim, so that 2·dim draws have covariance exactly I and
        the ELBO of a quadratic log π is exact; with fresh draws, r ~ χ(dim), so that each draw is N(0, I) and
        estimates stay unbiased whatever log π.

    Raises
    ------
    InputError
        If `num_draws` is below 1, or odd in a design of pairs.

    """
    if design not in get_args(Design):
        raise InputError(f"unknown design of draws {design!r}: use one of {', '.join(map(repr, get_args(Design)))}")
    if num_draws < 1 or (design != "random" and num_draws % 2):
        need = "at least 1" if design == "random" else "even and at least 2, as draws come in pairs"
        raise InputError(f"num_draws={num_draws} with the {design!r} design: it must be {need}")
    if design == "random":
        return torch.from_numpy(rng.standard_normal((num_draws, dim)))
    half = num_draws // 2
    if design == "antithetic":
        noise = torch.from_numpy(rng.standard_normal((half, dim)))
    else:
        blocks = [_orthonormal_rows(min(dim, half - first), dim, rng) for first in range(0, half, dim)]
        radius = dim**0.5 if fixed else torch.from_numpy(rng.chisquare(dim, size=(half, 1))).sqrt()
        noise = radius * torch.cat(blocks)
    return torch.cat([noise, -noise])


def _orthonormal_rows(num_rows: int, dim: int, rng: np.random.Generator) -> Tensor:
    """Return the first rows (num_rows, dim) of a Haar-distributed orthogonal matrix.

    By QR of a normal matrix, with the signs of R's diagonal taken out (Mezzadri 2007).
    """
    q, r = torch.linalg.qr(torch.from_numpy(rng.standard_normal((dim, num_rows))))
    rows: Tensor = (q * r.diagonal().sign()).T
    return rows
