import tracemalloc

import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from zarr.storage import MemoryStore

from dadvi.sharding import open_shards, write_shards

N = 1000
MIB = 2**20
DTYPES = (
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)


def memmap(values, directory):
    mapped = np.memmap(directory / "mapped", dtype=values.dtype, mode="w+", shape=values.shape)
    mapped[:] = values
    return mapped


def zarr_array(values, directory):
    array = zarr.create_array(
        directory / "source", shape=values.shape, dtype=values.dtype, chunks=(37, *values.shape[1:])
    )
    array[:] = values
    return array


KINDS = {
    "numpy": lambda values, _: values,
    "memmap": memmap,
    "torch": lambda values, _: torch.from_numpy(values),
    "dask": lambda values, _: da.from_array(values, chunks=(170, *([1] * (values.ndim - 1)))),
    "zarr": zarr_array,
    "list": lambda values, _: values.tolist(),
    "big-endian": lambda values, _: values.astype(values.dtype.newbyteorder(">")),
    "strided": lambda values, _: np.repeat(values, 2, axis=0)[::2],
}


def rows(num_rows=N):
    rng = np.random.default_rng(0)
    return {"x": rng.standard_normal((num_rows, 3)).astype(np.float32), "i": np.arange(num_rows)}


def whole(data, name):
    return torch.cat([data.read(chunk)[name] for chunk in range(data.manifest.num_chunks)]).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_comes_back(tmp_path, kind):
    values = rows()["x"].astype(np.float64)
    data = write_shards(tmp_path / "out", {"x": KINDS[kind](values, tmp_path), "i": np.arange(N)}, chunk_rows=64)
    assert np.array_equal(whole(data, "x"), values)
    assert np.array_equal(whole(data, "i"), np.arange(N))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_stored_as_it_is(tmp_path, dtype):
    values = (np.arange(N) % 2 if dtype == "bool" else np.arange(N) % 100).astype(dtype)
    data = write_shards(tmp_path / "out", {"x": values}, chunk_rows=64)
    assert data.fields["x"].dtype == dtype
    assert zarr.open_array(tmp_path / "out", path="x", mode="r").dtype == values.dtype
    assert np.array_equal(whole(data, "x"), values)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 2)])
def test_rows_of_every_shape_come_back(tmp_path, shape):
    values = np.random.default_rng(0).standard_normal((101, *shape))
    data = write_shards(tmp_path / "out", {"x": values}, chunk_rows=10, shard_rows=30)
    assert data.fields["x"].shape == shape
    assert np.array_equal(whole(data, "x"), values)


@pytest.mark.parametrize("num_rows", [1, 9, 10, 11, 39, 40, 41, 95])
def test_ragged_ends_are_kept(tmp_path, num_rows):
    data = write_shards(tmp_path / "out", rows(num_rows), chunk_rows=10, shard_rows=40)
    sizes = [len(data.read(chunk)["i"]) for chunk in range(data.manifest.num_chunks)]
    assert sizes == data.manifest.chunk_sizes.tolist()
    assert np.array_equal(whole(data, "i"), np.arange(num_rows))


def test_a_shard_is_one_file_a_field(tmp_path):
    data = write_shards(tmp_path / "out", rows(95), chunk_rows=10, shard_rows=40)
    for name in ("x", "i"):
        files = [path for path in (tmp_path / "out" / name / "c").rglob("*") if path.is_file()]
        assert len(files) == data.manifest.num_shards == 3


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_the_checksum_covers_every_chunk(tmp_path, compression):
    data = write_shards(tmp_path / "out", rows(), compression=compression)
    for name in data.fields:
        codecs = zarr.open_array(tmp_path / "out", path=name, mode="r").compressors
        assert [type(each).__name__ for each in codecs] == ["ZstdCodec", "Crc32cCodec"][compression is None :]
    assert np.array_equal(whole(data, "x"), rows()["x"])


def test_shuffle_permutes_whole_rows_and_depends_on_the_seed_only(tmp_path):
    fields = rows()
    first = write_shards(tmp_path / "a", fields, shuffle=5)
    again = write_shards(
        tmp_path / "b",
        {name: da.from_array(each, chunks=130) for name, each in fields.items()},
        shuffle=5,
        memory_bytes=20_000,
    )
    other = write_shards(tmp_path / "c", fields, shuffle=6)
    order = whole(first, "i")
    assert sorted(order.tolist()) == list(range(N))
    assert not np.array_equal(order, np.arange(N))
    assert np.array_equal(whole(first, "x"), fields["x"][order])
    assert np.array_equal(whole(again, "i"), order)
    assert np.array_equal(whole(again, "x"), whole(first, "x"))
    assert not np.array_equal(whole(other, "i"), order)
    assert first.manifest.made["shuffle"] == 5


def test_each_dask_block_is_computed_once(tmp_path):
    computed = []

    def block(block_info=None):
        location = block_info[None]["array-location"]
        computed.append(location)
        return np.arange(*location[0])

    lazy = da.map_blocks(block, chunks=((100, 250, 50),), dtype=np.int64, meta=np.empty(0, np.int64))
    data = write_shards(tmp_path / "out", {"i": lazy, "x": rows(400)["x"]}, chunk_rows=64)
    assert np.array_equal(whole(data, "i"), np.arange(400))
    assert sorted(computed) == [[(0, 100)], [(100, 350)], [(350, 400)]]


@pytest.mark.parametrize("shuffle", [None, 0])
def test_memory_does_not_grow_with_the_data(tmp_path, shuffle):
    num_blocks, block_rows = 64, 2**14
    lazy = da.ones((num_blocks * block_rows, 32), chunks=(block_rows, 32), dtype=np.float32)
    assert lazy.nbytes == 128 * MIB
    tracemalloc.start()
    try:
        write_shards(
            tmp_path / "out", {"x": lazy}, shuffle=shuffle, chunk_bytes=MIB, shard_bytes=4 * MIB, memory_bytes=8 * MIB
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * MIB


def test_categories_are_kept(tmp_path):
    data = write_shards(tmp_path / "out", {"g": np.array([2, 0, 1])}, categories={"g": ["u", "v", "w"]})
    assert data.fields["g"].categories == ("u", "v", "w")
    assert open_shards(tmp_path / "out").fields == data.fields


@pytest.mark.parametrize("make", [MemoryStore, lambda: "memory://writer/out.zarr"], ids=["store", "URL"])
def test_other_stores_are_written_refused_and_overwritten(make):
    location = make()
    assert np.array_equal(whole(write_shards(location, rows()), "i"), np.arange(N))
    with pytest.raises(ValueError, match=r"exists; .*overwrite=True"):
        write_shards(location, rows(10))
    with pytest.raises(ValueError, match="NaN"):
        write_shards(location, {"x": np.array([np.nan])}, shuffle=0, overwrite=True)
    assert np.array_equal(whole(open_shards(location), "i"), np.arange(N))
    assert write_shards(location, {"z": np.ones(3)}, overwrite=True).fields.keys() == {"z"}
    with pytest.raises(ValueError, match="NaN"):
        write_shards(location, {"x": np.array([1.0, np.nan])}, overwrite=True)
    with pytest.raises(ValueError, match="not a Zarr group"):
        open_shards(location)


BAD = {
    "unequal length": ({"x": np.ones(3), "y": np.ones(4)}, ("x has 3 rows", "y has 4 rows")),
    "no rows": ({"x": np.ones((0, 2))}, ("empty data", "'x'")),
    "no columns": ({"x": np.ones((2, 0))}, ("empty data", "'x'")),
    "no fields": ({}, ("empty data", "no fields")),
    "scalar": ({"x": np.float64(1)}, ("'x' is 0-dimensional",)),
    "scalar tensor": ({"x": torch.ones(())}, ("'x' is 0-dimensional",)),
    "text": ({"x": np.array(["a", "b"])}, ("'x'", "integer codes")),
    "objects": ({"x": np.array([1, None])}, ("'x'", "object")),
    "dates": ({"x": np.array(["2020-01-01"], dtype="M8[D]")}, ("'x'", "days since")),
    "complex": ({"x": np.ones(2) * 1j}, ("'x'", "complex")),
    "bfloat16": ({"x": torch.ones(2, dtype=torch.bfloat16)}, ("'x'", "bfloat16", ".float()")),
    "sparse": ({"x": torch.ones(2, 2).to_sparse()}, ("'x'", "to_dense")),
    "masked": ({"x": np.ma.masked_greater(np.arange(4), 1)}, ("'x' has 2 masked", "filled")),
    "unknown length": ({"x": da.arange(9)[da.arange(9) > 3]}, ("'x'", "compute_chunk_sizes")),
    "Dask frame": ({"x": da.ones(3).to_delayed()[0]}, ("'x' is a Dask Delayed",)),
    "not a name": ({"2x": np.ones(2)}, ("'2x'", "identifiers")),
    "keyword": ({"lambda": np.ones(2)}, ("'lambda'", "identifiers")),
    "large integers": (
        {"x": np.array([1, 2**63], np.uint64)},
        ("'x' has 1 integers above", "9223372036854775808 in row 1"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_fields_are_refused_and_leave_nothing(tmp_path, refused, case):
    fields, parts = BAD[case]
    with refused(*parts):
        write_shards(tmp_path / "out", fields)


@pytest.mark.parametrize("shuffle", [None, 0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_over_all_data(tmp_path, refused, shuffle, bad):
    x, y = np.ones((N, 2), np.float32), np.ones(N)
    x[[700, 800, 900], 1] = bad
    y[3] = bad
    chunked = da.from_array(x, chunks=(50, 2))
    with refused("field 'x' has 3 values", f"first is {bad} in row 700", "field 'y' has 1 values", "in row 3"):
        write_shards(
            tmp_path / "out", {"x": chunked, "y": y}, shuffle=shuffle, chunk_rows=10, shard_rows=20, memory_bytes=4_000
        )


@pytest.mark.parametrize(
    ("codes", "categories", "parts"),
    [
        ([0, 1, 3, -1], {"g": "uvw"}, ("'g' has 2 codes outside 0 to 2", "3 in row 2")),
        ([0.0, 1.0], {"g": "uv"}, ("'g' of dtype float64", "integers")),
        ([0, 1], {"h": "uv"}, ("'h', which is not a field", "g")),
        ([0, 1], {"g": "uu"}, ("'g'", "distinct")),
    ],
)
def test_categories_that_do_not_fit_are_refused(tmp_path, refused, codes, categories, parts):
    with refused(*parts):
        write_shards(tmp_path / "out", {"g": np.array(codes)}, categories=categories)


def test_unknown_settings_are_refused(tmp_path, refused):
    with refused("compression='lzma'", "zstd"):
        write_shards(tmp_path / "out", rows(), compression="lzma")
    with refused("shard_rows=10", "chunk_rows=4"):
        write_shards(tmp_path / "out", rows(), chunk_rows=4, shard_rows=10)
    with refused("storage_options go with a URL"):
        write_shards(tmp_path / "out", rows(), storage_options={"key": "value"})
    with refused("ftpx://host/out"):
        write_shards("ftpx://host/out", rows())
