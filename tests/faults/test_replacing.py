"""A run or a data set that replaces an earlier one, killed at every step of it: neither is lost."""

import itertools
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from interrupted import killed_before

import dadvi
from dadvi.errors import DataError
from dadvi.runfiles import CHECKPOINT, LOCK, MOVING, POSTERIOR, SETTINGS, TRACE, LocalFiles, is_run

EARLIER = {SETTINGS: "earlier", TRACE: "rows", f"{POSTERIOR}/zarr.json": "result", f"{POSTERIOR}/loc/c/0": "numbers"}


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


# Data sets ------------------------------------------------------------------------------------------------------------


def write_anew(_table, out, rows):
    dadvi.write_shards(out, {"x": np.full(rows, float(rows))}, chunk_rows=10, shard_rows=20, overwrite=True)


def ingest_anew(table, out, _rows):
    dadvi.ingest(table, out, client="serial", chunk_rows=10, shard_rows=20, overwrite=True)


@pytest.mark.skipif(sys.platform != "linux", reason="only there directories are exchanged")
@pytest.mark.parametrize("replace_data", [write_anew, ingest_anew])
def test_a_data_set_that_is_killed_as_it_replaces_another_leaves_one_of_them(tmp_path, replace_data):
    """Under its own name, whole."""
    table, old, new = tmp_path / "table.csv", 30, 50
    pd.DataFrame({"x": np.full(new, float(new))}).to_csv(table, index=False)
    found = []
    for step in itertools.count(1):
        out = tmp_path / f"{step}" / "data.zarr"
        out.parent.mkdir()
        write_anew(table, out, old)
        killed = killed_before(step, replace_data, table, out, new)
        data = dadvi.open_shards(out)
        rows = torch.cat([data.read(chunk)["x"] for chunk in range(data.manifest.num_chunks)])
        found.append(data.num_rows)
        assert rows.tolist() == [data.num_rows] * data.num_rows
        assert all(path.name.startswith(".") for path in out.parent.iterdir() if path != out)
        if not killed:
            break
    assert set(found) == {old, new}
    assert found == sorted(found)
    assert step > 20
    assert [path.name for path in out.parent.iterdir()] == ["data.zarr"]
