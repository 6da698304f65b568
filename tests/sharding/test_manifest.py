import json
import pickle

import numpy as np
import pytest

from dadvi.errors import DataError
from dadvi.sharding.manifest import Field, Manifest, digest, storable

X = Field("x", "float32", (2, 3), columns=("a", "b"), mean=(0.5, 1.0), scale=(2.0, 3.0))
G = Field("g", "int8", categories=("u", "v"))


def manifest(num_rows=23, chunk_rows=4, shard_rows=8, **others):
    return Manifest(num_rows, {"x": X, "g": G}, chunk_rows, shard_rows, finite=True, **others)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 8, 9, 16, 23, 24])
def test_chunks_partition_the_rows_and_shards_the_chunks(num_rows):
    m = manifest(num_rows)
    rows = [row for chunk in range(m.num_chunks) for row in range(*m.rows(chunk))]
    chunks = [chunk for shard in range(m.num_shards) for chunk in m.chunks(shard)]
    assert rows == list(range(num_rows))
    assert chunks == list(range(m.num_chunks))
    assert all(m.shard(chunk) == shard for shard in range(m.num_shards) for chunk in m.chunks(shard))
    assert m.chunk_sizes.dtype == np.int64
    assert m.chunk_sizes.tolist() == [stop - start for start, stop in map(m.rows, range(m.num_chunks))]


def test_bytes_count_every_field():
    assert manifest().row_bytes == 4 * 6 + 1
    assert manifest().num_bytes == 23 * 25


def test_survives_json_and_pickle():
    m = manifest(made={"shuffle": 3})
    assert Manifest.from_json(json.loads(json.dumps(m.to_json()))) == m
    assert pickle.loads(pickle.dumps(m)) == m


def test_fields_are_read_only():
    with pytest.raises(TypeError):
        manifest().fields["y"] = G


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_rows": 0}, "empty data"),
        ({"chunk_rows": 0}, "chunk_rows=0"),
        ({"chunk_rows": 4, "shard_rows": 10}, "multiple of chunk_rows=4"),
    ],
)
def test_impossible_manifests_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        manifest(**change)
    with pytest.raises(DataError, match=message):
        Manifest.from_json(manifest().to_json() | change)


def test_no_fields_are_refused():
    with pytest.raises(DataError, match="no fields"):
        Manifest(1, {}, 1, 1, finite=True)


def test_damaged_json_is_refused():
    document = manifest().to_json()
    del document["fields"][0]["dtype"]
    with pytest.raises(DataError, match="cannot be read"):
        Manifest.from_json(document)


@pytest.mark.parametrize("chunk", [-1, 6])
def test_a_chunk_outside_is_refused(chunk):
    with pytest.raises(DataError, match=rf"chunk {chunk} does not exist.*0 to 5"):
        manifest().rows(chunk)
    with pytest.raises(DataError, match=r"shard 3 does not exist.*0 to 2"):
        manifest().chunks(3)


def test_an_unknown_field_is_refused_naming_those_there_are():
    with pytest.raises(DataError, match="no field named z: the data have x, g"):
        manifest().select(["x", "z"])


def test_digest_sees_manifest_and_metadata_but_not_attributes():
    documents = {"x": {"shape": [23], "codecs": ["bytes"], "attributes": {}}}
    reference = digest(manifest(), documents)
    assert digest(manifest(), {"x": documents["x"] | {"attributes": {"units": "m"}}}) == reference
    assert digest(manifest(), {"x": documents["x"] | {"shape": [24]}}) != reference
    assert digest(manifest(made={"shuffle": 1}), documents) != reference


@pytest.mark.parametrize("dtype", ["O", "U3", "S3", "M8[s]", "m8[s]", "c16", "g"])
def test_unusable_dtypes_are_refused_with_a_remedy(dtype):
    with pytest.raises(DataError, match=r"field 'z' has dtype .*(convert|store)"):
        storable("z", np.dtype(dtype))


def test_foreign_byte_order_becomes_native():
    assert storable("z", np.dtype(">f4")) == np.dtype("float32")
    assert storable("z", np.dtype(">f4")).isnative
