"""Fixtures for all tests: small data sets on disk, a cluster in this process or in others, an object store."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from clusters import local_client
from distributed import Client
from objects import Gate, Server, object_store, reached

from dadvi.sharding import ShardedDataset, write_shards


@pytest.fixture
def write(tmp_path) -> Callable[..., ShardedDataset]:
    """Write arrays as a data set under tmp_path: write({"x": x}, chunk_rows=8, shard_rows=16)."""

    def write_fields(fields: dict[str, Any], name: str = "data.zarr", **options: Any) -> ShardedDataset:
        return write_shards(tmp_path / name, fields, **options)

    return write_fields


@pytest.fixture
def float64() -> Iterator[None]:
    """Tensors of a test are float64 unless told."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def thread_client() -> Iterator[Client]:
    """A client of one worker that is a thread of this process: cheap, and it shares this process's memory."""
    with local_client(processes=False, n_workers=1) as client:
        yield client


@pytest.fixture(scope="module")
def process_clients() -> Iterator[Callable[[int], Client]]:
    """Start worker processes: process_clients(2) is a client of two. A cluster lives as long as the module's tests."""
    with ExitStack() as stack:
        started: dict[int, Client] = {}

        def client_of(num_workers: int) -> Client:
            if num_workers not in started:
                started[num_workers] = stack.enter_context(local_client(processes=True, n_workers=num_workers))
            return started[num_workers]

        yield client_of


@pytest.fixture(scope="session")
def object_server() -> Iterator[Server]:
    """An object store, to be used through `objects.reached`."""
    with object_store() as server:
        yield server


@pytest.fixture
def bucket(object_server) -> Iterator[Gate]:
    """An empty bucket on it, for one test; gives what can make the object store fail."""
    with reached(object_server) as gate:
        yield gate
