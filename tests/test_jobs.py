"""Scripted jobs: job files, environment variables, the plan of a dry run, machine-readable results."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from clusters import ending
from command import (
    BAD_INPUT,
    CONVERGED,
    DIVERGED,
    FIELDS,
    SLOW_MODEL,
    STOPPED,
    assert_same_bits,
    dadvi,
    dadvi_process,
    environment,
    unchanged,
    write_data,
    write_table,
)

import dadvi as package
from dadvi.binding import bind_to
from dadvi.executors import DaskExecutor
from dadvi.families import MeanField
from dadvi.passes import Gradient
from dadvi.plan import PROCESS_BYTES, make_plan
from dadvi.starting import TAYLOR_DRAWS

JOB = """\
# every kind of value
model = "model.py:model"
data = "data.zarr"
out = "run"
family = "full_rank"
tol = 1e-6
max-passes = 3       # a whole number where a fraction may stand
num_draws = 4
seed = 5
serial = true
quiet = true
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with data.zarr and model.py."""
    directory = tmp_path_factory.mktemp("jobs")
    write_data(directory)
    return directory


@pytest.fixture
def here(world, tmp_path, monkeypatch) -> Path:
    """A directory of the test's own, with the same data and model, where it runs."""
    shutil.copytree(world / "data.zarr", tmp_path / "data.zarr")
    shutil.copy(world / "model.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def params(run: Path) -> dict[str, torch.Tensor]:
    return package.load_posterior(run / "posterior.zarr").unconstrained.params


def settings(run: str = "run") -> dict:
    return json.loads(Path(run, "settings.json").read_text())


# Job files and environment variables ----------------------------------------------------------------------------------


def test_a_job_file_is_the_same_as_its_options(here):
    (here / "job.toml").write_text(JOB)
    ran = dadvi("fit", "--config", "job.toml")
    assert (ran.code, ran.out) == (STOPPED, "run/posterior.zarr\n"), ran.err
    assert ran.err.count("\n") == 1  # quiet
    ran = dadvi(
        *["fit", "model.py:model", "data.zarr", "--out", "typed", "--family", "full_rank", "--tol", 1e-6],
        *["--max-passes", 3, "--num-draws", 4, "--seed", 5, "--serial"],
    )
    assert ran.code == STOPPED
    assert settings() == settings("typed")
    first, second = params(here / "run"), params(here / "typed")
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(here, monkeypatch):
    (here / "job.toml").write_text(JOB)
    monkeypatch.setenv("DADVI_SEED", "6")
    monkeypatch.setenv("DADVI_MAX_PASSES", "2")
    ran = dadvi("fit", "--config", "job.toml", "--max-passes", 4, "--out", "other")
    assert ran.code in (STOPPED, CONVERGED), ran.err
    found = settings("other")
    assert (found["max_passes"], found["seed"], found["tol"]) == (4, 6, 1e-6)
    assert not (here / "run").exists()


def test_the_job_file_itself_may_come_from_the_environment(here, monkeypatch):
    (here / "job.toml").write_text(JOB)
    monkeypatch.setenv("DADVI_CONFIG", "job.toml")
    assert dadvi("fit", "--dry-run").code == 0


@pytest.mark.parametrize("line", ['scheduler = "tcp://127.0.0.1:1"', "workers = 64"])
def test_who_works_is_chosen_by_the_nearest_alone(here, monkeypatch, line):
    """What is on the command line puts the file's and the environment's choice aside, rather than clash with it."""
    job = JOB.replace("serial = true", line).replace("quiet = true", "verbose = true")
    (here / "job.toml").write_text(job)
    ran = dadvi("fit", "--config", "job.toml", "--serial", "--quiet")
    assert ran.code == STOPPED, ran.err
    assert ran.err.count("\n") == 1
    monkeypatch.setenv("DADVI_SCHEDULER", "tcp://127.0.0.1:1")
    assert dadvi("fit", "--config", "job.toml", "--serial", "--out", "again").code == STOPPED


def test_every_option_of_fit_may_stand_in_a_job_file(here):
    """A value of a wrong type is refused for each of them, which shows that each is known."""
    told = dadvi("fit", "--help").out
    names = {word.strip("[],").removeprefix("--") for word in told.split() if word.strip("[],").startswith("--")}
    names -= {"help", "config"}
    assert len(names) > 20
    for name in [*names, "model", "data"]:
        (here / "job.toml").write_text(f"{name} = [1]\n")
        ran = dadvi("fit", "--config", "job.toml")
        assert ran.code == BAD_INPUT
        assert ran.err.startswith(f"error: job.toml: {name} = [1]: it must be "), ran.err


# The plan -------------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_leaves_nothing(here):
    options = ["fit", "model.py:build", "data.zarr", "--out", "run", "--family", "low_rank", "--dry-run"]
    with unchanged(here):
        ran = dadvi(*options, "--json")
        readable = dadvi(*options)
    assert (ran.code, ran.err) == (0, "")
    plan = json.loads(ran.out)
    manifest = package.open_shards("data.zarr").manifest
    row_bytes = 8 + 4 + 1  # y int64, x float32, g int8
    assert plan == {
        "rows": 3_000,
        "chunks": 12,
        "shards": 4,
        "data_bytes": 3_000 * row_bytes,
        "coordinates": 5,
        "method": "Anchored",
        "family": "low_rank",
        "passes_at_most": 30.0,
        "tasks_per_pass": 4,
        "bytes_per_pass": 3_000 * row_bytes,
        "bytes_at_most": 30 * 3_000 * row_bytes,
        "worker_bytes": plan["worker_bytes"],
    }
    assert manifest.num_bytes == plan["data_bytes"]
    assert plan["worker_bytes"] > 2**27
    assert (readable.code, readable.err) == (0, "")
    told = [line.split(maxsplit=1) for line in readable.out.splitlines()]
    assert len(told) == len(plan)
    assert told[0] == ["rows", "3,000"]
    assert "".join(readable.out.split("\n")).isprintable()


def test_a_plan_counts_the_fields_that_the_model_uses(here):
    text = (here / "model.py").read_text()
    slim = "slim = dadvi.Model({'a': Normal(0.0, 1.0)}, lambda a: Bernoulli(logits=a), observed='y')\n"
    (here / "model.py").write_text(text + slim)
    options = ["--out", "run", "--dry-run", "--json"]
    ran = dadvi("fit", "model.py:slim", "data.zarr", *options, "--method", "advi", "--max-passes", 7)
    plan = json.loads(ran.out)
    assert plan["bytes_per_pass"] == 3_000 * 8  # y alone
    assert (plan["method"], plan["passes_at_most"], plan["bytes_at_most"]) == ("ADVI", 7, 7 * 3_000 * 8)


def test_a_fit_does_what_the_plan_says(world, thread_client):
    """A pass has the tasks that it tells."""
    data = package.open_shards(world / "data.zarr")
    normal = torch.distributions.Normal
    model = package.Model({"a": normal(0.0, 1.0)}, lambda a: normal(a, 1.0), observed="x")
    plan = make_plan(model, data, method="auto", family=MeanField(), max_passes=None)
    executor = DaskExecutor(bind_to(model, data), data, thread_client)
    tasks = executor._tasks(Gradient(np.zeros((1, 1))), executor._shards(None))
    assert plan.tasks_per_pass == len(tasks)
    executor.close()


def test_a_worker_stays_within_the_memory_that_the_plan_tells(tmp_path, process_clients):
    """Peak resident memory of the worker's process through a pass over 120 MB at as many draws as any fit makes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300_000, 100), dtype=np.float32)
    data = package.write_shards(tmp_path / "data.zarr", {"x": x, "y": x[:, 0]})
    few = package.write_shards(tmp_path / "few.zarr", {"x": x[:100], "y": x[:100, 0]})
    normal = torch.distributions.Normal
    prior = {"b": normal(torch.zeros(100), 1.0)}
    model = package.Model(prior, lambda b, x: normal(x @ b, 1.0), observed="y")
    plan = make_plan(model, data, method="auto", family=MeanField(), max_passes=None)
    client = process_clients(1)
    executor = DaskExecutor(bind_to(model, few), few, client)
    executor.run(Gradient(np.zeros((1, 100))))  # what is loaded where it is first used
    executor.close()
    of_worker = _peak_of_worker(client)
    executor = DaskExecutor(bind_to(model, data), data, client)
    executor.run(Gradient(np.zeros((TAYLOR_DRAWS, 100))), check=True)
    executor.close()
    grown, told = _peak_of_worker(client) - of_worker, plan.worker_bytes - PROCESS_BYTES
    assert 0.2 * told < grown < told


def _peak_of_worker(client) -> int:
    def peak() -> int:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    return next(iter(client.run(peak).values()))


# Results for machines, and logs ---------------------------------------------------------------------------------------


def test_the_result_as_json(here):
    ran = dadvi("fit", "model.py:model", "data.zarr", "--out", "run", "--serial", "--json", "--quiet")
    assert ran.code == CONVERGED
    assert ran.out.count("\n") == 1
    told = json.loads(ran.out, parse_constant=pytest.fail)
    posterior = package.load_posterior(told["posterior"])
    assert Path(told["posterior"]) == here / "run" / "posterior.zarr"
    assert (told["status"], told["reason"]) == ("converged", posterior.reason)
    assert (told["elbo"], told["passes"]) == (posterior.elbo, posterior.passes)
    assert told["certificate"]["max"] == posterior.certificate.max
    assert "latents" not in told


@pytest.mark.usefixtures("here")
def test_json_of_a_fit_that_stopped_and_of_one_that_diverged():
    base = ["fit", "model.py:model", "data.zarr", "--serial", "--json", "--quiet"]
    ran = dadvi(*base, "--out", "stopped", "--method", "advi", "--max-passes", 2, "--tol", 1e-6)
    assert (ran.code, json.loads(ran.out)["status"]) == (STOPPED, "stopped")
    ran = dadvi(*base, "--out", "diverged", "--learning-rate", 1e6, "--max-passes", 20)
    assert (ran.code, json.loads(ran.out)["status"]) == (DIVERGED, "diverged")


def test_a_verbose_fit_tells_its_plan_and_every_step_without_control_characters(here):
    options = ["--method", "advi", "--batch-rows", 1_000, "--max-passes", 12, "--tol", 1e-6, "--serial", "-v"]
    ran = dadvi_process("fit", "model.py:model", "data.zarr", "--out", "run", *options, cwd=here, FORCE_COLOR="1")
    assert (ran.code, ran.out) == (STOPPED, "run/posterior.zarr\n")
    lines = ran.err.splitlines()
    assert lines[0].split() == ["rows", "3,000"]
    assert lines[-1].startswith("stopped: ")
    assert sum(" passes  ELBO " in line for line in lines) >= 20  # of which three make an epoch
    assert "".join(lines).isprintable()
    ran = dadvi_process("resume", "run", "--serial", "--max-passes", 18, "-v", cwd=here)
    assert (ran.code, ran.out) == (STOPPED, "run/posterior.zarr\n"), ran.err
    assert sum(" ELBO " in line for line in ran.err.splitlines()) >= 6


# The example of a batch job -------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).parents[1] / "scripts" / "batch_job.sh"


def batch_job(directory: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return interrupted_batch_job(directory, None, *arguments, **variables)


def interrupted_batch_job(
    directory: Path, there: Path | None, *arguments: object, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the script, and send it SIGTERM when a file is there."""
    started = subprocess.Popen(
        ["bash", SCRIPT, *map(str, arguments)],
        cwd=directory,
        env=environment(**{"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with ending(started):
        while there is not None and not there.exists() and started.poll() is None:
            time.sleep(0.02)
        if there is not None:
            started.terminate()
        out, err = started.communicate(timeout=240)
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


def test_the_example_job_goes_from_a_table_to_a_summary_also_when_interrupted(tmp_path):
    """Its second run goes on with the data set and the run of the first."""
    write_table(tmp_path / "table.csv")
    (tmp_path / "model.py").write_text(SLOW_MODEL)
    job = ("table.csv", FIELDS, "model.py:build", "out")
    options = {"DADVI_SERIAL": "1", "DADVI_SEED": "4", "DADVI_TOL": "0.001"}
    out = tmp_path / "out"
    ran = interrupted_batch_job(tmp_path, out / "run" / "checkpoint", *job, PAUSE="0.01", **options)
    assert (ran.returncode, ran.stdout) == (STOPPED, f"{tmp_path / 'out/data.zarr'}\n"), ran.stderr
    assert "interrupted; go on with: dadvi resume" in ran.stderr
    assert sorted(path.name for path in out.iterdir()) == ["data.zarr", "run"]

    with unchanged(out / "data.zarr"):
        ran = batch_job(tmp_path, *job, **options)
    assert ran.returncode == CONVERGED, ran.stderr
    latents = ["a", "b", "e[AA]", "e[BB]", "e[CC]"]
    assert [line.split()[0] for line in ran.stdout.splitlines()] == ["latent", *latents]
    assert sorted(path.name for path in out.iterdir()) == ["data.zarr", "result.json", "run", "summary.json"]
    result, summary = (json.loads((out / f"{name}.json").read_text()) for name in ("result", "summary"))
    assert result["status"] == summary["status"] == "converged"
    assert package.load_posterior(result["posterior"]).settings["seed"] == 4
    assert list(summary["latents"]) == latents
    whole = ("--out", tmp_path / "whole", "--serial", "--seed", 4, "--tol", 0.001)
    assert dadvi("fit", f"{tmp_path / 'model.py'}:build", out / "data.zarr", *whole).code == CONVERGED
    assert_same_bits(out / "run", tmp_path / "whole")


STAND_IN = """\
#!/usr/bin/env bash
# Does what the example asks of dadvi at no cost. A fit ends with the code in FIT, and with a result if that is RESULT;
# a plan can be made where there is a data set.
if [[ $* == *--dry-run* ]]; then
  [[ -e out/data.zarr ]]
  exit
fi
echo "$1 $*" >>log
case $1 in
  ingest) mkdir out/data.zarr ;;
  fit | resume)
    mkdir -p out/run
    touch out/run/settings.json
    ((${RESULT:-$FIT} == FIT)) && echo result
    exit "$FIT"
    ;;
esac
"""


@pytest.mark.parametrize("code", range(5))
def test_the_example_job_ends_with_the_code_of_the_fit(tmp_path, code):
    ran = stand_in_job(tmp_path, FIT=str(code))
    assert ran.returncode == code
    saved = code in (CONVERGED, STOPPED)
    assert commands_of(tmp_path) == (["ingest", "fit", "summary", "summary"] if saved else ["ingest", "fit"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == (
        ["data.zarr", "result.json", "run", "summary.json"] if saved else ["data.zarr", "run"]
    )


@pytest.mark.parametrize(
    ("there", "commands"),
    [
        ([], ["ingest", "fit"]),
        (["data.zarr/zarr.json"], ["fit"]),
        (["data.zarr/zarr.json", "run/lock"], ["fit"]),
        (["data.zarr/zarr.json", "run/lock", "run/settings.json"], ["resume"]),
    ],
    ids=["nothing", "a data set", "a run killed before it had begun", "a run"],
)
def test_the_example_job_goes_on_from_what_is_there(tmp_path, there, commands):
    for name in there:
        file = tmp_path / "out" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    ran = stand_in_job(tmp_path, FIT=str(STOPPED), RESULT="none")  # interrupted once more
    assert (ran.returncode, commands_of(tmp_path)) == (STOPPED, commands)


def stand_in_job(directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (directory / "dadvi").write_text(STAND_IN)
    (directory / "dadvi").chmod(0o755)
    variables["PATH"] = f"{directory}:{os.environ['PATH']}"
    return batch_job(directory, "t.csv", "y", "m.py:m", "out", **variables)


def commands_of(directory: Path) -> list[str]:
    return [line.split()[0] for line in (directory / "log").read_text().splitlines()]


def test_the_example_job_tells_how_it_is_used(tmp_path):
    ran = batch_job(tmp_path, "table.csv")
    assert (ran.returncode, ran.stdout) == (BAD_INPUT, "")
    assert ran.stderr.startswith("usage: bash scripts/batch_job.sh TABLE")


def test_options_of_every_command_may_come_from_the_environment():
    for name in ("ingest", "fit", "resume", "summary"):
        told = " ".join(dadvi(name, "--help").out.split())
        for option in set(re.findall(r"--([a-z][a-z-]+)", told)) & {"scheduler", "workers", "serial", "overwrite"}:
            assert f"env var: DADVI_{option.upper()}" in told, f"{name} --{option}"


def test_the_result_as_json_is_asked_for_by_one_variable_whatever_the_command():
    for name in ("fit", "resume", "summary"):
        told = " ".join(dadvi(name, "--help").out.split())
        assert "env var: DADVI_JSON]" in told, name
