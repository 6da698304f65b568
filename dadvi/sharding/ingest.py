"""Tables into data sets in two rounds of tasks: units of the table to runs on the disk, and from there to Zarr shards.

What only the whole data can tell (categories, mean and sd, extremes, the number of rows) is known after the first
round, when what the tasks saw is merged in the order of their units; the runs keep or shuffle the order meanwhile (see
`dadvi.sharding.runs`). A task holds some blocks of rows, or one shard, and the data set has the same bits whoever does
the tasks, and in whatever order.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zarr
from numpy.typing import NDArray

from dadvi.errors import DataError
from dadvi.sharding.encoders import CategoryEncoder, Encoder, Transform, encoder, resolve_spec
from dadvi.sharding.fieldspec import FieldSpec, FieldSpecs, parse_specs
from dadvi.sharding.layout import Layout
from dadvi.sharding.location import Location, Options
from dadvi.sharding.output import output
from dadvi.sharding.reader import ShardedDataset, open_shards
from dadvi.sharding.runs import Room, RunReader, RunWriter, Stretch, stretches
from dadvi.sharding.tables import Table, Unit
from dadvi.sharding.writer import Draft, check_names, write_rows
from dadvi.types import IntArray, whole_number

Item = TypeVar("Item")
Result = TypeVar("Result")

Missing = Literal["refuse", "drop"]


class Tasks(Protocol):
    """Who does the tasks."""

    def reach(self, table: Table, scratch: Path) -> None:
        """Raise DataError when tasks could not open the files of the table, or files in the directory."""
        ...

    def map(self, task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield the task's result for each item, in the order of the items."""
        ...


class Here:
    """Tasks done by this process, one after the other."""

    def reach(self, table: Table, scratch: Path) -> None:
        """Do nothing: this process opened the table, and made the directory."""

    def map(self, task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Yield the task's result for each item."""
        return map(task, items)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the data set that a table becomes.

    Raises
    ------
    InputError
        When a setting is out of its range.
    """

    fields: FieldSpecs | None
    """None for every column."""
    shuffle: int | None
    """Seed of the global shuffle; None keeps the order."""
    missing: Missing
    """What to do with rows that have missing values."""
    layout: Layout
    compression: str | None
    memory_bytes: int
    """For each task."""

    def __post_init__(self) -> None:
        if self.missing not in ("refuse", "drop"):
            raise DataError(f"missing={self.missing!r} is not known; use 'refuse' or 'drop'")
        if self.shuffle is not None:
            object.__setattr__(self, "shuffle", whole_number("shuffle", self.shuffle))


def ingest(
    table: Table, out: Location, request: Request, tasks: Tasks, *, overwrite: bool, storage_options: Options
) -> ShardedDataset:
    """Write a table as a data set, and open it: `dadvi.ingest`, once it is decided who does the tasks."""
    with output(out, overwrite=overwrite, options=storage_options) as target:
        specs, types = _plan(table, request.fields)
        with _scratch(target.scratch) as scratch:
            tasks.reach(table, scratch)
            drop = request.missing == "drop"
            plan = _Plan(tuple(specs), types, request.shuffle, drop, scratch, request.memory_bytes)
            seen = _read(tasks, plan, table)
            seen.tally.check(seen.num_rows)
            finished = {name: each.finish() for name, each in seen.encoders.items()}
            made = {
                "format": table.format,
                "sources": [each.path for each in table.files],
                "shuffle": request.shuffle,
                "missing": request.missing,
                "rows_read": seen.tally.rows,
                "rows_dropped": seen.tally.rows - seen.num_rows,
            }
            described = [each for each, _ in finished.values()]
            draft = Draft(
                target,
                described,
                seen.num_rows,
                layout=request.layout,
                compression=request.compression,
                made=made,
            )
            transforms = {name: transform for name, (_, transform) in finished.items()}
            write = partial(_write_shard, plan, draft.arrays, transforms)
            draft.finish(list(tasks.map(write, stretches(seen.counts, draft.manifest.shard_rows))))
    return open_shards(out, storage_options)


@contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    """Give a directory for runs, on the disk of the output if there is one, and remove it at the end."""
    directory = Path(tempfile.mkdtemp(prefix=".dadvi-spool-", dir=parent)).resolve()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass(slots=True)
class Tally:
    """What was counted while the table streamed by."""

    rows: int = 0
    """Rows read, those to be dropped included."""
    refused: dict[str, int] = field(default_factory=dict)
    """Missing values by column, when they are refused."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Missing values by column, when their rows are dropped."""
    infinite: dict[str, tuple[int, int]] = field(default_factory=dict)
    """First row with an infinite value, and the number of them, by column."""

    def merge(self, other: "Tally") -> None:
        """Take in what was counted in rows that follow."""
        for mine, theirs in ((self.refused, other.refused), (self.dropped, other.dropped)):
            for column, count in theirs.items():
                mine[column] = mine.get(column, 0) + count
        for column, (row, count) in other.infinite.items():
            first, before = self.infinite.get(column, (self.rows + row, 0))
            self.infinite[column] = first, before + count
        self.rows += other.rows

    def check(self, num_rows: int) -> None:
        """Raise DataError when a value was seen that must not be there, or no rows are left of those read."""
        if self.refused:
            each = ", ".join(f"{column} ({count} of {self.rows} rows)" for column, count in self.refused.items())
            raise DataError(
                f"missing values in {each}; "
                "drop those rows with missing='drop' (--missing drop), or fill them in the sources"
            )
        if self.infinite:
            each = ", ".join(
                f"{column} ({count} values, the first in row {row})" for column, (row, count) in self.infinite.items()
            )
            raise DataError(f"infinite values in {each}; every value must be finite: correct the sources")
        if not num_rows:
            each = ", ".join(f"{count} in {column}" for column, count in self.dropped.items()) or "none"
            raise DataError(f"empty data: 0 of {self.rows} rows are left; missing values: {each}")


def _plan(table: Table, fields: FieldSpecs | None) -> tuple[list[FieldSpec], dict[str, Any]]:
    """Return the specs, resolved, and the Arrow type in which to read each column that they need."""
    automatic = fields is None
    wanted = tuple(FieldSpec(name, (name,)) for name in table.columns) if fields is None else parse_specs(fields)
    check_names([each.name for each in wanted])
    types = table.types(list(dict.fromkeys(name for each in wanted for name in each.columns)))
    # A column without any value gets a type that can be read, so that its missing values are counted.
    types = {name: pa.float64() if pa.types.is_null(kind) else kind for name, kind in types.items()}
    specs = [resolve_spec(each, types, automatic=automatic) for each in wanted]
    if table.format == "csv":
        categories = {name for each in specs if each.category for name in each.columns}
        for each in specs:
            floating = any(pa.types.is_floating(types[name]) for name in each.columns)
            if floating or each.standardize or (each.dtype is not None and np.dtype(each.dtype).kind == "f"):
                # A column whose first cells look like integers may have fractions further down.
                whole = [name for name in each.columns if pa.types.is_integer(types[name]) and name not in categories]
                types |= dict.fromkeys(whole, pa.float64())
    return specs, types


@dataclass(frozen=True, slots=True)
class _Plan:
    """What every task has to know."""

    specs: tuple[FieldSpec, ...]
    types: Mapping[str, Any]
    """Arrow type by column."""
    shuffle: int | None
    drop: bool
    """Whether rows with missing values are dropped."""
    scratch: Path
    """The directory of the runs."""
    memory_bytes: int
    room: Room = field(default_factory=Room)
    """Where tasks keep rows until they write them."""

    def encoders(self) -> dict[str, Encoder]:
        """Return new encoders by field."""
        return {each.name: encoder(each, self.types) for each in self.specs}

    def dtypes(self) -> dict[str, np.dtype[Any]]:
        """Return the dtype of one row as encoded, by field."""
        return {name: each.encoded for name, each in self.encoders().items()}

    def codes(self, name: str, unit: int) -> Path:
        """Return where it stands what a unit's codes of a category field are among the codes of all units."""
        position = [each.name for each in self.specs].index(name)
        return self.scratch / f"{unit:08d}-{position:04d}.npy"


@dataclass(slots=True)
class _Seen:
    """What was seen in one unit, or in several that follow one another."""

    encoders: dict[str, Encoder]
    counts: IntArray
    """Rows kept: (BUCKETS,) by bucket of their keys, or (1,) in all."""
    tally: Tally

    @property
    def num_rows(self) -> int:
        """Rows kept."""
        return int(self.counts.sum())


def _read(tasks: Tasks, plan: _Plan, table: Table) -> _Seen:
    """Have all units read and written as runs, and return what was seen."""
    seen = _Seen(plan.encoders(), np.zeros(1, dtype=np.int64), Tally())
    for unit, part in enumerate(tasks.map(partial(_read_unit, plan), table.units())):
        for name, merged in seen.encoders.items():
            each = part.encoders[name]
            merged.merge(each)
            if isinstance(merged, CategoryEncoder) and isinstance(each, CategoryEncoder):
                np.save(plan.codes(name, unit), merged.codes_of(each), allow_pickle=False)
        seen.counts = seen.counts + part.counts
        seen.tally.merge(part.tally)
    return seen


def _read_unit(plan: _Plan, unit: Unit) -> _Seen:
    """Read a unit, write its rows as runs, and return what was seen."""
    encoders, tally = plan.encoders(), Tally()
    # Alive at once are the rows of a run, in arrays that may have grown to twice as many.
    writer = RunWriter(plan.scratch, unit.number, plan.shuffle, plan.dtypes(), plan.memory_bytes // 3, plan.room)
    for batch in _kept(unit, plan.types, tally, drop=plan.drop):
        rows = writer.append(batch.num_rows)
        for each in plan.specs:
            encoders[each.name].encode([batch.column(name) for name in each.columns], rows[each.name])
    writer.flush()
    return _Seen(encoders, writer.counts, tally)


def _write_shard(
    plan: _Plan, arrays: Mapping[str, "zarr.Array[Any]"], transforms: Mapping[str, Transform], stretch: Stretch
) -> list[int]:
    """Write one shard of each array, from the runs, and return their checksums."""
    runs = RunReader(plan.scratch, stretch, plan.dtypes(), shuffled=plan.shuffle is not None)
    checksums = []
    for each in plan.specs:
        codes = None
        if each.category:
            codes = {unit: np.load(plan.codes(each.name, unit), allow_pickle=False) for unit in runs.units()}
        rows = map(transforms[each.name], runs.read(each.name, codes))
        checksums.append(write_rows(arrays[each.name], stretch.start, rows))
    return checksums


def _kept(unit: Unit, types: Mapping[str, Any], tally: Tally, *, drop: bool) -> Iterator[Any]:
    """Yield the rows to keep, batch by batch; after the first value that must not be there, only count on."""
    for batch in unit.batches(types):
        kept = batch if all(map(_is_clean, batch.columns)) else _checked(batch, tally, drop=drop)
        tally.rows += batch.num_rows
        if not tally.refused and not tally.infinite:
            yield kept


def _is_clean(column: Any) -> bool:
    """Return whether surely no value is missing or infinite, which a look at the extremes tells of most batches."""
    if column.null_count or not pa.types.is_floating(column.type):
        return not column.null_count
    values = column.to_numpy()
    return not len(values) or bool(np.isfinite(values.min()) and np.isfinite(values.max()))


def _checked(batch: Any, tally: Tally, *, drop: bool) -> Any:
    """Return the rows of a batch in which nothing is missing; count what is missing or infinite."""
    counts = tally.dropped if drop else tally.refused
    missing = {name: _missing(batch.column(name)) for name in batch.schema.names}
    for name, mask in missing.items():
        if mask.any():
            counts[name] = counts.get(name, 0) + int(mask.sum())
    keep = ~np.logical_or.reduce(list(missing.values()))
    kept = batch if keep.all() else batch.filter(pa.array(keep))
    _count_infinite(kept, tally, tally.rows + np.flatnonzero(keep))
    return kept


def _missing(column: Any) -> NDArray[np.bool_]:
    return np.asarray(pc.is_null(column, nan_is_null=True).to_numpy(zero_copy_only=False), dtype=np.bool_)


def _count_infinite(batch: Any, tally: Tally, rows: NDArray[np.int64]) -> None:
    """Count the infinite values of a batch without nulls, whose rows have the given numbers in the table."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_floating(column.type):
            infinite = np.isinf(column.to_numpy(zero_copy_only=False))
            if infinite.any():
                first, count = tally.infinite.get(name, (int(rows[infinite.argmax()]), 0))
                tally.infinite[name] = first, count + int(infinite.sum())
