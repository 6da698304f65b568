"""What benchmarks of speed and memory share: ways that take turns, rows with an aim, their table and their JSON."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import dadvi
from dadvi.passes import GradientSums

Way: TypeAlias = Callable[[], GradientSums]
"""One way to sum a pass."""

Seconds: TypeAlias = dict[str, list[float]]
"""Of each way, one number a turn."""


@dataclass(frozen=True)
class Row:
    """One figure, and what is to be reached."""

    what: str
    figure: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    beside: str = ""  # what the figure was made of

    @property
    def aim(self) -> str:
        """What is to be reached, as text."""
        bounds = [("≥", self.at_least), ("≤", self.at_most)]
        return " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)

    @property
    def missed(self) -> bool:
        """Whether it is not reached."""
        low, high = self.at_least, self.at_most
        return not ((low is None or self.figure >= low) and (high is None or self.figure <= high))


def parser(description: str, parts: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Return the parser of the options that benchmarks share; `parts` are what can be run by name."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if len(parts) > 1:
        known = ", ".join(parts)
        made.add_argument("parts", nargs="*", choices=[*parts, []], metavar="PART", help=f"of {known}; default: all")
    made.add_argument("--quick", action="store_true", help="fewer rows and turns: under a minute")
    made.add_argument("--json", type=Path, metavar="PATH", help="write the rows there too")
    return made


def take_turns(ways: Mapping[str, Way], turns: int) -> Seconds:
    """Return seconds of each way, after a warm-up in which all must agree with the first.

    In a turn every way runs once, so that what else the machine does meets all of them alike.
    """
    names = iter(ways)
    first = next(names)
    expected = ways[first]()
    scale = np.abs(expected.grad).max()
    for name in names:
        sums = ways[name]()
        log_lik_agrees = np.allclose(sums.log_lik, expected.log_lik, rtol=1e-4)
        if not (log_lik_agrees and np.allclose(sums.grad, expected.grad, rtol=1e-3, atol=2e-4 * scale)):
            raise SystemExit(f"{name!r} disagrees with {first!r}; a time for it means nothing")
    seconds: Seconds = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    return seconds


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median ratio of times of the same turn."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def medians(seconds: Seconds) -> str:
    """Return the median seconds of each way as text."""
    return ", ".join(f"{name} {statistics.median(values):.3g} s" for name, values in seconds.items())


def tell(title: str, rows: list[Row], to: Path | None) -> None:
    """Print the rows, and write them to a file if one is given."""
    table = Table("", Column("figure", justify="right"), "unit", "aim", "beside", title=title)
    for row in rows:
        figure = f"[red]{row.figure:.3g} MISSED[/]" if row.missed else f"{row.figure:.3g}"
        table.add_row(escape(row.what), figure, row.unit, row.aim, escape(row.beside))
    console = Console(width=160, highlight=False)
    console.print(table)
    console.print(versions())
    if to is not None:
        to.write_text(json.dumps({"versions": versions(), "rows": [asdict(row) for row in rows]}, indent=1))


def versions() -> str:
    """Return what was measured, and where, in a line."""
    return (
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, dadvi {dadvi.__version__}"
    )
