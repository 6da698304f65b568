"""DoWG: its own recursion by hand, convergence without tuning, and state that survives a save."""

import copy
import math

import pytest
import torch

from dadvi.errors import InputError
from dadvi.optim import DoWG, PolynomialAveraging


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def minimise(gradient, start, steps, **settings):
    """Return the polynomial average of the iterates of DoWG from its defaults."""
    x = start.clone()
    optimizer, averaging = DoWG([x], **settings), PolynomialAveraging()
    state = averaging.init({"x": x})
    for _ in range(steps):
        x.grad = gradient(x)
        optimizer.step()
        state = averaging.update(state, {"x": x})
    return averaging.value(state)["x"]


def test_first_two_steps_by_hand():
    # f(x) = |x|²/2 from (3, 4), r_ε = 0.1. The first step has the length r_ε: r²·‖g‖ / √(r²·‖g‖²) = r.
    x = vector(3.0, 4.0)
    optimizer = DoWG([x], initial_distance=0.1)
    x.grad = x.clone()
    optimizer.step()
    assert torch.allclose(x, vector(2.94, 3.92), rtol=1e-15)

    # Now r̄ = 0.1 still (the distance moved is 0.1), v = 0.01·25 + 0.01·4.9² = 0.4901.
    x.grad = x.clone()
    optimizer.step()
    step_size = 0.01 / math.sqrt(0.4901)
    assert torch.allclose(x, vector(2.94, 3.92) * (1 - step_size), rtol=1e-12)

    # And on the third the distance moved has overtaken r_ε.
    r = 5 - 4.9 * (1 - step_size)
    x.grad = x.clone()
    optimizer.step()
    assert optimizer.state[x]["distance"].item() == pytest.approx(r, rel=1e-12)
    assert optimizer.state[x]["weighted_sum"].item() == pytest.approx(0.4901 + r**2 * (5 - r) ** 2, rel=1e-12)


def test_groups_share_one_distance_and_one_step():
    joint, a, b = vector(3.0, 4.0), vector(3.0), vector(4.0)
    together, apart = DoWG([joint]), DoWG([{"params": [a]}, {"params": [b]}])
    for _ in range(20):
        joint.grad, a.grad, b.grad = vector(5.0, 0.2) * joint, 5 * a, 0.2 * b
        together.step()
        apart.step()
    assert torch.allclose(joint, torch.cat([a, b]), rtol=1e-12)


@pytest.mark.parametrize("distance", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("steepness", [1e-3, 1.0, 1e3])
def test_ill_scaled_quadratic_without_tuning(steepness, distance):
    h = steepness * torch.logspace(-1, 1, 10, dtype=torch.float64)  # condition number 100
    start = torch.full((10,), distance, dtype=torch.float64)
    x = minimise(lambda x: h * x, start, 1000)
    assert x.norm() < 1e-4 * start.norm()


@pytest.mark.parametrize("guess", [1e-6, 1e-2, 1.0])
def test_nonsmooth_convex_function_at_the_rate_of_the_paper(guess):
    # f(x) = ‖x‖₁: the gradient never shrinks, so a fixed step would circle at its own length for ever.
    start = vector(5.0, -3.0, 1.0)
    x = minimise(torch.sign, start, 4000, initial_distance=guess)
    distance, lipschitz = start.norm().item(), math.sqrt(3)
    assert x.abs().sum() < 4 * distance * lipschitz / math.sqrt(4000)
    assert x.abs().sum() < 0.05 * start.abs().sum()


def test_first_step_has_the_length_of_the_guess_however_steep():
    x = vector(1.0, 2.0)
    optimizer = DoWG([x])
    x.grad = vector(1e9, -3e9)
    optimizer.step()
    assert (x - vector(1.0, 2.0)).norm().item() == pytest.approx(0.01, rel=1e-9)


def test_stationary_start_stays_and_can_leave():
    x = vector(1.0)
    optimizer = DoWG([x])
    x.grad = vector(0.0)
    optimizer.step()
    assert x.item() == 1.0
    x.grad = vector(2.0)
    optimizer.step()
    assert x.item() == pytest.approx(0.99, rel=1e-12)


def test_closure_is_evaluated_with_gradients():
    x = vector(3.0).requires_grad_()
    optimizer = DoWG([x])

    def closure():
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert x.item() == pytest.approx(2.99, rel=1e-12)


def test_saved_state_continues_with_the_same_bits():
    def advance(x, optimizer, steps):
        for _ in range(steps):
            x.grad = vector(7.0, 0.3) * x
            optimizer.step()

    x = vector(3.0, -4.0)
    optimizer = DoWG([x])
    advance(x, optimizer, 5)
    saved_x, saved = x.clone(), copy.deepcopy(optimizer.state_dict())
    advance(x, optimizer, 5)

    y = saved_x.clone()
    resumed = DoWG([y], initial_distance=0.7)  # the saved distance must win
    resumed.load_state_dict(saved)
    advance(y, resumed, 5)
    assert torch.equal(x, y)
    assert not torch.equal(x, saved_x)
    for name in ("distance", "weighted_sum", "start"):
        assert torch.equal(optimizer.state[x][name], resumed.state[y][name])


def test_loading_a_state_leaves_the_optimizer_it_came_from_alone():
    x, y = vector(3.0), vector(3.0)
    optimizer, other = DoWG([x]), DoWG([y])
    x.grad = y.grad = vector(1.0)
    optimizer.step()
    before = optimizer.state[x]["weighted_sum"].item()
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert optimizer.state[x]["weighted_sum"].item() == before
    assert other.state[y]["weighted_sum"].item() == pytest.approx(2 * before)


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"lr": math.nan}, {"initial_distance": 0.0}])
def test_settings_that_cannot_move_are_refused(settings):
    (name,) = settings
    with pytest.raises(InputError, match=rf"{name} is {settings[name]}; it must be above 0"):
        DoWG([vector(1.0)], **settings)
