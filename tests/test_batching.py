"""Operations for K draws at once: the same values and gradients as draw by draw, whatever is picked and multiplied."""

from dataclasses import replace
from functools import wraps
from inspect import signature

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, HalfNormal, Normal

import dadvi
from dadvi.batching import NARROW, DrawsFirst, pick
from dadvi.binding import bind
from dadvi.passes import Gradient, HessianVector
from dadvi.stopwatch import Stopwatch

ROWS, GROUPS, ITEMS = 40, 300, 3  # more groups than rows, fewer items
RNG = np.random.default_rng(0)
BATCH = {
    "x": torch.from_numpy(RNG.standard_normal((ROWS, 4))),
    "wide": torch.from_numpy(RNG.standard_normal((ROWS, NARROW + 1))),
    "group": torch.from_numpy(RNG.integers(0, GROUPS, ROWS)),
    "last": torch.from_numpy(RNG.integers(-GROUPS, 0, ROWS)),
    "item": torch.from_numpy(RNG.integers(0, ITEMS, ROWS)),
    "y": torch.from_numpy(RNG.random(ROWS) < 0.4),
    "w": torch.from_numpy(RNG.uniform(0.0, 2.0, ROWS)),
}
PRIOR = {
    "b": Normal(torch.zeros(4), 1.0),
    "c": Normal(torch.zeros(NARROW + 1), 0.1),
    "tau": HalfNormal(1.0),
    "u": Normal(torch.zeros(GROUPS), 1.0),
    "v": Normal(torch.zeros(GROUPS, 4), 1.0),
    "a": Normal(torch.zeros(ITEMS), 1.0),
}
LOGITS = {
    "a product": lambda b, x: x @ b,
    "the same by another name": lambda b, x: torch.mv(x, b) + x.mv(b) + torch.matmul(x, b),
    "a wide product": lambda c, wide: wide @ c,
    "both": lambda b, c, x, wide: x @ b + wide @ c,
    "effects": lambda b, u, x, group: x @ b + u[group],
    "effects with a scale": lambda b, tau, u, x, group: x @ b + tau * u[group],
    "effects of what was scaled before": lambda tau, u, group: (tau * u)[group],
    "slopes of groups": lambda v, x, group: (x * v[group]).sum(1),
    "two fields of one latent": lambda u, group, item: u[group] - u[item],
    "picked, and used in whole": lambda u, group: u[group] - u.mean(),
    "few items": lambda u, a, group, item: u[group] * a[item],
    "effects that are changed in place": lambda b, u, x, group: u[group].add_(x @ b),
    "one of two uses changed in place": lambda u, group: u[group].mul_(2.0) * u[group],
    "codes from the end": lambda u, last, group: u[last + 0] + u[group],
    "codes that are computed": lambda u, group, item: u[(group + item) % GROUPS],
    "a slice": lambda u, x: x[:, 0] * u[2] + u[:4].sum() + x @ u[:4],
    "a product of matrices": lambda v, x, item: (x @ v[:4].T)[:, 0],
}
"""Likelihoods by what they do."""


def bound_to(logits, weight=None):
    @wraps(logits)  # whose arguments are those of the likelihood
    def likelihood(**arguments):
        return Bernoulli(logits=logits(**arguments))

    prior = {name: PRIOR[name] for name in signature(logits).parameters if name in PRIOR}
    model = dadvi.Model(prior, likelihood, observed="y", weight=weight)
    return bind(model, {name: values.dtype for name, values in BATCH.items()}, [(0, BATCH)])


@pytest.mark.parametrize("num_draws", [1, 5])
@pytest.mark.parametrize("strategy", ["parameters", "vmap"])
@pytest.mark.parametrize("what", LOGITS)
def test_values_and_gradients_are_those_draw_by_draw(what, strategy, num_draws):
    bound = bound_to(LOGITS[what], weight="w")
    assert bound.strategy == "parameters"
    points = RNG.standard_normal((num_draws, bound.model.dim))
    found = Gradient(points).on_chunk(replace(bound, strategy=strategy), BATCH)
    one_by_one = Gradient(points).on_chunk(replace(bound, strategy="loop", picks=()), BATCH)
    np.testing.assert_allclose(found.log_lik, one_by_one.log_lik, rtol=1e-12)
    np.testing.assert_allclose(found.grad, one_by_one.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("what", LOGITS)
def test_hessians_are_those_draw_by_draw(what):
    bound = bound_to(LOGITS[what])
    points, tangents = RNG.standard_normal((3, bound.model.dim)), RNG.standard_normal((2, bound.model.dim))
    found = HessianVector(points, tangents).on_chunk(bound, BATCH)
    one_by_one = HessianVector(points, tangents).on_chunk(
        replace(bound, strategy="loop", picks=(), affine=False), BATCH
    )
    np.testing.assert_allclose(found.products, one_by_one.products, rtol=1e-9, atol=1e-10)


def test_picks_are_found_by_the_names_of_latent_and_codes():
    picks = {
        "a product": (),
        "effects": (("u", "group"),),
        "two fields of one latent": (("u", "group"), ("u", "item")),
        "slopes of groups": (("v", "group"),),
        "effects of what was scaled before": (),
        "codes that are computed": (),
    }
    assert {what: bound_to(LOGITS[what]).picks for what in picks} == picks


def test_fields_that_index_anything_are_codes():
    codes = {
        "a product": (),
        "effects": ("group",),
        "two fields of one latent": ("group", "item"),
        "effects of what was scaled before": ("group",),
        "codes that are computed": (),
    }
    assert {what: bound_to(LOGITS[what]).codes for what in codes} == codes


def test_only_latents_with_more_elements_than_rows_are_picked_apart_and_only_by_codes_that_count_up():
    bound = bound_to(LOGITS["few items"])
    latents, _ = bound.model.space.constrain(torch.zeros(2, bound.model.dim, dtype=torch.float64))
    assert bound.picks == (("u", "group"), ("a", "item"))
    picked = pick(bound.picks, latents, BATCH)
    assert {name: tuple(values.shape) for name, values in picked.items()} == {("u", "group"): (2, ROWS)}
    assert pick((("u", "last"),), latents, BATCH) == {}


def test_no_gradient_of_a_chunk_has_an_element_for_every_group(monkeypatch):
    """Beyond sums over all rows, which are there once a pass."""
    sizes = []
    grad = torch.autograd.grad

    def watched(*arguments, **settings):
        found = grad(*arguments, **settings)
        sizes.extend(each.numel() for each in found if each is not None)
        return found

    bound = bound_to(LOGITS["effects with a scale"])
    work = Gradient(RNG.standard_normal((2, bound.model.dim))).over(bound, Stopwatch())
    monkeypatch.setattr(torch.autograd, "grad", watched)
    work.add(BATCH)
    assert max(sizes) == 2 * ROWS < 2 * GROUPS


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("beyond", [GROUPS, -GROUPS - 1])
def test_codes_beyond_the_latent_are_refused(num_draws, beyond):
    bound = bound_to(LOGITS["effects"])
    batch = {**BATCH, "group": torch.full((ROWS,), beyond)}
    with pytest.raises(IndexError, match="out of"):
        Gradient(np.zeros((num_draws, bound.model.dim))).on_chunk(bound, batch)


def test_narrow_products_lie_with_draws_first_in_memory_and_wide_ones_as_they_are():
    def strides(name, dim):
        latents = {"b": torch.zeros(5, dim, dtype=torch.float64)}

        def product(b):
            with DrawsFirst({"b": b}, BATCH):
                return BATCH[name] @ b

        return torch.func.vmap(product)(latents["b"]).stride()

    assert strides("x", 4) == (ROWS, 1)
    assert strides("wide", NARROW + 1) == (1, 5)


def test_a_product_of_shapes_that_do_not_fit_fails_as_it_does_without():
    with pytest.raises(RuntimeError) as plain:
        BATCH["x"] @ torch.zeros(3, dtype=torch.float64)
    with DrawsFirst({}, BATCH), pytest.raises(RuntimeError) as told:
        BATCH["x"] @ torch.zeros(3, dtype=torch.float64)
    assert str(told.value) == str(plain.value)
