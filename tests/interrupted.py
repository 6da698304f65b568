"""Fits that are interrupted: after a given number of passes, or by a signal, in a process of their own."""

import itertools
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import targets
import torch
from clusters import processes
from torch.distributions import Bernoulli, HalfNormal, Normal

import dadvi
from dadvi import runfiles
from dadvi.executors import SerialExecutor
from dadvi.runfiles import LocalFiles

GROUPS = 20

CASES: dict[str, dict[str, Any]] = {
    "surrogate": {"method": dadvi.Anchored(subsample_rows=400, curvature="subsample"), "tol": 0.001},
    "hierarchy": {"method": dadvi.Anchored(subsample_rows=400, curvature="data"), "tol": 0.01},
    "full rank": {"method": dadvi.Anchored(subsample_rows=400), "family": "full_rank", "tol": 0.01},
    "adam": {"method": dadvi.ADVI(batch_rows=400, subsample_rows=400), "max_passes": 8},
    "anchor": {"method": dadvi.ADVI(batch_rows=200, subsample_rows=400, control_variate="anchor"), "max_passes": 8},
    "dowg": {
        "method": dadvi.ADVI(batch_rows=400, subsample_rows=400, optimizer="dowg", averaging="polynomial"),
        "max_passes": 6,
    },
    "proximal": {
        "method": dadvi.ADVI(batch_rows=400, subsample_rows=400, optimizer="proximal", control_variate="anchor"),
        "family": "full_rank",
        "max_passes": 6,
    },
    "low rank": {
        "method": dadvi.ADVI(batch_rows=400, subsample_rows=400, optimizer=torch.optim.Adagrad, schedule="constant"),
        "family": dadvi.LowRank(rank=3),
        "max_passes": 5,
    },
}
"""Settings of fits, by name."""


def fields(num_rows: int = 4_000, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a regression with effects of groups."""
    rng = np.random.default_rng(seed)
    x, group = rng.standard_normal((num_rows, 3)), rng.integers(0, GROUPS, num_rows)
    logits = x @ [1.0, -0.5, 0.3] + rng.standard_normal(GROUPS)[group]
    return {"x": x, "group": group, "y": rng.random(num_rows) < 1 / (1 + np.exp(-logits))}


def model(case: str = "adam", prior_sd: float = 2.0) -> dadvi.Model:
    """Return a logistic regression; for the case of a hierarchy one with effects of groups."""
    if case != "hierarchy":
        return dadvi.Model(
            prior={"a": Normal(0.0, 2.0), "beta": Normal(torch.zeros(3), prior_sd)},
            likelihood=lambda a, beta, x: Bernoulli(logits=a + x @ beta),
            observed="y",
        )
    return dadvi.Model(
        prior={
            "tau": HalfNormal(1.0),
            "effect": lambda tau: Normal(torch.zeros(GROUPS), tau),
            "beta": Normal(torch.zeros(3), prior_sd),
        },
        likelihood=lambda effect, beta, x, group: Bernoulli(logits=x @ beta + effect[group]),
        observed="y",
    )


@contextmanager
def after_passes(number: float, error: BaseException | type[BaseException] = KeyboardInterrupt) -> Iterator[list[int]]:
    """Stop the passes of this process with an error, before the given one; yield a list of one count of them."""
    real, count = SerialExecutor.run, [0]

    def run(executor: SerialExecutor, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            raise error
        return real(executor, *arguments, **options)

    with mock.patch.object(SerialExecutor, "run", run):
        yield count


def told(posterior: dadvi.Posterior) -> tuple[Any, ...]:
    """Return all that a fit found, to the bit, but for the seconds it took."""
    trace = posterior.trace
    timed = [name for name in trace.columns if name in targets.TIMES]
    params = {name: value.numpy().tobytes() for name, value in posterior.unconstrained.params.items()}
    ended = (posterior.status, posterior.reason, posterior.elbo, posterior.passes, posterior.certificate)
    return params, repr(ended), trace.drop(columns=timed).to_csv()


def begin_or_go_on(data: Path, run: Path, case: str, every: float = 60.0) -> dadvi.Posterior:
    """Go on with the run, or begin it if it has not begun; a checkpoint every so many seconds."""
    settings, opened = CASES[case], dadvi.open_shards(data)
    if (run / "settings.json").exists():
        return dadvi.resume(
            run, model(case), opened, client="serial", method=settings["method"], checkpoint_seconds=every
        )
    return dadvi.fit(model(case), opened, client="serial", run_dir=run, checkpoint_seconds=every, seed=3, **settings)


@contextmanager
def in_a_process(
    data: Path, run: Path, case: str, *, every: float = 0.05, killed_at: float = math.inf
) -> Iterator[tuple[BaseProcess, Connection]]:
    """Begin a run or go on with it, with a checkpoint every so many seconds, in a process of its own.

    It is at work when this yields. From the connection comes, when it has ended well, how many calls that touch files
    it has made in `dadvi.runfiles`. It ends by SIGKILL before the one of them whose number is given.
    """
    context = processes()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(data, run, case, every, killed_at, there))
    process.start()
    there.close()
    try:
        assert here.recv() == "at work"
        yield process, here
    finally:
        process.kill()
        process.join()
        process.close()
        here.close()


def killed_before(step: int, work: Callable[..., object], *arguments: Any) -> bool:
    """Do some work in another process, by SIGKILL ended before a change to files; return whether it came to that.

    Its changes are counted from 1: files opened to be written, renamed, removed, and so on. It is a fork, for tests
    that have hundreds of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, as from Python 3.12: Zarr sees to its own
        child = os.fork()
    if not child:
        try:
            sys.addaudithook(_killing_before(step))
            work(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _killing_before(step: int) -> Callable[[str, tuple[Any, ...]], None]:
    left = itertools.count(step - 1, -1)

    def each(event: str, about: tuple[Any, ...]) -> None:
        writing = event == "open" and about[2] & os.O_ACCMODE
        exchanging = event == "ctypes.dlsym" and about[1] == "renameat2"
        changing = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if (writing or exchanging or changing) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return each


def _work(data: Path, run: Path, case: str, every: float, killed_at: float, told: Connection) -> None:
    told.send("at work")
    with _counted(killed_at) as calls:
        begin_or_go_on(data, run, case, every=every)
    told.send(calls[0])
    os._exit(0)  # at once: what is measured and killed is the fit


@contextmanager
def _counted(killed_at: float) -> Iterator[list[int]]:
    """Count calls of built-in functions, such as write and rename, by what keeps a run's files; kill before one."""
    count, file = [0], runfiles.__file__

    def each(frame: FrameType, event: str, _function: Any) -> None:
        callers = (frame, frame.f_back)  # itself, or through a method of a path
        if event == "c_call" and any(caller and caller.f_code.co_filename == file for caller in callers):
            count[0] += 1
            if count[0] == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            before = sys.getprofile()
            sys.setprofile(each)
            try:
                return method(*arguments, **options)
            finally:
                sys.setprofile(before)

        return call

    names = ("lock", "unlock", "commit", "write", "append", "remove", "save")
    with mock.patch.multiple(LocalFiles, **{name: watched(getattr(LocalFiles, name)) for name in names}):
        yield count
