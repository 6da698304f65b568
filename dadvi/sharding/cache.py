"""Decoded chunks kept in memory, so that a data set which fits is read once."""

from collections.abc import Iterable

from torch import Tensor
from zict import LRU

from dadvi.sharding.reader import ShardedDataset

CACHE_BYTES = 512 * 2**20
"""Decoded chunks that one process keeps, unless told otherwise."""


class ChunkCache:
    """Reads chunks of a data set, keeping the most recently used ones up to a budget of bytes.

    A tensor it returns is shared with later readers and must not be changed in place.
    """

    def __init__(self, data: ShardedDataset, budget: int = CACHE_BYTES) -> None:
        self.data = data
        self._kept: LRU[tuple[int, tuple[str, ...]], dict[str, Tensor]] = LRU(budget, {}, weight=_bytes)

    def read(self, chunk: int, fields: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of a chunk by field name, as `ShardedDataset.read` does and with its errors."""
        key = (chunk, tuple(fields))
        batch = self._kept.get(key)
        if batch is None:
            batch = self._kept[key] = self.data.read(chunk, key[1])
        return batch


def _bytes(key: object, batch: dict[str, Tensor]) -> int:  # noqa: ARG001  the signature is zict's
    return sum(values.nbytes for values in batch.values())
