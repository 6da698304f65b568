"""Arrowheads: what their products tell, and every operation of them and of their roots against dense linear algebra."""

import numpy as np
import pytest
import torch

from dadvi.quadratic import FLAT, Curvature
from dadvi.structure import Arrowhead, Root, Structure

SHAPES = [(7, 1, 3), (5, 2, 4), (6, 3, 1), (0, 0, 5), (8, 1, 0), (4, 2, 0), (1, 2, 2), (1, 1, 0)]
"""J groups, C columns, G dense coordinates."""


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def structure_of(shape, seed=0):
    """Return a structure whose coordinates lie anyhow."""
    num_groups, num_columns, num_dense = shape
    rng = np.random.default_rng(seed)
    dim = num_groups * num_columns + num_dense
    if num_groups == 0:
        return Structure.full(dim)
    places = torch.from_numpy(rng.permutation(dim)[: num_groups * num_columns].reshape(num_columns, num_groups))
    structure = Structure.grouped(dim, list(places), rng)
    torch.testing.assert_close(structure.groups, places.T)
    return structure


def held(structure):
    """Return which elements (D, D) of a matrix the structure holds: by its definition, one by one."""
    group_of = {int(i): j for j, group in enumerate(structure.groups) for i in group}
    dense = set(structure.dense.tolist())
    return torch.tensor(
        [
            [i in dense or k in dense or group_of[i] == group_of[k] for k in range(structure.dim)]
            for i in range(structure.dim)
        ]
    )


def matrix_of(structure, seed=1, definite=True):
    """Return a symmetric matrix (D, D) of the structure, in units from 1e-2 to 1e2."""
    dim = structure.dim
    matrix = normal(dim, dim, seed=seed)
    matrix = torch.where(held(structure), matrix + matrix.T, 0.0)
    if definite:
        matrix = matrix + (0.3 - float(torch.linalg.eigvalsh(matrix)[0])) * torch.eye(dim).double()
    units = 10 ** torch.from_numpy(np.random.default_rng(seed + 1).uniform(-2, 2, dim))
    return matrix * (units[:, None] * units)


def scaled(matrix, like):
    """Return a matrix in the units of the diagonal of `like`, so that its elements compare."""
    units = like.diagonal().abs().sqrt()
    return matrix / units[:, None] / units


def assert_same(found, expected, rtol=1e-11):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.fixture(params=SHAPES, ids=str)
def structure(request):
    return structure_of(request.param)


# What a structure is -----------------------------------------------------------------------------------------------


def test_every_coordinate_has_one_place(structure):
    places = torch.cat([structure.dense, structure.groups.flatten()])
    assert sorted(places.tolist()) == list(range(structure.dim))
    assert structure.dense.tolist() == sorted(structure.dense.tolist())
    assert structure.hubs.shape == structure.dense.shape
    assert structure.num_tangents == len(structure.dense) + structure.groups.shape[1] == len(structure.tangents())
    assert (structure.signs.abs() == 1).all()


def test_extremes_are_the_full_matrix_and_the_diagonal():
    matrix = normal(6, 6)
    matrix = matrix + matrix.T
    full, diagonal = Structure.full(6), Structure.diagonal(6)
    assert (full.num_tangents, diagonal.num_tangents) == (6, 1)
    assert torch.equal(full.from_matrix(matrix).matrix(), matrix)
    assert torch.equal(diagonal.from_matrix(matrix).matrix(), matrix.diagonal().diag())
    assert torch.equal(Arrowhead.dense(matrix).matrix(), matrix)
    assert torch.equal(Arrowhead.of_diagonal(matrix.diagonal()).matrix(), matrix.diagonal().diag())


def test_signs_of_the_probes_are_random():
    columns = [torch.arange(400)]
    signs = [Structure.grouped(402, columns, np.random.default_rng(seed)).signs for seed in (0, 0, 1)]
    assert torch.equal(signs[0], signs[1])
    assert 120 < int((signs[0] != signs[2]).sum()) < 280
    assert 120 < int((signs[0] > 0).sum()) < 280


# Products tell the matrix ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("definite", [True, False])
def test_products_with_the_tangents_tell_the_matrix(structure, definite):
    matrix = matrix_of(structure, definite=definite)
    products = torch.from_numpy(structure.tangents()) @ matrix
    found = structure.arrowhead(products)
    assert_same(scaled(found.matrix(), matrix), scaled(matrix, matrix), rtol=1e-9)
    assert torch.equal(structure.from_matrix(matrix).matrix(), matrix)
    assert torch.equal(found.blocks, found.blocks.mT)
    assert torch.equal(found.corner, found.corner.T)


def test_what_a_structure_neglects_averages_out_over_signs():
    # A full matrix: an effect's block is off by Σ ± H_ik over the other groups, in a mean over signs by nothing.
    matrix = normal(9, 9)
    matrix = matrix + matrix.T
    blocks = []
    for seed in range(400):
        structure = Structure.grouped(9, [torch.tensor([0, 2, 4, 6])], np.random.default_rng(seed))
        blocks.append(structure.arrowhead(torch.from_numpy(structure.tangents()) @ matrix).blocks.flatten())
    groups = matrix[[0, 2, 4, 6]][:, [0, 2, 4, 6]]
    error = (groups.square().sum(1) - groups.diagonal().square()).sqrt()
    found = torch.stack(blocks)
    assert ((found.mean(0) - groups.diagonal()).abs() < 4 * error / 20).all()
    torch.testing.assert_close(found.std(0), error, rtol=0.2, atol=0)  # and the probes do err


@pytest.mark.parametrize("hubs", [[False] * 4, [True, False, False, True], [True] * 4], ids=str)
def test_fewer_products_tell_a_priors_matrix(hubs):
    structure = structure_of((5, 2, 4))
    matrix = matrix_of(structure)
    hubs = torch.tensor(hubs)
    others = structure.dense[~hubs]
    apart = torch.ones(structure.dim, dtype=torch.bool)
    apart[structure.dense[hubs]] = False
    for other in others:  # these curve with hubs, and by themselves
        matrix[other, apart], matrix[apart, other] = 0.0, 0.0
    matrix[others, others] = torch.arange(1.0, len(others) + 1).double()
    structure = Structure(structure.dense, structure.groups, structure.signs, hubs)
    tangents = structure.prior_tangents()
    assert len(tangents) == int(hubs.sum()) + 2  # of which one is that of the others too
    found = structure.prior_arrowhead(torch.from_numpy(tangents) @ matrix).matrix()
    assert_same(scaled(found, matrix), scaled(matrix, matrix), rtol=1e-9)
    torch.testing.assert_close(found[others], matrix[others], rtol=0, atol=0)


# Operations --------------------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_matrix(structure):
    P, other = matrix_of(structure), matrix_of(structure, seed=5, definite=False)
    a, b = structure.from_matrix(P), structure.from_matrix(other)
    v = normal(3, structure.dim, seed=2)
    assert_same(a.times(v), v @ P)
    assert torch.equal(a.diagonal(), P.diagonal())
    assert_same((a + b).matrix(), P + other)
    assert_same((a * -2.5).matrix(), -2.5 * P)
    assert torch.equal((-a).matrix(), -P)


# Roots -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def definite(structure):
    """A definite matrix, the inverse, and the root of it."""
    P = matrix_of(structure)
    curvature = Curvature.of(structure.from_matrix(P))
    return P, torch.linalg.inv(scaled(P, P)) / P.diagonal().sqrt()[:, None] / P.diagonal().sqrt(), curvature.factor


def test_root_times_its_transpose_is_the_inverse(definite):
    P, inverse, root = definite
    R = root.matrix()
    assert_same(scaled(R @ R.T, inverse), scaled(inverse, inverse), rtol=1e-9)
    unit = torch.eye(len(P)).double()
    assert_same(R.T @ P @ R, unit, rtol=1e-8)


def test_roots_operations_are_those_of_the_matrix(definite):
    _, inverse, root = definite
    R = root.matrix()
    dim = len(R)
    unit = torch.eye(dim).double()
    torch.testing.assert_close(root.times(unit), R.T)
    for v in (normal(dim, seed=3), normal(4, dim, seed=3), normal(2, 3, dim, seed=3)):
        assert_same(root.times(v), v @ R.T)
        assert_same(root.transpose_times(v), v @ R)
    for v in (normal(4, dim, seed=3), normal(2, 3, dim, seed=3)):
        torch.testing.assert_close(root.inverse_times(root.times(v)), v, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(root.times(root.inverse_times(v)), v, rtol=1e-8, atol=1e-8)
    v, g = normal(dim, seed=4), normal(dim, seed=5)
    torch.testing.assert_close(g @ root.times(v), root.transpose_times(g) @ v)
    torch.testing.assert_close(root.stddev, inverse.diagonal().sqrt(), rtol=1e-9, atol=0)
    torch.testing.assert_close(root.log_det(), 0.5 * torch.linalg.slogdet(inverse).logabsdet, rtol=1e-10, atol=1e-9)


def test_inverse_of_a_root_takes_one_vector_as_the_others_do(definite):
    _, _, root = definite
    v = normal(root.structure.dim, seed=3)
    torch.testing.assert_close(root.inverse_times(root.times(v)), v, rtol=1e-9, atol=1e-9)


def test_a_root_is_triangular_by_blocks(definite):
    _, _, root = definite
    structure = root.structure
    assert torch.equal(root.dense, root.dense.tril())
    assert (root.dense.diagonal() > 0).all()
    R = root.matrix()
    assert not R[structure.dense][:, structure.groups.flatten()].any()


def test_a_root_by_hand():
    # One effect with precision 4, one dense coordinate with precision 5 and 2 between them: S = 5 − 2·2/4 = 4.
    structure = Structure.grouped(2, [torch.tensor([1])], np.random.default_rng(0))
    P = torch.tensor([[5.0, 2.0], [2.0, 4.0]]).double()
    root = Curvature.of(structure.from_matrix(P)).factor
    assert root.dense.item() == pytest.approx(0.5)
    assert root.groups.abs().item() == pytest.approx(0.5)
    assert (root.groups * root.coupling).item() == pytest.approx(0.5)  # D⁻¹ B
    torch.testing.assert_close(root.stddev.square(), torch.tensor([4 / 16, 5 / 16]).double())
    assert root.log_det().item() == pytest.approx(-0.5 * np.log(16))


# Curvature of an arrowhead -----------------------------------------------------------------------------------------


def test_curvature_of_an_arrowhead_is_that_of_its_matrix(structure):
    P = matrix_of(structure)
    found, dense = Curvature.of(structure.from_matrix(P)), Curvature.dense(P)
    unit = P.diagonal().sqrt()
    g = normal(4, structure.dim, seed=3) * unit
    torch.testing.assert_close(found.solve(g) * unit, dense.solve(g) * unit, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.solve(g) @ P / unit, g / unit, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.stddev, dense.stddev, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.precision_diagonal, P.diagonal(), rtol=1e-10, atol=0)
    assert_same(scaled(found.precision.matrix(), P), scaled(P, P), rtol=1e-10)
    assert_same(found.root * unit[:, None], dense.root * unit[:, None], rtol=1e-8)
    assert torch.equal(found.root, found.root.tril())
    assert not found.flat
    assert found.is_full == (structure.groups.numel() == 0)


@pytest.mark.parametrize("seed", range(10))
def test_the_curvature_of_a_definite_curvatures_matrix_has_the_same_bits(seed):
    # What is saved of a curvature is its matrix.
    first = Curvature.of(structure_of((30, 2, 6)).from_matrix(matrix_of(structure_of((30, 2, 6)), seed=seed)))
    again = Curvature.of(first.precision)
    for name in ("corner", "cross", "blocks"):
        assert torch.equal(getattr(first.precision, name), getattr(again.precision, name))
    for name in ("dense", "groups", "coupling"):
        assert torch.equal(getattr(first.factor, name), getattr(again.factor, name))


def test_units_of_the_coordinates_do_not_matter(structure):
    P = matrix_of(structure)
    units = 10 ** torch.from_numpy(np.random.default_rng(9).uniform(-6, 6, structure.dim))
    plain = Curvature.of(structure.from_matrix(P))
    far = Curvature.of(structure.from_matrix(P * units[:, None] * units))
    torch.testing.assert_close(far.stddev * units, plain.stddev, rtol=1e-8, atol=0)
    assert not far.flat


def absolute(matrix, units):
    """Return a matrix with its eigenvalues, in units, by their absolute values."""
    values, vectors = torch.linalg.eigh(matrix / units[:, None] / units)
    return (vectors * values.abs()) @ vectors.T * units[:, None] * units


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(7, 1, 3), (5, 2, 4), (4, 2, 0)], ids=str)
def test_an_indefinite_matrix_is_made_definite_block_by_block(shape, seed):
    # By the definition: blocks by absolute eigenvalues, then the Schur complement that these leave.
    structure = structure_of(shape)
    matrix = matrix_of(structure, seed=seed + 20, definite=False)
    curvature = Curvature.of(structure.from_matrix(matrix))
    P, groups, dense = matrix.clone(), structure.groups, structure.dense
    for group in groups:
        block = matrix[group][:, group]
        P[group[:, None], group] = absolute(block, block.diagonal().abs().sqrt())
    cross = P[groups.flatten()][:, dense]
    between = P[groups.flatten()][:, groups.flatten()]
    eliminated = cross.T @ torch.linalg.solve(between, cross)
    unit = matrix[dense, dense].abs().sqrt()
    P[dense[:, None], dense] = absolute(matrix[dense][:, dense] - eliminated, unit) + eliminated
    assert torch.linalg.eigvalsh(scaled(matrix, matrix))[0] < 0
    assert torch.linalg.eigvalsh(scaled(P, P))[0] > 0
    assert_same(scaled(curvature.precision.matrix(), P), scaled(P, P), rtol=1e-8)
    g = normal(20, structure.dim, seed=3) * matrix.diagonal().abs().sqrt()
    step = curvature.solve(g)
    assert ((step * g).sum(1) > 0).all()  # uphill
    torch.testing.assert_close((step @ P) / g, torch.ones_like(g), rtol=1e-6, atol=1e-6)


def test_a_flat_direction_is_seen_in_a_group_among_the_dense_and_between_them():
    structure = structure_of((5, 2, 3))
    sound = matrix_of(structure)
    assert not Curvature.of(structure.from_matrix(sound)).flat
    # A group of two effects whose sum alone is known.
    group = structure.groups[2]
    in_group = sound.clone()
    in_group[group], in_group[:, group] = 0.0, 0.0
    in_group[group[:, None], group] = 3.0
    # A dense coordinate without any curvature, and two whose sum alone is known.
    first, second = structure.dense[:2]
    nothing, sum_alone = sound.clone(), sound.clone()
    nothing[first], nothing[:, first] = 0.0, 0.0
    for i in (first, second):
        sum_alone[i], sum_alone[:, i] = 0.0, 0.0
    sum_alone[[first, first, second, second], [first, second, first, second]] = 2.0
    # A dense coordinate that stands in every row together with an effect: their difference is not known.
    between = sound.clone()
    effects = structure.groups.flatten()
    between[first], between[:, first] = 0.0, 0.0
    between[effects[:, None], effects] = torch.diag(torch.arange(1.0, 11.0).double())
    between[effects[:, None], structure.dense] = 0.0
    between[structure.dense[:, None], effects] = 0.0
    between[effects, first] = between[first, effects] = torch.arange(1.0, 11.0).double()
    between[first, first] = 55.0
    for matrix in (in_group, nothing, sum_alone, between):
        curvature = Curvature.of(structure.from_matrix(matrix))
        assert curvature.flat
        assert torch.isfinite(curvature.stddev).all()


def test_strong_correlation_is_not_flat():
    # 1e-9 of the variance apart: 100 times what counts as flat.
    structure = Structure.grouped(3, [torch.tensor([0]), torch.tensor([1])], np.random.default_rng(0))
    for close, flat in ((1e-9, False), (FLAT / 10, True)):
        P = torch.eye(3, dtype=torch.float64)
        P[0, 1] = P[1, 0] = 1 - close
        assert Curvature.of(structure.from_matrix(P)).flat == flat
        assert Curvature.dense(P).flat == flat


def test_a_million_effects_take_no_more_than_their_own_numbers():
    num_groups = 200_000
    structure = Structure.grouped(
        2 * num_groups + 3, list(torch.arange(2 * num_groups).reshape(2, -1)), rng := np.random.default_rng(0)
    )
    roots = torch.from_numpy(rng.standard_normal((num_groups, 2, 2)))
    blocks = roots @ roots.mT + 0.5 * torch.eye(2).double()
    cross = 0.01 * torch.from_numpy(rng.standard_normal((num_groups, 2, 3)))
    matrix = Arrowhead(structure, 1e3 * torch.eye(3).double(), cross, blocks)
    curvature = Curvature.of(matrix)
    g = torch.from_numpy(rng.standard_normal((2, structure.dim)))
    torch.testing.assert_close(matrix.times(curvature.solve(g)), g, rtol=1e-9, atol=1e-9)
    assert isinstance(curvature.factor, Root)
    assert torch.isfinite(curvature.factor.log_det())
