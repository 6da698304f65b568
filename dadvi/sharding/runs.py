"""The global shuffle of a table that many tasks read and many tasks write: a merge sort through files.

Row j of unit u gets the j-th 64-bit number of the random stream of (seed, u), counting the rows that are kept. The
order of the data set is by that key, and by arrival where keys are equal: it depends on the seed, the units and their
rows only, not on which task did what, nor on the memory at hand.

A task that reads a unit writes *runs*: files of rows, each field by itself, in the order of the buckets of their keys,
the multiples of 2^64 / BUCKETS that these have passed (a distribution sort: Knuth, TAOCP vol. 3, 5.2.5). A run begins
with the places where its buckets start; their sum over all runs tells in which buckets the rows of a shard lie, so that
a task that writes a shard reads these rows, of each run one stretch, sorts them by their keys, and reads no others but
for a bucket at either end. Without a seed rows have no keys and runs keep the order of arrival.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from dadvi.errors import DataError
from dadvi.sharding.shuffle import Block
from dadvi.types import IntArray, Purpose, random_stream

BUCKETS = 4096
KEY_BITS = 64
BUCKET_SHIFT = np.uint64(KEY_BITS - 12)
PIECE_BYTES = 4 * 2**20
OFFSET = np.dtype(np.int64)
KEY = np.dtype(np.uint64)


class RunWriter:
    """Takes the rows of one unit by `append` and writes them as runs.

    Parameters
    ----------
    directory
        Where to write.
    unit
        The number of the unit.
    seed
        Seed of the shuffle; None keeps the order of arrival.
    dtypes
        Dtype of one row by field name.
    run_bytes
        Bytes of a run at most, unless a single block has more.
    """

    def __init__(
        self, directory: Path, unit: int, seed: int | None, dtypes: Mapping[str, np.dtype[Any]], run_bytes: int
    ) -> None:
        self.counts = np.zeros(1 if seed is None else BUCKETS, dtype=np.int64)
        """Rows written, by bucket of their keys."""
        self._directory, self._unit, self._dtypes, self._run_bytes = directory, unit, dtypes, run_bytes
        self._stream = None if seed is None else random_stream(seed, Purpose.SHUFFLE, unit).bit_generator
        self._pending: list[Block] = []
        self._pending_bytes = 0
        self._written = 0

    def append(self, block: Block) -> None:
        """Take some rows. Raises DataError when the disk cannot take them."""
        size = sum(values.nbytes for values in block.values())
        if self._pending and self._pending_bytes + size > self._run_bytes:
            self.flush()
        self._pending.append(block)
        self._pending_bytes += size

    def flush(self) -> None:
        """Write the rows taken so far as a run. Raises DataError when the disk cannot take them."""
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        rows = sum(len(next(iter(block.values()))) for block in pending)
        if not rows:
            return
        counts, keys, order = np.array([rows]), None, None
        if self._stream is not None:
            keys = self._stream.random_raw(rows)
            buckets = (keys >> BUCKET_SHIFT).astype(np.uint16)
            order = np.argsort(buckets, kind="stable")  # of two bytes, a radix sort
            keys = keys[order]
            counts = np.bincount(buckets, minlength=BUCKETS)
        path = self._directory / f"{self._unit:08d}-{self._written:06d}.run"
        # Under a name of its own until complete: a task that is run again, or twice, leaves the same run.
        attempt = path.with_suffix(f".{uuid4().hex}")
        try:
            with attempt.open("wb") as file:
                file.write(np.concatenate([[0], np.cumsum(counts)]).astype(OFFSET).data)
                if keys is not None:
                    file.write(keys.data)
                for name in self._dtypes:
                    values = np.concatenate([block[name] for block in pending])
                    for piece in [values] if order is None else _ordered(values, order):
                        file.write(piece.data)
            attempt.replace(path)
        except OSError as error:
            raise DataError(
                f"cannot spool rows to {self._directory}: {error}; free some room there, or write to another disk"
            ) from error
        self.counts += counts
        self._written += 1


@dataclass(frozen=True, slots=True)
class Stretch:
    """The rows of a data set that a shard holds, and where the runs have them."""

    start: int
    """First row of the data set ..."""
    stop: int
    """... and the row after the last."""
    first: int
    """First bucket with rows of the stretch ..."""
    last: int
    """... and the last."""
    skip: int
    """Rows of the buckets that come before the stretch."""


def stretches(counts: IntArray, shard_rows: int) -> list[Stretch]:
    """Return the stretches of all shards, given the rows of each bucket (BUCKETS,), or of all runs (1,)."""
    offsets = np.concatenate([[0], np.cumsum(counts)])
    found = []
    for start in range(0, int(offsets[-1]), shard_rows):
        stop = min(start + shard_rows, int(offsets[-1]))
        first = int(np.searchsorted(offsets, start, side="right")) - 1
        last = int(np.searchsorted(offsets, stop, side="left")) - 1
        found.append(Stretch(start, stop, first, last, start - int(offsets[first])))
    return found


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one run."""

    path: Path
    unit: int
    header: int
    """Bytes before the first field's rows, or the keys."""
    rows: int
    """Rows of the whole run."""
    start: int
    stop: int

    def read(self, before: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the piece's rows of the array that comes after `before` bytes a row."""
        base = dtype.subdtype[0] if dtype.subdtype else dtype
        shape = dtype.shape
        values = np.fromfile(
            self.path,
            dtype=base,
            count=(self.stop - self.start) * (dtype.itemsize // base.itemsize),
            offset=self.header + before * self.rows + self.start * dtype.itemsize,
        )
        return values.reshape(-1, *shape)


class RunReader:
    """Reads one stretch of the order from all runs of a directory.

    Parameters
    ----------
    directory
        Where the runs are.
    stretch
        The rows wanted.
    dtypes
        Dtype of one row by field name, as the runs were written.
    shuffled
        Whether rows have keys.

    Raises
    ------
    OSError
        When runs are missing, as on a disk that this process does not see as the writers do.
    """

    def __init__(
        self, directory: Path, stretch: Stretch, dtypes: Mapping[str, np.dtype[Any]], *, shuffled: bool
    ) -> None:
        self._dtypes, self._shuffled = dtypes, shuffled
        paths = sorted(directory.glob("*.run"))
        self._pieces = list(_in_buckets(paths, stretch) if shuffled else _in_order(paths, stretch))
        rows = stretch.stop - stretch.start
        if shuffled and self._pieces:
            keys = np.concatenate([piece.read(0, KEY) for piece in self._pieces])
            self._order = stable_argsort(keys)[stretch.skip : stretch.skip + rows]
            found = len(self._order)
        else:
            self._order = np.empty(0, dtype=np.int64)
            found = sum(piece.stop - piece.start for piece in self._pieces)
        if found != rows:
            raise FileNotFoundError(f"{directory} has {found} of the {rows} rows {stretch.start} to {stretch.stop - 1}")

    def read(self, name: str, codes: Mapping[int, NDArray[Any]] | None = None) -> NDArray[Any]:
        """Return the rows of one field in order, (rows, *row shape), each unit's taken through its codes if given."""
        before = KEY.itemsize if self._shuffled else 0
        for other, dtype in self._dtypes.items():
            if other == name:
                break
            before += dtype.itemsize
        parts = [piece.read(before, self._dtypes[name]) for piece in self._pieces]
        if codes is not None:
            parts = [codes[piece.unit][part] for piece, part in zip(self._pieces, parts, strict=True)]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts)
        # "clip" spares a look whether any index is out of bounds, as none is.
        return np.take(values, self._order, axis=0, mode="clip") if self._shuffled else values

    def units(self) -> list[int]:
        """Return the units that the rows came from."""
        return sorted({piece.unit for piece in self._pieces})


def stable_argsort(keys: NDArray[np.uint64]) -> IntArray:
    """Return the stable argsort of keys (n,), of which hardly any are equal."""
    order = np.argsort(keys)  # several times faster, and the same where no keys are equal
    ordered = keys[order]
    return np.argsort(keys, kind="stable") if (ordered[1:] == ordered[:-1]).any() else order


def _ordered(values: NDArray[Any], order: IntArray) -> Iterator[NDArray[Any]]:
    """Yield the rows of an array in some order, in pieces. What is yielded is overwritten by the next."""
    step = max(1, PIECE_BYTES * len(values) // max(values.nbytes, 1))
    room = np.empty((min(step, len(order)), *values.shape[1:]), values.dtype)
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        # "clip" spares a copy by which NumPy would keep `out` whole, should an index be out of bounds.
        yield np.take(values, rows, axis=0, out=room[: len(rows)], mode="clip")


def _in_buckets(paths: Sequence[Path], stretch: Stretch) -> Iterator[Piece]:
    header = (BUCKETS + 1) * OFFSET.itemsize
    for path in paths:
        with path.open("rb") as file:
            offsets = np.fromfile(file, dtype=OFFSET, count=BUCKETS + 1)
        start, stop = int(offsets[stretch.first]), int(offsets[stretch.last + 1])
        if start < stop:
            yield Piece(path, _unit(path), header, int(offsets[-1]), start, stop)


def _in_order(paths: Sequence[Path], stretch: Stretch) -> Iterator[Piece]:
    before = 0
    for path in paths:
        rows = int(np.fromfile(path, dtype=OFFSET, count=2)[1])
        start, stop = max(stretch.start - before, 0), min(stretch.stop - before, rows)
        if start < stop:
            yield Piece(path, _unit(path), 2 * OFFSET.itemsize, rows, start, stop)
        before += rows


def _unit(path: Path) -> int:
    return int(path.name.partition("-")[0])
