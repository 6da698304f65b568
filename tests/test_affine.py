"""Hessians by parameters that are affine in η: those of automatic differentiation, and only where they are."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Gamma,
    Gumbel,
    HalfNormal,
    Laplace,
    MixtureSameFamily,
    Normal,
    Poisson,
    StudentT,
)

import dadvi
from dadvi import passes
from dadvi.binding import bind_to
from dadvi.passes import HessianVector
from dadvi.stopwatch import Stopwatch

ROWS, SLOPES, GROUPS = 60, 3, 4

SLOPE = {"b": Normal(torch.zeros(SLOPES), 1.0)}
EFFECTS = {**SLOPE, "u": Normal(torch.zeros(GROUPS), 1.0)}

AFFINE = {
    "logits": (SLOPE, lambda b, x: Bernoulli(logits=x @ b), "yes"),
    "offset": (SLOPE, lambda b, x, t: Normal(5 * t + x @ b, 0.5), "t"),
    "of many trials": (SLOPE, lambda b, x: Binomial(3, logits=x @ b), "count"),
    "robust": (SLOPE, lambda b, x: StudentT(4.0, x @ b, 0.7), "t"),
    "effects": (EFFECTS, lambda b, u, x, g: Bernoulli(logits=x @ b + u[g]), "yes"),
    "effects and their scale": (
        {"tau": HalfNormal(1.0), "u": lambda tau: Normal(torch.zeros(GROUPS), tau)},
        lambda u, g: Bernoulli(logits=u[g]),
        "yes",
    ),
    "one for all rows": ({"a": Normal(0.0, 1.0)}, lambda a: Bernoulli(logits=a), "yes"),
    "two, one of them the same in all rows": (
        {**SLOPE, "c": Normal(0.0, 0.1)},
        lambda b, c, x: Gumbel(x @ b, 3 + c),
        "t",
    ),
    "two of every row": ({**SLOPE, "c": Normal(0.0, 0.1)}, lambda b, c, x, t: Gumbel(x @ b, 9 + c * t), "t"),
    "density without curvature": (SLOPE, lambda b, x: Laplace(x @ b, 1.0), "t"),
}
BENT = {
    "rate": (SLOPE, lambda b, x: Poisson((x @ b).exp()), "count"),
    "scale": ({**SLOPE, "s": HalfNormal(1.0)}, lambda b, s, x: Normal(x @ b, s), "t"),
    "product": ({**SLOPE, "c": Normal(0.0, 1.0)}, lambda b, c, x: Bernoulli(logits=c * (x @ b)), "yes"),
    "ramp": (SLOPE, lambda b, x: Normal(torch.relu(x @ b), 1.0), "t"),
    "larger of two": (SLOPE, lambda b, x: Normal(torch.maximum(x[:, 0] * b[0], x @ b), 1.0), "t"),
    "positive": ({"a": Gamma(2.0, 2.0)}, lambda a: Normal(a, 1.0), "t"),
    "classes": (SLOPE, lambda b, x: Categorical(logits=x[:, :2] * b[:2]), "yes"),
    "mixture": (
        SLOPE,
        lambda b, x: MixtureSameFamily(
            Categorical(logits=torch.zeros(len(x), 2)), Normal(torch.stack([x @ b, x[:, 0] * b[0]], 1), 1.0)
        ),
        "t",
    ),
}


@pytest.fixture
def bound(write):
    def bind(prior, likelihood, observed, dtype=np.float64, weight=None):
        rng = np.random.default_rng(0)
        fields = {
            "x": rng.standard_normal((ROWS, SLOPES)).astype(dtype),
            "t": rng.standard_normal(ROWS).astype(dtype),
            "g": rng.integers(GROUPS, size=ROWS),
            "yes": rng.random(ROWS) < 0.4,
            "count": rng.integers(3, size=ROWS),
            "w": rng.random(ROWS).astype(dtype),
        }
        data = write(fields, chunk_rows=ROWS)
        return bind_to(dadvi.Model(prior, likelihood, observed, weight=weight), data), data.read(0)

    return bind


def work(dim, num_points):
    rng = np.random.default_rng(num_points)
    weights = rng.random(num_points)
    return HessianVector(0.3 * rng.standard_normal((num_points, dim)), rng.standard_normal((5, dim)), weights)


def products(model, batch, of):
    """Return the products by torch's Hessian of the log-likelihood, in float64."""
    exact = replace(model, dtype=torch.float64, strategy="loop")
    hessian = sum(
        weight * torch.autograd.functional.hessian(lambda eta: exact.log_lik(eta[None], batch)[0], torch.from_numpy(at))
        for at, weight in zip(of.points, of.weights, strict=True)
    )
    return (torch.from_numpy(of.tangents) @ hessian).numpy()


@pytest.mark.parametrize("num_points", [1, 3])
@pytest.mark.parametrize("weight", [None, "w"])
@pytest.mark.parametrize("case", AFFINE)
def test_products_are_those_of_the_hessian(bound, case, weight, num_points):
    model, batch = bound(*AFFINE[case], weight=weight)
    assert model.affine
    of = work(model.model.dim, num_points)
    np.testing.assert_allclose(of.on_chunk(model, batch).products, products(model, batch, of), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", AFFINE)
def test_products_of_float32_rows(bound, case):
    model, batch = bound(*AFFINE[case], dtype=np.float32)
    assert model.affine
    of = work(model.model.dim, 3)
    exact = products(model, batch, of)
    found = of.on_chunk(model, batch).products
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * max(1.0, np.abs(exact).max()))


@pytest.mark.parametrize("num_points", [1, 3])
@pytest.mark.parametrize("case", BENT)
def test_what_bends_goes_the_other_way(bound, case, num_points):
    model, batch = bound(*BENT[case])
    assert not model.affine
    of = work(model.model.dim, num_points)
    np.testing.assert_allclose(of.on_chunk(model, batch).products, products(model, batch, of), rtol=1e-9, atol=1e-9)


def test_tangents_are_taken_as_many_at_a_time_as_memory_allows(bound, monkeypatch):
    model, batch = bound(*AFFINE["effects"])
    of = work(model.model.dim, 3)
    together = of.on_chunk(model, batch).products
    monkeypatch.setattr(passes, "BYTES_AT_ONCE", 2 * passes.AFFINE_ARRAYS * 8 * ROWS)
    np.testing.assert_allclose(of.on_chunk(model, batch).products, together, rtol=1e-12)


# Looked at on every chunk ---------------------------------------------------------------------------------------------

LATE = {
    "a curve": lambda b, c, x, t: Normal(x @ b + t * (-c).exp(), 1.0),
    "a slight curve": lambda b, c, x, t: Normal(x @ b + t * (c + 1e-4 * c**2), 1.0),  # first derivatives hardly differ
    "a corner": lambda b, c, x, t: Normal(x @ b + t * torch.maximum(c, 0 * c + 0.1), 1.0),
    "a product": lambda b, c, x, t: Normal(x @ b + t * c * b[0], 1.0),
    "a branch": lambda b, c, x, t: Normal(x @ b + (t * c**2 if t.any() else 0.0), 1.0),
}


TWO_PARAMETERS = {
    "bends that cancel": lambda b, c, x, t: Normal(
        0.1 * (x @ b) + t * 0.05 * (x @ b) ** 2, 3.0 - t * 0.05 * (x @ b) ** 2
    ),
    "of a difference of latents": lambda b, c, x, t: Normal(x @ b + t * (b[0] - b[1]) ** 2, 1.0),
    "of two latents": lambda b, c, x, t: Normal(x @ b + t * (b[0] - c) ** 2, 1.0),
}


@pytest.mark.parametrize("num_points", [1, 3])
@pytest.mark.parametrize("name", [*LATE, *TWO_PARAMETERS])
def test_what_bends_in_later_rows_alone_is_seen_there(write, name, num_points):
    """The first rows, by which a likelihood is judged, do not have it."""
    rng = np.random.default_rng(0)
    late = np.arange(2 * ROWS) >= ROWS
    fields = {"x": rng.standard_normal((2 * ROWS, SLOPES)), "t": late * 1.0, "y": rng.standard_normal(2 * ROWS)}
    data = write(fields, chunk_rows=ROWS, shard_rows=ROWS)
    likelihood = {**LATE, **TWO_PARAMETERS}[name]
    model = bind_to(dadvi.Model({**SLOPE, "c": Normal(0.0, 1.0)}, likelihood, "y"), data)
    assert model.affine
    of = work(model.model.dim, num_points)
    for chunk in range(2):
        batch = data.read(chunk)
        np.testing.assert_allclose(of.on_chunk(model, batch).products, products(model, batch, of), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_points", [1, 3])
def test_a_positive_latent_that_later_rows_alone_have_is_seen_to_bend(write, num_points):
    """Parameters are affine in the latent as it is, and not in its coordinate."""
    rng = np.random.default_rng(0)
    late = np.arange(2 * ROWS) >= ROWS
    fields = {"x": rng.standard_normal((2 * ROWS, SLOPES)), "t": late * 1.0, "y": rng.standard_normal(2 * ROWS)}
    data = write(fields, chunk_rows=ROWS, shard_rows=ROWS)
    prior = {**SLOPE, "c": HalfNormal(1.0)}
    model = bind_to(dadvi.Model(prior, lambda b, c, x, t: Normal(x @ b + t * c, 1.0), "y"), data)
    of, batch = work(model.model.dim, num_points), data.read(1)
    found = of.on_chunk(replace(model, affine=True), batch).products
    np.testing.assert_allclose(found, products(model, batch, of), rtol=1e-9, atol=1e-9)


def test_predictors_of_very_different_scale_hide_nothing(write):
    rng = np.random.default_rng(0)
    fields = {"x": 1.7e9 + 1e7 * rng.random(ROWS), "y": rng.standard_normal(ROWS)}
    data = write(fields, chunk_rows=ROWS)
    prior = {"b": Normal(0.0, 1.0), "c": Normal(0.0, 1.0)}
    model = bind_to(dadvi.Model(prior, lambda b, c, x: Normal(x * b + 3 * torch.sigmoid(c), 1.0), "y"), data)
    of, batch = work(2, 1), data.read(0)
    np.testing.assert_allclose(of.on_chunk(model, batch).products, products(model, batch, of), rtol=1e-9)


def test_a_chunk_without_any_latent_has_no_curvature(write):
    late = np.arange(2 * ROWS) >= ROWS
    data = write({"t": late * 1.0, "y": np.zeros(2 * ROWS)}, chunk_rows=ROWS, shard_rows=ROWS)
    model = bind_to(
        dadvi.Model({"c": Normal(0.0, 1.0)}, lambda c, t: Normal(t * c if t.any() else 0 * t, 1.0), "y"), data
    )
    of = replace(work(1, 2), held=())
    found = [of.on_chunk(replace(model, affine=True, strategy="parameters"), data.read(chunk)) for chunk in range(2)]
    assert not found[0].products.any()
    np.testing.assert_allclose(found[1].products, -ROWS * of.weights.sum() * of.tangents)


# Effects of many groups -----------------------------------------------------------------------------------------------

MANY = {
    "tau": HalfNormal(1.0),
    "s": HalfNormal(torch.ones(2)),
    "b": Normal(torch.zeros(SLOPES), 1.0),
    "z": Normal(torch.zeros(5 * ROWS), 1.0),
}


def given_scales(bound, held_of, num_points=3):
    """Products given coordinates that are the same at all points, of effects of more groups than there are rows."""
    model, batch = bound(
        MANY, lambda tau, s, b, z, x, g: Bernoulli(logits=s[0] * s[1] * (x @ b) + tau * z[g]), "yes", weight="w"
    )
    assert not model.affine
    of = work(model.model.dim, num_points)
    of.points[:, held_of] = of.points[0, held_of]
    of.tangents[:, held_of] = 0.0
    exact = products(model, batch, of)
    exact[:, held_of] = 0.0
    found = replace(of, held=tuple(held_of)).on_chunk(model, batch).products
    found[:, held_of] = 0.0  # by differentiation they are what they are
    return found, exact


def test_products_given_the_scales_that_are_held(bound):
    found, exact = given_scales(bound, [0, 1, 2])
    np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("held_of", [[0], [0, 1]], ids=["not all scales", "half of a latent"])
def test_products_where_too_little_is_held_are_right_all_the_same(bound, held_of):
    found, exact = given_scales(bound, held_of)
    np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-9)


def test_no_array_of_a_batch_has_an_element_for_every_group(bound, monkeypatch):
    groups = 50 * ROWS
    model, batch = bound(
        {**SLOPE, "u": Normal(torch.zeros(groups), 1.0)}, lambda b, u, x, g: Bernoulli(logits=x @ b + u[g]), "yes"
    )
    of = work(model.model.dim, 3)
    summation, sizes, grad = of.over(model, Stopwatch()), [], torch.autograd.grad

    def watched(*arguments, **settings):
        found = grad(*arguments, **settings)
        sizes.extend(each.numel() for each in found if each is not None)
        return found

    monkeypatch.setattr(torch.autograd, "grad", watched)
    summation.add(batch)
    assert 0 < max(sizes) <= 6 * ROWS < groups  # at three points, the origin and two more
    monkeypatch.undo()
    np.testing.assert_allclose(summation.sums().products, products(model, batch, of), rtol=1e-9, atol=1e-9)
