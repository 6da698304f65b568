"""How a fit tells what it is doing: a live line on a terminal, plain lines in a log, nothing, and the user's callbacks."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dadvi.posterior import TraceRow

LINE_SECONDS = 5.0
"""In a log, a line at most this often, and one for every certificate."""

Reporter = Callable[[TraceRow], None]


@contextmanager
def make_reporter(
    progress: bool | None, max_passes: float | None, callbacks: Iterable[Reporter] = ()
) -> Iterator[Reporter]:
    """Give a function that reports a `TraceRow` to stderr (`progress`; None: if it is a terminal) and to the callbacks."""
    reporters = list(callbacks)
    console = Console(stderr=True)
    if progress and not console.is_terminal:
        reporters.append(_Lines())
    if not console.is_terminal or progress is False:
        yield _to_all(reporters)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left at most"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("warm start", total=max_passes)
        yield _to_all([*reporters, lambda row: display.update(task, completed=row.passes, description=describe(row))])


def describe(row: TraceRow) -> str:
    """Return a row as one line: passes, ELBO, rows a second, certificate."""
    text = f"{row.passes:.1f} passes  ELBO {row.elbo:.1f}  {row.rows_read / max(row.seconds, 1e-9):.3g} rows/s"
    return text if row.certificate != row.certificate else f"{text}  certificate {row.certificate:.3g} sd"


class _Lines:
    """Plain lines for a log file: no control characters, few enough to read."""

    def __init__(self) -> None:
        self._last = -LINE_SECONDS

    def __call__(self, row: TraceRow) -> None:
        now = time.monotonic()
        if row.phase == "certificate" or now - self._last >= LINE_SECONDS:
            self._last = now
            sys.stderr.write(f"{row.seconds:7.1f} s  {describe(row)}\n")
            sys.stderr.flush()


def _to_all(reporters: Iterable[Reporter]) -> Reporter:
    def report(row: TraceRow) -> None:
        for reporter in reporters:
            reporter(row)

    return report
