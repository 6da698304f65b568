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

    @property
    def first_pair(self) -> "Rule":
        """The rule of the same kind with one pair, of a `gauss_hermite` rule."""
        num_pairs = len(self.nodes) // 2
        weights = torch.cat([self.weights[:1], self.weights[1:3] * num_pairs])
        return Rule(self.nodes[[0, 1, 1 + num_pairs]], weights)

    @classmethod
    def equal(cls, nodes: Tensor) -> "Rule":
        """Return the rule whose nodes have the same weight."""
        return cls(nodes, torch.full((len(nodes),), 1 / len(nodes), dtype=torch.float64))


def orthogonal(num_draws: int, dim: int, rng: np.random.Generator) -> Rule:
    """Return pairs ±√dim·q with q the rows of random orthogonal matrices, exact for quadratics if 2 dim of them."""
    return Rule.equal(draw_noise("orthogonal", num_draws, dim, rng, fixed=True))


def gauss_hermite(num_pairs: int, dim: int, rng: np.random.Generator) -> Rule:
    """Return 0 and pairs ±√3·s with random signs s (dim,): the three-point Gauss–Hermite rule along each s.

    Exact to degree 5 in any one coordinate, and so nearly exact where each row depends on one uncertain latent, such
    as the effect of its group; products of different coordinates average out over the pairs.
    """
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=(num_pairs, dim)))
    nodes = 3**0.5 * torch.cat([torch.zeros(1, dim, dtype=torch.float64), signs, -signs])
    weights = torch.full((len(nodes),), 1 / (6 * num_pairs), dtype=torch.float64)
    weights[0] = 2 / 3
    return Rule(nodes, weights)


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
