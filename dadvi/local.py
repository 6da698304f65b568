"""What stands for the data between two passes, and the search for the best Gaussian on it.

A pass at an anchor η₀, the mean of q, gives the full-data log-likelihood and gradient there. A local model has that
value and gradient at the anchor and is cheap elsewhere:

- `Surrogate`: a resident subsample S of m of C chunks, scaled, and tilted to the anchor's gradient:
  (C/m) ℓ_S(η) + ⟨G₀ − (C/m) ∇ℓ_S(η₀), η − η₀⟩ + const. With it, each round multiplies the error by about
  √(D / rows in S), whatever N (SVRG: Johnson & Zhang 2013; surrogate likelihood: Jordan, Lee & Yang 2019);
- `Taylor`: the second-order expansion of the log-likelihood, its derivatives averaged over q and its Hessian measured
  on all the data in the same pass. It costs D tangents, and is for latents that S hardly sees.

The prior and the log-det are exact in both.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dadvi.executors import Executor
from dadvi.families import Gaussian
from dadvi.model import Model
from dadvi.passes import Expansion, Gradient, HessianVector
from dadvi.quadratic import Certificate, DenseCurvature, optimum, prior_products
from dadvi.subsample import Subsample
from dadvi.types import FloatArray

SOLVED = 1 / 30
"""The search goes on to this fraction of the tolerance: its next step, in posterior sds, and its change of the sds."""

NEGLIGIBLE_NATS = 0.01
"""An ELBO may fall by this much: at a finite number of draws its maximum is not quite where E_q[∇ log π] = 0."""

SEARCH_STEPS = 30
SHORTEST_FRACTION = 1e-4
"""Of a step that does not raise the ELBO: below it, there is nothing to be gained in its direction."""


class LocalModel(Protocol):
    """A log-likelihood of all the data near an anchor."""

    def log_lik(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood (K,) and its gradient (K, D) at η (K, D)."""
        ...

    def hessian_times(self, eta: Tensor, tangents: FloatArray) -> Tensor:
        """Return mean_k ∇²ℓ(η_k) v_t (T, D) at tangents (T, D)."""
        ...


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The scaled and tilted subsample."""

    subsample: Subsample
    factor: float  # C/m
    anchor: Tensor  # η₀ (D,)
    tilt: Tensor  # (D,)
    offset: float

    @classmethod
    def untilted(cls, subsample: Subsample, factor: float, anchor: Tensor) -> "Surrogate":
        """Return the scaled subsample alone: what there is before the first pass."""
        return cls(subsample, factor, anchor, torch.zeros_like(anchor), 0.0)

    @classmethod
    def measured(
        cls, subsample: Subsample, factor: float, executor: Executor, anchor: Tensor, *, check: bool, label: str
    ) -> "Surrogate":
        """Return the surrogate at an anchor (D,), by one pass over the data at one point."""
        point = Gradient(anchor[None].numpy())
        full, part = executor.run(point, check=check, label=label), subsample.run(point)
        tilt = torch.from_numpy(full.grad[0] - factor * part.grad[0])
        return cls(subsample, factor, anchor, tilt, float(full.log_lik[0] - factor * part.log_lik[0]))

    def log_lik(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood (K,) and its gradient (K, D) at η (K, D)."""
        sums = self.subsample.run(Gradient(eta.numpy()))
        value = self.factor * torch.from_numpy(sums.log_lik) + self.offset + (eta - self.anchor) @ self.tilt
        return value, self.factor * torch.from_numpy(sums.grad) + self.tilt

    def hessian_times(self, eta: Tensor, tangents: FloatArray) -> Tensor:
        """Return mean_k ∇²ℓ(η_k) v_t (T, D) at tangents (T, D)."""
        return self.factor * torch.from_numpy(self.subsample.run(HessianVector(eta.numpy(), tangents)).products)


@dataclass(frozen=True, eq=False)
class Taylor:
    """The second-order expansion about an anchor."""

    anchor: Tensor  # η₀ (D,)
    value: float
    grad: Tensor  # (D,)
    hessian: Tensor  # (D, D)

    @classmethod
    def measured(cls, executor: Executor, q: Gaussian, noise: Tensor, *, check: bool, label: str) -> "Taylor":
        """Return the expansion about the mean of q, with E_q[∇ℓ] and E_q[∇²ℓ], by one pass over the data.

        The gradient is averaged over all draws that `noise` gives, the Hessian over the first antithetic pair of them.
        The value is such that the expansion has the same mean over the draws as the log-likelihood.
        """
        eta = q.transform(noise)
        pair = eta[[0, len(eta) // 2]]
        sums = executor.run(
            Expansion(Gradient(eta.numpy()), HessianVector(pair.numpy(), np.eye(q.dim))),
            check=check,
            label=label,
        )
        products = torch.from_numpy(sums.products)
        hessian = (products + products.T) / 2
        away = eta - q.loc
        value = float(sums.log_lik.mean() - 0.5 * ((away @ hessian) * away).sum(1).mean())
        return cls(q.loc, value, torch.from_numpy(sums.grad).mean(0), hessian)

    def log_lik(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood (K,) and its gradient (K, D) at η (K, D)."""
        away = eta - self.anchor
        bend = away @ self.hessian
        return self.value + away @ self.grad + 0.5 * (away * bend).sum(1), self.grad + bend

    def hessian_times(self, eta: Tensor, tangents: FloatArray) -> Tensor:  # noqa: ARG002  the same everywhere
        """Return the Hessian's products (T, D) with tangents (T, D)."""
        return torch.from_numpy(tangents) @ self.hessian


@dataclass(frozen=True, eq=False)
class Expectations:
    """What q sees of log π."""

    elbo: float
    grad: Tensor  # E_q[∇ log π] (D,)
    curvature: DenseCurvature  # −E_q[∇² log π]

    def certificate(self, q: Gaussian) -> Certificate:
        """Return the predicted distance of q to the ELBO's optimum."""
        best = optimum(q.family, q.loc, self.curvature)
        return Certificate.at(self.grad, self.curvature, float((q.stddev / best.stddev - 1).abs().max()))


@dataclass(frozen=True, eq=False)
class Noise:
    """The draws of a run, the same throughout, so that ELBOs can be compared."""

    likelihood: Tensor  # ε (K, noise_dim)
    prior: Tensor  # ε (K', noise_dim), more of them: they cost no data, and the scales of a hierarchy are skewed

    def elbo(self, prior: Model, local: LocalModel, q: Gaussian) -> float:
        """Return the ELBO of q."""
        log_lik, _ = local.log_lik(q.transform(self.likelihood))
        return float(log_lik.mean() + prior.log_prior(q.transform(self.prior)).mean() + q.entropy())

    def expectations(self, prior: Model, local: LocalModel, q: Gaussian) -> Expectations:
        """Return the ELBO of q with the derivatives that a step needs."""
        eta, prior_eta = q.transform(self.likelihood), q.transform(self.prior).requires_grad_()
        log_lik, grads = local.log_lik(eta)
        log_prior = prior.log_prior(prior_eta).mean()
        grad = grads.mean(0)
        if log_prior.requires_grad:  # unlike a flat prior's
            grad = grad + torch.autograd.grad(log_prior, prior_eta)[0].sum(0)

        def precision_times(tangents: FloatArray) -> Tensor:
            return -(local.hessian_times(eta, tangents) + prior_products(prior, prior_eta, tangents))

        curvature = DenseCurvature.of(precision_times(np.eye(q.dim)))
        return Expectations(float(log_lik.mean() + log_prior.detach() + q.entropy()), grad, curvature)


def solve(prior: Model, local: LocalModel, q: Gaussian, noise: Noise, tol: float, radius: float = math.inf) -> Gaussian:
    """Move q to the fixed point of a local model, to a fraction of `tol`, at most about `radius` posterior sds away.

    E_q[∇ log π] = 0 and Σ⁻¹ = −E_q[∇² log π] (its diagonal for mean field), by natural-gradient steps with a line
    search on the ELBO: μ ← μ + t P⁻¹ E_q[∇ log π], Σ⁻¹ ← P (Khan & Rue 2023, "The Bayesian learning rule", section
    3).
    """
    seen = noise.expectations(prior, local, q)
    room = radius
    for _ in range(SEARCH_STEPS):
        step = seen.curvature.solve(seen.grad)
        length = float((step / seen.curvature.stddev).abs().max())
        change = float((optimum(q.family, q.loc, seen.curvature).stddev / q.stddev - 1).abs().max())
        if max(length, change) < SOLVED * tol or room <= 0:
            break
        fraction = min(1.0, room / length) if length > 0 else 1.0
        while True:
            candidate = optimum(q.family, q.loc + fraction * step, _mixed(q, seen.curvature, fraction))
            if noise.elbo(prior, local, candidate) >= seen.elbo - NEGLIGIBLE_NATS:
                break
            fraction /= 2
            if fraction < SHORTEST_FRACTION:
                return q
        room -= fraction * length
        q, seen = candidate, noise.expectations(prior, local, candidate)
    return q


def _mixed(q: Gaussian, curvature: DenseCurvature, fraction: float) -> DenseCurvature:
    """Return the curvature (1 − t) Σ⁻¹ + t P."""
    if fraction == 1:
        return curvature
    return DenseCurvature.of((1 - fraction) * torch.linalg.inv(q.covariance_matrix) + fraction * curvature.precision)
