"""Directories of runs on an object store: the same files, whole or not at all, for one process at a time."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import interrupted
import pytest
from command import BAD_INPUT, STOPPED, dadvi, dadvi_process, environment, write_data
from interrupted import CASES, after_passes, told
from objects import BUCKET, KEY, SECRET, Gate, objects, reached, system

import dadvi as package
from dadvi.checkpoint import RunDirectory, decoded
from dadvi.errors import DataError, InputError, WorkError
from dadvi.runfiles import is_run
from dadvi.sharding import write_shards

RUN = f"{BUCKET}/run"
SETTINGS = ["--method", "advi", "--max-passes", "6", "--tol", "1e-6", "--seed", "2", "--serial"]


@pytest.fixture(scope="module", autouse=True)
def store(object_server) -> Iterator[Gate]:
    """What can make the object store fail."""
    with reached(object_server) as gate:
        yield gate


@pytest.fixture(autouse=True)
def empty(store) -> Iterator[None]:
    """Leave the store whole and empty."""
    yield
    store.reset()
    for name in system().find("bucket"):
        system().rm_file(name)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shards(
        tmp_path_factory.mktemp("urls") / "data.zarr", interrupted.fields(), chunk_rows=100, shard_rows=400
    )


@pytest.fixture(scope="module")
def quiet(data):
    """Return the posterior of a case, fitted without interruption and without a directory."""
    return {case: fit(data, case) for case in ("adam", "surrogate")}


def fit(data, case="surrogate", **options):
    return package.fit(interrupted.model(case), data, client="serial", seed=3, **CASES[case], **options)


def resume(data, case="surrogate", **options):
    return package.resume(RUN, interrupted.model(case), data, client="serial", **options)


def interrupt(data, case="surrogate", at=3, error=KeyboardInterrupt, **options):
    with after_passes(at, error), pytest.raises(type(error) if isinstance(error, Exception) else error):
        fit(data, case, run_dir=RUN, **options)


def contents(below: str = "bucket/run") -> dict[str, bytes]:
    return {name.removeprefix("bucket/run/"): system().cat_file(name) for name in system().find(below)}


def test_the_command_line_writes_the_files_of_a_local_run_and_no_credentials(tmp_path):
    table, model = write_data(tmp_path)
    for out in (tmp_path / "run", RUN):
        ran = dadvi("fit", f"{model}:model", table, "--out", out, *SETTINGS)
        assert (ran.code, ran.out) == (STOPPED, f"{out}/posterior.zarr\n"), ran.err
    local = tmp_path / "run"
    written = contents()
    assert written.keys() == {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()}
    for name in ("model.py", *(name for name in written if "/c/" in name)):
        assert written[name] == (local / name).read_bytes()
    for content in objects():
        assert KEY.encode() not in content
        assert SECRET.encode() not in content
    assert dadvi("summary", RUN, "--json").out == dadvi("summary", local, "--json").out
    ran = dadvi("fit", f"{model}:model", table, "--out", RUN, *SETTINGS, "--quiet")
    assert (ran.code, ran.out) == (BAD_INPUT, "")
    assert f"{RUN} exists; choose another output" in ran.err
    ran = dadvi("resume", f"{RUN}/", "--max-passes", "8", "--serial", "--json", "--quiet")
    assert (ran.code, json.loads(ran.out)["posterior"]) == (STOPPED, f"{RUN}/posterior.zarr"), ran.err
    assert package.load_posterior(f"{RUN}/posterior.zarr").passes > 6


def test_the_command_line_goes_on_where_a_run_has_begun_and_else_begins(tmp_path):
    """Whatever was there before: nothing, what a process leaves that is killed at once, or a run; and so again."""
    data, model = write_data(tmp_path)
    fit_or_go_on = ["fit", f"{model}:model", data, *SETTINGS, "--quiet", "--resume"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    with after_passes(math.inf) as count:
        whole = dadvi(*fit_or_go_on, "--out", tmp_path / "whole", "--json")
    assert whole.code == STOPPED, whole.err
    for out in (tmp_path / "run", RUN):
        with after_passes(count[0] // 2):
            ran = dadvi(*fit_or_go_on, "--out", out)
        assert (ran.code, ran.err) == (STOPPED, f"interrupted; go on with: dadvi resume {out}\n")
        for refused, says in [
            ([*fit_or_go_on, "--overwrite"], "--overwrite and --resume exclude one another"),
            ([*fit_or_go_on[:2], tmp_path / "other.zarr", *fit_or_go_on[3:]], "other.zarr does not exist"),
            ([each for each in fit_or_go_on if each != "--resume"], f"{out} exists; choose another output"),
        ]:
            ran = dadvi(*refused, "--out", out)
            assert ran.code == BAD_INPUT
            assert says in ran.err
        for passes in (math.inf, 1):  # the second time there is nothing to do
            with after_passes(passes):
                ran = dadvi(*fit_or_go_on, "--out", out, "--json")
            assert ran.code == STOPPED, ran.err
            assert {**json.loads(ran.out), "posterior": ""} == {**json.loads(whole.out), "posterior": ""}


@pytest.mark.parametrize("case", ["adam", "surrogate"])
def test_an_interrupted_fit_ends_with_the_same_bits(data, quiet, case):
    interrupt(data, case)
    assert is_run(RUN)
    known = decoded(contents()["checkpoint"], "checkpoint").trace
    assert contents()["trace.jsonl"].count(b"\n") == len(known) < len(quiet[case].records)
    assert told(resume(data, case)) == told(quiet[case])
    assert told(package.load_posterior(f"{RUN}/posterior.zarr")) == told(quiet[case])
    lines = [json.loads(line) for line in contents()["trace.jsonl"].splitlines()]
    assert [line["phase"] for line in lines] == quiet[case].trace.phase.tolist()
    assert "lock" not in contents()


def test_one_process_at_a_time_and_a_lock_without_its_process(data, quiet):
    """Whoever holds it is named; one that was killed on this machine loses it, one on another must be removed."""
    interrupt(data)
    holder = (
        "import sys; from dadvi.checkpoint import RunDirectory\n"
        "with RunDirectory.existing(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", holder, RUN]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"in use by another process \(process {process.pid} on .*, since 20"):
            resume(data)
        process.kill()
    lock = json.loads(contents()["lock"])
    assert lock["process"] == process.pid
    elsewhere = json.dumps({**lock, "host": "elsewhere"}).encode()
    system().pipe_file("bucket/run/lock", elsewhere)
    with pytest.raises(InputError, match=rf"on elsewhere, since .*If it was killed, remove the object {RUN}/lock"):
        resume(data)
    assert contents()["lock"] == elsewhere
    system().rm_file("bucket/run/lock")
    with RunDirectory.existing(RUN):
        system().pipe_file("bucket/run/lock", elsewhere)
    assert contents()["lock"] == elsewhere  # it is the other's
    system().pipe_file("bucket/run/lock", json.dumps(lock).encode())
    assert told(resume(data)) == told(quiet["surrogate"])


def test_a_killed_fit_goes_on(data, quiet):
    program = (
        "import interrupted, dadvi, sys\n"
        "data = dadvi.open_shards(sys.argv[1])\n"
        "dadvi.fit(interrupted.model('adam'), data, client='serial', seed=3, run_dir=sys.argv[2],"
        " checkpoint_seconds=0.0, **interrupted.CASES['adam'])"
    )
    arguments = [sys.executable, "-c", program, str(data.location), RUN]
    with subprocess.Popen(arguments, cwd=Path(interrupted.__file__).parent, env=environment()) as process:
        deadline = time.monotonic() + 60
        while not system().exists("bucket/run/checkpoint") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert "lock" in contents()
    assert told(resume(data, "adam")) == told(quiet["adam"])


def test_an_earlier_run_stays_until_the_new_one_has_a_checkpoint(data, quiet):
    fit(data, run_dir=RUN)
    before = contents()
    with pytest.raises(DataError, match=f"{RUN} exists"):
        fit(data, run_dir=RUN)
    interrupt(data, "adam", at=1, error=DataError("bad rows"), overwrite=True)
    assert contents() == before
    interrupt(data, "adam", at=5, overwrite=True)
    assert {"settings.json", "checkpoint"} <= contents().keys()
    assert not any(name.startswith("posterior.zarr") for name in contents())
    assert told(resume(data, "adam")) == told(quiet["adam"])
    interrupt(data, at=1, overwrite=True)  # before its first checkpoint: it begins from the beginning
    assert told(resume(data)) == told(quiet["surrogate"])


def test_a_fit_that_fails_at_once_leaves_nothing(data):
    interrupt(data, at=1, error=DataError("bad rows"))
    assert contents() == {}


def test_what_is_no_run_is_not_replaced(data):
    system().pipe_file("bucket/run/letter.txt", b"dear")
    with pytest.raises(DataError, match=f"{RUN} exists and is nothing that dadvi wrote"):
        fit(data, run_dir=RUN, overwrite=True)
    with pytest.raises(InputError, match=f"{RUN} is not the directory of a run"):
        resume(data)
    assert contents() == {"letter.txt": b"dear"}


@pytest.mark.parametrize("lost", ["checkpoint", "posterior.zarr"])
def test_a_store_that_fails_costs_the_work_since_the_last_checkpoint(data, quiet, store, monkeypatch, lost):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    interrupt(data)
    before = contents()["checkpoint"]
    store.reset(refused=f"PUT /bucket/run/{lost}")
    with pytest.raises(
        WorkError, match=rf"cannot write {RUN}/{lost}: .*; check that the store can be reached, then resume$"
    ):
        resume(data)
    assert store.failed
    assert (contents()["checkpoint"] == before) == (lost == "checkpoint")
    store.reset()
    assert told(resume(data)) == told(quiet["surrogate"])


def test_a_store_that_fails_before_the_first_checkpoint_leaves_nothing_to_resume(data, store, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store.reset(refused="PUT /bucket/run/checkpoint")
    with pytest.raises(WorkError, match=rf"cannot write {RUN}/checkpoint: .* can be reached, then fit again$"):
        fit(data, run_dir=RUN)
    assert contents() == {}


def test_a_posterior_without_its_description_is_none(data, quiet):
    """As when the process is killed while it writes the last of its objects."""
    fit(data, "adam", run_dir=RUN)
    interrupted_run = contents()
    group = json.loads(interrupted_run["posterior.zarr/zarr.json"])
    del group["attributes"]["dadvi_posterior"]
    system().pipe_file("bucket/run/posterior.zarr/zarr.json", json.dumps(group).encode())
    assert RunDirectory.existing(RUN).posterior() is None
    assert told(resume(data, "adam")) == told(quiet["adam"])


def test_a_store_or_bucket_that_is_not_there(data, monkeypatch, tmp_path):
    with pytest.raises(InputError, match=r"cannot write to s3://nowhere/run: .*bucket does not exist; choose another"):
        package.fit(interrupted.model(), data, client="serial", run_dir="s3://nowhere/run", **CASES["surrogate"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for arguments in (["resume", RUN, "--serial"], ["summary", RUN]):
        ran = dadvi_process(*arguments, cwd=tmp_path)
        assert (ran.code, ran.out) == (BAD_INPUT, "")
        assert f"error: {RUN} cannot be read: " in ran.err
        assert ran.err.count("\n") == 1
        assert SECRET not in ran.err
