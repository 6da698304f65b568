"""How a fit tells what it is doing: a live line on a terminal, plain lines in a log, nothing, and callbacks."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from dadvi.posterior import TraceRow

LINE_SECONDS = 5.0
"""In a log, a line at most this often, and one for every certificate."""

WITH_CERTIFICATE = ("round", "certificate")
"""Phases that end with a certificate."""

Reporter = Callable[[TraceRow], None]


@contextmanager
def make_reporter(
    progress: bool | None, max_passes: float | None, callbacks: Iterable[Reporter] = ()
) -> Iterator[Reporter]:
    """Give a function that reports a `TraceRow` to stderr and to the callbacks.

    Parameters
    ----------
    progress
        Whether to report to stderr, live on a terminal and in plain lines elsewhere; None for a terminal only.
    max_passes
        Passes at which the run ends at the latest, for the time left; None where that is not known.
    callbacks
        Called with every row.

    """
    reporters = list(callbacks)
    console = Console(stderr=True, highlight=False)
    # Not console.is_terminal: that obeys FORCE_COLOR, which would write a live line into a log file.
    live = sys.stderr.isatty() and not console.is_dumb_terminal
    meter = Meter(max_passes)
    if progress and not live:
        reporters.append(Lines(meter))
    if not live or progress is False:
        yield _to_all(reporters)
        return
    text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    with Progress(SpinnerColumn(), text, TimeElapsedColumn(), console=console, transient=True) as display:
        task = display.add_task("warm start", total=None)
        yield _to_all([*reporters, lambda row: display.update(task, description=meter.describe(row))])


class Meter:
    """Rows of a trace, told as text: passes, ELBO, rows a second, time left.

    The ELBO is that of the last whole epochs or of all the data; only until there is one, that of a single minibatch.
    """

    def __init__(self, max_passes: float | None = None) -> None:
        self._max_passes = max_passes
        self._first: TraceRow | None = None
        self._elbo: float | None = None

    def describe(self, row: TraceRow) -> str:
        """Return a row as one line; rows come in order."""
        if row.phase != "step":
            self._elbo = row.elbo
        parts = [
            f"{row.passes:.1f} passes"
            if self._max_passes is None
            else f"{row.passes:.1f}/{self._max_passes:.0f} passes",
            f"ELBO {row.elbo:.1f} (one minibatch)" if self._elbo is None else f"ELBO {self._elbo:.1f}",
        ]
        rate = self._rows_per_second(row)
        parts.append(f"{rate:,.0f} rows/s")
        if self._max_passes is not None and rate > 0:
            rows_left = max(0.0, self._max_passes - row.passes) * row.rows_read / row.passes
            parts.append(f"{timedelta(seconds=round(rows_left / rate))} left at most")
        if row.phase == "rejected":
            parts.append("step rejected")
        elif row.phase in WITH_CERTIFICATE:
            known = not math.isnan(row.certificate)
            parts.append(f"certificate {row.certificate:.3g} sd" if known else "certificate unknown")
        return "  ".join(parts)

    def _rows_per_second(self, row: TraceRow) -> float:
        """Return the rate since the first row, before which the run was starting up; of that row, since the start."""
        if self._first is None:
            self._first = row
            return row.rows_read / max(row.seconds, 1e-9)
        return (row.rows_read - self._first.rows_read) / max(row.seconds - self._first.seconds, 1e-9)


class Lines:
    """Plain lines for a log file: no control characters, and at most one in some seconds but for certificates."""

    def __init__(self, meter: Meter, seconds: float = LINE_SECONDS) -> None:
        self._meter, self._seconds = meter, seconds
        self._last = -math.inf

    def __call__(self, row: TraceRow) -> None:
        """Write the line of a row, if it is time for one."""
        text = self._meter.describe(row)
        now = time.monotonic()
        if row.phase in WITH_CERTIFICATE or now - self._last >= self._seconds:
            self._last = now
            sys.stderr.write(f"{row.seconds:7.1f} s  {text}\n")
            sys.stderr.flush()


def _to_all(reporters: Iterable[Reporter]) -> Reporter:
    def report(row: TraceRow) -> None:
        for reporter in reporters:
            reporter(row)

    return report
