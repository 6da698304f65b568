"""What the tests of faults fit: small data in many chunks, a hierarchy and a regression."""

import pytest
from interrupted import fields, model

from dadvi.sharding import write_shards


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("faults") / "data.zarr", fields(), chunk_rows=100, shard_rows=400)


@pytest.fixture
def fitted_model():
    return model()
