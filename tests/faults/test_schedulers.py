"""Scheduler and workers as processes of their own, killed, stopped and started again in the middle of `dadvi fit`."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import interrupted
import pytest
from clusters import free_port, scheduler_process, worker
from command import INTERNAL, STOPPED, assert_same_bits, dadvi, listening, write_run
from distributed import Client

from dadvi.binding import bind_to
from dadvi.errors import WorkError
from dadvi.executors import DaskExecutor
from dadvi.passes import Gradient

SETTINGS = ["--method", "advi", "--batch-rows", "250", "--max-passes", "12", "--tol", "1e-9", "--seed", "3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with data.zarr, model.py, and a serial run, which others are to equal."""
    return write_run(tmp_path_factory.mktemp("schedulers"), *SETTINGS)


@contextmanager
def fitting(world: Path, address: str, cwd: Path) -> Iterator[subprocess.Popen]:
    """Run a fit as a process, of which a step is done."""
    what = [f"{world / 'model.py'}:model", world / "data.zarr", "--out", "run", "--scheduler", address]
    with listening("fit", *what, *SETTINGS, "-v", cwd=cwd) as running:
        while "ELBO" not in (line := running.stderr.readline()):
            assert line, "the fit ended before its first step"
        yield running


@pytest.mark.parametrize("back", [True, False], ids=["that comes back", "that stays away"])
def test_a_lost_scheduler_ends_the_fit_which_resumes_with_the_same_bits(world, tmp_path, back):
    """One that comes back, at the same address and with a worker, knows nothing of the tasks."""
    again = ["--port", str(free_port())]
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
    with (
        scheduler_process(tmp_path / "before", *again) as (scheduler, address),
        worker(address, tmp_path / "one"),
        fitting(world, address, tmp_path) as running,
    ):
        scheduler.kill()
        scheduler.wait(15)
        if not back:
            said = told_of_loss(running, tmp_path, address)
        with scheduler_process(tmp_path / "after", *again), worker(address, tmp_path / "two"):
            if back:
                said = told_of_loss(running, tmp_path, address)
            ran = dadvi("resume", tmp_path / "run", "--scheduler", address, "--quiet")
    assert ran.code == STOPPED, ran.err
    assert "Traceback" not in said
    assert_same_bits(tmp_path / "run", world / "serial")


def told_of_loss(running: subprocess.Popen, directory: Path, address: str) -> str:
    """Return what a fit says that has lost its scheduler: in bounded time, how to go on and one line of an error."""
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (INTERNAL, ""), err
    *_, resume, error = err.splitlines()
    assert resume.endswith(f"go on with: dadvi resume {directory / 'run'}")
    assert re.fullmatch(
        rf"error: (step|round|warm start).*: the scheduler at {address} was lost, .*; start it, and resume the run.*",
        error,
    )
    return err


def test_all_workers_lost_and_others_that_come_change_no_bit(world, tmp_path):
    with (
        scheduler_process(tmp_path) as (_, address),
        worker(address, tmp_path / "one") as one,
        worker(address, tmp_path / "two") as two,
        fitting(world, address, tmp_path) as running,
    ):
        for each in (one, two):
            each.kill()
            each.wait(15)
        time.sleep(1.0)
        assert running.poll() is None, "the fit was over before its workers were"
        with worker(address, tmp_path / "three"):
            _, err = running.communicate(timeout=60)
    assert running.returncode == STOPPED, err
    assert "Traceback" not in err
    assert_same_bits(tmp_path / "run", world / "serial")


def test_a_worker_that_is_stopped_for_a_while_changes_no_bit(world, tmp_path):
    with (
        scheduler_process(tmp_path) as (_, address),
        worker(address, tmp_path / "one") as one,
        worker(address, tmp_path / "two"),
        fitting(world, address, tmp_path) as running,
    ):
        one.send_signal(signal.SIGSTOP)
        try:
            time.sleep(5.0)
            assert running.poll() is None, "the fit did without the worker"
        finally:
            one.send_signal(signal.SIGCONT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == STOPPED, err
    assert_same_bits(tmp_path / "run", world / "serial")


def test_a_scheduler_lost_between_two_passes_is_told_by_the_next(data, tmp_path):
    """When the client has given up to reach it, too."""
    with (
        scheduler_process(tmp_path) as (scheduler, address),
        worker(address, tmp_path / "one"),
        Client(address, timeout=2.0, set_as_default=False) as client,
    ):
        bound = bind_to(interrupted.model(), data)
        point = Gradient(bound.model.start[None].numpy())
        executor = DaskExecutor(bound, data, client)
        executor.run(point)
        scheduler.kill()
        scheduler.wait(15)
        while client.status != "closed":
            time.sleep(0.05)
        for _ in range(2):
            with pytest.raises(WorkError, match=f"step 4: the scheduler at {address} was lost, .*start it, and resume"):
                executor.run(point, label="step 4")
