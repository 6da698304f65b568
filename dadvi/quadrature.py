"""Fixed weighted draws for expectations under a standard normal ε, and so under any Gaussian t(θ, ε).

    E f(ε) ≈ Σ_k w_k f(ε_k)

Random draws leave every sd with the noise of their second moments. These rules come in pairs ±ε, so that their mean is
0, and all but few orthogonal ones have unit variance in every coordinate exactly.

Each is the mean of several rules of its kind, made from independent random numbers: by what these differ, the error of
the mean is known (randomised quasi-Monte Carlo: Owen 2013, "Monte Carlo theory, methods and examples", section 17.3).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from dadvi.elbo import draw_noise
from dadvi.types import FloatArray

NUM_ERRORS = 8
"""Draws of the error of a mean. Of many coordinates the largest error is what counts, and it is not that of the
coordinate with the largest standard error."""

FEW_DIRECTIONS = 2**12
"""Directions of signs below which two of a handful would often be the same."""

FEWEST_STRATA, MOST_CUBES = 8, 8
"""Strata, on either side of 0, of each Latin hypercube of a stratified rule, and how many there are at most."""


@dataclass(frozen=True, eq=False)
class Rule:
    """Nodes and their weights."""

    nodes: Tensor  # ε (K, dim)
    weights: Tensor  # w (K,), of sum 1
    contrasts: Tensor | None = None  # (NUM_ERRORS, K); None where nothing is known of the error

    @classmethod
    def mean_of(cls, parts: Tensor, nodes: Tensor, rng: np.random.Generator, of: float = math.inf) -> "Rule":
        """Return the mean of independent rules with weights (R, K) at these nodes (K, dim).

        Parameters
        ----------
        of
            How many rules there are, of which these were drawn, each at most once: their mean varies less for it.

        """
        num_parts, weights = len(parts), parts.mean(0)
        if num_parts == 1:
            return cls(nodes, weights)
        normal = torch.from_numpy(rng.standard_normal((NUM_ERRORS, num_parts)))
        scale = math.sqrt((1 - num_parts / of) / (num_parts * (num_parts - 1)))
        return cls(nodes, weights, scale * (normal @ (parts - weights)))

    def mean(self, values: Tensor) -> Tensor:
        """Return Σ_k w_k f_k of values (K, ...)."""
        mean: Tensor = torch.tensordot(self.weights, values, dims=1)
        return mean

    def errors(self, values: Tensor) -> Tensor:
        """Return draws (NUM_ERRORS, D) of the error of the mean of values (K, D): 0 where nothing is known of it."""
        return values.new_zeros(NUM_ERRORS, values.shape[1]) if self.contrasts is None else self.contrasts @ values

    @classmethod
    def equal(cls, nodes: Tensor) -> "Rule":
        """Return the rule whose nodes have the same weight."""
        return cls(nodes, torch.full((len(nodes),), 1 / len(nodes), dtype=torch.float64))


def in_pairs(nodes: Tensor, rng: np.random.Generator) -> Rule:
    """Return the rule of random nodes (K, dim) of the same weight, of which node k and node k + K/2 are a pair ±ε."""
    return Rule.mean_of(_blocks(len(nodes) // 2, 1).repeat(1, 2) / 2, nodes, rng)


def orthogonal(num_draws: int, dim: int, rng: np.random.Generator) -> Rule:
    """Return pairs ±√dim·q with q rows of random orthogonal matrices, of the same weight.

    For fewer draws than a spherical rule takes to tell its error. The distance from 0 being fixed, what a function has
    of fourth order is told too small by a fraction of 2/(dim + 2), whatever the number of draws.
    """
    return in_pairs(draw_noise("orthogonal", num_draws, dim, rng, fixed=True), rng)


def spherical(num_draws: int, dim: int, rng: np.random.Generator) -> Rule:
    """Return the stochastic spherical-radial rule of degree 3 (Genz & Monahan 1998), with 0 in common.

    For each of some random orthogonal matrices with rows q, and ρ² ~ χ²(dim + 2), it is

        (1 − dim/ρ²) f(0) + 1/(2ρ²) Σ_q [f(ρq) + f(−ρq)],

    exact for cubics and unbiased whatever f: the error falls like 1/√K also where a posterior is wide and log π is no
    polynomial. Of the matrices' ρ each is from a stratum of its own, so that the error is rather less than it is told.

    Parameters
    ----------
    num_draws
        Nodes but 0, rounded down to whole matrices: to a multiple of 2 dim; at least that.

    """
    number = max(1, num_draws // (2 * dim))
    strata = (np.arange(number) + rng.random(number)) / number
    squares = torch.from_numpy(stats.chi2.ppf(strata, dim + 2))  # ρ² (number,)
    unit = draw_noise("orthogonal", 2 * dim * number, dim, rng, fixed=True)[: dim * number] / math.sqrt(dim)
    nodes = squares.sqrt().repeat_interleave(dim)[:, None] * unit
    of_pairs = torch.diag(1 / (2 * squares)).repeat_interleave(dim, dim=1)
    parts = torch.cat([(1 - dim / squares)[:, None], of_pairs, of_pairs], dim=1)
    center = torch.zeros(1, dim, dtype=torch.float64)
    return Rule.mean_of(parts, torch.cat([center, nodes, -nodes]), rng)


def gauss_hermite(num_draws: int, dim: int, rng: np.random.Generator, num_points: int = 3) -> Rule:
    """Return the Gauss-Hermite rule of 2, 3 or 5 points along each of some random signs s (dim,), with 0 in common.

    Exact to degree 3, 5 or 9 in any one coordinate, and so nearly exact where each row depends on one uncertain latent,
    such as the effect of its group; products of different coordinates average out over the signs.

    Parameters
    ----------
    num_draws
        Nodes but 0, rounded down to a multiple of those along a direction; at least that.

    """
    line, weights = np.polynomial.hermite_e.hermegauss(num_points)
    out, of_out = (torch.from_numpy(each[line > 0]) for each in (line, weights / weights.sum()))
    num_signs, known = max(1, num_draws // (2 * len(out))), 2 ** min(dim - 1, 62)  # directions but for their sign
    few = num_signs <= known <= FEW_DIRECTIONS
    signs = torch.from_numpy(_other_signs(num_signs, dim, rng) if few else rng.choice([-1.0, 1.0], (num_signs, dim)))
    pairs = (out[:, None, None] * signs).flatten(0, 1)  # the signs of the first point, then of the next
    nodes = torch.cat([torch.zeros(num_points % 2, dim, dtype=torch.float64), pairs, -pairs])
    alone = torch.eye(num_signs, dtype=torch.float64)
    of_pairs = torch.cat([weight * alone for weight in of_out], dim=1)  # of each direction by itself
    center = torch.full((num_signs, num_points % 2), weights[num_points // 2] / weights.sum(), dtype=torch.float64)
    parts = torch.cat([center, of_pairs, of_pairs], dim=1)
    return Rule.mean_of(parts, nodes, rng, known if few else math.inf)


def _other_signs(number: int, dim: int, rng: np.random.Generator) -> FloatArray:
    """Return random signs (number, dim), no two the same but for the sign: their difference would tell of no error."""
    codes = rng.choice(2 ** (dim - 1), size=number, replace=False)
    return np.where(codes[:, None] >> np.arange(dim) & 1, -1.0, 1.0)


def stratified(num_draws: int, dim: int, rng: np.random.Generator) -> Rule:
    """Return Latin hypercubes of normal quantiles in pairs ±ε (McKay, Beckman & Conover 1979), each of unit variance.

    Together they have the finest strata that their number allows for (sliced: Qian 2012). For skewed functions of
    single coordinates, such as the density of group effects as a function of their scale.
    """
    half = num_draws // 2
    num_cubes = math.gcd(half, min(MOST_CUBES, max(1, half // FEWEST_STRATA)))
    num_levels = half // num_cubes
    levels = stats.norm.ppf(0.5 + (np.arange(half) + 0.5) / num_draws)  # (half,), one for each stratum and its mirror
    table = levels.reshape(num_levels, num_cubes)
    table[1::2] = table[1::2, ::-1].copy()  # to and fro, so that each cube's levels spread alike
    table /= np.sqrt(np.mean(table**2, axis=0))
    cubes = []
    for of_cube in table.T:
        order = rng.permuted(np.broadcast_to(np.arange(num_levels), (dim, num_levels)), axis=1)
        signs = rng.choice([-1.0, 1.0], size=(dim, num_levels))
        cubes.append(torch.from_numpy((signs * of_cube[order]).T.copy()))
    nodes = torch.cat(cubes)
    return Rule.mean_of(_blocks(num_cubes, num_levels).repeat(1, 2) / 2, torch.cat([nodes, -nodes]), rng)


def _blocks(number: int, length: int) -> Tensor:
    """Return equal weights (number, number · length) for each of successive blocks of nodes, of sum 1."""
    return torch.eye(number, dtype=torch.float64).repeat_interleave(length, dim=1) / length
