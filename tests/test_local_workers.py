"""The worker processes that dadvi starts itself."""

import resource

import dask
import pytest
import torch

from dadvi.clients import start_local

TIMES, PAGES = 50, 256
"""Arrays made one after the other, and 4 KiB pages of each."""


def page_faults() -> int:
    """Return how many pages the system had to provide while arrays of 1 MiB were made and dropped, after a first."""
    torch.ones(PAGES * 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        torch.ones(PAGES * 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture
def first(monkeypatch):
    """A process that has started no cluster: settings of one stay in its environment and in its fork server."""
    for what in ("MMAP", "TRIM"):
        monkeypatch.delenv(f"MALLOC_{what}_THRESHOLD_", raising=False)
    with dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}):
        yield


@pytest.mark.usefixtures("first")
def test_memory_of_a_chunks_arrays_is_used_again_for_the_next():
    client, cluster = start_local(1)
    with cluster, client:
        (faults,) = client.run(page_faults).values()
    assert faults < TIMES * PAGES / 10
