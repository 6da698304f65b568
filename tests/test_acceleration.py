"""Anderson acceleration: exact on affine maps in as many steps as they have dimensions, and what it must not do."""

import numpy as np
import pytest
import torch

from dadvi.acceleration import DEPTH, Iterate, accelerated


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def affine(dim, seed=0, contraction=0.9):
    """Return F(x) = A x + b with singular values up to `contraction`, and its fixed point."""
    A = normal(dim, dim, seed=seed)
    A = contraction * A / torch.linalg.matrix_norm(A, 2)
    b = normal(dim, seed=seed + 1)
    return (lambda x: A @ x + b), torch.linalg.solve(torch.eye(dim).double() - A, b)


def run(function, start, steps):
    """Return the points that acceleration visits, the start first."""
    points, history = [start], []
    for _ in range(steps):
        point = points[-1]
        history.append(Iterate(point, function(point) - point))
        points.append(accelerated(history))
    return points


@pytest.mark.parametrize("dim", range(1, DEPTH + 1))
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("contraction", [0.9, 2.0])  # of which plain iteration diverges
def test_an_affine_map_is_solved_by_one_iterate_more_than_it_has_dimensions(dim, seed, contraction):
    function, fixed = affine(dim, seed, contraction)
    points = run(function, 5 * normal(dim, seed=seed + 2), dim + 1)
    away = [float((point - fixed).norm()) for point in points]
    assert away[-1] < 1e-8 * away[0]
    assert away[-2] > 1e-4 * away[0]  # and not before


def test_one_iterate_gives_the_value_of_the_map():
    x, f = normal(7, seed=1), normal(7, seed=2)
    assert torch.equal(accelerated([Iterate(x, f)]), x + f)


def test_two_iterates_by_hand():
    # F(x) = x/2 + 1 in one dimension: a secant step to its fixed point 2. x = 0 and 1, residuals 1 and ½.
    history = [Iterate(torch.tensor([x]).double(), torch.tensor([1 - x / 2]).double()) for x in (0.0, 1.0)]
    torch.testing.assert_close(accelerated(history), torch.tensor([2.0]).double())
    # Orthogonal residual differences: γ = ⟨f, Δf⟩/|Δf|² = ½, and x ← 1 + f − ½ (Δx + Δf).
    history = [
        Iterate(torch.tensor([0.0, 0.0]).double(), torch.tensor([1.0, 0.0]).double()),
        Iterate(torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()),
    ]
    torch.testing.assert_close(accelerated(history), torch.tensor([1.0, 0.5]).double())


def test_only_the_last_differences_count():
    function, _ = affine(12, seed=3)
    history = [Iterate(x, function(x) - x) for x in normal(DEPTH + 6, 12, seed=4)]
    assert torch.equal(accelerated(history), accelerated(history[-DEPTH - 1 :]))
    assert not torch.equal(accelerated(history), accelerated(history[-DEPTH:]))


def test_the_step_minimises_the_residual_that_an_affine_map_would_have():
    function, _ = affine(12, seed=5)
    history = [Iterate(x, function(x) - x) for x in normal(DEPTH + 1, 12, seed=6)]
    points = torch.stack([each.point for each in history], 1)
    residuals = torch.stack([each.residual for each in history], 1)
    # Weights of sum 1 that minimise |Σ w f|, by their normal equations.
    weights = torch.linalg.solve(residuals.T @ residuals, torch.ones(DEPTH + 1).double())
    weights = weights / weights.sum()
    torch.testing.assert_close(accelerated(history), (points + residuals) @ weights, rtol=1e-7, atol=1e-7)


def test_repeated_and_collinear_iterates_do_no_harm():
    function, fixed = affine(3, seed=7)
    x = normal(3, seed=8)
    same = Iterate(x, function(x) - x)
    torch.testing.assert_close(accelerated([same, same, same]), function(x))
    away = fixed - x
    on_a_line = [Iterate(fixed - t * away, function(fixed - t * away) - (fixed - t * away)) for t in (1.0, 0.6, 0.2)]
    torch.testing.assert_close(accelerated(on_a_line), fixed, rtol=0, atol=1e-6)
    at_rest = [same, Iterate(fixed, torch.zeros(3).double())]
    torch.testing.assert_close(accelerated(at_rest), fixed)


def test_faster_than_the_map_itself_where_that_contracts_slowly():
    # Eigenvalues from 0.2 to 0.97 and a bend: 0.97³⁰ = 0.4 of the way is left after 30 plain steps.
    vectors = torch.linalg.qr(normal(20, 20, seed=9)).Q
    A = (vectors * torch.cat([torch.linspace(0.2, 0.5, 18), torch.tensor([0.9, 0.97])]).double()) @ vectors.T
    fixed = normal(20, seed=10)

    def function(x):
        return fixed + A @ (x - fixed) + 0.01 * (x - fixed).square()

    start = fixed + 0.5 * vectors[:, -1] + normal(20, seed=11) / 20**0.5
    plain = [start]
    for _ in range(30):
        plain.append(function(plain[-1]))
    away = [float((points[-1] - fixed).norm()) for points in (plain, run(function, start, 30))]
    assert away[0] > 0.05
    assert away[1] < 1e-6
