"""Mapped shards: what they are read as, that Zarr reads the same, and that no damaged byte passes."""

import mmap
import resource

import numpy as np
import psutil
import pytest
import zarr

from dadvi.errors import DataError
from dadvi.sharding import open_shards, write_shards
from dadvi.sharding.mapped import MappedArray

ROWS, CHUNK, SHARD = 95, 10, 40
RNG = np.random.default_rng(0)
FIELDS = {
    "x": RNG.standard_normal((ROWS, 3)).astype(np.float32),
    "wide": RNG.standard_normal((ROWS, 2, 2)),  # 8 bytes each: most chunks begin where no float64 may
    "g": RNG.integers(0, 200, ROWS).astype(np.uint8),
    "b": RNG.random(ROWS) < 0.5,
}


@pytest.fixture
def data(tmp_path):
    return write_shards(tmp_path / "data", FIELDS, chunk_rows=CHUNK, shard_rows=SHARD)


def mapped(data, name):
    return MappedArray.of(zarr.open_array(data.location / name, mode="r"), data.location / name)


@pytest.mark.parametrize("name", FIELDS)
def test_chunks_are_those_that_zarr_reads(data, name):
    array, through_zarr = mapped(data, name), zarr.open_array(data.location / name, mode="r")
    for chunk in range(data.manifest.num_chunks):
        start, stop = data.manifest.rows(chunk)
        values = array.read(chunk)[: stop - start]
        np.testing.assert_array_equal(values, through_zarr[start:stop])
        np.testing.assert_array_equal(values, FIELDS[name][start:stop])
        assert values.flags.aligned


def test_a_chunk_is_not_copied_and_writing_to_it_does_not_reach_the_disk(data):
    values = mapped(data, "x").read(0)
    base = values
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base.obj, mmap.mmap)
    values[:] = 7
    np.testing.assert_array_equal(mapped(data, "x").read(0), FIELDS["x"][:CHUNK])


def test_more_chunks_may_be_kept_than_files_may_be_open_at_first(data):
    array = mapped(data, "x")
    array.read(0)  # its index needs a file too
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = psutil.Process().num_fds()
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 5, limits[1]))
    try:
        kept = [array.read(chunk % 4) for chunk in range(20)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    np.testing.assert_array_equal(kept[-1], FIELDS["x"][3 * CHUNK : 4 * CHUNK])


def test_what_is_not_stored_plainly_is_left_to_zarr(tmp_path):
    packed = write_shards(tmp_path / "packed", FIELDS, chunk_rows=CHUNK, shard_rows=SHARD, compression="zstd")
    assert mapped(packed, "x") is None
    np.testing.assert_array_equal(packed.read(3)["x"], FIELDS["x"][30:40])
    for name, settings in {
        "no_shards": {"chunks": (10, 3)},
        "no_checksum": {"chunks": (10, 3), "shards": (40, 3), "compressors": None},
        "big_endian": {"chunks": (10, 3), "shards": (40, 3), "serializer": zarr.codecs.BytesCodec(endian="big")},
    }.items():
        directory = tmp_path / name
        array = zarr.create_array(directory, shape=(ROWS, 3), dtype="float32", **settings)
        assert MappedArray.of(array, directory) is None


def test_every_flipped_byte_of_a_shard_is_refused(data):
    (shard,) = (data.location / "g" / "c").glob("0")
    good = shard.read_bytes()
    assert len(good) == 4 * (CHUNK + 4) + 4 * 16 + 4
    for place in range(len(good)):
        shard.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        opened = open_shards(data.location)
        hit = {place // (CHUNK + 4)} if place < 4 * (CHUNK + 4) else set(range(4))  # a chunk, or the index
        for chunk in range(4):
            if chunk in hit:
                with pytest.raises(DataError, match=rf"shard 0, chunk {chunk} \(rows {10 * chunk}"):
                    opened.read(chunk)
            else:
                np.testing.assert_array_equal(opened.read(chunk)["g"], FIELDS["g"][10 * chunk : 10 * chunk + 10])


@pytest.mark.parametrize("length", [0, 3, 30, -1])
def test_a_truncated_shard_is_refused(data, length):
    (shard,) = (data.location / "g" / "c").glob("1")
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(DataError, match=r"field 'g', shard 1, chunk 5 .*damaged"):
        open_shards(data.location).read(5)


def test_a_chunk_that_was_not_written_is_missing_and_no_zeros(tmp_path):
    array = zarr.create_array(
        tmp_path / "holes",
        shape=(40, 3),
        dtype="float32",
        chunks=(10, 3),
        shards=(40, 3),
        compressors=[zarr.codecs.Crc32cCodec()],
    )
    array[10:20] = 1.0
    holes = MappedArray.of(array, tmp_path / "holes")
    np.testing.assert_array_equal(holes.read(1), np.ones((10, 3)))
    with pytest.raises(FileNotFoundError, match="missing"):
        holes.read(0)
