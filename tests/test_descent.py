"""The last resort: at the optimum of the mean at fixed draws, whatever the curvature it is given."""

import math

import numpy as np
import pytest
import scipy.optimize
import targets
import torch
from torch.distributions import Bernoulli, Normal

import dadvi
from dadvi.binding import bind_to
from dadvi.descent import descend
from dadvi.executors import SerialExecutor
from dadvi.families import Gaussian, MeanField
from dadvi.local import Noise
from dadvi.passes import single_thread
from dadvi.quadratic import Curvature
from dadvi.quadrature import gauss_hermite, orthogonal, stratified

LOG_SCALE = -1.5


@pytest.fixture(autouse=True)
def one_thread():
    with single_thread():
        yield


def noise_of(dim, seed=0):
    rng = np.random.default_rng(seed)
    return Noise(gauss_hermite(8, dim, rng), gauss_hermite(2, dim, rng), stratified(64, dim, rng))


def logistic(write):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 4)) * [1.0, 0.3, 2.0, 1.0]
    data = write({"x": x, "y": rng.binomial(1, 1 / (1 + np.exp(-x @ [0.5, -1.0, 0.3, 1.0])))}, chunk_rows=64)
    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(4), 2.0)},
        likelihood=lambda beta, x: Bernoulli(logits=x @ beta),
        observed="y",
    )
    return SerialExecutor(bind_to(model, data), data)


def banana(write):
    """A log-likelihood along a parabola: −½ Σ ((b − a²)/0.1)² + ((a − 1)/1)², from 40 rows."""
    rng = np.random.default_rng(1)
    data = write({"u": rng.normal(0, 0.1, 40), "v": rng.normal(1, 0.3, 40)}, chunk_rows=16)
    model = dadvi.Model(
        prior={"a": Normal(torch.tensor(0.0), 3.0), "b": Normal(torch.tensor(0.0), 3.0)},
        log_likelihood=lambda a, b, u, v: -50.0 * (u - (b - a**2)) ** 2 / 4 - 0.5 * (v - a) ** 2,
    )
    return SerialExecutor(bind_to(model, data), data)


PROBLEMS = {"logistic": logistic, "banana": banana}


@pytest.fixture(params=PROBLEMS)
def executor(request, write):
    return PROBLEMS[request.param](write)


def start_of(executor):
    dim = executor.model.model.dim
    loc = torch.from_numpy(np.random.default_rng(3).standard_normal(dim)) - 1.0
    return Gaussian(MeanField(), {"loc": loc, "log_scale": torch.full((dim,), LOG_SCALE, dtype=torch.float64)})


def expected_log_joint(executor, q, noise):
    """Return E_q[log π], its gradient and its Hessian in the mean, by autograd on all rows at once."""
    model = executor.model.model
    data = executor.data
    batches = [data.read(chunk) for chunk in range(data.manifest.num_chunks)]
    batch = {name: torch.cat([each[name] for each in batches]) for name in batches[0]}

    def value(mean):
        draws = {rule: mean + math.exp(LOG_SCALE) * getattr(noise, rule).nodes for rule in ("likelihood", "prior")}
        log_lik = executor.model.log_lik(draws["likelihood"], batch)
        return noise.likelihood.weights @ log_lik + noise.prior.weights @ model.log_prior(draws["prior"])

    mean = q.loc.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(mean), mean)
    return float(value(q.loc)), grad, torch.autograd.functional.hessian(value, q.loc)


def optimum_of(executor, noise, start):
    """Return the mean that maximises E_q[log π], by trust-region Newton from the start."""

    def at(mean):
        loc = torch.from_numpy(mean.copy())
        return expected_log_joint(executor, Gaussian(MeanField(), {**start.params, "loc": loc}), noise)

    found = scipy.optimize.minimize(
        lambda mean: -at(mean)[0],
        start.loc.numpy(),
        jac=lambda mean: -at(mean)[1].numpy(),
        hess=lambda mean: -at(mean)[2].numpy(),
        method="trust-exact",
        options={"gtol": 1e-9, "maxiter": 500},
    )
    value, _, hessian = at(found.x)
    return torch.from_numpy(found.x), value, torch.linalg.inv(-hessian).diagonal().sqrt()


def bad_curvature(executor, q, noise, factor):
    """Return a diagonal that is wrong by factors from 1/factor to factor, in alternation."""
    _, _, hessian = expected_log_joint(executor, q, noise)
    powers = torch.linspace(-1, 1, q.dim, dtype=torch.float64)
    return Curvature.diagonal(hessian.diagonal().abs() * factor**powers)


@pytest.mark.parametrize("factor", [1e-2, 1.0, 1e2])
def test_it_ends_at_the_optimum_of_the_mean_whatever_the_curvature(executor, factor):
    q = start_of(executor)
    noise = noise_of(q.dim)
    values = []
    found = descend(
        executor, q, bad_curvature(executor, q, noise, factor), noise, 1e-6, 400, lambda seen: values.append(seen.value)
    )
    mean, best, sd = optimum_of(executor, noise, q)
    assert float(((q.loc - mean) / sd).abs().max()) > 3  # it was far
    assert float(((found.loc - mean) / sd).abs().max()) < 1e-3
    assert torch.equal(found.params["log_scale"], q.params["log_scale"])
    assert max(values) == pytest.approx(best, abs=1e-5)


def test_reports_are_expected_log_joints_at_the_draws(executor):
    q = start_of(executor)
    noise, values = noise_of(q.dim), []
    before = executor.rows_read
    descend(
        executor, q, bad_curvature(executor, q, noise, 1.0), noise, 1e-6, 30, lambda seen: values.append(seen.value)
    )
    assert values[0] == pytest.approx(expected_log_joint(executor, q, noise)[0], rel=1e-12)
    assert executor.rows_read - before == len(values) * executor.data.num_rows


@pytest.mark.parametrize("max_passes", [1, 2, 5, 9])
def test_no_more_evaluations_than_allowed(executor, max_passes):
    q = start_of(executor)
    noise, values = noise_of(q.dim), []
    curvature = bad_curvature(executor, q, noise, 1e2)
    found = descend(executor, q, curvature, noise, 1e-9, max_passes, lambda seen: values.append(seen.value))
    assert 1 <= len(values) <= max_passes
    if max_passes == 1:
        assert found is None
        return
    if found is not None:
        at = expected_log_joint(executor, found, noise)[0]
        assert at == pytest.approx(max(values), rel=1e-12)
        assert at > values[0]
    assert (found is None) == (max(values) <= values[0])


def test_nothing_better_than_the_optimum_is_found(executor):
    q = start_of(executor)
    noise = noise_of(q.dim)
    mean, _, _ = optimum_of(executor, noise, q)
    there = Gaussian(MeanField(), {**q.params, "loc": mean})
    values = []
    found = descend(
        executor,
        there,
        bad_curvature(executor, there, noise, 1.0),
        noise,
        1e-3,
        30,
        lambda seen: values.append(seen.value),
    )
    assert found is None or expected_log_joint(executor, found, noise)[0] - values[0] < 1e-8


def test_where_everything_is_as_good_nothing_better_is_found(write):
    data = write({"x": np.zeros(20)}, chunk_rows=8)
    model = dadvi.Model(prior={"a": dadvi.Flat(2)}, log_likelihood=lambda a, x: x)
    executor = SerialExecutor(bind_to(model, data), data)
    q = Gaussian(MeanField(), {"loc": torch.ones(2).double(), "log_scale": torch.zeros(2).double()})
    curvature = Curvature.diagonal(torch.ones(2).double())
    assert descend(executor, q, curvature, noise_of(2), 0.0, 10, lambda value: None) is None


def test_with_the_right_curvature_a_quadratic_takes_one_line_search(write):
    target = targets.linear_regression(num_rows=203)
    data = write(target.fields, chunk_rows=64)
    executor = SerialExecutor(bind_to(target.model(), data), data)
    precision = torch.from_numpy(np.linalg.inv(target.covariance))
    sd = torch.from_numpy(target.optimum("full_rank").sd)
    loc = torch.from_numpy(target.optimum("full_rank").loc)
    q = Gaussian(MeanField(), {"loc": loc + 5 * sd, "log_scale": sd.log()})
    exact = orthogonal(10, 5, np.random.default_rng(0))
    values = []
    found = descend(
        executor,
        q,
        Curvature.dense(precision),
        Noise(exact, exact, exact),
        1e-3,
        50,
        lambda seen: values.append(seen.value),
    )
    assert len(values) <= 6  # L-BFGS begins with a step of one sd, and is 5 √5 sds away
    assert float(((found.loc - loc) / sd).abs().max()) < 1e-3


def test_it_stops_where_the_curvature_says_that_it_is_near(write):
    executor = logistic(write)
    q = start_of(executor)
    noise = noise_of(q.dim)
    mean, _, _ = optimum_of(executor, noise, q)
    curvature = bad_curvature(executor, Gaussian(MeanField(), {**q.params, "loc": mean}), noise, 1.0)
    lengths = []
    for distance in (1.0, 1e-2, 1e-5):
        evaluations = []
        found = descend(executor, q, curvature, noise, distance, 200, evaluations.append)
        lengths.append(len(evaluations))
        grad = expected_log_joint(executor, found, noise)[1]
        predicted = float((curvature.solve(grad) / curvature.stddev).abs().max())
        assert predicted <= distance
    assert lengths[0] < lengths[1] < lengths[2]


def test_values_that_are_not_finite_turn_the_search_back(write):
    # log π is nan beyond 1.5: from −3 a first step, of one sd by a curvature far too small, lands outside.
    data = write({"x": np.random.default_rng(0).normal(0.5, 1.0, 50)}, chunk_rows=16)
    model = dadvi.Model(
        prior={"a": Normal(torch.tensor(0.0), 3.0)},
        log_likelihood=lambda a, x: -0.5 * (x - a) ** 2 + 0.05 * torch.log(1.5 - a),
    )
    executor = SerialExecutor(bind_to(model, data), data)
    q = Gaussian(MeanField(), {"loc": torch.tensor([-3.0]).double(), "log_scale": torch.tensor([-4.0]).double()})
    values = []
    curvature = Curvature.diagonal(torch.tensor([0.01], dtype=torch.float64))
    found = descend(executor, q, curvature, noise_of(1), 1e-6, 60, lambda seen: values.append(seen.value))
    assert not np.isfinite(values).all()
    assert found is not None
    # 50 (x̄ − a) − 2.5/(1.5 − a) − a/9 = 0, but for the width of q
    at = float(found.loc)
    mean = float(data.read(0)["x"].sum() + data.read(1)["x"].sum() + data.read(2)["x"].sum() + data.read(3)["x"].sum())
    assert abs(mean - 50 * at - 2.5 / (1.5 - at) - at / 9) < 0.1
