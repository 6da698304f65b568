"""The layout of all latents in one vector η, the table of bijections that it takes them from, and what is refused."""

import math
import pickle
import subprocess
import sys

import pytest
import torch
from priors import PRIORS, mixture, points, shape_of, t
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    Multinomial,
    OneHotCategorical,
    Poisson,
    constraints,
)
from torch.distributions import biject_to as torch_biject_to
from torch.distributions.transforms import AffineTransform

from dadvi.errors import ModelError
from dadvi.supports import ordered, support_to_json
from dadvi.transforms import LatentSpace, Site, biject_to

pytestmark = pytest.mark.usefixtures("float64")


def test_transforms_work_under_vmap_and_twice_through_autograd():
    space = LatentSpace.of({str(i): (shape_of(p), p.support) for i, p in enumerate(make() for make in PRIORS.values())})
    eta = points(2, space.size, scale=0.5)

    def scalar(eta):
        latents, log_det = space.constrain(eta)
        return log_det + sum(z.square().sum() for z in latents.values())

    H = torch.func.vmap(torch.func.jacrev(torch.func.grad(scalar)))(eta)
    v, step = points(space.size, seed=1), 1e-5
    difference = torch.func.grad(scalar)(eta[1] + step * v) - torch.func.grad(scalar)(eta[1] - step * v)
    torch.testing.assert_close(H[1] @ v, difference / (2 * step), rtol=1e-5, atol=1e-5)


def make_space():
    return LatentSpace.of(
        {
            "tau": ((), constraints.positive),
            "beta": ((2, 2), constraints.real),
            "p": ((2, 3), constraints.simplex),
            "L": ((3, 3), constraints.corr_cholesky),
        }
    )


def test_space_lays_latents_side_by_side():
    space = make_space()
    assert [(s.name, s.offset, s.size) for s in space.sites] == [
        ("tau", 0, 1),
        ("beta", 1, 4),
        ("p", 5, 4),
        ("L", 9, 3),
    ]
    assert space.size == 12
    assert space.names == (
        *("tau", "beta[0,0]", "beta[0,1]", "beta[1,0]", "beta[1,1]"),
        *("p[0,0]", "p[0,1]", "p[1,0]", "p[1,1]", "L[0]", "L[1]", "L[2]"),
    )
    eta = points(5, 12)
    latents, log_det = space.constrain(eta)
    assert {name: tuple(z.shape) for name, z in latents.items()} == {
        "tau": (5,),
        "beta": (5, 2, 2),
        "p": (5, 2, 3),
        "L": (5, 3, 3),
    }
    torch.testing.assert_close(latents["tau"], eta[:, 0].exp())
    assert torch.equal(latents["beta"], eta[:, 1:5].reshape(5, 2, 2))
    assert log_det.shape == (5,)
    terms = [site.constrain(eta[:, site.offset : site.offset + site.size])[1] for site in space.sites]
    torch.testing.assert_close(log_det, torch.stack(terms).sum(0))
    torch.testing.assert_close(space.unconstrain(latents), eta)


def test_space_takes_no_draws_and_one_draw_without_a_batch():
    space = make_space()
    latents, log_det = space.constrain(torch.zeros(0, 12))
    assert latents["p"].shape == (0, 2, 3)
    assert log_det.shape == (0,)
    latents, log_det = space.constrain(torch.zeros(12))
    torch.testing.assert_close(latents["p"], torch.full((2, 3), 1 / 3))
    assert log_det.shape == ()


def test_space_survives_pickling_with_the_same_bits():
    space, eta = make_space(), points(3, 12)
    again = pickle.loads(pickle.dumps(space))
    assert torch.equal(again.constrain(eta)[1], space.constrain(eta)[1])


def test_space_refuses_what_does_not_fit():
    space = make_space()
    latents, _ = space.constrain(torch.zeros(2, 12))
    with pytest.raises(ModelError, match=r"shape \(2, 11\).*12 coordinates; give \(K, 12\)"):
        space.constrain(torch.zeros(2, 11))
    with pytest.raises(ModelError, match=r"\['tau'\].*latents are \['tau', 'beta', 'p', 'L'\]"):
        space.unconstrain({"tau": latents["tau"]})
    with pytest.raises(ModelError, match=r"'beta' has shape \(2, 2\), but its values have \(2, 4\)"):
        space.unconstrain(latents | {"beta": torch.zeros(2, 4)})


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("support", "value"),
    [
        (constraints.positive, t(1.0, -0.5)),
        (constraints.nonnegative, t(1.0, 0.0)),
        (constraints.interval(0.0, 1.0), t(0.5, 1.5)),
        (constraints.real, t(0.0, math.nan)),
        (constraints.simplex, t(0.5, 0.6)),
        (ordered, t(1.0, 0.0)),
        (constraints.corr_cholesky, t([1.0, 0.0], [0.5, 0.5])),
        (constraints.lower_cholesky, t([1.0, 2.0], [0.0, 1.0])),
        (constraints.positive_definite, t([1.0, 2.0], [2.0, 1.0])),
    ],
    ids=repr,
)
def test_values_outside_the_support_or_on_its_boundary_are_refused(support, value):
    site = Site.make("z", value.shape, support)
    with pytest.raises(ModelError, match=r"latent 'z': values from .* do not lie inside its support .*strictly inside"):
        site.unconstrain(value[None])


@pytest.mark.parametrize(
    "prior",
    [
        lambda: Bernoulli(0.5),
        lambda: Categorical(torch.ones(3)),
        lambda: OneHotCategorical(torch.ones(3)),
        lambda: Poisson(t(1.0, 2.0)),
        lambda: Multinomial(5, torch.ones(3)),
        lambda: Independent(Bernoulli(torch.full((3,), 0.5)), 1),
        lambda: mixture(Poisson(t(1.0, 2.0))),
    ],
)
def test_discrete_latents_are_refused_with_the_remedy(prior):
    prior = prior()
    with pytest.raises(ModelError, match=r"latent 'k': .* is discrete.*sum the discrete latent out.*MixtureSameFamily"):
        Site.make("k", shape_of(prior), prior.support)


class _Sphere(constraints.Constraint):
    event_dim = 1


@pytest.mark.parametrize(
    ("support", "shape", "message"),
    [
        (
            _Sphere(),
            (3,),
            r"no bijection .* Sphere\(\) is known; give the latent a known support with dadvi.Constrained",
        ),
        (constraints.dependent, (), r"does not say which values it holds; give the latent a known support"),
        (None, (), r"the support None does not say"),
        (constraints.simplex, (), r"values of 1 dimensions, but a draw has shape \(\)"),
        (constraints.positive_definite, (3,), r"values of 2 dimensions, but a draw has shape \(3,\)"),
        (constraints.lower_cholesky, (2, 3), r"square matrices, but a draw has shape \(2, 3\)"),
        (constraints.square, (2, 3), r"square matrices, but a draw has shape \(2, 3\)"),
        (constraints.interval(2.0, 1.0), (), r"Interval\(lower_bound=2.0, upper_bound=1.0\) is empty"),
        (constraints.greater_than(-math.inf), (), r"not finite; use real, greater_than or less_than"),
        (constraints.greater_than(torch.zeros(3)), (2,), r"bounds of shape \(3,\), but a draw has shape \(2,\)"),
        (constraints.greater_than(torch.zeros(3)), (), r"bounds of shape \(3,\), but a draw has shape \(\)"),
        (constraints.cat([constraints.real, constraints.positive], 0, [1, 2]), (4,), r"lengths \[1, 2\], but .* has 4"),
        (constraints.cat([constraints.real], 1, [1]), (1,), r"along dim 1, but a draw has 1 dimensions"),
        (constraints.stack([constraints.real, constraints.positive]), (3,), r"has 2 parts, but .* has 3"),
    ],
)
def test_supports_that_cannot_be_used_are_refused(support, shape, message):
    with pytest.raises(ModelError, match=message):
        biject_to(support, shape)


# The registry of torch ------------------------------------------------------------------------------------------------


def test_a_bijection_registered_in_torch_is_found_but_cannot_be_saved(monkeypatch):
    monkeypatch.setitem(torch_biject_to._registry, _Sphere, lambda support: AffineTransform(1.0, 3.0, event_dim=1))
    bijection = biject_to(_Sphere(), (2,))
    torch.testing.assert_close(bijection(t(0.0, 1.0)), t(1.0, 4.0))
    torch.testing.assert_close(bijection.log_abs_det_jacobian(t(0.0, 1.0), t(1.0, 4.0)), torch.tensor(2 * math.log(3)))
    with pytest.raises(ModelError, match=r"Sphere\(\) cannot be saved; give the latent a known support"):
        support_to_json(_Sphere())


def test_torchs_registry_is_left_alone():
    code = (
        "from torch.distributions import biject_to, transform_to; before = dict(biject_to._registry), "
        "dict(transform_to._registry); import dadvi.transforms; "
        "assert before == (biject_to._registry, transform_to._registry)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
