"""``dadvi summary``: what a fit found."""

from pathlib import Path
from typing import Annotated

import typer

from dadvi.cli.telling import print_table, say, summary_json
from dadvi.errors import InputError
from dadvi.posterior import load_posterior
from dadvi.runfiles import POSTERIOR, below, files_at


def summary(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Directory that `dadvi fit --out` wrote, or a posterior: path or URL."),
    ],
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print mean, sd and quantiles of every latent."""
    posterior = load_posterior(_posterior_in(run))
    if json:
        typer.echo(summary_json(posterior))
        return
    print_table(posterior)
    say(repr(posterior))


def _posterior_in(run: str) -> str:
    """Return where the posterior is: in the directory of a run, or what was given itself."""
    if POSTERIOR in files_at(run).names():
        return below(run, POSTERIOR)
    if "://" not in run and not Path(run).exists():
        raise InputError(f"{run} does not exist; give the directory that `dadvi fit --out` wrote, or a saved posterior")
    return run
