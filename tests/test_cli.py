"""The command line as a batch job meets it: exit codes, streams, files, help, and what is seen while a fit runs."""

import errno
import inspect
import json
import os
import pty
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
from command import (
    BAD_INPUT,
    CONVERGED,
    DIVERGED,
    FIELDS,
    INTERNAL,
    MODEL,
    STOPPED,
    assert_interrupted,
    assert_same_bits,
    command,
    dadvi,
    dadvi_process,
    environment,
    ingest_options,
    listening,
    listing,
    write_data,
    write_table,
)

import dadvi as package
from dadvi.cli import fitting
from dadvi.cli.telling import summary_json
from dadvi.control import ControlVariate
from dadvi.elbo import Entropy
from dadvi.errors import InputError, WorkError
from dadvi.modelfile import ModelFile
from dadvi.optim import AVERAGING, OPTIMIZERS, SCHEDULES

LINE = r" *\d+\.\d s  [\d.]+/\d+ passes  ELBO -\d+\.\d( \(one minibatch\))?  [\d,]+ rows/s  [\d:]+ left at most"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A directory with data.zarr, model.py, and run, a finished fit of the one to the other."""
    directory = tmp_path_factory.mktemp("cli")
    data, model = write_data(directory)
    ran = dadvi("fit", f"{model}:model", data, "--out", directory / "run", "--serial", "--quiet")
    assert ran.code == CONVERGED, ran.err
    return directory


def fit(world: Path, out: Path, *options: object, model: str = "model"):
    return dadvi("fit", f"{world / 'model.py'}:{model}", world / "data.zarr", "--out", out, "--serial", *options)


def with_model(directory: Path, text: str, name: str = "model") -> str:
    (directory / "written.py").write_text(text)
    return f"{directory / 'written.py'}:{name}"


# As processes ---------------------------------------------------------------------------------------------------------


def test_ingest_fit_and_summary_as_a_script_runs_them(world, tmp_path):
    """Stdout has the result and nothing else, stderr what a person reads, and neither a control character."""
    table = write_table(tmp_path / "table.csv")
    (tmp_path / "model.py").write_text((world / "model.py").read_text())
    colours = {"FORCE_COLOR": "1"}  # as a CI system may set it

    ran = dadvi_process("ingest", "table.csv", "data.zarr", *ingest_options(), cwd=tmp_path, **colours)
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'data.zarr'}\n")
    assert ran.err.count("\n") == 1
    assert f"{len(table)} rows of {{y: int64, x: float32, g: int8}}" in ran.err

    ran = dadvi_process("fit", "model.py:build", "data.zarr", "--out", "run", "--serial", cwd=tmp_path, **colours)
    assert (ran.code, ran.out) == (CONVERGED, "run/posterior.zarr\n")
    *lines, spent, end = ran.err.splitlines()
    assert lines
    phases = ("read", "decode", "check", "forward", "backward", "wait", "transfer", "reduce")
    assert re.fullmatch("seconds of passes: " + ", ".join(rf"{phase} [\d.]+" for phase in phases), spent)
    for line in lines:
        assert re.fullmatch(LINE + r"(  certificate [\d.e-]+ sd)?", line), line
    assert "certificate" in lines[-1]
    assert re.fullmatch(
        r"converged: the certificate is within tol=0\.1; means within [\d.e-]+ posterior sds of the optimum "
        r"\([\d.]+ passes, [\d.]+ s\)",
        end,
    )
    assert package.load_posterior(tmp_path / "run" / "posterior.zarr").elbo == pytest.approx(-1_800, abs=300)

    ran = dadvi_process("summary", "run", cwd=tmp_path, **colours)
    assert ran.code == 0
    assert ran.err.startswith("<Posterior mean_field of a[], b[], e[3]: converged, ")
    assert ran.out.isprintable() is False  # lines
    assert "".join(ran.out.split("\n")).isprintable()
    assert [line.split()[0] for line in ran.out.splitlines()] == ["latent", "a", "b", "e[AA]", "e[BB]", "e[CC]"]


def test_a_fit_starts_its_own_workers(world, tmp_path):
    """Without a scheduler worker processes are started, to which the model file travels: same bits as without them."""
    options = ["--method", "advi", "--max-passes", "4", "--seed", "7", "--quiet"]
    ran = dadvi_process(
        *["fit", f"{world / 'model.py'}:model", world / "data.zarr", "--out", "run", "--workers", "1", *options],
        cwd=tmp_path,
    )
    assert (ran.code, ran.out) == (STOPPED, "run/posterior.zarr\n")
    assert ran.err.startswith("stopped: max_passes=4 reached")
    assert ran.err.count("\n") == 1, ran.err  # no warning and no log of anyone else's
    assert fit(world, tmp_path / "serial", *options).code == STOPPED
    assert_same_bits(tmp_path / "run", tmp_path / "serial")


def test_bad_input_of_a_process_is_one_line_and_exit_code_2(tmp_path):
    ran = dadvi_process("summary", "nothing", cwd=tmp_path)
    assert (ran.code, ran.out) == (BAD_INPUT, "")
    assert ran.err == (
        "error: nothing does not exist; give the directory that `dadvi fit --out` wrote, or a saved posterior\n"
    )


def test_a_terminal_shows_a_live_line(world, tmp_path):
    shown, code, out = on_a_terminal(
        command(
            "fit", f"{world / 'model.py'}:model", world / "data.zarr", "--out", "run", "--serial", "--max-passes", 30
        ),
        tmp_path,
    )
    assert code in (CONVERGED, STOPPED)
    assert out == "run/posterior.zarr\n"
    assert "\x1b[" in shown  # it moves the cursor
    assert re.search(r"[\d.]+/30 passes  ELBO -[\d.]+  [\d,]+ rows/s  0:\d\d:\d\d left at most", shown), shown
    assert "warm start" in shown
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)
    assert re.search(r"(converged|stopped): .*\([\d.]+ passes, [\d.]+ s\)\r\n$", plain), plain


def on_a_terminal(arguments: list[str], cwd: Path) -> tuple[str, int, str]:
    """Run a process whose stderr is a terminal of 80 columns; return what it shows, the exit code and stdout."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        arguments, cwd=cwd, env=environment(TERM="xterm", COLUMNS="80"), stdout=subprocess.PIPE, stderr=slave, text=True
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                part = os.read(master, 65_536)
            except OSError as error:  # Linux tells so that the other end was closed
                if error.errno != errno.EIO:
                    raise
                break
            if not part:
                break
            shown += part
        out = process.stdout.read()
    os.close(master)
    return shown.decode(), process.returncode, out


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fit_tells_how_to_go_on(world, tmp_path, signal_number):
    run, options = tmp_path / "run", ["--serial", "--method", "advi", "--tol", "1e-9", "--max-passes", "100000"]
    with listening("fit", f"{world / 'model.py'}:model", world / "data.zarr", "--out", run, *options) as process:
        assert "passes" in process.stderr.readline()  # the first line: it runs
        assert_interrupted(process, signal_number, run)
    ran = dadvi("resume", run, "--serial", "--max-passes", 1)
    assert ran.code == STOPPED, ran.err
    assert ran.out == f"{run / 'posterior.zarr'}\n"


# A fit in this process ------------------------------------------------------------------------------------------------


def test_the_run_directory_holds_posterior_trace_and_settings(world):
    run = world / "run"
    assert sorted(path.name for path in run.iterdir()) == ["model.py", "posterior.zarr", "settings.json", "trace.jsonl"]
    posterior = package.load_posterior(run / "posterior.zarr")
    settings = json.loads((run / "settings.json").read_text())
    assert settings == posterior.settings
    assert settings["seed"] == 0
    assert settings["family"] == {"name": "mean_field"}
    assert settings["method"] == {"name": "Anchored", "subsample_rows": None, "num_draws": None, "curvature": "auto"}
    assert settings["data"]["location"] == str(world / "data.zarr")
    trace = [json.loads(line) for line in (run / "trace.jsonl").read_text().splitlines()]
    assert len(trace) == len(posterior.trace)
    assert [row["phase"] for row in trace] == list(posterior.trace["phase"])
    assert trace[-1]["phase"] == "round"
    assert trace[-1]["elbo"] == pytest.approx(posterior.elbo)


def test_summary_is_that_of_the_posterior(world):
    posterior = package.load_posterior(world / "run" / "posterior.zarr")
    expected = posterior.summary()

    ran = dadvi("summary", world / "run", "--json")
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)
    assert (told["status"], told["reason"], told["elbo"]) == ("converged", posterior.reason, posterior.elbo)
    assert told["passes"] == posterior.passes
    assert told["certificate"] == asdict(posterior.certificate)
    pd.testing.assert_frame_equal(pd.DataFrame.from_dict(told["latents"], orient="index"), expected)

    header, *lines = (line.split() for line in dadvi("summary", world / "run").out.splitlines())
    assert header == ["latent", "mean", "sd", "5%", "50%", "95%"]
    assert [line[0] for line in lines] == list(expected.index) == ["a", "b", "e[AA]", "e[BB]", "e[CC]"]
    assert [line[1:] for line in lines] == [[f"{value:.4g}" for value in row] for row in expected.to_numpy()]

    assert dadvi("summary", world / "run" / "posterior.zarr", "--json").out == ran.out


def test_a_summary_in_a_file_breaks_no_label(tmp_path, world):
    label = "a place with a long name, " * 6
    table = pd.DataFrame({"y": [0, 1] * 50, "x": range(100), "g": [label, "b"] * 50})
    table.to_parquet(tmp_path / "table.parquet")
    assert dadvi("ingest", tmp_path / "table.parquet", tmp_path / "data.zarr", "--fields", FIELDS).code == 0
    reference = f"{world / 'model.py'}:build"
    fitted = dadvi("fit", reference, tmp_path / "data.zarr", "--out", tmp_path / "run", "--serial", "--max-passes", 3)
    assert fitted.code in (CONVERGED, STOPPED)
    assert any(line.startswith(f" e[{label}] ") for line in dadvi("summary", tmp_path / "run").out.splitlines())


def test_max_passes_stops_with_code_3_and_keeps_the_result(world, tmp_path):
    ran = fit(world, tmp_path / "run", "--method", "advi", "--max-passes", 3, "--tol", 1e-6)
    assert (ran.code, ran.out) == (STOPPED, f"{tmp_path / 'run' / 'posterior.zarr'}\n")
    assert ran.err.splitlines()[-1].startswith(
        "stopped: max_passes=3 reached, before its average settled; means within "
    )
    posterior = package.load_posterior(tmp_path / "run" / "posterior.zarr")
    assert posterior.status == "stopped"
    assert posterior.settings["tol"] == 1e-6


@pytest.mark.parametrize("rate", [1e6, 1e3])
def test_divergence_ends_with_code_4(world, tmp_path, rate):
    ran = fit(world, tmp_path / "run", "--learning-rate", rate, "--max-passes", 30)
    assert ran.code == DIVERGED, ran.err
    assert ran.err.splitlines()[-1].startswith("diverged: ")
    told = dadvi("summary", tmp_path / "run", "--json")
    assert json.loads(told.out, parse_constant=pytest.fail)["status"] == "diverged"  # NaN and Infinity are not JSON


def test_what_is_not_finite_is_null_in_json(world):
    posterior = package.load_posterior(world / "run" / "posterior.zarr")
    object.__setattr__(posterior, "elbo", -float("inf"))
    object.__setattr__(posterior, "certificate", None)
    told = json.loads(summary_json(posterior), parse_constant=pytest.fail)
    assert told["elbo"] is None
    assert told["certificate"] is None


def test_an_earlier_run_is_replaced_only_when_asked(world, tmp_path):
    run = tmp_path / "run"
    assert fit(world, run, "--max-passes", 3, "--seed", 1).code in (CONVERGED, STOPPED)
    before = listing(run)
    refused = fit(world, run, "--max-passes", 3, "--seed", 2)
    assert refused.code == BAD_INPUT
    assert (
        refused.err == f"error: {run} exists; choose another output, or replace it with overwrite=True (--overwrite)\n"
    )
    assert listing(run) == before
    assert fit(world, run, "--max-passes", 3, "--seed", 2, "--overwrite").code in (CONVERGED, STOPPED)
    assert package.load_posterior(run / "posterior.zarr").settings["seed"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failing_fit_keeps_the_run_it_was_to_replace(world, tmp_path):
    run = tmp_path / "run"
    assert fit(world, run, "--max-passes", 3).code in (CONVERGED, STOPPED)
    before = listing(tmp_path)
    assert fit(world, run, "--overwrite", "--max-passes", -1).code == BAD_INPUT
    assert listing(tmp_path) == before


def test_a_data_set_is_replaced_only_when_asked(tmp_path):
    table = write_table(tmp_path / "table.csv", rows=50)
    arguments = ["ingest", tmp_path / "table.csv", tmp_path / "data.zarr", "--fields", "y g:category"]
    assert dadvi(*arguments, "--keep-order").code == 0
    first = package.open_shards(tmp_path / "data.zarr").read(0)
    assert first["y"].tolist() == table["y"].tolist()
    assert dadvi(*arguments).code == BAD_INPUT
    ran = dadvi(*arguments, "--overwrite", "--shuffle", 5)
    assert ran.code == 0
    data = package.open_shards(tmp_path / "data.zarr")
    assert data.manifest.made["shuffle"] == 5
    assert data.read(0)["y"].tolist() != first["y"].tolist()


def test_ingest_drops_rows_with_missing_values_when_asked(tmp_path):
    pd.DataFrame({"y": [0, 1, 1], "x": [0.5, None, 2.0]}).to_csv(tmp_path / "table.csv", index=False)
    ran = dadvi(
        "ingest", tmp_path / "table.csv", tmp_path / "data.zarr", "--missing", "drop", "--fields", "y", "--fields", "x"
    )
    assert ran.code == 0, ran.err
    assert package.open_shards(tmp_path / "data.zarr").num_rows == 2


def test_quiet_tells_only_how_the_fit_ended(world, tmp_path):
    ran = fit(world, tmp_path / "run", "--max-passes", 3, "--quiet")
    assert ran.err.count("\n") == 1
    assert ran.err.startswith(("stopped: ", "converged: "))


@pytest.mark.parametrize(
    "options",
    [
        ["--family", "full_rank", "--optimizer", "sgd", "--schedule", "constant", "--averaging", "none"],
        ["--family", "low_rank", "--estimator", "stl", "--num-draws", "4", "--batch-rows", "500"],
        ["--control-variate", "anchor"],
        ["--method", "anchored", "--num-draws", "6", "--subsample-rows", "700"],
        ["--curvature", "data", "--num-draws", "6"],
        ["--family", "low_rank", "--rank", "3", "--subsample-rows", "700", "--design", "random", "--rhat-max", "1.5"],
        ["--fixed-draws", "True"],
    ],
)
def test_settings_reach_the_fit(world, tmp_path, options):
    given = [each for each in options if each != "True"]  # which a flag goes without
    assert fit(world, tmp_path / "run", "--max-passes", 3, *given).code in (CONVERGED, STOPPED)
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    method, family = settings["method"], settings["family"]
    reached = {**family, **method, "method": method["name"].lower(), "family": family["name"]}
    asked = {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(options[::2], options[1::2], strict=True)
    }
    assert {name: str(reached[name]) for name in asked} == asked
    assert settings["max_passes"] == 3
    assert reached["method"] == ("anchored" if {"--method", "--curvature"} & set(options) else "advi")


def test_every_setting_of_a_method_and_of_a_family_has_an_option():
    settings = {each.name for kind in (package.ADVI, package.Anchored, package.LowRank) for each in fields(kind)}
    assert settings <= set(inspect.signature(fitting.fit).parameters)


# Model files ----------------------------------------------------------------------------------------------------------


def test_a_function_of_the_data_is_as_good_as_the_model(world, tmp_path):
    for name in ("model", "build"):
        assert fit(world, tmp_path / name, "--max-passes", 3, model=name).code in (CONVERGED, STOPPED)
    assert_same_bits(tmp_path / "model", tmp_path / "build")


def test_a_model_file_leaves_nothing_importable(world):
    ModelFile(f"{world / 'model.py'}:model").load(package.open_shards(world / "data.zarr"))
    assert not [name for name in sys.modules if "dadvi_model" in name]


def test_a_model_file_may_define_dataclasses(world, tmp_path):
    start = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    reference = with_model(tmp_path, f"{start}\n@dataclass\nclass Scale:\n    a: float\n\n{MODEL}")
    ran = dadvi("fit", reference, world / "data.zarr", "--out", tmp_path / "run", "--serial", "--max-passes", 3)
    assert ran.code in (CONVERGED, STOPPED), ran.err


PRELUDE = "import dadvi\nfrom torch.distributions import Normal, Poisson\n"
BROKEN = {
    "syntax": ("model = 1\nmodel = (\n", "failed: SyntaxError: '(' was never closed (written.py, line 2)"),
    "raises": ("import dadvi\n\nmodel = 1 / 0\n", "failed in line 3: ZeroDivisionError: division by zero"),
    "imports": ("import a_module_that_is_not\n", "failed in line 1: ModuleNotFoundError: No module named"),
    "leaves": ("import sys\nsys.exit(0)\n", "failed in line 2: SystemExit: 0"),
    "is bad": (
        PRELUDE + "model = dadvi.Model({'a': Poisson(1.0)}, log_likelihood=lambda a, x: a * x)\n",
        "in line 3: latent 'a': the support IntegerGreaterThan",
    ),
    "function raises": (
        "def model(data):\n    return help(data)\n\ndef help(data):\n    raise KeyError(data.num_rows)\n",
        "failed in line 5: KeyError: 3000",
    ),
    "function of nothing": (
        "def model():\n    return None\n",
        "failed: TypeError: model() takes 0 positional arguments",
    ),
    "function returns": ("def model(data):\n    return None\n", ":model returned a NoneType; it must be a dadvi.Model"),
    "other": (
        "model = [1]\n",
        ":model is a list; it must be a dadvi.Model, or a function of the data set that returns",
    ),
    "name": ("import dadvi\nother = 1\n", "has no 'model'; the models in it are: none"),
    "none": ("model = None\n", ":model is a NoneType; it must be a dadvi.Model"),
    "likelihood fails": (
        PRELUDE + "model = dadvi.Model(\n {'a': Normal(0.0, 1.0)},\n lambda a, x: Normal(x.missing, 1.0),\n 'y')\n",
        "'Tensor' object has no attribute 'missing'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_file_is_told_with_its_line(world, tmp_path, kind):
    text, fragment = BROKEN[kind]
    reference = with_model(tmp_path, text)
    before = listing(tmp_path)
    ran = dadvi("fit", reference, world / "data.zarr", "--out", tmp_path / "run", "--serial")
    assert (ran.code, ran.out) == (BAD_INPUT, "")
    assert fragment in ran.err
    assert re.match(r"error: .*written\.py", ran.err) or kind == "likelihood fails"
    assert ran.err.count("\n") == 1
    assert {path for path in listing(tmp_path) if "__pycache__" not in path} == set(before)
    if kind == "likelihood fails":
        assert ran.err.endswith(f"({tmp_path / 'written.py'} in line 5)\n")


def test_the_line_is_found_when_the_path_is_relative(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_model(tmp_path, "\n\nraise ValueError('here')\n")
    ran = dadvi("fit", "written.py:model", world / "data.zarr", "--out", "run", "--serial")
    assert ran.err == "error: written.py failed in line 3: ValueError: here\n"


def test_the_models_of_a_file_are_named_when_another_is_asked_for(world, tmp_path):
    ran = fit(world, tmp_path / "run", model="modle")
    assert (ran.code, ran.err) == (
        BAD_INPUT,
        (
            f"error: {world / 'model.py'} has no 'modle'; the models in it are: model; the functions, of which one "
            "may return a model: likelihood, build\n"
        ),
    )


# Help and other errors ------------------------------------------------------------------------------------------------


def test_without_arguments_the_commands_are_told():
    ran = dadvi()
    assert ran.code == BAD_INPUT
    for name in ("ingest", "fit", "summary", "--version"):
        assert f"  {name} " in ran.out + ran.err


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        (
            "ingest",
            ["SOURCE", "OUT.zarr", ":category, :standardize", "--missing", "default: refuse]"],
        ),
        (
            "fit",
            [
                "MODEL.py:NAME",
                "DATA.zarr",
                "--scheduler ADDRESS",
                "default: 0.1]",
                "[env var: DADVI_SCHEDULER]",
                "3 stopped",
                "4 diverged",
            ],
        ),
        ("summary", ["RUN", "--json", "`dadvi fit --out`"]),
    ],
)
def test_help_tells_arguments_defaults_and_exit_codes(name, fragments):
    ran = dadvi(name, "--help")
    assert (ran.code, ran.err) == (0, "")
    text = " ".join(ran.out.split())
    for fragment in fragments:
        assert fragment in text
    assert "".join(ran.out.split("\n")).isprintable()


def test_help_names_every_choice_that_is_there():
    text = " ".join(dadvi("fit", "--help").out.split())
    for each in (
        *OPTIMIZERS,
        *SCHEDULES,
        *AVERAGING,
        *Entropy.__args__,
        *ControlVariate.__args__,
        *package.families.FAMILIES,
    ):
        assert re.search(rf"\b{each}\b", text), each


def test_version():
    assert dadvi("--version").out == f"dadvi {metadata.version('dadvi')}\n"


def test_what_failed_elsewhere_is_code_1_and_one_line(world, tmp_path, monkeypatch):
    def fail(*_arguments, **_settings):
        raise WorkError("pass 'gradient' failed on shard 3, chunk 7")

    monkeypatch.setattr(fitting, "run_fit", fail)
    ran = fit(world, tmp_path / "run")
    assert (ran.code, ran.out, ran.err) == (INTERNAL, "", "error: pass 'gradient' failed on shard 3, chunk 7\n")


def test_a_full_disk_is_code_1_and_one_line(world, tmp_path, monkeypatch):
    def fail(*_arguments, **_settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run")

    monkeypatch.setattr(fitting, "run_fit", fail)
    ran = fit(world, tmp_path / "run")
    assert (ran.code, ran.err) == (INTERNAL, "error: [Errno 28] No space left on device: 'run'\n")


def test_a_warning_is_one_line_without_the_place_it_came_from(world, tmp_path, monkeypatch):
    def warn(*_arguments, **_settings):
        warnings.warn("rows stand in\n order", UserWarning, stacklevel=2)
        raise InputError("then this")

    monkeypatch.setattr(fitting, "run_fit", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        ran = fit(world, tmp_path / "run")
    assert ran.err == "warning: rows stand in order\nerror: then this\n"
