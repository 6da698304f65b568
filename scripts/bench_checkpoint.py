"""What checkpoints and checksums cost, as a share of a pass over the data.

A logistic regression is fitted by anchored rounds with a run directory, and every checkpoint is timed. A gradient pass
that reads every chunk from mapped shards is timed, and beside it, in turns, the checksums of the same bytes alone.
Figures are the least of the turns, which other work on the machine disturbs least; that of checkpoints is their median.
The file system's cache holds the data, so that the checksum's share is at its largest.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import crc32c
import numpy as np
import torch
from rich.console import Console
from torch.distributions import Bernoulli, Normal

import dadvi
from dadvi.checkpoint import Checkpoint, RunDirectory
from dadvi.executors import SerialExecutor
from dadvi.likelihood import bind_to
from dadvi.memory import Need
from dadvi.passes import Gradient


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


def checksums_of(data: dadvi.ShardedDataset) -> None:
    """Compute the checksum of every chunk's bytes, mapped as a pass maps them."""
    for shard in sorted(file for file in data.location.glob("*/c/**/*") if file.is_file()):
        stored = np.memmap(shard, dtype=np.uint8, mode="r").view(np.ndarray)
        for piece in np.array_split(stored, max(1, len(stored) // 2**23)):
            crc32c.crc32c(piece.data)


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
        passes: list[float] = []
        sums: list[float] = []
        for _ in range(chosen.turns):
            executor = SerialExecutor(bound, data, Need(budget=0))  # which keeps no chunk
            started = time.perf_counter()
            executor.run(Gradient(model.start[None].numpy()))
            passed = time.perf_counter()
            checksums_of(data)
            passes.append(passed - started)
            sums.append(time.perf_counter() - passed)
        run = Timed(Path(directory) / "run")
        dadvi.fit(model, data, client="serial", run_dir=run)
    a_pass, checksums, checkpoint = min(passes), min(sums), statistics.median(run.seconds)
    out = Console(highlight=False)
    out.print(f"{rows} rows of {columns} float32, one process; the least of {chosen.turns} turns")
    out.print(f"a pass that reads all: {a_pass:.3f} s")
    out.print(f"checksums: {checksums:.4f} s, {checksums / a_pass:.1%} of a pass")
    out.print(f"a checkpoint, one a pass: {checkpoint:.4f} s, {checkpoint / a_pass:.1%} of a pass")
    out.print(f"together: {(checksums + checkpoint) / a_pass:.1%} of a pass")


if __name__ == "__main__":
    main()
