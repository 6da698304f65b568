"""Curvature and certificate: exact where log π is quadratic, and near the truth, by quadrature, where it is not."""

import numpy as np
import pytest
import scipy.optimize
import targets
import torch
from torch.distributions import Bernoulli, HalfNormal, InverseGamma, Normal

import dadvi
from dadvi import quadratic
from dadvi.binding import bind_to
from dadvi.executors import SerialExecutor
from dadvi.families import FullRank, Gaussian, LowRank, MeanField
from dadvi.quadratic import (
    Certificate,
    Curvature,
    certify,
    curvature_chunks,
    curvature_of,
    diagonal_probes,
    measure_curvature,
    prior_hessian,
    prior_products,
)
from dadvi.quadrature import Rule
from dadvi.structure import Structure

D = 5
FULL = Structure.full(D)


def tensor(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def rotation(dim=D, seed=0):
    return torch.linalg.qr(tensor(dim, dim, seed=seed)).Q


def executor_of(model, data):
    return SerialExecutor(bind_to(model, data), data)


def precision_of(curvature):
    """Return P (D, D) from its root: P = R⁻ᵀ R⁻¹."""
    inverse = torch.linalg.solve_triangular(curvature.root, torch.eye(len(curvature.root)).double(), upper=False)
    return inverse.T @ inverse


@pytest.fixture
def regression():
    return targets.linear_regression(num_rows=203)


@pytest.fixture
def executor(regression, write):
    """203 rows in 9 ragged chunks."""
    return executor_of(regression.model(), write(regression.fields, chunk_rows=24, shard_rows=48))


# Roots -----------------------------------------------------------------------------------------------------------


def with_condition(condition):
    vectors = rotation()
    return (vectors * torch.logspace(0, np.log10(condition), D, dtype=torch.float64)) @ vectors.T


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
def test_root_is_triangular_and_whitens(condition):
    P = with_condition(condition)
    curvature = Curvature.dense(P)
    R = curvature.root
    assert torch.equal(R, R.tril())
    assert (R.diagonal() > 0).all()
    # An eigenvalue is known to eps·condition.
    torch.testing.assert_close(R.T @ P @ R, torch.eye(D).double(), rtol=0, atol=1e-14 * condition + 1e-13)
    torch.testing.assert_close(curvature.precision_diagonal, P.diagonal())
    torch.testing.assert_close(curvature.stddev, torch.linalg.inv(P).diagonal().sqrt(), rtol=1e-7, atol=0)
    v, g = tensor(D, seed=1), tensor(D, seed=2)
    torch.testing.assert_close(curvature.root_times(v), R @ v)
    torch.testing.assert_close(curvature.root_transpose_times(g), R.T @ g)
    torch.testing.assert_close(P @ curvature.solve(g), g, rtol=0, atol=1e-14 * condition + 1e-12)


def test_units_of_the_coordinates_do_not_matter():
    # Sds from 1e-6 to 1e6: a condition number of 1e24, which is one of units only.
    P = with_condition(10.0)
    units = torch.logspace(-6, 6, D, dtype=torch.float64)
    plain, scaled = Curvature.dense(P), Curvature.dense(P * units[:, None] * units)
    torch.testing.assert_close(scaled.root * units[:, None], plain.root)
    torch.testing.assert_close(scaled.precision_diagonal / units.square(), plain.precision_diagonal)


def test_negative_curvature_counts_by_its_absolute_value():
    # [[1, 2], [2, 1]] has eigenvalues 3 and -1 along (1, 1) and (1, -1); with 3 and +1 it is [[2, 1], [1, 2]].
    curvature = Curvature.dense(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64))
    expected = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(precision_of(curvature), expected)
    torch.testing.assert_close(curvature.precision_diagonal, expected.diagonal())
    negative = Curvature.dense(-with_condition(100.0))
    torch.testing.assert_close(precision_of(negative), with_condition(100.0))
    g = tensor(2, seed=3)
    assert g @ curvature.solve(g) > 0  # the step is uphill


def test_a_coordinate_without_curvature_leaves_the_others_as_they_are():
    P = torch.zeros(D, D, dtype=torch.float64)
    P[1:, 1:] = with_condition(10.0)[1:, 1:]
    curvature = Curvature.dense(P)
    assert torch.isfinite(curvature.root).all()
    torch.testing.assert_close(curvature.stddev[1:], torch.linalg.inv(P[1:, 1:]).diagonal().sqrt())
    assert curvature.stddev[0] > 1e4 * curvature.stddev[1:].max()  # nothing is known of it
    assert torch.isfinite(Curvature.dense(torch.zeros(D, D, dtype=torch.float64)).root).all()


def test_probes_find_a_diagonal_hessian_exactly():
    diagonal = torch.tensor([1e-3, 1.0, -4.0, 50.0, 2e5], dtype=torch.float64)
    probes = diagonal_probes(D, seed=0)
    curvature = curvature_of(torch.from_numpy(probes) * diagonal, probes, None)
    assert curvature.structure.groups.shape == (D, 1)
    assert not curvature.is_full
    torch.testing.assert_close(curvature.precision_diagonal, diagonal.abs())
    v = tensor(D)
    torch.testing.assert_close(curvature.root_times(v), v / diagonal.abs().sqrt())
    torch.testing.assert_close(curvature.root_transpose_times(v), v / diagonal.abs().sqrt())


def test_probes_estimate_a_diagonal_without_bias():
    # A probe's error is Σ_{j≠i} H_ij v_i v_j, of variance Σ_{j≠i} H_ij²; 40 seeds of 32 probes each.
    H = with_condition(100.0)
    probes = [diagonal_probes(D, seed) for seed in range(40)]
    found = torch.stack([curvature_of(torch.from_numpy(v) @ H, v, None).precision_diagonal for v in probes])
    error = ((H.square().sum(1) - H.diagonal().square()) / (40 * quadratic.DIAGONAL_PROBES)).sqrt()
    assert ((found.mean(0) - H.diagonal()).abs() < 4 * error).all()


# Measured on data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_points", [1, 3])
def test_curvature_of_a_gaussian_target_is_its_precision(executor, regression, num_points):
    eta = tensor(num_points, D)
    curvature = measure_curvature(executor, eta, range(9), 0, FULL)
    precision = torch.linalg.inv(torch.from_numpy(regression.covariance))
    torch.testing.assert_close(precision_of(curvature), precision, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(curvature.precision_diagonal, precision.diagonal(), rtol=1e-10, atol=0)


def test_curvature_of_a_sample_of_chunks_is_unbiased(executor, regression):
    # Every single chunk in turn: scaled by C/m = 9 each, with the prior once in each, they average to the precision.
    parts = [precision_of(measure_curvature(executor, tensor(1, D), [chunk], 0, FULL)) for chunk in range(9)]
    precision = torch.linalg.inv(torch.from_numpy(regression.covariance))
    torch.testing.assert_close(torch.stack(parts).mean(0), precision, rtol=1e-9, atol=1e-7)


def test_curvature_of_the_prior_enters_once_and_at_its_own_points(write):
    # A likelihood that is flat in η: what is left is the prior, at the mean over prior_eta of its Hessian.
    data = write({"x": np.zeros(30)}, chunk_rows=8, shard_rows=16)
    model = dadvi.Model(prior={"s": InverseGamma(torch.tensor(2.0), torch.tensor(3.0))}, log_likelihood=lambda x, s: x)
    executor = executor_of(model, data)
    eta, prior_eta = torch.zeros(1, 1).double(), torch.tensor([[0.2], [1.1]]).double()
    # log p(e^η) + η = -2 η - 3 e^-η + const: minus the second derivative is 3 e^-η.
    for points, at in [(None, eta), (prior_eta, prior_eta)]:
        curvature = measure_curvature(executor, eta, [0, 2], 0, Structure.full(1), points)
        torch.testing.assert_close(curvature.precision_diagonal, 3 * (-at).exp().mean(0))


def test_prior_products_are_those_of_the_hessian():
    model = dadvi.Model(
        prior={"tau": HalfNormal(torch.tensor(1.0)), "beta": lambda tau: Normal(torch.zeros(3), tau)},
        log_likelihood=lambda beta, x: x,
    )
    eta, tangents = tensor(2, 4, seed=1), tensor(3, 4, seed=2)
    weights = torch.tensor([0.3, 0.9], dtype=torch.float64)
    hessians = [torch.autograd.functional.hessian(lambda e: model.log_prior(e[None])[0], point) for point in eta]
    hessian = 0.3 * hessians[0] + 0.9 * hessians[1]
    torch.testing.assert_close(prior_products(model, Rule(eta, weights), tangents.numpy()), tangents @ hessian)
    for structure in (Structure.full(4), grouped_effects()):
        torch.testing.assert_close(prior_hessian(model, Rule(eta, weights), structure).matrix(), hessian)


def grouped_effects():
    """The structure of tau, which is dense, and of three effects, each a group."""
    return Structure.grouped(4, [torch.arange(1, 4)], np.random.default_rng(0))


def test_products_of_a_prior_without_curvature_are_zero():
    for support in (torch.distributions.constraints.real, torch.distributions.constraints.positive):
        model = dadvi.Model(prior={"z": dadvi.Flat(3, support)}, log_likelihood=lambda z, x: x)
        assert torch.equal(prior_products(model, Rule.equal(tensor(2, 3)), np.eye(3)), torch.zeros(3, 3).double())


def test_curvature_is_measured_within_its_budget(executor, monkeypatch):
    manifest = executor.data.manifest
    assert list(curvature_chunks(manifest, FULL, seed=0)) == list(range(9))
    monkeypatch.setattr(quadratic, "CURVATURE_WORK", 3 * 24 * D)  # three chunks' rows times D tangents
    chosen = [list(curvature_chunks(manifest, FULL, seed)) for seed in (0, 0, 1, 2)]
    assert all(len(set(chunks)) == 3 for chunks in chosen)
    assert chosen[0] == chosen[1]
    assert len({tuple(chunks) for chunks in chosen}) > 1
    monkeypatch.setattr(quadratic, "CURVATURE_WORK", 1.0)
    assert len(curvature_chunks(manifest, FULL, seed=0)) == 1
    # As many tangents as the structure has: two for scalar effects of groups and a slope, 32 without a structure.
    monkeypatch.setattr(quadratic, "CURVATURE_WORK", 64 * 24)
    effects = Structure.grouped(10_001, [torch.arange(10_000)], np.random.default_rng(0))
    monkeypatch.setattr(quadratic, "DIAGONAL_PROBES", 32)
    assert len(curvature_chunks(manifest, effects, seed=0)) == 9
    assert len(curvature_chunks(manifest, None, seed=0)) == 2


# Certificates ----------------------------------------------------------------------------------------------------


def member(family, loc, root):
    """The member with mean loc and the covariance of root (mean field: its diagonal alone)."""
    params = {"loc": loc, "log_scale": root.diagonal().log()}
    if isinstance(family, FullRank):
        params["lower"] = root.tril(-1)
    if isinstance(family, LowRank):
        params["factor"] = 0.3 * tensor(len(loc), family.rank, seed=11) * root.diagonal().mean()
    return Gaussian(family, params)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", [MeanField(), FullRank(), LowRank(rank=2)], ids=lambda family: family.name)
def test_certificate_is_the_true_distance_on_a_gaussian_target(executor, regression, family, seed):
    # Any displacement, any wrong covariance: the mean gradient of a quadratic needs no more than mean-zero draws.
    loc, sd = (torch.from_numpy(each) for each in regression.optimum("full_rank"))
    root = (0.5 * tensor(D, D, seed=seed).tril(-1) + tensor(D, seed=seed + 10).exp().diag()) * sd.mean()
    away = 3 * tensor(D, seed=seed + 20) * sd
    q = member(family, loc + away, root)
    certificate, _, curvature = certify(executor, q, seed, FULL)
    torch.testing.assert_close(curvature.stddev, sd, rtol=1e-9, atol=0)
    assert certificate.max == pytest.approx(float((away / sd).abs().max()), rel=1e-9)
    assert certificate.rms == pytest.approx(float((away / sd).square().mean().sqrt()), rel=1e-9)
    if isinstance(family, LowRank):
        assert np.isnan(certificate.sd_error)
    else:
        optimum = torch.from_numpy(regression.optimum(family.name).sd)
        assert certificate.sd_error == pytest.approx(float((q.stddev / optimum - 1).abs().max()), rel=1e-9)


@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
def test_certificate_is_zero_at_the_optimum(executor, regression, family):
    loc, sd = (torch.from_numpy(each) for each in regression.optimum(family))
    root = torch.linalg.cholesky(torch.from_numpy(regression.covariance)) if family == "full_rank" else sd.diag()
    certificate, _, _ = certify(executor, member(dadvi.families.make_family(family), loc, root), 0, FULL)
    assert max(certificate.max, certificate.rms, certificate.sd_error) < 1e-8
    assert certificate.within(1e-8)


def test_within_asks_for_means_and_for_sds_where_they_are_known():
    assert Certificate(0.09, 0.05, 0.09).within(0.1)
    assert not Certificate(0.11, 0.05, 0.0).within(0.1)
    assert not Certificate(0.09, 0.05, 0.11).within(0.1)
    assert Certificate(0.09, 0.05, np.nan).within(0.1)  # low rank: sds are not judged
    assert not Certificate(np.nan, np.nan, 0.0).within(0.1)


def test_elbo_of_the_certificate_is_the_log_evidence_at_the_posterior(write):
    # At q = posterior log π − log q is constant. The certificate takes the entropy in closed form, which leaves the
    # noise of −½ε² over 8 independent pairs: a variance of ½/8 a seed, over 40 seeds.
    target = targets.normal_normal(num_rows=100)
    executor = executor_of(target.model(), write(target.fields, chunk_rows=16, shard_rows=32))
    loc, sd = (torch.from_numpy(each) for each in target.optimum("full_rank"))
    one = Structure.full(1)
    elbos = [certify(executor, member(MeanField(), loc, sd.diag()), seed, one)[1] for seed in range(40)]
    error = (0.5 / 8 / 40) ** 0.5
    assert np.std(elbos) < 2 * (0.5 / 8) ** 0.5
    assert abs(np.mean(elbos) - target.log_evidence) < 4 * error
    away = [certify(executor, member(MeanField(), loc + 2 * sd, sd.diag()), seed, one)[1] for seed in range(40)]
    assert abs(np.mean(away) - (target.log_evidence - 2.0)) < 4 * error  # KL(q‖posterior) = δ²/2


@pytest.fixture(scope="module")
def logistic(tmp_path_factory):
    """A logistic regression of 800 rows, and the mean-field optimum by quadrature along each row's x·β."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((800, 3)) * [1.0, 0.5, 2.0]
    x[:, 1] += 0.8 * x[:, 0]
    y = (rng.random(800) < 1 / (1 + np.exp(-x @ [0.5, -1.0, 0.3]))).astype(float)
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    X, Y = torch.from_numpy(x), torch.from_numpy(y)

    def negative_elbo(theta):
        theta = torch.tensor(theta, requires_grad=True)
        loc, log_scale = theta.split(3)
        spread = (X.square() @ (2 * log_scale).exp()).sqrt()
        logits = (X @ loc)[:, None] + spread[:, None] * nodes
        log_lik = -torch.nn.functional.softplus((1 - 2 * Y[:, None]) * logits)
        prior = -0.5 * (loc.square() + (2 * log_scale).exp()).sum()
        loss = -((log_lik @ weights).sum() + prior + log_scale.sum())
        (grad,) = torch.autograd.grad(loss, theta)
        return loss.item(), grad.numpy()

    solution = scipy.optimize.minimize(negative_elbo, np.zeros(6), jac=True, method="BFGS", options={"gtol": 1e-8})
    assert np.abs(solution.jac).max() < 1e-4
    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(3), 1.0)},
        likelihood=lambda beta, x: Bernoulli(logits=x @ beta),
        observed="y",
    )
    path = tmp_path_factory.mktemp("logistic") / "d.zarr"
    executor = executor_of(model, dadvi.write_shards(path, {"x": x, "y": y}, chunk_rows=64))
    return executor, torch.from_numpy(solution.x[:3]), torch.from_numpy(solution.x[3:]).exp()


@pytest.mark.parametrize("seed", range(4))
def test_certificate_of_a_logistic_regression_is_near_the_true_distance(logistic, seed):
    executor, loc, sd = logistic
    full = Structure.full(3)
    at_optimum, _, _ = certify(executor, member(MeanField(), loc, sd.diag()), seed, full)
    assert at_optimum.max < 0.07  # the noise that cubic terms leave in 8 pairs of draws
    assert at_optimum.sd_error < 0.05  # curvature at one pair of draws
    posterior_sd = measure_curvature(executor, loc[None], range(executor.data.manifest.num_chunks), 0, full).stddev
    away = 0.3 * posterior_sd * tensor(3, seed=seed).sign()
    certificate, _, _ = certify(executor, member(MeanField(), loc + away, 1.2 * sd.diag()), seed, full)
    assert 0.3 / 1.3 < certificate.max < 0.3 * 1.3
    assert 0.3 / 1.3 < certificate.rms < 0.3 * 1.3
    assert 0.2 / 1.3 < certificate.sd_error < 0.2 * 1.3


def test_without_a_structure_there_is_an_elbo_but_no_certificate(executor, regression):
    loc, sd = (torch.from_numpy(each) for each in regression.optimum("mean_field"))
    q = member(MeanField(), loc, sd.diag())
    _, elbo, _ = certify(executor, q, 0, FULL)
    assert certify(executor, q, 0, None) == (None, elbo, None)


def test_a_certificate_is_a_function_of_the_seed(executor, regression):
    loc, sd = (torch.from_numpy(each) for each in regression.optimum("mean_field"))
    q = member(LowRank(rank=2), loc, sd.diag())
    assert certify(executor, q, 0, FULL)[1] == certify(executor, q, 0, FULL)[1] != certify(executor, q, 1, FULL)[1]
