"""Optimisers for the stochastic loop: torch's, two that torch lacks, averages of their iterates, and when to stop.

Every optimiser is a `torch.optim.Optimizer`, fed through `.grad` and moved by `step()`: one way to use torch's and
ours.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from dadvi.errors import InputError
from dadvi.optim.averaging import (
    AVERAGING,
    Averaging,
    Mean,
    NoAveraging,
    PolynomialAveraging,
    TailAveraging,
    TailState,
    make_averaging,
)
from dadvi.optim.dowg import DoWG
from dadvi.optim.proximal import ProximalEntropy
from dadvi.optim.schedule import SCHEDULES, make_schedule
from dadvi.optim.settling import Settling, mcse, settled, split_rhat

__all__ = [
    "AVERAGING",
    "OPTIMIZERS",
    "SCHEDULES",
    "Averaging",
    "DoWG",
    "Mean",
    "NoAveraging",
    "OptimizerFactory",
    "PolynomialAveraging",
    "ProximalEntropy",
    "Settling",
    "TailAveraging",
    "TailState",
    "make_averaging",
    "make_optimizer",
    "make_schedule",
    "mcse",
    "settled",
    "split_rhat",
    "takes_energy_gradient",
]

OptimizerFactory: TypeAlias = Callable[..., Optimizer]
"""Makes an optimiser of parameter groups: a class of `torch.optim`, a `functools.partial` of one, any such function."""

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "adam": partial(torch.optim.Adam, lr=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.03),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.1),
    "adagrad": partial(torch.optim.Adagrad, lr=1.0),
    "dowg": partial(DoWG, initial_distance=0.5),
    "proximal": partial(ProximalEntropy, lr=0.03),
}
"""By name, with learning rates for whitened parameters, by trial. On the conjugate targets of the tests, 20 steps a
pass, warm-started 2 to 3 posterior sds away, each ends within 0.05 sd after 20 to 65 passes (DoWG: up to 100; from its
own 0.01 for a first distance it may need more). On a Gaussian in 20 dimensions with gradient noise of sd 4.5 and 10
(sampling one row in 20 and in 100), 2 000 steps from 3 sds away end at the noise's own floor, as Adam's do. A tenth of
SGD's rate is too slow for that; three times as much can diverge with two draws a step."""


def make_optimizer(
    optimizer: str | OptimizerFactory, groups: Sequence[dict[str, Any]], learning_rate: float | None = None
) -> Optimizer:
    """Return the optimiser of the parameter groups.

    Parameters
    ----------
    optimizer
        A name in `OPTIMIZERS`, or what makes an optimiser when called with the groups.
    groups
        ``{"params": [tensor, ...]}`` each; the group of the log-scale diagonal also has ``"entropy": True``, where
        the family's entropy is its sum (see `ProximalEntropy`).
    learning_rate
        Passed on as ``lr``; None leaves it to the optimiser.
    """
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            known = ", ".join(map(repr, OPTIMIZERS))
            raise InputError(f"optimizer is {optimizer!r}; known are {known}, or give a torch.optim class")
        factory = OPTIMIZERS[optimizer]
    elif callable(optimizer):
        factory = optimizer
    else:
        raise InputError(
            f"optimizer is a {type(optimizer).__name__}; give a name, a torch.optim class or a functools.partial "
            "of one: the parameters do not exist before the fit, so it cannot be an optimizer already made"
        )

    # Before it is called: LBFGS would first complain of parameter groups, which is not the reason.
    _refuse_closure(factory.func if isinstance(factory, partial) else factory)
    settings = {} if learning_rate is None else {"lr": learning_rate}
    try:
        made = factory(list(groups), **settings)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        given = "".join(f", {name}={value}" for name, value in settings.items())
        raise InputError(
            f"the optimizer {_name(optimizer)} refused to be made from {len(groups)} parameter groups{given}: {error}. "
            "If that is an argument of it, set it with functools.partial; if it is the parameters, which are vectors, "
            "take an optimizer for such, as 'adam'"
        ) from error
    if not isinstance(made, Optimizer):
        raise InputError(
            f"the optimizer {_name(optimizer)} made a {type(made).__name__}; it must make a torch.optim.Optimizer "
            "of the parameter groups it is called with"
        )
    _refuse_closure(type(made))
    return made


def takes_energy_gradient(optimizer: Optimizer) -> bool:
    """Return whether the optimiser takes the entropy's step by itself and wants the energy's gradient alone."""
    return bool(getattr(optimizer, "takes_energy_gradient", False))


def _refuse_closure(cls: object) -> None:
    """Refuse an optimiser class whose step must evaluate the objective itself; anything but such a class passes."""
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        return
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"{cls.__name__} evaluates the objective several times a step, through a closure; here every evaluation "
            "is a new random minibatch, on which its line search and curvature pairs would be noise: use a first-order "
            "optimizer, such as 'adam'"
        )


def _name(optimizer: object) -> str:
    return repr(optimizer) if isinstance(optimizer, str) else getattr(optimizer, "__name__", repr(optimizer))
