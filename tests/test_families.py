"""Gaussian families: the map and its pullback against the formulas of theory.md, densities against scipy."""

import numpy as np
import pytest
import torch
from scipy import stats

from dadvi.errors import InputError
from dadvi.families import FAMILIES as BY_NAME
from dadvi.families import STORED_FAMILIES, Arrow, FullRank, Gaussian, LowRank, MeanField, check_known, make_family
from dadvi.quadratic import Curvature
from dadvi.structure import Structure

D = 4
FAMILIES = [MeanField(), FullRank(), LowRank(rank=2)]
ids = [family.name for family in FAMILIES]


def params_of(family, dim=D, seed=0):
    rng = np.random.default_rng(seed)
    params = {"loc": rng.standard_normal(dim), "log_scale": rng.uniform(-1.0, 0.5, dim)}
    if isinstance(family, FullRank):
        params["lower"] = rng.standard_normal((dim, dim))  # what stands on and above the diagonal must not count
    if isinstance(family, LowRank):
        params["factor"] = rng.standard_normal((dim, family.rank))
    return {name: torch.from_numpy(value) for name, value in params.items()}


def covariance_of(family, params):
    """Return Σ (D, D) by its definition, with NumPy."""
    scale = np.exp(params["log_scale"].numpy())
    if isinstance(family, FullRank):
        tril = np.tril(params["lower"].numpy(), -1) + np.diag(scale)
        return tril @ tril.T
    covariance = np.diag(scale**2)
    return covariance + (params["factor"] @ params["factor"].T).numpy() if isinstance(family, LowRank) else covariance


def noise_of(family, num_draws=6, dim=D, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((num_draws, family.noise_dim(dim))))


@pytest.fixture(params=FAMILIES, ids=ids)
def family(request):
    return request.param


def test_log_prob_and_entropy_are_those_of_the_normal_with_that_covariance(family):
    params = params_of(family)
    q = Gaussian(family, params)
    reference = stats.multivariate_normal(params["loc"].numpy(), covariance_of(family, params))
    eta = np.random.default_rng(2).standard_normal((7, D)) * 3
    np.testing.assert_allclose(q.log_prob(torch.from_numpy(eta)), reference.logpdf(eta), rtol=1e-12)
    assert q.entropy().item() == pytest.approx(reference.entropy(), rel=1e-12)
    np.testing.assert_allclose(q.covariance_matrix, reference.cov, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(q.stddev, np.sqrt(np.diag(reference.cov)), rtol=1e-12)
    assert q.loc is params["loc"]
    assert q.dim == D


def test_the_map_is_affine_in_the_noise_with_covariance_exactly_that_of_q(family):
    params = params_of(family)
    dim = family.noise_dim(D)
    loc = family.transform(params, torch.zeros(1, dim, dtype=torch.float64))
    torch.testing.assert_close(loc[0], params["loc"], rtol=0, atol=0)
    root = family.transform(params, torch.eye(dim, dtype=torch.float64)) - loc  # rows are the images of unit vectors
    np.testing.assert_allclose(root.T @ root, covariance_of(family, params), rtol=1e-12, atol=1e-13)
    noise = noise_of(family)
    torch.testing.assert_close(family.transform(params, noise), loc + noise @ root, rtol=1e-13, atol=1e-13)


def test_rsample_has_the_moments_of_q(family):
    params = params_of(family)
    num_draws = 20_000
    draws = Gaussian(family, params).rsample(num_draws, np.random.default_rng(3)).numpy()
    covariance = covariance_of(family, params)
    variance = np.diag(covariance)
    error = 4.5  # standard errors, over 4 + 10 comparisons
    assert (np.abs(draws.mean(0) - params["loc"].numpy()) < error * np.sqrt(variance / num_draws)).all()
    spread = np.sqrt((np.outer(variance, variance) + covariance**2) / num_draws)  # of a normal's sample covariance
    assert (np.abs(np.cov(draws.T) - covariance) < error * spread).all()


def test_rsample_is_a_function_of_the_generator(family):
    q = Gaussian(family, params_of(family))
    first, again, other = (q.rsample(3, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def pulled_back(family):
    """Return parameters, noise, gradients at the draws (6, D), and their pull-back, of which the mean's is checked."""
    params, noise = params_of(family), noise_of(family)
    grad = torch.from_numpy(np.random.default_rng(4).standard_normal((6, D)))
    pulled = family.pullback(params, noise, grad)
    np.testing.assert_allclose(pulled["loc"], grad.numpy().sum(0), rtol=1e-13)
    return params, noise, grad, pulled


def test_pullback_mean_field():
    params, noise, grad, pulled = pulled_back(MeanField())
    sigma = np.exp(params["log_scale"].numpy())
    np.testing.assert_allclose(pulled["log_scale"], (grad.numpy() * sigma * noise.numpy()).sum(0), rtol=1e-12)


def test_pullback_full_rank():
    params, noise, grad, pulled = pulled_back(FullRank())
    tril = np.tril(grad.numpy().T @ noise.numpy())  # ∇_L = tril(Σ g εᵀ)
    np.testing.assert_allclose(pulled["lower"], np.tril(tril, -1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(pulled["log_scale"], np.diag(tril) * np.exp(params["log_scale"].numpy()), rtol=1e-12)


def test_pullback_low_rank():
    params, noise, grad, pulled = pulled_back(LowRank(rank=2))
    sigma = np.exp(params["log_scale"].numpy())
    np.testing.assert_allclose(pulled["log_scale"], (grad.numpy() * sigma * noise.numpy()[:, :D]).sum(0), rtol=1e-12)
    np.testing.assert_allclose(pulled["factor"], grad.numpy().T @ noise.numpy()[:, D:], rtol=1e-12)


def test_pullback_leaves_no_graph_behind(family):
    params = {name: value.requires_grad_() for name, value in params_of(family).items()}
    pulled = family.pullback(params, noise_of(family), torch.ones(6, D, dtype=torch.float64))
    assert not any(value.requires_grad for value in pulled.values())
    assert all(value.grad is None for value in params.values())


def test_affine_is_the_distribution_of_shift_plus_scale_times_eta(family):
    params = params_of(family)
    rng = np.random.default_rng(5)
    shift, scale = torch.from_numpy(rng.standard_normal(D)), torch.from_numpy(rng.uniform(0.2, 3.0, D))
    moved = Gaussian(family, family.affine(params, shift, scale))
    np.testing.assert_allclose(moved.loc, shift + scale * params["loc"], rtol=1e-13)
    expected = scale.numpy()[:, None] * covariance_of(family, params) * scale.numpy()
    np.testing.assert_allclose(moved.covariance_matrix, expected, rtol=1e-12, atol=1e-13)
    # draw by draw too: the same noise gives the image of the same draw
    noise = noise_of(family)
    image = shift + scale * family.transform(params, noise)
    torch.testing.assert_close(moved.transform(noise), image, rtol=1e-12, atol=1e-12)


def test_affine_by_a_triangular_matrix():
    family = FullRank()
    assert family.takes_rotation
    params = params_of(family)
    rng = np.random.default_rng(5)
    shift = torch.from_numpy(rng.standard_normal(D))
    scale = torch.from_numpy(np.tril(rng.standard_normal((D, D)), -1) + np.diag(rng.uniform(0.2, 3.0, D)))
    moved = Gaussian(family, family.affine(params, shift, scale))
    expected = scale.numpy() @ covariance_of(family, params) @ scale.numpy().T
    np.testing.assert_allclose(moved.covariance_matrix, expected, rtol=1e-12, atol=1e-13)
    noise = noise_of(family)
    image = shift + family.transform(params, noise) @ scale.T
    torch.testing.assert_close(moved.transform(noise), image, rtol=1e-12, atol=1e-12)


def test_init_is_centred_with_the_scale_asked_for(family):
    loc, scale = torch.arange(D, dtype=torch.float64), torch.tensor([1e-3, 0.1, 1.0, 50.0], dtype=torch.float64)
    params = family.init(loc, scale, np.random.default_rng(0))
    q = Gaussian(family, params)
    torch.testing.assert_close(q.loc, loc)
    # the low-rank factor adds a variance of (0.1 scale)²·χ²(r)/r
    torch.testing.assert_close(q.stddev, scale, rtol=0.05 if isinstance(family, LowRank) else 1e-12, atol=0)
    params["loc"] += 1.0
    assert loc[0] == 0.0  # init copies


def test_low_rank_starts_off_the_saddle_of_a_zero_factor():
    # at F = 0 the factor's pullback of a quadratic's gradient vanishes in expectation, by symmetry
    params = LowRank(rank=3).init(torch.zeros(D).double(), torch.ones(D).double(), np.random.default_rng(0))
    assert (params["factor"] != 0).all()


def test_families_by_name():
    assert make_family("mean_field") == MeanField()
    assert make_family("full_rank") == FullRank()
    assert make_family("low_rank") == LowRank(rank=10)
    assert make_family(LowRank(rank=3)).rank == 3
    with pytest.raises(InputError, match=r"'meanfield'.*'mean_field'.*'full_rank'.*'low_rank'"):
        make_family("meanfield")
    with pytest.raises(InputError, match=r"rank=0.*at least 1"):
        LowRank(rank=0)


# Arrow -------------------------------------------------------------------------------------------------------------

ARROWS = [(4, 1, 2), (3, 2, 3), (0, 0, 4), (5, 1, 0)]
"""J groups, C columns, G dense coordinates."""


@pytest.fixture(params=ARROWS, ids=str)
def arrow(request):
    """A member of the family, and the covariance whose inverse is its arrowhead: from dense linear algebra."""
    num_groups, num_columns, num_dense = request.param
    rng = np.random.default_rng(7)
    dim = num_groups * num_columns + num_dense
    structure = Structure.full(dim)
    if num_groups:
        places = torch.from_numpy(rng.permutation(dim)[: num_groups * num_columns].reshape(num_columns, num_groups))
        structure = Structure.grouped(dim, list(places), rng)
    root = rng.standard_normal((dim, dim))
    precision = structure.from_matrix(torch.from_numpy(root @ root.T)).matrix() + 4 * torch.eye(dim).double()
    units = torch.from_numpy(rng.uniform(0.1, 10, dim))
    precision = precision * (units[:, None] * units)
    q = Arrow.member(torch.from_numpy(rng.standard_normal(dim)), Curvature.of(structure.from_matrix(precision)).factor)
    assert torch.linalg.eigvalsh(precision)[0] > 0
    return q, torch.linalg.inv(precision)


def test_an_arrow_is_the_normal_with_the_covariance_of_its_root(arrow):
    q, covariance = arrow
    scale = (covariance.diagonal()[:, None] * covariance.diagonal()).sqrt()
    np.testing.assert_allclose(q.covariance_matrix / scale, covariance / scale, rtol=0, atol=1e-11)
    np.testing.assert_allclose(q.stddev, covariance.diagonal().sqrt(), rtol=1e-11)
    reference = torch.distributions.MultivariateNormal(q.loc, covariance)
    eta = q.loc + 3 * q.stddev * torch.from_numpy(np.random.default_rng(2).standard_normal((7, q.dim)))
    np.testing.assert_allclose(q.log_prob(eta), reference.log_prob(eta), rtol=1e-10)
    assert float(q.entropy()) == pytest.approx(float(reference.entropy()), rel=1e-10)
    assert q.dim == len(covariance)
    assert q.family.noise_dim(q.dim) == q.dim


def test_draws_of_an_arrow_are_affine_in_the_noise_with_its_covariance(arrow):
    q, covariance = arrow
    unit = torch.eye(q.dim).double()
    image = q.transform(unit) - q.loc
    scale = (covariance.diagonal()[:, None] * covariance.diagonal()).sqrt()
    np.testing.assert_allclose(image.T @ image / scale, covariance / scale, rtol=0, atol=1e-11)
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((6, q.dim)))
    torch.testing.assert_close(q.transform(noise), q.loc + noise @ image, rtol=1e-11, atol=1e-11)
    draws = q.rsample(20_000, np.random.default_rng(3))
    error = (covariance.diagonal()[:, None] * covariance.diagonal() + covariance**2).sqrt() / 20_000**0.5
    assert (np.abs(np.cov(draws.T) - covariance.numpy()) < 4.5 * error.numpy()).all()


def test_affine_of_an_arrow_is_the_distribution_of_shift_plus_scale_times_eta(arrow):
    q, covariance = arrow
    rng = np.random.default_rng(5)
    shift, scale = torch.from_numpy(rng.standard_normal(q.dim)), torch.from_numpy(rng.uniform(0.2, 3.0, q.dim))
    moved = Gaussian(q.family, q.family.affine(q.params, shift, scale))
    torch.testing.assert_close(moved.loc, shift + scale * q.loc)
    torch.testing.assert_close(moved.covariance_matrix, scale[:, None] * covariance * scale, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(moved.stddev, scale * q.stddev)
    assert float(moved.entropy()) == pytest.approx(float(q.entropy() + scale.log().sum()), rel=1e-11)
    noise = torch.from_numpy(rng.standard_normal((6, q.dim)))
    torch.testing.assert_close(moved.transform(noise), shift + scale * q.transform(noise), rtol=1e-10, atol=1e-10)


def test_an_arrow_is_known_and_is_not_for_fitting():
    check_known(Arrow())
    assert STORED_FAMILIES["arrow"] is Arrow
    assert "arrow" not in BY_NAME
    with pytest.raises(InputError, match=r"'arrow'.*linear_response.*'mean_field'"):
        Arrow().init(torch.zeros(2), torch.ones(2), np.random.default_rng(0))
