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
P = −E_q[∇² log π] is an arrow: a dense block (G, G), a cross block (J, G), and a diagonal for the J group effects. It is
reached by μ ← μ + P⁻¹ E_q[∇ log π], Σ ← Σ(P), and has been reached when neither moves.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

import dadvi

Rows: TypeAlias = dict[str, Tensor]
"""Fields of some rows, floating and boolean ones as float64."""

TOLERANCE = 1e-4
"""Where the iteration ends: the largest step, in posterior sds, and the largest relative change of an sd."""

MOST_ITERATIONS = 100
NARROW = 1e-6
"""Sds of the q that the iteration starts with: there is nothing yet to tell them."""


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
    """Means (D,) and sds (D,) to E_q of log prior and log-det, up to a constant; differentiable in the means."""


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
class Optimum:
    """The best Gaussian, and how surely it is that."""

    loc: Tensor  # (D,)
    stddev: Tensor  # of the best Gaussian (D,)
    marginal: Tensor  # sqrt(diag P⁻¹) (D,): the posterior sds in which errors of the mean are counted
    residual: float  # the last step in posterior sds, or the last relative change of an sd
    iterations: int
    seconds: float


def optimum(target: Target, data: dadvi.ShardedDataset, start: Tensor, *, full_rank: bool = False) -> Optimum:
    """Return the optimum of the mean-field or the full-rank family.

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
    loc, sd = start.double(), torch.full_like(start, NARROW, dtype=torch.float64)
    covariance = sd.square().diag() if full_rank else None
    for iteration in range(1, MOST_ITERATIONS + 1):
        grad, precision = derivatives(target, data, loc, sd, covariance)
        step, marginal = precision.solve(grad), precision.inverse_diagonal().sqrt()
        if full_rank:
            covariance = precision.inverse_schur()
        new_sd = marginal if full_rank else precision.diagonal.rsqrt()
        moved = max(float((step / marginal).abs().max()), float((sd / new_sd - 1).abs().max()))
        loc, sd = loc + step, new_sd
        if moved < TOLERANCE:
            return Optimum(loc, sd, marginal, moved, iteration, time.perf_counter() - began)
    raise RuntimeError(f"the reference still moves by {moved:.2g} sd after {MOST_ITERATIONS} iterations")


def derivatives(
    target: Target, data: dadvi.ShardedDataset, loc: Tensor, sd: Tensor, covariance: Tensor | None = None
) -> tuple[Tensor, Arrow]:
    """Return E_q[∇ log π] (D,) and −E_q[∇² log π] at q = N(loc, diag(sd²)), or at the covariance (G, G) given."""
    G, J = target.num_dense, target.num_groups
    grad, precision = _prior_derivatives(target, loc, sd)
    dense, cross, groups = precision.dense, precision.cross, precision.groups
    for chunk in range(data.manifest.num_chunks):
        rows = as_double(data.read(chunk))
        at = target.locals_of(rows)
        a, codes = at.design, at.codes
        means = a @ loc[:G]  # (L, n)
        variances = a.square() @ sd[:G].square() if covariance is None else ((a @ covariance) * a).sum(2)
        if codes is not None:
            means[0] += loc[G:][codes]
            variances[0] += sd[G:].square()[codes]
        slope, bend = _local_derivatives(target, means, variances.sqrt(), rows)
        bent = torch.einsum("lkn,kng->lng", bend, a)
        grad[:G] += torch.einsum("lng,ln->g", a, slope)
        dense -= (a.transpose(1, 2) @ bent).sum(0)
        if codes is not None:
            grad[G:] += torch.bincount(codes, slope[0], minlength=J)
            cross.index_add_(0, codes, bent[0], alpha=-1)
            groups -= torch.bincount(codes, bend[0, 0], minlength=J)
    return grad, Arrow((dense + dense.T) / 2, cross, groups)


def as_double(rows: Rows) -> Rows:
    """Return the fields with booleans and floating ones as float64, and integers as they are."""
    whole = (torch.int64, torch.int32)
    return {name: values if values.dtype in whole else values.double() for name, values in rows.items()}


def _local_derivatives(target: Target, means: Tensor, sds: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the first (L, n) and second (L, L, n) derivatives of every row's f in the means (L, n) of its locals."""
    means = means.detach().requires_grad_()
    (slope,) = torch.autograd.grad(target.log_lik(means, sds, rows).sum(), means, create_graph=True)
    bend = [torch.autograd.grad(each.sum(), means, retain_graph=True)[0] for each in slope]
    return slope.detach(), torch.stack(bend)


def _prior_derivatives(target: Target, loc: Tensor, sd: Tensor) -> tuple[Tensor, Arrow]:
    """Return the prior's gradient (D,) and precision, by a product with each dense unit vector and one with all groups.

    A group effect's prior must depend on no other group effect, so that the last of these is the diagonal.
    """
    G, J = target.num_dense, target.num_groups
    mean = loc.detach().requires_grad_()
    (grad,) = torch.autograd.grad(target.log_prior(mean, sd), mean, create_graph=True)
    unit = torch.eye(G, G + J, dtype=torch.float64)
    products = torch.stack([torch.autograd.grad(grad, mean, each, retain_graph=True)[0] for each in unit])
    every = torch.cat([torch.zeros(G), torch.ones(J)]).double()
    (diagonal,) = torch.autograd.grad(grad, mean, every)
    return grad.detach(), Arrow(-products[:, :G], -products[:, G:].T.contiguous(), -diagonal[G:])


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
