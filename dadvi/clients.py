"""Clients of Dask clusters: connecting, local workers, which of them can be used, results gathered, what is lost."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any, TypeAlias

import dask
import torch
from distributed import CancelledError, Client, Future, LocalCluster, wait
from distributed.client import ClosedClientError
from distributed.comm import CommClosedError, get_address_host_port
from distributed.security import Security

from dadvi.errors import ClusterError, InputError, WorkError

ClientLike: TypeAlias = Client | str | None
"""Who works: a client, a scheduler's address or "serial", or None; see `make_executor`."""

SCHEDULER_LOST = (CancelledError, CommClosedError, ClosedClientError)
"""What Dask raises when the scheduler is gone, or another one has its address, which knows nothing of the tasks."""

WAIT_SECONDS = 30.0
"""How long tasks wait for a worker when there is none."""

POLL_SECONDS = 2.0
"""How often it is seen to whether a pass that takes long still has workers."""

REUSED_BYTES = 64 * 2**20
"""Memory that a worker keeps for the next chunk's arrays; Dask has workers give each back, and the system clear it."""


def gather(client: Client, futures: Sequence[Future], wait_seconds: float, remedy: str) -> list[Any]:
    """Return the results of tasks, in order. Without any worker they would wait for ever, so that has an end.

    Parameters
    ----------
    wait_seconds
        How long to wait for a worker when there is none.
    remedy
        What to do when there was none for so long, after having started some.

    Raises
    ------
    WorkError
        If there was no worker for `wait_seconds`; the tasks are cancelled then.

    """
    last_seen = time.monotonic()
    while True:
        try:
            with client.as_current():  # which `wait` asks for
                wait(futures, timeout=min(POLL_SECONDS, wait_seconds))
        except TimeoutError:
            now = time.monotonic()
            if workers_of(client):
                last_seen = now
            elif now >= last_seen + wait_seconds:
                client.cancel(futures)
                raise WorkError(
                    f"the scheduler at {client.scheduler.address} has had no workers for {now - last_seen:.0f} s; "
                    f"start some, and {remedy}"
                ) from None
            if not any(future.status == "error" for future in futures):
                continue
        return list(client.gather(futures))


@contextmanager
def losing_scheduler(address: str, remedy: str) -> Iterator[None]:
    """Tell that the scheduler was lost, and what to do after having started it, as a WorkError."""
    try:
        yield
    except SCHEDULER_LOST as error:
        raise WorkError(
            f"the scheduler at {address} was lost, and with it the tasks ({type(error).__name__}); start it, and "
            f"{remedy}"
        ) from error


def workers_of(client: Client) -> dict[str, int]:
    """Return the workers' threads by address; an error of `SCHEDULER_LOST` if the scheduler does not answer."""
    if client.scheduler is None:  # the client has given up to reach it
        raise ClosedClientError
    try:
        # Not client.scheduler_info: what it returns is refreshed meanwhile, and for a moment names no workers.
        workers = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    except OSError as error:
        raise CommClosedError(str(error)) from error
    return {address: worker["nthreads"] for address, worker in sorted(workers.items())}


def in_this_process(client: Client) -> bool:
    """Return whether the workers are threads of this process."""
    cluster = client.cluster
    return isinstance(cluster, LocalCluster) and not cluster.processes


def connect(address: str, timeout: float = 10.0) -> Client:
    """Return a client of the scheduler at `address`.

    Raises
    ------
    ClusterError
        If no scheduler answers there within `timeout` seconds.

    """
    try:
        # Before there is a client: one that never connected takes 20 s to end, and prints a traceback as it does.
        if not address.startswith(("inproc://", "ucx://")):
            get_address_host_port(address)
    except ValueError as error:
        raise ClusterError(
            f"scheduler address {address!r} cannot be used ({error}); give it as tcp://HOST:PORT"
        ) from error
    if address.startswith("tls://"):
        _check_certificate(address)
    try:
        return Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Dask scheduler answers at {address!r} within {timeout:g} s ({type(error).__name__}: {error}); "
            f"start one with `dask scheduler`, or leave the scheduler out to start local workers"
        ) from error


def _check_certificate(address: str) -> None:
    """Refuse to go to a tls address without what Dask's settings must bring: again before there is a client."""
    try:
        context = Security().get_connection_args("client")["ssl_context"]
        reason = "they name none" if context is None else ""
    except OSError as error:  # of the files, or of what is in them
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise ClusterError(
            f"the scheduler at {address!r} needs a certificate, and Dask's settings have none to show ({reason}); set "
            "distributed.comm.tls.ca-file, .client.cert and .client.key"
        )


def start_local(num_workers: int | None = None) -> tuple[Client, LocalCluster]:
    """Start single-threaded worker processes on this machine (default: one per core) and return a client of them."""
    settings = {
        **{f"distributed.nanny.pre-spawn-environ.MALLOC_{what}_THRESHOLD_": REUSED_BYTES for what in ("MMAP", "TRIM")},
        # Dask looks at what every worker does a hundred times a second, and takes a tenth of its time for it.
        "distributed.worker.profile.enabled": False,
    }
    with dask.config.set(settings):
        cluster = LocalCluster(
            n_workers=num_workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # any free port: None asks for 8787, warns if taken
        )
    # Directly, as workers on this machine can be reached: not by way of the scheduler.
    return Client(cluster, set_as_default=False, direct_to_workers=True), cluster


def find_workers(
    client: ClientLike, num_workers: int | None, *, small: bool
) -> tuple[Client | None, tuple[Client | LocalCluster, ...]]:
    """Return the client of who is to work, None for this process, and what has to be closed afterwards.

    Parameters
    ----------
    client, num_workers
        As in `make_executor`.
    small
        Whether this process does the work when neither is given.

    Raises
    ------
    InputError
        If both are given, or there is to be no worker.
    ClusterError
        If no scheduler answers at the address.

    """
    if num_workers is not None and (client is not None or num_workers < 1):
        what = f"client={client!r} brings its own workers" if client is not None else "at least 1 is needed"
        raise InputError(f"num_workers={num_workers}: {what}; leave it out, or give a number of local workers alone")
    if client == "serial" or (client is None and num_workers is None and small):
        return None, ()
    if isinstance(client, Client):
        return client, ()
    owned = start_local(num_workers) if client is None else (connect(client),)
    return owned[0], owned


def versions() -> dict[str, str]:
    """Return the versions that coordinator and workers must share."""
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "dadvi": metadata.version("dadvi"),
        "torch": torch.__version__.partition("+")[0],
    }


def check_workers(client: Client, wait_seconds: float) -> None:
    """Refuse a cluster without workers, or with a worker that lacks torch or dadvi or has another version.

    Raises
    ------
    ClusterError
        With the worker's address, what it has, and what is needed.

    """

    def installed() -> dict[str, str | None]:
        # Defined here so that it travels by value: a worker without dadvi can still answer.
        import sys
        from importlib import metadata

        found: dict[str, str | None] = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
        for package in ("dadvi", "torch"):
            try:
                found[package] = metadata.version(package).partition("+")[0]
            except metadata.PackageNotFoundError:
                found[package] = None
        return found

    try:
        client.wait_for_workers(1, timeout=wait_seconds)
    except TimeoutError as error:
        raise ClusterError(
            f"the scheduler at {client.scheduler.address} has no workers after {wait_seconds:g} s; start one with "
            "`dask worker`"
        ) from error
    needed = versions()
    for worker, found in client.run(installed).items():
        for package, version in needed.items():
            if found[package] != version:
                seen = f"has {package} {found[package]}" if found[package] else f"has no {package}"
                raise ClusterError(
                    f"worker {worker} {seen}; the coordinator has {version}. Install the same version on every worker"
                )
