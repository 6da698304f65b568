"""One shard summed: its chunks read, checked and added up in order, on one thread of one worker."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from dadvi.errors import DataError, InputError, ModelError, WorkError
from dadvi.likelihood import BoundModel, concatenated
from dadvi.passes import Pass, single_thread
from dadvi.sharding import Manifest
from dadvi.sharding.cache import ChunkCache
from dadvi.stopwatch import Stopwatch
from dadvi.types import Batch, FloatArray

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

    Chunks with fewer rows than the model has coordinates are taken some at a time: gradients and the like have an
    element for every coordinate, whatever the rows, and should not be made anew for a few of these.

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
    watch = watch or Stopwatch()
    at_once = chunks_at_once(model, chunks.data.manifest)
    groups = [members[first : first + at_once] for first in range(0, len(members), at_once)]
    batches = chunks.stream(members, model.fields)
    with single_thread():
        with _told_where(work, chunks.data.manifest, members):
            total = work.over(model, watch)
        for group in groups:
            with _told_where(work, chunks.data.manifest, group) as read:
                for chunk in group:
                    read.append(next(batches))
                    watch.lap("read")
                    if check:
                        model.check_rows(read[-1], chunks.data.manifest.rows(chunk)[0])
                        watch.lap("check")
                total.add(read[0] if len(read) == 1 else concatenated(read))
        with _told_where(work, chunks.data.manifest, members):
            return total.sums()


def chunks_at_once(model: BoundModel, manifest: Manifest) -> int:
    """Return how many chunks are summed together."""
    return max(1, model.model.dim // manifest.chunk_rows)


@contextmanager
def _told_where(work: Pass[Sums], manifest: Manifest, members: Sequence[int]) -> Iterator[list[Batch]]:
    """Give a list for the batches of some chunks, and tell with every error where it came up."""
    read: list[Batch] = []
    shard, last = manifest.shard(members[0]), members[-1]
    try:
        yield read
    except InputError as error:
        where = f"shard {shard}, chunk {members[max(0, len(read) - 1)]}"
        raise type(error)(str(error) if f"shard {shard}, chunk" in str(error) else f"{error} ({where})") from error
    except OSError as error:  # may pass: the executor retries it
        where = f"shard {shard}, chunk {members[min(len(read), len(members) - 1)]}"
        raise OSError(f"{where} could not be read: {type(error).__name__}: {error}") from error
    except Exception as error:
        what = f"chunk {last}" if len(members) == 1 else f"chunks {members[0]} to {last}"
        where = f"shard {shard}, {what} (rows {manifest.rows(members[0])[0]} to {manifest.rows(last)[1] - 1})"
        if not isinstance(error, IndexError):
            # What the likelihood raises on these rows it will raise again; memory, or a store, may come back.
            kind = WorkError if isinstance(error, WorkError | MemoryError) else ModelError
            raise kind(f"pass {work.name!r} failed on {where}: {type(error).__name__}: {error}") from error
        codes = {
            name: f"{int(values.min())} to {int(values.max())}"
            for name, values in (concatenated(read) if read else {}).items()
            if not (values.is_floating_point() or values.dtype == torch.bool)
        }
        raise DataError(
            f"{error} in {where}: an integer field indexes beyond a latent. Their values there: {codes}; give the "
            "latent an element for every code, or mend the data"
        ) from error
