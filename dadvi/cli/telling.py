"""What the commands print: stdout is the result, as a path, a table or JSON; what a person reads goes to stderr."""

import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import IntEnum
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dadvi.plan import Plan
from dadvi.posterior import Posterior


class ExitCode(IntEnum):
    """What the process tells a batch system."""

    CONVERGED = 0
    INTERNAL = 1
    BAD_INPUT = 2
    STOPPED = 3
    DIVERGED = 4


def say(text: str) -> None:
    """Write a line to stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


@contextmanager
def short_warnings() -> Iterator[None]:
    """Tell a warning in one line, without the place in the code that it came from."""

    def show(message: Warning | str, *_place: object, **_source: object) -> None:
        say(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def say_how_it_ended(posterior: Posterior, *, quiet: bool) -> None:
    """Tell how a fit ended, and unless it is to be quiet where the time of its passes went."""
    if posterior.records and not quiet:
        profile = asdict(posterior.records[-1].profile)
        say("seconds of passes: " + ", ".join(f"{phase} {value:.1f}" for phase, value in profile.items()))
    seconds = posterior.records[-1].seconds if posterior.records else 0.0
    certificate = posterior.certificate
    distance = f"; means within {certificate.max:.3g} posterior sds of the optimum" if certificate else ""
    say(f"{posterior.status}: {posterior.reason}{distance} ({posterior.passes:.1f} passes, {seconds:.1f} s)")


def plan_text(plan: Plan) -> str:
    """Return a plan as lines of a name and a value."""

    def text(name: str, value: str | float) -> str:
        if "bytes" in name:
            return f"{float(value) / 2**20:,.1f} MiB"
        return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value

    return "\n".join(f"{name.replace('_', ' '):<16} {text(name, value)}" for name, value in asdict(plan).items())


def print_table(posterior: Posterior) -> None:
    """Print the summary to stdout: in columns that fit a terminal, or else of any width."""
    table = posterior.summary()
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 10_000, force_terminal=terminal)  # FORCE_COLOR is not for files
    shown = Table("latent", *table.columns, box=None, header_style="bold")
    for column in shown.columns[1:]:
        column.justify = "right"
    for label, row in table.iterrows():
        shown.add_row(Text(str(label)), *(f"{value:.4g}" for value in row))
    console.print(shown)


# JSON, in which null stands for what is not a finite number -----------------------------------------------------------


def summary_json(posterior: Posterior) -> str:
    """Return the summary and how the fit ended as one JSON object."""
    latents = {
        latent: {str(name): _finite(value) for name, value in row.items()}
        for latent, row in posterior.summary().to_dict(orient="index").items()
    }
    return dumps({**_ending(posterior), "latents": latents})


def ending_json(posterior: Posterior, location: str) -> str:
    """Return how the fit ended, and where its posterior is, as one JSON object."""
    return dumps({**_ending(posterior), "posterior": location})


def dumps(document: dict[str, Any]) -> str:
    """Return a document as JSON that every reader takes."""
    return json.dumps(document, allow_nan=False)


def _ending(posterior: Posterior) -> dict[str, Any]:
    certificate = posterior.certificate
    return {
        "status": posterior.status,
        "reason": posterior.reason,
        "elbo": _finite(posterior.elbo),
        "passes": posterior.passes,
        "certificate": None
        if certificate is None
        else {name: _finite(value) for name, value in asdict(certificate).items()},
        "family": posterior.unconstrained.family.name,
        "tol": posterior.settings.get("tol"),
        "num_rows": posterior.settings.get("data", {}).get("num_rows"),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
