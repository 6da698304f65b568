import pytest

from dadvi.errors import DataError
from dadvi.sharding.layout import CHUNK_BYTES, MIN_CHUNK_ROWS, SHARD_BYTES, Layout


@pytest.mark.parametrize("num_rows", [1, 1000, 1024, 5000, 327_346, 10**6, 10**9])
@pytest.mark.parametrize("row_bytes", [1, 25, 404, 10**7])
def test_defaults_keep_their_promises(num_rows, row_bytes):
    chunk_rows, shard_rows = Layout().rows(num_rows, row_bytes)
    num_chunks, num_shards = -(-num_rows // chunk_rows), -(-num_rows // shard_rows)
    assert shard_rows % chunk_rows == 0
    assert chunk_rows == 1 or chunk_rows * row_bytes <= CHUNK_BYTES
    assert shard_rows == chunk_rows or shard_rows * row_bytes <= SHARD_BYTES
    assert num_shards >= min(num_chunks, 8)
    # Few chunks only where more would be tiny.
    assert num_chunks >= 120 or chunk_rows <= MIN_CHUNK_ROWS


def test_large_data_get_full_chunks_and_shards():
    chunk_rows, shard_rows = Layout().rows(10**9, 400)
    assert chunk_rows == CHUNK_BYTES // 400
    assert shard_rows == 16 * chunk_rows


def test_settings_rule():
    assert Layout(chunk_rows=10, shard_rows=40).rows(95, 8) == (10, 40)
    assert Layout(chunk_bytes=80, shard_bytes=330).rows(95, 8) == (10, 40)
    assert Layout(chunk_rows=10).rows(10**6, 8)[0] == 10


def test_chunk_rows_divide_shard_rows_given_alone():
    chunk_rows, shard_rows = Layout(shard_rows=5000).rows(10**6, 4000)
    assert shard_rows == 5000
    assert 5000 % chunk_rows == 0
    assert 1048 <= chunk_rows <= 2097


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_rows": 0}, "chunk_rows=0 must be at least 1"),
        ({"shard_bytes": -1}, "shard_bytes=-1 must be at least 1"),
        ({"chunk_rows": 4, "shard_rows": 10}, "shard_rows=10 must be a multiple of chunk_rows=4; use 8 or 12"),
        ({"chunk_rows": 4, "shard_rows": 3}, "use 4$"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        Layout(**settings)


def test_prime_shard_rows_need_chunk_rows():
    with pytest.raises(DataError, match="no divisor near 2097"):
        Layout(shard_rows=104_729).rows(10**6, 4000)
