"""Connections that are encrypted and authenticated, by Dask's own settings (distributed.comm.tls)."""

import re
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
import torch
import yaml
from clusters import scheduler_process, worker
from command import BAD_INPUT, STOPPED, dadvi, dadvi_process, listing, write_run

import dadvi as package
from dadvi import clients
from dadvi.errors import ClusterError

RECIPE = Path(__file__).parents[1] / "cluster" / "tls"
SETTINGS = ["--method", "advi", "--max-passes", "6", "--tol", "1e-6", "--quiet"]


def write_settings(directory: Path) -> Path:
    """Write certificates and Dask's settings as the recipe tells; return what to give as DASK_CONFIG."""
    (directory / "dask").mkdir(parents=True)
    subprocess.run(["bash", RECIPE / "make_certificates.sh", directory], check=True, timeout=60)
    (told,) = re.findall(r"^```yaml\n(.*?)^```$", (RECIPE / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    (directory / "dask" / "tls.yaml").write_text(told.replace("/etc/dadvi", str(directory)))
    return directory / "dask"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with data.zarr, model.py, and serial, the run that every other is to equal."""
    return write_run(tmp_path_factory.mktemp("tls"), *SETTINGS)


@pytest.fixture(scope="module")
def settings(world) -> str:
    return str(write_settings(world / "ours"))


def certificates(settings: str) -> dict[str, Any]:
    """Return what Dask's settings say of certificates."""
    return yaml.safe_load((Path(settings) / "tls.yaml").read_text())["distributed"]["comm"]["tls"]


@pytest.fixture(scope="module")
def address(world, settings) -> Iterator[str]:
    """A scheduler and a worker that know only who has a certificate of theirs."""
    with (
        scheduler_process(world, "--protocol", "tls", DASK_CONFIG=settings) as (_, address),
        worker(address, world / "worker", DASK_CONFIG=settings),
    ):
        assert address.startswith("tls://127.0.0.1:")
        yield address


def fit_arguments(world: Path, address: str) -> list[object]:
    return [
        "fit",
        f"{world / 'model.py'}:model",
        world / "data.zarr",
        "--out",
        "run",
        "--scheduler",
        address,
        *SETTINGS,
    ]


def test_a_fit_over_tls_has_the_bits_of_a_serial_one(world, settings, address, tmp_path):
    ran = dadvi_process(*fit_arguments(world, address), cwd=tmp_path, DASK_CONFIG=settings)
    assert (ran.code, ran.out) == (STOPPED, "run/posterior.zarr\n"), ran.err
    assert ran.err.count("\n") == 1, ran.err
    found, expected = (
        package.load_posterior(run / "posterior.zarr").unconstrained.params
        for run in (tmp_path / "run", world / "serial")
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("who", ["with the certificate of another", "without encryption"])
def test_strangers_are_not_let_in(world, address, tmp_path, who):
    """In bounded time, with one line, leaving nothing."""
    variables = {}
    if who == "without encryption":
        address = address.replace("tls://", "tcp://")
    else:
        variables["DASK_CONFIG"] = str(write_settings(tmp_path / "theirs"))
    line = refused(fit_arguments(world, address), tmp_path / "work", variables)
    assert f"no Dask scheduler answers at '{address}' within 10 s" in line


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def test_the_scheduler_itself_refuses_a_client_that_shows_no_certificate(settings, address, version):
    """It trusts our authority, and none of the package's own checks stand before it."""
    tls = certificates(settings)
    context = ssl.create_default_context(cafile=tls["ca-file"])
    context.check_hostname = False
    context.minimum_version = context.maximum_version = version
    heard = b""
    with pytest.raises((ssl.SSLError, ConnectionError)):  # by TLS 1.3 a client learns of it when it first reads
        heard = first_bytes(context, address)
    assert heard == b""
    context.load_cert_chain(tls["client"]["cert"], tls["client"]["key"])
    assert first_bytes(context, address)


def first_bytes(context: ssl.SSLContext, address: str) -> bytes:
    """Return what the scheduler says first, unasked, to who it lets in; an end without a word is an error."""
    host, port = address.removeprefix("tls://").rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), timeout=20) as plain,
        context.wrap_socket(plain) as encrypted,
    ):
        if not (heard := encrypted.recv(1_000)):
            raise ConnectionError("it was closed")
        return heard


@pytest.mark.parametrize(("key", "reason"), [(None, "(they name none)"), ("gone.pem", "(FileNotFoundError: ")])
def test_a_client_without_a_certificate_is_told_what_to_set(
    world, settings, address, tmp_path, monkeypatch, key, reason
):
    changed: dict[str, str] = {}
    if key is not None:
        tls = certificates(settings)
        ours = {"ca-file": tls["ca-file"], "client.cert": tls["client"]["cert"], "client.key": key}
        changed = {f"distributed.comm.tls.{name}": value for name, value in ours.items()}
    monkeypatch.chdir(tmp_path)
    with dask.config.set(changed):
        with pytest.raises(ClusterError, match="needs a certificate"):
            clients.connect(address)
        ran = dadvi(*fit_arguments(world, address))
    assert (ran.code, ran.out) == (BAD_INPUT, "")
    assert listing(tmp_path) == {}
    assert ran.err.startswith(f"error: the scheduler at '{address}' needs a certificate")
    assert reason in ran.err
    assert ran.err.endswith("set distributed.comm.tls.ca-file, .client.cert and .client.key\n")


def refused(arguments: list[object], directory: Path, variables: dict[str, str]) -> str:
    """Run a fit in a process of its own; assert that it is refused, with one line and nothing left; return the line."""
    directory.mkdir()
    started = time.monotonic()
    ran = dadvi_process(*arguments, cwd=directory, **variables)
    assert time.monotonic() - started < 60
    assert (ran.code, ran.out) == (BAD_INPUT, ""), ran.err
    assert listing(directory) == {}
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1, ran.err
    return ran.err


def test_a_key_is_its_owners_alone_and_never_replaced(tmp_path):
    write_settings(tmp_path)
    key = tmp_path / "key.pem"
    before = key.read_bytes()
    assert key.stat().st_mode & 0o077 == 0
    ran = subprocess.run(["bash", RECIPE / "make_certificates.sh", tmp_path], capture_output=True, text=True)
    assert ran.returncode == BAD_INPUT
    assert "key.pem exists" in ran.stderr
    assert key.read_bytes() == before
