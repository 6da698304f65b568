"""Decoded chunks kept in memory, so that a data set which fits is read once."""

from collections.abc import Iterable
from threading import Lock

from torch import Tensor

from dadvi.sharding.reader import ShardedDataset

CACHE_BYTES = 512 * 2**20
"""Decoded chunks that one process keeps, unless told otherwise."""


class ChunkCache:
    """Reads chunks of a data set and keeps those that it read first, up to a budget of bytes.

    Passes come back to every chunk in turn. Keeping the same ones then saves their share of the reading, where keeping
    the latest would save nothing once the data exceed the budget.
    A tensor it returns is shared with later readers and must not be changed in place.
    """

    def __init__(self, data: ShardedDataset, budget: int = CACHE_BYTES) -> None:
        self.data = data
        self._room = budget
        self._lock = Lock()
        self._kept: dict[tuple[int, tuple[str, ...]], dict[str, Tensor]] = {}

    def read(self, chunk: int, fields: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of a chunk by field name, as `ShardedDataset.read` does and with its errors."""
        key = (chunk, tuple(fields))
        if key in self._kept:
            return self._kept[key]
        batch = self.data.read(chunk, key[1])
        size = sum(values.nbytes for values in batch.values())
        with self._lock:
            if size <= self._room and key not in self._kept:
                self._room -= size
                self._kept[key] = batch
        return batch
