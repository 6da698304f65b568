"""Options that several commands have, or that belong together: records of them, and what a record says when given.

A command takes such a record as one keyword argument. To the user its fields are options of the command, in the place
of the record.
"""

import inspect
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from typing import Annotated, Any, Literal

import typer

from dadvi.advi import ADVI
from dadvi.anchored import Anchored
from dadvi.errors import InputError
from dadvi.families import Family, LowRank, make_family
from dadvi.fit import Method


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes, in place of keyword arguments that are records, the fields of these."""
    parameters: list[inspect.Parameter] = []
    records: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation):
            records[parameter.name] = parameter.annotation
            parameters += inspect.signature(parameter.annotation).parameters.values()
        else:
            parameters.append(parameter)

    @wraps(command)
    def flattened(**given: Any) -> None:
        for name, record in records.items():
            given[name] = record(**{each.name: given.pop(each.name) for each in fields(record)})
        command(**given)

    # What typer makes options of. By keyword alone, as it calls, they may come in any order.
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    flattened.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flattened.__annotations__ = {each.name: each.annotation for each in parameters}
    return flattened


def nearest(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """Return those of some options that exclude one another which were given nearest to the user.

    Thus ``--serial`` on the command line puts aside DADVI_SCHEDULER, and either of them the ``workers`` of a job file.

    Parameters
    ----------
    options
        Name to value; None or False for one that was not given.

    """
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    for source in ("COMMANDLINE", "ENVIRONMENT", "DEFAULT_MAP"):
        here = {
            name: value
            for name, value in given.items()
            if (found := context.get_parameter_source(name)) is not None and found.name == source
        }
        if here:
            return here
    return {}


# Who works, and what is told ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Who:
    """Who works: workers of a scheduler, or local ones, or this process."""

    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A running Dask scheduler, tcp://HOST:PORT.")
    ] = None
    workers: Annotated[int | None, typer.Option(help="Local worker processes. Default: one per core.")] = None
    serial: Annotated[bool, typer.Option("--serial", help="Work in this process, without workers.")] = False

    def works(self, context: typer.Context, *, otherwise: int | None) -> tuple[str | None, int | None]:
        """Return `client` and `num_workers` of `dadvi.fit` and `dadvi.ingest`.

        Parameters
        ----------
        otherwise
            The number of local workers where nothing is given.

        Raises
        ------
        InputError
            If more than one is given, or no worker.

        """
        given = nearest(context, vars(self))
        if len(given) > 1:
            raise InputError("--scheduler, --workers and --serial exclude one another; give one of them")
        scheduler, workers = given.get("scheduler"), given.get("workers")
        if workers is not None and workers < 1:
            raise InputError(f"--workers {workers}: at least 1 is needed; --serial does without workers")
        if given.get("serial"):
            return "serial", None
        return scheduler, None if scheduler else workers or otherwise


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Telling:
    """What a fit tells, and how."""

    json: Annotated[bool, typer.Option("--json", help="Print the result, or the plan, as one JSON object.")] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell every step in a line of its own; a fit its plan.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only how the fit ended.")] = False

    def nearest(self, context: typer.Context) -> "Telling":
        """Return what holds. Raises InputError where every step is to be told, and only the end."""
        told = nearest(context, {"verbose": self.verbose, "quiet": self.quiet})
        if len(told) > 1:
            raise InputError("--verbose and --quiet exclude one another; give one of them")
        return Telling(self.json, "verbose" in told, "quiet" in told)


# How to fit -----------------------------------------------------------------------------------------------------------

_ADVI = "Stochastic ADVI (giving one of these chooses it)"
_ANCHORED = "Anchored rounds (giving one of these chooses them)"
_EITHER = "Either method (advi, unless --method anchored or one of its own settings is given)"


class MethodName(StrEnum):
    """The methods by name."""

    AUTO = "auto"
    ANCHORED = "anchored"
    ADVI = "advi"


@dataclass(frozen=True)
class MethodOptions:
    """A method, and the settings of all methods; None or False for those that were not given."""

    method: Annotated[
        MethodName,
        typer.Option(
            help="How to fit. auto: anchored, for up to 2000 coordinates besides effects of groups, else advi; or the "
            "method whose settings, below, are given."
        ),
    ] = MethodName.AUTO
    batch_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of a minibatch. Default: a twentieth of the data, at most 65536.", rich_help_panel=_ADVI
        ),
    ] = None
    num_draws: Annotated[
        int | None,
        typer.Option(
            help=f"Draws of the latents, for advi a step. Default: {ADVI.num_draws}, for anchored 4 to 256.",
            rich_help_panel=_EITHER,
        ),
    ] = None
    subsample_rows: Annotated[
        int | None,
        typer.Option(
            help="Rows of the subsample on which a fit starts. Default: 20000 or more.", rich_help_panel=_EITHER
        ),
    ] = None
    curvature: Annotated[
        str | None,
        typer.Option(
            help="Where it is measured: subsample, data, or auto (default): on the subsample if that tells enough.",
            rich_help_panel=_ANCHORED,
        ),
    ] = None
    optimizer: Annotated[
        str | None,
        typer.Option(help="adam (default), sgd, rmsprop, adagrad, dowg or proximal.", rich_help_panel=_ADVI),
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(help="In posterior sds a step. Default: the optimizer's.", rich_help_panel=_ADVI),
    ] = None
    schedule: Annotated[
        str | None, typer.Option(help="inverse_sqrt (default), constant or cosine.", rich_help_panel=_ADVI)
    ] = None
    averaging: Annotated[
        str | None, typer.Option(help="tail (default), polynomial or none.", rich_help_panel=_ADVI)
    ] = None
    estimator: Annotated[
        str | None, typer.Option(help="closed_form (default), stl or monte_carlo.", rich_help_panel=_ADVI)
    ] = None
    design: Annotated[
        str | None, typer.Option(help="antithetic (default), random or orthogonal draws.", rich_help_panel=_ADVI)
    ] = None
    fixed_draws: Annotated[
        bool, typer.Option("--fixed-draws", help="The same draws in every step.", rich_help_panel=_ADVI)
    ] = False
    rhat_max: Annotated[
        float | None,
        typer.Option(help=f"Largest R-hat of settled iterates. Default: {ADVI.rhat_max}.", rich_help_panel=_ADVI),
    ] = None
    control_variate: Annotated[
        str | None,
        typer.Option(
            help="none (default), or anchor: minibatches corrected by the full-data gradient at a point nearby.",
            rich_help_panel=_ADVI,
        ),
    ] = None

    def chosen(self) -> Method | Literal["auto"]:
        """Return the method of that name, or for "auto" that which the settings choose.

        Raises
        ------
        InputError
            If a setting is of another method, or out of its range.

        """
        given = {name: value for name, value in vars(self).items() if value is not None and value is not False}
        name: MethodName = given.pop("method")
        advi, anchored = _none_of(given, Anchored), _none_of(given, ADVI)
        reason = f"--method is {name}"
        if name is MethodName.AUTO:
            if not given:
                return "auto"
            name = MethodName.ANCHORED if anchored else MethodName.ADVI
            reason = f"--{anchored[0] if anchored else ''} is one of anchored rounds"
        others, whose = (advi, "stochastic ADVI") if name is MethodName.ANCHORED else (anchored, "anchored rounds")
        if others:
            option = others[0].replace("_", "-")
            raise InputError(f"--{option} is a setting of {whose} and {reason}; drop one of them")
        return Anchored(**given) if name is MethodName.ANCHORED else ADVI(**given)


def _none_of(settings: Iterable[str], method: type[Method]) -> list[str]:
    """Return those of some settings that a method does not have."""
    known = {each.name for each in fields(method)}
    return [setting for setting in settings if setting not in known]


class FamilyName(StrEnum):
    """The variational families by name."""

    MEAN_FIELD = "mean_field"
    FULL_RANK = "full_rank"
    LOW_RANK = "low_rank"


@dataclass(frozen=True)
class FamilyOptions:
    """A variational family."""

    family: Annotated[FamilyName, typer.Option(help="Variational family.")] = FamilyName.MEAN_FIELD
    rank: Annotated[int | None, typer.Option(help=f"Rank of low_rank. Default: {LowRank.rank}.")] = None

    def chosen(self) -> Family:
        """Return the family of that name, and of that rank if it has one. Raises InputError if it has none."""
        if self.rank is None:
            return make_family(self.family.value)
        if self.family is not FamilyName.LOW_RANK:
            raise InputError(f"--rank is a setting of low_rank and --family is {self.family}; drop one of them")
        return LowRank(rank=self.rank)
