"""Anchored minibatches: the noise of which rows were drawn, taken out by a full-data gradient kept from one pass.

    g_k = (C/m) Σ_{c in S} [∇ℓ_c(η_k) − a ∇ℓ_c(η₀)] + a G₀,      G₀ = Σ_i ∇ℓ_i(η₀)

for draws η_k (D,) and a batch S of m of C chunks, and likewise the log-likelihood. Over S its mean is Σ_i ∇ℓ_i(η_k)
for every a that does not depend on S; at a = 1 and η_k = η₀ it is G₀ whatever S, and near there its noise is that of
the curvature times the distance to η₀. The anchor η₀ is one more point of the batch's pass: no row is read twice.

The control variate of SVRG (Johnson & Zhang 2013, "Accelerating stochastic gradient descent using predictive variance
reduction"), for the rows' noise beside the draws' (Wang, Geffner & Domke 2024, "Joint control variate for faster
black-box variational inference"), with a regression coefficient, so that an anchor gone stale is let go.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dadvi.executors import Executor
from dadvi.passes import Gradient, GradientSums
from dadvi.types import FloatArray

ControlVariate = Literal["none", "anchor"]

MEMORY_STEPS = 50
"""The coefficient is measured over about so many steps: those before count less, by 1/e every so many steps."""


@dataclass(frozen=True, eq=False)
class Anchor:
    """A point and what all the data say there."""

    eta: Tensor  # η₀ (D,)
    location: Tensor  # the same point in the coordinates of the search (D,)
    log_lik: float  # Σ_i ℓ_i(η₀)
    grad: Tensor  # G₀ (D,)

    @classmethod
    def at(cls, executor: Executor, eta: Tensor, location: Tensor) -> "Anchor":
        """Return the anchor at η₀ (D,), by one pass over all the data."""
        sums = executor.run(Gradient(eta[None].numpy()), check=True, label="anchor")
        return cls(eta, location, float(sums.log_lik[0]), torch.from_numpy(sums.grad[0]))

    @property
    def finite(self) -> bool:
        """Whether log-likelihood and gradient are: an anchor where they are not would spoil every batch."""
        return math.isfinite(self.log_lik) and bool(self.grad.isfinite().all())


@dataclass(frozen=True, eq=False)
class Mixing:
    """What the batches tell of the best coefficient: exponentially weighted averages over pairs of successive batches.

    With g_b the mean over draws of (C/m) Σ_S ∇ℓ_c(η_k) and d_b = (C/m) Σ_S ∇ℓ_c(η₀) − G₀, both (D,) and in the
    coordinates of the search, where posterior sds are 1 and the units of latents do not matter, the noise
    E|g_b − a d_b|² about its mean is least at

        a = E⟨Δg, Δd⟩ / E|Δd|²,      Δg = g_b − g_{b−1},   Δd = d_b − d_{b−1}.

    The mean of d_b is known to be 0, that of g_b moves with the search. Centred on a running mean, g_b would keep the
    way that this mean lags behind, which early in a run is as long as the noise; the difference of neighbours (von
    Neumann 1941) has hardly any of it.
    """

    at_draws: Tensor | None = None  # g_b (D,) of the last batch
    deviation: Tensor | None = None  # d_b (D,) of the last batch
    weight: float = 0.0  # what the averages, which begin at 0, are to be divided by
    moments: FloatArray | tuple[float, ...] = (0.0, 0.0, 0.0)  # of |Δg|², ⟨Δg, Δd⟩ and |Δd|²

    def update(self, at_draws: Tensor, deviation: Tensor) -> "Mixing":
        """Return the averages with one more batch, g_b (D,) and d_b (D,); one that is not finite does not count."""
        if not (at_draws.isfinite().all() and deviation.isfinite().all()):
            return self
        if self.at_draws is None or self.deviation is None:
            return replace(self, at_draws=at_draws, deviation=deviation)
        dg, dd = at_draws - self.at_draws, deviation - self.deviation
        keep = math.exp(-1 / MEMORY_STEPS)
        products = np.array([float(dg @ dg), float(dg @ dd), float(dd @ dd)])
        return Mixing(
            at_draws,
            deviation,
            keep * self.weight + (1 - keep),
            keep * np.asarray(self.moments) + (1 - keep) * products,
        )

    @property
    def coefficient(self) -> float:
        """The best a, in [0, 1]; 1 while batches have not differed at the anchor."""
        _, cross, variance = self.moments
        return min(1.0, max(0.0, float(cross / variance))) if variance > 0 else 1.0

    def noise(self, coefficient: float) -> float:
        """Return the sd of a step's gradient at this a, in the coordinates of the search, as an RMS over coordinates.

        That of the draws is in it. Without two batches to compare it is 0.
        """
        if self.at_draws is None or self.weight == 0:
            return 0.0
        total, cross, variance = self.moments
        squares = total - 2 * coefficient * cross + coefficient**2 * variance  # of successive differences: twice Var
        return math.sqrt(max(0.0, float(squares)) / (2 * self.weight * len(self.at_draws)))


@dataclass(frozen=True, eq=False)
class Control:
    """The control variate of a run: its anchor, the coefficient in use, and what the batches say of the next.

    The coefficient of an epoch is measured on the epochs before it. One measured on a batch would depend on that
    batch, and one measured on earlier batches of the same epoch on which chunks are left: either way the mean of a d_b
    is not 0 and the estimate biased. (The shards of a batch could be measured on one another; but their sums do not
    travel apart.) Fixed before an epoch's order is drawn, it leaves every batch unbiased, and as an epoch has every
    chunk once, the deviations of the anchor add up to 0 over it, however wrong a is. A search starts at its anchor,
    and stands near a new one: the first coefficient is 1.
    """

    anchor: Anchor
    coefficient: float = 1.0
    mixing: Mixing = Mixing()

    def points(self, eta: Tensor) -> FloatArray:
        """Return the points (K + 1, D) of a batch's gradient pass: the draws η (K, D), then the anchor."""
        return torch.cat([eta, self.anchor.eta[None]]).numpy()

    def estimate(self, sums: GradientSums, factor: float) -> tuple[Tensor, Tensor]:
        """Return unbiased estimates of Σ_i ℓ_i(η_k) (K,) and Σ_i ∇ℓ_i(η_k) (K, D) at the draws.

        Parameters
        ----------
        sums
            Of a batch, at `points`.
        factor
            C/m.

        """
        log_lik, grad = (factor * torch.from_numpy(part) for part in sums)
        return (
            log_lik[:-1] - self.coefficient * (log_lik[-1] - self.anchor.log_lik),
            grad[:-1] - self.coefficient * (grad[-1] - self.anchor.grad),
        )

    def observe(self, sums: GradientSums, factor: float, to_search: Callable[[Tensor], Tensor]) -> "Control":
        """Return the control variate that has seen one more batch; its coefficient stays.

        Parameters
        ----------
        sums, factor
            As in `estimate`.
        to_search
            Maps a gradient (D,) in η to one in the coordinates of the search.

        """
        grad = factor * torch.from_numpy(sums.grad)
        mixing = self.mixing.update(to_search(grad[:-1].mean(0)), to_search(grad[-1] - self.anchor.grad))
        return replace(self, mixing=mixing)

    def end_epoch(self) -> "Control":
        """Return the control variate for the next epoch, with the coefficient that the batches so far ask for."""
        return replace(self, coefficient=self.mixing.coefficient)

    def outdated(self, to_anchor: float, to_average: float, steps: int, tol: float) -> bool:
        """Whether a new anchor, at the average of the iterates, would be worth its pass.

        It is when two things hold. The noise left matters: in coordinates of unit curvature, noise of sd s a step
        moves the mean of T steps by at most s/√T posterior sds (less, as the errors of an epoch nearly cancel), and
        over a stretch that exceeds `tol`. And a new anchor lessens it: the noise is in proportion to the distance from
        the anchor, and the iterates lie at most half as far from their average. An epoch for the same price serves
        better until then.

        Parameters
        ----------
        to_anchor, to_average
            RMS distance of the iterates of the last stretch from the anchor and from the average, in posterior sds.
        steps
            Steps of a stretch.
        tol
            Of the certificate.

        """
        return self.mixing.noise(self.coefficient) / math.sqrt(steps) > tol and to_average <= to_anchor / 2
