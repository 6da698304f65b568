"""The command line, for scripted batch jobs: ``dadvi ingest``, ``dadvi fit``, ``dadvi resume``, ``dadvi summary``.

What a person reads goes to stderr; stdout is the result. An option is taken from the command line, else from an
environment variable ``DADVI_OPTION``, else, for a fit, from its job file. Exit codes: 0 converged or done, 1 internal
error, 2 bad input or usage, 3 stopped before convergence (the result is saved) or interrupted (`dadvi resume` goes on),
4 diverged.
"""

import importlib.util
import json
import logging
import math
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from enum import IntEnum, StrEnum
from importlib import metadata
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dadvi.advi import ADVI
from dadvi.anchored import Anchored
from dadvi.checkpoint import RunDirectory
from dadvi.errors import DadviError, InputError, ModelError
from dadvi.families import Family, LowRank, make_family
from dadvi.fit import Method, check_limits
from dadvi.fit import fit as run_fit
from dadvi.fit import resume as run_resume
from dadvi.ingest import ingest as run_ingest
from dadvi.jobs import read_job
from dadvi.model import Model
from dadvi.plan import Plan, make_plan
from dadvi.posterior import Posterior, load_posterior
from dadvi.progress import Lines, Meter
from dadvi.runfiles import MODEL, POSTERIOR, below, files_at
from dadvi.sharding import ShardedDataset, open_shards
from dadvi.types import whole_number

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # frames around errors would break their lines, in logs too
)

_ENVIRONMENT = {"auto_envvar_prefix": "DADVI"}
"""Settings of every command: options may come from DADVI_OPTION."""


class ExitCode(IntEnum):
    """What the process tells a batch system."""

    CONVERGED = 0
    INTERNAL = 1
    BAD_INPUT = 2
    STOPPED = 3
    DIVERGED = 4


class FamilyName(StrEnum):
    """The variational families by name."""

    MEAN_FIELD = "mean_field"
    FULL_RANK = "full_rank"
    LOW_RANK = "low_rank"


class MethodName(StrEnum):
    """The methods by name."""

    AUTO = "auto"
    ANCHORED = "anchored"
    ADVI = "advi"


Scheduler = Annotated[str | None, typer.Option(metavar="ADDRESS", help="A running Dask scheduler, tcp://HOST:PORT.")]
Workers = Annotated[int | None, typer.Option(help="Local worker processes. Default: one per core.")]
Serial = Annotated[bool, typer.Option("--serial", help="Work in this process, without workers.")]
CheckpointSeconds = Annotated[
    float, typer.Option(help="Between checkpoints of advi, at most; anchored writes one after every pass.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help='What a worker may hold besides Python: "2 GiB". Default: a quarter of its memory.',
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Tell every step in a line of its own; a fit its plan.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only how the fit ended.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result, or the plan, as one JSON object.")]

_ADVI = "Stochastic ADVI (giving one of these chooses it)"
_ANCHORED = "Anchored rounds (giving one of these chooses them)"
_EITHER = "Either method (advi, unless --method anchored or one of its own settings is given)"


class Missing(StrEnum):
    """What to do with rows that have missing values."""

    REFUSE = "refuse"
    DROP = "drop"


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


@app.command(context_settings=_ENVIRONMENT)
def ingest(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="Parquet, CSV or Arrow/Feather files, directories, globs or URLs."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT.zarr", help="Zarr group to write: a path or URL.")],
    fields: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME, NAME=COLUMN or NAME=COLUMN,COLUMN (stacked), each with :category, :standardize or :DTYPE; "
            "several in one string or by repeating the option. Default: every column.",
        ),
    ] = None,
    shuffle: Annotated[int | None, typer.Option(help="Seed of the global shuffle of rows. Default: 0.")] = None,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Do not shuffle.")] = False,
    missing: Annotated[Missing, typer.Option(help="Refuse rows with missing values, or drop them.")] = Missing.REFUSE,
    chunk_rows: Annotated[
        int | None, typer.Option(help="Rows of a chunk, the unit of sampling. Default: 8 MiB, less on small data.")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option(help="Rows of a shard, a multiple of a chunk's. Default: 128 MiB, less on small data.")
    ] = None,
    compression: Annotated[str | None, typer.Option(help="zstd. Default: none.")] = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    serial: Serial = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing data set.")] = False,
) -> None:
    """Write tables as a shuffled Zarr data set, in bounded memory. Prints where it is.

    Without --scheduler, --workers or --serial, files up to 256 MiB are read in this process, larger ones by one worker
    process per core. The data set is the same.
    """
    client, num_workers = _who_works(context, scheduler, workers, serial, otherwise=None)
    if shuffle is not None and shuffle < 0:
        raise InputError(f"--shuffle {shuffle}: a seed is a whole number, at least 0")
    if keep_order and shuffle is not None:
        raise InputError("--shuffle and --keep-order exclude one another; give one of them")
    data = run_ingest(
        sources,
        out,
        " ".join(fields) if fields else None,
        client=client,
        num_workers=num_workers,
        shuffle=None if keep_order else shuffle or 0,
        missing=missing.value,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        compression=compression,
        overwrite=overwrite,
    )
    dropped = data.manifest.made["rows_dropped"]
    _say(f"{data!r}; {dropped} of {data.num_rows + dropped} rows dropped for missing values" if dropped else repr(data))
    typer.echo(str(data.location))


def _read_config(context: typer.Context, config: Path | None) -> Path | None:
    """Make the values of a job file the defaults of the options that come after it."""
    if config is not None:
        options = get_type_hints(fit)
        for name in ("context", "config", "return"):
            del options[name]
        context.default_map = read_job(config, options)
    return config


@app.command(context_settings=_ENVIRONMENT)
def fit(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL.py:NAME",
            help="Python file, and in it a Model or a function of the data set that returns one.",
        ),
    ],
    data: Annotated[str, typer.Argument(metavar="DATA.zarr", help="Path or URL of a Zarr data set.")],
    out: Annotated[
        str,
        typer.Option(
            help="Directory to write, a path or URL: posterior.zarr, trace.jsonl, settings.json, checkpoints."
        ),
    ],
    scheduler: Scheduler = None,
    workers: Workers = None,
    serial: Serial = False,
    memory: Memory = None,
    family: Annotated[FamilyName, typer.Option(help="Variational family.")] = FamilyName.MEAN_FIELD,
    rank: Annotated[int | None, typer.Option(help=f"Rank of low_rank. Default: {LowRank.rank}.")] = None,
    tol: Annotated[float, typer.Option(help="Certificate at which a fit has converged, in posterior sds.")] = 0.1,
    max_passes: Annotated[
        float | None,
        typer.Option(
            help="Passes after which no further round or epoch starts. Default: 30; for advi 50, more on small data."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    method: Annotated[
        MethodName,
        typer.Option(
            help="How to fit. auto: anchored, for up to 2000 coordinates besides effects of groups, else advi."
        ),
    ] = MethodName.AUTO,
    batch_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of a minibatch. Default: a twentieth of the data, at most 65536.", rich_help_panel=_ADVI
        ),
    ] = None,
    num_draws: Annotated[
        int | None,
        typer.Option(
            help=f"Draws of the latents, for advi a step. Default: {ADVI.num_draws}, for anchored 4 to 64.",
            rich_help_panel=_EITHER,
        ),
    ] = None,
    subsample_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of the subsample on which a fit starts. Default: 20000 or more.", rich_help_panel=_EITHER
        ),
    ] = None,
    curvature: Annotated[
        str | None,
        typer.Option(
            help="Where it is measured: subsample, data, or auto (default): on the subsample if that tells enough.",
            rich_help_panel=_ANCHORED,
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="adam (default), sgd, rmsprop, adagrad, dowg or proximal.", rich_help_panel=_ADVI),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="In posterior sds a step. Default: the optimizer's.", rich_help_panel=_ADVI),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="inverse_sqrt (default), constant or cosine.", rich_help_panel=_ADVI)
    ] = None,
    averaging: Annotated[
        str | None, typer.Option(help="tail (default), polynomial or none.", rich_help_panel=_ADVI)
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="closed_form (default), stl or monte_carlo.", rich_help_panel=_ADVI)
    ] = None,
    design: Annotated[
        str | None, typer.Option(help="antithetic (default), random or orthogonal draws.", rich_help_panel=_ADVI)
    ] = None,
    fixed_draws: Annotated[
        bool, typer.Option("--fixed-draws", help="The same draws in every step.", rich_help_panel=_ADVI)
    ] = False,
    rhat_max: Annotated[
        float | None,
        typer.Option(help=f"Largest R-hat of settled iterates. Default: {ADVI.rhat_max}.", rich_help_panel=_ADVI),
    ] = None,
    control_variate: Annotated[
        str | None,
        typer.Option(
            help="none (default), or anchor: minibatches corrected by the full-data gradient at a point nearby.",
            rich_help_panel=_ADVI,
        ),
    ] = None,
    checkpoint_seconds: CheckpointSeconds = 60.0,
    config: Annotated[  # noqa: ARG001  its callback has read it
        Path | None,
        typer.Option(
            metavar="JOB.toml",
            callback=_read_config,
            is_eager=True,  # before the options whose defaults it gives
            help='Options from a TOML file: model = "model.py:flights", max_passes = 40, ...; those given here win.',
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the input and print the plan: sizes, method, passes, memory.")
    ] = False,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, with its settings, if one has begun there.")
    ] = False,
) -> None:
    """Fit a model to a data set and write the posterior. Prints where it is.

    Without --scheduler, --workers or --serial the fit starts one worker process per core.

    Exit codes: 0 converged, 1 internal error, 2 bad input or usage, 3 stopped before convergence (the result is saved)
    or interrupted (`dadvi resume` goes on), 4 diverged.
    """
    client, num_workers = _who_works(context, scheduler, workers, serial, otherwise=_cores())
    verbose, quiet = _how_much(context, verbose, quiet)
    settings = _method(
        method,
        either={"num_draws": num_draws, "subsample_rows": subsample_rows},
        anchored={"curvature": curvature},
        advi={
            "batch_rows": batch_rows,
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "schedule": schedule,
            "averaging": averaging,
            "estimator": estimator,
            "design": design,
            "fixed_draws": fixed_draws or None,
            "rhat_max": rhat_max,
            "control_variate": control_variate,
        },
    )
    chosen = _family(family, rank)
    if overwrite and resume:
        raise InputError("--overwrite and --resume exclude one another; give one of them")
    if resume and not dry_run and (begun := RunDirectory.begun_at(out)) is not None:
        _go_on(
            begun,
            out,
            model,
            data,
            client=client,
            num_workers=num_workers,
            memory=memory,
            max_passes=max_passes,
            checkpoint_seconds=checkpoint_seconds,
            as_json=json,
            verbose=verbose,
            quiet=quiet,
        )
    dataset = open_shards(data)
    loaded = load_model(model, dataset)
    path = _model_path(model)
    origin = {"model": f"{path.resolve()}:{model.rpartition(':')[2]}", "data": str(dataset.location)}
    directory = RunDirectory(out, overwrite=overwrite, model_file=path, origin=origin)
    with _naming_line(path), _telling_how_to_resume(directory):
        if dry_run or verbose:
            check_limits(tol, max_passes)
            whole_number("seed", seed)
            directory.check()
            plan = make_plan(
                loaded,
                dataset,
                method=settings,
                family=chosen,
                max_passes=max_passes,
                memory_budget=memory,
            )
        if dry_run:
            typer.echo(_dumps(asdict(plan)) if json else _told(plan))
            return
        if verbose:
            _say(_told(plan))
        posterior = run_fit(
            loaded,
            dataset,
            method=settings,
            family=chosen,
            client=client,
            num_workers=num_workers,
            tol=tol,
            max_passes=max_passes,
            seed=seed,
            memory_budget=memory,
            run_dir=directory,
            checkpoint_seconds=checkpoint_seconds,
            progress=not (quiet or verbose),
            callbacks=[Lines(Meter(plan.passes_at_most), seconds=0.0)] if verbose else (),
        )
    tell_end(posterior, directory, out, as_json=json, quiet=quiet)


@app.command(context_settings=_ENVIRONMENT)
def resume(
    context: typer.Context,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Directory that `dadvi fit --out` began to write: a path or URL.")
    ],
    scheduler: Scheduler = None,
    workers: Workers = None,
    serial: Serial = False,
    max_passes: Annotated[
        float | None, typer.Option(help="Passes after which no further round or epoch starts. Default: as it was.")
    ] = None,
    memory: Memory = None,
    checkpoint_seconds: CheckpointSeconds = 60.0,
    json: AsJson = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a fit that was interrupted, or that stopped, given more passes. Prints where the posterior is.

    Model, data and settings are those of the run, and so is the result, on any number of workers. Exit codes are those
    of `dadvi fit`.
    """
    client, num_workers = _who_works(context, scheduler, workers, serial, otherwise=_cores())
    verbose, quiet = _how_much(context, verbose, quiet)
    directory = RunDirectory.existing(run)
    if not {"model", "data"} <= set(directory.origin):
        raise InputError(f"{run} was not begun by `dadvi fit`; go on with dadvi.resume, in Python")
    _go_on(
        directory,
        run,
        directory.origin["model"],
        directory.origin["data"],
        client=client,
        num_workers=num_workers,
        memory=memory,
        max_passes=max_passes,
        checkpoint_seconds=checkpoint_seconds,
        as_json=json,
        verbose=verbose,
        quiet=quiet,
    )


def _go_on(
    directory: RunDirectory,
    given: str,
    model: str,
    data: str,
    *,
    client: str | None,
    num_workers: int | None,
    memory: str | None,
    max_passes: float | None,
    checkpoint_seconds: float,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> NoReturn:
    """Go on with the run in a directory, that was given so, and end as it ends."""
    path = _model_path(model)
    _refuse_changed_file(path, directory.model_source)
    dataset = open_shards(data)
    loaded = load_model(model, dataset)
    with _naming_line(path), _telling_how_to_resume(directory):
        posterior = run_resume(
            directory,
            loaded,
            dataset,
            client=client,
            num_workers=num_workers,
            memory_budget=memory,
            max_passes=max_passes,
            checkpoint_seconds=checkpoint_seconds,
            progress=not (quiet or verbose),
            callbacks=[Lines(Meter(max_passes), seconds=0.0)] if verbose else (),
        )
    tell_end(posterior, directory, given, as_json=as_json, quiet=quiet)


def _who_works(
    context: typer.Context, scheduler: str | None, workers: int | None, serial: bool, *, otherwise: int | None
) -> tuple[str | None, int | None]:
    """Return client and num_workers of `dadvi.fit` and `dadvi.ingest`, these being `otherwise` if nothing is told."""
    given = _nearest(context, {"scheduler": scheduler, "workers": workers, "serial": serial or None})
    if len(given) > 1:
        raise InputError("--scheduler, --workers and --serial exclude one another; give one of them")
    scheduler, workers, serial = given.get("scheduler"), given.get("workers"), bool(given.get("serial"))
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: at least 1 is needed; --serial does without workers")
    return "serial" if serial else scheduler, None if serial or scheduler else workers or otherwise


def _how_much(context: typer.Context, verbose: bool, quiet: bool) -> tuple[bool, bool]:
    """Return whether every step is to be told, and whether only the end."""
    told = _nearest(context, {"verbose": verbose or None, "quiet": quiet or None})
    if len(told) > 1:
        raise InputError("--verbose and --quiet exclude one another; give one of them")
    return "verbose" in told, "quiet" in told


def tell_end(posterior: Posterior, directory: RunDirectory, given: str, *, as_json: bool, quiet: bool) -> NoReturn:
    """Tell how a fit ended, print where its posterior is, below the directory as given, and exit with its code."""
    if posterior.records and not quiet:
        profile = asdict(posterior.records[-1].profile)
        _say("seconds of passes: " + ", ".join(f"{phase} {value:.1f}" for phase, value in profile.items()))
    seconds = posterior.records[-1].seconds if posterior.records else 0.0
    certificate = posterior.certificate
    distance = f"; means within {certificate.max:.3g} posterior sds of the optimum" if certificate else ""
    _say(f"{posterior.status}: {posterior.reason}{distance} ({posterior.passes:.1f} passes, {seconds:.1f} s)")
    absolute = {"posterior": below(directory.location, POSTERIOR)}
    typer.echo(_dumps({**_ending(posterior), **absolute}) if as_json else below(given, POSTERIOR))
    codes = {"converged": ExitCode.CONVERGED, "stopped": ExitCode.STOPPED, "diverged": ExitCode.DIVERGED}
    raise typer.Exit(codes[posterior.status])


@contextmanager
def _telling_how_to_resume(directory: RunDirectory) -> Iterator[None]:
    """End an interrupted fit with code 3; there, and after an error that leaves a checkpoint, tell how to go on."""
    go_on = f"dadvi resume {shlex.quote(str(directory.location))}"
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if not directory.begun:
            raise
        _say(f"interrupted; go on with: {go_on}")
        raise typer.Exit(ExitCode.STOPPED) from error
    except (DadviError, OSError):
        if directory.begun:
            _say(f"the run is kept as far as it came; go on with: {go_on}")
        raise


def _refuse_changed_file(path: Path, source: str | None) -> None:
    """Refuse a model's file that is not as it was when the run began, naming the first line that differs."""
    if source is None or not path.is_file():
        return  # load_model has its own words for a file that is missing
    lines = zip_longest(source.splitlines(), path.read_text().splitlines(), fillvalue="nothing")
    for number, (was, now) in enumerate(lines, start=1):
        if was != now:
            raise ModelError(
                f"{path} has changed since the run began: line {number} is {now.strip()!r} and was {was.strip()!r}; "
                f"restore it from the run's {MODEL}, or fit anew"
            )


def _nearest(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Return those of some options that exclude one another which were given nearest to the user.

    Thus ``--serial`` on the command line puts aside DADVI_SCHEDULER, and either of them the ``workers`` of a job file.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for source in ("COMMANDLINE", "ENVIRONMENT", "DEFAULT_MAP"):
        here = {
            name: value
            for name, value in given.items()
            if (found := context.get_parameter_source(name)) is not None and found.name == source
        }
        if here:
            return here
    return {}


def _told(plan: Plan) -> str:
    """Return a plan as lines of a name and a value."""

    def text(name: str, value: str | float) -> str:
        if "bytes" in name:
            return f"{float(value) / 2**20:,.1f} MiB"
        return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value

    return "\n".join(f"{name.replace('_', ' '):<16} {text(name, value)}" for name, value in asdict(plan).items())


@app.command(context_settings=_ENVIRONMENT)
def summary(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Directory that `dadvi fit --out` wrote, or a posterior: path or URL."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print mean, sd and quantiles of every latent."""
    posterior = load_posterior(_posterior_in(run))
    if as_json:
        typer.echo(summary_json(posterior))
        return
    table = posterior.summary()
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 10_000, force_terminal=terminal)  # FORCE_COLOR is not for files
    shown = Table("latent", *table.columns, box=None, header_style="bold")
    for column in shown.columns[1:]:
        column.justify = "right"
    for label, row in table.iterrows():
        shown.add_row(Text(str(label)), *(f"{value:.4g}" for value in row))
    console.print(shown)
    _say(repr(posterior))


def _posterior_in(run: str) -> str:
    if POSTERIOR in files_at(run).names():
        return below(run, POSTERIOR)
    if "://" not in run and not Path(run).exists():
        raise InputError(f"{run} does not exist; give the directory that `dadvi fit --out` wrote, or a saved posterior")
    return run


def summary_json(posterior: Posterior) -> str:
    """Return the summary and how the fit ended as one JSON object; null stands for what is not a finite number."""
    latents = {
        latent: {str(name): _finite(value) for name, value in row.items()}
        for latent, row in posterior.summary().to_dict(orient="index").items()
    }
    return _dumps({**_ending(posterior), "latents": latents})


def _ending(posterior: Posterior) -> dict[str, Any]:
    """Return how a fit ended as a JSON object."""
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


def _dumps(document: dict[str, Any]) -> str:
    return json.dumps(document, allow_nan=False)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _method(
    name: MethodName, either: Mapping[str, Any], anchored: Mapping[str, Any], advi: Mapping[str, Any]
) -> Method | Literal["auto"]:
    """Return the method of that name, or that which settings choose: those of one method, or of either, not None."""
    either, anchored, advi = (
        {setting: value for setting, value in settings.items() if value is not None}
        for settings in (either, anchored, advi)
    )
    reason = f"--method is {name}"
    if name is MethodName.AUTO:
        if not (either or anchored or advi):
            return "auto"
        name = MethodName.ANCHORED if anchored else MethodName.ADVI
        reason = f"--{next(iter(anchored), '')} is one of anchored rounds"
    others, whose = (advi, "stochastic ADVI") if name is MethodName.ANCHORED else (anchored, "anchored rounds")
    if others:
        option = next(iter(others)).replace("_", "-")
        raise InputError(f"--{option} is a setting of {whose} and {reason}; drop one of them")
    return Anchored(**either, **anchored) if name is MethodName.ANCHORED else ADVI(**either, **advi)


def _family(name: FamilyName, rank: int | None) -> Family:
    """Return the family of that name, and of that rank if it has one."""
    if rank is None:
        return make_family(name.value)
    if name is not FamilyName.LOW_RANK:
        raise InputError(f"--rank is a setting of low_rank and --family is {name}; drop one of them")
    return LowRank(rank=rank)


def load_model(reference: str, data: ShardedDataset) -> Model:
    """Load ``MODEL.py:NAME``: a `Model`, or a function of the data set that returns one.

    The module is not left importable: thus its functions are pickled by value, and workers, wherever they run, need no
    copy of the file.

    Raises
    ------
    ModelError
        If there is no such file or name, the file fails (with its line), or what it holds is not a model.

    """
    path, name = _model_path(reference), reference.rpartition(":")[2]
    if not path.is_file():
        raise ModelError(f"no model file '{path}'; give the path of a Python file and a name in it, as MODEL.py:NAME")
    module_name = f"_dadvi_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"'{path}' cannot be loaded as Python; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses, for one, look their module up while it runs
    try:
        spec.loader.exec_module(module)
        found: Any = getattr(module, name, None)
        if callable(found) and not isinstance(found, Model):
            found = found(data)
    except InputError as error:
        raise ModelError(f"{path}{_line_in(error, path)}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"{path} failed{_line_in(error, path)}: {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[module_name]
    if not hasattr(module, name):
        models = ", ".join(key for key, value in vars(module).items() if isinstance(value, Model)) or "none"
        raise ModelError(f"{path} has no {name!r}; the models in it are: {models}")
    if not isinstance(found, Model):
        what = "returned" if callable(getattr(module, name)) else "is"
        raise ModelError(
            f"{reference} {what} a {type(found).__name__}; it must be a dadvi.Model, or a function of the data set "
            "that returns one"
        )
    return found


def _model_path(reference: str) -> Path:
    """Return the file of MODEL.py:NAME. Raises ModelError when the reference has another form."""
    path, colon, name = reference.rpartition(":")
    if not (colon and path and name.isidentifier()):
        raise ModelError(f"model {reference!r} is not of the form MODEL.py:NAME; give a Python file and a name in it")
    return Path(path)


@contextmanager
def _naming_line(path: Path) -> Iterator[None]:
    """Add to a ModelError the line of the model file that it came through, if it did."""
    try:
        yield
    except ModelError as error:
        if line := _line_in(error, path):
            raise ModelError(f"{error} ({path}{line})") from error
        raise


def _line_in(error: BaseException, path: Path) -> str:
    """Return " in line N" for the last line of the model file that the error, or what caused it, passed through."""
    file, line = str(path.resolve()), ""
    cause: BaseException | None = error
    while cause is not None:
        trace = cause.__traceback__
        while trace is not None:
            if str(Path(trace.tb_frame.f_code.co_filename).resolve()) == file:
                line = f" in line {trace.tb_lineno}"
            trace = trace.tb_next
        cause = cause.__cause__
    return line


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Tell a warning in one line, without the place in the code that it came from."""

    def show(message: Warning | str, *_place: object, **_source: object) -> None:
        _say(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


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
        with _short_warnings():
            app(prog_name="dadvi")
    except InputError as error:
        code, text = ExitCode.BAD_INPUT, str(error)
    except (DadviError, OSError) as error:
        code, text = ExitCode.INTERNAL, str(error) or type(error).__name__
    _say("error: " + " ".join(text.split()))
    sys.exit(code)
