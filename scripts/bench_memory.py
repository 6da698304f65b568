"""A fit to data many times larger than its workers may hold: passes, rate, and the peak memory of every process.

Two worker processes with a budget each fit a logistic regression with 100 predictors to rows that were written to disk
one piece at a time. The peak of a process is what it holds by itself (RssAnon of /proc, watched every 50 ms). Mapped
files are not in it: their pages belong to the operating system, which takes them back when it needs them.

usage: python scripts/bench_memory.py [--quick] [--rows N] [--budget BYTES] [--directory PATH] [--json PATH]
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import dask.array as da
import numpy as np
import torch
from dask.utils import format_bytes, parse_bytes
from rich.console import Console
from torch.distributions import Bernoulli, Normal

import dadvi
from dadvi.executors import start_local

COLUMNS, PIECE_ROWS = 100, 250_000
IMPORTS = 350 * 2**20
"""Bytes of a process that has imported torch, Dask and dadvi: allowed on top of the budget."""


def make_data(rows: int, location: Path) -> dadvi.ShardedDataset:
    """Write rows that are made a piece at a time, each from its own stream."""
    slopes = (np.random.default_rng(0).standard_normal(COLUMNS) / COLUMNS**0.5).astype(np.float32)

    def piece(block_info: dict) -> np.ndarray:
        (start, stop), _ = block_info[None]["array-location"]
        rng = np.random.default_rng([1, start])
        x = rng.standard_normal((stop - start, COLUMNS + 1), dtype=np.float32)
        x[:, -1] = rng.random(stop - start) < 1 / (1 + np.exp(-x[:, :-1] @ slopes))
        return x

    chunks = (da.core.normalize_chunks(PIECE_ROWS, (rows,))[0], (COLUMNS + 1,))
    table = da.map_blocks(piece, chunks=chunks, dtype="float32", meta=np.empty((0, 0), np.float32))
    return dadvi.write_shards(location, {"x": table[:, :-1], "y": table[:, -1]}, overwrite=True)


class Watch:
    """The largest RssAnon of some processes while it is open."""

    def __init__(self, processes: dict[str, int]) -> None:
        self.processes, self.peaks = processes, dict.fromkeys(processes, 0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            for name, pid in self.processes.items():
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
                self.peaks[name] = max(self.peaks[name], held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 M rows and a budget of 256 MiB")
    parser.add_argument("--rows", type=int, help="default 40 000 000, which take 16 GB")
    parser.add_argument("--budget", help="of a worker; default 1 GiB")
    parser.add_argument(
        "--directory", type=Path, help="where to write the data; default: the system's for temporary files"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too")
    options = parser.parse_args()
    rows = options.rows or (1_000_000 if options.quick else 40_000_000)
    budget = options.budget or ("256 MiB" if options.quick else "1 GiB")

    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(COLUMNS), 1.0)},
        likelihood=lambda beta, x: Bernoulli(logits=x @ beta),
        observed="y",
    )
    console = Console(width=110, highlight=False)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        started = time.perf_counter()
        data = make_data(rows, Path(directory) / "data.zarr")
        console.print(f"{data!r}, written in {time.perf_counter() - started:.0f} s")
        client, cluster = start_local(2)
        with cluster, client:
            processes = {
                f"worker {n}": pid for n, pid in enumerate(client.run(lambda: __import__("os").getpid()).values())
            }
            with Watch(processes) as watch:
                started = time.perf_counter()
                posterior = dadvi.fit(model, data, client=client, memory_budget=budget)
                seconds = time.perf_counter() - started
    last = posterior.trace.iloc[-1]
    figures = {
        "rows": rows,
        "data_bytes": data.manifest.num_bytes,
        "budget": parse_bytes(budget),
        "status": posterior.status,
        "certificate": posterior.certificate.max if posterior.certificate else None,
        "passes": posterior.passes,
        "seconds": seconds,
        "bytes_per_second": posterior.passes * data.manifest.num_bytes / seconds,
        "profile": {name: float(last[name]) for name in ("read", "check", "forward", "backward", "wait", "transfer")},
        "peaks": watch.peaks,
        "within": {name: peak <= parse_bytes(budget) + IMPORTS for name, peak in watch.peaks.items()},
    }
    for name, value in figures.items():
        console.print(f"{name:<18} {format_bytes(value) if 'bytes' in name or name == 'budget' else value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
