"""What the coordinator and Dask's scheduler add to a pass and to a minibatch, and how a pass grows with the data.

- growth: seconds of a pass over ten times the rows, over ten times the seconds of a pass over the rows; one process;
- weak scaling: a pass over two shards a worker, each of which takes a worker one second (it sleeps), with up to 64
  workers, all in this process: seconds beyond two, as a share of the pass;
- a step: a minibatch of 16 chunks of a model with one latent, at 8 draws: milliseconds beyond those of the busiest
  worker, on two worker processes and on 64 workers in this process.

usage: python scripts/bench_scaling.py [--quick] [--json PATH]
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from distributed import Client, LocalCluster
from rich.console import Console
from torch.distributions import Normal

import dadvi
from dadvi.executors import DaskExecutor, SerialExecutor
from dadvi.fit import bind_to
from dadvi.likelihood import BoundModel
from dadvi.passes import Gradient, LogLikSums, Pass
from dadvi.types import Batch

CHUNK_ROWS, COLUMNS = 64, 100


@dataclass(frozen=True)
class Sleep(Pass[LogLikSums]):
    """A pass that takes its time for every chunk."""

    name: ClassVar[str] = "sleep"
    seconds: float

    def size(self, dim: int) -> int:  # noqa: ARG002
        """Return how many numbers its sums have."""
        return 1

    def on_chunk(self, model: BoundModel, batch: Batch) -> LogLikSums:  # noqa: ARG002
        """Sleep."""
        time.sleep(self.seconds)
        return LogLikSums(np.zeros(1))


def workers(number: int, *, processes: bool) -> LocalCluster:
    return LocalCluster(
        n_workers=number,
        threads_per_worker=1,
        processes=processes,
        memory_limit=0,
        dashboard_address=None,
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
    )


def tiny(directory: Path, num_shards: int) -> tuple[BoundModel, dadvi.ShardedDataset]:
    """Return a model with one latent, and data of 16 small chunks a shard."""
    y = np.random.default_rng(0).standard_normal(num_shards * 16 * CHUNK_ROWS).astype(np.float32)
    cut = {"chunk_rows": CHUNK_ROWS, "shard_rows": 16 * CHUNK_ROWS}
    data = dadvi.write_shards(Path(tempfile.mkdtemp(dir=directory)) / "tiny.zarr", {"y": y}, **cut)
    model = dadvi.Model({"m": Normal(0.0, 1.0)}, lambda m: Normal(m, 1.0), observed="y")
    return bind_to(model, data), data


def growth(directory: Path, rows: int, repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    model = dadvi.Model(
        prior={"b": Normal(torch.zeros(COLUMNS), 1.0)}, likelihood=lambda b, x: Normal(x @ b, 1.0), observed="y"
    )
    executors = []
    for times in (1, 10):
        x = rng.standard_normal((times * rows, COLUMNS), dtype=np.float32)
        cut = {"chunk_rows": 10_000, "shard_rows": 100_000}
        data = dadvi.write_shards(directory / f"grown-{times}.zarr", {"x": x, "y": x[:, 0]}, **cut)
        executors.append(SerialExecutor(bind_to(model, data), data))
    seconds: list[list[float]] = [[], []]
    for turn in range(repeats + 1):
        for taken, executor in zip(seconds, executors, strict=True):
            started = time.perf_counter()
            executor.run(Gradient(np.zeros((8, COLUMNS))))
            if turn:  # the first one reads
                taken.append(time.perf_counter() - started)
    few, many = map(statistics.median, seconds)
    return {"what": f"a pass over {10 * rows:,} rows, beside ten over {rows:,}", "value": many / (10 * few), "unit": ""}


def weak_scaling(directory: Path, number: int) -> dict[str, Any]:
    bound, data = tiny(directory, 2 * number)
    with workers(number, processes=False) as cluster, Client(cluster, set_as_default=False) as client:
        executor = DaskExecutor(bound, data, client)
        executor.run(Sleep(0.0))
        started = time.perf_counter()
        executor.run(Sleep(1 / 16))
        elapsed = time.perf_counter() - started
    return {"what": f"overhead of a pass of 2 s, {number} workers", "value": 100 * (elapsed - 2) / elapsed, "unit": "%"}


def step(directory: Path, number: int, steps: int, *, processes: bool) -> dict[str, Any]:
    bound, data = tiny(directory, 64)
    rng = np.random.default_rng(1)
    with workers(number, processes=processes) as cluster, Client(cluster, set_as_default=False) as client:
        executor = DaskExecutor(bound, data, client)
        work = Gradient(np.zeros((8, 1)))
        executor.run(work)
        beyond = []
        for _ in range(steps):
            chunks = rng.choice(data.manifest.num_chunks, 16, replace=False)
            before = executor.profile.transfer
            executor.run(work, chunks)
            beyond.append(executor.profile.transfer - before)
    where = "worker processes" if processes else "workers in this process"
    return {"what": f"overhead of a step, {number} {where}", "value": 1e3 * statistics.median(beyond), "unit": "ms"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows, workers and steps")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    options = parser.parse_args()
    rows, numbers, steps = (50_000, [1, 16], 40) if options.quick else (200_000, [1, 4, 16, 64], 200)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        figures = [growth(directory, rows, 5)]
        figures += [weak_scaling(directory, number) for number in numbers]
        figures.append(step(directory, 2, steps, processes=True))
        figures.append(step(directory, numbers[-1], steps, processes=False))
    console = Console(width=110, highlight=False)
    for figure in figures:
        console.print(f"{figure['what']:<60} {figure['value']:.2f} {figure['unit']}")
    console.print(f"{os.cpu_count()} cores; Python {platform.python_version()}, dadvi {dadvi.__version__}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
