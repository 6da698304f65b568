"""Small clusters that close what they opened: in one process, in several, and as `dask scheduler` and `dask worker`."""

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import dask
from command import environment
from distributed import Client, LocalCluster
from distributed.utils import get_mp_context

START_SECONDS = 60.0


def processes() -> ForkServerContext:
    """Return what starts processes as forks of one that has imported torch and dadvi, so that each starts at once."""
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        get_mp_context()  # Dask's own choice of what to import there, made at its first call
    context = get_context("forkserver")
    context.set_forkserver_preload(["distributed", "dadvi"])
    return context


def elsewhere(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what some work returns that is done in a process of its own, which ends with it."""
    with ProcessPoolExecutor(1, processes()) as pool:
        return pool.submit(work, *arguments).result(timeout=120)


@contextmanager
def local_client(**options: Any) -> Iterator[Client]:
    """Give a client of a new LocalCluster of single-threaded workers: local_client(processes=True, n_workers=2)."""
    free_port = {"dashboard_address": "127.0.0.1:0"}  # otherwise 8787, with a warning if another cluster has it
    with ExitStack() as stack:
        stack.enter_context(dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}))
        processes()
        cluster = stack.enter_context(
            LocalCluster(threads_per_worker=1, dashboard_address=None, scheduler_kwargs=free_port, **options)
        )
        yield stack.enter_context(Client(cluster, set_as_default=False))


@contextmanager
def process(arguments: Sequence[str], cwd: Path, **variables: str) -> Iterator[subprocess.Popen]:
    """Run `dask ARGUMENTS` while the body runs; end it by its id."""
    log = cwd / f"{arguments[0]}-{time.monotonic_ns()}.log"
    with log.open("wb") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments],
            cwd=cwd,
            env=environment(**variables),
            stdout=output,
            stderr=output,
        )
    with ending(started):
        yield started


@contextmanager
def ending(started: subprocess.Popen) -> Iterator[None]:
    """End a process by its id when the body has run."""
    try:
        yield
    finally:
        started.terminate()
        try:
            started.wait(15)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait(15)


@contextmanager
def daemon(arguments: Sequence[str], directory: Path, **variables: str) -> Iterator[None]:
    """Run a daemon in the foreground while the body runs; end it by its id."""
    log = directory / f"{Path(arguments[0]).name}.out"
    with log.open("wb") as output:
        started = subprocess.Popen(arguments, env=environment(**variables), stdout=output, stderr=output)
    with ending(started):
        yield
        assert started.poll() is None, log.read_text()


def free_port() -> int:
    """Return a port of the loopback that nobody listens on, below those that systems give to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)  # tests that run beside this one ask, too
        with suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


@contextmanager
def scheduler_process(directory: Path, *options: str, **variables: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run a scheduler on a free port of the loopback; give its process and its address."""
    file = directory / "scheduler.json"
    where = ["--host", "127.0.0.1", "--port", "0", "--no-show", "--scheduler-file", str(file)]
    dashboard = ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    with process(["scheduler", *dashboard, *where, *options], directory, **variables) as started:
        wait_for(lambda: json_of(file) is not None, started, "the scheduler")
        yield started, json_of(file)["address"]


@contextmanager
def worker(address: str, directory: Path, **variables: str) -> Iterator[subprocess.Popen]:
    """Run a worker with one thread and no nanny, whose process is the worker itself, in an empty directory."""
    directory.mkdir()
    options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1", "--local-directory", "."]
    with process(["worker", address, *options], directory, **variables) as started:
        log = next(directory.glob("worker-*.log"))
        wait_for(lambda: "Registered to" in log.read_text(), started, "a worker")
        yield started


def wait_for(ready: Callable[[], bool], started: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        assert started.poll() is None, f"{what} ended with code {started.returncode}"
        assert time.monotonic() < deadline, f"{what} did not start within {START_SECONDS} s"
        time.sleep(0.05)


def json_of(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):  # not there, or not whole yet
        return None
