"""A disk that is full, in earnest: an error that tells the remedy, and a run that goes on to the same bits."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import elsewhere
from command import CONVERGED, INTERNAL, STOPPED, Ran, dadvi, write_data
from full_disk import OTHER, dadvi_into_full_disk
from interrupted import told

from dadvi import load_posterior
from dadvi.checkpoint import decoded

METHODS = {
    "anchored": ["--method", "anchored", "--tol", "0.001"],
    "advi": ["--method", "advi", "--max-passes", "8", "--tol", "1e-6"],
}
FILES = {"save": "checkpoint", "append": "trace.jsonl", "finish": "posterior.zarr"}
"""What is being written when the disk is full."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with a data set, a model, and a quiet run of each method, which the others are to equal."""
    directory = tmp_path_factory.mktemp("full")
    write_data(directory)
    for method in METHODS:
        ran = dadvi(*fit_arguments(directory, method, directory / method))
        assert ran.code == (STOPPED if method == "advi" else CONVERGED), ran.err
    return directory


def fit_arguments(world: Path, method: str, run: Path) -> list[object]:
    settings = [*METHODS[method], "--seed", "2", "--serial", "--quiet", "--checkpoint-seconds", "0"]
    return ["fit", f"{world / 'model.py'}:model", world / "data.zarr", "--out", run, *settings]


def assert_kept(ran: Ran, run: Path, before: Path, named: str, reason: str) -> None:
    """Assert that a run ended for want of room, said so, and is as it was before."""
    assert (ran.code, ran.out) == (INTERNAL, ""), ran.err
    go_on, error = ran.err.splitlines()
    assert go_on == f"the run is kept as far as it came; go on with: dadvi resume {run}"
    written = f"cannot write {run / named}: {reason}; what was there before is as it was"
    assert error == f"error: {written}. Make room, then resume"
    assert (run / "checkpoint").read_bytes() == before.read_bytes()
    decoded(before.read_bytes(), "checkpoint")  # or it would be refused
    assert not (run / "posterior.zarr").exists()
    assert not list(run.glob(".*"))


def assert_resumed(run: Path, quiet: Path) -> None:
    """Assert that a run, once there is room, ends as if it had never stopped, with all of its files."""
    expected = load_posterior(quiet / "posterior.zarr")
    ran = dadvi("resume", run, "--serial", "--quiet")
    assert ran.code == (STOPPED if expected.status == "stopped" else CONVERGED), ran.err
    assert told(load_posterior(run / "posterior.zarr")) == told(expected)
    lines, others = ((each / "trace.jsonl").read_text().splitlines() for each in (run, quiet))
    assert [json.loads(line)["phase"] for line in lines] == [json.loads(line)["phase"] for line in others]
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in quiet.iterdir())


@pytest.mark.parametrize(
    ("method", "what", "number"),
    [("advi", "save", 2), ("advi", "append", 2), ("anchored", "append", 1), ("anchored", "finish", 1)],
)
def test_a_file_that_can_grow_no_further_ends_a_run_that_goes_on(world, tmp_path, method, what, number):
    run, before = tmp_path / "run", tmp_path / "before"
    ran = elsewhere(dadvi_into_full_disk, "size", what, number, run, before, *fit_arguments(world, method, run))
    # Whatever stops stochastic ADVI, it tries to write a last checkpoint: then that is what has no room.
    named = FILES["save" if (method, what) == ("advi", "append") else what]
    assert_kept(ran, run, before, named, "File too large")
    assert_resumed(run, world / method)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_cannot_grow_before_the_first_checkpoint_leaves_nothing_to_resume(world, tmp_path, method):
    run = tmp_path / "run"
    ran = elsewhere(
        dadvi_into_full_disk, "size", "save", 1, run, tmp_path / "before", *fit_arguments(world, method, run)
    )
    written = f"cannot write {run / 'checkpoint'}: File too large; what was there before is as it was"
    assert (ran.code, ran.out, ran.err) == (INTERNAL, "", f"error: {written}. Make room, then fit again\n")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small disk of its own."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k,nr_inodes=100", "tmpfs", where], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize(
    ("how", "method", "what", "number"),
    [("bytes", "advi", "save", 2), ("bytes", "anchored", "finish", 1), ("files", "anchored", "finish", 1)],
)
def test_a_full_disk_ends_a_run_that_goes_on(world, disk, tmp_path, how, method, what, number):
    run, before = disk / "run", tmp_path / "before"
    ran = elsewhere(dadvi_into_full_disk, how, what, number, run, before, *fit_arguments(world, method, run))
    assert_kept(ran, run, before, FILES[what], "No space left on device")
    for file in disk.glob(f"{OTHER}*"):
        file.unlink()
    assert_resumed(run, world / method)
