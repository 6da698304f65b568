"""Memory of a fit to data that are much larger than it: 40 M x 100 float32, 16 GB on disk, two workers of 1 GiB each.

The data, a logistic regression with correlated predictors (`problems.logistic`), are written shard by shard without
being held, and removed afterwards. `dadvi.fit` then runs to a certificate of 0.1 with `memory_budget` for each of two
worker processes. Figures are the most that each process had at any time, in MiB, against its budget and
350 MiB for Python, torch and Dask:

- anonymous: memory that is the process's own (RssAnon in /proc/PID/status, read 20 times a second);
- resident: the system's own record of the peak (VmHWM), in which pages of mapped data files count too, although the
  system takes them back when it needs them.

With fewer rows the budget and the rows of a chunk are less in proportion.

The coordinator holds the scheduler and the resident subsample; the data are written by another process. Passes, time
per pass and rate of reading are those of the whole fit.
"""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from dask.utils import parse_bytes
from problems import logistic
from turns import Row, parser, tell

import dadvi
from dadvi.clients import start_local

WORKERS, TOL = 2, 0.1
ROWS, CHUNK_ROWS, BUDGET = 40_000_000, 20_000, 2**30
QUICK_ROWS = 1_000_000
OVERHEAD = 350 * 2**20
MIB = 2**20


def status(process: int, name: str) -> int:
    """Return a figure of a process in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def watching(processes: dict[str, int]) -> Iterator[dict[str, int]]:
    """Give the most anonymous memory of each process, kept up to date while the body runs."""
    most = dict.fromkeys(processes, 0)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for name, process in processes.items():
                most[name] = max(most[name], status(process, "RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def write(path: Path, rows: int) -> None:
    drawn = logistic(np.random.default_rng(0), rows)
    dadvi.write_shards(path, drawn.fields, chunk_rows=max(1, CHUNK_ROWS * rows // ROWS))


def fit(path: Path, budget: int) -> list[Row]:
    """Return the figures of a fit."""
    data = dadvi.open_shards(path)
    model = logistic(np.random.default_rng(0), 1).model
    client, cluster = start_local(WORKERS)
    with cluster, client:
        processes = {f"worker {number}": pid for number, pid in enumerate(client.run(os.getpid).values())}
        processes["coordinator"] = os.getpid()
        before = {
            kind: {name: status(process, kind) for name, process in processes.items()} for kind in ("RssAnon", "VmHWM")
        }
        with watching(processes) as most:
            start = time.perf_counter()
            posterior = dadvi.fit(model, data, client=client, memory_budget=budget, tol=TOL, seed=0, progress=False)
            seconds = time.perf_counter() - start
        peaks = {name: status(process, "VmHWM") for name, process in processes.items()}
    size = data.manifest.row_bytes * data.num_rows
    limit = (budget + OVERHEAD) / MIB
    rows = [
        Row(f"{name}, {what}", peak / MIB, "MiB", None, limit, f"{before[kind][name] / MIB:.0f} before the fit")
        for what, kind, by_process in (("anonymous", "RssAnon", most), ("resident", "VmHWM", peaks))
        for name, peak in by_process.items()
    ]
    said = f"{posterior.status}, {size / 1e9:.2f} GB"
    return [
        *rows,
        Row("certificate", posterior.certificate.max, "sd", None, TOL, said),
        Row("passes", posterior.passes, ""),
        Row("time per pass", seconds / posterior.passes, "s", beside=f"{seconds:.1f} s in all"),
        Row("rows read", size * posterior.passes / seconds / 1e6, "MB/s"),
    ]


def main() -> None:
    made = parser(__doc__, {"memory": fit})
    made.add_argument("--rows", type=int, help=f"default: {ROWS:,}, or {QUICK_ROWS:,} if quick")
    made.add_argument("--budget", help="bytes for a worker, such as '1 GiB'; default: that, times rows / 40 M")
    made.add_argument("--directory", type=Path, help="where the data are written, in a directory that is removed again")
    options = made.parse_args()
    rows = options.rows or (QUICK_ROWS if options.quick else ROWS)
    budget = parse_bytes(options.budget) if options.budget else BUDGET * rows // ROWS
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        path = Path(directory) / "data.zarr"
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(write, path, rows).result()
        figures = fit(path, budget)
    tell(f"memory of a fit: {rows:,} rows of 100 float32, {budget / MIB:.0f} MiB a worker", figures, options.json)


if __name__ == "__main__":
    main()
