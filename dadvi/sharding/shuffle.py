"""Rows of unknown number spooled through the disk, in order or globally shuffled, in bounded memory.

The shuffle gives row i the i-th 64-bit number u_i of one random stream; the permutation is the stable argsort of u. It
therefore depends on the seed and on the order of arrival only, not on how rows come in blocks, nor on the memory at
hand.

It is for rows that come in one stream, as those of arrays do, and what fits in memory stays there. Tasks that read a
table side by side cannot draw from one stream: they have a shuffle of their own, through files (`dadvi.sharding.runs`).

Out of core this is one distribution sort (Knuth, TAOCP vol. 3, 5.2.5): rows go to 256 buckets by the first byte of
their key; each bucket is then sorted by itself, after being distributed again by the next byte if it is too large for
memory.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from math import ceil
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dadvi.errors import DataError
from dadvi.types import Purpose, random_stream

Block: TypeAlias = Mapping[str, NDArray[Any]]
"""Some consecutive rows: arrays by field name with equal first axes."""

MEMORY_BYTES = 256 * 2**20
KEY = "key"
KEY_BITS = 64
BUCKET_BITS = 8


class RowSpool:
    """Rows go in by `append`, and come out by `blocks`: in order of arrival, or in a random order.

    Use as a context manager: what lies on the disk is removed at its end. Data that fit in a sixth of the
    memory never touch the disk.

    Parameters
    ----------
    seed
        Seed of the shuffle; None keeps the order of arrival.
    memory_bytes
        Bound on the bytes held at once.
    directory
        Where to spool; by default the system's directory for temporary files.
    """

    def __init__(
        self, seed: int | None = None, *, memory_bytes: int = MEMORY_BYTES, directory: Path | None = None
    ) -> None:
        self.num_rows = 0
        self._stream = None if seed is None else random_stream(seed, Purpose.SHUFFLE).bit_generator
        # At worst four pieces are alive at once: arrivals or a bucket, then packed, then sorted, and one consumed.
        # The rest is room for what has gone out of use and is not yet freed.
        self._piece_bytes = max(memory_bytes // 6, 1)
        self._parent = directory
        self._directory: Path | None = None
        self._dtype: np.dtype[np.void] | None = None
        self._names: tuple[str, ...] = ()
        self._pending: list[NDArray[np.void]] = []
        self._pending_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pending = []
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def append(self, block: Block) -> None:
        """Take the rows of a block, which must have the fields, dtypes and row shapes of the first block.

        Raises
        ------
        DataError
            When the disk cannot take the rows.
        """
        if self._dtype is None:
            self._names = tuple(block)
            self._dtype = _record_dtype(block, keyed=self._stream is not None)
        length = len(block[self._names[0]])
        step = self._piece_rows(self._dtype)
        for start in range(0, length, step):
            self._append_records(self._pack(block, start, min(start + step, length), self._dtype))
        self.num_rows += length

    def blocks(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield all rows once, in blocks of a size of the spool's own choosing. Call after the last `append`, once."""
        if self._directory is None:
            pending, self._pending = self._pending, []
            if pending:
                yield from self._sorted(np.concatenate(pending))
            return
        self._flush(self._directory)
        for path in sorted(self._directory.iterdir()):
            yield from self._read(path, BUCKET_BITS)

    def _piece_rows(self, dtype: np.dtype[np.void]) -> int:
        return max(1, self._piece_bytes // max(dtype.itemsize, 1))

    def _pack(self, block: Block, start: int, stop: int, dtype: np.dtype[np.void]) -> NDArray[np.void]:
        records = np.empty(stop - start, dtype=dtype)
        for position, name in enumerate(self._names):
            records[f"f{position}"] = block[name][start:stop]
        if self._stream is not None:
            records[KEY] = self._stream.random_raw(stop - start)
        return records

    def _append_records(self, records: NDArray[np.void]) -> None:
        if self._pending and self._pending_bytes + records.nbytes > self._piece_bytes:
            if self._directory is None:
                self._directory = Path(tempfile.mkdtemp(prefix=".dadvi-spool-", dir=self._parent))
            self._flush(self._directory)
        self._pending.append(records)
        self._pending_bytes += records.nbytes

    def _flush(self, directory: Path) -> None:
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        self._distribute(np.concatenate(pending), directory, consumed=0)

    def _distribute(self, records: NDArray[np.void], directory: Path, consumed: int) -> None:
        """Append records to the bucket files of a directory by the key bits that follow the first `consumed`."""
        try:
            if self._stream is None:
                _append_to(directory / "000", records)
                return
            bucket = _bits(records[KEY], consumed)
            # Stable, so that rows with equal keys stay in order of arrival.
            records = records[np.argsort(bucket, kind="stable")]
            sizes = np.bincount(bucket)
            for number, stop in enumerate(np.cumsum(sizes)):
                if sizes[number]:
                    _append_to(directory / f"{number:03d}", records[stop - sizes[number] : stop])
        except OSError as error:
            raise DataError(
                f"cannot spool rows to {directory}: {error}; free some room there, or write to another disk"
            ) from error

    def _read(self, path: Path, consumed: int) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield the rows of a bucket whose keys agree in the first `consumed` bits, and remove its file."""
        dtype = self._dtype
        if dtype is None:
            return
        fits = path.stat().st_size <= self._piece_bytes
        # Rows whose keys agree in every bit are in their final order already.
        if self._stream is None or (consumed == KEY_BITS and not fits):
            for records in _pieces(path, dtype, self._piece_rows(dtype)):
                yield self._unpack(records)
        elif fits:
            yield from self._sorted(np.fromfile(path, dtype=dtype))
        else:
            nested = path.with_name(f"{path.name}.split")
            nested.mkdir()
            for records in _pieces(path, dtype, self._piece_rows(dtype)):
                self._distribute(records, nested, consumed)
            path.unlink()
            for bucket in sorted(nested.iterdir()):
                yield from self._read(bucket, consumed + BUCKET_BITS)
            nested.rmdir()
            return
        path.unlink()

    def _sorted(self, records: NDArray[np.void]) -> Iterator[dict[str, NDArray[Any]]]:
        if self._stream is not None:
            order = np.argsort(records[KEY], kind="stable")
            yield {name: records[f"f{position}"][order] for position, name in enumerate(self._names)}
        else:
            yield self._unpack(records)

    def _unpack(self, records: NDArray[np.void]) -> dict[str, NDArray[Any]]:
        return {name: np.ascontiguousarray(records[f"f{position}"]) for position, name in enumerate(self._names)}


def _record_dtype(block: Block, *, keyed: bool) -> np.dtype[np.void]:
    """Return the dtype of one row: its key, then its fields, named by position lest one be called KEY."""
    entries: list[Any] = [(KEY, np.uint64)] if keyed else []
    entries += [(f"f{position}", array.dtype, array.shape[1:]) for position, array in enumerate(block.values())]
    return np.dtype(entries)


def _bits(keys: NDArray[np.uint64], consumed: int) -> NDArray[np.uint8]:
    """Return, per key, the BUCKET_BITS bits that follow the first `consumed` ones."""
    return (keys >> np.uint64(KEY_BITS - BUCKET_BITS - consumed)).astype(np.uint8)


def _append_to(path: Path, records: NDArray[np.void]) -> None:
    # Opened anew each time: 256 buckets must not need 256 file descriptors.
    with path.open("ab") as file:
        file.write(records.view(np.uint8).data)


def _pieces(path: Path, dtype: np.dtype[np.void], rows: int) -> Iterator[NDArray[np.void]]:
    """Yield the records of a file, `rows` at a time."""
    total = path.stat().st_size // dtype.itemsize
    with path.open("rb") as file:
        for _ in range(ceil(total / rows)):
            yield np.fromfile(file, dtype=dtype, count=rows)
