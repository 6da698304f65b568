"""Small local clusters that close what they opened."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import Any

import dask
from distributed import Client, LocalCluster
from distributed.utils import get_mp_context


@contextmanager
def local_client(**options: Any) -> Iterator[Client]:
    """Give a client of a new LocalCluster of single-threaded workers: local_client(processes=True, n_workers=2)."""
    free_port = {"dashboard_address": "127.0.0.1:0"}  # otherwise 8787, with a warning if another cluster has it
    with ExitStack() as stack:
        # Workers are forks of one process that has imported torch and dadvi, so that each starts at once.
        stack.enter_context(dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}))
        get_mp_context()  # Dask's own choice of what to import there, made at its first call
        get_context("forkserver").set_forkserver_preload(["distributed", "dadvi"])
        cluster = stack.enter_context(
            LocalCluster(threads_per_worker=1, dashboard_address=None, scheduler_kwargs=free_port, **options)
        )
        yield stack.enter_context(Client(cluster, set_as_default=False))
