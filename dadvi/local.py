"""What stands for the data between two passes, and the search for the best Gaussian on it.

A pass at an anchor η₀, the mean of q, gives the full-data log-likelihood and gradient there. A local model has that
value and gradient at the anchor and is cheap elsewhere:

- `Surrogate`: a resident subsample S of m of C chunks, scaled, and tilted to the anchor's gradient:
  (C/m) ℓ_S(η) + ⟨G₀ − (C/m) ∇ℓ_S(η₀), η − η₀⟩ + const; where S has first rows of its chunks only, C/m is multiplied by
  what these leave out. With it, each round multiplies the error by about
  √(D / rows in S), whatever N (SVRG: Johnson & Zhang 2013; surrogate likelihood: Jordan, Lee & Yang 2019);
- `Taylor`: an expansion of the log-likelihood, its derivatives averaged over q and its Hessian measured on all the data
  in the same pass. It costs G + C tangents, and is for latents that S hardly sees, such as the effects of many groups.

The prior and the log-det are exact in both.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Protocol

import torch
from torch import Tensor

from dadvi.acceleration import Iterate, accelerated
from dadvi.errors import ModelError
from dadvi.executors import Executor
from dadvi.families import Gaussian, MeanField
from dadvi.model import Model
from dadvi.passes import Expansion, ExpansionSums, Gradient, HessianVector
from dadvi.quadratic import Certificate, Curvature, optimum, prior_hessian
from dadvi.quadrature import Rule
from dadvi.scales import Scales
from dadvi.structure import Arrowhead, Structure
from dadvi.subsample import Subsample

SOLVED = 1 / 30
"""The search goes on to this fraction of the tolerance: its next step, in posterior sds, and the norm of the relative
changes of the sds."""

NEGLIGIBLE_NATS = 0.01
"""An ELBO may fall by this much: at a finite number of draws its maximum is not quite where E_q[∇ log π] = 0."""

CONTRACTION = 0.2
"""A step that leaves more than this fraction of the distance has outgrown its curvature, which is measured anew."""

SEARCH_STEPS = 30
SHORTEST_FRACTION = 1e-4
"""Of a step that does not raise the ELBO: below it, there is nothing to be gained in its direction."""


class LocalModel(Protocol):
    """A log-likelihood of all the data near an anchor."""

    def log_lik(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood (K,) and its gradient (K, D) at η (K, D)."""
        ...

    def hessian(self, eta: Tensor, weights: Tensor) -> Arrowhead:
        """Return Σ_k w_k ∇²ℓ(η_k) at η (K, D)."""
        ...

    def grad_errors(self, rule: Rule, grads: Tensor) -> Tensor:
        """Return draws (NUM_ERRORS, D) of the error of E_q[∇ℓ] by a rule, from `log_lik`'s gradients (K, D)."""
        ...


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The scaled and tilted subsample."""

    subsample: Subsample
    structure: Structure  # of the Hessian
    factor: float  # what scales a sum over S up to all the data
    anchor: Tensor  # η₀ (D,)
    tilt: Tensor  # (D,)
    offset: float

    @classmethod
    def untilted(cls, subsample: Subsample, structure: Structure, factor: float, anchor: Tensor) -> "Surrogate":
        """Return the scaled subsample alone: what there is before the first pass."""
        return cls(subsample, structure, factor, anchor, torch.zeros_like(anchor), 0.0)

    @classmethod
    def measured(
        cls,
        subsample: Subsample,
        structure: Structure,
        factor: float,
        executor: Executor,
        anchor: Tensor,
        *,
        check: bool,
        label: str,
    ) -> "Surrogate":
        """Return the surrogate at an anchor (D,), by one pass over the data at one point."""
        point = Gradient(anchor[None].numpy())
        full, part = executor.run(point, check=check, label=label), subsample.run(point)
        tilt = torch.from_numpy(full.grad[0] - factor * part.grad[0])
        return cls(subsample, structure, factor, anchor, tilt, float(full.log_lik[0] - factor * part.log_lik[0]))

    def less(self, other: "Surrogate", eta: Tensor) -> tuple[Tensor, Tensor]:
        """Return by how much this exceeds another of the same subsample at η (D,), and the slope: it is linear."""
        value = self.offset + (eta - self.anchor) @ self.tilt
        return value - other.offset - (eta - other.anchor) @ other.tilt, self.tilt - other.tilt

    def log_lik(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood (K,) and its gradient (K, D) at η (K, D)."""
        sums = self.subsample.run(Gradient(eta.numpy()))
        value = self.factor * torch.from_numpy(sums.log_lik) + self.offset + (eta - self.anchor) @ self.tilt
        return value, self.factor * torch.from_numpy(sums.grad) + self.tilt

    def hessian(self, eta: Tensor, weights: Tensor) -> Arrowhead:
        """Return Σ_k w_k ∇²ℓ(η_k), to which the tilt adds nothing, by the part of S that is for curvatures."""
        part = self.subsample.for_curvature
        sums = part.run(HessianVector(eta.numpy(), self.structure.tangents(), weights.numpy()))
        scale = self.factor * self.subsample.num_rows / part.num_rows
        return self.structure.arrowhead(torch.from_numpy(sums.products)) * scale

    def grad_errors(self, rule: Rule, grads: Tensor) -> Tensor:
        """Return draws (NUM_ERRORS, D) of the error of E_q[∇ℓ] by a rule, from `log_lik`'s gradients (K, D)."""
        return rule.errors(grads)


@dataclass(frozen=True, eq=False)
class Taylor:
    """The expansion about an anchor, in w, which is η but where scales multiply effects."""

    anchor: Tensor  # η₀ (D,), and w₀
    scales: Scales
    value: float
    grad: Tensor  # (D,)
    bend: Arrowhead  # ∇²ℓ
    left_errors: Tensor  # of E_q[∇ℓ], what the expansion leaves of it alone (NUM_ERRORS, D)

    @classmethod
    def measured(
        cls,
        executor: Executor,
        q: Gaussian,
        noise: "Noise",
        scales: Scales,
        *,
        check: bool,
        label: str,
    ) -> "Taylor":
        """Return the expansion about the mean of q, with E_q[∇ℓ] and the Hessian in w averaged over q, by one pass.

        The value is such that the expansion has the same mean under q as the log-likelihood.

        Parameters
        ----------
        scales
            Those that multiply effects, and the structure of the Hessian.

        """
        sums = executor.run(cls.work(q, noise, scales), check=check, label=label)
        return cls.of(sums, q, noise, scales)

    @staticmethod
    def work(q: Gaussian, noise: "Noise", scales: Scales) -> Expansion:
        """Return the pass whose sums tell the expansion about the mean of q."""
        eta = q.transform(noise.likelihood.nodes)
        around = scales.at_origin(q.transform(noise.curvature.nodes), q.loc)
        held = tuple(scales.coordinates.tolist()) if scales.affine else ()
        return Expansion(Gradient(eta.numpy()), around.numpy(), noise.curvature.weights.numpy(), scales.structure, held)

    @classmethod
    def of(cls, sums: ExpansionSums, q: Gaussian, noise: "Noise", scales: Scales) -> "Taylor":
        """Return the expansion about the mean of q, from the sums of its pass."""
        eta = q.transform(noise.likelihood.nodes)
        bend = scales.unbent(scales.structure.arrowhead(torch.from_numpy(sums.products)))
        nothing = torch.zeros_like(q.loc)
        plain = cls(q.loc, scales, 0.0, nothing, bend, noise.likelihood.errors(nothing.expand(len(eta), -1)))
        left = torch.from_numpy(sums.grad) - plain.log_lik(eta)[1]
        grad = scales.grad_in_w(noise.likelihood.mean(left), Rule(eta, noise.likelihood.weights), q.loc)
        linear = replace(plain, grad=grad, left_errors=noise.likelihood.errors(left))
        value = noise.likelihood.mean(torch.from_numpy(sums.log_lik) - linear.log_lik(eta)[0])
        return replace(linear, value=float(value))

    def log_lik(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood (K,) and its gradient (K, D) at η (K, D)."""
        growth = self.scales.growth(eta, self.anchor)
        w = growth * eta
        value, grad = self._in_w(w)
        return value, self.scales.grad(grad, w, growth)

    def hessian(self, eta: Tensor, weights: Tensor) -> Arrowhead:
        """Return Σ_k w_k ∇²ℓ(η_k), for weights of sum 1."""
        if not self.scales.places:  # the same everywhere
            return self.bend
        growth = self.scales.growth(eta, self.anchor)
        w = growth * eta
        _, grad = self._in_w(w)
        parts = zip(grad, w, growth, weights, strict=True)
        return reduce(add, (self.scales.hessian(self.bend, *each) * float(weight) for *each, weight in parts))

    def grad_errors(self, rule: Rule, grads: Tensor) -> Tensor:
        """Return draws (NUM_ERRORS, D) of the error of E_q[∇ℓ] by a rule, from `log_lik`'s gradients (K, D)."""
        return rule.errors(grads) + self.left_errors

    def _in_w(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood (K,) and its gradient (K, D) in w, at w (K, D)."""
        away = w - self.anchor
        bent = self.bend.times(away)
        return self.value + away @ self.grad + 0.5 * (away * bent).sum(1), self.grad + bent


@dataclass(frozen=True, eq=False)
class Bends:
    """Second derivatives of log π, as q sees them."""

    curvature: Curvature  # −E_q[∇² log π]
    bend: Arrowhead  # E_q[∇²ℓ], of the likelihood alone


@dataclass(frozen=True, eq=False)
class Expectations(Bends):
    """What q sees of log π."""

    elbo: float
    sampled: float  # the ELBO without its control variate
    grad: Tensor  # E_q[∇ log π] (D,)
    grad_errors: Tensor  # draws of the error of `grad` (NUM_ERRORS, D)

    def plus(self, value: Tensor, slope: Tensor) -> "Expectations":
        """Return what q sees with a linear function added, of this value at the mean of q and this slope (D,)."""
        elbo, sampled = self.elbo + float(value), self.sampled + float(value)
        return replace(self, elbo=elbo, sampled=sampled, grad=self.grad + slope)

    def target(self, q: Gaussian) -> Gaussian:
        """Return where a full natural-gradient step from q leads: to the optimum, were log π quadratic."""
        return optimum(q.family, q.loc + self.curvature.solve(self.grad), self.curvature)

    def certificate(self, q: Gaussian) -> Certificate:
        """Return the predicted distance of q to the ELBO's optimum."""
        sd_error = float((q.stddev / self.target(q).stddev - 1).abs().max())
        return Certificate.at(self.grad, self.curvature, sd_error, self.grad_errors)


@dataclass(frozen=True, eq=False)
class Noise:
    """The draws of a run, the same throughout, so that ELBOs can be compared."""

    likelihood: Rule  # of the log-likelihood and its gradient
    curvature: Rule  # of its Hessian, which costs more
    prior: Rule  # of the prior, which costs no data, and has the skewed scales of a hierarchy

    def expectations(self, prior: Model, local: LocalModel, q: Gaussian, known: Bends | None = None) -> Expectations:
        """Return the ELBO of q with the derivatives that a step needs.

        The Hessian of the likelihood is a control variate: what a quadratic with it has for an error at these draws is
        known, and taken out of the ELBO.

        Parameters
        ----------
        known
            Second derivatives near q, then taken for those at q.

        """
        eta, prior_eta = q.transform(self.likelihood.nodes), q.transform(self.prior.nodes).requires_grad_()
        log_lik, grads = local.log_lik(eta)
        log_prior = self.prior.weights @ prior.log_prior(prior_eta)
        grad, errors = self.likelihood.mean(grads), local.grad_errors(self.likelihood, grads)
        if log_prior.requires_grad:  # unlike a flat prior's
            of_prior = torch.autograd.grad(log_prior, prior_eta)[0] / self.prior.weights[:, None]
            grad, errors = grad + self.prior.mean(of_prior), errors + self.prior.errors(of_prior)
        bends = known or self.bends(prior, local, q)
        sampled = float(self.likelihood.mean(log_lik) + log_prior.detach() + q.entropy())
        return self._seen(bends, q, sampled, grad, errors)

    def bends(self, prior: Model, local: LocalModel, q: Gaussian) -> Bends:
        """Return the second derivatives of log π that q sees."""
        bend = local.hessian(q.transform(self.curvature.nodes), self.curvature.weights)
        around = Rule(q.transform(self.prior.nodes), self.prior.weights)
        return Bends(Curvature.of(-(bend + prior_hessian(prior, around, bend.structure))), bend)

    def curved(self, prior: Model, local: LocalModel, q: Gaussian, seen: Expectations) -> Expectations:
        """Return what q sees, with second derivatives measured there, and the rest as it was seen."""
        return self._seen(self.bends(prior, local, q), q, seen.sampled, seen.grad, seen.grad_errors)

    def _seen(self, bends: Bends, q: Gaussian, sampled: float, grad: Tensor, errors: Tensor) -> Expectations:
        elbo = sampled - self._error(bends.bend, q)
        return Expectations(bends.curvature, bends.bend, elbo, sampled, grad, errors)

    @property
    def narrow(self) -> bool:
        """Whether the curvature at the mean of q stands for that averaged over q."""
        return len(self.curvature.nodes) == 1

    def gain(self, here: Expectations, there: Expectations, q: Gaussian) -> float:
        """Return by how much the ELBO of q, seen as `there`, exceeds that of another Gaussian, seen as `here`.

        Both with the control variate of the latter: what two of them would differ by is no gain.
        """
        return there.sampled - self._error(here.bend, q) - here.elbo

    def _error(self, bend: Arrowhead, q: Gaussian) -> float:
        """Return what the draws of q have for an error where the log-likelihood is a quadratic with this Hessian."""
        away = q.transform(self.likelihood.nodes) - q.loc
        sampled = self.likelihood.mean((bend.times(away) * away).sum(1))
        return 0.5 * float(sampled - _trace(bend, q))


def _trace(matrix: Arrowhead, q: Gaussian) -> Tensor:
    """Return tr(HΣ), twice the mean of a quadratic with Hessian H under q, less its value at the mean."""
    if isinstance(q.family, MeanField):
        return matrix.diagonal() @ q.stddev.square()
    return (matrix.matrix() * q.covariance_matrix).sum()


def solve(
    prior: Model,
    local: LocalModel,
    q: Gaussian,
    seen: Expectations,
    noise: Noise,
    tol: float,
    radius: float = math.inf,
    unit: Tensor | None = None,
    *,
    curved: bool = True,
) -> tuple[Gaussian, Expectations]:
    """Move q to the fixed point of a local model, to a fraction of `tol`, at most about `radius` units away.

    E_q[∇ log π] = 0 and Σ⁻¹ = −E_q[∇² log π] (its diagonal for mean field), by natural-gradient steps with a line
    search on the ELBO: μ ← μ + t P⁻¹ E_q[∇ log π], Σ⁻¹ ← P (Khan & Rue 2023, "The Bayesian learning rule", section
    3). P is measured anew when a step with it contracts too little, and where the search ends (Shamanskii 1967), but
    not within an sd of where it was, if the curvature at its mean is that which q spreads over.

    Parameters
    ----------
    seen
        What q sees of the local model.
    unit
        Of each coordinate (D,); None for its posterior sd.
    curved
        Whether the curvature is wanted where the search ends; if not, one that was measured nearby will do.

    Returns
    -------
    q, seen
        Where the search ended, and what it saw there; `q` itself if the ELBO does not rise.

    """
    unit, origin, measured, fresh = seen.curvature.stddev if unit is None else unit, q, q, True
    enough = SOLVED * tol
    history: list[Iterate] = []
    exact: list[Iterate] = []  # of the history, what was found with the curvature measured there
    for _ in range(SEARCH_STEPS):
        if not seen.grad.isfinite().all():
            break
        target = seen.target(q)
        length = distance(q, target, seen.curvature.stddev)
        room = radius - distance(origin, q, unit)
        fraction = min(1.0, room / max(distance(q, target, unit), enough))
        latest = [*history, iterate(q, target, unit)] if fraction == 1 else []
        faster = accelerated_member(q, latest, unit)
        settled = _left(q, target, faster, seen.curvature.stddev) < enough or room <= enough
        if settled and (fresh or not curved):
            break
        found = None
        if not settled:
            history, exact = latest, latest if fresh else exact
            if faster is not None and distance(origin, faster, unit) > radius:
                faster = None
            steps = _steps(q, target, seen.curvature, fraction, faster)
            looks = ((step, noise.expectations(prior, local, step, known=seen)) for step in steps)
            found = next((look for look in looks if look[1].elbo >= seen.elbo - NEGLIGIBLE_NATS), None)
            if found is None and fresh:
                break
        if found is None:
            seen, measured, fresh, history = noise.curved(prior, local, q, seen), q, True, exact
            continue
        step, look = found
        outgrown = not distance(step, look.target(step), look.curvature.stddev) < CONTRACTION * length
        try:
            seen = noise.curved(prior, local, step, look) if outgrown else look
        except ModelError:  # so far out that log π has no finite curvature
            radius, history = distance(origin, step, unit) / 4, []
            continue
        if outgrown:
            measured, history = step, exact
        q = step
        fresh = measured is q or (noise.narrow and distance(measured, q, seen.curvature.stddev) < 1)
    return q, seen if fresh or not curved else noise.curved(prior, local, q, seen)


def distance(q: Gaussian, other: Gaussian, unit: Tensor) -> float:
    """Return the largest difference of two means over coordinates, in units (D,) such as posterior sds."""
    return float(((other.loc - q.loc) / unit).abs().max())


def _left(q: Gaussian, target: Gaussian, faster: Gaussian | None, unit: Tensor) -> float:
    """Return how far the search has yet to go: the distance of means, or the norm of relative changes of sds if more.

    Where means and sds depend on one another, as effects of groups and their scale, changes of all effects' sds add up,
    and plain steps are short long before the end, which acceleration foresees.
    """
    ahead = [each for each in (target, faster) if each is not None]
    changes = (float((each.stddev / q.stddev - 1).norm()) for each in ahead)
    return max(*(distance(q, each, unit) for each in ahead), *changes)


def _steps(
    q: Gaussian, target: Gaussian, curvature: Curvature, fraction: float, faster: Gaussian | None
) -> Iterator[Gaussian]:
    """Yield where to step: by acceleration if there is any, then that fraction of the way to the target, then less."""
    if faster is not None:
        yield faster
    while fraction > SHORTEST_FRACTION:
        yield optimum(q.family, torch.lerp(q.loc, target.loc, fraction), _mixed(q, curvature, fraction))
        fraction /= 2


def iterate(q: Gaussian, target: Gaussian, unit: Tensor) -> Iterate:
    """Return q and the way to `target` as an iterate: means in `unit` (D,), and log sds."""
    residual = [(target.loc - q.loc) / unit, (target.stddev / q.stddev).log()]
    return Iterate(torch.cat([q.loc / unit, q.stddev.log()]), torch.cat(residual))


def accelerated_member(q: Gaussian, history: Sequence[Iterate], unit: Tensor) -> Gaussian | None:
    """Return the accelerated next Gaussian; None where there is nothing to accelerate by, or q is no mean field."""
    if len(history) < 2 or not isinstance(q.family, MeanField):
        return None
    loc, log_scale = accelerated(history).split(q.dim)
    return Gaussian(q.family, {"loc": unit * loc, "log_scale": log_scale})


def _mixed(q: Gaussian, curvature: Curvature, fraction: float) -> Curvature:
    """Return the curvature (1 − t) Σ⁻¹ + t P, as far as q's family needs it."""
    if fraction == 1:
        return curvature
    if isinstance(q.family, MeanField):
        precision = curvature.precision_diagonal
        return Curvature.diagonal((1 - fraction) * q.stddev.square().reciprocal() + fraction * precision)
    mixed = (1 - fraction) * torch.linalg.inv(q.covariance_matrix) + fraction * curvature.precision.matrix()
    return Curvature.dense(mixed)
