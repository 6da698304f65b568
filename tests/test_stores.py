"""Data sets and posteriors where clusters keep them: an object store over HTTP, a Zip archive, memory.

The directories of runs at URLs are tested by `test_run_urls.py`.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from command import (
    BAD_INPUT,
    INTERNAL,
    MODEL,
    STOPPED,
    assert_same_bits,
    dadvi,
    dadvi_process,
    ingest_options,
    write_table,
)
from objects import BUCKET, KEY, SECRET, Gate, objects, reached, system
from torch.distributions import Normal
from zarr.storage import MemoryStore, ZipStore

import dadvi as package
from dadvi.errors import DataError, WorkError

SETTINGS = ["--method", "advi", "--max-passes", "6", "--tol", "1e-6", "--seed", "2", "--quiet"]


@pytest.fixture(scope="module")
def gate(object_server) -> Iterator[Gate]:
    """What can make the object store fail."""
    with reached(object_server) as gate:
        yield gate


@pytest.fixture(scope="module")
def world(gate, tmp_path_factory) -> Path:  # noqa: ARG001  it needs the store
    """A table, ingested both to a directory and to the bucket, a model, and the serial fit of the directory."""
    directory = tmp_path_factory.mktemp("stores")
    write_table(directory / "table.csv")
    (directory / "model.py").write_text(MODEL)
    for out in (directory / "data.zarr", f"{BUCKET}/data.zarr"):
        ran = dadvi("ingest", directory / "table.csv", out, *ingest_options())
        assert (ran.code, ran.out) == (0, f"{out}\n"), ran.err
    ran = fit(directory, directory / "data.zarr", directory / "run", "--serial")
    assert ran.code == STOPPED, ran.err
    return directory


@pytest.fixture(autouse=True)
def whole(gate) -> Iterator[None]:
    yield
    gate.reset()


def fit(world: Path, data: object, out: Path, *options: object, run=dadvi):
    return run("fit", f"{world / 'model.py'}:model", data, "--out", out, *SETTINGS, *options)


# An object store ------------------------------------------------------------------------------------------------------


def test_two_workers_fit_from_an_object_store_with_the_bits_of_a_directory(world, gate, tmp_path):
    """And nothing that the fit writes or says has the credentials in it."""
    ran = fit(world, f"{BUCKET}/data.zarr", tmp_path / "run", "--workers", 2, "-v", run=without_quiet)
    assert ran.code == STOPPED, ran.err
    assert gate.reads > 0
    assert_same_bits(tmp_path / "run", world / "run")
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["data"]["location"] == f"{BUCKET}/data.zarr"
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    for text in [ran.out.encode(), ran.err.encode(), *written, *objects()]:
        assert KEY.encode() not in text
        assert SECRET.encode() not in text


def without_quiet(*arguments: object):
    return dadvi_process(*(each for each in arguments if each != "--quiet"))


def test_a_posterior_goes_to_an_object_store_and_back(world):
    posterior = package.load_posterior(world / "run" / "posterior.zarr")
    posterior.save(f"{BUCKET}/posterior.zarr")
    again = package.load_posterior(f"{BUCKET}/posterior.zarr")
    assert again.summary().equals(posterior.summary())
    assert dadvi("summary", f"{BUCKET}/posterior.zarr", "--json").out == dadvi("summary", world / "run", "--json").out
    with pytest.raises(DataError, match=r"s3://bucket/posterior\.zarr exists; choose another output"):
        posterior.save(f"{BUCKET}/posterior.zarr")
    posterior.save(f"{BUCKET}/posterior.zarr", overwrite=True)
    with pytest.raises(DataError, match=r"is a posterior, not a data set"):
        package.open_shards(f"{BUCKET}/posterior.zarr")


def test_an_object_store_that_fails_now_and_then_costs_retries_and_no_bits(world, gate, tmp_path):
    gate.reset(every=15)
    ran = fit(world, f"{BUCKET}/data.zarr", tmp_path / "run", "--serial")
    assert ran.code == STOPPED, ran.err
    assert gate.failed >= 2
    assert_same_bits(tmp_path / "run", world / "run")


def test_a_slow_object_store_costs_time_and_no_bits(world, gate, tmp_path):
    gate.reset(wait=0.02)
    ran = fit(world, f"{BUCKET}/data.zarr", tmp_path / "run", "--serial")
    assert ran.code == STOPPED, ran.err
    assert gate.reads > 0
    assert_same_bits(tmp_path / "run", world / "run")


def impatient(*arguments: object):
    """Run a command that waits half a second for an answer, and not as long as s3fs does."""
    return dadvi_process(*arguments, FSSPEC_S3=json.dumps({"config_kwargs": {"read_timeout": 0.5}}))


@pytest.mark.parametrize(("seconds", "run"), [(3.0, dadvi), (math.inf, impatient)], ids=["late", "never"])
def test_an_answer_of_an_object_store_that_comes_late_or_never_costs_time_and_no_bits(
    world, gate, tmp_path, seconds, run
):
    gate.reset(wait=seconds, only=20)
    ran = fit(world, f"{BUCKET}/data.zarr", tmp_path / "run", "--serial", run=run)
    assert ran.code == STOPPED, ran.err
    assert gate.reads > 20
    assert_same_bits(tmp_path / "run", world / "run")


def test_an_object_store_that_never_answers_ends_the_fit(world, gate, tmp_path, monkeypatch):
    """Of a request s3fs makes 25, and each of them as often as AWS_MAX_ATTEMPTS says."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    gate.reset(wait=math.inf)
    ran = fit(world, f"{BUCKET}/data.zarr", tmp_path / "run", "--serial", run=impatient)
    assert (ran.code, ran.out) == (INTERNAL, "")
    assert re.fullmatch(
        rf"error: field 'y', .* of {BUCKET}/data.zarr cannot be read: Read timeout on endpoint URL: .*; "
        r"check that the store can be reached.*\n",
        ran.err,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_goes_away_is_not_taken_for_damaged_data(world, monkeypatch):  # noqa: ARG001  it has the data
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    data = package.open_shards(f"{BUCKET}/data.zarr")
    nobody = {"endpoint_url": "http://127.0.0.1:9"}  # the discard port
    gone = package.sharding.ShardedDataset(data.location, data.manifest, data.digest, nobody)
    with pytest.raises(WorkError, match=r"cannot be read: Could not connect to the .*; check that the store can be r"):
        gone.read(0)


@pytest.mark.parametrize("who", [["--serial"], ["--workers", "1"]], ids=["serial", "worker"])
def test_an_object_store_that_goes_on_failing_ends_the_fit(world, gate, tmp_path, monkeypatch, who):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    gate.reset(every=1)
    ran = fit(world, f"{BUCKET}/data.zarr", tmp_path / "run", *who)
    assert (ran.code, ran.out) == (INTERNAL, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert f"of {BUCKET}/data.zarr cannot be read" in ran.err
    assert "check that the store can be reached" in ran.err
    assert SECRET not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_or_server_that_is_not_there(world, tmp_path, monkeypatch):
    ran = fit(world, "s3://nowhere/data.zarr", tmp_path / "run", "--serial")
    assert (ran.code, ran.out) == (BAD_INPUT, "")
    assert "s3://nowhere/data.zarr is not a Zarr group, or cannot be read" in ran.err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    ran = fit(world, f"{BUCKET}/data.zarr", tmp_path / "run", "--serial", run=dadvi_process)
    assert (ran.code, ran.out) == (BAD_INPUT, "")
    assert 'Could not connect to the endpoint URL: "http://127.0.0.1:9' in ran.err
    assert ran.err.count("\n") == 1
    assert SECRET not in ran.err


def test_an_ingest_that_fails_leaves_no_objects(world):
    ran = dadvi("ingest", world / "table.csv", f"{BUCKET}/broken.zarr", "--fields", "y z")
    assert ran.code == BAD_INPUT
    assert not system().find("bucket/broken.zarr")


# Other stores ---------------------------------------------------------------------------------------------------------


def mean_of_x() -> package.Model:
    return package.Model({"a": Normal(0.0, 1.0)}, lambda a: Normal(a, 1.0), observed="x")


def test_a_zip_archive_is_read_by_this_process_and_by_workers(tmp_path, process_clients):
    x = np.random.default_rng(0).standard_normal(4_000)
    written = package.write_shards(tmp_path / "data.zarr", {"x": x}, chunk_rows=500, shard_rows=1_000)
    archive = shutil.make_archive(os.fspath(tmp_path / "packed"), "zip", tmp_path / "data.zarr")
    data = package.open_shards(ZipStore(archive, mode="r"))
    assert data.manifest == written.manifest
    fits = [
        package.fit(mean_of_x(), each, client=client)
        for each, client in [(written, "serial"), (data, "serial"), (data, process_clients(2))]
    ]
    assert len({float(each.unconstrained.loc) for each in fits}) == 1
    assert float(fits[0].unconstrained.loc) == pytest.approx(x.sum() / 4_001, abs=1e-4)


def test_nothing_is_written_into_a_zip_archive(tmp_path):
    """What is in one cannot be replaced, so that it could be neither finished nor taken back."""
    with pytest.raises(DataError, match="write to a directory and pack"):
        package.write_shards(ZipStore(tmp_path / "new.zip", mode="w"), {"x": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_memory_holds_data_and_posterior():
    x = np.random.default_rng(0).standard_normal(1_000)
    store = MemoryStore()
    data = package.write_shards(store, {"x": x}, chunk_rows=100)
    posterior = package.fit(mean_of_x(), package.open_shards(store))
    target = MemoryStore()
    posterior.save(target)
    assert package.load_posterior(target).summary().equals(posterior.summary())
    assert data.num_rows == 1_000
    assert sorted(zarr.open_group(target, mode="r").array_keys())[-2:] == ["loc", "log_scale"]
