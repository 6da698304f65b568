"""Blocks of rows written as Zarr v3 arrays with the sharding codec: one array a field, cut alike."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from keyword import iskeyword
from typing import Any

import numpy as np
import zarr
from awscrt.checksums import crc32c
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from dadvi.errors import DataError
from dadvi.sharding.layout import Layout
from dadvi.sharding.location import Location, Options
from dadvi.sharding.manifest import FORMAT, JSON, Category, Field, Manifest, digest
from dadvi.sharding.output import Output, output
from dadvi.sharding.plain import PlainShard
from dadvi.sharding.reader import ATTRIBUTE, ShardedDataset, array_document, describe_lengths, open_shards
from dadvi.sharding.shuffle import MEMORY_BYTES, Block, RowSpool
from dadvi.sharding.sources import aligned, checked, source
from dadvi.types import whole_number


def write_shards(
    location: Location,
    fields: Mapping[str, Any],
    *,
    shuffle: int | None = None,
    categories: Mapping[str, Sequence[Category]] | None = None,
    chunk_rows: int | None = None,
    shard_rows: int | None = None,
    chunk_bytes: int | None = None,
    shard_bytes: int | None = None,
    compression: str | None = None,
    memory_bytes: int = MEMORY_BYTES,
    overwrite: bool = False,
    storage_options: Options = None,
) -> ShardedDataset:
    """Write arrays with equal first axes as a data set, and open it.

    The data are streamed: the memory needed is a few times that of a shard, plus `memory_bytes` for a shuffle.

    Parameters
    ----------
    location
        Where to write: a path, a URL that fsspec understands, or a Zarr store.
    fields
        Array of shape (rows, *row shape) by field name: NumPy arrays, memmaps, torch tensors, Dask or Zarr arrays.
        Names are those by which a model asks for the fields, so they must be Python identifiers.
    shuffle
        Seed of a global shuffle of the rows; None keeps their order. Batches are runs of rows, so rows that come sorted
        should be shuffled.
    categories
        By field name, what the integer codes 0, 1, ... of that field stand for; every code is checked.
    chunk_rows, shard_rows, chunk_bytes, shard_bytes
        Sizes, see `Layout`; by default 8 MiB a chunk and 128 MiB a shard, less on small data.
    compression
        "zstd", or None.
    memory_bytes
        Memory for the shuffle; the same rows in the same order come out whatever it is.
    overwrite
        Replace a Zarr group that is already there.
    storage_options
        What fsspec needs to reach a URL.

    Raises
    ------
    DataError
        When a field has an unusable name, dtype, length or value, or the output cannot be written. Nothing is left
        behind.
    """
    shuffle = None if shuffle is None else whole_number("shuffle", shuffle)
    layout = Layout(chunk_rows, shard_rows, chunk_bytes, shard_bytes)
    check_names(fields)
    if not fields:
        raise DataError("empty data: no fields are given, at least 1 is needed")
    sources = {name: source(name, array) for name, array in fields.items()}
    lengths = {name: each.shape[0] for name, each in sources.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"fields have unequal length: {describe_lengths(lengths)}")
    names = _checked_categories({name: each.dtype for name, each in sources.items()}, categories or {})
    described = [
        Field(name, each.dtype.name, each.shape[1:], categories=names.get(name)) for name, each in sources.items()
    ]
    made = {"sources": {name: each.kind for name, each in sources.items()}, "shuffle": shuffle}
    with output(location, overwrite=overwrite, options=storage_options) as target:
        blocks = checked(aligned(sources), {name: len(each) for name, each in names.items()})
        with RowSpool(shuffle, memory_bytes=memory_bytes, directory=target.scratch) as spool:
            if shuffle is not None:
                for block in blocks:
                    spool.append(block)
                blocks = spool.blocks()
            num_rows = next(iter(lengths.values()))
            draft = Draft(target, described, num_rows, layout=layout, compression=compression, made=made)
            draft.finish(_write_blocks(draft, blocks))
    return open_shards(location, storage_options)


class Draft:
    """A group whose arrays are there and whose rows are to come; it does not open before `finish`.

    Parameters
    ----------
    target
        Where to write.
    fields
        The fields.
    num_rows
        N.
    layout
        What is asked of chunks and shards.
    compression
        "zstd", or None.
    made
        How the data were made, for the manifest.

    Raises
    ------
    DataError
        When there are no rows, or a setting cannot be used.
    """

    def __init__(
        self,
        target: Output,
        fields: Sequence[Field],
        num_rows: int,
        *,
        layout: Layout,
        compression: str | None,
        made: JSON,
    ) -> None:
        chunk_rows, shard_rows = layout.rows(num_rows, sum(each.row_bytes for each in fields))
        self.manifest = Manifest(
            num_rows=num_rows,
            fields={each.name: each for each in fields},
            chunk_rows=chunk_rows,
            shard_rows=shard_rows,
            finite=True,
            made={"dadvi": package_version(), **made},
        )
        codecs = _codecs(compression)
        self._target = target
        self._group = target.create_group()
        self.arrays = {each.name: _create_array(self._group, each, self.manifest, codecs) for each in fields}
        """The arrays by field name, to be filled whole shards at a time, in any order and by any process."""

    def finish(self, checksums: Sequence[Sequence[int]]) -> None:
        """Write the manifest, after all rows.

        Parameters
        ----------
        checksums
            What `write_rows` returned, for the fields of each shard in turn. Their digest, among what the manifest
            says of how the data were made, tells these rows from any others.
        """
        contents = hashlib.sha256(json.dumps(checksums).encode()).hexdigest()
        self.manifest = replace(self.manifest, made={**self.manifest.made, "contents": contents})
        self._target.sweep()
        documents = {name: array_document(self._group, name) for name in self.arrays}
        # Last, since it is what makes the group complete.
        self._group.update_attributes(
            {
                ATTRIBUTE: {
                    "format": FORMAT,
                    "manifest": self.manifest.to_json(),
                    "digest": digest(self.manifest, documents),
                }
            }
        )


def write_rows(array: "zarr.Array[Any]", start: int, blocks: Iterable[NDArray[Any]]) -> int:
    """Write the rows of a shard, which begins with row `start`, and return their CRC-32C.

    Each of the blocks may be overwritten by the next.
    """
    shard_rows = (array.shards or array.chunks)[0]
    shard = PlainShard.of(array, start // shard_rows)
    if shard is not None:
        return shard.write(blocks)
    values = _joined(blocks, (min(shard_rows, array.shape[0] - start), *array.shape[1:]), array.dtype)
    array[start : start + len(values)] = values
    return int(crc32c(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data))


def _joined(blocks: Iterable[NDArray[Any]], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return all rows in one array, which is the block itself where there is one only."""
    values, filled = np.empty(0, dtype), 0
    for block in blocks:
        if len(block) == shape[0]:
            return block
        if not filled:
            values = np.empty(shape, dtype)
        values[filled : filled + len(block)] = block
        filled += len(block)
    return values


def _write_blocks(draft: Draft, blocks: Iterable[Block]) -> list[list[int]]:
    """Write all rows in order, from blocks of any size whose values have been checked; return their checksums."""
    manifest = draft.manifest
    start, checksums = 0, []
    for shard in _rebatched(blocks, list(manifest.fields.values()), min(manifest.shard_rows, manifest.num_rows)):
        checksums.append([write_rows(draft.arrays[name], start, [values]) for name, values in shard.items()])
        start += len(next(iter(shard.values())))
    return checksums


def package_version() -> str:
    """Return the version of the installed package, or "unknown" when it runs from a source tree."""
    try:
        return version("dadvi")
    except PackageNotFoundError:
        return "unknown"


def check_names(names: Iterable[str]) -> None:
    """Raise DataError for a field name that no function of a model could have as an argument."""
    if bad := [str(name) for name in names if not str(name).isidentifier() or iskeyword(name)]:
        raise DataError(
            "a model asks for fields by argument name, so their names must be Python identifiers; "
            f"rename {', '.join(map(repr, bad))}"
        )


def _codecs(compression: str | None) -> list[Any]:
    if compression not in (None, "zstd"):
        raise DataError(f"compression={compression!r} is not known; use 'zstd' or None")
    # The checksum comes last, over the bytes as they are stored.
    return [*([ZstdCodec()] if compression else []), Crc32cCodec()]


def _create_array(group: zarr.Group, each: Field, manifest: Manifest, codecs: list[Any]) -> "zarr.Array[Any]":
    return group.create_array(
        each.name,
        shape=(manifest.num_rows, *each.shape),
        dtype=each.dtype,
        chunks=(manifest.chunk_rows, *each.shape),
        shards=(manifest.shard_rows, *each.shape),
        compressors=codecs,
        filters=None,
        # Zarr leaves out chunks of zeros by default; then a lost chunk could not be told from one of zeros.
        config={"write_empty_chunks": True},
    )


def _rebatched(blocks: Iterable[Block], fields: Sequence[Field], rows: int) -> Iterable[dict[str, NDArray[Any]]]:
    """Yield the same rows, `rows` at a time but for the last. What is yielded is overwritten by the next."""
    buffers = {each.name: np.empty((rows, *each.shape), dtype=each.dtype) for each in fields}
    filled = 0
    for block in blocks:
        length = len(next(iter(block.values())))
        taken = 0
        while taken < length:
            count = min(length - taken, rows - filled)
            for name, buffer in buffers.items():
                buffer[filled : filled + count] = block[name][taken : taken + count]
            taken += count
            filled += count
            if filled == rows:
                yield buffers
                filled = 0
    if filled:
        yield {name: buffer[:filled] for name, buffer in buffers.items()}


def _checked_categories(
    dtypes: Mapping[str, np.dtype[Any]], categories: Mapping[str, Sequence[Category]]
) -> dict[str, tuple[Category, ...]]:
    """Return the categories by field name, or raise DataError when they belong to no field of integer codes."""
    for name, each in categories.items():
        if name not in dtypes:
            raise DataError(
                f"categories are given for '{name}', which is not a field; the fields are {', '.join(dtypes)}"
            )
        if dtypes[name].kind not in "iu":
            raise DataError(f"categories are given for field '{name}' of dtype {dtypes[name]}; codes must be integers")
        if not len(each) or len(set(each)) < len(each):
            raise DataError(f"categories of field '{name}' must be at least one and distinct")
    return {
        name: tuple(label.item() if isinstance(label, np.generic) else label for label in each)
        for name, each in categories.items()
    }
