"""The anchored solver: at the ELBO's optimum in a few passes, certified honestly, and never worse for a bad step."""

import importlib
import json
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import targets
import torch
from hierarchies import crossed, many_groups
from torch.distributions import Bernoulli, HalfNormal, Normal

import dadvi
from dadvi import anchored, probing, starting
from dadvi.binding import bind_to
from dadvi.checkpoint import NoJournal
from dadvi.errors import InputError, ShuffleWarning
from dadvi.executors import SerialExecutor
from dadvi.families import Gaussian, MeanField
from dadvi.local import Surrogate, distance
from dadvi.quadrature import Rule
from dadvi.sharding import sampling
from dadvi.starting import fixed_draws
from dadvi.subsample import Subsample

fit_module = importlib.import_module("dadvi.fit")  # dadvi.fit is the function

TOL = 0.02
TOLS = {"subsample": 0.05, "data": TOL}
"""What is asked for where the curvature comes from there: the subsample tells sds to 0.02."""

ROWS, SEEN = 2_000, 800
S_NOISE = 4 * 0.5 * math.sqrt(2 / SEEN * (1 - SEEN / ROWS))
"""Four standard errors of an sd, as a fraction, whose curvature is a sum over SEEN of ROWS rows."""

PRIOR_SD = 2.5


def errors(posterior, loc, sd, marginal):
    """Return the largest error of a mean, in marginal posterior sds, and of an sd, as a fraction."""
    q = posterior.unconstrained
    return np.abs((q.loc.numpy() - loc) / marginal).max(), np.abs(q.stddev.numpy() / sd - 1).max()


def bits(posterior):
    return {name: value.numpy().tobytes() for name, value in posterior.unconstrained.params.items()}


def round_elbos(posterior):
    trace = posterior.trace
    return trace.elbo[trace.phase == "round"].to_numpy()


def assert_elbo_never_falls(posterior, negligible=0.0):
    elbos = round_elbos(posterior)
    assert (np.diff(elbos) >= -negligible - anchored.ELBO_NOISE * np.abs(elbos[:-1])).all()


@pytest.fixture
def same_draws(monkeypatch):
    """Let certificates be of the ELBO at the draws, as if these were all of q."""
    without = lambda rule, values: values.new_zeros(1, values.shape[1])
    return lambda: monkeypatch.setattr(Rule, "errors", without)


@pytest.fixture
def visits(monkeypatch):
    """Record (phase, q, certificate, start of the run) of every round."""
    seen = []
    record = anchored._Rounds.record

    def spy(run, state, there, phase="round"):
        seen.append((phase, there.q, state.certificate, state.start))
        return record(run, state, there, phase)

    monkeypatch.setattr(anchored._Rounds, "record", spy)
    return seen


# Models ----------------------------------------------------------------------------------------------------------


def logistic_model(dim, prior_sd=PRIOR_SD):
    return dadvi.Model(
        prior={"beta": Normal(torch.zeros(dim), prior_sd)},
        likelihood=lambda beta, x: Bernoulli(logits=x @ beta),
        observed="y",
    )


def logistic_fields(num_rows, dim, correlation=0.7, seed=0):
    """Return predictors correlated like an autoregression, the first one an intercept, and labels."""
    rng = np.random.default_rng(seed)
    corr = correlation ** np.abs(np.subtract.outer(np.arange(dim), np.arange(dim)))
    x = rng.standard_normal((num_rows, dim)) @ np.linalg.cholesky(corr).T
    x[:, 0] = 1
    beta = rng.normal(0, 0.5, dim)
    return {"x": x, "y": rng.binomial(1, 1 / (1 + np.exp(-x @ beta)))}


def logistic_optimum(x, y, prior_sd=PRIOR_SD, widths=True):
    """Return mean, sds and precision at the mean-field ELBO's optimum, by Newton with exact expectations; in float64.

    x_i·η ~ N(x_i·μ, Σ_j x_ij² σ_j²) under q, so that every expectation is one Gauss–Hermite rule. With widths=False,
    σ = 0: Laplace's mode, and the sds that the curvature has there.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    unit = np.sqrt(np.square(x).mean(0))  # for the conditioning
    x, prior_sd = x / unit, prior_sd * unit
    mean, sd = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for _ in range(200):
        spread = np.sqrt(np.square(x) @ np.square(sd)) if widths else np.zeros(len(x))
        p = 1 / (1 + np.exp(-((x @ mean)[:, None] + spread[:, None] * nodes)))
        grad = x.T @ (y - p @ weights) - mean / prior_sd**2
        precision = (x.T * ((p * (1 - p)) @ weights)) @ x + np.diag(np.broadcast_to(prior_sd**-2.0, mean.shape))
        step, new_sd = np.linalg.solve(precision, grad), np.diag(precision) ** -0.5
        moved = max(np.abs(step / new_sd).max(), np.abs(sd / new_sd - 1).max())
        # Halfway: wide posteriors, whose means and sds depend on one another, would swing to and fro.
        mean, sd = mean + step / 2, np.sqrt(sd * new_sd) if sd.any() else new_sd
        if moved < 1e-9:
            break
    else:
        raise AssertionError("the reference has not converged")
    return mean / unit, sd / unit, np.sqrt(np.diag(np.linalg.inv(precision))) / unit


# Conjugate targets -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a target and its data: 2 000 rows in 20 chunks, of which S is to have 8."""
    cache = {}

    def write(name):
        if name not in cache:
            target = targets.CONJUGATE[name](num_rows=ROWS)
            path = tmp_path_factory.mktemp(name) / "d.zarr"
            cache[name] = target, dadvi.write_shards(path, target.fields, chunk_rows=100, shard_rows=500)
        return cache[name]

    return write


@pytest.mark.parametrize("curvature", ["subsample", "data"])
@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, family) for name in targets.CONJUGATE for family in ("mean_field", "full_rank")),
        ("linear_regression", dadvi.LowRank(rank=4)),
    ],
    ids=str,
)
def test_ends_at_the_exact_optimum(written, name, family, curvature):
    target, data = written(name)
    kind = family if isinstance(family, str) else family.name
    method = dadvi.Anchored(subsample_rows=SEEN, curvature=curvature)
    posterior = dadvi.fit(target.model(), data, method=method, family=family, client="serial", tol=TOLS[curvature])
    mean_error, sd_error = errors(posterior, *target.optimum(kind), target.optimum("full_rank").sd)
    assert posterior.status == "converged", posterior.reason
    assert mean_error < TOLS[curvature]
    assert sd_error < TOL + (S_NOISE if curvature == "subsample" and name != "normal_normal" else 0)
    assert posterior.certificate.max <= TOLS[curvature]
    assert_elbo_never_falls(posterior)


def test_a_subsample_tells_sds_no_better_than_its_rows_do(written):
    target, data = written("linear_regression")
    sds = target.optimum("full_rank").sd
    fit = lambda curvature: dadvi.fit(
        target.model(), data, method=dadvi.Anchored(subsample_rows=SEEN, curvature=curvature), client="serial", tol=TOL
    )
    posterior = fit("subsample")
    assert posterior.status == "stopped"
    assert re.search(r"800 rows tell sds to 0\.0\d+ .* tol=0\.02; .*curvature='auto'", posterior.reason)
    mean_error, sd_error = errors(posterior, *target.optimum("mean_field"), sds)
    assert mean_error < TOL
    assert posterior.certificate.max <= TOL
    assert TOL < posterior.certificate.sd_error < S_NOISE
    assert sd_error < 2 * posterior.certificate.sd_error
    posterior = fit("auto")
    assert posterior.status == "converged"
    mean_error, sd_error = errors(posterior, *target.optimum("mean_field"), sds)
    assert max(mean_error, sd_error) < TOL


@pytest.mark.parametrize("family", ["mean_field", "full_rank", "low_rank"])
@pytest.mark.parametrize("name", targets.CONJUGATE)
def test_is_what_auto_chooses(written, name, family):
    # S is all the data: one round certifies.
    target, data = written(name)
    posterior = dadvi.fit(target.model(), data, family=family, client="serial", tol=TOL)
    mean_error, sd_error = errors(posterior, *target.optimum(family), target.optimum("full_rank").sd)
    assert posterior.settings["method"] == {"name": "Anchored", **dadvi.Anchored().describe()}
    assert posterior.status == "converged", posterior.reason
    assert mean_error < TOL
    assert sd_error < TOL
    assert posterior.passes <= 3


def test_full_rank_finds_the_covariance(written):
    target, data = written("linear_regression")
    posterior = dadvi.fit(target.model(), data, family="full_rank", client="serial", tol=TOL)
    scale = np.outer(target.optimum("full_rank").sd, target.optimum("full_rank").sd)
    found = posterior.unconstrained.covariance_matrix.numpy() / scale
    np.testing.assert_allclose(found, target.covariance / scale, atol=2 * TOL)


# Small data ------------------------------------------------------------------------------------------------------


def test_five_counts_end_at_the_elbo_optimum_not_at_laplaces(write):
    target = targets.poisson_gamma(num_rows=5, seed=1)
    loc, sd = target.optimum("mean_field")
    posterior = dadvi.fit(target.model(), write(target.fields), client="serial", tol=0.1)
    mean_error, sd_error = errors(posterior, loc, sd, sd)
    laplace = loc + sd**2 / 2  # the mode of log λ: log(a/b)
    assert posterior.status == "converged"
    assert posterior.passes == 2  # S, and one round
    assert np.abs((laplace - loc) / sd).max() > 0.25
    assert mean_error < 0.1
    assert sd_error < 0.1


def test_five_counts_end_within_a_small_tolerance(write):
    target = targets.poisson_gamma(num_rows=5, seed=1)
    posterior = dadvi.fit(target.model(), write(target.fields), client="serial", tol=TOL)
    loc, sd = target.optimum("mean_field")
    assert posterior.status == "converged", posterior.reason
    assert max(errors(posterior, loc, sd, sd)) < 2 * TOL


@pytest.mark.parametrize(("num_draws", "close"), [(4, 0.1), (24, 0.05)])
def test_small_logistic_regression_differs_from_laplace(write, num_draws, close):
    fields = logistic_fields(46, 3, seed=3)
    method = dadvi.Anchored(num_draws=num_draws)
    posterior = dadvi.fit(logistic_model(3), write(fields), method=method, client="serial", tol=TOL)
    loc, sd, marginal = logistic_optimum(**fields)
    laplace, _laplace_sd, _ = logistic_optimum(**fields, widths=False)
    mean_error, sd_error = errors(posterior, loc, sd, marginal)
    assert np.abs((laplace - loc) / marginal).max() > 0.2
    assert mean_error < close
    assert sd_error < close / 2
    if num_draws == 4:  # two directions, which tell that they tell too little
        assert posterior.status == "stopped"
        assert TOL < mean_error / 2 < posterior.certificate.max < 2 * mean_error
        assert posterior.certificate.floor == pytest.approx(posterior.certificate.max, rel=0.1)
        assert re.search(r"4 draws .* leave 0\.\d+ sds .* more than tol=0\.02; .*num_draws=\d+", posterior.reason)
    else:
        assert posterior.status == "converged"


def test_draws_that_a_small_subsample_affords_are_too_many_for_all_the_data(write, visits):
    data = write(logistic_fields(4_000, 3), chunk_rows=100)
    method = dadvi.Anchored(subsample_rows=200, curvature="data")
    dadvi.fit(logistic_model(3), data, method=method, client="serial", max_passes=1)
    assert len(visits[-1][3].noise.likelihood.nodes) <= method.points_at_most + 1


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("prior_sd", "num_draws"), [(3.0, None), (10.0, None), (10.0, 1024)])
def test_a_wide_posterior_is_as_near_as_its_certificate_says(write, prior_sd, num_draws, seed):
    """With all draws at one distance from 0, sds would be 5 and 20 % too small, and the certificate would not tell."""
    fields = {"x": np.array([[1.0, 0.5], [-0.3, 1.2], [0.8, -1.0]]), "y": np.array([True, False, True])}
    model, method = logistic_model(2, prior_sd), dadvi.Anchored(num_draws=num_draws)
    posterior = dadvi.fit(model, write(fields), method=method, client="serial", tol=0.1, seed=seed)
    assert posterior.status == "converged"
    mean_error, sd_error = errors(posterior, *logistic_optimum(**fields, prior_sd=prior_sd))
    assert mean_error < 2 * posterior.certificate.max
    assert sd_error < (0.015 if num_draws or prior_sd < 5 else 0.04)


# Larger data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [4_000, None])
def test_correlated_logistic_regression_in_three_passes(write, visits, rows):
    fields = logistic_fields(40_000, 12)
    data = write(fields, chunk_rows=500, shard_rows=4_000)
    loc, sd, marginal = logistic_optimum(**fields)
    posterior = dadvi.fit(
        logistic_model(12), data, method=dadvi.Anchored(subsample_rows=rows), client="serial", tol=0.1
    )
    assert posterior.status == "converged"
    assert posterior.passes <= 3.2
    mean_error, sd_error = errors(posterior, loc, sd, marginal)
    truths = [np.abs((q.loc.numpy() - loc) / marginal).max() for _, q, _, _ in visits]
    assert mean_error < 0.1
    assert sd_error < 0.1
    assert posterior.trace.certificate.tolist() == [certificate.max for _, _, certificate, _ in visits]
    assert truths[0] > 0.1  # the subsample alone would not do
    for (_, _, certificate, _), truth in zip(visits, truths, strict=True):
        if 0.01 < certificate.max < 1:
            assert 0.5 < certificate.max / truth < 2


def test_of_large_chunks_no_more_rows_than_asked_for_are_computed_with(write, visits, monkeypatch):
    fields = logistic_fields(160_000, 2)
    data = write(fields, chunk_rows=10_000, shard_rows=40_000)
    sizes = []
    run = Subsample.run
    monkeypatch.setattr(Subsample, "run", lambda self, work: (sizes.append(self.num_rows), run(self, work))[1])
    posterior = dadvi.fit(logistic_model(2), data, client="serial", tol=0.1)
    assert max(sizes) == 20_000
    assert posterior.passes == 0.5 + len(visits)  # S was read from 8 of 16 chunks
    mean_error, sd_error = errors(posterior, *logistic_optimum(**fields))
    assert posterior.status == "converged"
    assert mean_error < 0.1
    assert sd_error < 0.03
    assert_elbo_never_falls(posterior)


def test_a_visit_asks_the_subsample_nothing_that_the_search_asked_before(write, visits, monkeypatch):
    fields = logistic_fields(160_000, 2)
    data = write(fields, chunk_rows=500, shard_rows=40_000)
    asked = []
    log_lik = Surrogate.log_lik
    monkeypatch.setattr(Surrogate, "log_lik", lambda self, eta: (asked.append(eta), log_lik(self, eta))[1])
    posterior = dadvi.fit(logistic_model(2), data, client="serial", tol=0.01)
    assert len(visits) >= 3
    assert len({tuple(eta.flatten().tolist()) for eta in asked}) == len(asked)
    assert len(asked[-1]) == len(visits[-1][3].noise.likelihood.nodes)
    assert errors(posterior, *logistic_optimum(**fields))[0] < 0.01


@pytest.mark.parametrize("shorter", [4, 16])
def test_a_search_moves_also_where_the_radius_is_short(write, shorter):
    """As after a rejected step. A search that need not get near would not set out for what lies within the radius."""
    data = write(logistic_fields(20_000, 10), chunk_rows=50, shard_rows=5_000)
    executor = SerialExecutor(bind_to(logistic_model(10), data), data)
    settings = dadvi.Anchored(subsample_rows=100, curvature="subsample")
    run = anchored._Rounds(settings, executor, MeanField(), 0.05, 30, 0, lambda row: None, NoJournal())
    state = run.begin()
    moved = lambda aim: distance(state.here.q, aim.q, state.start.unit)
    radius = moved(run.aim(state)) / shorter
    assert 0.9 * radius < moved(run.aim(replace(state, radius=radius))) < 1.1 * radius


def test_more_effects_than_rows_of_the_subsample_take_two_passes(write):
    """With a prior so tight that any rows tell their curvature."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 1_200, 800)
    y = 2.0 + 0.05 * rng.standard_normal(1_200)[group] + rng.standard_normal(800)
    model = dadvi.Model(
        {"a": Normal(0.0, 1.0), "u": Normal(torch.zeros(1_200), 0.05)}, lambda a, u, g: Normal(a + u[g], 1.0), "y"
    )
    data = write({"g": group, "y": y}, chunk_rows=10, shard_rows=400)
    posterior = dadvi.fit(model, data, method=dadvi.Anchored(subsample_rows=20), client="serial", tol=0.3)
    assert posterior.status == "converged"
    assert set(posterior.trace.phase) == {"round"}
    assert posterior.passes < 3


def test_raw_collinear_predictors(write):
    # An intercept, a calendar year and a 0/1 column as they come: intercept and year are one direction, to 1e-3.
    rng = np.random.default_rng(0)
    num_rows = 8_000
    year, flag = rng.integers(1995, 2006, num_rows), rng.integers(0, 2, num_rows)
    x = np.stack([np.ones(num_rows), year, flag], axis=1).astype(np.float64)
    y = rng.binomial(1, 1 / (1 + np.exp(-(0.1 * (year - 2000) - 0.5 * flag))))
    data = write({"x": x, "y": y}, chunk_rows=200)
    prior_sd = np.array([300.0, 1.0, 2.0])
    posterior = dadvi.fit(
        logistic_model(3, torch.from_numpy(prior_sd)),
        data,
        method=dadvi.Anchored(subsample_rows=2_000),
        client="serial",
        family="full_rank",
    )
    mode, _, marginal = logistic_optimum(x, y, prior_sd, widths=False)
    mean_error, sd_error = errors(posterior, mode, marginal, marginal)
    assert posterior.status == "converged", posterior.reason
    assert mean_error < 0.1
    assert sd_error < 0.1


def hierarchical(num_rows=6_000, num_groups=40, seed=0):
    """Return fields and a centred model: group sizes fall from a quarter of the rows to 3."""
    rng = np.random.default_rng(seed)
    sizes = np.maximum(3, (num_rows / 4 * 0.75 ** np.arange(num_groups)).astype(int))
    group = rng.permutation(np.repeat(np.arange(num_groups), sizes))
    effect = rng.normal(0.5, 0.8, num_groups)
    x = rng.standard_normal(len(group))
    y = effect[group] + 0.7 * x + rng.standard_normal(len(group))
    model = dadvi.Model(
        prior={
            "mu": Normal(torch.tensor(0.0), 2.0),
            "tau": HalfNormal(torch.tensor(1.0)),
            "effect": lambda mu, tau: Normal(mu, tau).expand([num_groups]),
            "slope": Normal(torch.tensor(0.0), 2.0),
        },
        likelihood=lambda effect, slope, group, x: Normal(effect[group] + slope * x, 1.0),
        observed="y",
    )
    return model, {"group": group, "x": x, "y": y}, sizes


def test_groups_that_the_subsample_hardly_sees(write, visits):
    model, fields, sizes = hierarchical()
    assert (sizes == 3).sum() > 5
    data = write(fields, chunk_rows=100)
    method = dadvi.Anchored(subsample_rows=800)
    posterior = dadvi.fit(model, data, method=method, client="serial", tol=0.05)
    assert visits[0][3].scales is not None  # the curvature is that of all the data
    assert posterior.status == "converged", posterior.reason
    assert posterior.passes <= 8
    assert_elbo_never_falls(posterior)
    full = dadvi.Anchored(curvature="data", num_draws=8)
    reference = dadvi.fit(model, data, method=full, client="serial", tol=0.02, seed=1)
    assert reference.status == "converged"
    there = reference.unconstrained
    mean_error, sd_error = errors(posterior, there.loc.numpy(), there.stddev.numpy(), there.stddev.numpy())
    assert mean_error < 0.1
    assert sd_error < 0.1


def test_a_subsample_that_sees_every_latent_gives_the_curvature(write, visits):
    fields = logistic_fields(16_000, 3)
    data = write(fields, chunk_rows=100)
    for rows, source in ((8_000, "subsample"), (800, "data")):
        dadvi.fit(logistic_model(3), data, method=dadvi.Anchored(subsample_rows=rows), client="serial")
        assert (visits[-1][3].scales is not None) == (source == "data")


def test_a_prior_that_bends_is_averaged_over_q_from_the_first_visit_on(write):
    """The rows see the effects of few groups well, and the prior alone their scale: its curvature varies over q."""
    rng = np.random.default_rng(0)
    group = rng.integers(8, size=4_400)
    data = write({"g": group, "y": rng.standard_normal(8)[group] + 0.3 * rng.standard_normal(4_400)}, chunk_rows=100)
    prior = {"tau": HalfNormal(2.0), "u": lambda tau: Normal(torch.zeros(8), tau)}
    model = dadvi.Model(prior, lambda u, g: Normal(u[g], 0.3), "y")
    sds = [
        dadvi.fit(model, data, method=dadvi.Anchored(subsample_rows=rows), client="serial").unconstrained.stddev[0]
        for rows in (4_000, 4_400)
    ]
    assert float(sds[0]) == pytest.approx(float(sds[1]), rel=0.01)


# What goes wrong -------------------------------------------------------------------------------------------------


def test_the_first_step_is_no_longer_than_the_subsample_allows(write, visits, monkeypatch):
    asked = []

    def far_away(prior, local, q, seen, noise, tol, radius=math.inf, unit=None):
        found, there = solve(prior, local, q, seen, noise, tol, radius, unit)
        asked.append(radius)
        if math.isinf(radius):
            found = Gaussian(q.family, {**q.params, "loc": q.loc + 100 * unit})
        return found, there

    solve = anchored.solve
    monkeypatch.setattr(anchored, "solve", far_away)
    data = write(logistic_fields(8_000, 3), chunk_rows=100)
    posterior = dadvi.fit(logistic_model(3), data, method=dadvi.Anchored(subsample_rows=800), client="serial")
    assert asked[:2] == [math.inf, anchored.FARTHEST]
    assert posterior.status == "converged", posterior.reason
    (_, first, _, start), (_, second, _, _) = visits[:2]
    assert distance(first, second, start.unit) <= anchored.FARTHEST


@pytest.mark.filterwarnings("ignore::dadvi.errors.ShuffleWarning")
@pytest.mark.parametrize("curvature", ["auto", "subsample", "data"])
def test_a_misleading_subsample_still_converges(write, curvature):
    fields = logistic_fields(4_000, 3)
    manifest = write(fields, "first.zarr", chunk_rows=100).manifest
    chosen = sampling.subsample(manifest, sampling.chunks_for(manifest, 800), seed=0)
    ours = np.concatenate([np.arange(*manifest.rows(chunk)) for chunk in chosen.tolist()])
    ones = np.flatnonzero(fields["y"])[: len(ours)]
    order = np.empty(4_000, dtype=int)
    order[ours], order[np.setdiff1d(np.arange(4_000), ours)] = ones, np.setdiff1d(np.arange(4_000), ones)
    fields = {name: values[order] for name, values in fields.items()}
    assert fields["y"][ours].all()  # S knows one label
    data = write(fields, "second.zarr", chunk_rows=100)
    method = dadvi.Anchored(subsample_rows=800, curvature=curvature)
    posterior = dadvi.fit(logistic_model(3), data, method=method, client="serial")
    loc, sd, marginal = logistic_optimum(**fields)
    mean_error, sd_error = errors(posterior, loc, sd, marginal)
    assert posterior.status == "converged", posterior.reason
    assert mean_error < 0.1
    assert sd_error < 0.1
    assert_elbo_never_falls(posterior)


def test_ordered_data_are_reported(write):
    fields = logistic_fields(4_000, 3)
    order = np.argsort(fields["y"], kind="stable")
    data = write({name: values[order] for name, values in fields.items()}, chunk_rows=100)
    with pytest.warns(ShuffleWarning, match="shuffle"):
        dadvi.fit(logistic_model(3), data, method=dadvi.Anchored(subsample_rows=1_000), client="serial")


@pytest.mark.parametrize("curvature", ["auto", "data"])
@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
def test_a_flat_direction_is_never_converged(write, family, curvature):
    x = np.random.default_rng(0).normal(1.0, 1.0, 400)
    model = dadvi.Model(
        prior={"a": dadvi.Flat(), "b": dadvi.Flat()}, likelihood=lambda a, b: Normal(a + b, 1.0), observed="x"
    )
    data = write({"x": x}, chunk_rows=20)
    method = dadvi.Anchored(subsample_rows=160, curvature=curvature)
    posterior = dadvi.fit(model, data, family=family, method=method, client="serial")
    assert posterior.status != "converged"


@pytest.mark.parametrize("curvature", ["subsample", "data"])
def test_a_rejected_step_leaves_the_state_as_it_was(written, monkeypatch, visits, curvature):
    target, data = written("linear_regression")
    real, calls = anchored.solve, []

    def overshoot_once(prior, local, q, seen, noise, tol, radius=math.inf, unit=None):
        found = real(prior, local, q, seen, noise, tol, radius, unit)
        calls.append((q, local, radius, unit))
        if len(calls) > 1:
            return found
        far = Gaussian(q.family, {**q.params, "loc": q.loc + 5 * (found[0].loc - q.loc)})
        return far, noise.expectations(prior, local, far)

    monkeypatch.setattr(anchored, "solve", overshoot_once)
    method = dadvi.Anchored(subsample_rows=SEEN, curvature=curvature)
    posterior = dadvi.fit(target.model(), data, method=method, client="serial", tol=TOLS[curvature])
    trace = posterior.trace
    assert trace.phase.tolist()[:3] == ["round", "rejected", "round"]
    assert (trace.phase == "rejected").sum() == 1
    assert trace.elbo[1] < trace.elbo[0]
    assert math.isnan(trace.certificate[1])
    (first, second), sds = calls[:2], target.optimum("full_rank").sd
    assert torch.equal(second[0].loc, first[0].loc)
    assert torch.equal(second[0].stddev, first[0].stddev)
    there = torch.stack([first[0].loc, 0 * first[0].loc])
    assert torch.equal(second[1].log_lik(there)[0], first[1].log_lik(there)[0])
    assert first[2] == math.inf
    length = ((visits[1][1].loc - first[0].loc) / first[3]).abs().max()
    assert second[2] == pytest.approx(float(length) / 4)
    seen = SEEN / len(target.fields["y"])  # units are the sds given the subsample alone, by its own curvature
    assert first[3].numpy() == pytest.approx(sds / np.sqrt(seen), rel=0.4)
    assert posterior.status == "converged", posterior.reason
    assert_elbo_never_falls(posterior)
    mean_error, sd_error = errors(posterior, *target.optimum("mean_field"), sds)
    assert mean_error < TOLS[curvature]
    assert sd_error < TOL + (S_NOISE if curvature == "subsample" else 0)


def broken_model(where):
    """Return a model whose log-likelihood is nan on rows with bad = 1, if mu satisfies a condition."""
    return dadvi.Model(
        prior={"mu": Normal(torch.tensor(0.0), 10.0)},
        log_likelihood=lambda mu, x, bad: torch.where(
            (bad > 0) & where(mu), torch.full_like(x, torch.nan) * mu, -0.5 * (x - mu) ** 2
        ),
    )


def broken_fields(manifest_of):
    """Return 2 000 rows with one bad one, outside the subsample that seed 0 takes."""
    fields = {"x": np.random.default_rng(0).normal(0, 1, 2_000), "bad": np.zeros(2_000)}
    manifest = manifest_of(fields)
    outside = np.setdiff1d(np.arange(1, 39), sampling.subsample(manifest, sampling.chunks_for(manifest, SEEN), seed=0))
    fields["bad"][manifest.rows(int(outside[0]))[0]] = 1
    return fields


@pytest.mark.parametrize("curvature", ["subsample", "data"])
def test_nan_of_one_row_at_the_first_anchor_is_diverged(write, curvature):
    # As below, but with gradients that are finite on all the other rows.
    fields = broken_fields(lambda fields: write(fields, "first.zarr", chunk_rows=50).manifest)
    data = write(fields, "second.zarr", chunk_rows=50)
    model = dadvi.Model(
        prior={"mu": Normal(torch.tensor(0.0), 10.0)},
        log_likelihood=lambda mu, x, bad: -0.5 * (x - mu) ** 2 + torch.where(bad > 0, torch.nan, 0.0) * mu,
    )
    method = dadvi.Anchored(subsample_rows=SEEN, curvature=curvature)
    posterior = dadvi.fit(model, data, method=method, client="serial")
    assert posterior.status == "diverged"
    assert "first anchor" in posterior.reason
    assert posterior.certificate is None


@pytest.mark.parametrize("curvature", ["subsample", "data"])
def test_nan_at_the_first_anchor_is_diverged(write, curvature):
    fields = broken_fields(lambda fields: write(fields, "first.zarr", chunk_rows=50).manifest)
    data = write(fields, "second.zarr", chunk_rows=50)
    model = broken_model(lambda mu: torch.ones_like(mu, dtype=torch.bool))
    method = dadvi.Anchored(subsample_rows=SEEN, curvature=curvature)
    posterior = dadvi.fit(model, data, method=method, client="serial")
    assert posterior.status == "diverged"
    assert "first anchor" in posterior.reason
    assert posterior.certificate is None


def test_max_passes_stops(written):
    target, data = written("linear_regression")
    method = dadvi.Anchored(subsample_rows=SEEN, curvature="subsample")
    run = partial(dadvi.fit, target.model(), data, method=method, client="serial", tol=1e-12)
    for max_passes, rounds in [(0.5, 1), (2.3, 1), (2.5, 2)]:
        posterior = run(max_passes=max_passes)
        assert posterior.status == "stopped"
        assert f"max_passes={max_passes:g}" in posterior.reason
        assert len(posterior.trace) == rounds
        assert posterior.passes == pytest.approx(rounds + SEEN / ROWS)
        assert posterior.certificate is not None


@pytest.fixture
def limit(monkeypatch):
    """Return a function that sets the limit on coordinates that curve together."""

    def set_limit(value):
        for module in (anchored, fit_module, probing):
            monkeypatch.setattr(module, "DENSE_LIMIT", value)

    return set_limit


@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
def test_beyond_the_dense_limit_auto_chooses_advi(written, limit, family):
    target, data = written("linear_regression")
    limit(4)
    with pytest.raises(
        InputError, match=r"5 coordinates, too many for a curvature.*limit is 4.*ADVI\(control_variate="
    ):
        dadvi.fit(target.model(), data, method=dadvi.Anchored(), client="serial", family=family)
    posterior = dadvi.fit(target.model(), data, client="serial", max_passes=1, family=family)
    assert posterior.settings["method"]["name"] == "ADVI"
    assert posterior.settings["method"]["control_variate"] == "anchor"
    assert posterior.certificate is None or family == "full_rank"


# Groups beyond the limit -------------------------------------------------------------------------------------------


GROUPED = {"centred": lambda: many_groups(True), "non-centred": lambda: many_groups(False), "crossed": crossed}


@pytest.mark.parametrize("name", GROUPED)
def test_effects_of_groups_need_no_dense_curvature(write, limit, monkeypatch, same_draws, name):
    model, fields = GROUPED[name]()
    data = write(fields, chunk_rows=50)
    # The same draws for both, whose error is of no concern here: with others their optima are a tenth of an sd apart.
    same_draws()
    dense_method = dadvi.Anchored(curvature="data", num_draws=64)
    of_groups = lambda number, dim, rng, _points, affine: fixed_draws(number, dim, rng, 3, affine)
    monkeypatch.setattr(starting, "fixed_draws", of_groups)
    monkeypatch.setattr(probing, "FEWEST_GROUPS", 1_000)
    dense = dadvi.fit(model, data, method=dense_method, client="serial", tol=0.005)
    assert dense.curvature.is_full
    monkeypatch.undo()
    same_draws()
    limit(30)
    assert model.dim > 60
    for rows in (600, None):
        method = dadvi.Anchored(subsample_rows=rows, num_draws=64)
        posterior = dadvi.fit(model, data, method=method, client="serial", tol=TOL)
        assert posterior.curvature.structure.groups.shape == (60, 1)
        assert len(posterior.curvature.structure.dense) == model.dim - 60 <= 30
        assert dense.status == posterior.status == "converged", posterior.reason
        assert posterior.certificate.within(TOL)
        assert_elbo_never_falls(posterior, anchored.NEGLIGIBLE_NATS * math.sqrt(model.dim))
        there, sd = dense.unconstrained, dense.curvature.stddev
        mean_error, sd_error = errors(posterior, there.loc.numpy(), there.stddev.numpy(), sd.numpy())
        assert mean_error < 2 * TOL
        bound = np.full(model.dim, 2 * TOL)
        if name == "non-centred":  # where a scale is found the few draws of a Hessian are other ones for it alone
            bound[posterior.names.index("tau")] = 3 * TOL
        assert sd_error < bound.max()
        assert ((posterior.curvature.stddev / sd - 1).abs().numpy() < bound).all()


def test_effects_that_few_rows_tell_are_averaged_by_finer_rules(write, visits, monkeypatch):
    method = dadvi.Anchored(curvature="data")
    for num_groups, num_rows, coarse, num_points in ((300, 900, 0.01, 5), (60, 3_000, 0.01, 3), (60, 3_000, 0.0, 5)):
        monkeypatch.setattr(starting, "COARSE", coarse)
        model, fields = many_groups(True, num_groups, num_rows)
        data = write(fields, f"{num_groups}-{coarse}.zarr", chunk_rows=500)
        dadvi.fit(model, data, method=method, client="serial", max_passes=1)
        noise = visits[-1][3].noise
        assert len(noise.curvature.nodes) == num_points
        if num_rows == 900:  # too few to tell that fewer draws would do
            assert len(noise.likelihood.nodes) == 33


def test_an_expansion_has_the_draws_that_its_tolerance_needs(write, visits):
    model, fields = many_groups(True, 60, 3_000)
    data, used = write(fields, chunk_rows=500), []
    for tol in (1.0, 0.3, 0.1):
        method = dadvi.Anchored(curvature="data", subsample_rows=1_000)
        posterior = dadvi.fit(model, data, method=method, client="serial", tol=tol)
        assert posterior.certificate.floor < 0.1 * tol
        used.append(len(visits[-1][3].noise.likelihood.nodes))
    assert used[0] == 9 < used[1] < used[2] == 33  # four directions at least, three points along each, 0 in common


@pytest.mark.parametrize("centred", [True, False])
def test_more_groups_than_a_dense_curvature_could_hold(write, centred):
    model, fields = many_groups(centred, num_groups=2_500, num_rows=15_000)
    data = write(fields, chunk_rows=500)
    posterior = dadvi.fit(model, data, client="serial", tol=0.05)
    assert posterior.settings["method"]["name"] == "Anchored"
    assert posterior.status == "converged", posterior.reason
    assert posterior.curvature.structure.groups.shape == (2_500, 1)
    assert posterior.passes <= 10
    assert_elbo_never_falls(posterior, anchored.NEGLIGIBLE_NATS * math.sqrt(model.dim))


@pytest.mark.parametrize("family", ["full_rank", "low_rank"])
def test_groups_beyond_the_limit_are_mean_fields_alone(write, limit, family):
    model, fields = many_groups(True)
    data = write(fields, chunk_rows=50)
    limit(30)
    with pytest.raises(InputError, match=rf"64 coordinates, too many for '{family}'.*limit is 30.*mean-field.*ADVI"):
        dadvi.fit(model, data, method=dadvi.Anchored(), family=family, client="serial")
    run = partial(dadvi.fit, model, data, family=family, client="serial", max_passes=1)
    assert run().settings["method"]["name"] == "ADVI"
    if family == "full_rank":
        limit(64)
        assert run().settings["method"]["name"] == "Anchored"


# The last resort ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["subsample", "data"])
def test_where_every_step_fails_descent_gets_there(written, monkeypatch, curvature):
    target, data = written("linear_regression")
    real = anchored.solve

    def astray(prior, local, q, seen, noise, tol, radius=math.inf, unit=None):
        found = real(prior, local, q, seen, noise, tol, radius, unit)
        length = float(((found[0].loc - q.loc) / seen.curvature.stddev).abs().max())
        if length < tol / 10:  # at the optimum there is nothing to be gained
            return found
        back = Gaussian(q.family, {**q.params, "loc": q.loc - (3 + 1 / length) * (found[0].loc - q.loc)})
        return back, noise.expectations(prior, local, back)

    monkeypatch.setattr(anchored, "solve", astray)
    method = dadvi.Anchored(subsample_rows=SEEN, curvature=curvature)
    posterior = dadvi.fit(target.model(), data, method=method, client="serial", tol=TOLS[curvature], max_passes=100)
    phases = posterior.trace.phase.tolist()
    assert phases[:4] == ["round", "rejected", "rejected", "rejected"]
    assert phases[4] == "descent"
    assert posterior.status == "converged", posterior.reason
    assert_elbo_never_falls(posterior)
    mean_error, sd_error = errors(posterior, *target.optimum("mean_field"), target.optimum("full_rank").sd)
    assert mean_error < TOLS[curvature]
    assert sd_error < TOL + (S_NOISE if curvature == "subsample" else 0)
    rows = posterior.trace.rows_read.to_numpy()
    assert (np.diff(rows) == ROWS).all()  # every row of the trace is a pass


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        ({"subsample_rows": 0}, r"subsample_rows=0.*at least 1"),
        ({"num_draws": 3}, r"num_draws=3.*even"),
        ({"num_draws": 0}, r"num_draws=0.*even and at least 2"),
        ({"curvature": "full"}, r"'full'.*'auto', 'subsample', 'data'"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_with_the_remedy(setting, seen):
    with pytest.raises(InputError, match=seen):
        dadvi.Anchored(**setting)


# Executors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["subsample", "data"])
def test_same_bits_on_every_executor(written, thread_client, process_clients, curvature):
    target, data = written("linear_regression")
    method = dadvi.Anchored(subsample_rows=SEEN, curvature=curvature)
    run = partial(dadvi.fit, target.model(), data, family="full_rank", method=method, seed=5, tol=1e-3)
    serial = run(client="serial")
    timeless = [column for column in serial.trace.columns if column not in targets.TIMES]
    for client in (thread_client, process_clients(2)):
        other = run(client=client)
        assert bits(other) == bits(serial)
        assert (other.elbo, other.passes, other.certificate) == (serial.elbo, serial.passes, serial.certificate)
        assert other.trace[timeless].equals(serial.trace[timeless])


@pytest.mark.parametrize("rows", [600, None])
def test_same_bits_for_groups_on_every_executor(write, limit, thread_client, process_clients, rows):
    model, fields = many_groups(False)
    data = write(fields, chunk_rows=50, shard_rows=200)
    limit(30)
    run = partial(dadvi.fit, model, data, method=dadvi.Anchored(subsample_rows=rows, curvature="data"), seed=5)
    serial = run(client="serial")
    assert serial.status == "converged", serial.reason
    timeless = [column for column in serial.trace.columns if column not in targets.TIMES]
    for client in (thread_client, process_clients(2)):
        other = run(client=client)
        assert bits(other) == bits(serial)
        assert (other.elbo, other.passes, other.certificate) == (serial.elbo, serial.passes, serial.certificate)
        assert other.trace[timeless].equals(serial.trace[timeless])
        assert torch.equal(other.curvature.stddev, serial.curvature.stddev)


def test_a_fit_is_a_function_of_the_seed_and_its_trace_goes_to_callbacks(written, tmp_path):
    target, data = written("linear_regression")
    rows = []
    run = partial(dadvi.fit, target.model(), data, method=dadvi.Anchored(subsample_rows=SEEN), client="serial")
    first = run(seed=1, callbacks=[rows.append], run_dir=tmp_path / "run")
    assert tuple(rows) == tuple(first.records)
    assert bits(first) == bits(run(seed=1)) != bits(run(seed=2))
    loaded = dadvi.load_posterior(tmp_path / "run" / "posterior.zarr")
    assert bits(loaded) == bits(first)
    assert loaded.certificate == first.certificate
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["method"]["name"] == "Anchored"
