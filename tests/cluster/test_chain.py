"""The script of the chain of Slurm jobs, without Slurm: with stand-ins for the cluster and for `scontrol`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import SLOW_MODEL, STOPPED, dadvi, environment, write_data
from objects import BUCKET

from dadvi import load_posterior
from dadvi.runfiles import CHECKPOINT, POSTERIOR, below, files_at

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "chain.sbatch"
STAND_INS = {"with_cluster.sh": 'exec "$@"', "scontrol": 'echo "$@" >>queued'}


@pytest.fixture
def place(request, tmp_path) -> str:
    """Where the run is to lie."""
    if request.param == "path":
        return str(tmp_path / "run")
    request.getfixturevalue("bucket")
    return f"{BUCKET}/run"


@pytest.mark.parametrize("place", ["path", "URL"], indirect=True)
def test_a_job_that_is_queued_again_goes_on_with_its_run(tmp_path, place):
    data, model = write_data(tmp_path)
    model.write_text(SLOW_MODEL)
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    settings = ["--method", "advi", "--max-passes", "6", "--tol", "1e-6", "--checkpoint-seconds", "0", "--quiet"]
    options = [f"{model}:model", str(data), *settings]

    def job(pause: float) -> subprocess.Popen[str]:
        path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        given = {"PATH": path, "RECIPES": str(tmp_path), "SLURM_JOB_ID": "7", "DADVI_SERIAL": "1"}
        variables = environment(**given, PAUSE=str(pause))
        return subprocess.Popen(["bash", SCRIPT, place, *options], cwd=tmp_path, env=variables)

    with job(pause=0.03) as first:
        deadline = time.monotonic() + 60
        while CHECKPOINT not in files_at(place).names() and time.monotonic() < deadline:
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
    assert first.returncode == STOPPED
    assert POSTERIOR not in files_at(place).names()
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
    with job(pause=0.0) as second:
        pass
    assert second.returncode == STOPPED  # by itself, at max_passes, and so it is not queued again
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
    assert dadvi("fit", *options, "--out", tmp_path / "whole", "--serial").code == STOPPED
    found, expected = (load_posterior(below(each, POSTERIOR)).unconstrained for each in (place, tmp_path / "whole"))
    assert torch.equal(found.loc, expected.loc)
