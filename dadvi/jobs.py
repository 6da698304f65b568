"""Job files: the options of a fit as a TOML document, to be kept beside the data and run again.

A key is the long name of an option, or of a positional argument, with ``_`` or ``-`` between its words. The types are
those of the function that the command line calls, and a value of another type is refused rather than converted: in a
file, unlike on a command line, ``"0.1"`` is not a number.
"""

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from dadvi.errors import InputError


def read_job(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return option name to value, as the job file gives them.

    Parameters
    ----------
    options
        Name to type of every option that a job may set: bool, int, float, str, a StrEnum, or one of them or None.

    Raises
    ------
    InputError
        If the file cannot be read as TOML, or a key is unknown, given twice, or has a value of another type.

    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read the job file {path}: {reason}; give a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"the job file {path} is not TOML: {error}") from error
    job: dict[str, Any] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in options:
            near = get_close_matches(name, options, n=1, cutoff=0.0)
            raise InputError(f"{path}: unknown key {key!r}; the nearest option is {near[0]!r}")
        if name in job:
            raise InputError(f"{path}: {name!r} is given twice, with - and with _; drop one of them")
        job[name] = _checked(f"{path}: {key}", value, options[name])
    return job


def _checked(where: str, value: Any, annotation: Any) -> Any:
    """Return a value of TOML as the command line takes it. Raises InputError when its type is another."""
    (wanted,) = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    if issubclass(wanted, StrEnum):
        accepted, needed = value in list(wanted), "one of " + ", ".join(map(repr, map(str, wanted)))
    else:
        types, needed = _TOML[wanted]
        accepted = type(value) in types  # not isinstance: a bool is an int to Python
    if not accepted:
        raise InputError(f"{where} = {value!r}: it must be {needed}")
    return value


_TOML: Mapping[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text in quotes"),
}
