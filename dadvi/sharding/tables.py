"""Parquet, CSV and Arrow files read as one long table, in units that follow one another, a record batch at a time.

A unit is what one task reads: some row groups of a Parquet file, or a whole file of another format. It depends on the
files alone. The readers are PyArrow's streaming ones: what is in memory is one batch and the reader's own buffers,
whatever the number and size of the files.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeAlias

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem

from dadvi.errors import DataError

FORMATS = {
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".csv", ".csv.gz", ".csv.bz2", ".csv.zip"), "csv"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "arrow"),
}
"""Format by the end of a file's name."""
BATCH_BYTES = 8 * 2**20
MAX_BATCH_ROWS = 65_536
CSV_BLOCK_BYTES = 4 * 2**20
PARQUET_BUFFER_BYTES = 2**18
"""Bytes read ahead, per column."""
UNIT_BYTES = 64 * 2**20
"""Bytes, before compression, of the row groups that make a unit, unless one of them is larger."""

Sources: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True, slots=True)
class File:
    """One file of a table."""

    file_system: Any
    """The fsspec file system it lies on."""
    path: str
    """Path on that file system."""
    schema: Any
    """Its Arrow schema; of a CSV file, as inferred from its beginning."""
    parts: tuple[tuple[int, ...] | None, ...]
    """The row groups of each unit; None stands for the whole file."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows that one task reads, of one file."""

    number: int
    """Its place among the units of the table."""
    format: str
    """"parquet", "csv" or "arrow"."""
    file_system: Any
    """The fsspec file system of the file."""
    path: str
    """Path on that file system."""
    row_groups: tuple[int, ...] | None
    """Row groups of a Parquet file."""

    def batches(self, types: Mapping[str, Any]) -> Iterator[Any]:
        """Yield the record batches in order, with the columns and Arrow types asked for.

        Raises
        ------
        DataError
            When the file is damaged, or holds values that do not have the type asked for.
        """
        schema = pa.schema(list(types.items()))
        with _reading(self.format, self.file_system, self.path) as file:
            if self.format == "parquet":
                batches = _parquet_batches(file, schema, self.row_groups)
            else:
                batches = _open_csv(file, schema) if self.format == "csv" else _arrow_batches(file, schema)
            for batch in batches:
                columns = [_decoded(batch.column(name)).cast(kind) for name, kind in types.items()]
                yield pa.record_batch(columns, schema=schema)


@dataclass(frozen=True, slots=True)
class Table:
    """Files of one format, whose rows follow each other. Made by `open_table`."""

    format: str
    """"parquet", "csv" or "arrow"."""
    files: tuple[File, ...]
    """The files, in the order of their rows."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the first file."""
        return tuple(self.files[0].schema.names)

    def types(self, columns: Sequence[str]) -> dict[str, Any]:
        """Return, by column, an Arrow type for the values of every file, dictionaries decoded and decimals as float64.

        Raises
        ------
        DataError
            When a file has no such column, or twice, or files disagree on what it holds.
        """
        schemas = []
        for each in self.files:
            if absent := [name for name in columns if name not in each.schema.names]:
                raise DataError(f"{each.path} has no column {', '.join(absent)}; it has {', '.join(each.schema.names)}")
            if twice := [name for name in columns if len(each.schema.get_all_field_indices(name)) > 1]:
                raise DataError(f"{each.path} has more than one column {', '.join(twice)}; rename them apart")
            schemas.append(pa.schema([(name, _plain(each.schema.field(name).type)) for name in columns]))
        try:
            unified = pa.unify_schemas(schemas, promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(f"the files disagree on a column: {error}; convert them to one type") from error
        return {name: unified.field(name).type for name in columns}

    def units(self) -> list[Unit]:
        """Return the units, in the order of their rows."""
        parts = ((file, part) for file in self.files for part in file.parts)
        return [
            Unit(number, self.format, file.file_system, file.path, part) for number, (file, part) in enumerate(parts)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files as they are stored; a file that cannot tell its size counts for nothing."""
        return sum(each.file_system.size(each.path) or 0 for each in self.files)


def open_table(sources: Sources) -> Table:
    """Find the files of a table and read their schemas.

    Parameters
    ----------
    sources
        Files, directories (every file in them, recursively, in the order of their names), patterns such as
        `flights-*.csv.gz`, or URLs.

    Raises
    ------
    DataError
        When nothing is found, or files are of an unknown format or of several.
    """
    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    found = [each for source in given for each in _find(os.fspath(source))]
    if not found:
        raise DataError(f"no source files in {', '.join(map(str, given)) or 'an empty list'}; give at least one")
    formats = {path: _format(path) for _, path in found}
    if unknown := [path for path, kind in formats.items() if kind is None]:
        raise DataError(f"{unknown[0]} is of unknown format; names must end in one of {', '.join(FORMATS)}")
    kinds = sorted({str(kind) for kind in formats.values()})
    if len(kinds) > 1:
        raise DataError(f"the sources are of several formats: {', '.join(kinds)}; ingest one at a time")
    return Table(kinds[0], tuple(_file(kinds[0], system, path) for system, path in found))


def _find(source: str) -> list[tuple[Any, str]]:
    """Return (file system, path) of the files that a path, directory, pattern or URL stands for."""
    try:
        system, path = fsspec.core.url_to_fs(source)
        if system.isfile(path):
            paths = [path]
        elif system.isdir(path):
            paths = [each for each in sorted(system.find(path)) if _format(each) and not _is_hidden(each, path)]
        else:
            paths = sorted(system.glob(path))
    except Exception as error:
        # Every file system that fsspec drives raises errors of its own.
        raise DataError(f"cannot look for {source}: {error}; check the path or URL") from error
    if not paths:
        raise DataError(f"{source} does not exist, or holds no file of a known format ({', '.join(FORMATS)})")
    return [(system, each) for each in paths]


def _is_hidden(path: str, directory: str) -> bool:
    # Spark and its like leave _SUCCESS and .crc files beside the data.
    inside = PurePosixPath(path).relative_to(PurePosixPath(directory))
    return any(part.startswith((".", "_")) for part in inside.parts)


def _format(path: str) -> str | None:
    return next((kind for suffix, kind in FORMATS.items() if path.lower().endswith(suffix)), None)


@contextmanager
def _reading(kind: str, system: Any, path: str) -> Iterator[Any]:
    """Open a file; what goes wrong while it is read becomes a DataError that names it."""
    try:
        if kind != "csv" and isinstance(system, LocalFileSystem):
            opened = pa.OSFile(path)  # which Arrow reads without Python in between
        else:
            opened = system.open(path, "rb", compression="infer" if kind == "csv" else None)
        with opened as file:
            yield file
    except (pa.ArrowException, OSError, EOFError) as error:
        remedy = "check the file"
        if "conversion error" in str(error):
            remedy = "types are inferred from the beginning of a CSV file; name another, such as NAME:float64"
        raise DataError(f"{path} cannot be read as {kind}: {error}; {remedy}") from error


def _file(kind: str, system: Any, path: str) -> File:
    with _reading(kind, system, path) as file:
        if kind == "parquet":
            reader = pa.parquet.ParquetFile(file)
            return File(system, path, reader.schema_arrow, _parts(reader.metadata))
        schema = (_open_csv(file, None) if kind == "csv" else _open_arrow(file)).schema
        return File(system, path, schema, (None,))


def _parts(metadata: Any) -> tuple[tuple[int, ...], ...]:
    """Return the row groups of a file, cut into runs of at most UNIT_BYTES, or one row group."""
    parts: list[list[int]] = []
    filled = 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if not parts or filled + size > UNIT_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(group)
        filled += size
    return tuple(map(tuple, parts))


def _parquet_batches(file: Any, schema: Any, row_groups: tuple[int, ...] | None) -> Iterator[Any]:
    # Pre-buffering would fetch the whole file ahead; without a buffer size, a column of a row group is fetched at once.
    reader = pa.parquet.ParquetFile(file, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES)
    yield from reader.iter_batches(_batch_rows(schema), row_groups, columns=schema.names, use_threads=False)


def _open_csv(file: Any, schema: Any) -> Any:
    return pa.csv.open_csv(
        file,
        read_options=pa.csv.ReadOptions(block_size=CSV_BLOCK_BYTES),
        convert_options=pa.csv.ConvertOptions(
            column_types=schema,
            include_columns=None if schema is None else schema.names,
            # Otherwise an empty cell of a text column would be a category of its own.
            strings_can_be_null=True,
        ),
    )


def _arrow_batches(file: Any, schema: Any) -> Iterator[Any]:
    reader = _open_arrow(file)
    batches = (
        reader
        if isinstance(reader, pa.RecordBatchStreamReader)
        else map(reader.get_batch, range(reader.num_record_batches))
    )
    rows = _batch_rows(schema)
    for batch in batches:
        for start in range(0, batch.num_rows, rows):
            yield batch.select(schema.names).slice(start, rows)


def _open_arrow(file: Any) -> Any:
    """Open the file format, or else the stream format, which share their suffixes."""
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_stream(file)


def _batch_rows(schema: Any) -> int:
    """Return the rows of a batch of BATCH_BYTES, reckoning 8 bytes a value."""
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // (8 * len(schema.names))))


def _plain(kind: Any) -> Any:
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return pa.float64() if pa.types.is_decimal(kind) else kind


def _decoded(column: Any) -> Any:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
