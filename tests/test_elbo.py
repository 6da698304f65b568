"""The ELBO and its gradient: finite differences, exact identities at the posterior and elsewhere, designs of draws."""

import itertools
from functools import cache

import numpy as np
import pytest
import targets
import torch
from scipy import stats
from torch.distributions import Bernoulli, HalfNormal, Independent, MultivariateNormal, Normal, kl_divergence

import dadvi
from dadvi.binding import bind
from dadvi.elbo import draw_noise, estimate, log_joint
from dadvi.errors import InputError
from dadvi.families import FullRank, LowRank, MeanField

FAMILIES = [MeanField(), FullRank(), LowRank(rank=2)]
ESTIMATORS = ["closed_form", "stl", "monte_carlo"]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def joint_of(model, fields):
    """Return the function η (K, D) → log π (K,), ∇ log π (K, D) on all rows, put together as a fit does."""
    batch = {name: torch.from_numpy(np.asarray(values)) for name, values in fields.items()}
    bound = bind(model, {name: values.dtype for name, values in batch.items()}, [(0, batch)])

    def joint(eta):
        leaf = eta.detach().requires_grad_()
        log_lik = bound.log_lik(leaf, batch)
        (grad,) = torch.autograd.grad(log_lik.sum(), leaf)
        return log_joint(model, eta, log_lik.detach(), grad)

    return joint


@cache
def hierarchical_logistic():
    """A posterior that is far from Gaussian, D = 4, from 25 rows."""
    rng = np.random.default_rng(0)
    model = dadvi.Model(
        prior={"tau": HalfNormal(1.0), "b": lambda tau: Normal(torch.zeros(3), tau)},
        likelihood=lambda b, x: Bernoulli(logits=x @ b),
        observed="y",
    )
    return joint_of(model, {"x": rng.standard_normal((25, 3)), "y": rng.random(25) < 0.4})


def params_of(family, dim, seed=0):
    rng = np.random.default_rng(seed)
    params = {"loc": 0.3 * rng.standard_normal(dim), "log_scale": rng.uniform(-1.5, -0.5, dim)}
    if isinstance(family, FullRank):
        params["lower"] = np.tril(0.3 * rng.standard_normal((dim, dim)), -1)
    if isinstance(family, LowRank):
        params["factor"] = 0.3 * rng.standard_normal((dim, family.rank))
    return {name: torch.from_numpy(value) for name, value in params.items()}


def noise_of(family, num_draws, dim, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((num_draws, family.noise_dim(dim))))


def at(joint, family, params, noise, entropy="closed_form"):
    return estimate(family, params, noise, *joint(family.transform(params, noise)), entropy)


# --- gradients


@each_family
@pytest.mark.parametrize("entropy", ["closed_form", "monte_carlo"])
def test_gradient_is_that_of_the_estimate_at_fixed_noise(family, entropy):
    joint, params = hierarchical_logistic(), params_of(family, 4)
    noise = noise_of(family, 5, 4)
    seen = at(joint, family, params, noise, entropy).grad
    step = 1e-5  # central differences: truncation about 1e-10, rounding about 1e-11·|ELBO|
    assert list(seen) == list(params)
    for name, value in params.items():
        expected = torch.zeros_like(value)
        for index in itertools.product(*map(range, value.shape)):
            sides = []
            for sign in (1, -1):
                moved = {**params, name: value.clone()}
                moved[name][index] += sign * step
                sides.append(at(joint, family, moved, noise, entropy).elbo)
            expected[index] = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(seen[name], expected, rtol=1e-6, atol=2e-8)


@each_family
@pytest.mark.parametrize("entropy", ["stl", "monte_carlo"])
def test_entropy_estimators_have_the_gradient_of_the_entropy_in_expectation(family, entropy):
    params = params_of(family, 4)
    exact = at(hierarchical_logistic(), family, params, noise_of(family, 2, 4))
    blocks, draws = 60, 200
    noise = noise_of(family, blocks * draws, 4)
    zeros = torch.zeros(draws), torch.zeros(draws, 4, dtype=torch.float64)
    seen = [estimate(family, params, part, *zeros, entropy) for part in noise.split(draws)]
    for name in params:
        samples = torch.stack([each.entropy_grad[name] for each in seen])
        error = samples.std(0) / blocks**0.5
        assert ((samples.mean(0) - exact.entropy_grad[name]).abs() <= 4.5 * error + 1e-12).all(), name
        assert (error < 0.05).all()  # sharp enough to tell a wrong formula
    elbo = torch.tensor([each.elbo for each in seen], dtype=torch.float64)
    assert abs(elbo.mean() - family.entropy(params)) <= 4.5 * elbo.std() / blocks**0.5


@each_family
def test_energy_gradient_does_not_depend_on_the_entropy_estimator(family):
    joint, params, noise = hierarchical_logistic(), params_of(family, 4), noise_of(family, 5, 4)
    first, *others = (at(joint, family, params, noise, entropy) for entropy in ESTIMATORS)
    for other in others:
        for name in params:
            assert torch.equal(first.energy_grad[name], other.energy_grad[name])


# --- at the exact posterior


@cache
def regression():
    target = targets.linear_regression(num_rows=60)
    return target, joint_of(target.model(), target.fields)


@cache
def diagonal():
    """Three means of independent normals: a Gaussian posterior with a diagonal covariance. Returns joint, mean, sd."""
    x = np.random.default_rng(0).normal([1.0, -2.0, 0.0], [0.1, 1.0, 5.0], (50, 3))
    noise_sd, prior_sd = np.array([0.1, 1.0, 5.0]), 2.0
    model = dadvi.Model(
        prior={"mu": Normal(torch.zeros(3), prior_sd)},
        likelihood=lambda mu, x: Independent(Normal(mu.expand_as(x), torch.from_numpy(noise_sd)), 1),
        observed="x",
    )
    precision = 50 / noise_sd**2 + 1 / prior_sd**2
    return (
        joint_of(model, {"x": x}),
        torch.from_numpy(x.sum(0) / noise_sd**2 / precision),
        torch.from_numpy(precision**-0.5),
    )


def exact_params(family):
    """Return log π and the parameters at which the family holds its posterior exactly."""
    if isinstance(family, MeanField):
        joint, loc, sd = diagonal()
        return joint, {"loc": loc, "log_scale": sd.log()}
    target, joint = regression()
    loc, covariance = torch.from_numpy(target.optimum("full_rank").loc), torch.from_numpy(target.covariance)
    if isinstance(family, FullRank):
        tril = torch.linalg.cholesky(covariance)
        return joint, {"loc": loc, "log_scale": tril.diagonal().log(), "lower": tril.tril(-1)}
    values, vectors = torch.linalg.eigh(covariance)  # Σ = λ_min I + FFᵀ
    factor = vectors[:, 1:] * (values[1:] - values[0]).sqrt()
    return joint, {"loc": loc, "log_scale": 0.5 * values[:1].log().expand(5), "factor": factor}


EXACT = [MeanField(), FullRank(), LowRank(rank=4)]


@pytest.mark.parametrize("family", EXACT, ids=lambda family: family.name)
def test_path_derivative_is_zero_at_the_posterior_for_every_draw(family):
    joint, params = exact_params(family)
    for seed in range(10):
        noise = noise_of(family, 1, len(params["loc"]), seed)
        est = at(joint, family, params, noise, "stl")
        for name, grad in est.grad.items():
            assert grad.abs().max() <= 1e-10 * est.energy_grad[name].abs().max(), name
            assert est.energy_grad[name].abs().max() > 0.01  # the two parts cancel, neither is zero
        # the other estimators are zero in expectation only
        assert at(joint, family, params, noise, "closed_form").grad["loc"].abs().max() > 0.01


@pytest.mark.parametrize("family", EXACT, ids=lambda family: family.name)
@pytest.mark.parametrize("entropy", ["stl", "monte_carlo"])
def test_elbo_of_every_draw_is_the_log_evidence_at_the_posterior(family, entropy):
    joint, params = exact_params(family)
    seen = [at(joint, family, params, noise_of(family, 1, len(params["loc"]), seed), entropy).elbo for seed in range(5)]
    assert seen == pytest.approx([seen[0]] * 5, rel=1e-11)
    if not isinstance(family, MeanField):
        assert seen[0] == pytest.approx(regression()[0].log_evidence, rel=1e-11)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("entropy", ESTIMATORS)
def test_elbo_is_the_log_evidence_less_the_divergence_from_the_posterior(family, entropy):
    # log π is quadratic, so 2·dim orthogonal fixed draws give its expectation exactly: an identity, whatever q is.
    target, joint = regression()
    params = params_of(family, 5)
    dim = family.noise_dim(5)
    noise = draw_noise("orthogonal", 2 * dim, dim, np.random.default_rng(0), fixed=True)
    q = MultivariateNormal(params["loc"], family.distribution(params).variance.diag())
    if not isinstance(family, MeanField):
        q = MultivariateNormal(params["loc"], family.distribution(params).covariance_matrix)
    posterior = MultivariateNormal(
        torch.from_numpy(target.optimum("full_rank").loc), torch.from_numpy(target.covariance)
    )
    expected = target.log_evidence - kl_divergence(q, posterior).item()
    assert at(joint, family, params, noise, entropy).elbo == pytest.approx(expected, rel=1e-11)


# --- the parts of log π: the slips of theory.md, section 1


def test_log_joint_is_the_prior_once_plus_the_log_det_plus_the_likelihood():
    target = targets.poisson_gamma(num_rows=30)
    joint = joint_of(target.model(), target.fields)
    eta = torch.tensor([[-2.0], [-0.7], [0.9]], dtype=torch.float64)
    value, grad = joint(eta)
    y, exposure = target.fields["y"], target.fields["exposure"]
    rate = np.exp(eta[:, 0].numpy())
    expected = [
        stats.poisson.logpmf(y, r * exposure).sum() + stats.gamma.logpdf(r, 2, scale=1 / 4) + np.log(r) for r in rate
    ]
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    # a + ∂η of the log-det, less b·rate: Gamma(2, 4) prior, Poisson counts
    slope = (2 - 1 + y.sum() + 1) - (4 + exposure.sum()) * rate
    np.testing.assert_allclose(grad[:, 0], slope, rtol=1e-12)


def test_log_joint_scales_nothing():
    # Doubling the sums over rows doubles them alone: prior and log-det stay what they are.
    model = targets.inverse_gamma_normal(num_rows=5).model()
    eta = torch.tensor([[0.3, -1.0], [1.0, 2.0]], dtype=torch.float64)
    log_lik, grad = torch.tensor([-3.0, 5.0]).double(), torch.arange(4.0).reshape(2, 2).double()
    nothing = log_joint(model, eta, torch.zeros(2), torch.zeros(2, 2))
    for factor in (1, 2):
        value, total = log_joint(model, eta, factor * log_lik, factor * grad)
        torch.testing.assert_close(value - nothing[0], factor * log_lik, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(total - nothing[1], factor * grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(nothing[0], model.log_prior(eta))


def test_log_joint_of_a_flat_prior():
    model = dadvi.Model({"b": dadvi.Flat(2)}, lambda b: Normal(b[0], 1.0), "y")
    value, grad = log_joint(model, torch.zeros(3, 2).double(), torch.ones(3).double(), torch.ones(3, 2).double())
    assert value.tolist() == [1.0] * 3
    assert grad.tolist() == [[1.0, 1.0]] * 3


def test_elbo_is_the_same_in_constrained_space():
    # The entropy is not invariant under the change of variables; the log-det in log π is exactly the difference.
    target = targets.poisson_gamma(num_rows=30)
    joint, family = joint_of(target.model(), target.fields), MeanField()
    params = {"loc": torch.tensor([-0.4]).double(), "log_scale": torch.tensor([-1.0]).double()}
    noise = noise_of(family, 6, 1)
    y, exposure = target.fields["y"], target.fields["exposure"]
    z = np.exp(family.transform(params, noise).numpy()[:, 0])
    joint_z = [stats.poisson.logpmf(y, r * exposure).sum() + stats.gamma.logpdf(r, 2, scale=1 / 4) for r in z]
    q_z = stats.lognorm(s=np.exp(-1.0), scale=np.exp(params["loc"].item()))
    expected = np.mean(joint_z - q_z.logpdf(z))
    assert at(joint, family, params, noise, "monte_carlo").elbo == pytest.approx(expected, rel=1e-12)


# --- draws


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("design", ["antithetic", "orthogonal"])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("num_draws", "dim"), [(2, 3), (8, 3), (20, 3), (6, 1)])
def test_pairs_cancel_exactly(design, fixed, num_draws, dim):
    noise = draw_noise(design, num_draws, dim, rng(), fixed=fixed)
    assert noise.shape == (num_draws, dim)
    assert noise.dtype == torch.float64
    assert torch.equal(noise[: num_draws // 2], -noise[num_draws // 2 :])
    assert noise.abs().min() > 0


@pytest.mark.parametrize("dim", [1, 2, 7])
@pytest.mark.parametrize("blocks", [1, 3])
def test_orthogonal_fixed_draws_have_covariance_exactly_one(dim, blocks):
    noise = draw_noise("orthogonal", 2 * dim * blocks, dim, rng(), fixed=True)
    covariance = noise.T @ noise / len(noise)
    torch.testing.assert_close(covariance, torch.eye(dim).double(), rtol=0, atol=1e-13)


def test_orthogonal_draws_are_orthogonal_within_a_block_and_partial_blocks_are_cut():
    noise = draw_noise("orthogonal", 6, 5, rng(), fixed=True)[:3]
    torch.testing.assert_close(noise @ noise.T, 5 * torch.eye(3).double(), rtol=0, atol=1e-12)
    first, second = draw_noise("orthogonal", 20, 5, rng(), fixed=True)[:10].split(5)
    assert not torch.allclose(first, second)  # every block is rotated anew


def test_fresh_orthogonal_draws_are_standard_normal_one_by_one():
    dim, repeats = 3, 4_000
    generator = rng(7)
    noise = torch.stack([draw_noise("orthogonal", 2 * dim, dim, generator) for _ in range(repeats)])  # (R, K, D)
    x, z = noise[..., 0], noise[..., 1]
    # blocks are independent, draws within one are not; pairs make odd moments zero
    for statistic, expected in ((x**2, 1.0), (x**4, 3.0), (x * z, 0.0), (x**2 * z**2, 1.0), (x**3 * z, 0.0)):
        means = statistic.mean(1)
        assert abs(means.mean() - expected) <= 4.5 * means.std() / repeats**0.5
    for draw in range(2 * dim):
        assert stats.kstest(noise[:, draw, draw % dim], "norm").pvalue > 1e-4


def test_random_draws_are_standard_normal():
    noise = draw_noise("random", 30_000, 2, rng())
    assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-4
    assert abs((noise[:, 0] * noise[:, 1]).mean()) < 4.5 / 30_000**0.5


def test_refusals_of_designs():
    for design in ("antithetic", "orthogonal"):
        with pytest.raises(InputError, match=f"num_draws=5.*'{design}'.*even"):
            draw_noise(design, 5, 3, rng())
    with pytest.raises(InputError, match=r"num_draws=0.*at least 1"):
        draw_noise("random", 0, 3, rng())
    with pytest.raises(InputError, match="num_draws=0"):
        draw_noise("antithetic", 0, 3, rng())
    with pytest.raises(InputError, match=r"'sobol'.*'random', 'antithetic', 'orthogonal'"):
        draw_noise("sobol", 4, 3, rng())
