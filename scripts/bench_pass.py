"""Seconds for one full-data gradient pass of a logistic regression: dadvi beside a hand-written torch loop.

Every way sums over the same chunks, each process on one torch thread:

- by hand: value and gradient in closed form, by two matrix products a chunk, from tensors in memory;
- resident: dadvi's gradient pass on those same tensors, the counterpart of the loop by hand;
- memory store: a first pass, which reads Zarr chunks from a store in memory;
- shards: a first pass, which reads files that the operating system has in its cache, and a second pass by the same
  executor, which finds in memory what its cache of chunks could keep; serially and on two worker processes.

A ratio is the loop's seconds over dadvi's: 1 is as fast as by hand. The ways take turns, and a ratio compares times of
the same turn; figures are medians over the turns.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from rich.console import Console
from rich.table import Column, Table
from torch.distributions import Bernoulli, Normal
from zarr.storage import MemoryStore

import dadvi
from dadvi.executors import DaskExecutor, SerialExecutor, start_local
from dadvi.fit import bind_to
from dadvi.likelihood import BoundModel
from dadvi.passes import Gradient, GradientSums, add, single_thread
from dadvi.types import Batch

WORKERS = 2
BY_HAND = "by hand"

Way: TypeAlias = Callable[[], Callable[[], GradientSums]]
"""Gets ready, which takes no part in the time, and returns what is timed."""


def make_data(rows: int, columns: int, location: Path | MemoryStore) -> dadvi.ShardedDataset:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns), dtype=np.float32)
    beta = (rng.standard_normal(columns) / columns**0.5).astype(np.float32)
    y = rng.random(rows, dtype=np.float32) < 1 / (1 + np.exp(-x @ beta))
    return dadvi.write_shards(location, {"x": x, "y": y})


def by_hand(points: np.ndarray, batches: Sequence[Batch]) -> GradientSums:
    """Return log-likelihoods (K,) and gradients (K, D) by the formulas of the logistic regression."""
    eta = torch.from_numpy(points).float()
    log_lik = torch.zeros(len(eta), dtype=torch.float64)
    grad = torch.zeros(eta.shape, dtype=torch.float64)
    with torch.no_grad(), single_thread():
        for batch in batches:
            x, y = batch["x"], batch["y"].float()[:, None]
            logits = x @ eta.T  # (rows, K)
            log_lik += (y * logits - torch.nn.functional.softplus(logits)).sum(0, dtype=torch.float64)
            grad += (y - torch.sigmoid(logits)).T @ x
    return GradientSums(log_lik.numpy(), grad.numpy())


def resident(points: np.ndarray, model: BoundModel, batches: Sequence[Batch]) -> GradientSums:
    """Return the sums of dadvi's gradient pass over chunks that are tensors already."""
    work = Gradient(points)
    with single_thread():
        total = work.on_chunk(model, batches[0])
        for batch in batches[1:]:
            total = add(total, work.on_chunk(model, batch))
    return total


def measure(ways: dict[str, Way], repeats: int) -> dict[str, tuple[float, float]]:
    """Return median seconds and ratio of each way, after a warm-up in which all must agree with the loop by hand."""
    expected = ways[BY_HAND]()()
    scale = np.abs(expected.grad).max()
    for name, way in ways.items():
        sums = way()()
        log_lik_agrees = np.allclose(sums.log_lik, expected.log_lik, rtol=1e-4)
        if not (log_lik_agrees and np.allclose(sums.grad, expected.grad, rtol=1e-3, atol=1e-4 * scale)):
            raise SystemExit(f"{name!r} disagrees with the loop by hand; a time for it means nothing")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            ready = way()
            start = time.perf_counter()
            ready()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: (
            statistics.median(values),
            statistics.median(hand / own for hand, own in zip(seconds[BY_HAND], values, strict=True)),
        )
        for name, values in seconds.items()
    }


def executor_way(work: Gradient, make: Callable[[], SerialExecutor | DaskExecutor], *, second: bool) -> Way:
    """Return a pass by a new executor, which has nothing in memory yet, or that executor's second pass."""

    def prepare() -> Callable[[], GradientSums]:
        executor = make()
        if second:
            executor.run(work)
        return lambda: executor.run(work)

    return prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="100 000 rows, 3 repeats")
    options = parser.parse_args()
    rows, repeats = (100_000, 3) if options.quick else (options.rows, options.repeats)

    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(options.columns), 1.0)},
        likelihood=lambda beta, x: Bernoulli(logits=x @ beta),
        observed="y",
    )
    figures: dict[int, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        on_disk = make_data(rows, options.columns, Path(directory) / "data.zarr")
        in_memory = make_data(rows, options.columns, MemoryStore())
        bound = bind_to(model, on_disk)
        manifest = on_disk.manifest
        batches = [on_disk.read(chunk) for chunk in range(manifest.num_chunks)]
        client, cluster = start_local(WORKERS)
        with cluster, client:
            for num_draws in (1, 8, 32):
                points = 0.1 * np.random.default_rng(num_draws).standard_normal((num_draws, options.columns))
                work = Gradient(points)
                makers: dict[str, Callable[[], SerialExecutor | DaskExecutor]] = {
                    "serial": lambda: SerialExecutor(bound, on_disk),
                    f"{WORKERS} workers": lambda: DaskExecutor(bound, on_disk, client),
                }
                ways: dict[str, Way] = {
                    BY_HAND: lambda points=points: partial(by_hand, points, batches),
                    "dadvi, resident": lambda points=points: partial(resident, points, bound, batches),
                    "dadvi, memory store, first pass": executor_way(
                        work, lambda: SerialExecutor(bound, in_memory), second=False
                    ),
                }
                for name, make in makers.items():
                    ways[f"dadvi, shards, {name}, first pass"] = executor_way(work, make, second=False)
                    ways[f"dadvi, shards, {name}, second pass"] = executor_way(work, make, second=True)
                figures[num_draws] = measure(ways, repeats)

    cut = f"{manifest.num_chunks} chunks in {manifest.num_shards} shards"
    columns = [Column(f"K = {num_draws}", justify="right") for num_draws in figures]
    table = Table("", *columns, title=f"seconds a pass (ratio): {rows} x {options.columns} float32, {cut}")
    for name in figures[1]:
        table.add_row(name, *("{:.3f} ({:.2f})".format(*of_k[name]) for of_k in figures.values()))
    console = Console(width=100)
    console.print(table)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, dadvi {dadvi.__version__}"
    console.print(
        f"median of {repeats}; {os.cpu_count()} cores, one torch thread a process; {versions}", highlight=False
    )
    console.print(f"likelihood evaluated by strategy {bound.strategy!r}", highlight=False)


if __name__ == "__main__":
    main()
