"""Step-size schedules: what multiplies the learning rate at step t = 0, 1, 2, ...

    constant       1
    inverse_sqrt   1 / √(1 + t/T₀)               the rate of stochastic gradient descent on convex problems, for any end
    cosine         (1 + cos(π t/T)) / 2          from 1 to 0 at step T, then 0 (Loshchilov and Hutter 2017, eq. 5)

Each is a `torch.optim.lr_scheduler.LambdaLR`: a pure function of t, so that a resumed run continues with the same
bits.
"""

import math
from collections.abc import Callable
from typing import Final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dadvi.errors import InputError

SCHEDULES: Final = ("constant", "cosine", "inverse_sqrt")


def make_schedule(schedule: str, optimizer: Optimizer, num_steps: int) -> LambdaLR:
    """Return the scheduler of this name; the loop calls its ``step()`` after each of the optimiser's.

    `num_steps` is the number of steps the run may take: T, at which the cosine ends; inverse_sqrt has T₀ = T/10, so
    that it ends at 0.3 of the learning rate.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule is {schedule!r}; known are {', '.join(map(repr, SCHEDULES))}")
    if num_steps < 1:
        raise InputError(f"a schedule over {num_steps} steps; it needs at least 1: allow more passes")
    factors: dict[str, Callable[[int], float]] = {
        "constant": lambda t: 1.0,  # noqa: ARG005
        "cosine": lambda t: (1 + math.cos(math.pi * min(t / num_steps, 1.0))) / 2,
        "inverse_sqrt": lambda t: 1 / math.sqrt(1 + 10 * t / num_steps),
    }
    return LambdaLR(optimizer, factors[schedule])
