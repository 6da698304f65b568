"""The cache of chunks: what it keeps within its budget, and reading ahead."""

import threading

import numpy as np
import pytest

from dadvi.errors import DataError
from dadvi.sharding import write_shards
from dadvi.sharding.cache import ChunkCache

ROWS, CHUNK = 60, 10
CHUNK_BYTES = CHUNK * 8
X = np.arange(ROWS, dtype=np.float64)


class Counted:
    """A data set that counts its readings, and fails at one chunk."""

    def __init__(self, data, fails=None):
        self.data, self.fails, self.read_by = data, fails, []

    def read(self, chunk, fields):
        self.read_by.append((chunk, threading.current_thread() is threading.main_thread()))
        if chunk == self.fails:
            raise DataError(f"chunk {chunk} is damaged")
        return self.data.read(chunk, fields)

    @property
    def chunks(self):
        return [chunk for chunk, _ in self.read_by]


@pytest.fixture
def data(tmp_path):
    return Counted(write_shards(tmp_path / "data", {"x": X}, chunk_rows=CHUNK, shard_rows=20))


def test_chunks_are_kept_up_to_the_budget_the_first_ones(data):
    cache = ChunkCache(data, 2 * CHUNK_BYTES + 1)
    for _ in range(3):
        for chunk in range(4):
            np.testing.assert_array_equal(cache.read(chunk, ["x"])["x"], X[10 * chunk : 10 * chunk + 10])
    assert data.chunks == [0, 1, 2, 3, 2, 3, 2, 3]


def test_a_stream_gives_chunks_in_order_and_reads_ahead_what_is_not_kept(data):
    cache = ChunkCache(data, 1 * CHUNK_BYTES)
    for _ in range(2):
        for chunk, batch in zip([0, 2, 5], cache.stream([0, 2, 5], ["x"]), strict=True):
            np.testing.assert_array_equal(batch["x"], X[10 * chunk : 10 * chunk + 10])
    assert data.chunks == [0, 2, 5, 2, 5]
    assert [by_main for _, by_main in data.read_by] == [True, False, False, False, False]


def test_one_chunk_at_most_is_read_ahead(data):
    stream = ChunkCache(data, 0).stream(range(6), ["x"])
    next(stream)
    stream.close()
    assert len(data.chunks) <= 2


def test_an_error_ahead_comes_when_its_chunk_is_due(data):
    data.fails = 2
    stream = ChunkCache(data, 0).stream([1, 2, 3], ["x"])
    np.testing.assert_array_equal(next(stream)["x"], X[10:20])
    with pytest.raises(DataError, match="chunk 2 is damaged"):
        next(stream)
