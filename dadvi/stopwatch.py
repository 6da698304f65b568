"""Where the time of a pass goes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Self

Phase = Literal["read", "decode", "check", "forward", "backward"]
"""What a worker does: get and verify chunks, decode them, check rows, evaluate the likelihood, differentiate it."""


@dataclass(frozen=True)
class Profile:
    """Seconds of passes, by what they were spent on: those of workers as a mean over workers."""

    read: float = 0.0  # waiting for chunks to be got from their store and verified, as far as it is not done ahead
    decode: float = 0.0  # and for them to be decoded
    check: float = 0.0  # checking rows, the first time
    forward: float = 0.0  # log-likelihoods
    backward: float = 0.0  # their derivatives
    wait: float = 0.0  # for the worker with most to do
    transfer: float = 0.0  # between coordinator and workers: scheduling, messages
    reduce: float = 0.0  # adding up shards

    def __add__(self, other: "Profile") -> "Profile":
        return Profile(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @classmethod
    def of(cls, workers: Mapping[str, Mapping[Phase, float]], elapsed: float, reduce: float) -> Self:
        """Return the profile of one pass.

        Parameters
        ----------
        workers
            Seconds of each worker by phase.
        elapsed, reduce
            Seconds of the coordinator: from sending out the work until all sums were there, and of adding these up.

        """
        busy = [sum(seconds.values()) for seconds in workers.values()]
        total: dict[Phase, float] = {}
        for seconds in workers.values():
            for phase, value in seconds.items():
                total[phase] = total.get(phase, 0.0) + value / len(workers)
        longest = max(busy)
        return cls(**total, wait=longest - sum(busy) / len(busy), transfer=max(0.0, elapsed - longest), reduce=reduce)


class Stopwatch:
    """Adds up seconds by phase, each lap from the end of the last."""

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: Phase, *, decode: float = 0.0) -> None:
        """Count the time since the last lap to a phase, but for the share of it that went into decoding."""
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        self.seconds[phase] = self.seconds.get(phase, 0.0) + (1 - decode) * elapsed
        if decode:
            self.seconds["decode"] = self.seconds.get("decode", 0.0) + decode * elapsed
