"""Uncompressed shards on a local disk, mapped into memory: chunks read without a copy.

A shard of the Zarr v3 sharding codec is its chunks, each followed by its CRC-32C, and an index of (offset, length) for
each chunk with a CRC-32C of its own. Where chunks are stored as they lie in memory, the operating system's page cache
already holds what a read would copy, and copies into new memory cost several times the arithmetic on them.
"""

import errno
import math
import mmap
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from awscrt.checksums import crc32c
from numpy.typing import NDArray

INDEX_ENTRY = np.dtype([("offset", "<u8"), ("length", "<u8")])
CHECKSUM = np.dtype("<u4")
ABSENT = 2**64 - 1
"""Offset and length of a chunk that was not written."""


@dataclass(frozen=True, eq=False)
class MappedArray:
    """One array of a data set, with each chunk in one piece."""

    directory: Path
    keys: "zarr.Array[Any]"  # which tells where a shard lies
    chunk_shape: tuple[int, ...]
    chunks_per_shard: int
    dtype: np.dtype[Any]  # little-endian
    _shards: dict[int, tuple[str, NDArray[np.void]]] = field(default_factory=dict)  # path and index, once read

    @classmethod
    def of(cls, array: "zarr.Array[Any]", directory: Path) -> Self | None:
        """Return an array of which `directory` is the folder, or None if its chunks are not stored plainly."""
        codecs: Any = array.metadata.to_dict().get("codecs", ())
        if [each["name"] for each in codecs] != ["sharding_indexed"]:
            return None
        shards = codecs[0]["configuration"]
        plain = all(_is_plain(shards[each]) for each in ("codecs", "index_codecs"))
        if array.shards is None or not plain or shards.get("index_location", "end") != "end":
            return None
        return cls(directory, array, array.chunks, array.shards[0] // array.chunks[0], array.dtype.newbyteorder("<"))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk without its checksum."""
        return self.dtype.itemsize * math.prod(self.chunk_shape)

    def path(self, shard: int) -> Path:
        """Return where a shard lies."""
        return self.directory / self.keys.metadata.encode_chunk_key((shard, *(0 for _ in self.chunk_shape[1:])))

    def read(self, chunk: int) -> NDArray[Any]:
        """Return a chunk, in full also where it is the ragged last one, checked against its checksum.

        It is a private mapping of the file: writing to it would not reach the disk.

        Raises
        ------
        FileNotFoundError
            When its shard is missing.
        ValueError
            When it is damaged.
        """
        shard, place = divmod(chunk, self.chunks_per_shard)
        if shard not in self._shards:
            self._shards[shard] = self._find(shard)
        path, index = self._shards[shard]
        offset, length = index[place].tolist()
        size = self.chunk_bytes
        if length == ABSENT:
            raise FileNotFoundError(f"it is missing from {path}")
        if length != size + CHECKSUM.itemsize:
            raise ValueError(f"{path} has {length} bytes of it, not {size + CHECKSUM.itemsize}.")
        stored = _mapped(path, offset, length)
        values = stored[:size]
        if crc32c(values.data) != stored[size:].view(CHECKSUM)[0]:
            raise ValueError("its checksum is not that of its bytes.")
        # A chunk starts where the one before ended, which need not be where a number may start.
        return np.require(values.view(self.dtype).reshape(self.chunk_shape), requirements="A")

    def _find(self, shard: int) -> tuple[str, NDArray[np.void]]:
        """Return the path of a shard, and (offset, length) of each of its chunks."""
        path = self.path(shard)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        size = self.chunks_per_shard * INDEX_ENTRY.itemsize
        with path.open("rb") as file:
            start = file.seek(0, os.SEEK_END) - size - CHECKSUM.itemsize
            file.seek(max(0, start))
            stored = file.read()
        if start < 0 or crc32c(stored[:size]) != np.frombuffer(stored[size:], CHECKSUM)[0]:
            raise ValueError(f"the index at the end of {path} is not what its checksum says.")
        return str(path), np.frombuffer(stored[:size], INDEX_ENTRY)


def _mapped(path: str, offset: int, length: int) -> NDArray[np.uint8]:
    """Return bytes of a file as a private mapping, without what `np.memmap` does to a path for every chunk.

    A mapping holds its file open: a process that keeps many chunks has more open files than it is allowed at first.
    """
    skipped = offset % mmap.ALLOCATIONGRANULARITY
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            held = mmap.mmap(file.fileno(), skipped + length, access=mmap.ACCESS_COPY, offset=offset - skipped)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except OSError as error:
        if error.errno != errno.EMFILE or not _allow_more_files():
            raise
        return _mapped(path, offset, length)
    return np.frombuffer(held, np.uint8, length, skipped)


def _allow_more_files() -> bool:
    """Let this process have as many open files as it may ask for; return whether these are more than before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft != hard


def _is_plain(codecs: Sequence[dict[str, Any]]) -> bool:
    """Return whether numbers are stored as they lie in the memory of a little-endian machine, with a checksum."""
    names, order = [each["name"] for each in codecs], codecs[0].get("configuration", {}).get("endian", "little")
    return names == ["bytes", "crc32c"] and order == "little"
