"""Workers and schedulers that go away: the same bits, or a clear error and a run that goes on."""

import itertools
import os
import random
import re
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from functools import partial
from multiprocessing import parent_process
from subprocess import PIPE

import interrupted
import pytest
from clusters import local_client
from command import MODEL, assert_same_bits, command, environment, write_data
from command import dadvi as dadvi_command
from distributed import Status
from interrupted import CASES, told

import dadvi
from dadvi.binding import bind_to
from dadvi.errors import ModelError, WorkError
from dadvi.executors import DaskExecutor
from dadvi.passes import Gradient, Pass

LIVED = 1.0
"""Seconds that a worker works before it is ended by its task: one that ends as it starts Dask does not start again."""


class Deadly(Pass):
    """Ends every process that takes it."""

    name = "deadly"

    def size(self, dim):  # noqa: ARG002
        return 1

    def on_chunk(self, model, batch):  # noqa: ARG002
        time.sleep(LIVED)
        os._exit(1)


@pytest.fixture
def client():
    with local_client(processes=True, n_workers=2) as started:
        yield started


def slowed(model, seconds):
    """Return a model whose likelihood is the same, but takes longer in a worker."""
    real = model.row_function

    def likelihood(a, beta, x):
        if parent_process() is not None:
            time.sleep(seconds)
        return real(a, beta, x)

    return with_likelihood(model, likelihood)


def with_likelihood(model, likelihood):
    prior = {site.name: prior.spec for site, prior in zip(model.space.sites, model._priors, strict=True)}
    return dadvi.Model(prior=prior, likelihood=likelihood, observed="y")


@contextmanager
def killing(client, every=2.0):
    """Kill a random worker every so many seconds; give the list of those that were killed.

    One that is still starting is let be: Dask would not start another in its place.
    """
    ended, killed, rng = threading.Event(), [], random.Random(0)

    def kill():
        while not ended.wait(every if killed else 0.5):
            working = [
                nanny.process
                for nanny in client.cluster.workers.values()
                if nanny.process is not None and nanny.process.status == Status.running
            ]
            alive = [process.pid for process in working if process.pid not in (None, *killed)]
            if alive:
                killed.append(rng.choice(alive))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        ended.set()
        killer.join()


@pytest.mark.parametrize(
    ("case", "seconds", "settings"),
    [("anchor", 0.05, {"max_passes": 12}), ("surrogate", 0.1, {"tol": 1e-6})],
)
def test_a_worker_killed_every_two_seconds_changes_no_bit(data, client, case, seconds, settings):
    model = slowed(interrupted.model(case), seconds)
    fit = partial(dadvi.fit, model, data, **{**CASES[case], **settings})
    quiet = fit(client="serial")
    with killing(client) as killed:
        # A pass must be shorter than four kills are apart: all that waits on a worker counts as having ended it.
        while len(killed) < 5:
            before = len(killed)
            assert told(fit(client=client)) == told(quiet)
            assert len(killed) >= before + 2  # in the midst of a fit


def test_a_task_that_kills_every_worker_is_given_up(data, client):
    bound = bind_to(interrupted.model(), data)
    with DaskExecutor(bound, data, client) as executor:
        with pytest.raises(WorkError, match=r"round 3: pass 'deadly' was given up: its task ended \d workers"):
            executor.run(Deadly(), [0], label="round 3")
        client.wait_for_workers(1, timeout=60)
        executor.run(Gradient(bound.model.start[None].numpy()))  # and others go on


@pytest.mark.parametrize(("case", "rows"), [("anchor", 30), ("surrogate", 2)])
def test_a_fit_whose_task_kills_every_worker_is_resumed_when_it_does_no_more(data, client, tmp_path, case, rows):
    model, flag, seen = deadly(interrupted.model(case), tmp_path / "flag"), tmp_path / "flag", itertools.count(1)
    fit = partial(dadvi.fit, model, data, seed=3, **CASES[case])
    quiet = fit(client="serial")

    def begin_to_kill(_row):
        if next(seen) == rows:
            flag.touch()

    with pytest.raises(WorkError, match=r"(step|round) \d+.*: pass '.*' was given up: its task ended 4 workers"):
        fit(client=client, run_dir=tmp_path / "run", checkpoint_seconds=0.0, callbacks=[begin_to_kill])
    assert next(seen) > rows
    flag.unlink()
    client.wait_for_workers(1, timeout=60)
    assert told(dadvi.resume(tmp_path / "run", model, data, client=client)) == told(quiet)


def deadly(model, flag):
    """Return a model whose likelihood is the same, but ends a worker while there is a file."""
    real = model.row_function

    def likelihood(a, beta, x):
        if parent_process() is not None and flag.exists():
            time.sleep(LIVED)
            os._exit(1)
        return real(a, beta, x)

    return with_likelihood(model, likelihood)


DEADLY = f"""
import os
import time
from multiprocessing import parent_process
from subprocess import PIPE
from pathlib import Path
from torch.distributions import Bernoulli

flag = Path(__file__).with_name("flag")


def likelihood(a, b, e, x, g):
    if parent_process() is not None and flag.exists():
        time.sleep({LIVED})
        os._exit(1)
    return Bernoulli(logits=a + b * x + e[g])


model = dadvi.Model(prior, likelihood, observed="y", dims={{"e": "g"}})
"""


def test_the_command_tells_how_to_go_on_after_a_task_that_kills_every_worker(tmp_path):
    path, model = write_data(tmp_path)
    model.write_text(MODEL + DEADLY)
    flag, run, quiet = tmp_path / "flag", tmp_path / "run", tmp_path / "quiet"
    settings = [*["--method", "advi", "--batch-rows", 250, "--max-passes", 12, "--tol", "1e-9"], "--seed", 3]
    fit = ["fit", f"{model}:model", path, *settings, "--checkpoint-seconds", 0]
    assert dadvi_command(*fit, "--out", quiet, "--serial", "--quiet").code == 3
    arguments = command(*fit, "--out", run, "--workers", 2, "-v")
    forks = environment(DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD="forkserver")  # start sooner
    with subprocess.Popen(arguments, env=forks, stdout=PIPE, stderr=PIPE, text=True) as running:
        while "ELBO" not in (line := running.stderr.readline()):
            assert line, "the fit ended before its first step"
        flag.touch()
        out, err = running.communicate(timeout=120)
    assert (running.returncode, out) == (1, ""), err
    *_, resume, error = err.splitlines()
    assert resume.endswith(f"go on with: dadvi resume {run}")
    given_up = (
        r"error: step \d+: pass '.*' was given up: its task ended 4 workers; see their logs, then resume the run .*"
    )
    assert re.fullmatch(given_up, error), err
    assert "Traceback" not in err
    flag.unlink()
    ran = dadvi_command("resume", run, "--serial", "--quiet")
    assert ran.code == 3, ran.err
    assert_same_bits(run, quiet)


def test_a_cluster_without_workers_is_given_up_after_a_while_or_found_again(data):
    with local_client(processes=True, n_workers=1) as client:
        bound = bind_to(interrupted.model(), data)
        point = Gradient(bound.model.start[None].numpy())
        with DaskExecutor(bound, data, client, wait_seconds=2.0) as executor:
            expected = executor.run(point)
            client.cluster.scale(0)
            deadline = time.monotonic() + 30
            while client.cluster.scheduler.workers and time.monotonic() < deadline:
                time.sleep(0.05)
            with pytest.raises(WorkError, match=r"has had no workers for \d+ s; start some, and resume"):
                executor.run(point, label="step 4")
            client.cluster.scale(1)
            client.wait_for_workers(1, timeout=60)
            found = executor.run(point)
            assert found.grad.tobytes() == expected.grad.tobytes()


def test_a_likelihood_that_raises_on_some_row_is_not_tried_again(data, thread_client, tmp_path):
    calls = tmp_path / "calls"  # a worker has a copy of the model
    calls.touch()

    def likelihood(a, beta, x, y):
        if x.shape[0] >= 100 and bool((x[:, 0] > 3.1).any()):
            with calls.open("a") as file:
                file.write(".")
            raise ArithmeticError("too steep")
        return -((y.to(x.dtype) - a - x @ beta) ** 2)

    target = interrupted.model()
    model = dadvi.Model(
        prior={site.name: prior.spec for site, prior in zip(target.space.sites, target._priors, strict=True)},
        log_likelihood=likelihood,
    )
    bound = bind_to(model, data)
    with DaskExecutor(bound, data, thread_client) as executor:
        calls.write_text("")
        with pytest.raises(ModelError, match=r"failed on shard \d+, chunk \d+ \(rows .*ArithmeticError: too steep"):
            executor.run(Gradient(bound.model.start[None].numpy()))
    x = interrupted.fields()["x"][:, 0].reshape(-1, 4, 100).max((1, 2))
    # Twice at most for each shard that has such a row: with the other chunks, and by itself, to tell the chunk.
    assert 2 <= calls.stat().st_size <= 2 * (x > 3.1).sum()
