"""Who runs a pass: this process, or the workers of a Dask cluster. Both give the same bits.

An executor splits the chunks by shard, has each shard summed by `dadvi.summing.sum_shard`, and reduces the shards in
shard order.
"""

import asyncio
import itertools
import math
import sys
import time
import uuid
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeAlias, TypeVar

import dask
import numpy as np
from distributed import Actor, Client, Future, KilledWorker, get_worker
from distributed.system import MEMORY_LIMIT

from dadvi.clients import (
    WAIT_SECONDS,
    ClientLike,
    check_workers,
    find_workers,
    gather,
    in_this_process,
    losing_scheduler,
    workers_of,
)
from dadvi.errors import DataError, InputError, WorkError
from dadvi.likelihood import BoundModel
from dadvi.memory import Need, keep_freed_memory
from dadvi.passes import Pass, tree_sum
from dadvi.sharding import Manifest, ShardedDataset
from dadvi.sharding.cache import ChunkCache
from dadvi.sharding.placement import place
from dadvi.stopwatch import Phase, Profile, Stopwatch
from dadvi.summing import sum_shard
from dadvi.types import FloatArray, IntArray

Sums = TypeVar("Sums", bound=tuple[FloatArray, ...])
T = TypeVar("T")

ShardChunks: TypeAlias = tuple[int, list[int]]
"""A shard and those of its chunks that are wanted, in order."""

AGAIN = "resume the run or fit again"
"""What to do after the cluster has failed a fit."""

PLACEMENT_SECONDS = 2.0
"""How often the executor looks for workers that joined or left."""

LARGE_SUMS = 2**20
"""Numbers that shards may send to the coordinator for one pass: beyond, workers add up eight shards' at a time."""

LARGE_PASS = 2**13
"""Numbers of a pass's sums, and about as many of its arguments, which travel with every task: those of larger passes
travel once, to workers, and between them."""

FEW_ROWS = 2**17
"""Rows up to which a pass is a matter of milliseconds, as a stochastic step is: actors sum it, not tasks."""

LOST_SECONDS = 0.2
"""How often it is seen to whether an actor that has not answered is still there."""

TASK_SECONDS = 4.0
"""Work of a task, where it is known how fast passes go and threads are left no less busy: tasks take the scheduler
somewhat less than a millisecond each."""

TOGETHER = 8
"""Shards added up by one task: a power of two, so that the order is that of `tree_sum`."""

IN_PROCESS_BYTES = 256 * 2**20
"""Data up to this size are fitted in the caller's process when no client is given."""


class Executor(Protocol):
    """Runs passes over one data set with one model."""

    model: BoundModel
    data: ShardedDataset
    rows_read: int
    profile: Profile

    def run(
        self, work: Pass[Sums], chunks: Iterable[int] | None = None, *, check: bool = False, label: str = ""
    ) -> Sums:
        """Return the sums of a pass over the chunks (default: all), in chunk order within shard order.

        Parameters
        ----------
        check
            Check rows as they are read.
        label
            What the pass is for, such as "step 12"; errors name it.

        """
        ...

    def close(self) -> None:
        """Give back what the executor holds."""
        ...


def _by_shard(manifest: Manifest, chunks: Iterable[int]) -> list[ShardChunks]:
    """Return chunks, in order, by shard."""
    return [(shard, list(members)) for shard, members in groupby(chunks, key=manifest.shard)]


class _Base:
    """What executors share: the count of rows they had read, where the time went, and closing."""

    def __init__(self, model: BoundModel, data: ShardedDataset) -> None:
        self.model, self.data = model, data
        self.rows_read = 0
        self.profile = Profile()

    def _shards(self, chunks: Iterable[int] | None) -> list[ShardChunks]:
        """Return (shard, its chunks in order) in shard order, and count their rows."""
        manifest = self.data.manifest
        ordered = list(range(manifest.num_chunks)) if chunks is None else sorted(int(chunk) for chunk in chunks)
        self.rows_read += int(manifest.chunk_sizes[ordered].sum())
        return _by_shard(manifest, ordered)

    def close(self) -> None:
        """Nothing to give back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SerialExecutor(_Base):
    """Runs passes in this process, one shard after the other: the reference for every other executor."""

    def __init__(self, model: BoundModel, data: ShardedDataset, need: Need | None = None) -> None:
        super().__init__(model, data)
        self._cache = ChunkCache(data, (need or Need()).room(MEMORY_LIMIT))

    def run(
        self, work: Pass[Sums], chunks: Iterable[int] | None = None, *, check: bool = False, label: str = ""
    ) -> Sums:
        """Return the sums of a pass."""
        watch = Stopwatch()
        try:
            parts = [
                sum_shard(work, self.model, self._cache, members, check=check, watch=watch)
                for _, members in self._shards(chunks)
            ]
        except (InputError, WorkError, OSError) as error:
            raise _labelled(error, label) from error
        started = time.perf_counter()
        total = tree_sum(parts)
        reduce = time.perf_counter() - started
        self.profile += Profile.of({"": watch.seconds}, sum(watch.seconds.values()), reduce)
        return total


class DaskExecutor(_Base):
    """Runs passes on a Dask cluster, each shard on the worker that read it before.

    Model and data set reach a worker once, as the result of a task, which the scheduler runs again if it is lost. Each
    worker has a key of its own for them, and so keeps them, with the chunks that it has read: of copies under one key
    Dask drops all but one after a while. A pass over few rows is summed by an actor on each worker, and by tasks where
    there is none or it failed.

    Parameters
    ----------
    client
        Connected to a scheduler with at least one worker.
    owned
        What `close` is to close with the executor: a client and cluster started for it.
    retries
        How often Dask runs a failed task again. Bad input is not tried again.
    need
        Memory of a worker.
    wait_seconds
        How long a pass waits for a worker when there is none.

    Raises
    ------
    ClusterError
        If a worker lacks torch or dadvi or has other versions, or there is no worker.
    DataError
        If the data live in this process only and the workers are other processes.

    """

    def __init__(
        self,
        model: BoundModel,
        data: ShardedDataset,
        client: Client,
        owned: Sequence[Any] = (),
        retries: int = 3,
        wait_seconds: float = WAIT_SECONDS,
        need: Need | None = None,
    ) -> None:
        super().__init__(model, data)
        self.client, self._owned, self._retries, self._wait_seconds = client, owned, retries, wait_seconds
        self._address = client.scheduler.address  # which a client that has closed does not know any more
        check_workers(client, wait_seconds)
        if not data.shareable and not in_this_process(client):
            raise DataError(
                f"{data!r} lives in this process and workers cannot open it; write it to a path or URL that they can, "
                f"or pass client='serial'"
            )
        self._run = f"dadvi-{uuid.uuid4().hex[:8]}"
        self._calls = itertools.count()
        if data.shareable:
            with _large_on_purpose():
                arguments = (model, data, need or Need())
                self._context: Future = client.submit(_Context, *arguments, key=f"{self._run}-context")
        else:  # as it is: a task's arguments would be pickled
            self._context = client.scatter(_Context(model, data, need or Need()), hash=False)
        self._contexts: dict[str, Future] = {}  # by worker
        self._summers = _Summers(client, f"{self._run}-summer")
        self._pace: dict[str, float] = {}  # rows that a thread sums in a second, by the last pass of each name
        self._placement: Mapping[int, str] = {}
        self._threads: Mapping[str, int] = {}  # of each worker
        self._placed_at = -math.inf

    def run(
        self, work: Pass[Sums], chunks: Iterable[int] | None = None, *, check: bool = False, label: str = ""
    ) -> Sums:
        """Return the sums of a pass."""
        started, rows_before = time.perf_counter(), self.rows_read
        try:
            with losing_scheduler(self._address, AGAIN):
                results = self._results(work, self._shards(chunks), check)
        except KilledWorker as error:
            raise _labelled(
                WorkError(
                    f"pass {work.name!r} was given up: its task ended {error.allowed_failures + 1} workers; see their "
                    f"logs, then {AGAIN}"
                ),
                label,
            ) from error
        except (InputError, WorkError, OSError) as error:
            raise _labelled(error, label) from error
        arrived = time.perf_counter()
        refused = next((result for result in results if isinstance(result, InputError)), None)
        if refused is not None:
            raise _labelled(refused, label) from refused
        parts: dict[int, Sums] = {shard: part for result in results for shard, part in result.parts}
        total = tree_sum([parts[shard] for shard in sorted(parts)])
        seconds = _by_worker([each for result in results for each in result.seconds])
        busy = sum(sum(phases.values()) for phases in seconds.values())
        self._pace[work.name] = (self.rows_read - rows_before) / busy
        self.profile += Profile.of(seconds, arrived - started, time.perf_counter() - arrived)
        return total

    def _results(self, work: Pass[Sums], shards: list[ShardChunks], check: bool) -> list[Any]:
        """Return results, each of some shards: by actors if it is a matter of milliseconds, else by tasks.

        A pass goes by tasks in any case when it was time to look for workers: a scheduler that has had no tasks for
        long may close itself. Longer passes let the actors go, as Dask retires no worker that has one.
        """
        placed_at = self._placed_at
        size = work.size(self.model.model.dim)
        tasks, results = self._tasks(work, shards), []
        if sum(task.rows for task in tasks) > FEW_ROWS or size > LARGE_PASS:
            self._summers.leave_all_but(())
        elif self._placed_at == placed_at:
            answers = self._summers.ask(work, tasks, check, self._contexts)
            results = [answer for answer in answers if answer is not None]
            tasks = [task for task, answer in zip(tasks, answers, strict=True) if answer is None]
        if tasks:
            results += gather(self.client, self._submit(work, tasks, check), self._wait_seconds, AGAIN)
        return results

    def _submit(self, work: Pass[Sums], tasks: list["_Task"], check: bool) -> list[Future]:
        """Return futures of results, each of some shards: of all of them together if their sums are large."""
        key = f"{self._run}-{work.name}-{next(self._calls)}"
        size = work.size(self.model.model.dim)
        what: Any = work
        if size > LARGE_PASS and len(tasks) > 1:
            with _large_on_purpose():
                what = self.client.submit(as_it_is, work, key=f"{key}-pass")
        where = {f"{key}-{number}": [task.worker] for number, task in enumerate(tasks)}
        with dask.annotate(workers=where.__getitem__, allow_other_workers=True, retries=self._retries):
            # What all share is in lists too: given by name it would get a key of that name if it is large.
            futures: list[Future] = self.client.map(
                _run_task,
                [self._contexts[task.worker] for task in tasks],
                [what] * len(tasks),
                [np.array(task.chunks) for task in tasks],  # Dask would look through lists
                [check] * len(tasks),
                key=list(where),
            )
        if len(tasks) * size > LARGE_SUMS and all(task.num_shards == 1 for task in tasks):
            return self._added_up(futures, key)
        return futures

    def _added_up(self, futures: list[Future], key: str) -> list[Future]:
        """Return the future of the sum of eight shards each, eight times eight, and so on to one: by workers."""
        level = 0
        while len(futures) > 1:
            level += 1
            groups = [futures[first : first + TOGETHER] for first in range(0, len(futures), TOGETHER)]
            futures = [
                self.client.submit(_add_up, *group, key=f"{key}-level-{level}-{number}", retries=self._retries)
                for number, group in enumerate(groups)
            ]
        return futures

    def _tasks(self, work: Pass[Sums], shards: list[ShardChunks]) -> list["_Task"]:
        """Return tasks that hold shards where they were read before.

        A task has at most one shard's worth of rows, so that a pass over all the data has a task for each shard, and a
        minibatch with a few chunks of many shards one for each worker. Once it is known how fast such passes go it has
        `TASK_SECONDS` of them, but leaves something to do for every thread of its worker. Sums that are large stay
        apart, as workers add them up.
        """
        self._update_placement()
        sizes, shard_rows = self.data.manifest.chunk_sizes, self.data.manifest.shard_rows
        rows = {shard: int(sizes[members].sum()) for shard, members in shards}
        of_worker: Counter[str] = Counter()
        for shard, number in rows.items():
            of_worker[self._placement[shard]] += number
        large = len(shards) * work.size(self.model.model.dim) > LARGE_SUMS
        known = 0 if large else math.ceil(TASK_SECONDS * self._pace.get(work.name, 0.0) / shard_rows)  # shards
        tasks: list[_Task] = []
        filling: dict[str, _Task] = {}  # each worker's latest task
        for shard, members in shards:
            worker = self._placement[shard]
            of_thread = math.ceil(of_worker[worker] / shard_rows / self._threads[worker])
            task = filling.get(worker)
            if task is None or task.rows + rows[shard] > max(1, min(known, of_thread)) * shard_rows:
                task = filling[worker] = _Task(worker)
                tasks.append(task)
            task.chunks += members
            task.rows += rows[shard]
            task.num_shards += 1
        return tasks

    def _update_placement(self) -> None:
        """Follow workers that joined or left; where a task runs does not change its bits."""
        now = time.monotonic()
        if now < self._placed_at + PLACEMENT_SECONDS:
            return
        workers = workers_of(self.client)
        if not self._placement or (workers and set(self._placement.values()) != set(workers)):
            self._placement = place(range(self.data.manifest.num_shards), list(workers), self._placement)
            self._threads = workers
            self._contexts = {
                worker: self._contexts.get(worker) or self._context_on(worker)
                for worker in sorted(set(self._placement.values()))
            }
            self._summers.leave_all_but(self._contexts)
        self._placed_at = now

    def _context_on(self, worker: str) -> Future:
        return self.client.submit(
            as_it_is, self._context, key=f"{self._run}-context-{worker}", workers=[worker], allow_other_workers=True
        )

    def close(self) -> None:
        """Release the context and close what was started for this executor."""
        self._summers.leave_all_but(())
        for context in (self._context, *self._contexts.values()):
            context.release()
        for resource in self._owned:
            resource.close()


@dataclass
class _Task:
    """Chunks that go to a worker together."""

    worker: str
    chunks: list[int] = field(default_factory=list)
    rows: int = 0
    num_shards: int = 0


class _Context:
    """What every task of an executor shares on a worker."""

    def __init__(self, model: BoundModel, data: ShardedDataset, need: Need) -> None:
        keep_freed_memory()
        self.model, self.data, self.need = model, data, need
        self.cache = ChunkCache(data, need.room(_worker_memory()))

    def __reduce__(self) -> tuple[type["_Context"], tuple[BoundModel, ShardedDataset, Need]]:
        return _Context, (self.model, self.data, self.need)  # the next worker fills a cache of its own


class _Result(NamedTuple, Generic[Sums]):
    """What a task returns."""

    parts: list[tuple[int, Sums]]  # the sums of each shard
    seconds: list[tuple[str, dict[Phase, float]]]  # of each worker that had a part in it, by phase


def _run_task(context: _Context, work: Pass[Sums], chunks: IntArray, check: bool) -> _Result[Sums] | InputError:
    """Sum some chunks on a worker, those of each shard by themselves.

    Bad input comes back as a value: trying it again would not help.
    """
    watch = Stopwatch()
    try:
        parts = [
            (shard, sum_shard(work, context.model, context.cache, members, check=check, watch=watch))
            for shard, members in _by_shard(context.data.manifest, chunks.tolist())
        ]
    except InputError as error:
        return error
    return _Result(parts, [(get_worker().address, watch.seconds)])


class _Summer:
    """What sums on the worker where it lives."""

    def __init__(self, context: _Context) -> None:
        self._context = context

    def sum(self, work: Pass[Sums], chunks: IntArray, check: bool) -> _Result[Sums] | InputError:
        """Sum some chunks, as a task does."""
        return _run_task(self._context, work, chunks, check)


class _Summers:
    """Actors that sum, one on each worker: Dask calls them without the books that a scheduler keeps about tasks.

    A round of calls takes some 3 ms, a round of tasks 10 or more. But an actor is lost with its worker, and what fails
    in it nobody tries again: that is left to tasks.
    """

    def __init__(self, client: Client, key: str) -> None:
        self._client, self._key, self._numbers = client, key, itertools.count()
        self._futures: dict[str, Future] = {}  # by worker, of the actors
        self._actors: dict[str, Actor] = {}

    def ask(self, work: Pass[Sums], tasks: Sequence["_Task"], check: bool, contexts: Mapping[str, Future]) -> list[Any]:
        """Return the results of tasks, None for those that no actor did: it failed, was lost, or has yet to come."""
        for worker in {task.worker for task in tasks} - self._futures.keys():
            self._futures[worker] = self._client.submit(
                _Summer, contexts[worker], key=f"{self._key}-{next(self._numbers)}", workers=[worker], actor=True
            )

        async def ask_all() -> list[Any]:
            return await asyncio.gather(*(self._ask(work, task, check) for task in tasks))

        with self._client.as_current():  # which actors look for
            return list(self._client.sync(ask_all))

    async def _ask(self, work: Pass[Sums], task: "_Task", check: bool) -> Any:
        future = self._futures[task.worker]
        if not future.done():
            return None
        with suppress(Exception):  # a task that meets the same will tell
            if task.worker not in self._actors:
                self._actors[task.worker] = await future
            call = asyncio.ensure_future(self._actors[task.worker].sum(work, np.array(task.chunks), check))
            call.add_done_callback(_collected)  # also where an interrupt leaves nobody to wait for it
            while future.status == "finished":
                done, _ = await asyncio.wait([call], timeout=LOST_SECONDS)
                if done:
                    return call.result()
            call.cancel()  # lost with its worker: it may never answer
        return None

    def leave_all_but(self, workers: Container[str]) -> None:
        """Have no actors on other workers any more."""
        left = [worker for worker in self._futures if worker not in workers]
        if left and self._client.status == "running":
            # An actor that was called holds itself until it is collected; to release its future would not end it.
            self._client.cancel([self._futures[worker] for worker in left])
        for worker in left:
            del self._futures[worker]
            self._actors.pop(worker, None)


def _collected(call: asyncio.Future[Any]) -> None:
    """Look at how a call ended: asyncio prints an error that nobody has looked at."""
    if not call.cancelled():
        call.exception()


def as_it_is(value: T) -> T:
    """Return a value: as the result of a task it reaches each worker once, and is made again where it is lost."""
    return value


def _add_up(*results: _Result[Sums] | InputError) -> _Result[Sums] | InputError:
    """Return the sum of some results that follow one another, each of one part, or the first refusal among them."""
    found: list[_Result[Sums]] = []
    for result in results:
        if isinstance(result, InputError):
            return result
        found.append(result)
    first = found[0].parts[0][0]
    seconds = [each for result in found for each in result.seconds]
    return _Result([(first, tree_sum([result.parts[0][1] for result in found]))], seconds)


def _by_worker(seconds: Iterable[tuple[str, dict[Phase, float]]]) -> dict[str, dict[Phase, float]]:
    """Return the seconds of each worker by phase, over all its tasks."""
    totals: dict[str, dict[Phase, float]] = {}
    for worker, phases in seconds:
        total = totals.setdefault(worker, {})
        for phase, value in phases.items():
            total[phase] = total.get(phase, 0.0) + value
    return totals


def _worker_memory() -> int:
    """Return the memory limit of the Dask worker that runs this, in bytes; without one, the machine's memory."""
    try:
        limit = get_worker().memory_manager.memory_limit
    except ValueError:  # not on a worker
        limit = None
    return int(limit or MEMORY_LIMIT)


def _large_on_purpose() -> AbstractContextManager[Any]:
    """Keep Dask from warning of large arguments: what is sent once to all workers may be large."""
    setting: AbstractContextManager[Any] = dask.config.set(
        {"distributed.admin.large-graph-warning-threshold": sys.maxsize}
    )
    return setting


def _labelled(error: Exception, label: str) -> Exception:
    return type(error)(f"{label}: {error}" if label else str(error))


def make_executor(
    model: BoundModel,
    data: ShardedDataset,
    client: ClientLike = None,
    num_workers: int | None = None,
    need: Need | None = None,
) -> SerialExecutor | DaskExecutor:
    """Return who runs the passes.

    Parameters
    ----------
    client
        A client, a scheduler's address, ``"serial"`` for this process, or None: this process for data up to 256 MiB,
        otherwise local worker processes.
    num_workers
        With None for `client`: start that many local workers, whatever the size of the data.
    need
        Memory of a worker.

    """
    small = data.manifest.num_bytes <= IN_PROCESS_BYTES or not data.shareable
    found, owned = find_workers(client, num_workers, small=small)
    if found is None:
        return SerialExecutor(model, data, need)
    try:
        return DaskExecutor(model, data, found, owned, need=need)
    except BaseException:
        for resource in owned:
            resource.close()
        raise
