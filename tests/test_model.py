"""The model: prior densities in R^D against hand computation, where a fit starts, and what is refused."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Cauchy,
    Dirichlet,
    Gamma,
    HalfNormal,
    Independent,
    InverseGamma,
    LKJCholesky,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    Poisson,
    StudentT,
    TransformedDistribution,
    Uniform,
    constraints,
)
from torch.distributions.transforms import AffineTransform

import dadvi
from dadvi.errors import ModelError


def model_of(prior, **options):
    return dadvi.Model(prior, log_likelihood=lambda x: x, **options)


def points(model, num_draws=5, seed=0):
    return model.start + torch.from_numpy(np.random.default_rng(seed).standard_normal((num_draws, model.dim)))


def refused(prior, *parts, **options):
    with pytest.raises(ModelError) as caught:
        model_of(prior, **options)
    for part in parts:
        assert part in str(caught.value)


# --- the density


HIERARCHY = {
    "tau": HalfNormal(1.5),
    "p": Beta(torch.tensor(2.0), torch.tensor(3.5)),
    "beta": lambda tau: Normal(torch.zeros(3, dtype=torch.float64), tau),
    "gamma": lambda beta, tau: StudentT(4.0, beta[:2], tau + 1),
}


def test_log_prior_is_the_density_of_the_latents_plus_the_log_det_once():
    model = model_of(HIERARCHY)
    assert model.space.names == ("tau", "p", "beta[0]", "beta[1]", "beta[2]", "gamma[0]", "gamma[1]")
    eta = points(model)
    for value, x in zip(model.log_prior(eta).tolist(), eta.numpy(), strict=True):
        tau, p, beta, gamma = np.exp(x[0]), 1 / (1 + np.exp(-x[1])), x[2:5], x[5:]
        expected = stats.halfnorm.logpdf(tau, scale=1.5) + x[0]
        expected += stats.beta.logpdf(p, 2, 3.5) + np.log(p * (1 - p))
        expected += stats.norm.logpdf(beta, 0, tau).sum()
        expected += stats.t.logpdf(gamma, 4, beta[:2], tau + 1).sum()
        assert value == pytest.approx(expected, rel=1e-12)


# A prior's function that vmap cannot run: its branch depends on the value of a latent.
BRANCHING = {"tau": HalfNormal(1.0), "beta": lambda tau: Normal(torch.zeros(2), tau if tau > 1 else 2 * tau)}


@pytest.mark.parametrize("prior", [HIERARCHY, BRANCHING], ids=["vmap", "loop"])
def test_draws_at_once_equal_draws_one_by_one(prior):
    model = model_of(prior)
    eta = points(model, 7).requires_grad_()
    together = model.log_prior(eta)
    one_by_one = torch.cat([model.log_prior(eta[k : k + 1]) for k in range(7)])
    torch.testing.assert_close(together, one_by_one, rtol=1e-13, atol=1e-13)
    grads = [torch.autograd.grad(value.sum(), eta)[0] for value in (together, one_by_one)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_branching_prior_takes_the_branch_of_each_draw():
    model = model_of(BRANCHING)
    eta = torch.tensor([[np.log(3.0), 1.0, 2.0], [np.log(0.5), 1.0, 2.0]])
    for value, sd, x in zip(model.log_prior(eta).tolist(), [3.0, 1.0], eta.numpy(), strict=True):
        expected = stats.halfnorm.logpdf(np.exp(x[0])) + x[0] + stats.norm.logpdf(x[1:], 0, sd).sum()
        assert value == pytest.approx(expected, rel=1e-12)


def single(value):
    return torch.tensor(value, dtype=torch.float32)


mean, scale = float(single(0.1)), float(single(0.3))  # float32's 0.1 and 0.3, in float64
FLOAT32 = {
    "normal": (lambda: Normal(single(0.1), single(0.3)), lambda z: stats.norm.logpdf(z, mean, scale)),
    "log_normal": (
        lambda: LogNormal(single(0.1), single(0.3)),
        lambda z: stats.lognorm.logpdf(z, scale, 0, np.exp(mean)),
    ),
    "inverse_gamma": (
        lambda: InverseGamma(single(0.3), single(0.1)),
        lambda z: stats.invgamma.logpdf(z, scale, 0, mean),
    ),
    "independent": (
        lambda: Independent(Normal(single([0.1]), single([0.3])), 1),
        lambda z: stats.norm.logpdf(z, mean, scale),
    ),
    "affine": (
        lambda: TransformedDistribution(Normal(single(0.0), single(1.0)), AffineTransform(single(0.1), single(0.3))),
        lambda z: stats.norm.logpdf(z, mean, scale),
    ),
    "constrained": (
        lambda: dadvi.Constrained(Normal(single(0.1), single(0.3)), constraints.positive),
        lambda z: stats.norm.logpdf(z, mean, scale),
    ),
    "mixture": (
        lambda: MixtureSameFamily(
            Categorical(logits=single([0.0, 0.0])), Normal(single([0.1, 0.1]), single([0.3, 0.3]))
        ),
        lambda z: stats.norm.logpdf(z, mean, scale),
    ),
}


@pytest.mark.parametrize("through_function", [False, True], ids=["distribution", "function"])
@pytest.mark.parametrize("name", FLOAT32)
def test_priors_given_in_float32_are_scored_in_float64(name, through_function):
    make, log_density = FLOAT32[name]
    model = model_of({"tau": HalfNormal(1.0), "z": (lambda tau: make()) if through_function else make()})
    eta = points(model)
    tau = eta[:, 0].exp()
    latents, log_det = model.space.constrain(eta)
    expected = stats.halfnorm.logpdf(tau) + log_density(latents["z"].reshape(-1).numpy()) + log_det.numpy()
    assert model.log_prior(eta).dtype == torch.float64
    np.testing.assert_allclose(model.log_prior(eta).numpy(), expected, rtol=1e-11)


def test_scoring_leaves_the_users_distribution_alone():
    prior = Normal(single(0.1), single(0.3))
    model_of({"z": prior}).log_prior(torch.zeros(1, 1, dtype=torch.float64))
    assert prior.loc.dtype == prior.scale.dtype == torch.float32


def test_flat_prior_adds_the_log_det_alone():
    model = model_of({"a": dadvi.Flat((2,), constraints.positive), "b": dadvi.Flat()})
    eta = points(model)
    torch.testing.assert_close(model.log_prior(eta), eta[:, :2].sum(1))


def test_ordered_prior():
    model = model_of({"cuts": dadvi.Constrained(Normal(torch.zeros(3), 2.0), dadvi.ordered)})
    eta = points(model)
    latents, log_det = model.space.constrain(eta)
    cuts = latents["cuts"].numpy()
    assert (np.diff(cuts) > 0).all()
    np.testing.assert_allclose(model.log_prior(eta), stats.norm.logpdf(cuts, 0, 2).sum(1) + log_det.numpy(), rtol=1e-12)


def test_arguments_with_defaults_are_constants_unless_they_name_a_latent():
    model = model_of({"tau": HalfNormal(1.0), "beta": lambda tau, size=3: Normal(torch.zeros(size), tau)})
    assert model.dim == 4
    named = model_of({"tau": HalfNormal(1.0), "beta": lambda tau=9.0: Normal(0.0, tau)})
    eta = points(named)
    expected = model_of({"tau": HalfNormal(1.0), "beta": lambda tau: Normal(0.0, tau)}).log_prior(eta)
    torch.testing.assert_close(named.log_prior(eta), expected)


# --- the start


@pytest.mark.parametrize(
    ("prior", "start"),
    [
        (Normal(torch.tensor([3.0, -2.0]), 1.0), [3.0, -2.0]),
        (Gamma(torch.tensor(6.0), torch.tensor(2.0)), [np.log(3.0)]),
        (Beta(torch.tensor(1.0), torch.tensor(3.0)), [np.log(1 / 3)]),
        (Uniform(-2.0, 6.0), [0.0]),
        (MultivariateNormal(torch.tensor([1.0, 2.0]), torch.eye(2)), [1.0, 2.0]),
        (Cauchy(2.0, 1.0), [0.0]),  # without a mean
        (InverseGamma(torch.tensor(0.5), torch.tensor(1.0)), [0.0]),  # with an infinite one
        (LKJCholesky(3, 2.0), [0.0] * 3),
        (dadvi.Flat(2), [0.0, 0.0]),
        (dadvi.Constrained(Normal(torch.zeros(2), 1.0), dadvi.ordered), [0.0, 0.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_start_is_the_prior_mean_where_it_has_one(prior, start):
    model = model_of({"z": prior})
    torch.testing.assert_close(model.start, torch.tensor(start, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(model.log_prior(model.start[None])).all()


def test_start_of_a_child_is_its_mean_given_the_start_of_its_parents():
    model = model_of({"a": Normal(2.0, 1.0), "b": lambda a: Normal(3 * a, 1.0), "c": Dirichlet(torch.ones(3))})
    assert model.start[:2].tolist() == [2.0, 6.0]
    torch.testing.assert_close(model.space.constrain(model.start[None])[0]["c"][0], torch.full((3,), 1 / 3).double())


# --- refusals


@pytest.mark.parametrize("discrete", [Poisson(3.0), Bernoulli(0.5), Categorical(torch.ones(3))])
def test_discrete_latents_are_refused(discrete):
    refused({"z": discrete}, "'z'", "discrete")
    refused({"a": Normal(0.0, 1.0), "z": lambda a: discrete}, "'z'", "discrete")


def test_names_are_refused():
    refused({"b": lambda tau: Normal(0.0, tau)}, "'b'", "'tau'", "not a latent before it", "none")
    refused({"b": lambda a: Normal(a, 1.0), "a": Normal(0.0, 1.0)}, "'b'", "'a'", "reorder")
    refused({"b": lambda b: Normal(b, 1.0)}, "'b'")
    refused({"not a name": Normal(0.0, 1.0)}, "'not a name'", "identifier")
    refused({"a": Normal(0.0, 1.0), "b": lambda *a: Normal(0.0, 1.0)}, "'b'", "'*a'")
    refused({"a": Normal(0.0, 1.0), "b": lambda **a: Normal(0.0, 1.0)}, "'b'", "'**a'")
    refused({}, "at least one latent")


def test_what_is_not_a_distribution_is_refused():
    refused({"z": 3.0}, "'z'", "float")
    refused({"z": torch.ones(3)}, "'z'", "Tensor")
    refused({"z": Normal}, "'z'")
    refused({"a": Normal(0.0, 1.0), "z": lambda a: a}, "'z'", "Tensor")


def test_supports_that_move_are_refused():
    refused(
        {"a": HalfNormal(1.0), "z": lambda a: Uniform(0.0, a)}, "'z'", "changes with the value of a", "Uniform(0, 1)"
    )
    moves = lambda a: Normal(torch.zeros(2 if a > 0.1 else 3), 1.0)
    refused({"a": Normal(0.0, 1.0), "z": moves}, "'z'", "shape")


def test_prior_functions_that_fail_are_refused_with_the_shapes_seen():
    prior = {"a": Normal(torch.zeros(3), 1.0), "z": lambda a: Normal(torch.zeros(4), a.exp())}
    refused(prior, "'z'", "(3,)", "RuntimeError")


def test_densities_of_another_shape_are_refused():
    class Summed(Normal):
        def log_prob(self, value):
            return super().log_prob(value).sum()

    refused({"z": Summed(torch.zeros(3), 1.0)}, "'z'", "()", "(3,)")


@pytest.mark.parametrize("validate", [True, False])
def test_start_of_no_density_is_refused(validate):
    # T(0) = 1 lies outside (2, 3)
    base = Uniform(2.0, 3.0, validate_args=validate)
    refused({"z": dadvi.Constrained(base, constraints.positive)}, "start", "z")


def test_likelihood_forms():
    prior = {"mu": Normal(0.0, 1.0)}
    density, score = lambda mu: Normal(mu, 1.0), lambda mu, y: -((y - mu) ** 2)
    with pytest.raises(ModelError, match="both were given"):
        dadvi.Model(prior, density, "y", log_likelihood=score)
    with pytest.raises(ModelError, match="neither was given"):
        dadvi.Model(prior)
    with pytest.raises(ModelError, match="go together"):
        dadvi.Model(prior, density)
    with pytest.raises(ModelError, match="go together"):
        dadvi.Model(prior, observed="y", log_likelihood=score)
    for variadic in (lambda *fields: Normal(0.0, 1.0), lambda mu, **fields: Normal(mu, 1.0)):
        with pytest.raises(ModelError, match=r"the likelihood takes the argument '\*+fields'"):
            dadvi.Model(prior, variadic, "y")


def test_dims():
    prior = {"a": Normal(0.0, 1.0), "w": Normal(torch.zeros(2, 3), 1.0)}
    assert model_of(prior, dims={"w": ("row", "column")}).dims == {"w": ("row", "column")}
    assert model_of({"u": Normal(torch.zeros(4), 1.0)}, dims={"u": "group"}).dims == {"u": ("group",)}
    refused(prior, "'b'", "not a latent", dims={"b": "group"})
    refused(prior, "'w'", "(2, 3)", dims={"w": "group"})
