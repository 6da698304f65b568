"""An interrupted fit goes on to the result that it would have had: wherever it stopped, by whatever worker."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import interrupted
import numpy as np
import pytest
import torch
import zarr
from interrupted import CASES, after_passes, begin_or_go_on, fields, in_a_process, told
from torch.distributions import Bernoulli, Normal

import dadvi
from dadvi import anchored
from dadvi.checkpoint import RunDirectory
from dadvi.errors import DataError, InputError, ModelError, WorkError
from dadvi.runfiles import is_run
from dadvi.sharding import write_shards

KILLED = ("adam", "surrogate")
"""Cases whose coordinator is killed, one of each method."""

KILLS = int(os.environ.get("DADVI_KILLS", "10"))
"""How often each of them is killed. With more than 10 it is the long version, which kills and interrupts every case."""

LONG = KILLS > 10


@pytest.fixture(scope="module")
def quiet(data):
    """Return the posterior of a case, fitted without interruption and without a directory; and how many passes."""
    found = {}

    def quiet_fit(case):
        if case not in found:
            with after_passes(float("inf")) as count:
                found[case] = dadvi.fit(interrupted.model(case), data, client="serial", seed=3, **CASES[case]), count[0]
        return found[case]

    return quiet_fit


def start(data, run, case, error=KeyboardInterrupt, at=4, **options):
    with after_passes(at, error), pytest.raises(error if isinstance(error, type) else type(error)):
        dadvi.fit(interrupted.model(case), data, client="serial", seed=3, run_dir=run, **CASES[case], **options)


@pytest.mark.parametrize("case", CASES if LONG else ["surrogate", "hierarchy", "adam", "proximal"])
def test_an_interrupted_fit_ends_with_the_same_bits(data, quiet, tmp_path, case):
    expected, passes = quiet(case)
    for at in sorted({1, 2, passes // 2, passes}) if LONG else [max(2, passes // 2)]:
        run = tmp_path / f"run-{at}"
        start(data, run, case, at=at)
        assert is_run(run)
        assert told(begin_or_go_on(data.location, run, case)) == told(expected)
        again = dadvi.load_posterior(run / "posterior.zarr")
        assert told(again) == told(expected)
        lines = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
        assert [line["phase"] for line in lines] == expected.trace.phase.tolist()


@pytest.mark.parametrize("case", ["surrogate", "adam"])
def test_a_trace_whose_last_line_is_torn_is_whole_again(data, quiet, tmp_path, case):
    """As after a power cut: its lines are not flushed to the disk one by one, but the checkpoint has them."""
    run, (expected, passes) = tmp_path / "run", quiet(case)
    start(data, run, case, at=passes)
    trace = run / "trace.jsonl"
    before = trace.read_bytes()
    assert before
    trace.write_bytes(before[:-30] + bytes(20))  # zeros of a block that was allocated, and not yet written
    assert told(begin_or_go_on(data.location, run, case)) == told(expected)
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [line["phase"] for line in lines] == expected.trace.phase.tolist()


@pytest.mark.parametrize("case", CASES if LONG else ["hierarchy", "surrogate", "anchor", "dowg"])
def test_a_fit_goes_on_on_another_number_of_workers(data, quiet, tmp_path, process_clients, case):
    expected, passes = quiet(case)
    start(data, tmp_path / "run", case, at=max(2, passes // 2))
    resumed = dadvi.resume(
        tmp_path / "run", interrupted.model(case), data, client=process_clients(2), method=CASES[case]["method"]
    )
    assert told(resumed) == told(expected)
    assert resumed.trace.forward.is_monotonic_increasing  # the seconds of before count too


@pytest.mark.parametrize("case", ["anchor"])
def test_a_fit_interrupted_again_and_again(data, quiet, tmp_path, case):
    expected, passes = quiet(case)
    run, rng = tmp_path / "run", random.Random(1)
    for _ in range(4):
        try:
            with after_passes(rng.randrange(1, passes)):
                posterior = begin_or_go_on(data.location, run, case)
                break
        except KeyboardInterrupt:
            assert is_run(run)
    else:
        posterior = begin_or_go_on(data.location, run, case)
    assert told(posterior) == told(expected)


def test_the_last_resort_goes_on_without_a_pass_lost(data, tmp_path, monkeypatch):
    monkeypatch.setattr(anchored, "MOST_REJECTED", 0)  # no step is tried: it is L-BFGS from the start
    fit = partial(dadvi.fit, interrupted.model(), data, client="serial", seed=3, **CASES["surrogate"])
    with after_passes(float("inf")) as count:
        expected = fit()
    assert (expected.trace.phase == "descent").sum() > 4
    made = []
    for at in (3, 5) if LONG else (4,):
        with after_passes(at), pytest.raises(KeyboardInterrupt):
            fit(run_dir=tmp_path / f"run-{at}")
        with after_passes(float("inf")) as rest:
            resumed = dadvi.resume(tmp_path / f"run-{at}", interrupted.model(), data, client="serial")
        assert told(resumed) == told(expected)
        made.append(at - 1 + rest[0])
    assert set(made) == {count[0]}


@pytest.mark.parametrize(("case", "first"), [("surrogate", 2.2), ("anchor", 5)])
def test_a_stopped_fit_goes_on_with_more_passes(data, tmp_path, case, first):
    settings = {**CASES[case], "tol": 1e-9}
    fit = partial(dadvi.fit, interrupted.model(case), data, client="serial", seed=3)

    def stopped_then_resumed(run, interrupted_at=None):
        stopped = fit(**{**settings, "max_passes": first}, run_dir=run)
        assert stopped.status == "stopped"
        resume = partial(dadvi.resume, run, interrupted.model(case), data, client="serial")
        with after_passes(1):  # nothing is fitted
            assert told(resume()) == told(stopped)
        if interrupted_at is not None:
            with after_passes(interrupted_at), pytest.raises(KeyboardInterrupt):
                resume(max_passes=9)
            return resume()
        return resume(max_passes=9)

    resumed = stopped_then_resumed(tmp_path / "run", interrupted_at=2)
    # Stochastic ADVI cuts its last stretch short where passes end, and its schedule is made for them.
    expected = stopped_then_resumed(tmp_path / "quiet") if case == "anchor" else fit(**{**settings, "max_passes": 9})
    assert told(resumed) == told(expected)
    assert resumed.passes > first + 1
    assert dadvi.load_posterior(tmp_path / "run" / "posterior.zarr").settings["max_passes"] == 9


def test_a_cosine_has_an_end(data, tmp_path):
    method = dadvi.ADVI(batch_rows=400, schedule="cosine")
    run = tmp_path / "run"
    dadvi.fit(interrupted.model(), data, method=method, client="serial", max_passes=4, run_dir=run)
    with pytest.raises(InputError, match="cosine"):
        dadvi.resume(run, interrupted.model(), data, client="serial", max_passes=8)


@pytest.mark.parametrize("case", CASES if LONG else KILLED)
def test_a_coordinator_killed_at_random_moments(data, quiet, tmp_path, case):
    """It is killed as it begins and as it goes on, before its first checkpoint and after; bits are compared each time.

    Moments are drawn from the seconds that the two parts take. One that comes after the end of a process kills nothing,
    and is not counted.
    """
    expected, _ = quiet(case)
    with in_a_process(data.location, tmp_path / "whole", case) as (process, _):
        before = until(lambda: (tmp_path / "whole" / "checkpoint").exists(), process)
        after = until(lambda: False, process)
        assert process.exitcode == 0
    rng, kills, gone_on, runs = random.Random(7), 0, 0, itertools.count()
    run = tmp_path / f"run-{next(runs)}"
    deadline = time.monotonic() + 20 * KILLS
    while kills < KILLS:
        assert time.monotonic() < deadline, f"only {kills} of {KILLS} processes were killed as they worked"
        was = written(run / "checkpoint")
        with in_a_process(data.location, run, case) as (process, _):
            if rng.random() < 0.3:
                until(lambda: False, process, rng.uniform(0, before))
            else:
                until(lambda: written(run / "checkpoint") not in (None, was), process)  # noqa: B023
                until(lambda: False, process, rng.uniform(0, after))
            process.kill()
            process.join()
            killed = process.exitcode == -signal.SIGKILL
            assert killed or process.exitcode == 0
        if killed and run.exists():  # and not before it had begun
            kills += 1
            gone_on += was is not None
            assert is_run(run) or not (run / "settings.json").exists()
        elif killed:
            continue
        unfinished = not (run / "posterior.zarr").exists()
        if not killed or kills % 3 == 0 or kills == KILLS:
            assert told(begin_or_go_on(data.location, run, case)) == told(expected)
            assert told(dadvi.load_posterior(run / "posterior.zarr")) == told(expected)
            assert not unfinished or not list(run.glob(".*"))
            run = tmp_path / f"run-{next(runs)}"
    assert gone_on > 0


@pytest.mark.parametrize("case", CASES if LONG else KILLED)
def test_a_coordinator_killed_as_it_writes(data, quiet, tmp_path, case):
    """Before any call that opens, writes, flushes, renames or removes: moments that time alone would seldom meet."""
    expected, _ = quiet(case)
    killed_in = partial(in_a_process, data.location, case=case, every=0.0)
    with killed_in(run=tmp_path / "whole") as (process, told_by):
        calls = told_by.recv()
    assert calls > 100
    for number in random.Random(8).sample(range(1, calls + 1), KILLS):
        run = tmp_path / f"run-{number}"
        with killed_in(run=run, killed_at=number) as (process, _):
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
        ended = (run / "posterior.zarr").exists()
        assert is_run(run) or not (run / "settings.json").exists()
        assert told(begin_or_go_on(data.location, run, case)) == told(expected)
        assert ended or not list(run.glob(".*"))


def until(ready, process, at_most=60.0):
    """Return the seconds until something is so, a process has ended, or so many have gone by."""
    started = time.monotonic()
    while not ready() and process.exitcode is None and time.monotonic() < started + at_most:
        process.join(0.005)
    return time.monotonic() - started


def written(file):
    """Return when a file was written; None if there is none."""
    return file.stat().st_mtime_ns if file.exists() else None


def test_what_a_finished_run_left_to_tidy_is_tidied(data, quiet, tmp_path):
    """As it is where the process was killed between the result and the removal of what led to it."""
    run, (expected, _) = tmp_path / "run", quiet("hierarchy")
    start(data, run, "hierarchy", at=2)
    checkpoint = (run / "checkpoint").read_bytes()
    begin_or_go_on(data.location, run, "hierarchy")
    trace = (run / "trace.jsonl").read_bytes()
    (run / "checkpoint").write_bytes(checkpoint)
    (run / "trace.jsonl").write_bytes(trace[: len(trace) // 2])
    assert told(begin_or_go_on(data.location, run, "hierarchy")) == told(expected)
    assert {path.name for path in run.iterdir()} == {"settings.json", "trace.jsonl", "posterior.zarr"}
    assert (run / "trace.jsonl").read_bytes() == trace


# What a run refuses ----------------------------------------------------------------------------------------------


def other_likelihood():
    return dadvi.Model(
        prior={"a": Normal(0.0, 1.0)}, likelihood=lambda a, x: Bernoulli(logits=a + 2 * x[:, 0]), observed="y"
    )


def test_a_changed_model_is_refused_by_name(data, tmp_path):
    start(data, tmp_path / "run", "adam")
    with pytest.raises(ModelError, match="they differ in the prior of 'beta'; give"):
        dadvi.resume(tmp_path / "run", interrupted.model(prior_sd=2.5), data, client="serial")
    with pytest.raises(ModelError, match=r"the prior of 'a', .*the likelihood"):
        dadvi.resume(tmp_path / "run", other_likelihood(), data, client="serial")


def test_changed_data_are_refused(data, tmp_path):
    start(data, tmp_path / "run", "adam")
    fewer = write_shards(tmp_path / "fewer.zarr", fields(3_000), chunk_rows=100, shard_rows=400)
    one_value = fields()
    one_value["x"][len(one_value["x"]) // 2, 0] += 1
    other = write_shards(tmp_path / "other.zarr", one_value, chunk_rows=100, shard_rows=400)
    for changed, said in ((fewer, "3000 rows"), (other, "fields, chunks, rows or origin differ")):
        with pytest.raises(DataError, match=said):
            dadvi.resume(tmp_path / "run", interrupted.model(), changed, client="serial")


def test_changed_rows_of_data_that_are_not_ours_are_refused(tmp_path):
    groups = []
    for name, seed in (("before", 0), ("after", 1)):
        group = zarr.create_group(tmp_path / f"{name}.zarr")
        for field, values in fields(seed=seed).items():
            group.create_array(field, data=values, chunks=(100, *values.shape[1:]))
        groups.append(dadvi.open_shards(tmp_path / f"{name}.zarr"))
    before, after = groups
    assert before.digest == after.digest  # nothing but the rows tells them apart
    start(before, tmp_path / "run", "adam")
    with pytest.raises(DataError, match=r"rows of .* are not those"):
        dadvi.resume(tmp_path / "run", interrupted.model(), after, client="serial")


def test_another_version_and_another_method_are_refused(data, tmp_path):
    run = tmp_path / "run"
    start(data, run, "adam")
    method = dadvi.ADVI(batch_rows=300, subsample_rows=400)
    with pytest.raises(InputError, match="batch_rows is 300 and was 400"):
        dadvi.resume(run, interrupted.model(), data, client="serial", method=method)
    settings = json.loads((run / "settings.json").read_text())
    settings["versions"]["torch"] = "1.0"
    (run / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"made by torch 1\.0"):
        dadvi.resume(run, interrupted.model(), data, client="serial")


def test_an_object_among_the_settings_has_to_be_given_again(data, tmp_path):
    start(data, tmp_path / "run", "low rank")
    with pytest.raises(InputError, match=r"optimizer of the run was .*Adagrad.*give method="):
        dadvi.resume(tmp_path / "run", interrupted.model(), data, client="serial")


def test_one_process_at_a_time(data, tmp_path):
    start(data, tmp_path / "run", "adam")
    holder = (
        "import sys; from dadvi.checkpoint import RunDirectory\n"
        "with RunDirectory.existing(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", holder, str(tmp_path / "run")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"in use by another process .*process {process.pid} on "):
            dadvi.resume(tmp_path / "run", interrupted.model(), data, client="serial")
        process.kill()  # a lock dies with its process
    with RunDirectory.existing(tmp_path / "run"):
        pass


def test_a_fit_that_fails_at_once_leaves_what_was_there(data, tmp_path):
    run = tmp_path / "run"
    dadvi.fit(interrupted.model(), data, client="serial", run_dir=run, **CASES["surrogate"])
    before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    start(data, run, "surrogate", DataError("bad rows"), at=1, overwrite=True)
    assert {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    start(data, tmp_path / "new", "surrogate", DataError("bad rows"), at=1)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_cluster_that_is_lost_leaves_a_run_to_go_on_with(data, quiet, tmp_path):
    for case in ("adam", "surrogate"):
        expected, passes = quiet(case)
        start(data, tmp_path / case, case, WorkError("the scheduler was lost"), at=passes - 1)
        with after_passes(float("inf")) as count:
            resumed = dadvi.resume(tmp_path / case, interrupted.model(), data, client="serial")
        assert told(resumed) == told(expected)
        assert count[0] <= 3  # nothing is done again but the pass that failed


def test_a_digest_of_a_model_is_that_of_another_process():
    program = "import interrupted; from dadvi.fingerprint import model_parts; print(model_parts(interrupted.model()))"
    here = Path(interrupted.__file__).parent
    other = {**os.environ, "PYTHONHASHSEED": "7"}
    arguments = [sys.executable, "-c", program]
    there = subprocess.run(arguments, cwd=here, env=other, check=True, capture_output=True, text=True)
    assert there.stdout == f"{dadvi.fingerprint.model_parts(interrupted.model())}\n"
    used = interrupted.model()
    used.log_prior(torch.from_numpy(np.zeros((2, used.dim))))
    assert dadvi.fingerprint.model_parts(used) == dadvi.fingerprint.model_parts(interrupted.model())
