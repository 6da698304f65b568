"""Bijections onto supports: log-dets against autograd, densities that integrate to one, precision, refusals."""

import json
import math
import pickle
import subprocess
import sys
from decimal import Decimal, localcontext

import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Cauchy,
    Chi2,
    ContinuousBernoulli,
    Dirichlet,
    Exponential,
    FisherSnedecor,
    Gamma,
    GeneralizedPareto,
    Gumbel,
    HalfCauchy,
    HalfNormal,
    Independent,
    InverseGamma,
    Kumaraswamy,
    Laplace,
    LKJCholesky,
    LogisticNormal,
    LogNormal,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    Multinomial,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Pareto,
    Poisson,
    RelaxedBernoulli,
    StudentT,
    TransformedDistribution,
    Uniform,
    VonMises,
    Weibull,
    Wishart,
    constraints,
)
from torch.distributions import biject_to as torch_biject_to
from torch.distributions.transforms import (
    AffineTransform,
    CatTransform,
    ExpTransform,
    TanhTransform,
    identity_transform,
)

from dadvi.errors import ModelError
from dadvi.supports import Constrained, Flat, ordered, resolve, support_from_json, support_to_json
from dadvi.transforms import LatentSpace, Site, biject_to


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def mixture(component, logits=(0.0, 1.0)):
    return MixtureSameFamily(Categorical(logits=t(*logits)), component)


# Priors by name, each with one draw of unconstrained size 1 and a density that integrates to one.
SCALAR_PRIORS = {
    "Normal": lambda: Normal(1.0, 2.0),
    "StudentT": lambda: StudentT(7.0, 0.5, 2.0),
    "Laplace": lambda: Laplace(0.5, 1.5),
    "Gumbel": lambda: Gumbel(1.0, 2.0),
    "HalfNormal": lambda: HalfNormal(2.0),
    "HalfCauchy": lambda: HalfCauchy(3.0),
    "LogNormal": lambda: LogNormal(0.3, 0.7),
    "Gamma": lambda: Gamma(0.6, 2.0),
    "Chi2": lambda: Chi2(3.0),
    "Exponential": lambda: Exponential(0.1),
    "InverseGamma": lambda: InverseGamma(2.0, 3.0),
    "Weibull": lambda: Weibull(2.0, 1.5),
    "FisherSnedecor": lambda: FisherSnedecor(3.0, 5.0),
    "Pareto": lambda: Pareto(2.5, 3.0),
    "GeneralizedPareto": lambda: GeneralizedPareto(1.0, 2.0, 0.3),
    "GeneralizedPareto bounded": lambda: GeneralizedPareto(1.0, 2.0, -0.5),
    "Uniform": lambda: Uniform(-3.0, 7.0),
    "Beta": lambda: Beta(0.5, 2.5),
    "Kumaraswamy": lambda: Kumaraswamy(1.5, 2.5),
    "ContinuousBernoulli": lambda: ContinuousBernoulli(0.8),
    "RelaxedBernoulli": lambda: RelaxedBernoulli(t(0.7).squeeze(), probs=t(0.3).squeeze()),
    "TransformedDistribution tanh": lambda: TransformedDistribution(Normal(0.2, 0.7), [TanhTransform()]),
    "TransformedDistribution exp": lambda: TransformedDistribution(
        Normal(0.0, 1.0), [AffineTransform(0.5, 0.5), ExpTransform()]
    ),
    "MixtureSameFamily": lambda: mixture(Gamma(t(2.0, 5.0), t(1.0, 0.5))),
    "MixtureSameFamily bounds": lambda: mixture(Uniform(t(1.0, 1.0), t(4.0, 4.0))),
    "Constrained VonMises": lambda: Constrained(VonMises(0.3, 2.0), constraints.interval(-math.pi, math.pi)),
    "Constrained less_than": lambda: Constrained(StudentT(7.0), constraints.less_than(30.0)),
    "Dirichlet of two": lambda: Dirichlet(t(0.7, 2.0)),
    "LKJCholesky of two": lambda: LKJCholesky(2, 1.5),
}

# Priors of more shapes.
TENSOR_PRIORS = {
    "expand": lambda: HalfNormal(1.0).expand([2, 3]),
    "VonMises": lambda: VonMises(t(0.0, 1.0), 2.0),
    "Cauchy": lambda: Cauchy(t(0.0, 1.0), 2.0),
    "Uniform bounds": lambda: Uniform(t(-1.0, 5.0), t([6.0], [9.0], [7.0])),
    "Pareto bounds": lambda: Pareto(t(1.0, 2.0), 3.0),
    "Independent": lambda: Independent(Beta(t([1.0, 2.0], [3.0, 4.0]), 2.0), 1),
    "Independent Dirichlet": lambda: Independent(Dirichlet(torch.ones(2, 3, 4)), 1),
    "Dirichlet": lambda: Dirichlet(t(0.5, 1.0, 2.0, 4.0)),
    "Dirichlet batch": lambda: Dirichlet(torch.ones(2, 3)),
    "Dirichlet of one": lambda: Dirichlet(t(2.0)),
    "LogisticNormal": lambda: LogisticNormal(t(0.0, 1.0), t(1.0, 2.0)),
    "LKJCholesky": lambda: LKJCholesky(4, t(1.0, 2.0)),
    "Wishart": lambda: Wishart(4.0, torch.eye(3)),
    "Wishart batch": lambda: Wishart(t(3.0, 4.0), torch.eye(2)),
    "MultivariateNormal": lambda: MultivariateNormal(torch.zeros(3), torch.eye(3)),
    "LowRankMultivariateNormal": lambda: LowRankMultivariateNormal(torch.zeros(2, 3), torch.ones(3, 1), torch.ones(3)),
    "MixtureSameFamily Dirichlet": lambda: mixture(Dirichlet(t([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]))),
    "MixtureSameFamily Independent": lambda: mixture(
        Independent(Uniform(t([0.0, 1.0], [0.0, 1.0]), t([2.0, 3.0], [2.0, 3.0])), 1)
    ),
    "MixtureSameFamily nested": lambda: mixture(
        MixtureSameFamily(Categorical(torch.ones(2, 3)), Uniform(torch.ones(2, 3), torch.full((2, 3), 4.0)))
    ),
    "CatTransform": lambda: TransformedDistribution(
        Normal(0.0, 1.0).expand([5]), [CatTransform([ExpTransform(), identity_transform], dim=-1, lengths=[2, 3])]
    ),
    "Constrained ordered": lambda: Constrained(Normal(0.0, 2.0).expand([4]), ordered),
    "Constrained ordered batch": lambda: Constrained(Normal(0.0, 2.0).expand([2, 3]), ordered),
    "Constrained cat": lambda: Constrained(
        Normal(0.0, 1.0).expand([6]),
        constraints.cat([constraints.simplex, constraints.real_vector, ordered], dim=0, lengths=[3, 1, 2]),
    ),
    "Constrained cat rows": lambda: Constrained(
        Normal(0.0, 1.0).expand([3, 4]), constraints.cat([constraints.simplex, ordered], dim=0, lengths=[1, 2])
    ),
    "Constrained stack": lambda: Constrained(
        Normal(0.0, 1.0).expand([2, 3]), constraints.stack([constraints.simplex, ordered], dim=0)
    ),
    "Constrained stack bounds": lambda: Constrained(
        Normal(0.0, 1.0).expand([4, 2]),
        constraints.independent(
            constraints.stack([constraints.greater_than(2.0), constraints.unit_interval], dim=1), 2
        ),
    ),
    "Flat lower_cholesky": lambda: Flat((2, 3, 3), constraints.lower_cholesky),
    "Flat lower_triangular": lambda: Flat((3, 3), constraints.lower_triangular),
    "Flat symmetric": lambda: Flat((3, 3), constraints.symmetric),
    "Flat square": lambda: Flat((2, 2), constraints.square),
    "Flat positive_semidefinite": lambda: Flat((3, 3), constraints.positive_semidefinite),
    "Flat half_open_interval": lambda: Flat(3, constraints.half_open_interval(t(1.0, 2.0, 3.0), 4.0)),
    "Flat greater_than_eq": lambda: Flat(2, constraints.greater_than_eq(5)),
    "Flat nothing": lambda: Flat(0),
}
PRIORS = SCALAR_PRIORS | TENSOR_PRIORS
each_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)


def shape_of(prior):
    return prior.batch_shape + prior.event_shape


def bijection_of(prior):
    return biject_to(prior.support, shape_of(prior))


def points(*shape, scale=1.5, seed=0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


# Far from zero -------------------------------------------------------------------------------------------------------


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


# Sites and the space of latents --------------------------------------------------------------------------------------


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


# Priors with a support of their own ----------------------------------------------------------------------------------


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


# The codec -----------------------------------------------------------------------------------------------------------


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


# Refusals ------------------------------------------------------------------------------------------------------------


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


def test_mixture_of_different_supports_is_refused():
    prior = mixture(Uniform(t(0.0, 1.0), t(2.0, 3.0)))
    with pytest.raises(ModelError, match=r"different bounds, \[0.0, 1.0\].*use components with one support"):
        bijection_of(prior)


def test_constrained_and_flat_refuse_at_construction():
    with pytest.raises(ModelError, match=r"holds values of 1 dimensions, but a draw has shape \(\).*\.expand"):
        Constrained(Normal(0.0, 1.0), ordered)
    with pytest.raises(ModelError, match="is discrete"):
        Constrained(Normal(0.0, 1.0), constraints.boolean)
    with pytest.raises(ModelError, match=r"holds values of 2 dimensions, but a draw has shape \(3,\)"):
        Flat(3, constraints.positive_definite)


# The registry of torch -----------------------------------------------------------------------------------------------


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


def test_resolving_twice_changes_nothing():
    support = constraints.stack([constraints.simplex, ordered], dim=0)
    once = resolve(support, 2)
    assert once.dim == resolve(once, 2).dim == -2
