"""Whitened coordinates: every map and its gradient are adjoint, and the ELBO does not depend on the coordinates."""

import numpy as np
import pytest
import torch

from dadvi.families import FullRank, LowRank, MeanField
from dadvi.quadratic import Curvature
from dadvi.structure import Structure
from dadvi.whitening import Whitening

D, K = 4, 6


def tensor(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def precision():
    """A correlated precision with units from 1e-2 to 1e3."""
    root = tensor(D, D, seed=7) + 2 * torch.eye(D)
    units = torch.tensor([1e-2, 1.0, 30.0, 1e3], dtype=torch.float64)
    return (root @ root.T) * units[:, None] * units


def whitening_of(family, kind):
    P = precision()
    return Whitening.around(family, tensor(D, seed=1), curvature_of(P, kind))


def curvature_of(P, kind):
    """All of P, its diagonal, or what an arrowhead with two groups has of it."""
    if kind == "grouped":
        structure = Structure.grouped(D, [torch.tensor([3, 1])], np.random.default_rng(0))
        return Curvature.of(structure.from_matrix(P))
    return Curvature.dense(P) if kind == "dense" else Curvature.diagonal(P.diagonal())


CASES = [
    (MeanField(), "dense"),
    (MeanField(), "diagonal"),
    (FullRank(), "dense"),
    (FullRank(), "diagonal"),
    (MeanField(), "grouped"),
    (FullRank(), "grouped"),
    (LowRank(rank=2), "dense"),
]


@pytest.fixture(params=CASES, ids=[f"{family.name}-{kind}" for family, kind in CASES])
def whitening(request):
    return whitening_of(*request.param)


def theta_of(whitening, seed=3):
    """Search parameters away from the centre, with some of everything the family has."""
    ones = torch.ones(D, dtype=torch.float64)
    theta = whitening.family.init(tensor(D, seed=seed), ones, np.random.default_rng(seed))
    return {name: value + 0.3 * tensor(*value.shape, seed=seed + 1) for name, value in theta.items()}


def basis_of(whitening):
    return whitening.basis if whitening.basis.dim() == 2 else whitening.basis.diag()


def test_only_a_full_rank_family_with_a_dense_curvature_is_rotated():
    assert [whitening_of(*case).basis.dim() for case in CASES] == [1, 1, 2, 1, 1, 1, 1]


def test_the_basis_has_the_sds_of_the_familys_optimum(whitening):
    # U Uᵀ is P⁻¹ where the family is rotated, else diag(1/P_jj), the mean-field optimum of a Gaussian with precision P.
    P = precision()
    U = basis_of(whitening)
    expected = torch.linalg.inv(P) if whitening.basis.dim() == 2 else P.diagonal().reciprocal().diag()
    scale = expected.diagonal().sqrt()
    torch.testing.assert_close(U @ U.T / scale[:, None] / scale, expected / scale[:, None] / scale)


def test_gradients_are_carried_by_the_adjoint_of_the_map(whitening):
    # ⟨grad_to_u(g), u⟩ = ⟨g, U u⟩
    u, g = tensor(K, D, seed=2), tensor(K, D, seed=3)
    moved = whitening.to_eta(u) - whitening.center
    torch.testing.assert_close((whitening.grad_to_u(g) * u).sum(), (g * moved).sum())


def test_pull_back_is_the_adjoint_of_params(whitening):
    theta = {name: value.requires_grad_() for name, value in theta_of(whitening).items()}
    params = whitening.params(theta)
    grads = {name: tensor(*value.shape, seed=5) for name, value in params.items()}
    leaves = list(theta.values())
    expected = torch.autograd.grad([params[name] for name in grads], leaves, list(grads.values()))
    for pulled, grad in zip(whitening.pull_back(grads).values(), expected, strict=True):
        torch.testing.assert_close(pulled, grad)


def test_log_det_is_that_of_the_basis(whitening):
    torch.testing.assert_close(whitening.log_det, torch.linalg.slogdet(basis_of(whitening)).logabsdet)


@pytest.mark.parametrize(("family", "kind"), CASES[:6])
def test_the_middle_is_the_gaussian_with_the_covariance_of_the_basis(family, kind):
    whitening = whitening_of(family, kind)
    zeros, ones = torch.zeros(D, dtype=torch.float64), torch.ones(D, dtype=torch.float64)
    q = whitening.member(family.init(zeros, ones, np.random.default_rng(0)))
    U = basis_of(whitening)
    torch.testing.assert_close(q.loc, whitening.center)
    torch.testing.assert_close(q.covariance_matrix, U @ U.T)


def test_location_moves_by_the_root_of_the_full_curvature(whitening):
    # η = center + R v whatever the family: log π has unit curvature in v.
    theta = theta_of(whitening)
    moved = whitening.member(theta).loc - whitening.center
    P = whitening.curvature.structure.from_matrix(precision()).matrix()
    torch.testing.assert_close(moved @ P @ moved, theta["loc"].square().sum())


def test_the_member_has_the_draws_that_the_search_made(whitening):
    theta = theta_of(whitening)
    noise = tensor(K, whitening.family.noise_dim(D), seed=6)
    q = whitening.member(theta)
    draws = whitening.to_eta(whitening.family.transform(whitening.params(theta), noise))
    torch.testing.assert_close(draws, q.transform(noise))


def test_estimate_is_the_elbo_of_the_member_and_its_gradient(whitening):
    # ELBO(θ) at fixed noise, written in η and differentiated by autograd, against the search's own way in u.
    P, mode = precision(), tensor(D, seed=8)
    noise = tensor(K, whitening.family.noise_dim(D), seed=9)

    def log_joint(eta):
        grad = -(eta - mode) @ P
        return 0.5 * ((eta - mode) * grad).sum(1) - 0.1 * eta.pow(4).sum(1), grad - 0.4 * eta.pow(3)

    theta = {name: value.requires_grad_() for name, value in theta_of(whitening).items()}
    q = whitening.member(theta)
    elbo = log_joint(q.transform(noise))[0].mean() + q.entropy()  # (): of θ
    expected = torch.autograd.grad(elbo, list(theta.values()))
    est = whitening.estimate(theta, noise, log_joint)
    assert est.elbo == pytest.approx(elbo.item(), rel=1e-12)
    for grad, reference in zip(est.grad.values(), expected, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-9, atol=1e-9 * float(reference.abs().max()))
