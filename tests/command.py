"""The command line as tests run it: in this process for speed, or as a real process; and the files that it works on."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import zarr

from dadvi import cli

CONVERGED, INTERNAL, BAD_INPUT, STOPPED, DIVERGED = range(5)
"""Exit codes."""

ROWS = 3_000
NAMES = ("AA", "BB", "CC")

MODEL = """\
import torch
from torch.distributions import Bernoulli, Normal

import dadvi


def likelihood(a, b, e, x, g):
    return Bernoulli(logits=a + b * x + e[g])


def build(data):
    e = Normal(torch.zeros(len(data.fields["g"].categories)), 1.0)
    prior = {"a": Normal(0.0, 2.0), "b": Normal(0.0, 2.0), "e": e}
    return dadvi.Model(prior, likelihood, observed="y", dims={"e": "g"})


prior = {"a": Normal(0.0, 2.0), "b": Normal(0.0, 2.0), "e": Normal(torch.zeros(3), 1.0)}
model = dadvi.Model(prior, likelihood, observed="y", dims={"e": "g"})
"""
SLOW_MODEL = MODEL.replace("import torch\n", "import os\nimport time\n\nimport torch\n", 1).replace(
    "    return Bernoulli", "    time.sleep(float(os.environ.get('PAUSE', '0')))\n    return Bernoulli", 1
)
"""The same, with a pause of that many seconds at every chunk."""

FIELDS = "y x:standardize:float32 g:category"


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


def dadvi(*arguments: object) -> Ran:
    """Run a command in this process, through `main`, with what it prints caught."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["dadvi", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


def command(*arguments: object) -> list[str]:
    """Return the command as the installed program, for a process."""
    return [str(Path(sys.executable).with_name("dadvi")), *map(str, arguments)]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a process, in which neither tests nor their caller ask for colours or a width."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS")}
    return inherited | variables


def dadvi_process(*arguments: object, cwd: Path | None = None, **variables: str) -> Ran:
    """Run a command as a process."""
    ended = subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=120
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def listening(*arguments: object, cwd: Path | None = None) -> "subprocess.Popen[str]":
    """Start a command as a process that SIGINT interrupts, which it inherits to ignore from a suite in the background.

    What it prints is to be read by the caller.
    """
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def assert_interrupted(process: "subprocess.Popen[str]", number: signal.Signals, run: Path) -> None:
    """Send a signal to a process that works in a run, and assert that it ends, and tells how to go on."""
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (STOPPED, ""), err
    assert err.splitlines()[-1] == f"interrupted; go on with: dadvi resume {run}"
    assert "Traceback" not in err, err


def write_table(path: Path, rows: int = ROWS) -> pd.DataFrame:
    """Write a CSV file with columns y (0 or 1), x and g (AA, BB or CC)."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=rows), rng.integers(0, len(NAMES), rows)
    late = rng.random(rows) < 1 / (1 + np.exp(-(0.5 + x + 0.3 * g)))
    table = pd.DataFrame({"y": late.astype(int), "x": 3 * x + 1, "g": np.array(NAMES)[g]})
    table.to_csv(path, index=False)
    return table


def write_data(directory: Path) -> tuple[Path, Path]:
    """Write and ingest a table, write a model file; return the data set and the model file."""
    write_table(directory / "table.csv")
    ran = dadvi("ingest", directory / "table.csv", directory / "data.zarr", *ingest_options())
    assert ran.code == 0, ran.err
    (directory / "model.py").write_text(MODEL)
    return directory / "data.zarr", directory / "model.py"


def write_run(directory: Path, *settings: object) -> Path:
    """Write data.zarr, model.py and serial, a run that stops, which others are to equal; return the directory."""
    data, model = write_data(directory)
    ran = dadvi("fit", f"{model}:model", data, "--out", directory / "serial", "--serial", "--quiet", *settings)
    assert ran.code == STOPPED, ran.err
    return directory


def ingest_options() -> Sequence[str]:
    """Return the options by which the table becomes 12 chunks in 4 shards."""
    return ("--fields", FIELDS, "--chunk-rows", "250", "--shard-rows", "750")


def assert_same_bits(run: Path, reference: Path) -> None:
    """Assert that two runs have the same posterior, to the bit: parameters, and the curvature where there is one."""
    found, expected = (
        {name: array[...] for name, array in zarr.open_group(each / "posterior.zarr", mode="r").arrays()}
        for each in (run, reference)
    )
    assert found.keys() == expected.keys() >= {"loc", "log_scale"}
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert name.startswith("curvature.") or value.dtype == np.float64  # a curvature has indices besides
        assert found[name].tobytes() == value.tobytes(), name


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of everything below a directory."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(directory))] = (status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def unchanged(directory: Path) -> Iterator[None]:
    """Assert that the body leaves everything below a directory as it was."""
    before = listing(directory)
    yield
    assert listing(directory) == before
