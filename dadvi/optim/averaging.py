"""Averages of the iterates: what a stochastic optimiser returns in place of its last, noisy point.

Each rule is a triple of pure functions on a state made of tensors and ints only:

    state = rule.init(params)             before the first step
    state = rule.update(state, params)    after every step
    state = rule.end_epoch(state)         after the last step of every epoch
    params = rule.value(state)            the average, at any time

`params` maps names to tensors. A state never aliases the parameters, which optimisers change in place, and its
structure is fixed by `init`, so that a saved state can be restored into a fresh one.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from dadvi.errors import InputError

Params: TypeAlias = Mapping[str, Tensor]

S = TypeVar("S")


class Averaging(Protocol[S]):
    """A rule for averaging iterates, with states of type S."""

    def init(self, params: Params) -> S:
        """Return the state before the first step."""

    def update(self, state: S, params: Params) -> S:
        """Return the state after a step that led to `params`."""

    def end_epoch(self, state: S) -> S:
        """Return the state after the last step of an epoch."""

    def value(self, state: S) -> dict[str, Tensor]:
        """Return the average."""


class Mean(NamedTuple):
    """A running mean of iterates."""

    steps: int  # how many iterates are in it
    params: dict[str, Tensor]  # their weighted mean; without meaning while steps is 0


class NoAveraging:
    """The last iterate, as it is."""

    def init(self, params: Params) -> Mean:
        """Return the state before the first step."""
        return Mean(0, _copy(params))

    def update(self, state: Mean, params: Params) -> Mean:
        """Replace the iterate."""
        return Mean(state.steps + 1, _copy(params))

    def end_epoch(self, state: Mean) -> Mean:
        """Return the state as it is: epochs play no part."""
        return state

    def value(self, state: Mean) -> dict[str, Tensor]:
        """Return the last iterate."""
        return state.params


class PolynomialAveraging:
    """Polynomial-decay averaging, Shamir and Zhang (2013), section 4.

        x̄_t = (1 − w_t) x̄_{t-1} + w_t x_t,     w_t = (η + 1) / (t + η),     t = 1, 2, ...

    "Stochastic Gradient Descent for Non-smooth Optimization: Convergence Results and Optimal Averaging Schemes".
    The weight of x_s in x̄_t is proportional to s (s + 1) ... (s + η − 1), about s^η: with η = 0 the plain mean of
    all iterates, with η = 8 (the choice of Ivgi, Hinder and Carmon 2023) mostly the last fifth of them, so that the
    way from the start is forgotten.
    """

    def __init__(self, eta: float = 8.0) -> None:
        if not 0 <= eta < float("inf"):
            raise InputError(f"eta is {eta}; it must be 0 (the plain mean) or a finite number above 0, such as 8")
        self.eta = eta

    def init(self, params: Params) -> Mean:
        """Return the state before the first step."""
        return Mean(0, _copy(params))

    def update(self, state: Mean, params: Params) -> Mean:
        """Mix the iterate in with weight w_t."""
        t = state.steps + 1
        return Mean(t, _mix(state.params, params, (self.eta + 1) / (t + self.eta)))

    def end_epoch(self, state: Mean) -> Mean:
        """Return the state as it is: epochs play no part."""
        return state

    def value(self, state: Mean) -> dict[str, Tensor]:
        """Return x̄_t."""
        return state.params


class TailState(NamedTuple):
    """The means of three stretches of steps; n whole epochs seen, s the largest power of 2 up to n."""

    epochs: int  # n
    older: Mean  # epochs s/2 + 1 .. s
    newer: Mean  # epochs s + 1 .. n; empty if n = s
    running: Mean  # the unfinished epoch


class TailAveraging:
    """The plain mean over the whole epochs of the tail: between a half and three quarters of all so far.

    A whole epoch visits every chunk once, so the errors of its steps nearly cancel; half of an epoch does not. How
    many epochs there will be is not known, and keeping them all would cost too much memory. So epochs are collected
    in blocks that end at powers of 2: with n epochs and s the largest power of 2 up to n, the window is epochs
    s/2 + 1 to n. At n = 2s the older block is dropped. This keeps three copies of the parameters, and the window is n/2
    epochs long at n = s and almost 3n/4 just before n = 2s. (Suffix averaging: Rakhlin, Shamir and Sridharan 2012.)

    Before the first epoch has ended, the value is the mean of the steps so far.
    """

    def init(self, params: Params) -> TailState:
        """Return the state before the first step."""
        return TailState(0, Mean(0, _copy(params)), Mean(0, _copy(params)), Mean(0, _copy(params)))

    def update(self, state: TailState, params: Params) -> TailState:
        """Add the iterate to the unfinished epoch."""
        return state._replace(running=_joined(state.running, Mean(1, dict(params))))

    def end_epoch(self, state: TailState) -> TailState:
        """Move the epoch that ends into the window; at a power of 2, forget the older block."""
        n = state.epochs + 1
        older, newer = state.older, _joined(state.newer, state.running)
        empty = Mean(0, state.running.params)
        if n & (n - 1) == 0:  # a power of 2
            older, newer = newer, empty
        return TailState(n, older, newer, empty)

    def value(self, state: TailState) -> dict[str, Tensor]:
        """Return the mean over the window."""
        if state.epochs == 0:
            return state.running.params
        return _joined(state.older, state.newer).params

    def window(self, state: TailState) -> tuple[int, int]:
        """Return the first and the last epoch in the value, counted from 1; (1, 0) before the first has ended."""
        if state.epochs == 0:
            return 1, 0
        s = 1 << (state.epochs.bit_length() - 1)
        return s // 2 + 1, state.epochs


AVERAGING: dict[str, Callable[[], Averaging[Any]]] = {
    "polynomial": PolynomialAveraging,
    "tail": TailAveraging,
    "none": NoAveraging,
}


def make_averaging(averaging: str | Averaging[Any]) -> Averaging[Any]:
    """Return the averaging rule of this name with its defaults, or the rule itself."""
    if not isinstance(averaging, str):
        return averaging
    if averaging not in AVERAGING:
        raise InputError(f"averaging is {averaging!r}; known are {', '.join(map(repr, AVERAGING))}, or give a rule")
    return AVERAGING[averaging]()


def _copy(params: Params) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def _mix(a: Params, b: Params, weight: float) -> dict[str, Tensor]:
    """Return (1 − weight) a + weight b in new tensors; exactly a at 0 and exactly b at 1."""
    return {name: torch.lerp(a[name], b[name].detach(), weight) for name in a}


def _joined(a: Mean, b: Mean) -> Mean:
    """Return the mean of the iterates of both."""
    steps = a.steps + b.steps
    return Mean(steps, _mix(a.params, b.params, b.steps / steps if steps else 0.0))
