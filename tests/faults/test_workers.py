"""Workers and schedulers that go away: the same bits, or a clear error and a run that goes on."""

import os
import random
import signal
import threading
import time
from functools import partial

import interrupted
import pytest
from clusters import local_client
from interrupted import CASES, told

import dadvi
from dadvi.binding import bind_to
from dadvi.errors import ModelError, WorkError
from dadvi.executors import DaskExecutor
from dadvi.passes import Gradient, Pass


class Deadly(Pass):
    """Ends every process that takes it."""

    name = "deadly"

    def size(self, dim):  # noqa: ARG002
        return 1

    def on_chunk(self, model, batch):  # noqa: ARG002
        os._exit(1)


@pytest.fixture(scope="module")
def client():
    with local_client(processes=True, n_workers=2) as started:
        yield started


def test_workers_killed_during_a_fit_change_no_bit(data, client):
    fit = partial(dadvi.fit, interrupted.model("anchor"), data, **{**CASES["anchor"], "max_passes": 12})
    quiet = fit(client="serial")
    ended, killed, rng = threading.Event(), [], random.Random(0)

    def kill():
        while not ended.wait(0.5 if not killed else 2.0):
            victims = [
                int(worker["pid"])
                for worker in client.cluster.scheduler.identity(n_workers=-1)["workers"].values()
                if "pid" in worker
            ] or [worker.pid for worker in client.cluster.workers.values() if worker.pid]
            if victims:
                killed.append(rng.choice(victims))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        noisy = fit(client=client)
    finally:
        ended.set()
        killer.join()
    assert killed
    assert told(noisy) == told(quiet)


def test_a_task_that_kills_every_worker_is_given_up(data, client):
    bound = bind_to(interrupted.model(), data)
    with DaskExecutor(bound, data, client) as executor:
        with pytest.raises(WorkError, match=r"round 3: pass 'deadly' was given up: its task ended \d workers"):
            executor.run(Deadly(), [0], label="round 3")
        client.wait_for_workers(1, timeout=60)
        executor.run(Gradient(bound.model.start[None].numpy()))  # and others go on


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
