"""The best Gaussian for a model whose ELBO is known exactly: what the benchmark holds a fit against.

Nothing of dadvi's solvers is used; rows are read from its shards, and all arithmetic is float64.

The log-likelihood of row i depends on η through L *locals*, each linear in η:

    c_ℓ = a_ℓ·η_dense,  to the first of which is added η_group[g_i], if there are groups

(a regression has one local, its linear predictor; a coordinate that acts on every row alike is a local of its own).
Under q the locals are independent Gaussians with means m (L,) and sds s (L,), so that f_i(m, s) = E_q ℓ_i is in closed
form or a Gauss-Hermite rule in a few dimensions. By the theorems of Bonnet and Price (Opper & Archambeau 2009)

    E_q[∇ℓ_i] and E_q[∇²ℓ_i] in the locals are the first and second derivatives of f_i in m,

taken by automatic differentiation of a sum over rows, since rows do not share locals. The prior's part is the same
derivatives of its expectation, a function of the means (D,) and sds (D,) of q.

The optimum is the fixed point E_q[∇ log π] = 0, Σ⁻¹ = P for full rank or σ_j⁻² = P_jj for mean field, where
P = −E_q[∇² log π] is an arrow: a dense block (G, G), a cross block (J, G), a diagonal for the J group effects. It is
reached by μ ← μ + P⁻¹ E_q[∇ log π], Σ ← Σ(P), and has been reached when neither moves.
"""

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

import dadvi
from dadvi.passes import single_thread

Rows: TypeAlias = dict[str, Tensor]
"""Fields of some rows, floating and boolean ones as float64."""

TOLERANCE = 3e-4
"""Where the iteration ends: the largest step, in posterior sds, and the largest relative change of an sd."""

MOST_ITERATIONS = 100
NARROW = 1e-6
"""Sds of the q that the iteration starts with: there is nothing yet to tell them."""

SD_ITERATIONS = 1
"""Before the first step of the mean: where a scale is uncertain, the step depends on the sds."""

CHUNKS_AT_ONCE = 16

ROUNDING = 1e-11
"""Relative fall of the ELBO that is none: sums over millions of rows differ by it."""

SHORTEST = 1e-6
"""Fraction of a step below which there is nothing to be gained."""


@dataclass(frozen=True, eq=False)
class Locals:
    """How the locals of n rows depend on η."""

    design: Tensor  # a (L, n, G)
    codes: Tensor | None = None  # g (n,)


@dataclass(frozen=True, eq=False)
class Target:
    """What is needed of a model: its D = G + J coordinates, dense ones first, and its expectations under q."""

    num_dense: int  # G
    num_groups: int  # J
    locals_of: Callable[[Rows], Locals]
    log_lik: Callable[[Tensor, Tensor, Rows], Tensor]
    """Means (L, n) and sds (L, n) of the locals to E_q ℓ_i (n,), up to a constant; differentiable in the means."""
    log_prior: Callable[[Tensor, Tensor], Tensor]
    """Means (D,) and sds (D,) to E_q of log prior and log-det, up to a constant; differentiable in the means.

    A term of ℓ_i that is the same for every row may be here, times the number of rows.
    """


@dataclass(frozen=True, eq=False)
class Arrow:
    """A symmetric matrix (G + J, G + J) whose block for the group effects is diagonal."""

    dense: Tensor  # (G, G)
    cross: Tensor  # (J, G)
    groups: Tensor  # (J,)

    @property
    def diagonal(self) -> Tensor:
        """The diagonal (D,)."""
        return torch.cat([self.dense.diagonal(), self.groups])

    def inverse_schur(self) -> Tensor:
        """Return the dense block (G, G) of the inverse: that of the Schur complement of the group effects.

        Its eigenvalues, at a unit diagonal, are taken by their absolute values, so that a step is uphill where log π
        is not concave; at an optimum they are positive.
        """
        schur = self.dense - self.cross.T @ (self.cross / self.groups[:, None])
        unit = schur.diagonal().abs().rsqrt()
        values, vectors = torch.linalg.eigh(unit[:, None] * schur * unit)
        root = unit[:, None] * vectors
        return (root / values.abs()) @ root.T

    def solve(self, rhs: Tensor) -> Tensor:
        """Return the solution (D,) of a linear system."""
        dense, groups = rhs.split([len(self.dense), len(self.groups)])
        head = self.inverse_schur() @ (dense - self.cross.T @ (groups / self.groups))
        return torch.cat([head, (groups - self.cross @ head) / self.groups])

    def inverse_diagonal(self) -> Tensor:
        """Return the diagonal (D,) of the inverse."""
        inverse, slope = self.inverse_schur(), self.cross / self.groups[:, None]
        return torch.cat([inverse.diagonal(), 1 / self.groups + ((slope @ inverse) * slope).sum(1)])


@dataclass(frozen=True, eq=False)
class Q:
    """A Gaussian by its mean and precision: a diagonal (D,) for mean field, a matrix (D, D) for full rank."""

    loc: Tensor  # (D,)
    precision: Tensor

    @property
    def full_rank(self) -> bool:
        """Whether the precision is a matrix."""
        return self.precision.dim() == 2

    @cached_property
    def covariance(self) -> Tensor:
        """Σ (D, D), or its diagonal (D,) for mean field."""
        return torch.linalg.inv(self.precision) if self.full_rank else 1 / self.precision

    @property
    def variances(self) -> Tensor:
        """The diagonal of Σ (D,)."""
        return self.covariance.diagonal() if self.full_rank else self.covariance

    def entropy(self) -> float:
        """Return the entropy up to a constant: −½ log|Σ⁻¹|."""
        return -0.5 * float(self.precision.logdet() if self.full_rank else self.precision.log().sum())

    def moved(self, step: Tensor, curvature: Arrow, fraction: float = 1.0) -> "Q":
        """Return N(μ + t step, ((1 − t) Σ⁻¹ + t P)⁻¹), of P only what the family can have."""
        best = curvature.dense if self.full_rank else curvature.diagonal
        return Q(self.loc + fraction * step, (1 - fraction) * self.precision + fraction * best)


@dataclass(frozen=True, eq=False)
class Expected:
    """What q sees of log π."""

    elbo: float  # up to a constant
    grad: Tensor  # E_q[∇ log π] (D,)
    precision: Arrow  # −E_q[∇² log π]


@dataclass(frozen=True, eq=False)
class Optimum:
    """The best Gaussian, and how surely it is that."""

    loc: Tensor  # (D,)
    stddev: Tensor  # of the best Gaussian (D,)
    marginal: Tensor  # sqrt(diag P⁻¹) (D,): the posterior sds in which errors of the mean are counted
    residual: float  # of the last two steps, the larger: of a mean in posterior sds, or of an sd, relative
    iterations: int
    seconds: float


def optimum(target: Target, data: dadvi.ShardedDataset, start: Tensor, *, full_rank: bool = False) -> Optimum:
    """Return the optimum of the mean-field or the full-rank family.

    A step that lowers the ELBO is halved until it does not.

    Parameters
    ----------
    start
        Where the iteration begins (D,), such as the parameters that generated the data.
    full_rank
        For a target without groups.

    Raises
    ------
    RuntimeError
        If the iteration does not settle.

    """
    began = time.perf_counter()
    narrow = torch.full_like(start, NARROW**-2, dtype=torch.float64)
    q = Q(start.double(), narrow.diag() if full_rank else narrow)
    here = expected(target, data, q)
    for _ in range(SD_ITERATIONS):
        q = q.moved(torch.zeros_like(q.loc), here.precision)
        here = expected(target, data, q)
    before = math.inf
    for iteration in range(1, MOST_ITERATIONS + 1):
        step, marginal = here.precision.solve(here.grad), here.precision.inverse_diagonal().sqrt()
        best = q.moved(step, here.precision)
        change = (best.variances / q.variances).sqrt() - 1
        residual = max(float((step / marginal).abs().max()), float(change.abs().max()))
        if max(residual, before) < TOLERANCE:  # twice: means and sds take turns to move where they are coupled
            seconds = time.perf_counter() - began
            return Optimum(best.loc, best.variances.sqrt(), marginal, max(residual, before), iteration, seconds)
        fraction, there = 1.0, expected(target, data, best)
        while not there.elbo >= here.elbo - ROUNDING * abs(here.elbo):  # as for nan
            fraction /= 2
            if fraction < SHORTEST:
                raise RuntimeError(f"iteration {iteration}: no step raises the ELBO, which is {residual:.2g} sd off")
            best = q.moved(step, here.precision, fraction)
            there = expected(target, data, best)
        q, here, before = best, there, residual
    raise RuntimeError(f"the reference still moves by {residual:.2g} sd after {MOST_ITERATIONS} iterations")


def expected(target: Target, data: dadvi.ShardedDataset, q: Q) -> Expected:
    """Return what q sees of log π, by one pass over the data, with a thread for each core."""
    J = target.num_groups
    elbo, grad, prior = _prior_derivatives(target, q.loc, q.variances.sqrt())
    dense, cross, groups = prior.dense, prior.cross, prior.groups
    on_dense, on_groups = grad.split([target.num_dense, J])
    with single_thread(), ThreadPoolExecutor(os.cpu_count()) as threads:
        for first in range(0, data.manifest.num_chunks, CHUNKS_AT_ONCE):  # bounds what waits to be added
            chunks = range(first, min(first + CHUNKS_AT_ONCE, data.manifest.num_chunks))
            for part in threads.map(lambda chunk: _of_chunk(target, data, q, chunk), chunks):
                elbo += part.value
                on_dense += part.grad
                dense -= part.curvature
                if part.codes is not None:
                    on_groups += torch.bincount(part.codes, part.slope, minlength=J)
                    groups -= torch.bincount(part.codes, part.bend, minlength=J)
                    cross.index_add_(0, part.codes, part.cross, alpha=-1)
    return Expected(elbo + q.entropy(), grad, Arrow((dense + dense.T) / 2, cross, groups))


@dataclass(frozen=True, eq=False)
class _Part:
    """What the n rows of a chunk add; where groups are concerned, row by row."""

    value: float
    grad: Tensor  # (G,)
    curvature: Tensor  # (G, G)
    codes: Tensor | None  # (n,)
    slope: Tensor  # (n,)
    bend: Tensor  # (n,)
    cross: Tensor  # (n, G)


def _of_chunk(target: Target, data: dadvi.ShardedDataset, q: Q, chunk: int) -> _Part:
    G, variances = target.num_dense, q.variances
    rows = as_double(data.read(chunk))
    at = target.locals_of(rows)
    a, codes = at.design, at.codes
    means = a @ q.loc[:G]  # (L, n)
    spread = ((a @ q.covariance) * a).sum(2) if q.full_rank else a.square() @ variances[:G]
    if codes is not None:
        means[0] += q.loc[G:][codes]
        spread[0] += variances[G:][codes]
    value, slope, bend = _local_derivatives(target, means, spread.sqrt(), rows)
    bent = torch.einsum("lkn,kng->lng", bend, a)
    grad, curvature = torch.einsum("lng,ln->g", a, slope), (a.transpose(1, 2) @ bent).sum(0)
    return _Part(value, grad, curvature, codes, slope[0], bend[0, 0], bent[0])


def as_double(rows: Rows) -> Rows:
    """Return the fields with booleans and floating ones as float64, and integers as they are."""
    whole = (torch.int64, torch.int32)
    return {name: values if values.dtype in whole else values.double() for name, values in rows.items()}


def _local_derivatives(target: Target, means: Tensor, sds: Tensor, rows: Rows) -> tuple[float, Tensor, Tensor]:
    """Return Σ f over rows, and each row's first (L, n) and second (L, L, n) derivatives in the means of its locals."""
    means = means.detach().requires_grad_()
    value = target.log_lik(means, sds, rows).sum()
    (slope,) = torch.autograd.grad(value, means, create_graph=True)
    bend = [torch.autograd.grad(each.sum(), means, retain_graph=True)[0] for each in slope]
    return float(value.detach()), slope.detach(), torch.stack(bend)


def _prior_derivatives(target: Target, loc: Tensor, sd: Tensor) -> tuple[float, Tensor, Arrow]:
    """Return the prior's value, gradient (D,) and precision.

    The last is measured by a product with each dense unit vector and one with all groups at once.

    A group effect's prior must depend on no other group effect, so that the last of these is the diagonal.
    """
    G, J = target.num_dense, target.num_groups
    mean = loc.detach().requires_grad_()
    value = target.log_prior(mean, sd)
    (grad,) = torch.autograd.grad(value, mean, create_graph=True)
    unit = torch.eye(G, G + J, dtype=torch.float64)
    products = torch.stack([torch.autograd.grad(grad, mean, each, retain_graph=True)[0] for each in unit])
    every = torch.cat([torch.zeros(G), torch.ones(J)]).double()
    (diagonal,) = torch.autograd.grad(grad, mean, every)
    return float(value.detach()), grad.detach(), Arrow(-products[:, :G], -products[:, G:].T.contiguous(), -diagonal[G:])


def gauss_hermite(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Return nodes (n,) and weights (n,) of the standard normal, exact for polynomials of degree 2n − 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def by_quadrature(
    log_lik: Callable[[Tensor, Rows], Tensor], num_nodes: tuple[int, ...]
) -> Callable[[Tensor, Tensor, Rows], Tensor]:
    """Return E_q ℓ_i by the product of Gauss-Hermite rules, one for each local.

    Parameters
    ----------
    log_lik
        Locals (L, n, K) and the rows, their fields of shape (n, 1), to ℓ_i (n, K).
    num_nodes
        Nodes of each local's rule; K is their product.

    """
    rules = [gauss_hermite(each) for each in num_nodes]
    grid = torch.stack(torch.meshgrid(*(nodes for nodes, _ in rules), indexing="ij")).flatten(1)  # (L, K)
    weights = torch.stack(torch.meshgrid(*(weights for _, weights in rules), indexing="ij")).prod(0).flatten()

    def expectation(means: Tensor, sds: Tensor, rows: Rows) -> Tensor:
        at = means[..., None] + sds[..., None] * grid[:, None]  # (L, n, K)
        return log_lik(at, {name: values[:, None] for name, values in rows.items()}) @ weights

    return expectation
