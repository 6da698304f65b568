"""The global shuffle of a table that many tasks read and many tasks write: a merge sort through files.

Row j of unit u gets the j-th 64-bit number of the random stream of (seed, u), counting the rows that are kept. The
order of the data set is by that key, and by arrival where keys are equal: it depends on the seed, the units and their
rows only, not on which task did what, nor on the memory at hand.

A task that reads a unit writes *runs*: files of rows, each field by itself, in the order of the buckets of their keys,
the multiples of 2^64 / BUCKETS that these have passed (a distribution sort: Knuth, TAOCP vol. 3, 5.2.5). A run begins
with the places where its buckets start; their sum over all runs tells in which buckets the rows of a shard lie, so that
a task that writes a shard reads these rows, of each run one stretch, sorts them by their keys, and reads no others but
for a bucket at either end. It does so some buckets at a time, in arrays that are used again and stay in the processor's
cache. Without a seed rows have no keys and runs keep the order of arrival.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self
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
"""Bytes of a field that are put in order at once, so that they stay in the processor's cache."""
READ_BYTES = 2**16
"""Bytes of a run to be read at once, at least."""
OFFSET = np.dtype(np.int64)
KEY = np.dtype(np.uint64)


class Room(threading.local):
    """Arrays that the tasks of a thread use one after the other. It travels to other processes empty."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()

    def rows(self, name: str, dtype: np.dtype[Any], kept: int, more: int) -> NDArray[Any]:
        """Return an array for that many more rows beside those to keep, which come first."""
        array = self._arrays.get(name)
        if array is None or len(array) < kept + more:
            wider = np.empty(kept + max(kept, more), dtype)
            if array is not None:
                wider[:kept] = array[:kept]
            self._arrays[name] = array = wider
        return array


class RunWriter:
    """Takes the rows of one unit and writes them as runs.

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
    room
        Where rows are kept until a run is written.
    """

    def __init__(
        self,
        directory: Path,
        unit: int,
        seed: int | None,
        dtypes: Mapping[str, np.dtype[Any]],
        run_bytes: int,
        room: Room,
    ) -> None:
        self.counts = np.zeros(1 if seed is None else BUCKETS, dtype=np.int64)
        """Rows written, by bucket of their keys."""
        self._directory, self._unit, self._dtypes, self._room = directory, unit, dtypes, room
        self._run_rows = run_bytes // max(1, sum(dtype.itemsize for dtype in dtypes.values()))
        self._stream = None if seed is None else random_stream(seed, Purpose.SHUFFLE, unit).bit_generator
        self._rows = 0
        self._written = 0

    def append(self, rows: int) -> Block:
        """Return where to put so many rows that follow. Raises DataError when the disk cannot take those before."""
        if self._rows + rows > self._run_rows:
            self.flush()
        before, self._rows = self._rows, self._rows + rows
        return {
            name: self._room.rows(name, dtype, before, rows)[before : self._rows]
            for name, dtype in self._dtypes.items()
        }

    def flush(self) -> None:
        """Write the rows taken so far as a run. Raises DataError when the disk cannot take them."""
        rows, self._rows = self._rows, 0
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
                for name, dtype in self._dtypes.items():
                    values = self._room.rows(name, dtype, rows, 0)[:rows]
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

    def read(self, before: int, dtype: np.dtype[Any], out: NDArray[Any]) -> None:
        """Read the piece's rows of the array that comes after `before` bytes a row. Raises OSError when they end."""
        with self.path.open("rb") as file:
            file.seek(self.header + before * self.rows + self.start * dtype.itemsize)
            if file.readinto(out.reshape(-1).view(np.uint8).data) != out.nbytes:
                raise OSError(f"{self.path} ends before its rows do")

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Step:
    """Rows of a stretch that are read at once."""

    pieces: list[Piece]
    order: IntArray | None
    """The rows wanted in their order, among those of all pieces; None wants all as they are."""


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
        row_bytes = max(dtype.itemsize for dtype in dtypes.values())
        # Of many runs, each step reads more, lest it be a few bytes of each.
        step_rows = max(PIECE_BYTES, READ_BYTES * len(paths)) // max(row_bytes, 1)
        steps = _shuffled_steps if shuffled else _steps_in_order
        self._steps = list(steps(paths, stretch, max(step_rows, 1)))
        rows, found = stretch.stop - stretch.start, sum(map(_rows_wanted, self._steps))
        if found != rows:
            raise FileNotFoundError(f"{directory} has {found} of the {rows} rows {stretch.start} to {stretch.stop - 1}")

    def read(self, name: str, codes: Mapping[int, NDArray[Any]] | None = None) -> Iterator[NDArray[Any]]:
        """Yield the rows of one field in order, a block (rows, *row shape) at a time, which the next one overwrites.

        The rows of each unit are taken through its codes, if these are given.
        """
        before = KEY.itemsize if self._shuffled else 0
        for other, dtype in self._dtypes.items():
            if other == name:
                break
            before += dtype.itemsize
        dtype = self._dtypes[name]
        room = np.empty(max(sum(map(len, step.pieces)) for step in self._steps), dtype)
        ordered = np.empty(max(map(_rows_wanted, self._steps)) if self._shuffled else 0, dtype)
        for step in self._steps:
            filled = 0
            for piece in step.pieces:
                part = room[filled : filled + len(piece)]
                piece.read(before, dtype, part)
                if codes is not None:
                    part[:] = codes[piece.unit][part]
                filled += len(piece)
            if step.order is None:
                yield room[:filled]
            else:
                # "clip" spares a copy by which NumPy would keep `out` whole, should an index be out of bounds.
                yield np.take(room[:filled], step.order, axis=0, out=ordered[: len(step.order)], mode="clip")

    def units(self) -> list[int]:
        """Return the units that the rows came from."""
        return sorted({piece.unit for step in self._steps for piece in step.pieces})


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


def _rows_wanted(step: Step) -> int:
    return sum(map(len, step.pieces)) if step.order is None else len(step.order)


def _shuffled_steps(paths: Sequence[Path], stretch: Stretch, step_rows: int) -> Iterator[Step]:
    """Yield the rows of a stretch by their keys, in steps of whole buckets, of about as many rows."""
    header = (BUCKETS + 1) * OFFSET.itemsize
    pieces, keys, starts = [], [], []
    for path in paths:
        with path.open("rb") as file:
            offsets = np.fromfile(file, dtype=OFFSET, count=BUCKETS + 1)
        wanted = offsets[stretch.first : stretch.last + 2]
        if wanted[0] < wanted[-1]:
            piece = Piece(path, _unit(path), header, int(offsets[-1]), int(wanted[0]), int(wanted[-1]))
            keys.append(np.empty(len(piece), KEY))
            piece.read(0, KEY, keys[-1])
            pieces.append(piece)
            starts.append(wanted - wanted[0])
    before = np.sum(starts, axis=0)[:-1] if starts else np.empty(0, dtype=OFFSET)  # rows, by bucket
    firsts = np.flatnonzero(np.diff(before // step_rows, prepend=-1)).tolist()
    skip, rows = stretch.skip, stretch.stop - stretch.start
    for first, stop in pairwise([*firsts, -1]):
        parts = [
            (piece, part, int(each[first]), int(each[stop]))
            for piece, part, each in zip(pieces, keys, starts, strict=True)
        ]
        order = stable_argsort(np.concatenate([part[start:end] for _, part, start, end in parts]))[skip : skip + rows]
        yield Step(
            [
                replace(piece, start=piece.start + start, stop=piece.start + end)
                for piece, _, start, end in parts
                if start < end
            ],
            order,
        )
        skip, rows = 0, rows - len(order)


def _steps_in_order(paths: Sequence[Path], stretch: Stretch, step_rows: int) -> Iterator[Step]:
    before = 0
    for path in paths:
        rows = int(np.fromfile(path, dtype=OFFSET, count=2)[1])
        start, stop = max(stretch.start - before, 0), min(stretch.stop - before, rows)
        for first in range(start, stop, step_rows):
            piece = Piece(path, _unit(path), 2 * OFFSET.itemsize, rows, first, min(first + step_rows, stop))
            yield Step([piece], None)
        before += rows


def _unit(path: Path) -> int:
    return int(path.name.partition("-")[0])
