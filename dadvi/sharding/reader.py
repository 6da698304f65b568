"""A data set on its Zarr store, read chunk by chunk.

Opening validates the metadata once. Reading a chunk is the only thing that touches data; it happens on workers, so a
data set pickles as its location and manifest, and reopens its arrays where it is first read.
"""

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor
from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore

from dadvi.errors import DataError, WorkError
from dadvi.sharding.location import (
    CompleteStore,
    Location,
    Options,
    RemoteStore,
    TimedStore,
    is_shareable,
    open_store,
    resolve,
)
from dadvi.sharding.manifest import FORMAT, JSON, Field, Manifest, digest, storable
from dadvi.sharding.mapped import MappedArray

ATTRIBUTE = "dadvi"
"""The attribute of the group that holds the manifest."""
FOREIGN_SHARD_BYTES = 64 * 2**20
"""Bytes of a shard of a group that has chunks but no shards."""


@dataclass(frozen=True, slots=True)
class ShardedDataset:
    """Rows of named fields, in chunks and shards on a Zarr store. Made by `open_shards`."""

    location: Path | str | Store
    """Absolute path, URL or store."""
    manifest: Manifest
    """What the data set is."""
    digest: str
    """sha256 of the manifest and the metadata of the arrays: equal for equal metadata, wherever it lies."""
    storage_options: Options = field(default=None, repr=False)
    """What fsspec needs to reach a URL."""
    _arrays: dict[str, "zarr.Array[Any] | MappedArray"] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Arrays opened by this process so far."""
    _seconds: dict[str, float] = field(
        default_factory=lambda: {"reading": 0.0, "decoding": 0.0}, init=False, repr=False, compare=False
    )
    """Of this process, decoding being a part of reading."""

    @property
    def num_rows(self) -> int:
        """N, the number of rows."""
        return self.manifest.num_rows

    @property
    def fields(self) -> Mapping[str, Field]:
        """Field by name."""
        return self.manifest.fields

    @property
    def shareable(self) -> bool:
        """Whether another process can open the same data; a store in this process's memory it cannot."""
        return is_shareable(self.location)

    def read(self, chunk: int, fields: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the tensors of a chunk, by field name.

        Floats and booleans keep their dtype. Integers become int64, the only one with which torch can index without
        surprise (it takes uint8 for a mask).

        Parameters
        ----------
        chunk
            Which chunk, 0 to C - 1.
        fields
            Names of the fields to read; by default all.

        Returns
        -------
        dict
            Tensors of shape (rows, *row shape).

        Raises
        ------
        DataError
            When there is no such chunk or field, or what is stored is missing or damaged.
        WorkError
            When the store cannot be read at the moment.
        """
        start, stop = self.manifest.rows(chunk)
        wanted = self.manifest.select(self.fields if fields is None else fields)
        return {each.name: self._read(each.name, chunk, start, stop) for each in wanted}

    @property
    def decoding(self) -> float:
        """What part of the time in which this process reads is spent on decoding: none where chunks are mapped."""
        return self._seconds["decoding"] / max(self._seconds["reading"], sys.float_info.min)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{each.name}: {each.dtype}{list(each.shape) or ''}" for each in self.fields.values())
        size = f"{self.manifest.num_bytes / 1e6:.1f} MB in {self.manifest.num_chunks} chunks"
        return (
            f"<ShardedDataset {self.location}: {self.num_rows} rows of {{{shapes}}}, "
            f"{size}, {self.manifest.num_shards} shards>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.shareable:
            raise DataError(
                f"the data at {self.location} lie in this process's memory and cannot go to another process; "
                "write them to a path or URL, or fit in this process"
            )
        return ShardedDataset, (self.location, self.manifest, self.digest, self.storage_options)

    def _read(self, name: str, chunk: int, start: int, stop: int) -> Tensor:
        place = f"field '{name}', shard {self.manifest.shard(chunk)}, chunk {chunk} (rows {start} to {stop - 1})"
        where = f"{place} of {self.location}"
        try:
            array = self._array(name)
            started = time.perf_counter()
            if isinstance(array, MappedArray):
                values, fetching = array.read(chunk)[: stop - start], math.inf
            else:
                store = cast("TimedStore", array.store)
                before = store.seconds
                values, fetching = np.asarray(array[start:stop]), store.seconds - before
            elapsed = time.perf_counter() - started
            self._seconds["reading"] += elapsed
            self._seconds["decoding"] += max(0.0, elapsed - fetching)
        except FileNotFoundError as error:
            raise DataError(f"{where}: {error}; restore it or write the data set again") from error
        except OSError as error:
            raise WorkError(f"{where} cannot be read: {error}; check that the store can be reached") from error
        except MemoryError:
            raise
        except Exception as error:
            # A codec that meets bytes it did not write may raise anything.
            raise DataError(f"{where} is damaged: {error} Restore it or write the data set again") from error
        return _tensor(values, where)

    def _array(self, name: str) -> "zarr.Array[Any] | MappedArray":
        if name not in self._arrays:
            store = open_store(self.location, self.storage_options, read_only=True)
            if isinstance(store, FsspecStore):
                store = RemoteStore(store)
            if self.manifest.made.get("foreign", False):
                self._arrays[name] = zarr.open_array(TimedStore(store), path=name, mode="r")
            else:
                array = zarr.open_array(CompleteStore(store), path=name, mode="r", zarr_format=3)
                mapped = MappedArray.of(array, self.location / name) if isinstance(self.location, Path) else None
                self._arrays[name] = mapped or array
        return self._arrays[name]


def _tensor(values: NDArray[Any], where: str) -> Tensor:
    if values.dtype.kind in "iu":
        largest = np.iinfo(np.int64).max
        if values.dtype.itemsize == 8 and values.dtype.kind == "u" and values.max() > largest:
            raise DataError(
                f"{where} has the value {values.max()}, and the largest integer usable is {largest}; use float64"
            )
        values = values.astype(np.int64, copy=False)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("=")))


def open_shards(location: Location, storage_options: Options = None) -> ShardedDataset:
    """Open a data set: one written by this package, or any Zarr group of arrays with equal first axes.

    A foreign group is used as it is, without a copy. Its chunks are those of the array with the most bytes per row; its
    shards are that array's shards, or else runs of chunks of about 64 MiB. Values of a foreign group have not been
    checked to be finite.

    Parameters
    ----------
    location
        A path, a URL that fsspec understands, or a Zarr store.
    storage_options
        What fsspec needs to reach a URL.

    Raises
    ------
    DataError
        When there is nothing at the location, it is not a Zarr group, it is unfinished, or its metadata have been
        changed; when a foreign group has no arrays, arrays of unequal length or unusable dtype.
    """
    resolved = resolve(location, storage_options)
    group = _open_group(resolved, storage_options)
    attributes = group.attrs.asdict()
    stored = attributes.get(ATTRIBUTE)
    if "dadvi_posterior" in attributes:
        raise DataError(f"{resolved} is a posterior, not a data set; read it with load_posterior or `dadvi summary`")
    if stored is None:
        _refuse_renamed_manifest(attributes, resolved)
        manifest = _foreign_manifest(group)
    else:
        manifest = _stored_manifest(stored, resolved)
    actual = digest(manifest, {name: array_document(group, name) for name in manifest.fields})
    if isinstance(stored, Mapping) and stored["digest"] != actual:
        raise DataError(
            f"the metadata of {resolved} have been changed since it was written: their digest is {actual}, "
            f"and {stored['digest']} was recorded; restore them or write the data set again"
        )
    return ShardedDataset(resolved, manifest, actual, storage_options)


def is_group(store: Store) -> bool:
    """Return whether a store has a Zarr group at its root, whoever wrote it."""
    try:
        zarr.open_group(store, mode="r")
    except (ValueError, FileNotFoundError):
        return False
    return True


def _open_group(resolved: Path | str | Store, options: Options) -> zarr.Group:
    if isinstance(resolved, Path) and not resolved.exists():
        raise DataError(f"{resolved} does not exist; check the path, or make it with `dadvi ingest` or `write_shards`")
    store = open_store(resolved, options, read_only=True)
    try:
        return zarr.open_group(store, mode="r")
    except Exception as error:
        # What a store raises when nothing is there, or when it cannot be reached, is up to its file system.
        reason = str(error).strip().splitlines() or [repr(error)]
        raise DataError(
            f"{resolved} is not a Zarr group, or cannot be read ({reason[0]}); "
            "give the directory or URL of a Zarr group, or make one with `dadvi ingest` or `write_shards`"
        ) from error


def _stored_manifest(stored: Any, resolved: Path | str | Store) -> Manifest:
    if not isinstance(stored, Mapping) or not isinstance(stored.get("format"), int):
        raise DataError(f"the attribute '{ATTRIBUTE}' of {resolved} is not a manifest; write the data set again")
    if stored["format"] > FORMAT:
        raise DataError(
            f"{resolved} has format {stored['format']}, and this version of dadvi reads formats up to {FORMAT}; "
            "upgrade dadvi"
        )
    if "manifest" not in stored or "digest" not in stored:
        raise DataError(f"{resolved} is unfinished: its writing was interrupted; write it again with overwrite=True")
    return Manifest.from_json(stored["manifest"])


def _refuse_renamed_manifest(attributes: JSON, resolved: Path | str | Store) -> None:
    """Refuse a group that would pass for a foreign one, its rows unchecked, because a byte of a name has changed."""
    for name, value in attributes.items():
        if isinstance(value, Mapping) and {"manifest", "digest"} <= set(value):
            raise DataError(
                f"the metadata of {resolved} have been changed since it was written: its manifest is the attribute "
                f"'{name}', not '{ATTRIBUTE}'; restore them or write the data set again"
            )


def _foreign_manifest(group: zarr.Group) -> Manifest:
    arrays = dict(sorted(group.arrays()))
    if not arrays:
        raise DataError(
            f"{group.store} has no arrays at its root, at least one is needed; open the group that holds them"
        )
    if scalars := [name for name, array in arrays.items() if array.ndim == 0]:
        raise DataError(
            f"{', '.join(scalars)} of {group.store} is 0-dimensional; every array needs rows as its first axis"
        )
    lengths = {name: int(array.shape[0]) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"arrays of {group.store} have unequal length: {describe_lengths(lengths)}")
    fields = {
        name: Field(name, storable(name, array.dtype).name, tuple(int(size) for size in array.shape[1:]))
        for name, array in arrays.items()
    }
    widest = arrays[max(fields, key=lambda name: fields[name].row_bytes)]
    row_bytes = max(1, sum(each.row_bytes for each in fields.values()))
    chunk_rows = int(widest.chunks[0])
    run = max(1, FOREIGN_SHARD_BYTES // (chunk_rows * row_bytes)) * chunk_rows
    shard_rows = run if widest.shards is None else int(widest.shards[0])
    return Manifest(lengths[next(iter(fields))], fields, chunk_rows, shard_rows, finite=False, made={"foreign": True})


def describe_lengths(lengths: Mapping[str, int]) -> str:
    """Return the lengths and the remedy, for the message about fields of unequal length."""
    each = ", ".join(f"{name} has {length} rows" for name, length in lengths.items())
    return f"{each}; every field needs the same first axis"


def array_document(group: zarr.Group, name: str) -> JSON:
    """Return the metadata of an array as stored: not as this version of Zarr would write them."""
    document = ".zarray" if group.metadata.zarr_format == 2 else "zarr.json"
    key = f"{group.path}/{name}/{document}".lstrip("/")
    try:
        content = sync(group.store.get(key, default_buffer_prototype()))
    except Exception as error:
        # As for the group: every store has its own, and a damaged Zip archive several.
        raise DataError(
            f"{key} of {group.store} cannot be read ({error}); check that the store can be reached, restore it, or "
            "write the data set again"
        ) from error
    if content is None:
        raise DataError(f"array {name} is missing from {group.store}; restore it or write the data set again")
    try:
        parsed = json.loads(content.to_bytes())
    except ValueError as error:
        raise DataError(
            f"{key} of {group.store} is damaged ({error}); restore it or write the data set again"
        ) from error
    return dict(parsed)
