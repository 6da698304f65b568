"""How many passes the anchored solver needs, and how far it then is from the optimum, against exact references.

For each problem of `problems.py` and each number of rows: passes until the solver was done (rows read over N, all of
them counted), seconds with two worker processes (reading included, the cluster up), RMS error of the mean in posterior
sds, of all coordinates or of slopes, effects and scales each, the largest error of an sd against the family's optimum,
and certificate over true largest distance at every round where either was below 1. For full rank also the largest
error of the sds of a mean-field fit's linear response, against the same optimum.

A row that misses what it is to reach says what it missed: see `Reach`, and the certificate is to be within a factor of
two. References are in `references.py`.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from problems import PROBLEMS, Drawn, Problem
from references import Optimum, optimum
from rich.console import Console
from rich.table import Table

import dadvi
from dadvi.binding import bind_to
from dadvi.errors import InputError
from dadvi.executors import Executor, make_executor
from dadvi.families import make_family
from dadvi.likelihood import BoundModel
from dadvi.passes import Pass
from dadvi.posterior import Fitted, TraceRow
from dadvi.sharding import ShardedDataset
from dadvi.stopwatch import Profile

WORKERS, TOL, MOST_PASSES = 2, 0.1, 25.0

HONEST = 2.0
"""Factor within which a certificate below 1 is to be of the true distance."""


class Recording:
    """An executor that remembers where the last pass over all the data was: the mean over its points (D,).

    The points of a round's pass are q's mean, or draws in pairs ±ε, whose mean is q's.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.latest: torch.Tensor | None = None

    @property
    def model(self) -> BoundModel:
        """The model that is fitted."""
        return self._executor.model

    @property
    def data(self) -> ShardedDataset:
        """The data it is fitted to."""
        return self._executor.data

    @property
    def rows_read(self) -> int:
        """Rows read so far."""
        return self._executor.rows_read

    @property
    def profile(self) -> Profile:
        """Where the time of passes went."""
        return self._executor.profile

    def run(self, work: Pass[Any], chunks: Iterable[int] | None = None, *, check: bool = False, label: str = "") -> Any:
        """Return the sums of a pass."""
        points = getattr(getattr(work, "gradient", work), "points", None)
        if chunks is None and points is not None:
            self.latest = torch.from_numpy(points).mean(0)
        return self._executor.run(work, chunks, check=check, label=label)

    def close(self) -> None:
        """Give back what the executor holds."""
        self._executor.close()


@dataclass(frozen=True)
class Round:
    """What the solver said of a round, and the truth; in posterior sds."""

    phase: str  # "round" or "rejected"
    passes: float
    certificate: float  # nan where there is none
    truth: float  # largest error of the mean

    @property
    def counts(self) -> bool:
        """Whether the certificate is to be honest here."""
        return not math.isnan(self.certificate) and min(self.certificate, self.truth) < 1

    @property
    def honest(self) -> bool:
        """Whether it is, within the factor."""
        return 1 / HONEST <= self.certificate / self.truth <= HONEST


@dataclass
class Measured:
    """A row of the table."""

    problem: str
    num_rows: int
    dim: int
    family: str
    status: str = ""
    passes: float = math.nan
    seconds: float = math.nan
    errors: dict[str, float] = field(default_factory=dict)  # part to RMS error of its means, in posterior sds
    sd_error: float = math.nan  # largest, relative to the optimum
    linear_response: float | None = None  # the same, of a mean-field fit's linear response
    rounds: list[Round] = field(default_factory=list)
    reference: dict[str, float] = field(
        default_factory=dict
    )  # how surely the reference is the optimum, and its seconds
    missed: list[str] = field(default_factory=list)


def measure(name: str, problem: Problem, num_rows: int, groups: tuple[int, ...], directory: Path) -> Measured:
    """Draw the data, find the optimum, fit, and compare."""
    drawn = problem.draw(np.random.default_rng(0), num_rows, *groups)
    data = dadvi.write_shards(directory / "data.zarr", drawn.fields)
    row = Measured(name, num_rows, drawn.model.dim, problem.family)
    drawn.fields.clear()  # they are on disk now
    rounds: list[tuple[TraceRow, torch.Tensor]] = []
    try:
        found, row.seconds = fit(problem, drawn, data, rounds)
    except InputError as error:  # such as: too many coordinates
        row.status, row.missed = "refused", [str(error)]
        return row
    best = optimum(drawn.target, data, drawn.truth, full_rank=problem.family == "full_rank")
    row.reference = {"residual": best.residual, "iterations": best.iterations, "seconds": best.seconds}
    row.status, row.passes = found.status, found.passes
    error = (found.q.loc - best.loc) / best.marginal
    row.errors = {part: rms(error[at]) for part, at in parts(problem, drawn.model)}
    row.sd_error = sd_error(found.q.stddev, best)
    row.rounds = [
        Round(said.phase, said.passes, said.certificate, float(((loc - best.loc) / best.marginal).abs().max()))
        for said, loc in rounds
    ]
    if problem.reach.linear_response and hasattr(dadvi.Posterior, "linear_response"):
        row.linear_response = sd_error(linear_response(drawn.model, data), best)
    row.missed = list(missed(problem, row))
    return row


def fit(
    problem: Problem, drawn: Drawn, data: ShardedDataset, rounds: list[tuple[TraceRow, torch.Tensor]]
) -> tuple[Fitted, float]:
    """Return the fit and its seconds; append what was said of each round, and the mean that it visited."""
    with make_executor(bind_to(drawn.model, data), data, None, WORKERS) as executor:
        recording = Recording(executor)
        start = time.perf_counter()
        found = dadvi.Anchored().fit(
            recording,
            make_family(problem.family),
            tol=TOL,
            max_passes=MOST_PASSES,
            seed=0,
            report=lambda said: rounds.append((said, recording.latest)),
        )
        return found, time.perf_counter() - start


def linear_response(model: dadvi.Model, data: ShardedDataset) -> torch.Tensor:
    """Return the sds (D,) of a mean-field fit's linear response."""
    posterior = dadvi.fit(model, data, num_workers=WORKERS, tol=TOL, seed=0, progress=False)
    return posterior.linear_response().unconstrained.stddev


def parts(problem: Problem, model: dadvi.Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parts whose error is told, with their coordinates."""
    sites = {site.name: range(site.offset, site.offset + site.size) for site in model.space.sites}
    for part, names in (problem.parts or {"mean": sites}).items():
        yield part, torch.tensor([coordinate for name in names for coordinate in sites[name]])


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def sd_error(stddev: torch.Tensor, best: Optimum) -> float:
    return float((stddev / best.stddev - 1).abs().max())


def missed(problem: Problem, row: Measured) -> Iterator[str]:
    """Yield what a row has not reached."""
    reach = problem.reach
    if row.status != "converged":
        yield row.status
    if not round(row.passes, 2) <= reach.passes:
        yield f"passes {row.passes:.2f} > {reach.passes:g}"
    for part, error in row.errors.items():
        if not error <= reach.mean:
            yield f"{part} {error:.3f} > {reach.mean:g} sd"
    if reach.sd is not None and not row.sd_error <= reach.sd:
        yield f"sds {row.sd_error:.1%} > {reach.sd:.0%}"
    if reach.linear_response and row.linear_response is None:
        yield "no linear response"
    elif reach.linear_response and not row.linear_response <= reach.sd:
        yield f"linear response {row.linear_response:.1%} > {reach.sd:.0%}"
    if dishonest := [each for each in row.rounds if each.counts and not each.honest]:
        yield "certificate " + ", ".join(f"{each.certificate:.2g} for {each.truth:.2g}" for each in dishonest)


def as_table(rows: list[Measured]) -> Table:
    """Return the table."""
    titles = ("problem", "N", "D", "passes", "status", "seconds", "RMS error (sd)", "worst sd", "certificate/truth")
    table = Table(*titles, "reach", title=f"anchored rounds, {WORKERS} workers, tol = {TOL:g}")
    for row in rows:
        widths = shown(row.sd_error, ".1%")
        if row.linear_response is not None:
            widths += f"\nlinear response {row.linear_response:.1%}"
        table.add_row(
            row.problem,
            f"{row.num_rows:,}",
            f"{row.dim:,}",
            shown(row.passes, ".2f"),
            row.status,
            shown(row.seconds, ".1f"),
            "\n".join(f"{error:.4f} {part}" for part, error in row.errors.items()),
            widths,
            "\n".join(f"{each.certificate:.2g}/{each.truth:.2g}" for each in row.rounds if each.counts),
            "[red]MISSED[/]: " + "; ".join(row.missed) if row.missed else "reached",
        )
    return table


def shown(value: float, form: str) -> str:
    """Return a number as text, or nothing where it is not known."""
    return "" if math.isnan(value) else format(value, form)


def sizes(problem: Problem, options: argparse.Namespace) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the numbers of rows and groups that are asked for."""
    fraction = 10 if options.quick else 1
    for num_rows in problem.rows:
        if options.min_rows <= num_rows // fraction <= options.max_rows:
            yield num_rows // fraction, tuple(each // fraction for each in problem.groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(PROBLEMS)
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=f"of {known}; default: all")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, and of the groups")
    parser.add_argument("--max-rows", type=float, default=math.inf, help="leave out larger data")
    parser.add_argument("--min-rows", type=float, default=0, help="leave out smaller data")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the measurements there too")
    options = parser.parse_args()
    if unknown := set(options.problems) - set(PROBLEMS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; the problems are {known}")
    console, rows = Console(stderr=True), []
    for name in options.problems or PROBLEMS:
        for num_rows, groups in sizes(PROBLEMS[name], options):
            console.log(f"{name}, {num_rows:,} rows", highlight=False)
            with tempfile.TemporaryDirectory() as directory:
                rows.append(measure(name, PROBLEMS[name], num_rows, groups, Path(directory)))
            if options.json:  # after every row: the next may take long
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    Console(width=160).print(as_table(rows))


if __name__ == "__main__":
    main()
