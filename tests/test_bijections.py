"""Bijections onto supports: log-dets against autograd, densities that integrate to one, precision far from zero."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from priors import SCALAR_PRIORS, bijection_of, each_prior, points, shape_of, t
from torch.distributions import (
    Dirichlet,
    Gamma,
    Independent,
    LKJCholesky,
    Normal,
    StudentT,
    Uniform,
    Wishart,
    constraints,
)

from dadvi.supports import Constrained, ordered, support_to_json
from dadvi.transforms import biject_to

pytestmark = pytest.mark.usefixtures("float64")

TRIANGLES = {
    type(constraints.corr_cholesky): -1,
    type(constraints.lower_cholesky): 0,
    type(constraints.lower_triangular): 0,
    type(constraints.symmetric): 0,
    type(constraints.positive_definite): 0,
    type(constraints.positive_semidefinite): 0,
}


def free_coordinates(y, support):
    """The entries of one draw that torch's densities are written in, flat."""
    if isinstance(support, constraints.independent):
        return free_coordinates(y, support.base_constraint)
    if isinstance(support, (constraints.cat, constraints.stack)):
        is_cat = isinstance(support, constraints.cat)
        blocks = y.split(support.lengths, support.dim) if is_cat else y.unbind(support.dim)
        return torch.cat([free_coordinates(b, c) for b, c in zip(blocks, support.cseq, strict=True)])
    if isinstance(support, type(constraints.simplex)):
        return y[..., :-1].flatten()
    for matrices, diagonal in TRIANGLES.items():
        if type(support) is matrices:
            rows, columns = torch.tril_indices(y.shape[-2], y.shape[-1], diagonal)
            return y[..., rows, columns].flatten()
    return y.flatten()


@each_prior
def test_log_det_is_that_of_autograds_jacobian(prior):
    bijection = bijection_of(prior())
    x = points(3, bijection.size)
    log_det = bijection.log_abs_det_jacobian(x, bijection(x))
    assert log_det.shape == (3,)
    for x_k, log_det_k in zip(x, log_det, strict=True):
        J = torch.func.jacrev(lambda x: free_coordinates(bijection(x), bijection.codomain))(x_k)
        assert J.shape == (bijection.size, bijection.size)
        torch.testing.assert_close(log_det_k, torch.linalg.slogdet(J).logabsdet, rtol=1e-10, atol=1e-10)


@each_prior
def test_values_lie_in_the_support_and_come_back(prior):
    prior = prior()
    bijection = bijection_of(prior)
    x = points(200, bijection.size)
    y = bijection(x)
    assert y.shape == (200, *shape_of(prior)) == bijection.forward_shape(x.shape)
    assert bijection.inverse_shape(y.shape) == x.shape
    assert prior.log_prob(y).isfinite().all()
    assert bijection.codomain.check(y).all()
    torch.testing.assert_close(bijection.inv(y), x, rtol=1e-7, atol=1e-7)


@each_prior
def test_a_batch_of_draws_is_its_draws_one_by_one(prior):
    bijection = bijection_of(prior())
    x = points(2, 3, bijection.size)
    y = bijection(x)
    log_det = bijection.log_abs_det_jacobian(x, y)
    for i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3)):
        torch.testing.assert_close(bijection(x[i, j]), y[i, j], rtol=1e-13, atol=1e-13)
        one = bijection.log_abs_det_jacobian(x[i, j], y[i, j])
        torch.testing.assert_close(one, log_det[i, j], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(bijection.inv(y)[i, j], bijection.inv(y[i, j]), rtol=1e-13, atol=1e-13)


def pushed_forward(prior, axes):
    """The integral over R^n of the density of x = T^{-1}(z), by the trapezoid rule on a grid."""
    bijection = bijection_of(prior)
    x = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    y = bijection(x)
    density = (prior.log_prob(y) + bijection.log_abs_det_jacobian(x, y)).exp()
    return density.sum() * math.prod(axis[1] - axis[0] for axis in axes)


@pytest.mark.parametrize("prior", SCALAR_PRIORS.values(), ids=SCALAR_PRIORS)
def test_densities_of_one_coordinate_integrate_to_one(prior):
    prior = prior()
    mass = pushed_forward(prior, [torch.linspace(-80, 80, 160_001)])
    if isinstance(prior, Constrained) and isinstance(prior.base_dist, StudentT):
        assert 0.999999 < mass < 1  # the restriction is not renormalised
    else:
        torch.testing.assert_close(mass, torch.tensor(1.0), rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("prior", "axes"),
    [
        (lambda: Dirichlet(t(0.8, 1.5, 3.0)), [(-35, 15, 500), (-35, 15, 500)]),
        (lambda: Dirichlet(t(2.0, 2.0, 2.0, 2.0)), [(-12, 9, 70)] * 3),
        (lambda: LKJCholesky(3, 1.5), [(-8, 8, 60)] * 3),
        (lambda: Wishart(5.0, torch.eye(2)), [(-5, 2.5, 50), (-8, 8, 50), (-5, 2.5, 50)]),
        (lambda: Independent(Gamma(t(2.0, 3.0), 1.0), 1), [(-14, 5, 100), (-10, 5, 100)]),
    ],
    ids=["Dirichlet(3)", "Dirichlet(4)", "LKJCholesky(3)", "Wishart(2)", "Independent Gamma"],
)
def test_densities_of_several_coordinates_integrate_to_one(prior, axes):
    mass = pushed_forward(prior(), [torch.linspace(*axis) for axis in axes])
    torch.testing.assert_close(mass, torch.tensor(1.0), rtol=1e-5, atol=0)


def test_ordered_restriction_holds_its_share_of_the_mass():
    # Of the n! orders of n independent draws one is increasing.
    mass = pushed_forward(
        Constrained(Normal(0.0, 1.0).expand([3]), ordered),
        [torch.linspace(-6, 6, 60)] + [torch.linspace(-18, 3, 90)] * 2,
    )
    torch.testing.assert_close(mass, torch.tensor(1 / 6), rtol=1e-4, atol=0)


# Far from zero --------------------------------------------------------------------------------------------------------


def log_sigmoid(x):
    return float(-(1 + (-Decimal(x)).exp()).ln())


@pytest.fixture
def _fifty_digits():
    with localcontext() as context:
        context.prec = 50
        yield


EXTREMES = (-800.0, -30.0, -21.0, 0.0, 5.0, 21.0, 30.0, 800.0)


@pytest.mark.usefixtures("_fifty_digits")
@pytest.mark.parametrize("x", EXTREMES)
@pytest.mark.parametrize("y", EXTREMES)
def test_log_dets_keep_their_precision(x, y):
    point = t(x, y)

    def log_det(support, shape):
        bijection = biject_to(support, shape)
        return bijection.log_abs_det_jacobian(point, bijection(point)).item()

    exact = sum(log_sigmoid(v) + log_sigmoid(-v) for v in (x, y)) + 2 * math.log(3)
    assert log_det(constraints.interval(1.0, 4.0), (2,)) == pytest.approx(exact, rel=1e-14)

    first, second = x - math.log(2), y  # the logits of the two breaks of the stick
    exact = log_sigmoid(first) + 2 * log_sigmoid(-first) + log_sigmoid(second) + log_sigmoid(-second)
    assert log_det(constraints.simplex, (3,)) == pytest.approx(exact, rel=1e-14)

    point = t(1.0, x, y)  # the third row of the factor: tanh x, then tanh y of what is left
    sech_1, sech_x, sech_y = (math.log(2) + (log_sigmoid(2 * v) + log_sigmoid(-2 * v)) / 2 for v in (1.0, x, y))
    assert log_det(constraints.corr_cholesky, (3, 3)) == pytest.approx(2 * sech_1 + 3 * sech_x + 2 * sech_y, rel=1e-14)


@pytest.mark.parametrize("x", [-1000.0, -700.0, -100.0, -37.0, 37.0, 100.0, 700.0])
@pytest.mark.parametrize(
    ("support", "shape"),
    [
        (constraints.positive, (3,)),
        (constraints.greater_than(1e6), (3,)),
        (constraints.less_than(-3.0), (3,)),
        (constraints.unit_interval, (3,)),
        (constraints.interval(-7.0, 0.0), (3,)),
        (constraints.interval(5.0, 5.1), (3,)),
        (constraints.simplex, (4,)),
        (constraints.corr_cholesky, (3, 3)),
        (constraints.lower_cholesky, (2, 2)),
    ],
    ids=lambda value: repr(value) if isinstance(value, constraints.Constraint) else "",
)
def test_far_points_stay_strictly_inside_with_finite_log_det_and_gradient(support, shape, x):
    bijection = biject_to(support, shape)
    point = torch.full((1, bijection.size), x, requires_grad=True)
    y = bijection(point)
    log_det = bijection.log_abs_det_jacobian(point, y)
    assert support.check(y.detach()).all()
    for bound in ("lower_bound", "upper_bound"):
        assert (y != getattr(support, bound, math.nan)).all()
    assert log_det.isfinite().all()
    (gradient,) = torch.autograd.grad(log_det.sum() + y.sum(), point)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("support", "shape", "x"),
    [
        (constraints.positive, (), 30.0),
        (constraints.positive, (), -30.0),
        (constraints.interval(-2.0, 0.0), (), 30.0),  # the other way float64 has too few numbers, next to -2
        (constraints.simplex, (4,), 30.0),
        (constraints.simplex, (4,), -30.0),
        (constraints.corr_cholesky, (3, 3), 30.0),
        (constraints.corr_cholesky, (3, 3), -30.0),
    ],
)
def test_far_points_come_back(support, shape, x):
    bijection = biject_to(support, shape)
    point = torch.full((bijection.size,), x)
    torch.testing.assert_close(bijection.inv(bijection(point)), point, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("interval", "half_line"),
    [
        (constraints.interval(-math.inf, 1.0), constraints.less_than(1.0)),
        (constraints.interval(t(1.0, 2.0), t(math.inf, math.inf)), constraints.greater_than_eq(t(1.0, 2.0))),
    ],
)
def test_interval_without_an_end_is_a_half_line(interval, half_line):
    x = points(2)
    assert torch.equal(biject_to(interval, (2,))(x), biject_to(half_line, (2,))(x))
    assert support_to_json(interval) == support_to_json(half_line)


def test_float32_bounds_are_exact_in_float64():
    low, high = torch.tensor(0.1, dtype=torch.float32), torch.tensor(0.7, dtype=torch.float32)
    y = biject_to(Uniform(low, high).support, ())(t(0.3).reshape(1))
    assert y.dtype == torch.float64
    expected = low.double() + (high.double() - low.double()) * torch.sigmoid(t(0.3))
    torch.testing.assert_close(y, expected.squeeze(), rtol=1e-15, atol=0)
