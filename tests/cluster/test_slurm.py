"""The Slurm recipes on a real Slurm of one machine: slurmctld, slurmd and munged of this test's own, on the loopback.

It needs Debian's slurm-wlm and munge, and root, as which slurmd starts jobs; `bash scripts/test.sh --slurm` installs
the packages.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from clusters import daemon, free_port
from command import SLOW_MODEL, STOPPED, assert_same_bits, dadvi, environment, write_run

RECIPES = Path(__file__).parents[2] / "cluster" / "slurm"
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
SETTINGS = ["--method", "advi", "--max-passes", "6", "--tol", "1e-6", "--quiet"]
START_SECONDS, JOB_SECONDS = 60.0, 240.0

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in TOOLS) or os.geteuid() != 0, reason="needs slurm-wlm, munge and root"
)

CONFIG = """\
ClusterName=dadvi-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=2
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=16000 State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[dict[str, str]]:
    """A Slurm of one node; gives the environment variables by which its commands find it."""
    directory = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (directory / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    (directory / "slurm.conf").write_text(
        CONFIG.format(host=host, controller=free_port(), daemon=free_port(), directory=directory)
    )
    (directory / "munge.key").write_bytes(os.urandom(128))
    (directory / "munge.key").chmod(0o400)
    found = {"SLURM_CONF": str(directory / "slurm.conf")}
    munge = [f"--{name}-file={directory}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    with ExitStack() as stack:
        socket_file = directory / "munge.socket"
        start(stack, ["munged", "--foreground", "--force", f"--socket={socket_file}", *munge], directory)
        wait_for(socket_file.exists, START_SECONDS, "munged")
        start(stack, ["slurmctld", "-D", "-i"], directory, **found)
        start(stack, ["slurmd", "-D"], directory, **found)
        ready = ["sinfo", "--noheader", "--format=%T"]
        wait_for(lambda: output_of(ready, **found).strip() == "idle", START_SECONDS, "Slurm")
        yield found


def start(stack: ExitStack, arguments: list[str], directory: Path, **variables: str) -> None:
    stack.enter_context(daemon(arguments, directory, **variables))


def output_of(arguments: list[str], cwd: Path | None = None, **variables: str) -> str:
    ended = subprocess.run(arguments, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=60)
    return ended.stdout


def wait_for(ready: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what} was not ready within {seconds} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with data.zarr, model.py, and serial, the run that every other is to equal."""
    return write_run(tmp_path_factory.mktemp("jobs"), *SETTINGS)


def variables_of(slurm: dict[str, str]) -> dict[str, str]:
    """Return the environment of a job: its Slurm, this Python first, and the loopback as the network."""
    path = f"{slurm.get('FIRST', '')}{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**slurm, "PATH": path, "RECIPES": str(RECIPES), "INTERFACE": "lo"}


class Job(NamedTuple):
    """How a job ended."""

    state: str  # with its exit code
    log: str
    restarts: int


def run_job(
    slurm: dict[str, str], directory: Path, *arguments: str, meanwhile: Callable[[str], object] = lambda _: None
) -> Job:
    """Submit a job, and wait until it is over.

    `meanwhile` is called with the job's id now and then.
    """
    variables = variables_of(slurm)
    job = output_of(
        ["sbatch", "--parsable", "--mem-per-cpu=500", "--output=job.log", *arguments], directory, **variables
    )
    assert job.strip().isdigit(), job
    shown: dict[str, str] = {}
    hastened: list[str] = []

    def over() -> bool:
        text = output_of(["scontrol", "show", "job", "--oneliner", job.strip()], **slurm)
        shown.update(word.split("=", 1) for word in text.split() if "=" in word)
        if shown.get("Reason") == "BeginTime" and shown["Restarts"] not in hastened:
            # Queued again, to wait two minutes. A few seconds are enough, and needed: in the second in which its first
            # run ended the node takes it for ended.
            hastened.append(shown["Restarts"])
            output_of(["scontrol", "update", f"JobId={job.strip()}", "StartTime=now+5"], **slurm)
        meanwhile(job.strip())
        return shown.get("JobState") in {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

    try:
        wait_for(over, JOB_SECONDS, f"job {job.strip()}")
    except AssertionError:
        output_of(["scancel", job.strip()], **slurm)
        log = directory / "job.log"
        pytest.fail(f"{shown}\n{log.read_text() if log.exists() else 'no log'}")
    return Job(f"{shown['JobState']} {shown['ExitCode']}", (directory / "job.log").read_text(), int(shown["Restarts"]))


def test_a_job_with_two_workers_has_the_bits_of_a_serial_fit(slurm, world, tmp_path):
    reference = f"{world / 'model.py'}:model"
    options = [reference, str(world / "data.zarr"), "--out", "run", *SETTINGS]
    state, log, _ = run_job(slurm, tmp_path, "--ntasks=2", str(RECIPES / "fit.sbatch"), *options)
    assert state == "FAILED 3:0", log  # 3: stopped, at max_passes
    assert "run/posterior.zarr" in log
    assert log.count("Registered to:") >= 2
    assert_same_bits(tmp_path / "run", world / "serial")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.log", "run"]


def test_workers_may_be_jobs_of_their_own(slurm, world, tmp_path):
    """Submitted by dask-jobqueue, and cancelled when the fit has ended."""
    fit = [f"{world / 'model.py'}:model", str(world / "data.zarr"), "--out", "run", *SETTINGS]
    script = [sys.executable, str(RECIPES / "jobqueue.py"), "--workers=2", "--memory=2GiB", "--interface=lo"]
    ran = subprocess.run(
        [*script, "--", *fit],
        cwd=tmp_path,
        env=environment(**variables_of(slurm)),
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
    )
    assert (ran.returncode, ran.stdout) == (3, "run/posterior.zarr\n"), ran.stderr
    assert_same_bits(tmp_path / "run", world / "serial")
    wait_for(lambda: not output_of(["squeue", "--noheader"], **slurm).strip(), JOB_SECONDS, "the queue")


def test_a_job_with_bad_input_says_so(slurm, world, tmp_path):
    options = [f"{world / 'model.py'}:model", "gone.zarr", "--out", "run", *SETTINGS]
    state, log, _ = run_job(slurm, tmp_path, "--ntasks=1", str(RECIPES / "fit.sbatch"), *options)
    assert state == "FAILED 2:0", log
    assert "gone.zarr does not exist" in log
    assert [path.name for path in tmp_path.iterdir()] == ["job.log"]


STAND_IN = """\
#!/usr/bin/env bash
# Begins a run and is interrupted, then goes on with it, as dadvi fit --resume does.
echo "dadvi $* with ${DADVI_SCHEDULER%:*}"
[[ -e run/settings.json ]] && exit 4  # a code that only the last run of the job can have given
mkdir -p run
touch run/settings.json
trap 'echo checkpoint; exit "$CODE"' TERM
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize("code", [3, 128 + signal.SIGTERM], ids=["interrupted", "ended by the signal itself"])
def test_a_signal_before_the_walltime_queues_the_job_again_to_resume(slurm, tmp_path, code):
    """The script of the chain, with a stand-in for the fit, and the signal sent as Slurm sends it."""
    slurm = {**slurm, "FIRST": f"{program(tmp_path / 'bin' / 'dadvi', STAND_IN).parent}:", "CODE": str(code)}
    arguments = ["--ntasks=1", str(RECIPES / "chain.sbatch"), "run", "m.py:m", "d.zarr"]
    state, log, _ = run_job(
        slurm, tmp_path, *arguments, meanwhile=signal_when(tmp_path / "run" / "settings.json", slurm)
    )
    assert state == "FAILED 4:0", log
    said = [line for line in log.splitlines() if line.startswith(("dadvi ", "checkpoint"))]
    command = "dadvi fit --resume --out run m.py:m d.zarr with tcp://127.0.0.1"
    assert said == [command, "checkpoint", command]


def program(path: Path, text: str) -> Path:
    path.parent.mkdir()
    path.write_text(text)
    path.chmod(0o755)
    return path


def signal_when(there: Path, slurm: dict[str, str]) -> Callable[[str], None]:
    """Return what sends a job the signal that comes before its walltime, once, when a file is there."""
    sent = []

    def send(job: str) -> None:
        if there.exists() and not sent:
            sent.append(job)
            output_of(["scancel", "--batch", "--signal=TERM", job], **slurm)

    return send


SLOW_WORKERS = f"""\
#!/usr/bin/env bash
# Dask, whose workers pause at every chunk until the job has been queued again.
[[ $1 == worker && ! -v SLURM_RESTART_COUNT ]] && export PAUSE=0.5
exec {Path(sys.executable).with_name("dask")} "$@"
"""


def test_a_chain_of_jobs_outlives_its_walltime_with_the_bits_of_one_serial_fit(slurm, world, tmp_path):
    """Slurm's own clock strikes: the first job would need two minutes at least, and is signalled after 45 to 75 s.

    The limit is in whole minutes, and Slurm looks at its clock every 30 seconds: it signals at the last look that is
    sure to be 45 seconds before the end. Within 45 seconds of the start a fit is at work, on a busy machine too.
    """
    (tmp_path / "model.py").write_text(SLOW_MODEL)
    settings = ["--method", "advi", "--batch-rows", "250", "--max-passes", "20", "--tol", "1e-9", "--quiet"]
    options = [f"{tmp_path / 'model.py'}:model", str(world / "data.zarr"), *settings]
    slurm = {**slurm, "FIRST": f"{program(tmp_path / 'bin' / 'dask', SLOW_WORKERS).parent}:"}
    limit = ["--ntasks=1", "--time=2", "--signal=B:TERM@45"]
    job = run_job(slurm, tmp_path, *limit, str(RECIPES / "chain.sbatch"), "run", *options)
    assert job.state == "FAILED 3:0", job.log  # in the end, at max_passes
    assert job.restarts >= 1, job.log
    assert "interrupted; go on with: dadvi resume" in job.log
    ran = dadvi("fit", *options, "--out", tmp_path / "whole", "--serial")
    assert ran.code == STOPPED, ran.err
    assert_same_bits(tmp_path / "run", tmp_path / "whole")
