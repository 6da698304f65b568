"""``dadvi fit`` and ``dadvi resume``: the runs, and how they end."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from dadvi.checkpoint import RunDirectory
from dadvi.cli.options import FamilyOptions, MethodOptions, Telling, Who, cores, flat
from dadvi.cli.telling import ExitCode, dumps, ending_json, plan_text, say, say_how_it_ended
from dadvi.errors import DadviError, InputError
from dadvi.fit import check_limits
from dadvi.fit import fit as run_fit
from dadvi.fit import resume as run_resume
from dadvi.jobs import read_job
from dadvi.modelfile import ModelFile
from dadvi.plan import make_plan
from dadvi.posterior import Posterior
from dadvi.progress import Lines, Meter
from dadvi.runfiles import POSTERIOR, below
from dadvi.sharding import open_shards
from dadvi.types import whole_number

Memory = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help='What a worker may hold besides Python: "2 GiB". Default: a quarter of its memory.',
    ),
]
CheckpointSeconds = Annotated[
    float, typer.Option(help="Between checkpoints of advi, at most; anchored writes one after every pass.")
]


def _read_config(context: typer.Context, config: Path | None) -> Path | None:
    """Make the values of a job file the defaults of the options that come after it."""
    if config is not None:
        options = get_type_hints(fit)
        for name in ("context", "config"):
            del options[name]
        context.default_map = read_job(config, options)
    return config


@flat
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
    *,
    out: Annotated[
        str,
        typer.Option(
            help="Directory to write, a path or URL: posterior.zarr, trace.jsonl, settings.json, checkpoints."
        ),
    ],
    who: Who,
    memory: Memory = None,
    family: FamilyOptions,
    tol: Annotated[float, typer.Option(help="Certificate at which a fit has converged, in posterior sds.")] = 0.1,
    max_passes: Annotated[
        float | None,
        typer.Option(
            help="Passes after which no further round or epoch starts. Default: 30; for advi 50, more on small data."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    method: MethodOptions,
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
    telling: Telling,
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
    conditions = _Conditions.of(context, who, memory, checkpoint_seconds, telling)
    settings, chosen = method.chosen(), family.chosen()
    if overwrite and resume:
        raise InputError("--overwrite and --resume exclude one another; give one of them")
    if resume and not dry_run and (begun := RunDirectory.begun_at(out)) is not None:
        _go_on(begun, out, model, data, max_passes, conditions)  # and exit
    dataset = open_shards(data)
    file = ModelFile(model)
    loaded = file.load(dataset)
    origin = {"model": file.absolute, "data": str(dataset.location)}
    directory = RunDirectory(out, overwrite=overwrite, model_file=file.path, origin=origin)
    with file.naming_line(), _telling_how_to_resume(directory):
        passes = max_passes
        if dry_run or conditions.telling.verbose:
            check_limits(tol, max_passes)
            whole_number("seed", seed)
            directory.check()
            plan = make_plan(
                loaded, dataset, method=settings, family=chosen, max_passes=max_passes, memory_budget=memory
            )
            if dry_run:
                typer.echo(dumps(asdict(plan)) if telling.json else plan_text(plan))
                return
            say(plan_text(plan))
            passes = plan.passes_at_most
        posterior = run_fit(
            loaded,
            dataset,
            method=settings,
            family=chosen,
            tol=tol,
            max_passes=max_passes,
            seed=seed,
            run_dir=directory,
            **conditions.arguments(passes),
        )
    _end(posterior, directory, out, conditions.telling)


@flat
def resume(
    context: typer.Context,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Directory that `dadvi fit --out` began to write: a path or URL.")
    ],
    *,
    who: Who,
    max_passes: Annotated[
        float | None, typer.Option(help="Passes after which no further round or epoch starts. Default: as it was.")
    ] = None,
    memory: Memory = None,
    checkpoint_seconds: CheckpointSeconds = 60.0,
    telling: Telling,
) -> None:
    """Go on with a fit that was interrupted, or that stopped, given more passes. Prints where the posterior is.

    Model, data and settings are those of the run, and so is the result, on any number of workers. Exit codes are those
    of `dadvi fit`.
    """
    conditions = _Conditions.of(context, who, memory, checkpoint_seconds, telling)
    directory = RunDirectory.existing(run)
    if not {"model", "data"} <= set(directory.origin):
        raise InputError(f"{run} was not begun by `dadvi fit`; go on with dadvi.resume, in Python")
    _go_on(directory, run, directory.origin["model"], directory.origin["data"], max_passes, conditions)


def _go_on(
    directory: RunDirectory, given: str, model: str, data: str, max_passes: float | None, conditions: "_Conditions"
) -> NoReturn:
    """Go on with the run in a directory, that was given so, and end as it ends."""
    file = ModelFile(model)
    file.check_unchanged(directory.model_source)
    dataset = open_shards(data)
    loaded = file.load(dataset)
    with file.naming_line(), _telling_how_to_resume(directory):
        posterior = run_resume(directory, loaded, dataset, max_passes=max_passes, **conditions.arguments(max_passes))
    _end(posterior, directory, given, conditions.telling)


@dataclass(frozen=True)
class _Conditions:
    """What a run is made under, now and when it goes on: nothing that its result depends on."""

    client: str | None
    num_workers: int | None
    memory: str | None
    checkpoint_seconds: float
    telling: Telling

    @classmethod
    def of(
        cls, context: typer.Context, who: Who, memory: str | None, checkpoint_seconds: float, telling: Telling
    ) -> "_Conditions":
        """Return the conditions that options give. Raises InputError if some of them exclude one another."""
        client, num_workers = who.works(context, otherwise=cores())
        return cls(client, num_workers, memory, checkpoint_seconds, telling.nearest(context))

    def arguments(self, passes: float | None) -> dict[str, Any]:
        """Return them as arguments of `dadvi.fit` and `dadvi.resume`, for a run of at most so many passes."""
        verbose, quiet = self.telling.verbose, self.telling.quiet
        return {
            "client": self.client,
            "num_workers": self.num_workers,
            "memory_budget": self.memory,
            "checkpoint_seconds": self.checkpoint_seconds,
            "progress": not (quiet or verbose),
            "callbacks": [Lines(Meter(passes), seconds=0.0)] if verbose else (),
        }


@contextmanager
def _telling_how_to_resume(directory: RunDirectory) -> Iterator[None]:
    """End an interrupted fit with code 3; there, and after an error that leaves a checkpoint, tell how to go on."""
    go_on = f"dadvi resume {shlex.quote(str(directory.location))}"
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if not directory.begun:
            raise
        say(f"interrupted; go on with: {go_on}")
        raise typer.Exit(ExitCode.STOPPED) from error
    except (DadviError, OSError):
        if directory.begun:
            say(f"the run is kept as far as it came; go on with: {go_on}")
        raise


def _end(posterior: Posterior, directory: RunDirectory, given: str, telling: Telling) -> NoReturn:
    """Tell how a fit ended, print where its posterior is, below the directory as given, and exit with its code."""
    say_how_it_ended(posterior, quiet=telling.quiet)
    absolute = below(directory.location, POSTERIOR)
    typer.echo(ending_json(posterior, absolute) if telling.json else below(given, POSTERIOR))
    codes = {"converged": ExitCode.CONVERGED, "stopped": ExitCode.STOPPED, "diverged": ExitCode.DIVERGED}
    raise typer.Exit(codes[posterior.status])
