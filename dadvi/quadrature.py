"""Fixed weighted draws for expectations under a standard normal ε, and so under any Gaussian t(θ, ε).

    E f(ε) ≈ Σ_k w_k f(ε_k)

Random draws leave every sd with the noise of their second moments. These rules come in pairs ±ε, so that their mean is
0, and have unit variance in every coordinate exactly (orthogonal ones if there are a multiple of 2 dim of them).
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from dadvi.elbo import draw_noise


@dataclass(frozen=True, eq=False)
class Rule:
    """Nodes and their weights."""

    nodes: Tensor  # ε (K, dim)
    weights: Tensor  # w (K,), of sum 1

    def mean(self, values: Tensor) -> Tensor:
        """Return Σ_k w_k f_k of values (K, ...)."""
        mean: Tensor = torch.tensordot(self.weights, values, dims=1)
        return mean

    @classmethod
    def equal(cls, nodes: Tensor) -> "Rule":
        """Return the rule whose nodes have the same weight."""
        return cls(nodes, torch.full((len(nodes),), 1 / len(nodes), dtype=torch.float64))


def orthogonal(num_draws: int, dim: int, rng: np.random.Generator) -> Rule:
    """Return pairs ±√dim·q with q the rows of random orthogonal matrices, exact for quadratics if 2 dim of them."""
    return Rule.equal(draw_noise("orthogonal", num_draws, dim, rng, fixed=True))


def gauss_hermite(num_draws: int, dim: int, rng: np.random.Generator, num_points: int = 3) -> Rule:
    """Return the Gauss-Hermite rule of 3 or 5 points along each of some random signs s (dim,), with 0 in common.

    Exact to degree 5 or 9 in any one coordinate, and so nearly exact where each row depends on one uncertain latent,
    such as the effect of its group; products of different coordinates average out over the signs.

    Parameters
    ----------
    num_draws
        Nodes but 0, rounded down to a multiple of `num_points` − 1; at least that.

    """
    line, weights = np.polynomial.hermite_e.hermegauss(num_points)
    out, of_out = (torch.from_numpy(each[num_points // 2 + 1 :]) for each in (line, weights / weights.sum()))
    num_signs = max(1, num_draws // (2 * len(out)))
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=(num_signs, dim)))
    pairs = (out[:, None, None] * signs).flatten(0, 1)  # the signs of the first point, then of the next
    nodes = torch.cat([torch.zeros(1, dim, dtype=torch.float64), pairs, -pairs])
    of_pairs = (of_out / num_signs).repeat_interleave(num_signs)
    center = torch.tensor([weights[num_points // 2] / weights.sum()])
    return Rule(nodes, torch.cat([center, of_pairs, of_pairs]))


def stratified(num_draws: int, dim: int, rng: np.random.Generator) -> Rule:
    """Return a Latin hypercube of normal quantiles in pairs ±ε (McKay, Beckman & Conover 1979), of unit variance.

    For skewed functions of single coordinates, such as the density of group effects as a function of their scale.
    """
    half = num_draws // 2
    levels = stats.norm.ppf(0.5 + (np.arange(half) + 0.5) / num_draws)  # (half,), one for each stratum and its mirror
    levels /= np.sqrt(np.mean(levels**2))
    order = rng.permuted(np.broadcast_to(np.arange(half), (dim, half)), axis=1)
    signs = rng.choice([-1.0, 1.0], size=(dim, half))
    nodes = torch.from_numpy((signs * levels[order]).T.copy())
    return Rule.equal(torch.cat([nodes, -nodes]))
