"""Uncompressed shards on a local disk, written as their rows come: the files that Zarr would write, byte for byte.

Zarr has a shard in memory as a whole, and copies of it on the way to the disk. Memory that is new to a process costs
more than all that is computed of rows, and rows that have just been put in order are in the processor's cache.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import numpy as np
import zarr
from awscrt.checksums import crc32c
from numpy.typing import NDArray
from zarr.storage import LocalStore

from dadvi.sharding.mapped import ABSENT, CHECKSUM, INDEX_ENTRY, MappedArray


@dataclass(frozen=True)
class PlainShard:
    """Where a shard lies, and how it is cut."""

    path: Path
    chunk_bytes: int
    chunks: int
    """The chunks of a shard, of which the last one of an array may have fewer."""

    @classmethod
    def of(cls, array: "zarr.Array[Any]", shard: int) -> Self | None:
        """Return a shard of an array, or None if it is not stored plainly, on a local disk, as it lies in memory."""
        if not isinstance(array.store, LocalStore) or sys.byteorder != "little" or array.fill_value != 0:
            return None
        mapped = MappedArray.of(array, array.store.root / array.path)
        return None if mapped is None else cls(mapped.path(shard), mapped.chunk_bytes, mapped.chunks_per_shard)

    def write(self, blocks: Iterable[NDArray[Any]]) -> int:
        """Write all rows of the shard, in the array's dtype and in order, and return their CRC-32C.

        The file appears when it is whole; a process that is killed leaves one that ends in `.partial`, as Zarr's do.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        attempt = self.path.with_suffix(f".{uuid4().hex}.partial")
        of_rows = of_chunk = 0
        written, filled = 0, 0  # chunks, and bytes of the next one
        try:
            with attempt.open("wb") as file:
                for block in blocks:
                    rest = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                    while len(rest):
                        part, rest = rest[: self.chunk_bytes - filled], rest[self.chunk_bytes - filled :]
                        of_rows, of_chunk = crc32c(part, of_rows), crc32c(part, of_chunk)
                        file.write(part)
                        filled += len(part)
                        if filled == self.chunk_bytes:
                            file.write(CHECKSUM.type(of_chunk).tobytes())
                            written, filled, of_chunk = written + 1, 0, 0
                if filled:
                    padding = bytes(self.chunk_bytes - filled)
                    file.write(padding)
                    file.write(CHECKSUM.type(crc32c(padding, of_chunk)).tobytes())
                    written += 1
                index = self._index(written)
                file.write(index)
                file.write(CHECKSUM.type(crc32c(index)).tobytes())
            attempt.replace(self.path)
        except BaseException:
            attempt.unlink(missing_ok=True)
            raise
        return of_rows

    def _index(self, written: int) -> bytes:
        """Return where each chunk lies, of which so many were written."""
        index = np.full(self.chunks, ABSENT, dtype=INDEX_ENTRY)
        length = self.chunk_bytes + CHECKSUM.itemsize
        index["offset"][:written] = np.arange(written) * length
        index["length"][:written] = length
        return index.tobytes()
