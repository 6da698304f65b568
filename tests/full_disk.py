"""The command line on a disk that gets full.

When the directory of its run is to do something ("save", "append" or "finish") for the n-th time, a copy of the
checkpoint is kept, if there is one, and there is no more room for what is to be written. "size": no file of this
process may grow beyond a part of that (RLIMIT_FSIZE), whatever the disk, and this process is of no more use; "bytes"
and "files": another file takes all bytes that are left where the run lies, or other files take all names that are left.
"""

import os
import resource
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from command import Ran, dadvi

from dadvi.checkpoint import RunDirectory

OTHER = "other"
"""What the names of the files that fill the disk begin with."""


def fill(how: str, what: str, run: Path) -> None:
    """Leave no room for what is to be written next."""
    if how == "size":
        allowed = {
            "save": 1_000,
            "append": (run / "trace.jsonl").stat().st_size + 20,  # a line is begun
            "finish": 1_000,
        }
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed[what], resource.RLIM_INFINITY))
        return
    try:
        for number in count():
            with (run.parent / f"{OTHER}{number}").open("wb", buffering=0) as file:
                while how == "bytes" and file.write(bytes(512)):
                    pass
    except OSError:
        assert os.statvfs(run.parent).f_bavail == 0 or os.statvfs(run.parent).f_favail == 0


def dadvi_into_full_disk(how: str, what: str, number: int, run: Path, before: Path, *arguments: object) -> Ran:
    """Run a command of which the n-th `what` of `run` finds no room, with the checkpoint before it as `before`."""
    real: Callable[..., Any] = getattr(RunDirectory, what)
    calls = count(1)

    def method(directory: RunDirectory, argument: Any) -> None:
        if next(calls) == number:
            if (run / "checkpoint").exists():
                shutil.copy(run / "checkpoint", before)
            fill(how, what, run)
        real(directory, argument)

    with mock.patch.object(RunDirectory, what, method):
        return dadvi(*arguments)
