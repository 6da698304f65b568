"""Supports: priors with one of their own, what is stored of them, and those that cannot be used."""

import json

import pytest
import torch
from priors import bijection_of, each_prior, mixture, points, shape_of, t
from torch.distributions import MultivariateNormal, Normal, Uniform, constraints

from dadvi.errors import ModelError
from dadvi.supports import Constrained, Flat, ordered, resolve, support_from_json, support_to_json
from dadvi.transforms import biject_to

pytestmark = pytest.mark.usefixtures("float64")


# Priors with a support of their own -----------------------------------------------------------------------------------


def test_constrained_has_the_density_of_its_base_summed_over_events():
    base = Normal(t([0.0, 1.0, 2.0], [3.0, 4.0, 5.0]), 2.0)
    prior = Constrained(base, ordered)
    assert (prior.batch_shape, prior.event_shape) == ((2,), (3,))
    value = points(4, 2, 3).cumsum(-1).sort(-1).values
    torch.testing.assert_close(prior.log_prob(value), base.log_prob(value).sum(-1))
    elementwise = Constrained(base, constraints.positive)
    assert (elementwise.batch_shape, elementwise.event_shape) == ((2, 3), ())
    vector = Constrained(MultivariateNormal(torch.zeros(3), torch.eye(3)), constraints.positive)
    assert (vector.batch_shape, vector.event_shape) == ((), (3,))
    assert vector.log_prob(torch.ones(5, 3)).shape == (5,)
    with pytest.raises(NotImplementedError):
        prior.sample()


@pytest.mark.parametrize(
    "make",
    [lambda: Constrained(Normal(0.0, 2.0).expand([3]), ordered), lambda: Flat(3, ordered)],
    ids=["Constrained", "Flat"],
)
def test_priors_with_a_support_expand_and_validate(make):
    prior = make().expand([5, 2])
    assert type(prior) is type(make())
    assert (prior.batch_shape, prior.event_shape) == ((5, 2), (3,))
    value = t(1.0, 2.0, 3.0).expand(7, 5, 2, 3)
    torch.testing.assert_close(prior.log_prob(value), make().log_prob(value))
    with pytest.raises(ValueError, match="support"):
        prior.log_prob(value.flip(-1))
    unchecked = Flat(3, ordered, validate_args=False)
    assert unchecked.log_prob(t(3.0, 2.0, 1.0)) == 0


def test_flat_is_zero_in_every_shape():
    assert Flat().log_prob(t(1.0, 2.0)).tolist() == [0, 0]
    assert Flat(4).batch_shape == Flat((4,)).batch_shape == (4,)
    prior = Flat((2, 3), constraints.simplex)
    assert (prior.batch_shape, prior.event_shape) == ((2,), (3,))
    assert torch.equal(prior.log_prob(torch.full((5, 2, 3), 1 / 3)), torch.zeros(5, 2))


def test_constrained_and_flat_refuse_at_construction():
    with pytest.raises(ModelError, match=r"holds values of 1 dimensions, but a draw has shape \(\).*\.expand"):
        Constrained(Normal(0.0, 1.0), ordered)
    with pytest.raises(ModelError, match="is discrete"):
        Constrained(Normal(0.0, 1.0), constraints.boolean)
    with pytest.raises(ModelError, match=r"holds values of 2 dimensions, but a draw has shape \(3,\)"):
        Flat(3, constraints.positive_definite)


# The codec ------------------------------------------------------------------------------------------------------------


@each_prior
def test_support_comes_back_from_json_with_the_same_bits(prior):
    prior = prior()
    text = json.dumps(support_to_json(prior.support), allow_nan=False)
    here, again = bijection_of(prior), biject_to(support_from_json(json.loads(text)), shape_of(prior))
    assert json.dumps(support_to_json(again.codomain)) == json.dumps(support_to_json(here.codomain))
    x = points(3, here.size)
    assert torch.equal(again(x), here(x))
    assert torch.equal(again.log_abs_det_jacobian(x, again(x)), here.log_abs_det_jacobian(x, here(x)))


def test_bounds_come_back_from_json_with_their_dtype():
    bound = torch.tensor([0.1, 1e-40, 1 / 3], dtype=torch.float32)
    again = support_from_json(json.loads(json.dumps(support_to_json(constraints.greater_than(bound)))))
    assert again.lower_bound.dtype == torch.float32
    assert torch.equal(again.lower_bound, bound)
    number = support_from_json(json.loads(json.dumps(support_to_json(constraints.less_than(0.1 + 0.2)))))
    assert number.upper_bound == 0.1 + 0.2


@pytest.mark.parametrize(
    "description",
    [{}, {"kind": "sphere"}, {"kind": "interval", "lower_bound": 0.0}, {"kind": "independent", "base": 3}],
)
def test_descriptions_that_are_none_are_refused(description):
    with pytest.raises(ModelError, match=r"does not describe a support; kinds known here: real, .*newer"):
        support_from_json(description)


# Resolved -------------------------------------------------------------------------------------------------------------


def test_resolving_twice_changes_nothing():
    support = constraints.stack([constraints.simplex, ordered], dim=0)
    once = resolve(support, 2)
    assert once.dim == resolve(once, 2).dim == -2


def test_mixture_of_different_supports_is_refused():
    prior = mixture(Uniform(t(0.0, 1.0), t(2.0, 3.0)))
    with pytest.raises(ModelError, match=r"different bounds, \[0.0, 1.0\].*use components with one support"):
        bijection_of(prior)
