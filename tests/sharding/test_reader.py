import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr
from zarr.storage import LocalStore, MemoryStore

from dadvi.errors import DataError, WorkError
from dadvi.sharding import open_shards, write_shards

X = np.random.default_rng(0).standard_normal((95, 4)).astype(np.float32)
CODES = (np.arange(95) % 7).astype(np.uint8)


@pytest.fixture
def data(tmp_path):
    return write_shards(tmp_path / "data", {"x": X, "g": CODES, "b": CODES > 3}, chunk_rows=10, shard_rows=40)


def shard_file(data, name, shard):
    (path,) = [path for path in (data.location / name / "c" / str(shard)).rglob("*") if path.is_file()] or [
        data.location / name / "c" / str(shard)
    ]
    return path


def test_a_chunk_holds_its_rows_in_dtypes_that_torch_can_index_with(data):
    batch = data.read(3)
    assert {name: values.dtype for name, values in batch.items()} == {
        "x": torch.float32,
        "g": torch.int64,
        "b": torch.bool,
    }
    assert np.array_equal(batch["x"].numpy(), X[30:40])
    assert np.array_equal(batch["g"].numpy(), CODES[30:40])
    assert np.array_equal(batch["b"].numpy(), CODES[30:40] > 3)


def test_only_the_fields_asked_for_are_read(data):
    assert list(data.read(0, ["g"])) == ["g"]
    with pytest.raises(DataError, match="no field named z: the data have x, g, b"):
        data.read(0, ["z"])
    with pytest.raises(DataError, match=r"chunk 10 does not exist.*0 to 9"):
        data.read(10)


def test_opening_again_gives_the_same(data):
    again = open_shards(str(data.location))
    assert again.manifest == data.manifest
    assert again.digest == data.digest
    assert again.manifest.finite


def test_repr_tells_what_it_is(data):
    assert "95 rows" in repr(data)
    assert "x: float32[4]" in repr(data)
    assert "10 chunks, 3 shards" in repr(data)


def test_equal_data_have_equal_digests_wherever_they_lie(data, tmp_path):
    moved = data.location.rename(tmp_path / "moved")
    assert open_shards(moved).digest == data.digest


def test_another_process_reads_the_same(data):
    data.read(0)
    script = """if True:
        import pickle, sys
        data = pickle.load(sys.stdin.buffer)
        sys.stdout.buffer.write(data.read(9)["x"].numpy().tobytes())
    """
    run = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(data), capture_output=True, check=True)
    assert run.stdout == X[90:].tobytes()


def test_an_absolute_location_survives_a_change_of_directory(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = open_shards("data")
    monkeypatch.chdir("/")
    assert relative.read(0)["x"].shape == (10, 4)
    assert relative.location == data.location


def test_every_way_to_name_a_local_directory_is_the_same(data):
    for location in (data.location, str(data.location), f"file://{data.location}", LocalStore(data.location)):
        assert open_shards(location).location == data.location


def test_memory_is_not_shareable():
    data = write_shards(MemoryStore(), {"x": X})
    assert not data.shareable
    with pytest.raises(DataError, match="lie in this process's memory"):
        pickle.dumps(data)
    assert not write_shards("memory://reader/shareable", {"x": X}).shareable


def test_local_data_are_shareable(data):
    assert data.shareable


# Damage ---------------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_found_where_it_is(data):
    path = shard_file(data, "x", 1)
    content = bytearray(path.read_bytes())
    start = content.index(X[50:60].tobytes())
    content[start + 17] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"field 'x', shard 1, chunk 5 \(rows 50 to 59\).*damaged.*checksum"):
        data.read(5)
    assert np.array_equal(data.read(4)["x"].numpy(), X[40:50])


@pytest.mark.parametrize("keep", [0, 0.5, 0.9])
def test_a_truncated_shard_is_found(data, keep):
    path = shard_file(data, "x", 0)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match="field 'x', shard 0, chunk 2"):
        data.read(2)


def test_a_missing_shard_is_no_zeros(data):
    shard_file(data, "g", 2).unlink()
    with pytest.raises(DataError, match=r"field 'g', shard 2, chunk 8.*missing"):
        data.read(8)
    assert np.array_equal(data.read(8, ["x"])["x"].numpy(), X[80:90])


def test_chunks_of_zeros_are_stored_and_read(tmp_path):
    data = write_shards(tmp_path / "zeros", {"x": np.zeros(100)}, chunk_rows=10, shard_rows=20)
    assert sum(float(data.read(chunk)["x"].abs().sum()) for chunk in range(10)) == 0
    shard_file(data, "x", 4).unlink()
    with pytest.raises(DataError, match="missing"):
        data.read(9)


def test_a_store_that_cannot_be_read_is_no_bad_input(data, monkeypatch):
    async def unreachable(*_args, **_settings):
        raise TimeoutError("no answer")

    monkeypatch.setattr(LocalStore, "get", unreachable)
    with pytest.raises(WorkError, match=r"field 'x', shard 0, chunk 1.*no answer"):
        data.read(1)


@pytest.mark.parametrize("change", ["manifest", "array"])
def test_changed_metadata_are_found(data, change):
    path = data.location / ("zarr.json" if change == "manifest" else "x/zarr.json")
    document = json.loads(path.read_text())
    if change == "manifest":
        document["attributes"]["dadvi"]["manifest"]["num_rows"] = 94
    else:
        document["shape"][0] = 94
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"metadata of .* have been changed"):
        open_shards(data.location)


def test_free_attributes_may_be_added(data):
    zarr.open_array(data.location, path="x", mode="r+").attrs["units"] = "m"
    assert open_shards(data.location).digest == data.digest


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ({"format": 2, "manifest": {}}, "has format 2, .*formats up to 1; upgrade"),
        ({"format": 1}, "unfinished"),
        ({"format": 1, "manifest": {}, "digest": ""}, "manifest cannot be read"),
        ([], "not a manifest"),
    ],
)
def test_other_manifests_are_refused(data, attribute, message):
    zarr.open_group(data.location, mode="r+").attrs["dadvi"] = attribute
    with pytest.raises(DataError, match=message):
        open_shards(data.location)


@pytest.mark.parametrize("content", [None, "{"], ids=["missing", "damaged"])
def test_array_metadata_that_cannot_be_read_are_refused(data, content):
    path = data.location / "x" / "zarr.json"
    path.unlink()
    if content:
        path.write_text(content)
    with pytest.raises(DataError, match=r"x.*(missing|damaged)"):
        open_shards(data.location)


# Foreign groups -------------------------------------------------------------------------------------------------------


def foreign(path, zarr_format=3, **arrays):
    group = zarr.create_group(path, zarr_format=zarr_format)
    for name, (values, settings) in arrays.items():
        array = group.create_array(name, shape=values.shape, dtype=values.dtype, **settings)
        array[...] = values
    return path


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_foreign_group_opens_as_it_is(tmp_path, zarr_format):
    path = foreign(
        tmp_path / "f",
        zarr_format,
        x=(X, {"chunks": (20, 4)}),
        big=(X[:, 0].astype(">f8"), {"chunks": (7,)}),
        g=(CODES, {}),
    )
    before = sorted(path.rglob("*"))
    data = open_shards(path)
    chunks = [data.read(chunk) for chunk in range(data.manifest.num_chunks)]
    assert data.manifest.chunk_rows == 20
    assert data.manifest.num_shards == 1
    assert not data.manifest.finite
    assert data.manifest.made == {"foreign": True}
    assert np.array_equal(torch.cat([each["x"] for each in chunks]).numpy(), X)
    assert np.array_equal(torch.cat([each["big"] for each in chunks]).numpy(), X[:, 0].astype(float))
    assert np.array_equal(torch.cat([each["g"] for each in chunks]).numpy(), CODES)
    assert sorted(path.rglob("*")) == before


def test_shards_of_a_foreign_group_are_kept(tmp_path):
    data = open_shards(
        foreign(tmp_path / "f", x=(X, {"chunks": (5, 4), "shards": (30, 4)}), g=(CODES, {"chunks": (1,)}))
    )
    assert (data.manifest.chunk_rows, data.manifest.shard_rows) == (5, 30)


def test_a_run_of_foreign_chunks_is_a_shard_of_some_megabytes(tmp_path):
    group = zarr.create_group(tmp_path / "f")
    group.create_array("x", shape=(10**7, 10), dtype="f4", chunks=(1000, 10))
    m = open_shards(tmp_path / "f").manifest
    assert 60 * 2**20 < m.shard_rows * m.row_bytes <= 64 * 2**20


def test_a_foreign_group_pickles(tmp_path):
    data = pickle.loads(pickle.dumps(open_shards(foreign(tmp_path / "f", x=(X, {})))))
    assert np.array_equal(data.read(0)["x"].numpy(), X[: data.manifest.chunk_rows])


def test_foreign_integers_beyond_int64_are_refused_when_read(tmp_path):
    data = open_shards(foreign(tmp_path / "f", x=(np.array([1, 2**63], np.uint64), {})))
    with pytest.raises(DataError, match=r"field 'x', shard 0, chunk 0.*9223372036854775808.*float64"):
        data.read(0)


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"x": X, "g": CODES[:90]}, ("unequal length", "x has 95 rows", "g has 90 rows")),
        ({"x": X, "s": np.float32(1)}, ("s of", "0-dimensional")),
        ({}, ("no arrays",)),
        ({"x": X[:0]}, ("empty data",)),
        ({"t": np.array(["2020-01-01"], dtype="M8[s]")}, ("field 't'", "datetime64", "days since")),
    ],
)
@pytest.mark.filterwarnings("ignore:The data type")
def test_bad_foreign_groups_are_refused(tmp_path, refused, arrays, parts):
    foreign(tmp_path / "f", **{name: (values, {}) for name, values in arrays.items()})
    with refused(*parts):
        open_shards(tmp_path / "f")


def test_what_is_no_group_is_refused(tmp_path, refused):
    (tmp_path / "file").write_text("text")
    (tmp_path / "directory").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "zarr.json").write_text("{")
    zarr.create_array(tmp_path / "array", shape=(3,), dtype="f4")
    for name in ("file", "directory", "broken", "array"):
        with refused(name, "not a Zarr group"):
            open_shards(tmp_path / name)
    with refused("missing does not exist"):
        open_shards(tmp_path / "missing")
    with refused("memory://reader/missing", "not a Zarr group"):
        open_shards("memory://reader/missing")
    with refused("nowhere://x", "cannot reach"):
        open_shards("nowhere://x")
