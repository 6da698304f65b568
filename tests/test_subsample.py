"""The warm start: the mean-field optimum given the subsample alone, found from any start and in any units."""

import warnings

import numpy as np
import pytest
import scipy.optimize
import targets
import torch
import zarr
from torch.distributions import HalfNormal, Normal, Poisson, constraints

import dadvi
from dadvi.binding import bind_to
from dadvi.errors import DataError, ModelError, ShuffleWarning
from dadvi.passes import LogLik
from dadvi.structure import Structure
from dadvi.subsample import Subsample
from dadvi.subsample import warm_start as warm_start_with


def load(model, data, chunks=None):
    chunks = range(data.manifest.num_chunks) if chunks is None else chunks
    return Subsample.load(bind_to(model, data), data, list(chunks))


def warm_start(subsample, seed):
    return warm_start_with(subsample, Structure.full(subsample.model.model.dim), seed)


def linear_model(dim, noise_sd, prior_sd=10.0):
    return dadvi.Model(
        prior={"beta": Normal(torch.zeros(dim), prior_sd)},
        likelihood=lambda beta, x: Normal(x @ beta, noise_sd),
        observed="y",
    )


def linear_posterior(x, y, noise_sd, prior_sd=10.0):
    """Return mean, precision of the posterior of β ~ N(0, prior_sd² I) given y ~ N(xβ, noise_sd²)."""
    precision = x.T @ x / noise_sd**2 + np.eye(x.shape[1]) / prior_sd**2
    return np.linalg.solve(precision, x.T @ y / noise_sd**2), precision


def distance(q, mean, precision):
    """Largest distance of q's mean, in posterior sds."""
    sd = np.sqrt(np.diag(np.linalg.inv(precision)))
    return np.abs((q.loc.numpy() - mean) / sd).max()


def test_warm_start_finds_widths_where_the_location_has_nothing_to_gain(write):
    """At 0 the gradient of u² is 0, and the curvature there is the prior's alone."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(500)
    model = dadvi.Model({"u": Normal(0.0, 1.0)}, lambda u, x: Normal(u * u * x, 1.0), observed="y")
    q = warm_start(load(model, write({"x": x, "y": 1.5 * x + rng.standard_normal(500)})), seed=0)
    assert float(q.stddev[0]) > 0.1


def test_warm_start_without_a_structure_searches_in_every_round(write, monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 1)) + 0.03 * rng.standard_normal((300, 6))  # all nearly the same
    y = x @ [3.0, -3.0, 2.0, -2.0, 1.0, -1.0] + rng.standard_normal(300)
    subsample = load(linear_model(6, 1.0), write({"x": x, "y": y}))
    rounds, searches = [], []
    improve, minimize = dadvi.subsample._improve, scipy.optimize.minimize
    monkeypatch.setattr(dadvi.subsample, "_improve", lambda *a: (rounds.append(1), improve(*a))[1])
    monkeypatch.setattr(scipy.optimize, "minimize", lambda *a, **k: (searches.append(1), minimize(*a, **k))[1])
    warm_start_with(subsample, None, 0)
    assert len(rounds) == len(searches) > 1


def test_warm_start_is_the_optimum_given_the_subsample_alone(write):
    # Three of the chunks, unscaled, with the whole prior: not the posterior of all the data, nor of S taken N/S times.
    target = targets.linear_regression(num_rows=400)
    data = write(target.fields, chunk_rows=32, shard_rows=64)
    chunks = [1, 5, 12]  # the last is ragged
    rows = np.concatenate([np.arange(*data.manifest.rows(chunk)) for chunk in chunks])
    assert len(rows) == 32 + 32 + 16
    mean, precision = linear_posterior(target.fields["x"][rows], target.fields["y"][rows], 0.8, prior_sd=2.0)
    q = warm_start(load(target.model(), data, chunks), seed=0)
    assert distance(q, mean, precision) < 1e-3
    assert distance(q, target.optimum("full_rank").loc, precision) > 0.5  # the test can tell the difference
    # The draws that stay fixed give a mean-field sd the noise of 8 squared normals for every correlation it has.
    np.testing.assert_allclose(q.stddev, np.diag(precision) ** -0.5, rtol=1.0)


def test_sds_are_exact_where_the_fixed_draws_allow_it(write):
    # One coordinate: with fixed draws E[σ²ε²] = σ² mean(ε²), so that the optimum is 1/√(P mean(ε²)); 5 seeds together.
    target = targets.normal_normal(num_rows=64)
    subsample = load(target.model(), write(target.fields))
    sd = target.optimum("mean_field").sd
    found = [warm_start(subsample, seed) for seed in range(5)]
    for q in found:
        np.testing.assert_allclose(q.loc, target.optimum("mean_field").loc, atol=1e-3 * sd[0])
    squares = np.array([(sd / q.stddev.numpy()) ** 2 for q in found])  # mean(ε²) of 8 draws: 1 ± √(2/8)
    assert abs(squares.mean() - 1) < 4 * np.sqrt(2 / 8 / 5)


@pytest.mark.parametrize("name", ["inverse_gamma_normal", "poisson_gamma"])
def test_warm_start_of_targets_that_are_not_gaussian(write, name):
    target = targets.CONJUGATE[name](num_rows=300)
    loc, sd = target.optimum("mean_field")
    q = warm_start(load(target.model(), write(target.fields)), seed=0)
    # E exp(-u) depends on the sd that fixed draws have made: ½ σ² (mean(ε²) - 1), a small part of an sd with 300 rows.
    assert np.abs((q.loc.numpy() - loc) / sd).max() < 0.05


def test_predictors_may_have_any_scale(write):
    # An intercept, a calendar year, a 0/1 column, one in millionths, one in millions: condition number 1e24.
    rng = np.random.default_rng(0)
    num_rows = 500
    x = np.stack(
        [
            np.ones(num_rows),
            rng.integers(1995, 2006, num_rows),
            rng.integers(0, 2, num_rows),
            1e-6 * rng.standard_normal(num_rows),
            1e6 * rng.standard_normal(num_rows),
        ],
        axis=1,
    )
    y = x @ [3.0, 0.02, -1.0, 2e5, 1e-6] + 0.5 * rng.standard_normal(num_rows)
    prior_sd = 1e6
    mean, precision = linear_posterior(x, y, 0.5, prior_sd)
    q = warm_start(load(linear_model(5, 0.5, prior_sd), write({"x": x, "y": y})), seed=0)
    assert distance(q, mean, precision) < 0.02


def test_a_start_far_away_is_no_obstacle(write):
    # The prior's mean, where the search starts, is 10 000 posterior sds from the posterior's.
    rng = np.random.default_rng(1)
    data = write({"x": rng.normal(500.0, 1.0, 400)})
    model = dadvi.Model(
        prior={"mu": Normal(torch.tensor(0.0), 1000.0)}, likelihood=lambda mu: Normal(mu, 1.0), observed="x"
    )
    q = warm_start(load(model, data), seed=0)
    mean = data.read(0)["x"].sum() / (400 + 1e-6)
    assert abs(float(q.loc) - float(mean)) < 1e-3 / 20


def test_a_far_start_of_a_model_that_is_not_quadratic(write):
    # log π falls like exp(η): one Newton step from here overshoots by hundreds of sds.
    rng = np.random.default_rng(2)
    data = write({"y": rng.poisson(2_000.0, 300)})
    model = dadvi.Model(
        prior={"a": Normal(torch.tensor(0.0), 10.0)}, likelihood=lambda a: Poisson(a.exp()), observed="y"
    )
    q = warm_start(load(model, data), seed=0)
    total = float(data.read(0)["y"].sum())
    assert abs(float(q.loc) - np.log(total / 300)) < 0.2 / np.sqrt(total)  # prior and σ²/2 are far smaller
    assert float(q.stddev) == pytest.approx(total**-0.5, rel=0.9)


def test_a_start_whose_likelihood_overflows_is_narrowed(write):
    # Curvature there is so small that draws at its sds would put the rate at exp(±thousands).
    rng = np.random.default_rng(3)
    x = rng.uniform(100.0, 120.0, 200)
    fields = {"x": x, "y": rng.poisson(np.exp(0.02 * x))}
    model = dadvi.Model(
        prior={"a": Normal(torch.tensor(0.0), 1e4), "b": Normal(torch.tensor(-2.0), 1e4)},
        likelihood=lambda a, b, x: Poisson((a + b * x).exp()),
        observed="y",
    )
    assert np.isfinite(model.log_prior(model.start[None]).item())
    q = warm_start(load(model, write(fields)), seed=0)
    # Newton from the truth, for the mode given these rows.
    design, coefficients = np.stack([np.ones_like(x), x], axis=1), np.array([0.0, 0.02])
    for _ in range(20):
        rate = np.exp(design @ coefficients)
        precision = design.T @ (design * rate[:, None]) + 1e-8 * np.eye(2)
        score = design.T @ (fields["y"] - rate) - 1e-8 * (coefficients - [0.0, -2.0])
        coefficients = coefficients + np.linalg.solve(precision, score)
    assert distance(q, coefficients, precision) < 0.1


def test_a_log_posterior_that_is_finite_nowhere_around_the_start_is_refused(write):
    model = dadvi.Model(
        prior={"a": Normal(torch.tensor(0.5), 1.0)},
        log_likelihood=lambda a, x: torch.where(a == 0.5, x * a, x * torch.inf),
    )
    with pytest.raises(ModelError, match=r"not finite around .*'a': 0\.5.*rescale the predictors"):
        warm_start(load(model, write({"x": np.ones(20)})), seed=0)


def test_flat_priors(write):
    # Flat priors leave the likelihood alone: x̄, and sd² = mean (x - x̄)² by maximum likelihood, up to O(1/rows).
    x = np.random.default_rng(4).normal(20.0, 3.0, 1_000)
    model = dadvi.Model(
        prior={"mu": dadvi.Flat(()), "sd": dadvi.Flat((), constraints.positive)},
        likelihood=lambda mu, sd: Normal(mu, sd),
        observed="x",
    )
    q = warm_start(load(model, write({"x": x})), seed=0)
    assert abs(float(q.loc[0]) - x.mean()) < 0.05 * 3 / np.sqrt(1_000)
    assert abs(float(q.loc[1]) - np.log(x.std())) < 0.15 / np.sqrt(2_000)
    np.testing.assert_allclose(q.stddev, [3 / np.sqrt(1_000), 1 / np.sqrt(2_000)], rtol=0.9)


def test_scales_of_a_hierarchy_stay_sane_on_few_rows(write):
    # 40 groups, one row each: scaled up to N rows, S would be fitted exactly and the groups' sd would run away.
    rng = np.random.default_rng(5)
    effects = rng.normal(0.0, 1.0, 40)
    fields = {"g": np.arange(40), "y": effects + rng.normal(0.0, 1.0, 40)}
    model = dadvi.Model(
        prior={"tau": HalfNormal(torch.tensor(2.0)), "effect": lambda tau: Normal(torch.zeros(40), tau)},
        likelihood=lambda effect, g: Normal(effect[g], 1.0),
        observed="y",
    )
    q = warm_start(load(model, write(fields)), seed=0)
    tau = float(q.loc[0].exp())
    shrunk = q.loc[1:].numpy() / fields["y"]  # E[effect | y] = y τ²/(τ² + 1)
    assert 0.3 < tau < 2.5
    np.testing.assert_allclose(np.median(shrunk), tau**2 / (1 + tau**2), atol=0.15)


def test_the_subsample_is_in_float64_and_sums_its_chunks(write):
    rng = np.random.default_rng(6)
    fields = {"x": rng.standard_normal((50, 2)).astype(np.float32), "y": rng.standard_normal(50).astype(np.float32)}
    data = write(fields, chunk_rows=8, shard_rows=16)
    subsample = load(linear_model(2, 1.0), data, [0, 6])
    assert all(batch[name].dtype == torch.float64 for batch in subsample.batches.values() for name in ("x", "y"))
    eta = rng.standard_normal((3, 2))
    rows = np.r_[0:8, 48:50]
    residual = fields["y"][rows].astype(float)[:, None] - fields["x"][rows].astype(float) @ eta.T
    expected = (-0.5 * residual**2 - 0.5 * np.log(2 * np.pi)).sum(0)
    np.testing.assert_allclose(subsample.run(LogLik(eta)).log_lik, expected, rtol=1e-13)


def test_rows_are_checked_as_they_are_loaded(tmp_path):
    y = np.ones(40)
    y[21] = np.nan
    group = zarr.create_group(tmp_path / "foreign.zarr")  # not written, and so not checked, by dadvi
    group.create_array("x", data=np.ones((40, 1)), chunks=(8, 1))
    group.create_array("y", data=y, chunks=(8,))
    data = dadvi.open_shards(tmp_path / "foreign.zarr")
    bound = bind_to(linear_model(1, 1.0), data)  # which looks at the first and the last chunk only
    Subsample.load(bound, data, [0, 1])
    with pytest.raises(DataError, match=r"'y'.*row 21"):
        Subsample.load(bound, data, [1, 2])


def test_same_seed_same_bits(write):
    target = targets.linear_regression(num_rows=100)
    subsample = load(target.model(), write(target.fields))
    first, again, other = (warm_start(subsample, seed) for seed in (3, 3, 4))
    assert torch.equal(first.loc, again.loc)
    assert torch.equal(first.stddev, again.stddev)
    assert not torch.equal(first.stddev, other.stddev)


def test_data_in_order_are_told_of_and_data_in_random_order_are_not(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20_000, 2))
    y = x @ [0.5, -0.5] + rng.standard_normal(20_000)
    model = dadvi.Model({"b": Normal(torch.zeros(2), 1.0)}, lambda b, x: Normal(x @ b, 1.0), "y")
    order = np.argsort(y)
    for name, rows, shuffle, warns in (
        ("random", slice(None), None, 0),
        ("sorted", order, None, 1),
        ("again", order, 0, 0),
    ):
        data = dadvi.write_shards(tmp_path / f"{name}.zarr", {"x": x[rows], "y": y[rows]}, shuffle=shuffle)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dadvi.fit(model, data, client="serial", method=dadvi.Anchored(subsample_rows=3_000))
        told = [str(each.message) for each in caught if each.category is ShuffleWarning]
        assert len(told) == warns, (name, told)
        assert all("chunks differ by more than" in text and "shuffle=0" in text for text in told)
