"""Chunks kept in memory, so that a data set which fits is read once, and read ahead of their use."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from torch import Tensor

from dadvi.sharding.reader import ShardedDataset


class ChunkCache:
    """Reads chunks of a data set and keeps those that it read first, up to a budget of bytes.

    Passes come back to every chunk in turn. Keeping the same ones then saves their share of the reading, where keeping
    the latest would save nothing once the data exceed the budget.
    A tensor it returns is shared with later readers and must not be changed in place.
    """

    def __init__(self, data: ShardedDataset, budget: int) -> None:
        self.data = data
        self._room = budget
        self._lock = Lock()
        self._kept: dict[tuple[int, tuple[str, ...]], dict[str, Tensor]] = {}
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

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

    def stream(self, chunks: Sequence[int], fields: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of some chunks in turn, as `read`, while the next one is being read."""
        names = tuple(fields)
        coming: Future[dict[str, Tensor]] | None = None
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            batch = self.read(chunk, names) if coming is None else coming.result()
            known = following is None or (following, names) in self._kept
            coming = None if known or following is None else self._ahead.submit(self.read, following, names)
            yield batch
