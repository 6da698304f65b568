"""What checkpoints and checksums cost, as a share of a pass over the data.

A logistic regression is fitted by anchored rounds with a run directory, and every checkpoint is timed. A gradient pass
at one point that reads every chunk from mapped shards and keeps none is timed with and without checksums, in turns:
with the data on the disk, as where they are larger than memory, and in the file system's cache, where reading costs
next to nothing and the share of checksums is at its largest. A third way is without checksums, but with a look at every
value whether it is finite: what a first pass takes over data that nothing vouches for.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch.distributions import Bernoulli, Normal

import dadvi
from dadvi.binding import bind_to
from dadvi.checkpoint import Checkpoint, RunDirectory
from dadvi.executors import SerialExecutor
from dadvi.likelihood import BoundModel
from dadvi.memory import Need
from dadvi.passes import Gradient
from dadvi.sharding import mapped


class Timed(RunDirectory):
    """A run directory that tells how long its checkpoints took."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.seconds: list[float] = []

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, and the time it took."""
        started = time.perf_counter()
        super().save(checkpoint)
        self.seconds.append(time.perf_counter() - started)


def make_data(rows: int, columns: int, location: Path) -> dadvi.ShardedDataset:
    """Return a data set on disk."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns), dtype=np.float32)
    beta = (rng.standard_normal(columns) / columns**0.5).astype(np.float32)
    y = rng.random(rows, dtype=np.float32) < 1 / (1 + np.exp(-x @ beta))
    return dadvi.write_shards(location, {"x": x, "y": y})


class _Believed:
    """A checksum that equals any other."""

    __hash__ = None

    def __eq__(self, other: object) -> bool:
        return True


@contextmanager
def believing() -> Iterator[None]:
    """Compute no checksums while the body runs."""
    verifying = mapped.crc32c
    mapped.crc32c = lambda _: _Believed()
    try:
        yield
    finally:
        mapped.crc32c = verifying


def forget(data: dadvi.ShardedDataset) -> None:
    """Have the system read the data from the disk next time."""
    os.sync()
    for file in (file for file in data.location.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds_of_pass(bound: BoundModel, data: dadvi.ShardedDataset) -> float:
    """Return how long a first pass takes that keeps no chunk."""
    executor, point = SerialExecutor(bound, data, Need(budget=0)), bound.model.start[None].numpy()
    started = time.perf_counter()
    executor.run(Gradient(point), check=True)
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 000 rows instead of a million")
    parser.add_argument("--turns", type=int, default=9)
    chosen = parser.parse_args()
    rows, columns = 200_000 if chosen.quick else 1_000_000, 100
    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(columns), 1.0)},
        likelihood=lambda beta, x: Bernoulli(logits=x @ beta),
        observed="y",
    )
    with tempfile.TemporaryDirectory() as directory:
        data = make_data(rows, columns, Path(directory) / "data.zarr")
        bound = bind_to(model, data)
        unknown = replace(data, manifest=replace(data.manifest, finite=False))
        ways = {
            "verified": (nullcontext, data),
            "believed": (believing, data),
            "looked at": (believing, unknown),
        }
        seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        for _ in range(chosen.turns):
            for source in ("disk", "memory"):
                for what, (how, read) in ways.items():
                    if source == "disk":
                        forget(data)
                    with how():
                        seconds[source, what].append(seconds_of_pass(bound, read))
        run = Timed(Path(directory) / "run")
        dadvi.fit(model, data, client="serial", run_dir=run)
    checkpoint = statistics.median(run.seconds)
    out = Console(highlight=False)
    out.print(f"{rows} rows of {columns} float32, one process; medians of {chosen.turns} turns")
    out.print(f"a checkpoint, one a pass: {checkpoint:.4f} s")
    for source in ("disk", "memory"):
        verified, believed, looked_at = (statistics.median(seconds[source, what]) for what in ways)
        for what, base in (("without checksums", believed), ("that looks at every value instead", looked_at)):
            out.print(
                f"data from {source}: a pass {what} {base:.3f} s, with checksums {verified / base - 1:+.1%}, "
                f"with a checkpoint too {(verified + checkpoint) / base - 1:+.1%}"
            )


if __name__ == "__main__":
    main()
