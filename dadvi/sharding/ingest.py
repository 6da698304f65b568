"""Tables into data sets: one pass over the files to a spool on the disk, one from there to Zarr.

What only the whole data can tell (categories, mean and sd, extremes, the number of rows) is known after the first pass;
the spool keeps or shuffles the order meanwhile. Neither pass holds more than some blocks of rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dadvi.errors import DataError
from dadvi.sharding.encoders import Encoder, Transform, encoder, resolve_spec
from dadvi.sharding.fieldspec import FieldSpec, FieldSpecs, parse_specs
from dadvi.sharding.layout import Layout
from dadvi.sharding.location import Location, Options
from dadvi.sharding.output import output
from dadvi.sharding.reader import ShardedDataset, open_shards
from dadvi.sharding.shuffle import MEMORY_BYTES, Block, RowSpool
from dadvi.sharding.tables import Sources, Table, open_table
from dadvi.sharding.writer import check_names, write_blocks
from dadvi.types import whole_number

Missing = Literal["refuse", "drop"]


def ingest(
    sources: Sources,
    out: Location,
    fields: FieldSpecs | None = None,
    *,
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
        Memory for spooling and shuffling.
    overwrite
        Replace a Zarr group that is already there.
    storage_options
        What fsspec needs to reach the URL `out`.

    Raises
    ------
    DataError
        When the sources cannot be read, do not have the columns, or hold values that do not go with what is asked.
        Nothing is left behind.
    """
    if missing not in ("refuse", "drop"):
        raise DataError(f"missing={missing!r} is not known; use 'refuse' or 'drop'")
    shuffle = None if shuffle is None else whole_number("shuffle", shuffle)
    layout = Layout(chunk_rows, shard_rows, chunk_bytes, shard_bytes)
    with output(out, overwrite=overwrite, options=storage_options) as target:
        table = open_table(sources)
        specs, types = _plan(table, fields)
        encoders = {each.name: encoder(each, types) for each in specs}
        tally = Tally()
        with RowSpool(shuffle, memory_bytes=memory_bytes, directory=target.scratch) as spool:
            for block in _encoded(table, types, specs, encoders, tally, drop=missing == "drop"):
                spool.append(block)
            tally.check(spool.num_rows)
            finished = {name: each.finish() for name, each in encoders.items()}
            made = {
                "format": table.format,
                "sources": [each.path for each in table.files],
                "shuffle": shuffle,
                "missing": missing,
                "rows_read": tally.rows,
                "rows_dropped": tally.rows - spool.num_rows,
            }
            write_blocks(
                target,
                _transformed(spool.blocks(), {name: transform for name, (_, transform) in finished.items()}),
                [each for each, _ in finished.values()],
                spool.num_rows,
                layout=layout,
                compression=compression,
                made=made,
            )
    return open_shards(out, storage_options)


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


def _encoded(
    table: Table,
    types: Mapping[str, Any],
    specs: Sequence[FieldSpec],
    encoders: Mapping[str, Encoder],
    tally: Tally,
    *,
    drop: bool,
) -> Iterator[Block]:
    """Yield the rows to keep, encoded; after the first value that must not be there, only count on."""
    missing_counts = tally.dropped if drop else tally.refused
    for batch in table.batches(types):
        missing = {name: _missing(batch.column(name)) for name in types}
        for name, mask in missing.items():
            if mask.any():
                missing_counts[name] = missing_counts.get(name, 0) + int(mask.sum())
        keep = ~np.logical_or.reduce(list(missing.values()))
        kept = batch if keep.all() else batch.filter(pa.array(keep))
        _count_infinite(kept, tally, tally.rows + np.flatnonzero(keep))
        tally.rows += batch.num_rows
        if not tally.refused and not tally.infinite:
            yield {
                each.name: encoders[each.name].encode([kept.column(name) for name in each.columns]) for each in specs
            }


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


def _transformed(blocks: Iterator[Block], transforms: Mapping[str, Transform]) -> Iterator[Block]:
    for block in blocks:
        yield {name: transforms[name](values) for name, values in block.items()}
