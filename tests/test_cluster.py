"""A real cluster: `dask scheduler` and `dask worker` processes, used through `dadvi fit --scheduler`."""

import os
import re
import socket
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
from clusters import scheduler_process, worker
from command import BAD_INPUT, STOPPED, assert_same_bits, dadvi, listening, listing, write_run

from dadvi import clients, executors

SETTINGS = ["--method", "advi", "--max-passes", "12", "--tol", "1e-6", "--seed", "3"]  # stops, after some 120 steps


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with data.zarr, model.py, and serial, the run that every other is to equal."""
    return write_run(tmp_path_factory.mktemp("cluster"), *SETTINGS)


@pytest.fixture(scope="module")
def scheduler(world) -> Iterator[str]:
    """The address of a scheduler."""
    with scheduler_process(world) as (_, address):
        yield address


def fit_arguments(world: Path, address: str, *options: object) -> list[str]:
    return [
        "fit",
        f"{world / 'model.py'}:model",
        str(world / "data.zarr"),
        "--out",
        "run",
        "--scheduler",
        address,
        *options,
    ]


def test_two_workers_give_the_bits_of_none_and_so_do_they_when_one_is_killed(world, scheduler, tmp_path, monkeypatch):
    """The model's file lies where no worker looks; it reaches them by value."""
    with worker(scheduler, tmp_path / "one") as one, worker(scheduler, tmp_path / "two"):
        healthy = tmp_path / "healthy"
        healthy.mkdir()
        monkeypatch.chdir(healthy)
        ran = dadvi(*fit_arguments(world, scheduler, "--quiet", *SETTINGS))
        assert (ran.code, ran.out) == (STOPPED, "run/posterior.zarr\n"), ran.err
        assert re.fullmatch(r"stopped: max_passes=12 reached, .*\n", ran.err)
        assert_same_bits(healthy / "run", world / "serial")
        for each in ("one", "two"):
            assert "model" not in " ".join(listing(tmp_path / each))

        killed = tmp_path / "killed"
        killed.mkdir()
        with listening(*fit_arguments(world, scheduler, *SETTINGS), cwd=killed) as running:
            first = running.stderr.readline()
            assert "ELBO" in first, first  # the first of its steps is done
            one.kill()
            one.wait(15)
            assert running.poll() is None, "the fit was over before the worker was killed"
            out, err = running.communicate(timeout=120)
        assert running.returncode == STOPPED, err
        assert out == "run/posterior.zarr\n"
        assert "Traceback" not in err
        assert_same_bits(killed / "run", world / "serial")


# What cannot be used --------------------------------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch) -> None:
    """Give up on schedulers and workers at once: what is tested is how, not when."""
    monkeypatch.setattr(clients, "connect", partial(clients.connect, timeout=1.0))
    check = clients.check_workers
    monkeypatch.setattr(executors, "check_workers", lambda client, wait_seconds: check(client, min(wait_seconds, 0.5)))


def refused(world: Path, address: str, directory: Path, monkeypatch) -> str:
    """Run a fit that must be refused, with one line, leaving nothing; return the line."""
    monkeypatch.chdir(directory)
    before = listing(directory)
    ran = dadvi(*fit_arguments(world, address))
    assert (ran.code, ran.out) == (BAD_INPUT, ""), ran.err
    assert listing(directory) == before
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    return ran.err


@pytest.mark.usefixtures("soon")
def test_a_scheduler_that_is_not_there(world, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    line = refused(world, address, tmp_path, monkeypatch)
    assert f"no Dask scheduler answers at '{address}' within 1 s" in line
    assert "start one with `dask scheduler`" in line


class NoClient:
    def __init__(self, *_arguments: object, **_settings: object) -> None:
        pytest.fail("a client was made")


@pytest.mark.parametrize("address", ["nowhere", "tcp://127.0.0.1", "udp://127.0.0.1:1", "tcp://127.0.0.1:port"])
def test_what_is_not_an_address(world, tmp_path, monkeypatch, address):
    # A client that never connected would take 20 s to end, and print a traceback as it does: there must be none.
    monkeypatch.setattr(clients, "Client", NoClient)
    line = refused(world, address, tmp_path, monkeypatch)
    assert f"scheduler address '{address}' cannot be used" in line
    assert line.endswith("give it as tcp://HOST:PORT\n")


@pytest.mark.usefixtures("soon")
def test_a_scheduler_without_workers(world, scheduler, tmp_path, monkeypatch):
    line = refused(world, scheduler, tmp_path, monkeypatch)
    assert f"the scheduler at {scheduler} has no workers after 0.5 s; start one with `dask worker`" in line


IMPOSTOR = """\
import importlib.metadata as metadata
import sys

real = metadata.version
answers = {answers!r}


def version(package):
    if package not in answers:
        return real(package)
    if answers[package] is None:
        raise metadata.PackageNotFoundError(package)
    return answers[package]


metadata.version = version
for package, answer in answers.items():
    if answer is None:
        sys.modules[package] = None  # import fails
"""


@pytest.mark.parametrize(
    ("answers", "seen", "needed"),
    [
        ({"dadvi": "0.0.1"}, "has dadvi 0.0.1", metadata.version("dadvi")),
        ({"torch": None}, "has no torch", metadata.version("torch").partition("+")[0]),
        ({"torch": None, "dadvi": None}, "has no dadvi", metadata.version("dadvi")),
    ],
)
def test_a_worker_with_other_software(world, scheduler, tmp_path, monkeypatch, answers, seen, needed):
    """It is named, with what it has and what it needs; its processes cannot even import what they lack."""
    trick = tmp_path / "trick"
    trick.mkdir()
    (trick / "sitecustomize.py").write_text(IMPOSTOR.format(answers=answers))
    with worker(scheduler, tmp_path / "worker", PYTHONPATH=os.fspath(trick)):
        work = tmp_path / "work"
        work.mkdir()
        line = refused(world, scheduler, work, monkeypatch)
    pattern = rf"error: worker tcp://127\.0\.0\.1:\d+ {re.escape(seen)}; the coordinator has {re.escape(needed)}\. "
    assert re.match(pattern + "Install the same version on every worker\n", line), line
