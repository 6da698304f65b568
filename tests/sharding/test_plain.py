"""Plain shards: the files that Zarr writes of the same rows, byte for byte, and none where the writing failed."""

import numpy as np
import pytest
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import MemoryStore

from dadvi.sharding.plain import PlainShard
from dadvi.sharding.writer import write_rows

CHUNK, SHARD = 10, 40
RNG = np.random.default_rng(0)


def fields(rows):
    return {
        "x": RNG.standard_normal((rows, 3)).astype(np.float32),
        "wide": RNG.standard_normal((rows, 2, 2)),
        "g": RNG.integers(0, 200, rows).astype(np.uint8),
        "b": RNG.random(rows) < 0.5,
    }


def create(store, values, **settings):
    return zarr.create_array(
        store,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(CHUNK, *values.shape[1:]),
        shards=(SHARD, *values.shape[1:]),
        config={"write_empty_chunks": True},
        **{"compressors": [Crc32cCodec()], "filters": None, **settings},
    )


def files(directory):
    return {str(each.relative_to(directory)): each.read_bytes() for each in directory.rglob("*") if each.is_file()}


@pytest.mark.parametrize("rows", [1, 10, 39, 40, 45, 80, 95])
@pytest.mark.parametrize("block", [1, 7, 40])
def test_files_and_checksums_are_those_of_zarr(tmp_path, rows, block):
    for name, values in fields(rows).items():
        by_zarr, ours = create(tmp_path / "zarr" / name, values), create(tmp_path / "ours" / name, values)
        elsewhere = create(MemoryStore(), values)
        for start in range(0, rows, SHARD):
            shard = values[start : start + SHARD]
            by_zarr[start : start + SHARD] = shard
            blocks = [shard[first : first + block] for first in range(0, len(shard), block)]
            assert PlainShard.of(ours, start // SHARD) is not None
            assert PlainShard.of(elsewhere, start // SHARD) is None
            assert write_rows(ours, start, blocks) == write_rows(elsewhere, start, blocks)
        np.testing.assert_array_equal(elsewhere[:], values)
    assert files(tmp_path / "ours") == files(tmp_path / "zarr")


def test_a_shard_is_written_whole_or_not_at_all(tmp_path):
    values = fields(80)["x"]
    array = create(tmp_path, values)
    before = files(tmp_path)

    def blocks():
        yield values[:15]
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        write_rows(array, 40, blocks())
    assert files(tmp_path) == before
    write_rows(array, 0, [values[40:]])
    write_rows(array, 0, [values[:40]])
    np.testing.assert_array_equal(array[:40], values[:40])


def test_what_is_not_stored_plainly_is_left_to_zarr(tmp_path):
    values = fields(40)["x"]
    for name, settings in {
        "packed": {"compressors": [zarr.codecs.ZstdCodec(), Crc32cCodec()]},
        "filled": {"fill_value": 1.0},
        "big_endian": {"serializer": zarr.codecs.BytesCodec(endian="big")},
    }.items():
        array = create(tmp_path / name, values, **settings)
        assert PlainShard.of(array, 0) is None
        write_rows(array, 0, [values[:15], values[15:]])
        np.testing.assert_array_equal(array[:], values)
