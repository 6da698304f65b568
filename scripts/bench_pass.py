"""Speed of one gradient pass: log-likelihoods and gradients over all rows at K points, beside torch written by hand.

Figures are ratios of seconds of one run: 1 is as fast as what stands for the best, more is faster. Each process has one
torch thread unless told. Data are float32, in chunks of 8 MiB, the default for data that have a hundred or more.

- memory: a logistic regression, 100 columns, on chunks that are tensors already: a loop in closed form over dadvi.
- shards: the same from uncompressed shards, which the operating system has in its cache, by one process that keeps no
  chunks. It reads while it computes, so the best is the longer of two times: reading and verifying all chunks alone,
  and the loop in closed form on tensors.
- models: as memory, for other likelihoods: a gather from 2 000 and from 100 000 groups (by hand in closed form),
  Student-t with unknown scale and degrees of freedom, and a network of three layers (both by automatic differentiation
  of batched code). See `by_hand.py`.
- workers: seconds on one worker process over those on two, which keep all chunks; K = 32.
- threads: by two worker processes that keep all chunks, Dask included, against the loop in closed form on two torch
  threads over the same chunks as tensors, each cut into blocks that fit the processor's cache.
"""

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from by_hand import ByHand, Groups, Logistic, Network, Student
from turns import Row, Seconds, Way, medians, parser, ratio, take_turns, tell

import dadvi
from dadvi.binding import bind_to
from dadvi.clients import start_local
from dadvi.executors import DaskExecutor, SerialExecutor
from dadvi.likelihood import BoundModel
from dadvi.memory import Need
from dadvi.passes import Gradient, GradientSums, single_thread
from dadvi.stopwatch import Stopwatch
from dadvi.types import Batch

CHUNK_BYTES = 2**23
"""Told, since fewer rows would have smaller chunks, and a quick run another proportion of what every chunk costs."""

BLOCK_ROWS = 2_048
"""Rows whose 100 float32 fit the second-level cache of a core."""

KEEP = Need(budget=2**33)


def write(path: Path, case: ByHand, rows: int) -> dadvi.ShardedDataset:
    return dadvi.write_shards(path, case.fields(np.random.default_rng(0), rows), chunk_bytes=CHUNK_BYTES)


def read(data: dadvi.ShardedDataset) -> list[Batch]:
    """Return all chunks as tensors in memory of their own."""
    return [
        {name: values.clone() for name, values in data.read(chunk).items()} for chunk in range(data.manifest.num_chunks)
    ]


def points(case: ByHand, num_draws: int) -> np.ndarray:
    """Return η (K, D)."""
    return 0.1 * np.random.default_rng(num_draws).standard_normal((num_draws, case.model().dim))


def by_hand(case: ByHand, eta: np.ndarray, batches: Sequence[Batch]) -> GradientSums:
    with torch.no_grad(), single_thread():
        return case.sums(eta, batches)


def resident(eta: np.ndarray, model: BoundModel, batches: Sequence[Batch]) -> GradientSums:
    """Return the sums of dadvi's pass over tensors."""
    with single_thread():
        total = Gradient(eta).over(model, Stopwatch())
        for batch in batches:
            total.add(batch)
        return total.sums()


def in_memory(what: str, case: ByHand, rows: int, draws: Sequence[int], turns: int, aim: float) -> Iterator[Row]:
    """Yield dadvi beside the loop by hand, both on tensors."""
    with tempfile.TemporaryDirectory() as directory:
        data = write(Path(directory) / "data.zarr", case, rows)
        batches, bound = read(data), bind_to(case.model(), data)
    for num_draws in draws:
        eta = points(case, num_draws)
        ways: dict[str, Way] = {
            "by hand": partial(by_hand, case, eta, batches),
            "dadvi": partial(resident, eta, bound, batches),
        }
        seconds = take_turns(ways, turns)
        beside = f"{medians(seconds)}; {rows:,} rows, strategy {bound.strategy}"
        yield Row(f"{what}, K = {num_draws}", ratio(*seconds.values()), "by hand / dadvi", aim, None, beside)


def memory_part(quick: bool) -> Iterator[Row]:
    """Yield dadvi beside closed form, on tensors."""
    yield from in_memory("logistic", Logistic(), *sized(quick, 1_000_000), aim=0.8)


def models_part(quick: bool) -> Iterator[Row]:
    """Yield the same for other likelihoods."""
    cases = {
        "gather, 2 000 groups": Groups(2_000),
        "gather, 100 000 groups": Groups(100_000),
        "Student-t": Student(),
        "network": Network(),
    }
    for name, case in cases.items():
        rows, _, turns = sized(quick, 500_000)
        yield from in_memory(name, case, rows, (1, 8), turns, aim=0.7)


def shards_part(quick: bool) -> Iterator[Row]:
    """Yield a pass from shards beside the slower of reading and computing."""
    case = Logistic()
    rows, draws, turns = sized(quick, 1_000_000)
    with tempfile.TemporaryDirectory() as directory:
        data = write(Path(directory) / "data.zarr", case, rows)
        bound, batches = bind_to(case.model(), data), read(data)
        executor = SerialExecutor(bound, data, Need(budget=0))
        for num_draws in draws:
            eta = points(case, num_draws)
            ways: dict[str, Way] = {
                "computing": partial(by_hand, case, eta, batches),
                "dadvi": partial(executor.run, Gradient(eta)),
                "reading": partial(only_read, by_hand(case, eta, batches), data),
            }
            seconds = take_turns(ways, turns)
            best = [max(both) for both in zip(seconds["reading"], seconds["computing"], strict=True)]
            figure = ratio(best, seconds["dadvi"])
            yield Row(f"from shards, K = {num_draws}", figure, "limit / dadvi", 0.7, None, medians(seconds))


def only_read(known: GradientSums, data: dadvi.ShardedDataset) -> GradientSums:
    """Read and verify all chunks; the sums are returned for the sake of the form."""
    for chunk in range(data.manifest.num_chunks):
        data.read(chunk)
    return known


def workers_part(quick: bool) -> Iterator[Row]:
    """Yield what two workers gain over one."""
    case, num_draws, rows, turns = Logistic(), 32, 500_000 if quick else 4_000_000, 3 if quick else 7
    with tempfile.TemporaryDirectory() as directory:
        data = write(Path(directory) / "data.zarr", case, rows)
        work, seconds = Gradient(points(case, num_draws)), {}
        one, two = start_local(1), start_local(2)
        with one[1], one[0], two[1], two[0]:
            bound = bind_to(case.model(), data)
            executors = {
                f"{number} workers": DaskExecutor(bound, data, client, need=KEEP)
                for number, client in ((1, one[0]), (2, two[0]))
            }
            seconds = take_turns({name: partial(each.run, work) for name, each in executors.items()}, turns)
            for executor in executors.values():
                executor.close()
    yield Row("two workers, K = 32", ratio(*seconds.values()), "one / two", 1.8, None, medians(seconds))


def threads_part(quick: bool) -> Iterator[Row]:
    """Yield two workers beside two threads."""
    case, rows, turns = Logistic(), 200_000 if quick else 2_000_000, 3 if quick else 9
    with tempfile.TemporaryDirectory() as directory:
        data = write(Path(directory) / "data.zarr", case, rows)
        bound, blocks = bind_to(case.model(), data), list(cut(read(data)))
        client, cluster = start_local(2)
        with cluster, client, DaskExecutor(bound, data, client, need=KEEP) as executor:
            for num_draws in (1, 8):
                eta = points(case, num_draws)
                ways: dict[str, Way] = {
                    "two threads": partial(on_two_threads, case, eta, blocks),
                    "dadvi": partial(executor.run, Gradient(eta)),
                }
                seconds: Seconds = take_turns(ways, turns)
                figure = ratio(*seconds.values())
                yield Row(f"two workers, K = {num_draws}", figure, "two threads / dadvi", 0.6, None, medians(seconds))


def cut(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Yield chunks in blocks of rows."""
    for batch in batches:
        parts = {name: values.split(BLOCK_ROWS) for name, values in batch.items()}
        yield from (dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True))


def on_two_threads(case: ByHand, eta: np.ndarray, blocks: Sequence[Batch]) -> GradientSums:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            return case.sums(eta, blocks)
    finally:
        torch.set_num_threads(threads)


def sized(quick: bool, rows: int) -> tuple[int, tuple[int, ...], int]:
    """Return rows, numbers of draws, and turns."""
    return (rows // 10, (1, 8, 32), 5) if quick else (rows, (1, 8, 32), 9)


PARTS = {
    "memory": memory_part,
    "shards": shards_part,
    "models": models_part,
    "workers": workers_part,
    "threads": threads_part,
}


def main() -> None:
    options = parser(__doc__, PARTS).parse_args()
    rows = [row for name in options.parts or PARTS for row in PARTS[name](options.quick)]
    tell("one gradient pass", rows, options.json)


if __name__ == "__main__":
    main()
