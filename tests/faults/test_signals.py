"""`dadvi fit` told to stop by a signal, at any moment: exit code 3, how to go on, and then the same bits."""

import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from clusters import scheduler_process, worker
from command import (
    CONVERGED,
    FIELDS,
    MODEL,
    STOPPED,
    assert_interrupted,
    assert_same_bits,
    dadvi,
    listening,
    write_table,
)

ROWS, CHUNK = 60_000, 3_000  # more than the anchored solver holds, lest one round be all that it makes
SLOW = """
import time
from torch.distributions import Bernoulli


def likelihood(a, b, e, x, g):
    time.sleep(0.002)  # a fit lasts some seconds, and ends after the signal that is sent in the middle of it
    return Bernoulli(logits=a + b * x + e[g])


model = dadvi.Model(prior, likelihood, observed="y", dims={"e": "g"})
"""
SETTINGS = {
    "advi": ["--method", "advi", "--batch-rows", "6000", "--max-passes", "8"],
    "anchor": ["--control-variate", "anchor", "--batch-rows", "6000", "--max-passes", "8"],
    "anchored": ["--method", "anchored", "--family", "full_rank"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with data.zarr, model.py, and for each method a run that nobody interrupted, and what it told."""
    directory = tmp_path_factory.mktemp("signals")
    write_table(directory / "table.csv", ROWS)
    (directory / "model.py").write_text(MODEL + SLOW)
    sizes = ["--chunk-rows", CHUNK, "--shard-rows", 2 * CHUNK]
    assert dadvi("ingest", directory / "table.csv", directory / "data.zarr", "--fields", FIELDS, *sizes).code == 0
    for method in SETTINGS:
        ran = dadvi(*fit(directory, method, directory / method), "--serial", "-v")
        assert ran.code in (CONVERGED, STOPPED), ran.err
        (directory / f"{method}.txt").write_text(ran.err)
    return directory


def fit(world: Path, method: str, out: Path) -> list[object]:
    settings = [*SETTINGS[method], "--tol", "1e-6", "--seed", "3", "--checkpoint-seconds", "0.2"]
    return ["fit", f"{world / 'model.py'}:model", world / "data.zarr", "--out", out, *settings]


def interrupted_after(steps: int, seconds: float, number: signal.Signals, arguments: list[object], run: Path) -> None:
    """Run a command that works in a run, and send it a signal so many seconds after it has told so many steps."""
    with listening(*arguments, "-v") as process:
        told = ""
        while steps:
            told += (line := process.stderr.readline())
            assert line, f"it ended before it was told to:\n{told}"
            steps -= "ELBO" in line
        below = psutil.Process(process.pid).children(recursive=True)
        time.sleep(seconds)
        assert_interrupted(process, number, run)
    assert not psutil.wait_procs(below, timeout=15)[1], "workers that it started were left"


@pytest.mark.parametrize(
    ("number", "method", "who"),
    [
        (signal.SIGTERM, "advi", "serial"),
        (signal.SIGINT, "anchored", "serial"),
        (signal.SIGTERM, "anchored", "workers"),
        (signal.SIGINT, "anchor", "scheduler"),
    ],
)
def test_a_fit_and_its_resumption_that_are_told_to_stop_end_with_the_same_bits(world, tmp_path, number, method, who):
    run, rng = tmp_path / "run", random.Random(f"{number} {method} {who}")
    steps = (world / f"{method}.txt").read_text().count("ELBO")
    assert steps >= 4
    first = rng.randint(1, steps // 2)
    second = rng.randint(1, (steps - first) // 2)
    with ExitStack() as stack:
        works = {"serial": ["--serial"], "workers": ["--workers", 2]}.get(who)
        if works is None:
            _, address = stack.enter_context(scheduler_process(tmp_path))
            stack.enter_context(worker(address, tmp_path / "one"))
            works = ["--scheduler", address]
        interrupted_after(first, rng.uniform(0, 0.1), number, [*fit(world, method, run), *works], run)
        assert not (run / "posterior.zarr").exists()
        interrupted_after(second, rng.uniform(0, 0.1), number, ["resume", run, *works], run)
        assert not (run / "posterior.zarr").exists()
        ran = dadvi("resume", run, *(["--serial"] if who == "workers" else works), "--quiet")
    assert ran.code in (CONVERGED, STOPPED), ran.err
    assert_same_bits(run, world / method)
