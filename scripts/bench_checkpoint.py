"""What checkpoints and checksums cost, as a share of a pass over the data.

A logistic regression is fitted by anchored rounds with a run directory, and every checkpoint is timed. A gradient pass
that reads every chunk is timed on the data with checksums, as dadvi writes them, and on the same arrays without, in
turns. Figures of passes are the least of the turns, which other work on the machine disturbs least; that of checkpoints
is their median. The file system's cache holds the data, so that the checksum's share is at its largest.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zarr
from rich.console import Console
from torch.distributions import Bernoulli, Normal

import dadvi
from dadvi.checkpoint import Checkpoint, RunDirectory
from dadvi.executors import SerialExecutor
from dadvi.likelihood import bind_to
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


def make_data(rows: int, columns: int, directory: Path) -> tuple[dadvi.ShardedDataset, dadvi.ShardedDataset]:
    """Return the data with checksums, and the same without."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns), dtype=np.float32)
    beta = (rng.standard_normal(columns) / columns**0.5).astype(np.float32)
    y = rng.random(rows, dtype=np.float32) < 1 / (1 + np.exp(-x @ beta))
    summed = dadvi.write_shards(directory / "summed.zarr", {"x": x, "y": y})
    group = zarr.create_group(directory / "plain.zarr")
    for name, values in (("x", x), ("y", y)):
        chunk, shard = summed.manifest.chunk_rows, summed.manifest.shard_rows
        shape = values.shape[1:]
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(chunk, *shape),
            shards=(shard, *shape),
            compressors=None,
        )
        array[...] = values
    return summed, dadvi.open_shards(directory / "plain.zarr")


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
        ways = dict(zip(("with", "without"), make_data(rows, columns, Path(directory)), strict=True))
        bound = {name: bind_to(model, data) for name, data in ways.items()}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(chosen.turns):
            for name, data in ways.items():
                executor = SerialExecutor(bound[name], data)  # with an empty cache of chunks
                started = time.perf_counter()
                executor.run(Gradient(model.start[None].numpy()))
                taken[name].append(time.perf_counter() - started)
        run = Timed(Path(directory) / "run")
        dadvi.fit(model, ways["with"], client="serial", run_dir=run)
    a_pass, plain = (min(taken[name]) for name in ways)
    checksums, checkpoint = a_pass - plain, statistics.median(run.seconds)
    out = Console(highlight=False)
    out.print(f"{rows} rows of {columns} float32, one process; the least of {chosen.turns} turns")
    out.print(f"a pass that reads all: {a_pass:.3f} s, without checksums {plain:.3f} s")
    out.print(f"checksums: {checksums:.4f} s, {checksums / a_pass:.1%} of a pass")
    out.print(f"a checkpoint, one a pass: {checkpoint:.4f} s, {checkpoint / a_pass:.1%} of a pass")
    out.print(f"together: {(checksums + checkpoint) / a_pass:.1%} of a pass")


if __name__ == "__main__":
    main()
