"""The problems of the benchmark: how their data are drawn, their models, what a fit is to reach, and exact references.

Each problem is a function (rng, num_rows) or (rng, num_rows, num_groups ...) that returns what was `Drawn`: fields and
model, the parameters that generated the data, and the `references.Target` that gives the optimum exactly. Rows are
independent and identically distributed, so they need no shuffle. Fields too large for memory are Dask arrays, drawn
block by block as they are written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeAlias

import dask
import dask.array
import numpy as np
import torch
from references import Locals, Rows, Target, by_quadrature, gauss_hermite
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Dirichlet,
    Gamma,
    HalfNormal,
    MixtureSameFamily,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
)
from torch.nn.functional import logsigmoid, softplus

import dadvi

Fields: TypeAlias = dict[str, Any]
"""Arrays by field name: NumPy's, or Dask's where they may not fit in memory."""

BLOCK_ROWS = 100_000
"""Rows that are drawn at once where the data may not fit in memory."""

PREDICTOR_NODES = 5
"""Gauss-Hermite nodes for a linear predictor: its sd is at most about 0.2 where there are no groups."""

NARROW_NODES = 3
"""The same where its sd is at most about 0.03."""

WIDE_NODES = 9
"""The same with group effects, whose sds come near that of the effects themselves."""

SCALAR_NODES = 2
"""For a coordinate that every row informs, with an sd of about 0.01; exact to the fourth power of that."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Data, their model, and what is known of its posterior."""

    fields: Fields
    model: dadvi.Model
    truth: Tensor  # the parameters that generated the data, unconstrained (D,)
    target: Target


@dataclass(frozen=True)
class Reach:
    """What a fit is to reach."""

    passes: float  # at most, everything counted
    mean: float = 0.1  # RMS error in posterior sds, of every part
    sd: float | None = None  # largest relative error of an sd against the family's optimum
    linear_response: bool = False  # whether the sds of a mean-field fit's linear response are to be as good


@dataclass(frozen=True)
class Problem:
    """A row of the table for each number of rows."""

    draw: Callable[..., Drawn]  # (rng, num_rows, *groups)
    rows: tuple[int, ...]
    reach: Reach
    family: str = "mean_field"
    groups: tuple[int, ...] = ()
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Part of the coordinates whose error is told separately, to the latents that are in it; default: all in one."""


# Expectations under q of log prior and log-det, up to constants; they sum over the elements of a latent ---------------


def expected_normal(mean: Tensor, sd: Tensor, scale: float = 1.0) -> Tensor:
    """Return that of z ~ Normal(0, scale)."""
    return -0.5 * (mean.square() + sd.square()).sum() / scale**2


def expected_half_normal(mean: Tensor, sd: Tensor, scale: float = 1.0) -> Tensor:
    """Return that of exp(η) ~ HalfNormal(scale): E exp(2η) = exp(2 mean + 2 sd²)."""
    return (mean - 0.5 * (2 * mean + 2 * sd.square()).exp() / scale**2).sum()


def expected_gamma(mean: Tensor, sd: Tensor, shape: float, rate: float) -> Tensor:
    """Return that of exp(η) ~ Gamma(shape, rate): E exp(η) = exp(mean + sd²/2)."""
    return (shape * mean - rate * (mean + sd.square() / 2).exp()).sum()


def expected_effects(mean: Tensor, sd: Tensor, scale_mean: Tensor, scale_sd: Tensor) -> Tensor:
    """Return that of effects (J,) ~ Normal(0, exp λ), λ ~ N(scale_mean, scale_sd²): E exp(−2λ) is in closed form."""
    shrinkage = (-2 * scale_mean + 2 * scale_sd.square()).exp()
    return -len(mean) * scale_mean - 0.5 * shrinkage * (mean.square() + sd.square()).sum()


# Predictors and locals ------------------------------------------------------------------------------------------------


def mixing(rng: np.random.Generator, dim: int, condition: float) -> np.ndarray:
    """Return M (D, D) such that zM, z standard normal, has unit variances and about the condition number given."""
    rotate = [np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(2)]
    mix = rotate[0] * np.logspace(0, -np.log10(condition) / 2, dim) @ rotate[1]
    return (mix / np.linalg.norm(mix, axis=0)).astype(np.float32)


def predictors(rng: np.random.Generator, num_rows: int, mix: np.ndarray, *, intercept: bool = True) -> np.ndarray:
    """Return correlated predictors (N, D), float32, the first of them an intercept."""
    x = rng.standard_normal((num_rows, len(mix)), dtype=np.float32) @ mix
    if intercept:
        x[:, 0] = 1
    return x


def in_blocks(rng: np.random.Generator, draw: Callable[[np.random.Generator, int], Fields], num_rows: int) -> Fields:
    """Return fields as Dask arrays whose blocks of rows are drawn when they are asked for, each by its own stream."""
    seed = int(rng.integers(2**63))
    lengths = [min(BLOCK_ROWS, num_rows - start) for start in range(0, num_rows, BLOCK_ROWS)]

    @lru_cache(maxsize=1)  # the fields of a block are written one after the other
    def block(number: int) -> Fields:
        return draw(np.random.default_rng([seed, number]), lengths[number])

    example = draw(np.random.default_rng(0), 1)
    return {
        name: dask.array.concatenate(
            [
                dask.array.from_delayed(
                    dask.delayed(lambda number, name: block(number)[name], pure=False)(number, name),
                    shape=(length, *values.shape[1:]),
                    dtype=values.dtype,
                )
                for number, length in enumerate(lengths)
            ]
        )
        for name, values in example.items()
    }


def global_locals(num_locals: int, num_rows: int) -> Tensor:
    """Return the design (L, n, L) of coordinates that act on every row alike."""
    return torch.eye(num_locals, dtype=torch.float64)[:, None].expand(-1, num_rows, -1)


def predictor_locals(rows: Rows, num_scalars: int = 0) -> Locals:
    """Return the linear predictor of x, and locals of their own for scalars that come after its coefficients."""
    num_rows, dim = rows["x"].shape
    design = rows["x"].new_zeros(1 + num_scalars, num_rows, dim + num_scalars)
    design[0, :, :dim] = rows["x"]
    design[1:, :, dim:] = global_locals(num_scalars, num_rows)
    return Locals(design)


# Regressions ----------------------------------------------------------------------------------------------------------


def logistic(rng: np.random.Generator, num_rows: int, dim: int = 100) -> Drawn:
    """Logistic regression, D = 100, condition number about 1000."""
    mix, beta = mixing(rng, dim, 1000), (0.3 * rng.standard_normal(dim)).astype(np.float32)

    def draw(rng: np.random.Generator, num_rows: int) -> Fields:
        x = predictors(rng, num_rows, mix)
        return {"x": x, "y": bernoulli(rng, x @ beta)}

    prior = {"beta": Normal(torch.zeros(dim), 1.0)}
    return Drawn(
        in_blocks(rng, draw, num_rows),
        dadvi.Model(prior, lambda beta, x: Bernoulli(logits=x @ beta), "y"),
        torch.from_numpy(beta),
        Target(dim, 0, predictor_locals, partial(bernoulli_log_lik, num_nodes=PREDICTOR_NODES), expected_normal),
    )


def bernoulli(rng: np.random.Generator, logits: np.ndarray) -> np.ndarray:
    """Return labels (N,)."""
    return rng.random(len(logits), dtype=np.float32) < 1 / (1 + np.exp(-logits))


def bernoulli_log_lik(means: Tensor, sds: Tensor, rows: Rows, num_nodes: int) -> Tensor:
    """Return E_q ℓ_i (n,) where the first local is the logit: y m − E softplus, by quadrature."""
    nodes, weights = gauss_hermite(num_nodes)
    return rows["y"] * means[0] - softplus(means[0][:, None] + sds[0][:, None] * nodes) @ weights


def counts(rng: np.random.Generator, num_rows: int, dim: int) -> tuple[Fields, np.ndarray, np.ndarray]:
    """Return predictors and offsets, log means (N,), and their coefficients (D,)."""
    x = predictors(rng, num_rows, mixing(rng, dim, 100))
    offset = rng.random(num_rows, dtype=np.float32)
    beta = (0.1 * rng.standard_normal(dim)).astype(np.float32)
    beta[0] -= 0.5
    return {"x": x, "offset": offset}, x @ beta + offset, beta


def poisson(rng: np.random.Generator, num_rows: int, dim: int = 50) -> Drawn:
    """Poisson regression with offsets; E exp(m + sξ) = exp(m + s²/2)."""
    fields, log_mean, beta = counts(rng, num_rows, dim)

    def log_lik(means: Tensor, sds: Tensor, rows: Rows) -> Tensor:
        return rows["y"] * means[0] - (means[0] + rows["offset"] + sds[0].square() / 2).exp()

    prior = {"beta": Normal(torch.zeros(dim), 1.0)}
    return Drawn(
        {**fields, "y": rng.poisson(np.exp(log_mean))},
        dadvi.Model(prior, lambda beta, x, offset: Poisson((x @ beta + offset).exp()), "y"),
        torch.from_numpy(beta),
        Target(dim, 0, predictor_locals, log_lik, expected_normal),
    )


def negative_binomial(rng: np.random.Generator, num_rows: int, dim: int = 50) -> Drawn:
    """Negative-binomial regression with offsets and unknown size."""
    fields, log_mean, beta = counts(rng, num_rows, dim)
    size = 2.0

    def likelihood(beta, size, x, offset):
        return NegativeBinomial(size, logits=x @ beta + offset - size.log())

    def of_both(at: Tensor, rows: Rows) -> Tensor:
        logits = at[0] + rows["offset"] - at[1]
        return rows["y"] * logits - (rows["y"] + at[1].exp()) * softplus(logits)

    def of_size(at: Tensor, rows: Rows) -> Tensor:
        return torch.lgamma(rows["y"] + at[0].exp())

    both = by_quadrature(of_both, (NARROW_NODES, SCALAR_NODES))
    alone = by_quadrature(of_size, (SCALAR_NODES,))  # apart, since its derivatives are slow
    every = by_quadrature(lambda at, _: -torch.lgamma(at[0].exp()), (SCALAR_NODES,))

    def log_lik(means: Tensor, sds: Tensor, rows: Rows) -> Tensor:
        return both(means, sds, rows) + alone(means[1:], sds[1:], rows)

    def log_prior(mean: Tensor, sd: Tensor) -> Tensor:
        coefficients = expected_normal(mean[:dim], sd[:dim])
        size = expected_half_normal(mean[dim:], sd[dim:], 5.0)
        return coefficients + size + num_rows * every(mean[dim:, None], sd[dim:, None], {}).sum()

    prior = {"beta": Normal(torch.zeros(dim), 1.0), "size": HalfNormal(5.0)}
    return Drawn(
        {**fields, "y": rng.poisson(rng.gamma(size, np.exp(log_mean) / size))},
        dadvi.Model(prior, likelihood, "y"),
        torch.from_numpy(np.append(beta, np.log(size))),
        Target(dim + 1, 0, partial(predictor_locals, num_scalars=1), log_lik, log_prior),
    )


def student(rng: np.random.Generator, num_rows: int, dim: int = 50) -> Drawn:
    """Student-t regression with unknown degrees of freedom and scale."""
    x = predictors(rng, num_rows, mixing(rng, dim, 100))
    beta = (0.3 * rng.standard_normal(dim)).astype(np.float32)
    scale, df = 0.5, 4.0
    noise = scale * rng.standard_t(df, num_rows)

    def log_lik(at: Tensor, rows: Rows) -> Tensor:
        residual, df = (rows["y"] - at[0]) * (-at[1]).exp(), at[2].exp()
        return -at[1] - (df + 1) / 2 * torch.log1p(residual.square() / df)

    def normaliser(at: Tensor, _: Rows) -> Tensor:
        half = at[0].exp() / 2
        return torch.lgamma(half + 0.5) - torch.lgamma(half) - at[0] / 2

    every = by_quadrature(normaliser, (SCALAR_NODES,))

    def log_prior(mean: Tensor, sd: Tensor) -> Tensor:
        coefficients = expected_normal(mean[:dim], sd[:dim])
        scale = expected_half_normal(mean[dim], sd[dim], 2.0)
        df = expected_gamma(mean[dim + 1], sd[dim + 1], 2.0, 0.1)
        return coefficients + scale + df + num_rows * every(mean[dim + 1 :, None], sd[dim + 1 :, None], {}).sum()

    prior = {"beta": Normal(torch.zeros(dim), 1.0), "scale": HalfNormal(2.0), "df": Gamma(2.0, 0.1)}
    return Drawn(
        {"x": x, "y": (x @ beta + noise).astype(np.float32)},
        dadvi.Model(prior, lambda beta, scale, df, x: StudentT(df, x @ beta, scale), "y"),
        torch.from_numpy(np.append(beta, np.log([scale, df]))),
        Target(
            dim + 2,
            0,
            partial(predictor_locals, num_scalars=2),
            by_quadrature(log_lik, (NARROW_NODES, SCALAR_NODES, SCALAR_NODES)),
            log_prior,
        ),
    )


# A mixture ------------------------------------------------------------------------------------------------------------


def mixture(rng: np.random.Generator, num_rows: int) -> Drawn:
    """Two-component Gaussian mixture with ordered means.

    η = (logit share, mean₁, log(mean₂ − mean₁), log sd₁, log sd₂): five locals, the same for every row.
    """
    share, mean, sd = 0.3, (-1.0, 2.0), (0.5, 1.0)
    first = rng.random(num_rows) < share
    y = np.where(first, rng.normal(mean[0], sd[0], num_rows), rng.normal(mean[1], sd[1], num_rows))

    def log_lik(at: Tensor, rows: Rows) -> Tensor:
        logit, low, gap, first, second = at
        parts = [
            log_share - log_sd - 0.5 * ((rows["y"] - mean) * (-log_sd).exp()).square()
            for log_share, mean, log_sd in (
                (logsigmoid(logit), low, first),
                (logsigmoid(-logit), low + gap.exp(), second),
            )
        ]
        return torch.logaddexp(*parts)

    def log_prior(mean: Tensor, sd: Tensor) -> Tensor:
        nodes, weights = gauss_hermite(9)
        logits = mean[0] + sd[0] * nodes
        shares = (logsigmoid(logits) + logsigmoid(-logits)) @ weights  # the log-det of a simplex with a flat prior
        gap = (mean[2] + sd[2].square() / 2).exp()
        square = (2 * mean[2] + 2 * sd[2].square()).exp()
        second_moment = mean[1].square() + sd[1].square() + 2 * mean[1] * gap + square
        means = mean[2] - 0.5 * (mean[1].square() + second_moment) / 25
        return shares + means + expected_half_normal(mean[3:], sd[3:], 3.0)

    prior = {
        "share": Dirichlet(torch.ones(2)),
        "mean": dadvi.Constrained(Normal(torch.zeros(2), 5.0), dadvi.ordered),
        "sd": HalfNormal(torch.full((2,), 3.0)),
    }
    truth = [np.log(share / (1 - share)), mean[0], np.log(mean[1] - mean[0]), *np.log(sd)]
    return Drawn(
        {"y": y.astype(np.float32)},
        dadvi.Model(prior, lambda share, mean, sd: MixtureSameFamily(Categorical(share), Normal(mean, sd)), "y"),
        torch.tensor(truth),
        Target(
            5,
            0,
            lambda rows: Locals(global_locals(5, len(rows["y"]))),
            by_quadrature(log_lik, (SCALAR_NODES,) * 5),
            log_prior,
        ),
    )


# Groups ---------------------------------------------------------------------------------------------------------------


def unequal(rng: np.random.Generator, num_rows: int, num_groups: int) -> np.ndarray:
    """Return each row's group (N,): group r with probability in proportion to r^−0.8, r from 1 on."""
    cumulative = np.cumsum(np.arange(1, num_groups + 1) ** -0.8)
    group = np.searchsorted(cumulative, cumulative[-1] * rng.random(num_rows), side="right")
    return np.minimum(group, num_groups - 1).astype(np.int32)


def centred(rng: np.random.Generator, num_rows: int, num_groups: int, dim: int = 20) -> Drawn:
    """Logistic regression with an effect for each group, u ~ Normal(0, τ).

    η = (intercept, slopes, log τ; u): one local, the logit.
    """
    fields, slopes, tau, effect = grouped(rng, num_rows, num_groups, dim)
    prior = {
        "intercept": Normal(0.0, 1.0),
        "slope": Normal(torch.zeros(dim), 1.0),
        "tau": HalfNormal(1.0),
        "effect": lambda tau: Normal(torch.zeros(num_groups), tau),
    }

    def likelihood(intercept, slope, effect, x, group):
        return Bernoulli(logits=intercept + x @ slope + effect[group])

    def locals_of(rows: Rows) -> Locals:
        return Locals(with_intercept(rows["x"], after=1)[None], rows["group"])

    def log_prior(mean: Tensor, sd: Tensor) -> Tensor:
        a, b = 1 + dim, 2 + dim
        coefficients = expected_normal(mean[:a], sd[:a])
        return coefficients + expected_half_normal(mean[a], sd[a]) + expected_effects(mean[b:], sd[b:], mean[a], sd[a])

    return Drawn(
        fields,
        dadvi.Model(prior, likelihood, "y"),
        torch.from_numpy(np.concatenate([slopes, [np.log(tau)], effect])),
        Target(2 + dim, num_groups, locals_of, partial(bernoulli_log_lik, num_nodes=WIDE_NODES), log_prior),
    )


def non_centred(rng: np.random.Generator, num_rows: int, num_groups: int, dim: int = 20) -> Drawn:
    """Return the same as `centred`, with effects τz, z ~ Normal(0, 1).

    η = (intercept, slopes, log τ; z): three locals, z, the predictor without effect, and log τ.
    """
    fields, slopes, tau, effect = grouped(rng, num_rows, num_groups, dim)
    prior = {
        "intercept": Normal(0.0, 1.0),
        "slope": Normal(torch.zeros(dim), 1.0),
        "tau": HalfNormal(1.0),
        "z": Normal(torch.zeros(num_groups), 1.0),
    }

    def likelihood(intercept, slope, tau, z, x, group):
        return Bernoulli(logits=intercept + x @ slope + tau * z[group])

    def locals_of(rows: Rows) -> Locals:
        design = rows["x"].new_zeros(3, len(rows["x"]), 2 + dim)
        design[1] = with_intercept(rows["x"], after=1)
        design[2, :, 1 + dim] = 1
        return Locals(design, rows["group"])

    nodes, weights = gauss_hermite(5)

    def log_lik(means: Tensor, sds: Tensor, rows: Rows) -> Tensor:
        """Given log τ the logit is Gaussian: five of its values, and the rule for a logit within each."""
        tau = (means[2] + sds[2] * nodes[:, None]).exp()  # (5, n)
        mean = means[1] + tau * means[0]
        sd = (sds[1].square() + tau.square() * sds[0].square()).sqrt()
        given = bernoulli_log_lik(mean.reshape(1, -1), sd.reshape(1, -1), {"y": rows["y"].repeat(5)}, WIDE_NODES)
        return weights @ given.reshape(5, -1)

    def log_prior(mean: Tensor, sd: Tensor) -> Tensor:
        a, b = 1 + dim, 2 + dim
        normals = expected_normal(mean[:a], sd[:a]) + expected_normal(mean[b:], sd[b:])
        return normals + expected_half_normal(mean[a], sd[a])

    return Drawn(
        fields,
        dadvi.Model(prior, likelihood, "y"),
        torch.from_numpy(np.concatenate([slopes, [np.log(tau)], effect / tau])),
        Target(2 + dim, num_groups, locals_of, log_lik, log_prior),
    )


def grouped(
    rng: np.random.Generator, num_rows: int, num_groups: int, dim: int
) -> tuple[Fields, np.ndarray, float, np.ndarray]:
    """Return fields, intercept and slopes (1 + dim,), τ, and the effects (J,)."""
    slopes, tau = np.append(-0.5, 0.3 * rng.standard_normal(dim)), 0.7
    effect = tau * rng.standard_normal(num_groups)
    x = predictors(rng, num_rows, mixing(rng, dim, 100), intercept=False)
    group = unequal(rng, num_rows, num_groups)
    logits = slopes[0] + x @ slopes[1:].astype(np.float32) + effect[group]
    return {"x": x, "group": group, "y": bernoulli(rng, logits)}, slopes, tau, effect


def with_intercept(x: Tensor, after: int) -> Tensor:
    """Return x (n, dim) with a column of ones before it and `after` columns of zeros behind it."""
    return torch.cat([torch.ones_like(x[:, :1]), x, x.new_zeros(len(x), after)], 1)


def crossed(rng: np.random.Generator, num_rows: int, many: int, few: int, dim: int = 5) -> Drawn:
    """Logistic regression with the effects of two crossed groupings, u ~ Normal(0, τ₁) and v ~ Normal(0, τ₂).

    η = (intercept, slopes, log τ₁, log τ₂, v; u): the fewer effects are among the dense coordinates.
    """
    slopes, taus = np.append(-0.5, 0.3 * rng.standard_normal(dim)), (0.7, 0.4)
    effects = [tau * rng.standard_normal(size) for tau, size in zip(taus, (many, few), strict=True)]
    x = predictors(rng, num_rows, mixing(rng, dim, 10), intercept=False)
    u, v = unequal(rng, num_rows, many), unequal(rng, num_rows, few)
    logits = slopes[0] + x @ slopes[1:].astype(np.float32) + effects[0][u] + effects[1][v]
    prior = {
        "intercept": Normal(0.0, 1.0),
        "slope": Normal(torch.zeros(dim), 1.0),
        "tau_many": HalfNormal(1.0),
        "tau_few": HalfNormal(1.0),
        "few": lambda tau_few: Normal(torch.zeros(few), tau_few),
        "many": lambda tau_many: Normal(torch.zeros(many), tau_many),
    }
    a, b = 1 + dim, 3 + dim

    def likelihood(intercept, slope, many, few, x, u, v):
        return Bernoulli(logits=intercept + x @ slope + many[u] + few[v])

    def locals_of(rows: Rows) -> Locals:
        design = with_intercept(rows["x"], after=2 + few)
        design[torch.arange(len(design)), b + rows["v"]] = 1
        return Locals(design[None], rows["u"])

    def log_prior(mean: Tensor, sd: Tensor) -> Tensor:
        scales = expected_half_normal(mean[a:b], sd[a:b])
        first = expected_effects(mean[b + few :], sd[b + few :], mean[a], sd[a])
        second = expected_effects(mean[b : b + few], sd[b : b + few], mean[a + 1], sd[a + 1])
        return expected_normal(mean[:a], sd[:a]) + scales + first + second

    return Drawn(
        {"x": x, "u": u, "v": v, "y": bernoulli(rng, logits)},
        dadvi.Model(prior, likelihood, "y"),
        torch.from_numpy(np.concatenate([slopes, np.log(taus), effects[1], effects[0]])),
        Target(b + few, many, locals_of, partial(bernoulli_log_lik, num_nodes=WIDE_NODES), log_prior),
    )


# The table ------------------------------------------------------------------------------------------------------------

CENTRED = {"slopes": ("intercept", "slope"), "effects": ("effect",), "scale": ("tau",)}
NON_CENTRED = {**CENTRED, "effects": ("z",)}
CROSSED = {"slopes": ("intercept", "slope"), "effects": ("many", "few"), "scales": ("tau_many", "tau_few")}

PROBLEMS: dict[str, Problem] = {
    "logistic": Problem(logistic, (200_000, 2_000_000, 20_000_000), Reach(3.2, sd=0.03)),
    "logistic_full_rank": Problem(
        logistic, (200_000, 2_000_000), Reach(3.2, sd=0.03, linear_response=True), family="full_rank"
    ),
    "poisson": Problem(poisson, (1_000_000,), Reach(3.2)),
    "negative_binomial": Problem(negative_binomial, (1_000_000,), Reach(3.2)),
    "student": Problem(student, (1_000_000,), Reach(3.2)),
    "mixture": Problem(mixture, (1_000_000,), Reach(4.2)),
    "centred": Problem(centred, (2_000_000,), Reach(8), groups=(2_000,), parts=CENTRED),
    "centred_many": Problem(centred, (2_000_000,), Reach(8), groups=(100_000,), parts=CENTRED),
    "non_centred": Problem(non_centred, (2_000_000,), Reach(8), groups=(2_000,), parts=NON_CENTRED),
    "non_centred_many": Problem(non_centred, (2_000_000,), Reach(8), groups=(100_000,), parts=NON_CENTRED),
    "crossed": Problem(crossed, (1_000_000,), Reach(12), groups=(1_000, 200), parts=CROSSED),
}
