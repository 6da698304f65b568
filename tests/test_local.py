"""Local models: exact at the anchor, unbiased away from it; the search on them ends at the ELBO's optimum."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import targets
import torch
from scipy import stats
from torch.distributions import Bernoulli, Normal

import dadvi
from dadvi.binding import bind_to
from dadvi.elbo import draw_noise
from dadvi.executors import SerialExecutor
from dadvi.families import FullRank, Gaussian, LowRank, MeanField
from dadvi.local import NEGLIGIBLE_NATS, SOLVED, Expectations, Noise, Surrogate, Taylor, solve
from dadvi.passes import Expansion, Gradient, HessianVector, single_thread
from dadvi.quadratic import Curvature, optimum
from dadvi.quadrature import Rule, gauss_hermite, orthogonal
from dadvi.scales import Scales
from dadvi.structure import Structure
from dadvi.subsample import Subsample

FAMILIES = {"mean_field": MeanField(), "full_rank": FullRank()}
GAUSSIAN = ("normal_normal", "linear_regression")
PRIOR_SD = 3.0


@pytest.fixture(autouse=True)
def one_thread():
    """Run the coordinator's linear algebra on one thread, as `fit` does."""
    with single_thread():
        yield


def logistic_model(dim):
    return dadvi.Model(
        prior={"beta": Normal(torch.zeros(dim), PRIOR_SD)},
        likelihood=lambda beta, x: Bernoulli(logits=x @ beta),
        observed="y",
    )


def logistic_fields(num_rows=205, dim=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, dim))
    return {"x": x, "y": rng.binomial(1, 1 / (1 + np.exp(-x @ np.linspace(1, -1, dim))))}


def logistic_terms(fields, eta):
    """Return value, gradient and Hessian of the full log-likelihood at η (D,), by hand."""
    x, y = fields["x"], fields["y"]
    linear = x @ eta
    p = 1 / (1 + np.exp(-linear))
    return (y * linear - np.logaddexp(0, linear)).sum(), x.T @ (y - p), -(x.T * (p * (1 - p))) @ x


@pytest.fixture
def logistic(write):
    """Return the fields and an executor of 205 float64 rows in 5 chunks, the last of 13 rows."""
    fields = logistic_fields()
    data = write(fields, chunk_rows=48, shard_rows=96)
    assert [int(size) for size in data.manifest.chunk_sizes] == [48, 48, 48, 48, 13]
    return fields, executor_of(logistic_model(3), data)


def executor_of(model, data):
    return SerialExecutor(bind_to(model, data), data)


def load(executor, chunks):
    return Subsample.load(executor.model, executor.data, list(chunks))


def surrogate(executor, chunks, anchor):
    factor = executor.data.manifest.num_chunks / len(chunks)
    structure = Structure.full(len(anchor))
    return Surrogate.measured(load(executor, chunks), structure, factor, executor, anchor, check=True, label="test")


def whole(executor):
    """Return the log-likelihood of all the data as a local model."""
    chunks, anchor = range(executor.data.manifest.num_chunks), torch.zeros(executor.model.model.dim).double()
    return Surrogate.untilted(load(executor, chunks), Structure.full(len(anchor)), 1.0, anchor)


def taylor(executor, q, noise, scales=None):
    scales = scales or Scales.none(Structure.full(q.dim))
    return Taylor.measured(executor, q, noise, scales, check=True, label="test")


def hessian_at(local, eta):
    """Return the local model's Hessian (D, D) at one point (D,)."""
    return local.hessian(eta[None], torch.ones(1).double()).matrix()


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def random_noise(dim, num_draws=8, seed=0):
    rng = np.random.default_rng(seed)
    likelihood = orthogonal(num_draws, dim, rng)
    pair = Rule.equal(likelihood.nodes[[0, num_draws // 2]])
    return Noise(likelihood, pair, Rule.equal(draw_noise("antithetic", 64, dim, rng)))


def grid_noise(dim, num_points=40):
    """Return the product of equally probable points with unit variance: expectations of smooth functions, nearly."""
    line = stats.norm.ppf((np.arange(num_points) + 0.5) / num_points)
    line = line / line.std()
    grid = torch.from_numpy(np.stack(np.meshgrid(*[line] * dim), axis=-1).reshape(-1, dim))
    rule = Rule.equal(grid)
    return Noise(rule, rule, rule)


# Surrogate -------------------------------------------------------------------------------------------------------


def test_surrogate_has_the_value_and_gradient_of_all_the_data_at_its_anchor(logistic):
    fields, executor = logistic
    anchor = normal(3, seed=1)
    local = surrogate(executor, [1, 4], anchor)
    value, grad, _ = logistic_terms(fields, anchor.numpy())
    found_value, found_grad = local.log_lik(anchor[None])
    np.testing.assert_allclose(found_value[0], value, rtol=1e-12)
    np.testing.assert_allclose(found_grad[0], grad, rtol=0, atol=1e-12 * np.abs(grad).max())
    untilted = Surrogate.untilted(local.subsample, local.structure, local.factor, anchor).log_lik(anchor[None])
    assert abs(float(untilted[0][0]) - value) > 1  # the test can tell the difference
    assert np.abs(untilted[1][0].numpy() - grad).max() > 1


def test_tilt_vanishes_where_the_subsample_is_everything(logistic):
    fields, executor = logistic
    local = surrogate(executor, range(5), normal(3, seed=1))
    eta = normal(3, seed=2)
    value, grad, hessian = logistic_terms(fields, eta.numpy())
    assert local.tilt.abs().max() < 1e-12 * np.abs(grad).max()
    np.testing.assert_allclose(local.log_lik(eta[None])[0][0], value, rtol=1e-12)
    np.testing.assert_allclose(hessian_at(local, eta), hessian, rtol=1e-10)


def test_surrogate_is_unbiased_over_all_subsamples(logistic):
    # Every one of the C(5, 2) subsets, with a ragged chunk: C/m is the right factor, N over the rows of S is not.
    fields, executor = logistic
    anchor, eta = normal(3, seed=1), normal(3, seed=2)
    models = [surrogate(executor, chunks, anchor) for chunks in combinations(range(5), 2)]
    values, grads = zip(*(local.log_lik(eta[None]) for local in models), strict=True)
    curvatures = [hessian_at(local, eta) for local in models]
    value, grad, hessian = logistic_terms(fields, eta.numpy())
    assert torch.cat(grads).std(0).min() > 0.1  # one subset alone is off
    np.testing.assert_allclose(torch.cat(values).mean(), value, rtol=1e-12)
    np.testing.assert_allclose(torch.cat(grads).mean(0), grad, rtol=1e-10)
    np.testing.assert_allclose(torch.stack(curvatures).mean(0), hessian, rtol=1e-10)


def test_surrogates_gradient_is_that_of_its_value(logistic):
    _, executor = logistic
    local, eta = surrogate(executor, [0, 4], normal(3, seed=1)), normal(3, seed=2)
    step = 1e-5 * torch.eye(3).double()
    slope = (local.log_lik(eta + step)[0] - local.log_lik(eta - step)[0]) / 2e-5
    bend = (local.log_lik(eta + step)[1] - local.log_lik(eta - step)[1]) / 2e-5
    np.testing.assert_allclose(local.log_lik(eta[None])[1][0], slope, rtol=1e-6)
    np.testing.assert_allclose(hessian_at(local, eta), bend, rtol=1e-6)


def test_what_a_surrogate_sees_follows_from_what_another_one_of_the_same_rows_saw(logistic):
    _, executor = logistic
    before, after = (surrogate(executor, [0, 4], normal(3, seed=seed)) for seed in (1, 2))
    eta = normal(4, 3, seed=3)
    change, slope = before.less(after, eta[0])
    differences = [a - b for a, b in zip(before.log_lik(eta), after.log_lik(eta), strict=True)]
    np.testing.assert_allclose(change, differences[0][0], rtol=1e-10)
    np.testing.assert_allclose(slope.expand(4, -1), differences[1], rtol=1e-10)
    assert abs(float(change)) > 0.1
    assert slope.abs().min() > 0.1

    prior = executor.model.model
    q = Gaussian(MeanField(), {"loc": eta[0], "log_scale": 0.3 * normal(3, seed=4) - 1})
    noise = replace(random_noise(3), likelihood=gauss_hermite(4, 3, np.random.default_rng(0), 2))
    expected, seen = noise.expectations(prior, after, q), noise.expectations(prior, before, q)
    found = seen.plus(*after.less(before, q.loc))
    for name in ("elbo", "sampled", "grad", "grad_errors"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-10)
    assert expected.grad_errors.abs().max() > 0.01


# Taylor ----------------------------------------------------------------------------------------------------------


def test_taylor_is_exact_for_a_gaussian_likelihood(write):
    target = targets.linear_regression(num_rows=203)
    executor = executor_of(target.model(), write(target.fields, chunk_rows=48))
    q = Gaussian(MeanField(), {"loc": normal(5, seed=1), "log_scale": 0.3 * normal(5, seed=2)})
    local = taylor(executor, q, random_noise(5, num_draws=4))
    eta = 2 * normal(6, 5, seed=3)
    x, y = target.fields["x"], target.fields["y"]
    away = y[:, None] - x @ eta.numpy().T  # (rows, K)
    value, grad = local.log_lik(eta)
    np.testing.assert_allclose(value, stats.norm.logpdf(away, scale=0.8).sum(0), rtol=1e-10)
    np.testing.assert_allclose(grad, away.T @ x / 0.8**2, rtol=1e-9)
    tangents = normal(5, 4, seed=4).numpy()
    np.testing.assert_allclose(hessian_at(local, eta[0]).numpy() @ tangents, -x.T @ x / 0.8**2 @ tangents, rtol=1e-9)


def test_taylor_has_the_averaged_derivatives_of_a_logistic(logistic):
    fields, executor = logistic
    q = Gaussian(MeanField(), {"loc": normal(3, seed=1), "log_scale": torch.full((3,), -0.7).double()})
    noise = random_noise(3, num_draws=6)
    noise = replace(noise, curvature=Rule(noise.curvature.nodes, torch.tensor([0.3, 0.7], dtype=torch.float64)))
    local = taylor(executor, q, noise)
    eta = q.transform(noise.likelihood.nodes)
    values, grads, hessians = zip(*(logistic_terms(fields, each) for each in eta.numpy()), strict=True)
    value, grad = local.log_lik(q.loc[None])
    np.testing.assert_allclose(grad[0], np.mean(grads, 0), rtol=1e-10)
    np.testing.assert_allclose(hessian_at(local, eta[0]), 0.3 * hessians[0] + 0.7 * hessians[3], rtol=1e-10)
    np.testing.assert_allclose(local.log_lik(eta)[0].mean(), np.mean(values), rtol=1e-12)
    assert float(value[0]) > np.mean(values)  # a concave function exceeds its mean at the mean


def test_the_error_of_an_expansion_is_that_of_the_gradients_it_was_measured_by(logistic):
    # At the anchor; what the expansion leaves of them is part of it, as is what it has of them.
    _, executor = logistic
    q = Gaussian(MeanField(), {"loc": normal(3, seed=1), "log_scale": torch.full((3,), -0.7).double()})
    noise = replace(random_noise(3), likelihood=gauss_hermite(4, 3, np.random.default_rng(1)))
    local, eta = taylor(executor, q, noise), q.transform(noise.likelihood.nodes)
    told = local.grad_errors(noise.likelihood, local.log_lik(eta)[1])
    real = noise.likelihood.errors(torch.from_numpy(executor.run(Gradient(eta.numpy())).grad))
    assert float(real.abs().max()) > 1e-3
    np.testing.assert_allclose(told, real, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", [Structure.full(3), Structure.diagonal(3)], ids=["full", "diagonal"])
def test_expansion_is_both_passes_in_one_read_bit_for_bit(logistic, structure):
    _, executor = logistic
    gradient = Gradient(normal(4, 3, seed=1).numpy())
    at, weights = normal(2, 3, seed=2).numpy(), np.array([0.4, 0.6])
    hessian = HessianVector(at, structure.tangents(), weights)
    before = executor.rows_read
    both = executor.run(Expansion(gradient, at, weights, structure))
    assert executor.rows_read - before == 205
    apart = (*executor.run(gradient), *executor.run(hessian))
    assert [values.tobytes() for values in both] == [values.tobytes() for values in apart]


# Expectations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", GAUSSIAN)
def test_certificate_is_the_true_distance_on_gaussian_targets(write, name, family):
    target = targets.CONJUGATE[name](num_rows=203)
    executor = executor_of(target.model(), write(target.fields, chunk_rows=48))
    loc, best = target.optimum(family)
    marginal = target.optimum("full_rank").sd
    dim = len(loc)
    offset, log_ratio = 2 * normal(dim, seed=1).numpy(), 0.3 * normal(dim, seed=2)
    at = torch.from_numpy(loc + offset * marginal)
    q = optimum(FAMILIES[family], at, Curvature.dense(torch.from_numpy(np.linalg.inv(target.covariance))))
    q = Gaussian(q.family, q.family.affine({**q.params, "loc": 0 * at}, at, log_ratio.exp()))
    np.testing.assert_allclose(q.stddev, best * np.exp(log_ratio.numpy()), rtol=1e-9)
    certificate = random_noise(dim).expectations(executor.model.model, whole(executor), q).certificate(q)
    assert certificate.max == pytest.approx(np.abs(offset).max(), rel=1e-8)
    assert certificate.rms == pytest.approx(np.sqrt(np.mean(offset**2)), rel=1e-8)
    assert certificate.sd_error == pytest.approx(np.abs(np.exp(log_ratio.numpy()) - 1).max(), rel=1e-8)


def test_elbo_of_expectations_is_that_of_elbo_and_bounds_the_evidence(write):
    target = targets.linear_regression(num_rows=203)
    executor = executor_of(target.model(), write(target.fields, chunk_rows=48))
    prior, local = executor.model.model, whole(executor)
    curvature = Curvature.dense(torch.from_numpy(np.linalg.inv(target.covariance)))
    q = optimum(FullRank(), torch.from_numpy(target.optimum("full_rank").loc), curvature)
    noise = random_noise(5, num_draws=10)  # 2 D of them: the ELBO of a quadratic likelihood is exact
    noise = replace(noise, prior=noise.likelihood)
    assert noise.expectations(prior, local, q).elbo == pytest.approx(target.log_evidence, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_elbo_of_a_quadratic_likelihood_is_exact_at_any_draws(write, family):
    # log p(x) − KL(q‖posterior), by the control variate: 2 draws alone would be nats off.
    target = targets.linear_regression(num_rows=203)
    executor = executor_of(target.model(), write(target.fields, chunk_rows=48))
    precision = torch.from_numpy(np.linalg.inv(target.covariance))
    away = 2 * normal(5, seed=1) * torch.from_numpy(target.optimum("full_rank").sd)
    q = optimum(FAMILIES[family], torch.from_numpy(target.optimum("full_rank").loc) + away, Curvature.dense(precision))
    q = Gaussian(q.family, q.family.affine({**q.params, "loc": 0 * away}, q.loc, torch.full((5,), 1.4).double()))
    covariance = q.covariance_matrix
    divergence = (precision * covariance).sum() + away @ precision @ away - 5 - torch.logdet(precision @ covariance)
    exact = target.log_evidence - 0.5 * float(divergence)
    pair = Rule.equal(normal(1, 5, seed=4) * torch.tensor([[1.0], [-1.0]]).double())
    noise = Noise(pair, pair, orthogonal(10, 5, np.random.default_rng(0)))
    seen = noise.expectations(executor.model.model, whole(executor), q)
    assert seen.elbo == pytest.approx(exact, abs=1e-7)
    uncontrolled = replace(seen, bend=seen.bend * 0.0)
    assert abs(noise.expectations(executor.model.model, whole(executor), q, known=uncontrolled).elbo - exact) > 0.5


# The search ------------------------------------------------------------------------------------------------------


def search(prior, local, q, noise, tol, radius=math.inf, unit=None):
    return solve(prior, local, q, noise.expectations(prior, local, q), noise, tol, radius, unit)


def start(target, seed=1):
    """Return a mean-field Gaussian some sds away from the optimum, with sds off by up to a factor 2."""
    loc, sd = target.optimum("full_rank")
    dim = len(loc)
    at = torch.from_numpy(loc + 2 * sd * normal(dim, seed=seed).numpy())
    return {"loc": at, "log_scale": torch.from_numpy(np.log(sd)) + 0.5 * normal(dim, seed=seed + 1).clamp(-1.4, 1.4)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", targets.CONJUGATE)
def test_solve_ends_at_the_closed_form_optimum(write, name, family):
    target = targets.CONJUGATE[name](num_rows=60)
    executor = executor_of(target.model(), write(target.fields, chunk_rows=16))
    loc, sd = target.optimum(family)
    params = start(target)
    if family == "full_rank":
        params["lower"] = torch.zeros(len(loc), len(loc)).double()
    noise = random_noise(len(loc)) if target.gaussian else grid_noise(len(loc))
    tol = 0.01
    q, _ = search(executor.model.model, whole(executor), Gaussian(FAMILIES[family], params), noise, tol)
    assert np.abs((q.loc.numpy() - loc) / target.optimum("full_rank").sd).max() < tol
    assert np.abs(q.stddev.numpy() / sd - 1).max() < tol
    if family == "full_rank":
        scale = np.outer(target.optimum("full_rank").sd, target.optimum("full_rank").sd)
        np.testing.assert_allclose(q.covariance_matrix.numpy() / scale, target.covariance / scale, atol=2 * tol)


class Watched:
    """A local model that notes where it was evaluated."""

    def __init__(self, local):
        self.local, self.asked = local, []

    def __getattr__(self, name):
        return getattr(self.local, name)

    def log_lik(self, eta):
        self.asked.append(eta)
        return self.local.log_lik(eta)


def test_solve_evaluates_no_gaussian_twice(write):
    executor = executor_of(logistic_model(3), write(logistic_fields(), chunk_rows=48))
    q = Gaussian(MeanField(), {"loc": normal(3, seed=1) + 1.0, "log_scale": torch.full((3,), -1.0).double()})
    local = Watched(whole(executor))
    search(executor.model.model, local, q, random_noise(3), 1e-4)
    assert len(local.asked) > 3
    assert len({tuple(eta.flatten().tolist()) for eta in local.asked}) == len(local.asked)


def test_curvature_measured_where_the_rest_was_seen_is_that_of_looking_anew(logistic):
    _, executor = logistic
    prior, local, noise = executor.model.model, whole(executor), random_noise(3)
    here, there = (
        Gaussian(MeanField(), {"loc": normal(3, seed=i), "log_scale": normal(3, seed=i + 1)}) for i in (1, 5)
    )
    known = noise.expectations(prior, local, here)
    seen, anew = noise.expectations(prior, local, there, known=known), noise.expectations(prior, local, there)
    assert not torch.allclose(seen.curvature.stddev, anew.curvature.stddev, rtol=1e-3)
    curved = noise.curved(prior, local, there, seen)
    assert (curved.elbo, curved.sampled) == (anew.elbo, anew.sampled)
    torch.testing.assert_close(curved.curvature.stddev, anew.curvature.stddev, rtol=0, atol=0)
    torch.testing.assert_close(curved.grad, anew.grad, rtol=0, atol=0)


def test_solve_goes_as_far_as_its_radius(write):
    target = targets.linear_regression(num_rows=203)
    executor = executor_of(target.model(), write(target.fields, chunk_rows=48))
    loc, sd = target.optimum("full_rank")
    q = Gaussian(
        MeanField(),
        {
            "loc": torch.from_numpy(loc + 10 * sd),
            "log_scale": torch.from_numpy(np.log(target.optimum("mean_field").sd)),
        },
    )
    for radius in (0.5, 3.0):
        there, _ = search(executor.model.model, whole(executor), q, random_noise(5), 0.1, radius)
        moved = np.abs((there.loc - q.loc).numpy() / sd).max()
        assert moved == pytest.approx(radius, rel=1e-6)  # all of it, where the curvature is the same everywhere
    unit = torch.from_numpy(sd) * torch.tensor([1.0, 2.0, 4.0, 2.0, 0.5])
    there, _ = search(executor.model.model, whole(executor), q, random_noise(5), 0.1, 3.0, unit)
    assert float(((there.loc - q.loc) / unit).abs().max()) == pytest.approx(3.0, rel=1e-6)
    there, _ = search(executor.model.model, whole(executor), q, random_noise(5), 0.1)
    np.testing.assert_allclose((there.loc - q.loc).numpy() / sd, -10.0, atol=0.01)


def test_sds_that_are_all_a_little_off_are_mended_together(write):
    """Where a scale multiplies effects, the errors of all their sds add up in it: their norm counts."""
    dim, rows, tol = 400, 20, 0.1
    model = dadvi.Model(
        prior={"m": Normal(torch.zeros(dim), 1.0)},
        likelihood=lambda m, x: torch.distributions.Independent(Normal(m + 0 * x, 1.0), 1),
        observed="x",
    )
    x = normal(rows, dim).numpy()
    executor = executor_of(model, write({"x": x}, chunk_rows=10))
    sd = torch.full((dim,), (rows + 1) ** -0.5).double()
    each = 0.9 * SOLVED * tol  # of every sd: by itself within what the search leaves
    q = Gaussian(MeanField(), {"loc": torch.from_numpy(x.sum(0) / (rows + 1)), "log_scale": (sd * (1 + each)).log()})
    found, _ = search(model, whole(executor), q, random_noise(dim), tol)
    np.testing.assert_allclose(found.stddev, sd, rtol=SOLVED * tol / dim**0.5)


class _Edge:
    """A local model without a finite Hessian beyond a distance from a point."""

    def __init__(self, local, center, unit, farthest):
        self.local, self.center, self.unit, self.farthest, self.refused = local, center, unit, farthest, 0

    def log_lik(self, eta):
        return self.local.log_lik(eta)

    def hessian(self, eta, weights):
        if float(((weights @ eta - self.center) / self.unit).abs().max()) > self.farthest:
            self.refused += 1
            return self.local.hessian(eta, weights) * math.nan
        return self.local.hessian(eta, weights)

    def grad_errors(self, rule, grads):
        return self.local.grad_errors(rule, grads)


def test_a_step_to_where_there_is_no_curvature_is_shortened(write):
    executor = executor_of(logistic_model(1), write({"x": np.ones((40, 1)), "y": np.arange(40) % 2}, chunk_rows=10))
    q = Gaussian(MeanField(), {"loc": torch.tensor([2.5]).double(), "log_scale": torch.tensor([-2.0]).double()})
    unit, noise = torch.ones(1).double(), grid_noise(1)
    local = _Edge(whole(executor), q.loc, unit, 1.0)
    there, seen = search(executor.model.model, local, q, noise, 0.1)
    assert local.refused
    assert 0.1 < float((q.loc - there.loc).abs()) <= 1.0
    assert seen.elbo > noise.expectations(executor.model.model, local, q).elbo


class _Lying:
    """A local model whose gradient points downhill."""

    def __init__(self, local):
        self.local = local

    def log_lik(self, eta):
        value, grad = self.local.log_lik(eta)
        return value, -grad

    def hessian(self, eta, weights):
        return self.local.hessian(eta, weights)

    def grad_errors(self, rule, grads):
        return self.local.grad_errors(rule, grads)


def test_search_that_cannot_raise_the_elbo_returns_q_itself(write):
    target = targets.linear_regression(num_rows=203)
    executor = executor_of(target.model(), write(target.fields, chunk_rows=48))
    loc = torch.from_numpy(target.optimum("full_rank").loc + 5 * target.optimum("full_rank").sd)
    q = Gaussian(MeanField(), {"loc": loc, "log_scale": torch.from_numpy(np.log(target.optimum("mean_field").sd))})
    assert search(executor.model.model, _Lying(whole(executor)), q, random_noise(5), 0.1)[0] is q
    assert search(executor.model.model, whole(executor), q, random_noise(5), 0.1)[0] is not q


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("distance", [2.0, 20.0])
def test_elbo_never_falls_along_a_search(logistic, monkeypatch, family, distance):
    _, executor = logistic
    local, noise = surrogate(executor, [1, 4], torch.zeros(3).double()), random_noise(3)
    params = {"loc": distance * normal(3, seed=3), "log_scale": torch.zeros(3).double()}
    if family == "full_rank":
        params["lower"] = torch.zeros(3, 3).double()
    places, target = [], Expectations.target

    def record(seen, q):  # wherever the search stops to look around
        if not places or places[-1][0] is not q:
            places.append((q, seen))
        places[-1] = (q, seen)
        return target(seen, q)

    monkeypatch.setattr(Expectations, "target", record)
    prior = executor.model.model
    search(prior, local, Gaussian(FAMILIES[family], params), noise, 0.01)

    def elbos(seen):
        """ELBOs of all the places by the control variate that `seen` has: two with their own cannot be compared."""
        return np.array([noise.expectations(prior, local, q, known=seen).elbo for q, _ in places])

    assert len(places) > 2
    for step, (_, seen) in enumerate(places[:-1]):
        before, after = elbos(seen)[[step, step + 1]]
        assert after >= before - NEGLIGIBLE_NATS
    at_last = elbos(places[-1][1])
    assert at_last[-1] >= max(at_last) - NEGLIGIBLE_NATS
    assert at_last[-1] > at_last[0] + 1


# Low rank --------------------------------------------------------------------------------------------------------


def relative(covariance, like):
    sd = np.sqrt(np.diag(like))
    return np.asarray(covariance) / np.outer(sd, sd)


@pytest.mark.parametrize("rank", [4, 5, 7])
def test_low_rank_of_rank_d_minus_1_or_more_is_full_rank(rank):
    covariance = targets.linear_regression(num_rows=203).covariance
    curvature = Curvature.dense(torch.from_numpy(np.linalg.inv(covariance)))
    q = optimum(LowRank(rank), normal(5), curvature)
    np.testing.assert_allclose(relative(q.covariance_matrix, covariance), relative(covariance, covariance), atol=0.002)
    np.testing.assert_array_equal(q.loc, normal(5))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_finds_a_covariance_of_its_own_form(rank):
    units = torch.tensor([1e-3, 1.0, 50.0, 0.2, 7.0, 1e4, 1.0, 0.03]).double()
    factor = 1.5 * normal(8, rank, seed=rank)
    covariance = units[:, None] * (normal(8, seed=9).square().add(0.3).diag() + factor @ factor.T) * units
    q = optimum(LowRank(rank), normal(8), Curvature.dense(torch.linalg.inv(covariance)))
    np.testing.assert_allclose(relative(q.covariance_matrix, covariance), relative(covariance, covariance), atol=0.002)
