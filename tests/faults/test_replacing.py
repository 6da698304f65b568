"""A run that replaces an earlier one, killed at every step of it: neither is lost."""

import itertools
import os
from functools import partial
from pathlib import Path

import pytest

from dadvi.errors import DataError
from dadvi.runfiles import CHECKPOINT, LOCK, MOVING, POSTERIOR, SETTINGS, TRACE, LocalFiles, is_run

EARLIER = {SETTINGS: "earlier", TRACE: "rows", f"{POSTERIOR}/zarr.json": "result", f"{POSTERIOR}/loc/c/0": "numbers"}
KILLED = 77


def make_earlier(run):
    for name, text in EARLIER.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)


def content(run):
    return {str(path.relative_to(run)): path.read_text() for path in run.rglob("*") if path.is_file()}


def replace(run):
    """Do what a run does that replaces another one."""
    files = LocalFiles(run)
    files.lock(replacing=is_run(run))
    files.write(SETTINGS, b"new")
    files.write(CHECKPOINT, b"state")
    files.commit()
    files.unlock(undo=False)


def fail(run):
    """Do what a run does that fails before its first checkpoint."""
    files = LocalFiles(run)
    files.lock(replacing=is_run(run))
    files.write(SETTINGS, b"new")
    files.unlock(undo=True)


def killed_before(step, work, run):
    """Do some work in another process, which ends before a change to the file system; return whether it came to that.

    The process ends as a killed one does: nothing of what it holds is put in order.
    """
    child = os.fork()
    if not child:
        try:
            left = itertools.count(step - 1, -1)

            def counted(change, *arguments, **options):
                if next(left) == 0:
                    os._exit(KILLED)
                return change(*arguments, **options)

            for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
                setattr(os, name, partial(counted, getattr(os, name)))
            work(Path(run))
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def test_a_new_run_that_is_killed_leaves_the_earlier_or_its_own_checkpoint(tmp_path):
    outcomes = set()
    for step in itertools.count(1):
        run = tmp_path / f"run-{step}"
        make_earlier(run)
        killed = killed_before(step, replace, run)
        new = (run / CHECKPOINT).exists()
        LocalFiles(run).recover()
        assert is_run(run)
        if new:
            assert content(run)[SETTINGS] == "new"
            replace(run)
            assert content(run) == {SETTINGS: "new", CHECKPOINT: "state"}
        else:
            fail(run)
            assert content(run) == EARLIER
        outcomes.add((killed, new))
        if not killed:
            break
    assert outcomes == {(True, False), (True, True), (False, True)}
    assert step > 10  # each of the files is moved, the lock written and removed


def test_a_process_that_is_killed_as_it_brings_the_earlier_run_back_leaves_it(tmp_path):
    for step in itertools.count(1):
        run = tmp_path / f"run-{step}"
        make_earlier(run)
        killed = killed_before(step, fail, run)
        LocalFiles(run).recover()
        assert is_run(run)
        for again in itertools.count(1):  # so does the next one
            if not killed_before(again, fail, run):
                break
        assert content(run) == EARLIER
        if not killed:
            break
    assert step > 10


@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupt_before_the_first_checkpoint_loses_neither(tmp_path, begun):
    run = tmp_path / "run"
    make_earlier(run)
    files = LocalFiles(run)
    files.lock(replacing=True)
    if begun:
        files.write(SETTINGS, b"new")
    files.unlock(undo=False)  # as an interrupt does, after which a run can be resumed
    assert is_run(run)
    assert content(run)[SETTINGS] == ("new" if begun else "earlier")
    fail(run)
    assert content(run) == EARLIER


@pytest.mark.parametrize("moved", [POSTERIOR, SETTINGS])
def test_a_run_of_which_a_part_was_put_aside_is_whole_before_it_is_read(tmp_path, moved):
    run = tmp_path / "run"
    make_earlier(run)
    (run / MOVING).mkdir()
    (run / moved).rename(run / MOVING / moved)
    LocalFiles(run).recover()
    assert content(run) == EARLIER


def test_an_interrupt_before_a_first_run_has_begun_leaves_nothing(tmp_path):
    files = LocalFiles(tmp_path / "run")
    files.lock(replacing=False)
    files.write("model.py", b"x = 1")
    files.unlock(undo=False)
    assert not (tmp_path / "run").exists()


def test_a_directory_with_a_model_of_the_users_is_not_ours(tmp_path):
    (tmp_path / "model.py").write_text("x = 1")
    with pytest.raises(DataError, match="nothing that dadvi wrote"):
        LocalFiles(tmp_path).check(overwrite=True)


@pytest.mark.parametrize("left", [{}, {LOCK: ""}, {LOCK: "", "model.py": "x = 1"}, {LOCK: "", ".model.py.partial": ""}])
def test_a_directory_in_which_nothing_has_begun_is_free(tmp_path, left):
    run = tmp_path / "run"
    run.mkdir()
    for name, text in left.items():
        (run / name).write_text(text)
    assert not is_run(run)
    LocalFiles(run).check(overwrite=False)
    replace(run)
    assert content(run)[SETTINGS] == "new"
    assert LOCK not in content(run)
