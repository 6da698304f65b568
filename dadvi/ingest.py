"""The front door of ingest: chooses who reads the table and writes the shards, this process or a Dask cluster.

The work itself is `dadvi.sharding.ingest`. Files are what tasks share: the coordinator gets from each unit of the table
a message of fixed size and the categories it has, and from each shard nothing.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from distributed import Client, Future, KilledWorker

from dadvi.clients import (
    SCHEDULER_LOST,
    WAIT_SECONDS,
    ClientLike,
    check_workers,
    find_workers,
    gather,
    in_this_process,
    losing_scheduler,
)
from dadvi.errors import DataError, InputError, WorkError
from dadvi.executors import IN_PROCESS_BYTES, as_it_is
from dadvi.memory import keep_freed_memory
from dadvi.sharding.fieldspec import FieldSpecs
from dadvi.sharding.ingest import Here, Missing, Request, Tasks
from dadvi.sharding.ingest import ingest as ingest_table
from dadvi.sharding.layout import Layout
from dadvi.sharding.location import Location, Options, is_shareable, protocols, resolve
from dadvi.sharding.reader import ShardedDataset
from dadvi.sharding.shuffle import MEMORY_BYTES
from dadvi.sharding.tables import Sources, Table, open_table

Item = TypeVar("Item")
Result = TypeVar("Result")

POLL_SECONDS = 0.05
"""How often to look whether tasks of a failed ingest have ended."""

AGAIN = "ingest again"
"""What to do after the cluster has failed an ingest."""


def ingest(
    sources: Sources,
    out: Location,
    fields: FieldSpecs | None = None,
    *,
    client: ClientLike = None,
    num_workers: int | None = None,
    shuffle: int | None = 0,
    missing: Missing = "refuse",
    chunk_rows: int | None = None,
    shard_rows: int | None = None,
    chunk_bytes: int | None = None,
    shard_bytes: int | None = None,
    compression: str | None = None,
    memory_bytes: int = MEMORY_BYTES,
    overwrite: bool = False,
    storage_options: Options = None,
) -> ShardedDataset:
    """Stream Parquet, CSV or Arrow files into a data set, and open it.

    The data set has the same bits whoever does the work. It depends on the rows and on where files and row groups end.

    Parameters
    ----------
    sources
        Files of one format, directories of them, patterns or URLs; their rows follow each other in this order.
    out
        Where to write: a path, a URL that fsspec understands, or a Zarr store.
    fields
        Fields wanted, as texts `NAME[=COLUMN,...][:MODIFIER...]` (in one text separated by white space) or `FieldSpec`.
        Several columns are stacked into rows of shape (p,), in their common dtype. Modifiers are a dtype; `category`,
        for integer codes in the sorted order of the values, which the manifest keeps; `standardize`, for mean 0 and sd
        1 over all rows, both kept in the manifest. For example "late x=hour,distance:standardize:float32
        carrier:category". None takes every column as a field, text as categories.
    client
        A `distributed.Client`, a scheduler's address, ``"serial"`` for this process, or None: this process for files up
        to 256 MiB, otherwise local worker processes. Workers must see the sources, the directory of `out` and, when
        `out` is not a path, this machine's temporary directory.
    num_workers
        With None for `client`: start that many local workers, whatever the size of the files.
    shuffle
        Seed of a global shuffle of the rows; None keeps their order.
    missing
        What to do with rows that have a null or NaN in a column wanted: "refuse" the data, or "drop" the rows. In CSV,
        cells such as NA or an empty one are null.
    chunk_rows, shard_rows, chunk_bytes, shard_bytes
        Sizes, see `Layout`; by default 8 MiB a chunk and 128 MiB a shard, less on small data.
    compression
        "zstd", or None.
    memory_bytes
        Memory of each process for spooling and shuffling; beside it a process holds a few times a shard. The same data
        set comes out whatever it is.
    overwrite
        Replace a Zarr group that is already there.
    storage_options
        What fsspec needs to reach the URL `out`.

    Raises
    ------
    DataError
        When the sources cannot be read, do not have the columns, or hold values that do not go with what is asked; or
        when workers do not see the files. Nothing is left behind.
    ClusterError
        When the cluster cannot be used.
    """
    layout = Layout(chunk_rows, shard_rows, chunk_bytes, shard_bytes)
    request = Request(fields, shuffle, missing, layout, compression, memory_bytes)
    table = open_table(sources)
    shareable = is_shareable(resolve(out, storage_options)) and not _in_memory(table)
    small = table.num_bytes <= IN_PROCESS_BYTES or not shareable
    found, owned = find_workers(client, num_workers, small=small)
    try:
        tasks: Tasks = Here() if found is None else Workers(found, shareable=shareable)
        return ingest_table(table, out, request, tasks, overwrite=overwrite, storage_options=storage_options)
    finally:
        for resource in owned:
            resource.close()


class Workers:
    """Tasks done by the workers of a Dask cluster.

    Parameters
    ----------
    client
        Connected to a scheduler with at least one worker.
    shareable
        Whether sources and output can be opened by another process.
    wait_seconds
        How long to wait for a worker when there is none.
    retries
        How often Dask runs a failed task again. Bad input is not tried again.

    Raises
    ------
    ClusterError
        If a worker lacks torch or dadvi or has other versions, or there is no worker.
    DataError
        If sources or output lie in this process's memory and the workers are other processes.
    """

    def __init__(
        self, client: Client, *, shareable: bool, wait_seconds: float = WAIT_SECONDS, retries: int = 3
    ) -> None:
        self._client, self._wait_seconds, self._retries = client, wait_seconds, retries
        self._address = client.scheduler.address
        check_workers(client, wait_seconds)
        if not shareable and not in_this_process(client):
            raise DataError(
                "the sources or the output lie in the memory of this process, and workers cannot open them; "
                "use paths or URLs that they can, or client='serial' (--serial)"
            )

    def reach(self, table: Table, scratch: Path) -> None:
        """Raise DataError when a worker does not see the first source, if it is a local file, or the directory."""
        local = [str(scratch), *(each.path for each in table.files[:1] if "file" in protocols(each.file_system))]
        for worker, absent in self._client.run(_absent, local).items():
            if absent:
                raise DataError(
                    f"worker {worker} does not see {absent[0]}; put sources and output on a disk that all workers "
                    "share, or do without them: client='serial' (--serial)"
                )

    def map(self, task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield the task's result for each item, in the order of the items, after all of them are done.

        Raises
        ------
        InputError
            That of the first item that had one.
        WorkError
            When workers or the scheduler were lost.
        """
        run = f"dadvi-ingest-{uuid.uuid4().hex[:8]}"
        with losing_scheduler(self._address, AGAIN):
            shared = self._share(task, len(items), f"dadvi-ingest-shared-{run[-8:]}")
            # At once, and named in their order: several graphs may be begun in any.
            keys = [f"{run}-{number:09d}" for number in range(len(items))]
            having = [shared[number % len(shared)] for number in range(len(items))]
            futures = self._client.map(_attempt, having, items, key=keys, retries=self._retries)
            try:
                results = gather(self._client, futures, self._wait_seconds, AGAIN)
            except SCHEDULER_LOST:
                raise
            except BaseException as error:
                self._client.cancel([*futures, *shared])
                self._settle(run)
                if isinstance(error, KilledWorker):
                    raise WorkError(
                        f"ingest was given up: a task ended {error.allowed_failures + 1} workers; "
                        "give them more memory, or make memory_bytes or shards smaller"
                    ) from error
                raise
        for result in results:
            if isinstance(result, InputError):
                raise result
            yield result

    def _share(self, task: Callable[..., object], num_items: int, key: str) -> list[Future]:
        """Return what the tasks of all items depend on, so that it reaches each worker once: in turns if several.

        Of many tasks that depend on one or a few of another group, Dask gives each to a worker that has nothing to do.
        Of fewer, it gives each to a worker that has what it depends on, whatever others do.
        """
        threads = self._client.nthreads()
        many = num_items > 2 * sum(threads.values())
        where = [None] if many or not threads else [[worker] for worker in threads]
        return [
            self._client.submit(
                as_it_is, _Shared(task), key=f"{key}-{number}", workers=workers, allow_other_workers=workers is not None
            )
            for number, workers in enumerate(where)
        ]

    def _settle(self, run: str) -> None:
        """Wait for the tasks that workers are in, which no one can stop, lest they write after all was removed."""
        while any(self._client.run(_executing, run).values()):
            time.sleep(POLL_SECONDS)


class _Shared:
    """A task that travels once to each worker; Dask would call a bare function."""

    def __init__(self, task: Callable[..., object]) -> None:
        keep_freed_memory()
        self.task = task

    def __reduce__(self) -> tuple[type["_Shared"], tuple[Callable[..., object]]]:
        return _Shared, (self.task,)


def _attempt(shared: _Shared, item: object) -> object:
    """Do one task. Bad input comes back as a value: trying it again would not help."""
    try:
        return shared.task(item)
    except InputError as error:
        return error


def _absent(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


def _executing(run: str, dask_worker: object) -> bool:
    state = dask_worker.state  # type: ignore[attr-defined]
    return any(str(each.key).startswith(run) for each in state.executing)


def _in_memory(table: Table) -> bool:
    return any("memory" in protocols(each.file_system) for each in table.files)
