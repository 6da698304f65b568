"""The proximal step: by hand, against a numerical minimiser, its fixed point, and its positivity."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from dadvi.errors import InputError
from dadvi.optim import ProximalEntropy
from dadvi.optim.proximal import _entropy_prox


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def groups(loc, log_scale):
    return [{"params": [loc]}, {"params": [log_scale], "entropy": True}]


def test_one_step_by_hand():
    # σ = 2, energy gradient with respect to log σ of 3, so 1.5 with respect to σ; γ = 0.5:
    # σ' = 2 − 0.75 = 1.25, σ⁺ = (1.25 + √(1.5625 + 2)) / 2.
    loc, log_scale = vector(1.0), vector(math.log(2.0))
    optimizer = ProximalEntropy(groups(loc, log_scale), lr=0.5)
    loc.grad, log_scale.grad = vector(4.0), vector(3.0)
    optimizer.step()
    assert loc.item() == -1.0
    assert log_scale.exp().item() == pytest.approx((1.25 + math.sqrt(3.5625)) / 2, rel=1e-14)


@pytest.mark.parametrize("sigma", [-3.0, -0.1, 0.0, 0.2, 5.0])
@pytest.mark.parametrize("gamma", [1e-2, 1.0])
def test_prox_minimises_its_objective(sigma, gamma):
    found = minimize_scalar(
        lambda s: -math.log(s) + (s - sigma) ** 2 / (2 * gamma),
        bounds=(1e-9, 20.0),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert _entropy_prox(vector(sigma), gamma).item() == pytest.approx(found.x, rel=1e-5)


@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_fixed_point_on_a_gaussian_is_the_mean_field_optimum(lr):
    # Energy (μᵀHμ + Σ_j H_jj σ_j²)/2, so ∂/∂μ = Hμ and ∂/∂ω_j = H_jj σ_j². The optimum is σ_j = 1/√H_jj for every γ.
    H = torch.tensor([[2.0, 0.7], [0.7, 9.0]], dtype=torch.float64)
    optimum = -0.5 * H.diagonal().log()
    loc, log_scale = torch.zeros(2, dtype=torch.float64), optimum.clone()
    optimizer = ProximalEntropy(groups(loc, log_scale), lr=lr)

    def step():
        loc.grad, log_scale.grad = H @ loc, H.diagonal() * (2 * log_scale).exp()
        optimizer.step()

    step()
    assert torch.allclose(log_scale, optimum, rtol=0, atol=1e-15)  # it stays there

    loc.fill_(3.0)
    log_scale.copy_(vector(-4.0, 1.0))
    for _ in range(int(15 / lr)):
        step()
    assert torch.allclose(log_scale, optimum, rtol=0, atol=1e-12)  # and it goes there
    assert torch.allclose(loc, torch.zeros_like(loc), atol=1e-9)


@pytest.mark.parametrize("gradient", [1e6, 1e100])
def test_scale_stays_positive_however_large_the_step(gradient):
    loc, log_scale = vector(0.0), vector(0.0)
    optimizer = ProximalEntropy(groups(loc, log_scale), lr=1.0)
    loc.grad, log_scale.grad = vector(0.0), vector(gradient)
    optimizer.step()
    # For σ' → −∞ the root is γ/|σ'|. The textbook formula cancels to 0 here, whose log is −∞.
    assert log_scale.item() == pytest.approx(-math.log(gradient), rel=1e-6)


def test_tensors_without_a_gradient_stay():
    loc, log_scale = vector(1.0), vector(0.5)
    ProximalEntropy(groups(loc, log_scale), lr=1.0).step()
    assert (loc.item(), log_scale.item()) == (1.0, 0.5)


def test_saved_state_continues_with_the_same_bits():
    def advance(loc, log_scale, optimizer):
        for _ in range(5):
            loc.grad, log_scale.grad = 2 * loc, 3 * (2 * log_scale).exp()
            optimizer.step()

    loc, log_scale = vector(1.0), vector(0.5)
    optimizer = ProximalEntropy(groups(loc, log_scale), lr=0.1)
    advance(loc, log_scale, optimizer)
    again = loc.clone(), log_scale.clone()
    resumed = ProximalEntropy(groups(*again), lr=0.9)  # the saved step size must win
    resumed.load_state_dict(optimizer.state_dict())
    advance(loc, log_scale, optimizer)
    advance(*again, resumed)
    assert torch.equal(loc, again[0])
    assert torch.equal(log_scale, again[1])


def test_says_that_it_takes_the_energy_gradient():
    assert ProximalEntropy.takes_energy_gradient
    assert not hasattr(torch.optim.SGD, "takes_energy_gradient")


def test_refuses_groups_without_a_scale_and_a_step_of_zero():
    with pytest.raises(
        InputError, match=r'none of the 1 parameter groups has "entropy": True.*mean-field or full-rank'
    ):
        ProximalEntropy([{"params": [vector(1.0)]}])
    with pytest.raises(InputError, match=r"lr is -1.0; it must be above 0"):
        ProximalEntropy(groups(vector(1.0), vector(1.0)), lr=-1.0)
