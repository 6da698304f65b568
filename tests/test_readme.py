"""The documents say what is so: the quickstart runs, and every command and option they name exists."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dadvi
from dadvi.cli import ExitCode, app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WITH_COMMANDS = ["README.md", "cluster/README.md", "scripts/demo.sh"]


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def options_of(command: str) -> set[str]:
    """Return the options that `dadvi COMMAND --help` lists, and fail if there is no such command."""
    result = CliRunner().invoke(app, [command, "--help"], env={"TERMINAL_WIDTH": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, f"there is no `dadvi {command}`"
    return set(re.findall(r"--[a-z][a-z-]*", result.stdout))


def test_quickstart_runs_and_finds_the_coefficients(tmp_path, monkeypatch):
    code, _ = blocks(README, "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.py").write_text(code)

    after = runpy.run_path("quickstart.py")

    posterior = after["posterior"]
    summary = posterior.summary()
    truth = {"a": -0.5, "beta[0]": 1.0, "beta[1]": -0.5, "beta[2]": 0.25, "beta[3]": 0.0, "beta[4]": 2.0}
    for name, value in truth.items():
        assert abs(summary.loc[name, "mean"] - value) < 4 * summary.loc[name, "sd"]
    assert posterior.status == "converged"
    assert posterior.certificate.within(0.1)
    reloaded = dadvi.load_posterior(tmp_path / "posterior.zarr")
    assert reloaded.summary().equals(summary)


def test_linear_response_goes_on_from_the_quickstart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "both.py").write_text("\n".join(blocks(README, "python")))
    after = runpy.run_path("both.py")
    for name in ("a", "beta[0]"):  # intercept and slopes hardly correlate here: the sds agree with one another
        sds = {after[which].summary().loc[name, "sd"] for which in ("posterior", "corrected")}
        assert max(sds) / min(sds) < 1.2
    assert after["corrected"].unconstrained.family.name == "full_rank"


def test_quickstart_is_short():
    code, _ = blocks(README, "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 25


def test_readme_names_the_two_commands():
    for command in ("bash scripts/demo.sh", "bash scripts/test.sh"):
        assert command in README
        assert (ROOT / command.split()[1]).is_file()


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_every_command_and_option_exists(document):
    text = (ROOT / document).read_text().replace("\\\n", " ")
    script = text if document.endswith(".sh") else "".join(blocks(text, "bash"))
    lines = re.findall(r"^ *(?:run )?(dadvi [a-z].*)$", script, flags=re.MULTILINE)
    lines += re.findall(r"`(dadvi [a-z][^`\n]*)`", text)
    assert lines
    for line in lines:
        command = line.split()[1]
        words = shlex.split(line, comments=True)
        named = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
        missing = named - options_of(command)
        assert not missing, f"{document}: `dadvi {command}` has no {', '.join(sorted(missing))}"


@pytest.mark.parametrize("document", ["README.md", "cluster/README.md"])
def test_every_option_named_alone_exists_somewhere(document):
    text = (ROOT / document).read_text()
    known = {"--nthreads", "--nworkers", "--host", "--port"}.union(*map(options_of, ("ingest", "fit", "summary")))
    named = {
        option for span in re.findall(r"`([^`\n]+)`", text) for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)
    }
    assert named <= known


def test_the_table_of_exit_codes_is_complete():
    named = set(map(int, re.findall(r"^\| (\d) \|", README, flags=re.MULTILINE)))
    assert named == set(ExitCode)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "cluster/README.md"])
def test_every_file_named_exists(document):
    text = (ROOT / document).read_text()
    named = set(re.findall(r"\]\(([^)#:]+)\)", text))
    named |= {span for span in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|sh|md|toml))`", text) if "NAME" not in span}
    missing = [name for name in named if not ((ROOT / document).parent / name).exists() and not (ROOT / name).exists()]
    assert not missing
