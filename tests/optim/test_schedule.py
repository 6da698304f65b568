"""Schedules: the learning rate at each step, and after a restart."""

import math

import pytest
import torch

from dadvi.errors import InputError
from dadvi.optim import SCHEDULES, DoWG, ProximalEntropy, make_schedule


def walk(scheduler, optimizer, steps):
    """Return the learning rate used at each step."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def make(schedule, num_steps, lr=0.5):
    x = torch.zeros(1, dtype=torch.float64)
    optimizer = torch.optim.SGD([x], lr=lr)
    return make_schedule(schedule, optimizer, num_steps), optimizer


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda t: 0.5),
        ("cosine", lambda t: 0.25 * (1 + math.cos(math.pi * min(t, 10) / 10))),
        ("inverse_sqrt", lambda t: 0.5 / math.sqrt(1 + t)),
    ],
)
def test_learning_rates(schedule, expected):
    assert walk(*make(schedule, 10), 15) == pytest.approx([expected(t) for t in range(15)], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_restart_continues_with_the_same_bits(schedule):
    scheduler, optimizer = make(schedule, 12)
    whole = walk(scheduler, optimizer, 12)
    scheduler, optimizer = make(schedule, 12)
    walk(scheduler, optimizer, 5)
    resumed_scheduler, resumed = make(schedule, 12)
    resumed.load_state_dict(optimizer.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    assert walk(resumed_scheduler, resumed, 7) == whole[5:]


@pytest.mark.parametrize("cls", [DoWG, ProximalEntropy])
def test_scales_our_own_optimisers_too(cls):
    x = torch.ones(1, dtype=torch.float64)
    optimizer = cls([{"params": [x], "entropy": True}])
    scheduler = make_schedule("cosine", optimizer, 1)
    x.grad = 3 * torch.ones_like(x)
    optimizer.step()
    scheduler.step()  # at the end of the cosine the step is 0
    after = x.clone()
    optimizer.step()
    assert after.item() != 1.0
    assert torch.allclose(x, after, rtol=1e-15)


def test_refusals():
    with pytest.raises(InputError, match=r"schedule is 'warm'; known are 'constant', 'cosine', 'inverse_sqrt'"):
        make("warm", 10)
    with pytest.raises(InputError, match=r"a schedule over 0 steps; it needs at least 1"):
        make("cosine", 0)
