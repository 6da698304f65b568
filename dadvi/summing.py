"""One shard summed: its chunks read, checked and added up in order, on one thread of one worker."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from torch import Tensor

from dadvi.batching import is_integer
from dadvi.errors import DataError, InputError, ModelError, WorkError
from dadvi.likelihood import BoundModel, concatenated
from dadvi.passes import Pass, Summation, single_thread
from dadvi.sharding import Manifest
from dadvi.sharding.cache import ChunkCache
from dadvi.stopwatch import Stopwatch
from dadvi.types import Batch, FloatArray

ROWS_AT_ONCE, BYTES_AT_ONCE = 8_000, 2**23
"""Small chunks are summed together up to so many rows, or so many bytes of rows and of what one draw makes of them:
beyond, what each call of the likelihood costs by itself no longer matters."""

Sums = TypeVar("Sums", bound=tuple[FloatArray, ...])


def sum_shard(
    work: Pass[Sums],
    model: BoundModel,
    chunks: ChunkCache,
    members: Sequence[int],
    *,
    check: bool = False,
    watch: Stopwatch | None = None,
) -> Sums:
    """Sum a pass over chunks of one shard, in the order of `members`.

    Small chunks are taken some at a time, as `chunks_at_once` has it.

    Parameters
    ----------
    chunks
        Where chunks are read.
    members
        Which chunks, at least one, all of one shard.
    check
        Check the rows as they are read: set when they are read for the first time.
    watch
        Counts the seconds by phase.

    Raises
    ------
    DataError
        If a row is refused, or a chunk cannot be read; with shard and chunk.
    ModelError
        If the likelihood fails on some rows; with shard and chunk.
    WorkError
        If memory runs out, or a store cannot be read at the moment; with shard and chunk.

    """
    watch, manifest = watch or Stopwatch(), chunks.data.manifest
    at_once = chunks_at_once(model, manifest)
    batches = chunks.stream(members, model.fields)
    with single_thread():
        with _told_where(work, manifest, members):
            total = work.over(model, watch)
        for first in range(0, len(members), at_once):
            group, read = members[first : first + at_once], []
            for chunk in group:
                with _told_where(work, manifest, [chunk]):
                    read.append(next(batches))
                    watch.lap("read", decode=chunks.data.decoding)
                if check:
                    with _told_where(work, manifest, [chunk], read[-1]):
                        model.check_rows(read[-1], manifest.rows(chunk)[0], finite=manifest.finite)
                        watch.lap("check")
            _add(total, work, model, manifest, group, read)
        with _told_where(work, manifest, members):
            return total.sums()


def _add(
    total: Summation[Sums],
    work: Pass[Sums],
    model: BoundModel,
    manifest: Manifest,
    group: Sequence[int],
    read: Sequence[Batch],
) -> None:
    """Add the rows of some chunks; if that fails, take the chunks one by one to tell which of them it was."""
    try:
        total.add(read[0] if len(read) == 1 else concatenated(read))
    except Exception:
        for chunk, batch in zip(group, read, strict=True) if len(read) > 1 else ():
            with _told_where(work, manifest, [chunk], batch):
                work.on_chunk(model, batch)
        with _told_where(work, manifest, group, read[0]):
            raise


def chunks_at_once(model: BoundModel, manifest: Manifest) -> int:
    """Return how many chunks are summed together.

    A call of the likelihood takes its time whatever the rows, so small chunks go together. So do chunks with fewer rows
    than the model has coordinates: gradients and the like have an element for every one, and should not be made anew
    for a few rows.
    """
    rows = min(ROWS_AT_ONCE, int(BYTES_AT_ONCE / (row_bytes(model, manifest) + model.saved_bytes)))
    return max(1, max(rows, model.model.dim) // manifest.chunk_rows)


def row_bytes(model: BoundModel, manifest: Manifest) -> int:
    """Return the bytes of a row as tensors: integers become int64."""
    fields = [manifest.fields[name] for name in model.fields]
    dtypes = [np.dtype(field.dtype) for field in fields]
    sizes = [8 if dtype.kind in "iu" else dtype.itemsize for dtype in dtypes]
    return sum(size * math.prod(field.shape) for size, field in zip(sizes, fields, strict=True))


@contextmanager
def _told_where(
    work: Pass[Sums], manifest: Manifest, members: Sequence[int], batch: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Tell with every error in which chunks it came up."""
    first, last = members[0], members[-1]
    where = f"shard {manifest.shard(first)}, " + (f"chunk {first}" if first == last else f"chunks {first} to {last}")
    try:
        yield
    except InputError as error:
        told = f"shard {manifest.shard(first)}, chunk" in str(error)
        raise type(error)(str(error) if told else f"{error} ({where})") from error
    except OSError as error:  # may pass: the executor retries it
        raise OSError(f"{where} could not be read: {type(error).__name__}: {error}") from error
    except Exception as error:
        where += f" (rows {manifest.rows(first)[0]} to {manifest.rows(last)[1] - 1})"
        if not isinstance(error, IndexError):
            # What the likelihood raises on these rows it will raise again; memory, or a store, may come back.
            kind = WorkError if isinstance(error, WorkError | MemoryError) else ModelError
            raise kind(f"pass {work.name!r} failed on {where}: {type(error).__name__}: {error}") from error
        codes = {
            name: f"{int(values.min())} to {int(values.max())}"
            for name, values in (batch or {}).items()
            if is_integer(values)
        }
        raise DataError(
            f"{error} in {where}: an integer field indexes beyond a latent. Their values there: {codes}; give the "
            "latent an element for every code, or mend the data"
        ) from error
