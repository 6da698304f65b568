"""Posteriors known in closed form, and the Gaussian that a fit to each of them must end at.

A `Target` has the data (`fields`, float64 and int64 arrays), a factory of the model, the exact moments of the
posterior, and `optimum(family)`: where the ELBO of that family is largest, in unconstrained space. For a Gaussian
posterior the full-rank optimum is the posterior itself, and the mean-field optimum has its mean and the sds 1/√P_jj of
its precision P. The posterior of the logarithm of a positive latent is not Gaussian; there the expected log density
under a Gaussian is known in closed form, and so is its maximum. `tests/test_targets.py` checks it all by quadrature.

    target = targets.linear_regression(num_rows=500)
    data = dadvi.write_shards(path, target.fields, chunk_rows=64)
    posterior = dadvi.fit(target.model(), data, family="full_rank")
    loc, sd = target.optimum("full_rank")       # compare with posterior.unconstrained.loc and .stddev
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch.distributions import Gamma, InverseGamma, Normal, Poisson

import dadvi
from dadvi.sharding import ShardedDataset
from dadvi.stopwatch import Profile

TIMES = {"seconds", *(each.name for each in fields(Profile))}
"""Columns of a trace that no two runs have alike."""


class Optimum(NamedTuple):
    """Where a family's ELBO is largest, unconstrained: mean and marginal sds, by coordinate of the model."""

    loc: np.ndarray  # (D,)
    sd: np.ndarray  # (D,)


class Moments(NamedTuple):
    """Exact posterior mean and sd of one latent."""

    mean: np.ndarray  # (*shape of the latent)
    sd: np.ndarray


@dataclass(frozen=True, eq=False)
class Target:
    """A data set and a model whose posterior is known."""

    name: str
    fields: Mapping[str, np.ndarray]  # name to (rows, ...)
    model: Callable[[], dadvi.Model]
    gaussian: bool  # whether the unconstrained posterior is a Gaussian, so that the full-rank optimum is exact
    posterior: Mapping[str, Moments]  # by latent, of the constrained posterior
    log_evidence: float  # log p(x): the ELBO where q is the posterior, above it elsewhere
    optima: Mapping[str, Optimum] = field(repr=False)  # by family
    covariance: np.ndarray = field(repr=False)  # of the full-rank optimum (D, D)

    def optimum(self, family: str) -> Optimum:
        """Return the ELBO's optimum for "mean_field" or "full_rank".

        A "low_rank" family of rank D - 1 or more holds every Gaussian (Σ less its smallest eigenvalue has rank D - 1),
        so its optimum is that of "full_rank".
        """
        return self.optima["full_rank" if family == "low_rank" else family]


def normal_normal(num_rows: int = 1_000, seed: int = 0) -> Target:
    """μ ~ N(1, 2²), x_i ~ N(μ, 0.5²): the posterior of μ is normal; fields ``x``; D = 1."""
    prior_mean, prior_sd, noise_sd = 1.0, 2.0, 0.5
    x = np.random.default_rng(seed).normal(-0.7, noise_sd, num_rows)
    precision = 1 / prior_sd**2 + num_rows / noise_sd**2
    mean = (prior_mean / prior_sd**2 + x.sum() / noise_sd**2) / precision
    sd = precision**-0.5
    # log p(x) = log p(x | μ) + log p(μ) - log p(μ | x), at any μ
    log_evidence = (
        stats.norm.logpdf(x, mean, noise_sd).sum()
        + stats.norm.logpdf(mean, prior_mean, prior_sd)
        - stats.norm.logpdf(mean, mean, sd)
    )
    optimum = Optimum(np.array([mean]), np.array([sd]))
    return Target(
        name="normal_normal",
        fields={"x": x},
        model=lambda: dadvi.Model(
            prior={"mu": Normal(torch.tensor(prior_mean), prior_sd)},
            likelihood=lambda mu: Normal(mu, noise_sd),
            observed="x",
        ),
        gaussian=True,
        posterior={"mu": Moments(np.array(mean), np.array(sd))},
        log_evidence=float(log_evidence),
        optima={"mean_field": optimum, "full_rank": optimum},
        covariance=np.array([[sd**2]]),
    )


def inverse_gamma_normal(num_rows: int = 1_000, seed: int = 0) -> Target:
    """s ~ InverseGamma(2, 3), m | s ~ N(0, s), x_i ~ N(m, s), s a variance: field ``x``; D = 2: (log s, m).

    With s | x ~ InverseGamma(a, b) and m | s, x ~ N(c, s/k), the ELBO of N((u, v), Σ) in (log s, m) is

        -(a + ½) u - exp(-u + Σ_uu/2)·(b + k/2·((v - Σ_uv - c)² + Σ_vv)) + ½ log|Σ| + const,

    largest at v = c, Σ_uv = 0, Σ_uu = 1/(a + ½), u = log(b/a) + Σ_uu/2, Σ_vv = b/(a k), whether or not Σ_uv is free.
    """
    x = np.random.default_rng(seed).normal(0.8, 1.5, num_rows)
    k = 1 + num_rows
    c = x.sum() / k
    a = 2 + num_rows / 2
    b = 3 + 0.5 * (np.square(x).sum() - k * c**2)
    var_log_s = 1 / (a + 0.5)
    sd = np.sqrt([var_log_s, b / (a * k)])
    optimum = Optimum(np.array([math.log(b / a) + var_log_s / 2, c]), sd)
    log_evidence = (
        special.gammaln(a)
        - special.gammaln(2)
        + 2 * math.log(3)
        - a * math.log(b)
        - 0.5 * math.log(k)
        - num_rows / 2 * math.log(2 * math.pi)
    )
    s_mean = b / (a - 1)
    return Target(
        name="inverse_gamma_normal",
        fields={"x": x},
        model=lambda: dadvi.Model(
            prior={"s": InverseGamma(torch.tensor(2.0), torch.tensor(3.0)), "m": lambda s: Normal(0.0, s.sqrt())},
            likelihood=lambda s, m: Normal(m, s.sqrt()),
            observed="x",
        ),
        gaussian=False,
        posterior={
            "s": Moments(np.array(s_mean), np.array(s_mean / math.sqrt(a - 2))),
            "m": Moments(np.array(c), np.array(math.sqrt(s_mean / k))),
        },
        log_evidence=float(log_evidence),
        optima={"mean_field": optimum, "full_rank": optimum},
        covariance=np.diag(sd**2),
    )


def linear_regression(num_rows: int = 1_000, seed: int = 0) -> Target:
    """β ~ N(0, 2² I), y_i ~ N(x_i·β, 0.8²), predictors correlated by 0.9: fields ``x`` (rows, 5), ``y``; D = 5."""
    dim, prior_sd, noise_sd = 5, 2.0, 0.8
    rng = np.random.default_rng(seed)
    correlation = 0.9 ** np.abs(np.subtract.outer(np.arange(dim), np.arange(dim)))
    x = rng.standard_normal((num_rows, dim)) @ np.linalg.cholesky(correlation).T
    y = x @ np.array([1.0, -0.5, 0.25, 0.0, 2.0]) + noise_sd * rng.standard_normal(num_rows)
    precision = x.T @ x / noise_sd**2 + np.eye(dim) / prior_sd**2
    covariance = np.linalg.inv(precision)
    mean = np.linalg.solve(precision, x.T @ y / noise_sd**2)
    sd = np.sqrt(np.diag(covariance))
    log_evidence = (
        stats.norm.logpdf(y, x @ mean, noise_sd).sum()
        + stats.norm.logpdf(mean, 0, prior_sd).sum()
        + 0.5 * (dim * math.log(2 * math.pi) - np.linalg.slogdet(precision)[1])  # - log p(mean | y)
    )
    return Target(
        name="linear_regression",
        fields={"x": x, "y": y},
        model=lambda: dadvi.Model(
            prior={"beta": Normal(torch.zeros(dim), prior_sd)},
            likelihood=lambda beta, x: Normal(x @ beta, noise_sd),
            observed="y",
        ),
        gaussian=True,
        posterior={"beta": Moments(mean, sd)},
        log_evidence=float(log_evidence),
        optima={"mean_field": Optimum(mean, np.diag(precision) ** -0.5), "full_rank": Optimum(mean, sd)},
        covariance=covariance,
    )


def poisson_gamma(num_rows: int = 1_000, seed: int = 0) -> Target:
    """λ ~ Gamma(2, 4), y_i ~ Poisson(λ·exposure_i): fields ``y`` (counts) and ``exposure``; D = 1: log λ.

    With λ | y ~ Gamma(a, b) (b a rate), the ELBO of N(u, v) in log λ is a u - b exp(u + v/2) + ½ log v + const,
    largest at v = 1/a, u = log(a/b) - v/2.
    """
    rng = np.random.default_rng(seed)
    exposure = rng.uniform(0.2, 2.0, num_rows)
    y = rng.poisson(0.35 * exposure)
    a, b = 2 + y.sum(), 4 + exposure.sum()
    optimum = Optimum(np.array([math.log(a / b) - 0.5 / a]), np.array([a**-0.5]))
    at = a / b
    log_evidence = (
        stats.poisson.logpmf(y, at * exposure).sum()
        + stats.gamma.logpdf(at, 2, scale=1 / 4)
        - stats.gamma.logpdf(at, a, scale=1 / b)
    )
    return Target(
        name="poisson_gamma",
        fields={"y": y, "exposure": exposure},
        model=lambda: dadvi.Model(
            prior={"rate": Gamma(torch.tensor(2.0), torch.tensor(4.0))},
            likelihood=lambda rate, exposure: Poisson(rate * exposure),
            observed="y",
        ),
        gaussian=False,
        posterior={"rate": Moments(np.array(a / b), np.array(a**0.5 / b))},
        log_evidence=float(log_evidence),
        optima={"mean_field": optimum, "full_rank": optimum},
        covariance=np.array([[1 / a]]),
    )


CONJUGATE: Mapping[str, Callable[..., Target]] = {
    make.__name__: make for make in (normal_normal, inverse_gamma_normal, linear_regression, poisson_gamma)
}
"""Every target by name; each takes num_rows and seed."""


def writer(
    factory: pytest.TempPathFactory, num_rows: int, **sizes: int
) -> Callable[..., tuple[Target, ShardedDataset]]:
    """Return a function that gives a conjugate target by its name, and its data on disk, written once.

    It has that many rows, in chunks and shards of these sizes, unless told otherwise: write(name, 500, chunk_rows=50).
    """

    @cache
    def write(name: str, num_rows: int = num_rows, **changes: int) -> tuple[Target, ShardedDataset]:
        target = CONJUGATE[name](num_rows=num_rows)
        path = factory.mktemp(name) / "d.zarr"
        return target, dadvi.write_shards(path, target.fields, **{**sizes, **changes})

    return write
