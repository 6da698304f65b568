"""Third-order terms: the cubic that has the derivatives it is made from, with gradient and Hessian by autograd."""

import numpy as np
import pytest
import torch

from dadvi.bending import Cubic
from dadvi.structure import Structure

SHAPES = [(5, 1, 3), (4, 2, 2), (0, 0, 4)]
"""J groups, C columns, G dense coordinates."""


@pytest.fixture(params=SHAPES, ids=str)
def cubic(request):
    num_groups, num_columns, num_dense = request.param
    rng = np.random.default_rng(0)
    dim = num_groups * num_columns + num_dense
    structure = Structure.full(dim)
    if num_groups:
        places = torch.from_numpy(rng.permutation(dim)[: num_groups * num_columns].reshape(num_columns, num_groups))
        structure = Structure.grouped(dim, list(places), rng)
    matrix = torch.from_numpy(rng.standard_normal((dim, dim)))
    return Cubic(1, structure.from_matrix(matrix + matrix.T))


def value_of(cubic, away):
    """Return ½ δ_b δᵀMδ − ½ δ_b² mᵀδ + ⅙ δ_b³ m_b at δ (D,), with M in full."""
    M, b = cubic.change.matrix(), cubic.coordinate
    at = away[b]
    return 0.5 * at * (away @ M @ away) - 0.5 * at**2 * (M[b] @ away) + at**3 * M[b, b] / 6


def test_value_gradient_and_hessian_against_autograd(cubic):
    dim = cubic.change.structure.dim
    away = torch.from_numpy(np.random.default_rng(1).standard_normal((3, dim)))
    values, grads = cubic.value_and_grad(away)
    for point, value, grad in zip(away, values, grads, strict=True):
        leaf = point.clone().requires_grad_()
        expected = value_of(cubic, leaf)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, leaf)[0], rtol=1e-11, atol=1e-11)
        hessian = torch.autograd.functional.hessian(lambda x: value_of(cubic, x), point)
        kept = cubic.change.structure.from_matrix(hessian).matrix()
        torch.testing.assert_close(kept, hessian, rtol=1e-11, atol=1e-11)  # it is an arrowhead
        torch.testing.assert_close(cubic.hessian(point).matrix(), hessian, rtol=1e-11, atol=1e-11)


def test_its_hessian_changes_along_the_coordinate_by_the_matrix_it_is_made_from(cubic):
    dim, b = cubic.change.structure.dim, cubic.coordinate
    unit = torch.zeros(dim).double()
    unit[b] = 1.0
    torch.testing.assert_close(cubic.hessian(unit).matrix(), cubic.change.matrix(), rtol=1e-12, atol=1e-12)
    other = torch.from_numpy(np.random.default_rng(2).standard_normal((1, dim)))
    other[0, b] = 0.0
    assert float(cubic.value_and_grad(other)[0].abs().max()) < 1e-14  # no term without the coordinate
