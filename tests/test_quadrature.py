"""Rules for draws: mean 0 and unit variance exactly, and exact for what each of them is made for."""

import math
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch
from scipy import stats

from dadvi.elbo import draw_noise
from dadvi.quadrature import NUM_ERRORS, Rule, gauss_hermite, in_pairs, orthogonal, spherical, stratified

DIM = 5
RULES = {
    "gauss_hermite": lambda rng, dim=DIM: gauss_hermite(6, dim, rng),
    "gauss_hermite of two points": lambda rng, dim=DIM: gauss_hermite(6, dim, rng, 2),
    "orthogonal": lambda rng, dim=DIM: orthogonal(2 * dim, dim, rng),
    "two orthogonal": lambda rng, dim=DIM: orthogonal(4 * dim, dim, rng),
    "spherical": lambda rng, dim=DIM: spherical(6 * dim, dim, rng),
    "stratified": lambda rng, dim=DIM: stratified(32, dim, rng),
}


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param](np.random.default_rng(3))


def close(value, expected, atol=1e-13):
    torch.testing.assert_close(value, expected, rtol=0, atol=atol)


def test_every_rule_has_mean_0_and_unit_variance_in_every_coordinate(rule):
    assert float(rule.weights.sum()) == pytest.approx(1, abs=1e-15)
    assert (rule.weights[rule.nodes.any(1)] > 0).all()
    assert rule.nodes.dtype == rule.weights.dtype == torch.float64
    close(rule.mean(rule.nodes), torch.zeros(DIM).double())
    close(rule.mean(rule.nodes.square()), torch.ones(DIM).double())
    for power in (3, 5, 7):  # nodes come in pairs ±ε
        close(rule.mean(rule.nodes**power), torch.zeros(DIM).double(), atol=1e-11)


def test_nodes_come_in_pairs_of_the_same_weight(rule):
    both = torch.cat([rule.weights[:, None], rule.nodes], dim=1)
    mirrored = torch.cat([rule.weights[:, None], -rule.nodes], dim=1)
    order = lambda rows: rows[np.lexsort((rows + 0.0).numpy().round(9).T)]
    close(order(both), order(mirrored), atol=1e-15)


@pytest.mark.parametrize("kind", RULES)
def test_a_rule_is_a_function_of_the_generator(kind):
    first, again, other = (RULES[kind](np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.nodes, again.nodes)
    assert not torch.equal(first.nodes, other.nodes)


def test_mean_is_the_weighted_sum():
    rule = Rule(torch.zeros(3, 1).double(), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
    close(rule.mean(torch.tensor([1.0, 10.0, 100.0]).double()), torch.tensor(23.5).double())
    close(rule.mean(torch.eye(3).double()), rule.weights)
    assert torch.equal(Rule.equal(torch.zeros(4, 2)).weights, torch.full((4,), 0.25).double())


# Gauss–Hermite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_points", [2, 3, 5])
@pytest.mark.parametrize("num_signs", [1, 2, 7])
def test_gauss_hermite_is_exact_in_one_coordinate_to_its_degree(num_signs, num_points):
    num_nodes = num_signs * (num_points // 2 * 2) + num_points % 2  # directions share the point 0
    rule = gauss_hermite(num_nodes, DIM, np.random.default_rng(0), num_points)
    assert rule.nodes.shape == (num_nodes, DIM)
    for degree in range(2 * num_points + 1):
        moment = 0.0 if degree % 2 else float(stats.norm.moment(degree)) if degree else 1.0
        found = rule.mean(rule.nodes**degree)
        if degree < 2 * num_points:
            close(found, torch.full((DIM,), moment).double(), atol=1e-10)
        else:  # 1 instead of 3, 9 instead of 15, 825 instead of 945
            assert (found < 0.9 * moment).all()


def test_a_rule_has_a_direction_at_least():
    assert len(gauss_hermite(1, DIM, np.random.default_rng(0), 2).nodes) == 2
    assert len(gauss_hermite(1, DIM, np.random.default_rng(0)).nodes) == 3
    assert len(gauss_hermite(1, DIM, np.random.default_rng(0), 5).nodes) == 5


@pytest.mark.parametrize("dim", [2, 3, 5, 20])
def test_no_two_directions_are_the_same_but_for_their_sign(dim):
    for seed in range(20):
        nodes = gauss_hermite(2 * (dim - 1), dim, np.random.default_rng(seed)).nodes[1:dim]  # K/2 < dim directions
        assert len({tuple((node / node[0]).tolist()) for node in nodes}) == dim - 1


@pytest.mark.parametrize("num_points", [3, 5])
def test_products_of_coordinates_average_out_over_the_signs(num_points):
    # E[ε_i ε_j] is ±1 of one direction, and falls like 1/√directions: mean of `num_signs` random signs.
    for num_signs in (1, 400):
        rule = gauss_hermite(num_signs * (num_points - 1), DIM, np.random.default_rng(1), num_points)
        products = rule.mean(rule.nodes[:, :, None] * rule.nodes[:, None, :])
        off = products[~torch.eye(DIM, dtype=torch.bool)]
        assert off.square().mean().sqrt() == pytest.approx(num_signs**-0.5, rel=0.5)
        assert off.abs().max() < 4.5 * num_signs**-0.5


# Orthogonal --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5, 12])
def test_orthogonal_is_exact_for_every_quadratic_with_2_dim_draws(dim):
    rng = np.random.default_rng(dim)
    A, b = torch.from_numpy(rng.standard_normal((dim, dim))), torch.from_numpy(rng.standard_normal(dim))
    for blocks in (1, 3):
        rule = orthogonal(2 * dim * blocks, dim, rng)
        value = 1.5 + rule.nodes @ b + torch.einsum("ki,ij,kj->k", rule.nodes, A, rule.nodes)
        close(rule.mean(value), 1.5 + A.trace(), atol=1e-11)
        for i, j in combinations_with_replacement(range(dim), 2):
            assert float(rule.mean(rule.nodes[:, i] * rule.nodes[:, j])) == pytest.approx(float(i == j), abs=1e-12)
    few = orthogonal(2, 5, rng)
    close(few.nodes.norm(dim=1), torch.full((2,), math.sqrt(5), dtype=torch.float64))


# Spherical ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5, 12])
@pytest.mark.parametrize("num_matrices", [1, 3])
def test_spherical_is_exact_for_every_cubic(dim, num_matrices):
    rng = np.random.default_rng(dim)
    rule = spherical(2 * dim * num_matrices + 1, dim, rng)
    assert rule.nodes.shape == (1 + 2 * dim * num_matrices, dim)
    along = rule.nodes @ torch.from_numpy(rng.standard_normal((dim, 3)))  # products of three linear functions
    close(rule.mean(along.prod(1)), torch.tensor(0.0).double(), atol=1e-10)
    for i, j in combinations_with_replacement(range(dim), 2):
        assert float(rule.mean(rule.nodes[:, i] * rule.nodes[:, j])) == pytest.approx(float(i == j), abs=1e-11)
    close(rule.weights.sum(), torch.tensor(1.0).double(), atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_spherical_is_unbiased_for_what_is_no_polynomial_where_one_radius_is_not(dim):
    """E|aᵀε| = |a| √(2/π)."""
    a = torch.full((dim,), dim**-0.5, dtype=torch.float64)
    exact = math.sqrt(2 / math.pi)
    found = {
        make: np.array([float(rule.mean((rule.nodes @ a).abs())) for rule in map(make, range(400))])
        for make in (
            lambda seed: spherical(24, dim, np.random.default_rng(seed)),
            lambda seed: orthogonal(24, dim, np.random.default_rng(seed)),
        )
    }
    unbiased, biased = found.values()
    assert abs(unbiased.mean() - exact) < 4 * unbiased.std() / 20
    assert abs(biased.mean() - exact) > 4 * biased.std() / 20


# Stratified --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_draws", "num_cubes"), [(2, 1), (8, 1), (32, 2), (64, 4), (512, 8)])
def test_stratified_has_one_node_in_every_stratum_of_every_coordinate(num_draws, num_cubes):
    rule = stratified(num_draws, DIM, np.random.default_rng(0))
    assert rule.nodes.shape == (num_draws, DIM)
    levels = np.sort(rule.nodes.numpy(), axis=0)
    np.testing.assert_allclose(levels, np.repeat(levels[:, :1], DIM, axis=1), atol=1e-12)
    if num_draws >= 32:  # which unit variance stretches by little, so that nodes stay near their strata
        strata = stats.norm.ppf((np.arange(num_draws) + 0.5) / num_draws)
        assert np.abs(levels[:, 0] - strata).max() < 0.25
        assert np.abs(levels[:, 0] - strata).mean() < 0.1
    cubes = rule.nodes.reshape(2, num_cubes, -1, DIM).transpose(0, 1).flatten(1, 2)  # (cubes, nodes, DIM)
    close(cubes.square().mean(1), torch.ones(num_cubes, DIM).double())
    assert (rule.contrasts is None) == (num_cubes == 1)


def test_strata_of_different_coordinates_are_independent():
    # Random permutations: the correlation of two coordinates has an sd of about √(2/draws), as they come in pairs.
    nodes = torch.cat([stratified(64, 2, np.random.default_rng(seed)).nodes[None] for seed in range(400)])
    correlation = (nodes[:, :, 0] * nodes[:, :, 1]).mean(1)
    assert abs(float(correlation.mean())) < 4 * (2 / 64 / 400) ** 0.5
    assert float(correlation.std()) == pytest.approx((2 / 64) ** 0.5, rel=0.15)
    first = nodes[:, :32, 0]  # of each pair, either sign comes first
    assert abs(float((first > 0).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(32 * 400)


def test_stratified_is_better_than_random_draws_for_a_skewed_function():
    # E exp(σε) = exp(σ²/2), the precision of effects as a function of their scale.
    exact, num_draws = math.exp(0.5), 64
    errors = {
        kind: np.array(
            [float(rule.mean(rule.nodes[:, 0].exp()) - exact) for rule in map(make, range(200))],
        )
        for kind, make in {
            "stratified": lambda seed: stratified(num_draws, 2, np.random.default_rng(seed)),
            "random": lambda seed: Rule.equal(torch.from_numpy(np.random.default_rng(seed).standard_normal((64, 2)))),
        }.items()
    }
    assert np.abs(errors["stratified"]).max() < 0.03
    assert errors["random"].std() > 0.15


# Errors ------------------------------------------------------------------------------------------------------------

WITH_ERRORS = {
    "gauss_hermite": lambda rng: gauss_hermite(16, DIM, rng),
    "five points": lambda rng: gauss_hermite(16, DIM, rng, 5),
    "spherical": lambda rng: spherical(8 * DIM + 3, DIM, rng),
    "stratified": lambda rng: stratified(128, DIM, rng),
    "in_pairs": lambda rng: in_pairs(draw_noise("antithetic", 16, DIM, rng), rng),
}


@pytest.mark.parametrize("kind", WITH_ERRORS)
def test_errors_are_distributed_as_the_error_of_a_mean(kind):
    # Products of odd powers of two coordinates, whose mean is 0, and what every rule but random draws knows exactly.
    function = lambda nodes: torch.stack([nodes[:, 0] ** 3 * nodes[:, 1], nodes[:, 0], nodes[:, 1].square()], dim=1)
    rules = [WITH_ERRORS[kind](np.random.default_rng(seed)) for seed in range(400)]
    found = torch.stack([rule.mean(function(rule.nodes)) for rule in rules])  # (seeds, 3)
    told = torch.stack([rule.errors(function(rule.nodes)) for rule in rules])  # (seeds, NUM_ERRORS, 3)
    assert told.shape[1] == NUM_ERRORS
    ratio = float(told[..., 0].square().mean() / found[:, 0].square().mean())
    assert 0.7 < ratio < (3.0 if kind == "spherical" else 1.3)  # strata of distances are better than they tell
    close(told[..., 1], torch.zeros(400, NUM_ERRORS).double(), atol=1e-12)
    if kind != "in_pairs":
        close(told[..., 2], torch.zeros(400, NUM_ERRORS).double(), atol=1e-12)
    correlation = (told[:, 0, 0] * told[:, 1, 0]).mean() / told[..., 0].square().mean()  # of two draws of the error
    assert abs(float(correlation)) < 0.2


def test_a_single_rule_knows_nothing_of_its_error():
    for rule in (gauss_hermite(2, DIM, np.random.default_rng(0)), spherical(2 * DIM, DIM, np.random.default_rng(0))):
        assert rule.contrasts is None
        assert torch.equal(rule.errors(rule.nodes**4), torch.zeros(NUM_ERRORS, DIM).double())
