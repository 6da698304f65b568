import os
import shutil

import numpy as np
import pytest
import zarr

from dadvi.errors import DataError
from dadvi.sharding import open_shards, write_shards
from dadvi.sharding import output as output_module
from dadvi.sharding.output import output

OLD, NEW = {"x": np.zeros(5)}, {"x": np.ones(7)}


def test_output_that_exists_is_refused_and_unchanged(tmp_path, refused):
    write_shards(tmp_path / "out", OLD)
    with refused("out exists", "overwrite=True", "--overwrite"):
        write_shards(tmp_path / "out", NEW)
    assert open_shards(tmp_path / "out").num_rows == 5


def assert_new_replaces_old(directory):
    write_shards(directory / "out", OLD)
    write_shards(directory / "out", NEW, overwrite=True)
    assert open_shards(directory / "out").num_rows == 7
    assert [path.name for path in directory.iterdir()] == ["out"]


def test_output_is_replaced_when_asked(tmp_path):
    assert_new_replaces_old(tmp_path)


def test_a_failure_keeps_what_was_there(tmp_path, refused):
    write_shards(tmp_path / "out", OLD)
    with refused("NaN"):
        write_shards(tmp_path / "out", {"x": np.array([1.0, np.nan])}, overwrite=True)
    assert open_shards(tmp_path / "out").read(0)["x"].sum() == 0


def test_data_can_be_shuffled_onto_themselves(tmp_path):
    write_shards(tmp_path / "out", {"i": np.arange(500)})
    write_shards(
        tmp_path / "out", {"i": zarr.open_array(tmp_path / "out", path="i", mode="r")}, shuffle=0, overwrite=True
    )
    order = open_shards(tmp_path / "out").read(0)["i"].tolist()
    assert order != list(range(500))
    assert sorted(order) == list(range(500))


def test_nothing_appears_before_the_end(tmp_path):
    with output(tmp_path / "out") as target:
        target.create_group()
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_zarr_group_is_never_overwritten(tmp_path, refused, overwrite):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("work")
    for name in ("home", "file"):
        with refused(f"{name} exists", "not overwritten"):
            write_shards(tmp_path / name, NEW, overwrite=overwrite)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_store_with_other_things_is_never_overwritten():
    store = zarr.storage.MemoryStore()
    zarr.create_array(store, shape=(3,), dtype="f4")
    with pytest.raises(DataError, match="not overwritten"):
        write_shards(store, NEW, overwrite=True)


def test_a_missing_parent_is_refused(tmp_path, refused):
    with refused("cannot write to", "create that directory"):
        write_shards(tmp_path / "no" / "out", NEW)


def test_a_read_only_store_is_refused():
    with pytest.raises(DataError, match="read-only"):
        write_shards(zarr.storage.MemoryStore(read_only=True), NEW)


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupted():
        with output(tmp_path / "out") as target:
            target.create_group()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def without_exchange(monkeypatch):
    """A system that cannot swap two directories at one stroke."""
    monkeypatch.setattr(output_module, "_exchanged", lambda _one, _other: False)


@pytest.mark.usefixtures("without_exchange")
def test_output_is_replaced_by_two_renames_where_it_must_be(tmp_path):
    assert_new_replaces_old(tmp_path)


@pytest.mark.usefixtures("without_exchange")
def test_the_old_comes_back_when_the_new_cannot_take_its_place(tmp_path, monkeypatch):
    write_shards(tmp_path / "out", OLD)
    rename = os.rename

    def fail_for_the_new(source, destination, **settings):
        if source.name.startswith(".out"):
            raise OSError(5, "Input/output error")
        rename(source, destination, **settings)

    monkeypatch.setattr(os, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="Input/output error"):
        write_shards(tmp_path / "out", NEW, overwrite=True)
    assert open_shards(tmp_path / "out").num_rows == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_new_is_on_the_disk_before_the_old_is_gone(tmp_path, monkeypatch):
    out, done = tmp_path / "out", []
    write_shards(out, OLD)
    exchanged, removed = output_module._exchanged, shutil.rmtree

    def exchange(new, old):
        assert {new, *new.rglob("*")} <= set(done)
        done.append("exchanged")
        return exchanged(new, old)

    def remove(path, **options):
        if "exchanged" in done:
            assert done[-1] == tmp_path
        removed(path, **options)

    monkeypatch.setattr(output_module, "flush", done.append)
    monkeypatch.setattr(output_module, "_exchanged", exchange)
    monkeypatch.setattr(shutil, "rmtree", remove)
    write_shards(out, NEW, overwrite=True)
    assert done[-2:] == ["exchanged", tmp_path]


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    staging = output_module.staged(out)
    (staging.__enter__() / "new").touch()
    write_shards(out, OLD)
    with pytest.raises(DataError, match="out exists; choose another output"):
        staging.__exit__(None, None, None)
    assert open_shards(out).num_rows == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
