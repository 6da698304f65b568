"""The command line, for scripted batch jobs: ``dadvi ingest``, ``dadvi fit``, ``dadvi resume``, ``dadvi summary``.

What a person reads goes to stderr; stdout is the result. An option is taken from the command line, else from an
environment variable ``DADVI_OPTION``, else, for a fit, from its job file. Exit codes: 0 converged or done, 1 internal
error, 2 bad input or usage, 3 stopped before convergence (the result is saved) or interrupted (`dadvi resume` goes on),
4 diverged.
"""

import logging
import signal
import sys
from importlib import metadata
from typing import Annotated

import typer

from dadvi.cli.fitting import fit, resume
from dadvi.cli.ingesting import ingest
from dadvi.cli.summarizing import summary
from dadvi.cli.telling import ExitCode, say, short_warnings
from dadvi.errors import DadviError, InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # frames around errors would break their lines, in logs too
)
for _command in (ingest, fit, resume, summary):  # in the order of the help
    app.command(context_settings={"auto_envvar_prefix": "DADVI"})(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dadvi {metadata.version('dadvi')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fit Bayesian models to data too large for memory, on a Dask cluster, with a certificate."""


def _leave(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another one, to every process of a job, would cut the way out short
    sys.exit(128 + signal.SIGTERM)


def main() -> None:
    """Run the command line; an expected error ends with one line on stderr and its exit code, without a traceback."""
    # What a batch system sends first: leave as an error does, so that nothing half-written stays behind.
    signal.signal(signal.SIGTERM, _leave)
    # The first four log a lost connection, with tracebacks: an error tells it. The last logs what a worker that was
    # killed earlier left behind, where another process removes it at the same moment.
    for part in ("batched", "client", "comm", "core", "diskutils"):
        logging.getLogger(f"distributed.{part}").setLevel(logging.CRITICAL)
    try:
        with short_warnings():
            app(prog_name="dadvi")
    except InputError as error:
        code, text = ExitCode.BAD_INPUT, str(error)
    except (DadviError, OSError) as error:
        code, text = ExitCode.INTERNAL, str(error) or type(error).__name__
    say("error: " + " ".join(text.split()))
    sys.exit(code)
