"""Priors of every support and shape, by name, for the tests of supports and of the maps to them."""

import math

import pytest
import torch
from torch.distributions import (
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
    MultivariateNormal,
    Normal,
    Pareto,
    RelaxedBernoulli,
    StudentT,
    TransformedDistribution,
    Uniform,
    VonMises,
    Weibull,
    Wishart,
    constraints,
)
from torch.distributions.transforms import (
    AffineTransform,
    CatTransform,
    ExpTransform,
    TanhTransform,
    identity_transform,
)

from dadvi.supports import Constrained, Flat, ordered
from dadvi.transforms import biject_to


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
