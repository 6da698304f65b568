"""The SSH recipe on an sshd of this test's own, on the loopback, with keys of its own.

It needs Debian's openssh-server, and root, as which sshd asks for a directory of its own; `bash scripts/test.sh --ssh`
installs the package.
"""

import getpass
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from clusters import daemon, free_port
from command import BAD_INPUT, INTERNAL, STOPPED, Ran, assert_same_bits, environment, write_run

RECIPE = Path(__file__).parents[2] / "cluster" / "ssh" / "fit.py"
SETTINGS = ["--method", "advi", "--max-passes", "6", "--tol", "1e-6", "--quiet"]
SECONDS = 120.0
SSHD = shutil.which("sshd")  # wants to be called by its whole path

pytestmark = pytest.mark.skipif(SSHD is None or os.geteuid() != 0, reason="needs openssh-server and root")

SERVER = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {home}/host
AuthorizedKeysFile {home}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv SSHD_OF={home} PYTHONPATH={path}
"""

CLIENT = """\
Host node1 node2
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {home}/key
  HostKeyAlias node
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """The home directory of one who can log in to the machines node1 and node2."""
    home, port = tmp_path_factory.mktemp("home"), free_port()
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / name], check=True, timeout=20)
    (home / "sshd_config").write_text(SERVER.format(port=port, home=home, path=os.environ.get("PYTHONPATH", "")))
    (home / ".ssh").mkdir()
    (home / ".ssh" / "config").write_text(CLIENT.format(port=port, home=home, user=getpass.getuser()))
    (home / ".ssh" / "known_hosts").write_text(f"node {(home / 'host.pub').read_text()}")
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, empty; as a rule the system's service makes it
    with daemon([str(SSHD), "-D", "-e", "-f", str(home / "sshd_config")], home):
        yield home


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with data.zarr, model.py, and serial, the run that every other is to equal."""
    return write_run(tmp_path_factory.mktemp("ssh"), *SETTINGS)


def run_recipe(home: Path, directory: Path, *fit: object) -> Ran:
    """Run the recipe on two machines, which are this one."""
    options = ["--hosts", "node1", "node2", "--workers", "1", "--interface", "lo"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        [sys.executable, RECIPE, *options, "--", *map(str, fit)],
        cwd=directory,
        env=environment(HOME=str(home), PATH=path),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def test_a_fit_over_ssh_has_the_bits_of_a_serial_one(home, world, tmp_path):
    ran = run_recipe(home, tmp_path, f"{world / 'model.py'}:model", world / "data.zarr", "--out", "run", *SETTINGS)
    assert (ran.code, ran.out) == (STOPPED, "run/posterior.zarr\n"), ran.err
    assert_same_bits(tmp_path / "run", world / "serial")
    log = (home / "sshd.out").read_text()
    assert log.count("Accepted publickey") == 3  # the scheduler and a worker on each machine


def test_bad_input_ends_with_its_code_and_what_was_started(home, world, tmp_path):
    ran = run_recipe(home, tmp_path, f"{world / 'model.py'}:model", "gone.zarr", "--out", "run", *SETTINGS)
    assert (ran.code, ran.out) == (BAD_INPUT, "")
    assert "gone.zarr does not exist" in ran.err
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 20
    while running := processes_of(home):
        assert time.monotonic() < deadline, running
        time.sleep(0.2)


def processes_of(home: Path) -> list[psutil.Process]:
    """Return the processes that were started through the sshd, and theirs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += [process] if process.environ().get("SSHD_OF") == str(home) else []
    return found


def test_a_machine_with_another_key_is_not_trusted(home, world, tmp_path):
    known = home / ".ssh" / "known_hosts"
    expected = known.read_text()
    known.write_text(f"node {(home / 'key.pub').read_text()}")
    try:
        ran = run_recipe(home, tmp_path, f"{world / 'model.py'}:model", world / "data.zarr", "--out", "run", *SETTINGS)
    finally:
        known.write_text(expected)
    assert ran.code == INTERNAL
    assert "Host key is not trusted" in ran.err
    assert list(tmp_path.iterdir()) == []
