"""Seconds of one full-data gradient pass: dadvi beside hand-written torch, and beside what the machine allows.

In memory, one thread: dadvi's pass over chunks that are tensors already, beside a loop over the same chunks, written by
hand with all draws side by side: value and gradient in closed form for the logistic regression, torch autograd on
batched code for the others.

From shards, one thread and the thread that reads ahead, page cache warm, nothing kept: beside the slower of two limits,
reading and verifying every chunk alone, and the loop by hand over chunks in memory.

By workers: two that hold the chunks beside one, and beside blocked torch on two threads.

A ratio is the other's seconds over dadvi's: 1 is as fast. Ways take turns, a ratio compares times of the same turn, and
figures are medians over the turns. All ways must agree before they are timed.

usage: python scripts/bench_pass.py [--quick] [--json PATH]
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from distributed import Client
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributions import Bernoulli, HalfNormal, LogNormal, Normal, StudentT
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import dadvi
from dadvi.executors import DaskExecutor, SerialExecutor, start_local
from dadvi.fit import bind_to
from dadvi.likelihood import BoundModel
from dadvi.memory import Need
from dadvi.passes import Gradient, GradientSums, single_thread
from dadvi.sharding import ShardedDataset
from dadvi.stopwatch import Stopwatch
from dadvi.types import Batch

COLUMNS = 100
BLOCK_ROWS = 16_384  # of blocked torch on two threads

Loop = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
"""Log-likelihoods (K,) and gradients (K, D), both float64, of a chunk at float32 points η (K, D)."""


class Problem(NamedTuple):
    """A model, and how its gradient is written by hand."""

    model: dadvi.Model
    by_hand: Loop
    points: tuple[int, ...]  # K


def logistic() -> Problem:
    """Return the regression whose gradient by hand is two products of matrices."""

    def by_hand(eta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        x, y = batch["x"], batch["y"].float()[:, None]
        logits = x @ eta.T  # (rows, K)
        value = (y * logits - softplus(logits)).sum(0, dtype=torch.float64)
        return value, ((y - torch.sigmoid(logits)).T @ x).double()

    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(COLUMNS), 1.0)},
        likelihood=lambda beta, x: Bernoulli(logits=x @ beta),
        observed="y",
    )
    return Problem(model, by_hand, (1, 8, 32))


def by_autograd(log_lik: Callable[[Tensor, Batch], Tensor]) -> Loop:
    """Return a loop that differentiates log-likelihoods (rows, K) of batched code."""

    def by_hand(eta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        leaf = eta.detach().requires_grad_()
        rows = log_lik(leaf, batch)
        (grad,) = torch.autograd.grad(rows.sum(), leaf)
        return rows.detach().sum(0, dtype=torch.float64), grad.double()

    return by_hand


def gather(groups: int) -> Problem:
    """Return a logistic regression with an effect of a group for each row."""

    def log_lik(eta: Tensor, batch: Batch) -> Tensor:
        logits = batch["x"] @ eta[:, :COLUMNS].T + eta[:, COLUMNS:].T.index_select(0, batch["g"] % groups)
        return -binary_cross_entropy_with_logits(
            logits, batch["y"].float()[:, None].expand_as(logits), reduction="none"
        )

    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(COLUMNS), 1.0), "u": Normal(torch.zeros(groups), 1.0)},
        likelihood=lambda beta, u, x, g: Bernoulli(logits=x @ beta + u[g % groups]),
        observed="y",
    )
    return Problem(model, by_autograd(log_lik), (1, 8))


def student() -> Problem:
    """Return a robust regression with unknown scale and degrees of freedom."""

    def log_lik(eta: Tensor, batch: Batch) -> Tensor:
        scale, df = eta[:, COLUMNS].exp(), eta[:, COLUMNS + 1].exp()
        z = (batch["z"][:, None] - batch["x"] @ eta[:, :COLUMNS].T) / scale
        constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (df * torch.pi).log() - scale.log()
        return constant - (df + 1) / 2 * torch.log1p(z.square() / df)

    prior = {"beta": Normal(torch.zeros(COLUMNS), 1.0), "scale": HalfNormal(1.0), "df": LogNormal(1.0, 1.0)}
    model = dadvi.Model(prior, lambda beta, scale, df, x: StudentT(df, x @ beta, scale), observed="z")
    return Problem(model, by_autograd(log_lik), (1, 8))


def network(width: int = 16) -> Problem:
    """Return a logistic regression on the second hidden layer of a network."""
    cuts = [COLUMNS * width, width * width, width]

    def log_lik(eta: Tensor, batch: Batch) -> Tensor:
        first, second, last = eta.split(cuts, 1)
        hidden = torch.tanh(batch["x"] @ first.reshape(-1, COLUMNS, width))  # (K, rows, width)
        hidden = torch.tanh(hidden @ second.reshape(-1, width, width))
        logits = (hidden @ last[:, :, None])[..., 0].T
        return -binary_cross_entropy_with_logits(
            logits, batch["y"].float()[:, None].expand_as(logits), reduction="none"
        )

    prior = {
        "v": Normal(torch.zeros(COLUMNS, width), 0.1),
        "w": Normal(torch.zeros(width, width), 0.3),
        "b": Normal(torch.zeros(width), 1.0),
    }
    model = dadvi.Model(prior, lambda v, w, b, x: Bernoulli(logits=torch.tanh(torch.tanh(x @ v) @ w) @ b), observed="y")
    return Problem(model, by_autograd(log_lik), (1, 8))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "logistic": logistic,
    "gather, 2 000 groups": lambda: gather(2_000),
    "gather, 100 000 groups": lambda: gather(100_000),
    "Student-t": student,
    "3 layers": network,
}


def make_data(rows: int, location: Path) -> ShardedDataset:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, COLUMNS), dtype=np.float32)
    slopes = (rng.standard_normal(COLUMNS) / COLUMNS**0.5).astype(np.float32)
    z = x @ slopes + rng.standard_normal(rows, dtype=np.float32)
    groups = rng.integers(0, 100_000, rows, dtype=np.int32)
    return dadvi.write_shards(location, {"x": x, "y": (z > 0).astype(np.uint8), "z": z, "g": groups})


def loop(by_hand: Loop, points: np.ndarray, batches: Sequence[Batch]) -> GradientSums:
    """Sum a loop over the chunks."""
    eta = torch.from_numpy(points).float()
    log_lik = torch.zeros(len(eta), dtype=torch.float64)
    grad = torch.zeros(eta.shape, dtype=torch.float64)
    for batch in batches:
        value, slope = by_hand(eta, batch)
        log_lik += value
        grad += slope
    return GradientSums(log_lik.numpy(), grad.numpy())


def resident(points: np.ndarray, model: BoundModel, batches: Sequence[Batch]) -> GradientSums:
    """Sum dadvi's pass over the same chunks."""
    total = Gradient(points).over(model, Stopwatch())
    for batch in batches:
        total.add(batch)
    return total.sums()


Way = Callable[[], GradientSums | None]


def take_turns(ways: dict[str, Way], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each turn, after a turn in which those with a result must agree."""
    results = [(name, result) for name, way in ways.items() if (result := way()) is not None]
    _, expected = results[0]
    size = np.abs(expected.grad).max()
    for name, result in results:
        same = np.allclose(result.log_lik, expected.log_lik, rtol=1e-3)
        if not (same and np.allclose(result.grad, expected.grad, rtol=1e-2, atol=1e-3 * size)):
            raise SystemExit(f"{name!r} disagrees with {results[0][0]!r}; a time for it means nothing")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(others: Sequence[float], ours: Sequence[float]) -> float:
    return statistics.median(other / own for other, own in zip(others, ours, strict=True))


class Bench:
    """The rows of the table."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, num_points: int, against: str, others: Sequence[float], ours: Sequence[float]) -> None:
        """Add a row."""
        row = {"what": what, "K": num_points, "against": against, "seconds": statistics.median(ours)}
        self.rows.append({**row, "ratio": ratio(others, ours)})

    def in_memory(self, data: ShardedDataset, batches: Sequence[Batch]) -> None:
        """Time every problem on chunks in memory, beside a loop by hand."""
        for name, make in PROBLEMS.items():
            problem = make()
            bound = bind_to(problem.model, data)
            for num_points in problem.points:
                points = 0.1 * np.random.default_rng(1).standard_normal((num_points, bound.model.dim))
                ways: dict[str, Way] = {
                    # Bound now, not at the call, when the loop has moved on.
                    "hand": lambda points=points, problem=problem: loop(problem.by_hand, points, batches),
                    "dadvi": lambda points=points, bound=bound: resident(points, bound, batches),
                }
                with single_thread():
                    seconds = take_turns(ways, self.repeats)
                self.add(f"in memory, {name}", num_points, "loop by hand", seconds["hand"], seconds["dadvi"])

    def from_shards(self, data: ShardedDataset, batches: Sequence[Batch]) -> None:
        """Time passes that keep nothing, beside the slower of reading and computing."""
        problem = logistic()
        bound = bind_to(problem.model, data)

        def read() -> None:
            for chunk in range(data.manifest.num_chunks):
                data.read(chunk, bound.fields)

        for num_points in problem.points:
            points = 0.1 * np.random.default_rng(1).standard_normal((num_points, COLUMNS))
            executor = SerialExecutor(bound, data, Need(budget=0))
            ways: dict[str, Way] = {
                "hand": lambda points=points: loop(problem.by_hand, points, batches),
                "read": read,
                "dadvi": lambda points=points, executor=executor: executor.run(Gradient(points)),
            }
            with single_thread():
                seconds = take_turns(ways, self.repeats)
            limits = [max(pair) for pair in zip(seconds["hand"], seconds["read"], strict=True)]
            self.add("from shards, nothing kept", num_points, "slower limit", limits, seconds["dadvi"])

    def by_workers(self, data: ShardedDataset, batches: Sequence[Batch], one: Client, two: Client) -> None:
        """Time passes by workers that hold the chunks, beside one worker and blocked torch."""
        problem = logistic()
        bound = bind_to(problem.model, data)
        blocks = [
            {name: values[first : first + BLOCK_ROWS] for name, values in batch.items()}
            for batch in batches
            for first in range(0, len(batch["y"]), BLOCK_ROWS)
        ]

        def blocked(points: np.ndarray) -> GradientSums:
            torch.set_num_threads(2)
            try:
                return loop(problem.by_hand, points, blocks)
            finally:
                torch.set_num_threads(1)

        with DaskExecutor(bound, data, one) as alone, DaskExecutor(bound, data, two) as both:
            for num_points in problem.points:
                work = Gradient(0.1 * np.random.default_rng(1).standard_normal((num_points, COLUMNS)))
                ways: dict[str, Way] = {
                    "torch": lambda work=work: blocked(work.points),
                    "one": lambda work=work: alone.run(work),
                    "two": lambda work=work: both.run(work),
                }
                seconds = take_turns(ways, self.repeats)
                self.add("two workers, chunks kept", num_points, "one worker", seconds["one"], seconds["two"])
                self.add("two workers, chunks kept", num_points, "torch, 2 threads", seconds["torch"], seconds["two"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    options = parser.parse_args()
    rows, more_rows, repeats = (100_000, 400_000, 3) if options.quick else (500_000, 2_000_000, 7)
    bench = Bench(repeats)
    with tempfile.TemporaryDirectory() as directory:
        data = make_data(rows, Path(directory) / "data.zarr")
        batches = [data.read(chunk) for chunk in range(data.manifest.num_chunks)]
        bench.in_memory(data, batches)
        bench.from_shards(data, batches)
        more = make_data(more_rows, Path(directory) / "more.zarr")
        batches = [more.read(chunk) for chunk in range(more.manifest.num_chunks)]
        clusters = [start_local(1), start_local(2)]
        try:
            bench.by_workers(more, batches, clusters[0][0], clusters[1][0])
        finally:
            for client, cluster in clusters:
                client.close()
                cluster.close()

    console = Console(width=110, highlight=False)
    table = Table(
        "dadvi's pass", "K", "against", "seconds", "ratio", title=f"{rows:,} and {more_rows:,} rows x {COLUMNS}"
    )
    for row in bench.rows:
        table.add_row(row["what"], str(row["K"]), row["against"], f"{row['seconds']:.3f}", f"{row['ratio']:.2f}")
    console.print(table)
    console.print(
        f"median of {repeats}; {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
        f"dadvi {dadvi.__version__}"
    )
    if options.json:
        options.json.write_text(json.dumps(bench.rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
