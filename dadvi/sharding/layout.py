"""How many rows make a chunk and a shard, chosen from bytes.

A chunk should be large enough that reading it is one efficient request, and small enough that a batch can be drawn from
many places. A shard should be large enough that a task is worth its overhead, and there should be enough of them to
occupy a cluster.
"""

from dataclasses import dataclass

from dadvi.errors import DataError

MIB = 2**20
CHUNK_BYTES = 8 * MIB
SHARD_BYTES = 128 * MIB
MIN_CHUNKS = 128
"""Chunks below which smaller chunks are chosen, so that sampling by chunks stays fine-grained on small data ..."""
MIN_CHUNK_ROWS = 1024
"""... but never below this many rows, where the overhead of a read would rule."""
MIN_SHARDS = 8
"""Shards below which smaller shards are chosen, while each can have a chunk."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What is asked of chunks and shards; whatever is None is chosen by `rows`.

    Raises
    ------
    DataError
        When a setting is not positive, or `shard_rows` is not a multiple of `chunk_rows`.
    """

    chunk_rows: int | None = None
    """Rows of a chunk; rules over `chunk_bytes`."""
    shard_rows: int | None = None
    """Rows of a shard, a multiple of `chunk_rows`; rules over `shard_bytes`."""
    chunk_bytes: int | None = None
    """Bytes of a chunk summed over all fields; by default 8 MiB, or less on small data."""
    shard_bytes: int | None = None
    """Bytes of a shard summed over all fields; by default 128 MiB, or less on small data."""

    def __post_init__(self) -> None:
        for name in ("chunk_rows", "shard_rows", "chunk_bytes", "shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name}={value} must be at least 1")
        if self.chunk_rows and self.shard_rows and self.shard_rows % self.chunk_rows:
            below = self.shard_rows // self.chunk_rows * self.chunk_rows
            raise DataError(
                f"shard_rows={self.shard_rows} must be a multiple of chunk_rows={self.chunk_rows}; "
                f"use {f'{below} or ' if below else ''}{below + self.chunk_rows}"
            )

    def rows(self, num_rows: int, row_bytes: int) -> tuple[int, int]:
        """Return (chunk_rows, shard_rows) for data of `num_rows` rows of `row_bytes` bytes each.

        By default a chunk has 8 MiB, or 1/128 of the rows if that is less, but not below 1024 rows; a shard has 128
        MiB, or 1/8 of the chunks if that is less, but at least one chunk.
        """
        chunk_rows = self.chunk_rows or self._chunk_rows(num_rows, max(row_bytes, 1))
        if self.shard_rows is not None:
            return chunk_rows, self.shard_rows
        num_chunks = -(-num_rows // chunk_rows)
        chunks = (self.shard_bytes or SHARD_BYTES) // (chunk_rows * max(row_bytes, 1))
        if self.shard_bytes is None:
            chunks = min(chunks, num_chunks // MIN_SHARDS)
        return chunk_rows, max(1, min(chunks, num_chunks)) * chunk_rows

    def _chunk_rows(self, num_rows: int, row_bytes: int) -> int:
        target = max(1, min((self.chunk_bytes or CHUNK_BYTES) // row_bytes, num_rows))
        if self.chunk_bytes is None:
            target = min(target, max(-(-num_rows // MIN_CHUNKS), MIN_CHUNK_ROWS))
        return target if self.shard_rows is None else _divisor(self.shard_rows, target)


def _divisor(shard_rows: int, target: int) -> int:
    """Return the largest divisor of `shard_rows` between target / 2 and target. Raises DataError when there is none."""
    fewest = -(-shard_rows // target)
    for count in range(fewest, 2 * fewest + 1):
        if shard_rows % count == 0:
            return shard_rows // count
    raise DataError(
        f"shard_rows={shard_rows} has no divisor near {target}, the chunk_rows that suit these data; "
        f"give chunk_rows too, or use shard_rows={fewest * target}"
    )
