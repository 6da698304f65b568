"""Who runs a pass: this process, or the workers of a Dask cluster. Both give the same bits.

An executor splits the chunks by shard, has each shard summed by `dadvi.passes.sum_shard`, and reduces the shards in
shard order.
"""

import itertools
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import groupby
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias, TypeVar

import torch
from distributed import CancelledError, Client, Future, KilledWorker, LocalCluster, get_worker
from distributed.comm import CommClosedError, get_address_host_port
from distributed.security import Security

from dadvi.errors import ClusterError, DataError, InputError, WorkError
from dadvi.likelihood import BoundModel
from dadvi.passes import Pass, sum_shard, tree_sum
from dadvi.sharding import ShardedDataset
from dadvi.sharding.cache import CACHE_BYTES, ChunkCache
from dadvi.sharding.placement import place
from dadvi.types import FloatArray

Sums = TypeVar("Sums", bound=tuple[FloatArray, ...])

ShardChunks: TypeAlias = tuple[int, list[int]]
"""A shard and those of its chunks that are wanted, in order."""

ClientLike: TypeAlias = Client | str | None
"""Who works: a client, a scheduler's address or "serial", or None; see `make_executor`."""

PLACEMENT_SECONDS = 2.0
"""How often the executor looks for workers that joined or left."""

IN_PROCESS_BYTES = 256 * 2**20
"""Data up to this size are fitted in the caller's process when no client is given."""


class Executor(Protocol):
    """Runs passes over one data set with one model."""

    model: BoundModel
    data: ShardedDataset
    rows_read: int

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


class _Base:
    """What executors share: the count of rows they had read, and closing."""

    def __init__(self, model: BoundModel, data: ShardedDataset) -> None:
        self.model, self.data = model, data
        self.rows_read = 0

    def _shards(self, chunks: Iterable[int] | None) -> list[ShardChunks]:
        """Return (shard, its chunks in order) in shard order, and count their rows."""
        manifest = self.data.manifest
        ordered = list(range(manifest.num_chunks)) if chunks is None else sorted(int(chunk) for chunk in chunks)
        self.rows_read += int(manifest.chunk_sizes[ordered].sum())
        return [(shard, list(members)) for shard, members in groupby(ordered, key=manifest.shard)]

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

    def __init__(self, model: BoundModel, data: ShardedDataset) -> None:
        super().__init__(model, data)
        self._cache = ChunkCache(data)

    def run(
        self, work: Pass[Sums], chunks: Iterable[int] | None = None, *, check: bool = False, label: str = ""
    ) -> Sums:
        """Return the sums of a pass."""
        try:
            shards = self._shards(chunks)
            return tree_sum([sum_shard(work, self.model, self._cache, members, check=check) for _, members in shards])
        except (InputError, WorkError, OSError) as error:
            raise _labelled(error, label) from error


class DaskExecutor(_Base):
    """Runs passes on a Dask cluster, each shard on the worker that read it before.

    Model and data set reach a worker once, as the result of a task, which the scheduler runs again if it is lost.

    Parameters
    ----------
    client
        Connected to a scheduler with at least one worker.
    owned
        What `close` is to close with the executor: a client and cluster started for it.
    retries
        How often Dask runs a failed task again. Bad input is not tried again.

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
        wait_seconds: float = 30.0,
    ) -> None:
        super().__init__(model, data)
        self.client, self._owned, self._retries = client, owned, retries
        check_workers(client, wait_seconds)
        if not data.shareable and not _in_this_process(client):
            raise DataError(
                f"{data!r} lives in this process and workers cannot open it; write it to a path or URL that they can, "
                f"or pass client='serial'"
            )
        self._run = f"dadvi-{uuid.uuid4().hex[:8]}"
        self._calls = itertools.count()
        self._context: Future = (
            client.submit(_Context, model, data, key=f"{self._run}-context")
            if data.shareable
            else client.scatter(_Context(model, data), hash=False)  # as it is: a task's arguments would be pickled
        )
        self._placement: Mapping[int, str] = {}
        self._placed_at = -PLACEMENT_SECONDS

    def run(
        self, work: Pass[Sums], chunks: Iterable[int] | None = None, *, check: bool = False, label: str = ""
    ) -> Sums:
        """Return the sums of a pass."""
        tasks = self._tasks(self._shards(chunks))
        call = next(self._calls)
        futures = [
            self.client.submit(
                _run_task,
                self._context,
                work,
                task.shards,
                check,
                key=f"{self._run}-{work.name}-{call}-{number}",
                workers=[task.worker],
                allow_other_workers=True,
                retries=self._retries,
            )
            for number, task in enumerate(tasks)
        ]
        try:
            results = self.client.gather(futures)
        except KilledWorker as error:
            raise _labelled(
                WorkError(f"pass {work.name!r} was given up: its task ended {error.allowed_failures + 1} workers"),
                label,
            ) from error
        except (InputError, WorkError, OSError) as error:
            raise _labelled(error, label) from error
        except (CancelledError, CommClosedError) as error:
            lost = WorkError(
                f"the scheduler at {self.client.scheduler.address} was lost ({error}); start it and fit again"
            )
            raise _labelled(lost, label) from error
        refused = next((result for result in results if isinstance(result, InputError)), None)
        if refused is not None:
            raise _labelled(refused, label) from refused
        parts: dict[int, Sums] = {shard: part for result in results for shard, part in result}
        return tree_sum([parts[shard] for shard in sorted(parts)])

    def _tasks(self, shards: list[ShardChunks]) -> list["_Task"]:
        """Return tasks that hold shards where they were read before, each at most one shard's worth of rows.

        A pass over all the data thus has a task for each shard, and a minibatch with a few chunks of many shards one
        for each worker.
        """
        self._update_placement()
        sizes = self.data.manifest.chunk_sizes
        tasks: list[_Task] = []
        filling: dict[str, _Task] = {}  # each worker's latest task
        for shard, members in shards:
            worker, rows = self._placement[shard], int(sizes[members].sum())
            task = filling.get(worker)
            if task is None or task.rows + rows > self.data.manifest.shard_rows:
                task = filling[worker] = _Task(worker)
                tasks.append(task)
            task.shards.append((shard, members))
            task.rows += rows
        return tasks

    def _update_placement(self) -> None:
        """Follow workers that joined or left; where a task runs does not change its bits."""
        now = time.monotonic()
        if now < self._placed_at + PLACEMENT_SECONDS:
            return
        # Not client.scheduler_info: what it returns is refreshed meanwhile, and for a moment names no workers.
        identity = self.client.sync(self.client.scheduler.identity, n_workers=-1)
        workers = sorted(identity["workers"])
        if not self._placement or (workers and set(self._placement.values()) != set(workers)):
            self._placement = place(range(self.data.manifest.num_shards), workers, self._placement)
        self._placed_at = now

    def close(self) -> None:
        """Release the context and close what was started for this executor."""
        self._context.release()
        for resource in self._owned:
            resource.close()


@dataclass
class _Task:
    """Shards that go to a worker together."""

    worker: str
    shards: list[ShardChunks] = field(default_factory=list)
    rows: int = 0


class _Context:
    """What every task of an executor shares on a worker."""

    def __init__(self, model: BoundModel, data: ShardedDataset) -> None:
        self.model, self.data = model, data
        self.cache = ChunkCache(data, min(CACHE_BYTES, _worker_memory() // 4))

    def __reduce__(self) -> tuple[type["_Context"], tuple[BoundModel, ShardedDataset]]:
        return _Context, (self.model, self.data)  # the next worker fills a cache of its own


def _run_task(
    context: _Context, work: Pass[Sums], shards: Sequence[ShardChunks], check: bool
) -> list[tuple[int, Sums]] | InputError:
    """Sum some shards on a worker, each by itself. Bad input comes back as a value: trying it again would not help."""
    try:
        return [
            (shard, sum_shard(work, context.model, context.cache, members, check=check)) for shard, members in shards
        ]
    except InputError as error:
        return error


def _worker_memory() -> int:
    """Return the memory limit of the Dask worker that runs this, in bytes; without one, the largest integer."""
    try:
        limit = get_worker().memory_manager.memory_limit
    except ValueError:  # not on a worker
        limit = None
    return int(limit or sys.maxsize)


def _labelled(error: Exception, label: str) -> Exception:
    return type(error)(f"{label}: {error}" if label else str(error))


def _in_this_process(client: Client) -> bool:
    cluster = client.cluster
    return isinstance(cluster, LocalCluster) and not cluster.processes


def connect(address: str, timeout: float = 10.0) -> Client:
    """Return a client of the scheduler at `address`.

    Raises
    ------
    ClusterError
        If no scheduler answers there within `timeout` seconds.

    """
    try:
        # Before there is a client: one that never connected takes 20 s to end, and prints a traceback as it does.
        if not address.startswith(("inproc://", "ucx://")):
            get_address_host_port(address)
    except ValueError as error:
        raise ClusterError(
            f"scheduler address {address!r} cannot be used ({error}); give it as tcp://HOST:PORT"
        ) from error
    if address.startswith("tls://"):
        _check_certificate(address)
    try:
        return Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {address!r} within {timeout:g} s ({type(error).__name__}: {error}); "
            f"start one with `dask scheduler`, or leave the scheduler out to start local workers"
        ) from error


def _check_certificate(address: str) -> None:
    """Refuse to go to a tls address without what Dask's settings must bring: again before there is a client."""
    try:
        context = Security().get_connection_args("client")["ssl_context"]
        reason = "they name none" if context is None else ""
    except OSError as error:  # of the files, or of what is in them
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise ClusterError(
            f"the scheduler at {address!r} needs a certificate, and Dask's settings have none to show ({reason}); set "
            "distributed.comm.tls.ca-file, .client.cert and .client.key"
        )


def start_local(num_workers: int | None = None) -> tuple[Client, LocalCluster]:
    """Start single-threaded worker processes on this machine (default: one per core) and return a client of them."""
    cluster = LocalCluster(
        n_workers=num_workers,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # any free port: None asks for 8787, and warns if taken
    )
    return Client(cluster, set_as_default=False), cluster


def make_executor(
    model: BoundModel, data: ShardedDataset, client: ClientLike = None, num_workers: int | None = None
) -> SerialExecutor | DaskExecutor:
    """Return who runs the passes.

    Parameters
    ----------
    client
        A client, a scheduler's address, ``"serial"`` for this process, or None: this process for data up to 256 MiB,
        otherwise local worker processes.
    num_workers
        With None for `client`: start that many local workers, whatever the size of the data.

    """
    if num_workers is not None and (client is not None or num_workers < 1):
        what = f"client={client!r} brings its own workers" if client is not None else "at least 1 is needed"
        raise InputError(f"num_workers={num_workers}: {what}; leave it out, or give a number of local workers alone")
    if client == "serial":
        return SerialExecutor(model, data)
    if isinstance(client, Client):
        return DaskExecutor(model, data, client)
    if client is not None:
        connected = connect(client)
        return _closing_on_error(model, data, connected, [connected])
    if num_workers is None and (data.manifest.num_bytes <= IN_PROCESS_BYTES or not data.shareable):
        return SerialExecutor(model, data)
    started, cluster = start_local(num_workers)
    return _closing_on_error(model, data, started, [started, cluster])


def _closing_on_error(model: BoundModel, data: ShardedDataset, client: Client, owned: Sequence[Any]) -> DaskExecutor:
    try:
        return DaskExecutor(model, data, client, owned)
    except BaseException:
        for resource in owned:
            resource.close()
        raise


def versions() -> dict[str, str]:
    """Return the versions that coordinator and workers must share."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "dadvi": metadata.version("dadvi"),
        "torch": torch.__version__.partition("+")[0],
    }


def check_workers(client: Client, wait_seconds: float) -> None:
    """Refuse a cluster without workers, or with a worker that lacks torch or dadvi or has another version.

    Raises
    ------
    ClusterError
        With the worker's address, what it has, and what is needed.

    """

    def installed() -> dict[str, str | None]:
        # Defined here so that it travels by value: a worker without dadvi can still answer.
        import sys
        from importlib import metadata

        found: dict[str, str | None] = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
        for package in ("dadvi", "torch"):
            try:
                found[package] = metadata.version(package).partition("+")[0]
            except metadata.PackageNotFoundError:
                found[package] = None
        return found

    try:
        client.wait_for_workers(1, timeout=wait_seconds)
    except TimeoutError as error:
        raise ClusterError(
            f"the scheduler at {client.scheduler.address} has no workers after {wait_seconds:g} s; start one with "
            "`dask worker`"
        ) from error
    needed = versions()
    for worker, found in client.run(installed).items():
        for package, version in needed.items():
            if found[package] != version:
                seen = f"has {package} {found[package]}" if found[package] else f"has no {package}"
                raise ClusterError(
                    f"worker {worker} {seen}; the coordinator has {version}. Install the same version on every worker"
                )
