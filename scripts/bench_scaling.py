"""How the time of a pass grows with the rows and the workers, and what a stochastic step costs beyond its arithmetic.

- rows: seconds of a gradient pass on ten times the rows over those on once the rows, in chunks and shards of the same
  size, K = 8: by one process that keeps no chunks, and by two worker processes that keep all of them. Ten is linear;
  less says that a part of a pass does not grow.
- workers: shards whose work is simulated: each sleeps for a second and returns sums of the size that a gradient's have
  (K = 8, D = 100). Two shards a worker, so that an ideal pass takes two seconds on any number of workers, and eight;
  the figures are what it takes beyond, and the processor's time of coordinator and scheduler, which are this process,
  as shares of those seconds. Workers are threads of another process, so that all of them share one interpreter: as
  many machines take less beyond.
- steps: a gradient of 16 random chunks of 200 rows and 5 columns at K = 8, as a stochastic step has it, one after the
  other. The figure is the step's seconds minus those in which the busiest worker computed. With worker processes also
  the processor's time of this process, which holds client and scheduler: other work on the machine adds less to it.
"""

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from distributed import Client, LocalCluster, Worker
from simulated import SHARD_SECONDS, Simulated
from torch.distributions import Bernoulli, Normal
from turns import Row, medians, parser, ratio, tell, timed

import dadvi
from dadvi.binding import bind_to
from dadvi.clients import start_local
from dadvi.executors import DaskExecutor, Executor, SerialExecutor
from dadvi.likelihood import BoundModel
from dadvi.memory import Need
from dadvi.passes import Gradient, GradientSums

DRAWS = 8
STEP_CHUNKS = 16
WORKERS = ((1, 2), (4, 2), (16, 2), (64, 2), (64, 8))
QUICK_WORKERS = ((1, 2), (64, 2))
"""Workers, and shards of each."""


def write(path: Path, rows: int, columns: int, chunk_rows: int, shard_chunks: int) -> dadvi.ShardedDataset:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns), dtype=np.float32)
    y = rng.random(rows, dtype=np.float32) < 0.5
    return dadvi.write_shards(path, {"x": x, "y": y}, chunk_rows=chunk_rows, shard_rows=shard_chunks * chunk_rows)


def bound_to(data: dadvi.ShardedDataset) -> BoundModel:
    """Return a logistic regression on the data."""
    prior = {"beta": Normal(torch.zeros(data.manifest.fields["x"].shape[0]), 1.0)}
    return bind_to(dadvi.Model(prior, lambda beta, x: Bernoulli(logits=x @ beta), "y"), data)


def gradient(seed: int, dim: int) -> Gradient:
    return Gradient(0.1 * np.random.default_rng(seed).standard_normal((DRAWS, dim)))


async def _serve(address: str, number: int) -> None:
    async with AsyncExitStack() as stack:
        workers = [Worker(address, nthreads=1, name=str(each), memory_limit=0) for each in range(number)]
        for worker in workers:
            await stack.enter_async_context(worker)
        await asyncio.gather(*(worker.finished() for worker in workers))


def serve(address: str, number: int) -> None:
    """Be so many single-threaded workers."""
    asyncio.run(_serve(address, number))


@contextmanager
def workers_elsewhere(number: int) -> Iterator[Client]:
    """Give a client of single-threaded workers that are all in one other process."""
    with (
        LocalCluster(n_workers=0, processes=True, dashboard_address=None) as cluster,
        Client(cluster, direct_to_workers=True) as client,
    ):
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(cluster.scheduler_address, number))
        process.start()
        try:
            client.wait_for_workers(number, timeout=120)
            yield client
        finally:
            client.shutdown()
            process.join()


@contextmanager
def workers(number: int, *, processes: bool) -> Iterator[Client]:
    """Give a client of single-threaded local workers."""
    with ExitStack() as stack:
        if processes:
            client, cluster = start_local(number)
            stack.enter_context(cluster)
        else:
            cluster = stack.enter_context(
                LocalCluster(
                    n_workers=number,
                    threads_per_worker=1,
                    processes=False,
                    memory_limit=0,
                    dashboard_address=None,
                    scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
                )
            )
            client = Client(cluster, set_as_default=False)
        yield stack.enter_context(client)


# Rows -----------------------------------------------------------------------------------------------------------------


def rows_part(quick: bool, directory: Path) -> Iterator[Row]:
    """Yield what ten times the rows take."""
    columns, few, turns = 100, 50_000 if quick else 200_000, 3 if quick else 9
    data = {rows: write(directory / f"{rows}.zarr", rows, columns, 5_000, 5) for rows in (few, 10 * few)}
    work = gradient(0, columns)
    with workers(2, processes=True) as client:
        makers: dict[str, Callable[[dadvi.ShardedDataset], Executor]] = {
            "one process, reading": lambda data: SerialExecutor(bound_to(data), data, Need(budget=0)),
            "two workers, keeping": lambda data: DaskExecutor(bound_to(data), data, client),
        }
        for name, make in makers.items():
            executors = {rows: make(each) for rows, each in data.items()}
            seconds: dict[str, list[float]] = {f"{rows:,} rows": [] for rows in data}
            for executor in executors.values():
                executor.run(work)
            for _ in range(turns):
                for rows, executor in executors.items():
                    seconds[f"{rows:,} rows"].append(timed(partial(executor.run, work)))
            small, large = seconds.values()
            yield Row(f"10 times the rows, {name}", ratio(large, small), "times", None, 11, medians(seconds))
            for executor in executors.values():
                executor.close()


# Workers --------------------------------------------------------------------------------------------------------------


def workers_part(quick: bool, directory: Path) -> Iterator[Row]:
    """Yield what a pass takes beyond the work of its shards."""
    turns = 3 if quick else 9
    for number, of_each in QUICK_WORKERS if quick else WORKERS:
        shards, ideal = of_each * number, of_each * SHARD_SECONDS
        data = write(directory / f"{number}-{of_each}.zarr", 10 * shards, 100, 10, 1)
        with workers_elsewhere(number) as client, DaskExecutor(bound_to(data), data, client) as executor:
            work = Simulated(gradient(0, 100).points)
            expected = executor.run(work).log_lik[0]
            if expected != shards:
                raise SystemExit(f"a pass over {shards} shards counted {expected:g}; a time for it means nothing")
            seconds, processor = [], []
            for _ in range(turns):
                before = time.process_time()
                seconds.append(timed(partial(executor.run, work)))
                processor.append(time.process_time() - before)
            before = time.process_time()
            time.sleep(ideal)
            idle = time.process_time() - before
        middle, who = statistics.median(seconds), f"{number} simulated workers, {of_each} shards each"
        yield Row(f"{who}, beyond", 100 * (middle / ideal - 1), "%", None, None, f"{middle:.3f} s for {shards} shards")
        share, without = 100 * statistics.median(processor) / ideal, f"{100 * idle / ideal:.1f} % where nothing runs"
        yield Row(f"{who}, coordinator and scheduler", share, "%", None, 5, without)


# Steps ----------------------------------------------------------------------------------------------------------------


def steps_part(quick: bool, directory: Path) -> Iterator[Row]:
    """Yield what a stochastic step takes beyond the work of the busiest worker."""
    turns = 100 if quick else 1_000
    for number, processes in ((2, True), (64, False)):
        data = write(directory / f"steps-{number}.zarr", 200 * 128, 5, 200, 1 if number == 64 else 16)
        bound = bound_to(data)
        rng = np.random.default_rng(0)
        with workers(number, processes=processes) as client, DaskExecutor(bound, data, client) as executor:
            serial = SerialExecutor(bound, data)
            measured: dict[str, list[float]] = {}
            for turn in range(-20, turns):  # some to warm up
                chunks = rng.choice(data.manifest.num_chunks, STEP_CHUNKS, replace=False)
                work = gradient(turn + 20, 5)
                figures, sums = one_step(executor, work, chunks)
                if turn < 0:
                    if not np.array_equal(sums.grad, serial.run(work, chunks).grad):
                        raise SystemExit("a step has not the bits of one process; a time for it means nothing")
                    continue
                for name, value in figures.items():
                    measured.setdefault(name, []).append(1e3 * value)
        overhead = measured.pop("overhead")
        middle = {name: statistics.median(values) for name, values in measured.items()}
        if not processes:
            del middle["processor"]
        beside = ", ".join(f"{name} {value:.1f}" for name, value in middle.items())
        kind = "worker processes" if processes else "workers in this process"
        least = f"least {min(overhead):.1f}, tenth {np.quantile(overhead, 0.1):.1f}; medians: {beside}"
        yield Row(f"a step on {number} {kind}", statistics.median(overhead), "ms", None, 3, least)


def one_step(executor: DaskExecutor, work: Gradient, chunks: np.ndarray) -> tuple[dict[str, float], GradientSums]:
    """Run a step and return the seconds it took beyond its work, those of its work, and the processor's."""
    before, processor, start = executor.profile, time.process_time(), time.perf_counter()
    sums = executor.run(work, chunks)
    elapsed, processor = time.perf_counter() - start, time.process_time() - processor
    overhead = executor.profile.transfer - before.transfer + executor.profile.reduce - before.reduce
    return {"overhead": overhead, "computing": elapsed - overhead, "processor": processor}, sums


PARTS = {"rows": rows_part, "workers": workers_part, "steps": steps_part}


def main() -> None:
    options = parser(__doc__, PARTS).parse_args()
    rows: list[Row] = []
    for name in options.parts or PARTS:
        with tempfile.TemporaryDirectory() as directory:
            rows += PARTS[name](options.quick, Path(directory))
    tell("scaling", rows, options.json)


if __name__ == "__main__":
    main()
