"""Connections that are encrypted and authenticated, by Dask's own settings (distributed.comm.tls)."""

import datetime
import ipaddress
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from clusters import scheduler_process, worker
from command import dadvi, dadvi_process, listing, write_data
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import dadvi as package
from dadvi import executors
from dadvi.errors import ClusterError

CONVERGED, INTERNAL, BAD_INPUT, STOPPED, DIVERGED = range(5)
SETTINGS = ["--method", "advi", "--max-passes", "6", "--tol", "1e-6", "--quiet"]


def write_certificates(directory: Path) -> None:
    """Write ca.pem, and cert.pem with key.pem that it signed, for the loopback address."""
    now = datetime.datetime.now(datetime.UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "cert")}
    names = {each: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"dadvi test {each}")]) for each in keys}
    for name, key in keys.items():
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["ca"])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        )
        signed = builder.sign(keys["ca"], hashes.SHA256())
        (directory / f"{name}.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem = keys["cert"].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (directory / "key.pem").write_bytes(pem)


def write_settings(directory: Path) -> Path:
    """Write certificates, and Dask's settings that name them; return the directory to give as DASK_CONFIG."""
    directory.mkdir()
    write_certificates(directory)
    ours = {"cert": str(directory / "cert.pem"), "key": str(directory / "key.pem")}
    tls = {"ca-file": str(directory / "ca.pem"), "scheduler": ours, "worker": ours, "client": ours}
    settings = {"distributed": {"comm": {"require-encryption": True, "tls": tls}}}
    (directory / "dask").mkdir()
    (directory / "dask" / "tls.yaml").write_text(yaml.safe_dump(settings))
    return directory / "dask"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with data.zarr, model.py, and serial, the run that every other is to equal."""
    directory = tmp_path_factory.mktemp("tls")
    data, model = write_data(directory)
    ran = dadvi("fit", f"{model}:model", data, "--out", directory / "serial", "--serial", *SETTINGS)
    assert ran.code == STOPPED, ran.err
    return directory


@pytest.fixture(scope="module")
def settings(world) -> str:
    return str(write_settings(world / "ours"))


@pytest.fixture(scope="module")
def address(world, settings) -> Iterator[str]:
    """A scheduler and a worker that know only who has a certificate of theirs."""
    with (
        scheduler_process(world, "--protocol", "tls", DASK_CONFIG=settings) as address,
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


@pytest.mark.parametrize(("key", "reason"), [(None, "(they name none)"), ("gone.pem", "(FileNotFoundError: ")])
def test_a_client_without_a_certificate_is_told_what_to_set(world, address, tmp_path, key, reason):
    variables = {}
    if key is not None:
        settings = write_settings(tmp_path / "ours")
        file = settings / "tls.yaml"
        file.write_text(file.read_text().replace("key.pem", key))
        variables["DASK_CONFIG"] = str(settings)
    line = refused(fit_arguments(world, address), tmp_path / "work", variables)
    assert f"the scheduler at '{address}' needs a certificate" in line
    assert reason in line
    assert line.endswith("set distributed.comm.tls.ca-file, .client.cert and .client.key\n")


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


def test_it_is_a_cluster_error(address):
    with pytest.raises(ClusterError, match="needs a certificate"):
        executors.connect(address)
