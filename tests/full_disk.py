"""The command line on a disk that gets full: as a program, ``full_disk.py HOW WHAT NUMBER RUN BEFORE ARGUMENTS...``.

It runs ``dadvi ARGUMENTS``. When the directory RUN of its run is to do WHAT ("save", "append" or "finish") for the
NUMBER-th time, it keeps a copy of the checkpoint, if there is one, as BEFORE, and there is no more room: HOW says for
what. "size": no file of this process may grow beyond a part of what is to be written (RLIMIT_FSIZE), whatever the disk;
"bytes" and "files": another file takes all bytes that are left where RUN lies, or other files take all names that are
left.
"""

import os
import resource
import shutil
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from dadvi import cli
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


def main(how: str, what: str, number: str, run: Path, before: Path) -> None:
    """Run the command line, its arguments being what is left of `sys.argv`."""
    real: Callable[..., Any] = getattr(RunDirectory, what)
    calls = count(1)

    def method(directory: RunDirectory, argument: Any) -> None:
        if next(calls) == int(number):
            if (run / "checkpoint").exists():
                shutil.copy(run / "checkpoint", before)
            fill(how, what, run)
        real(directory, argument)

    with mock.patch.object(RunDirectory, what, method):
        cli.main()


if __name__ == "__main__":
    moment, places = sys.argv[1:4], map(Path, sys.argv[4:6])
    sys.argv = ["dadvi", *sys.argv[6:]]
    main(*moment, *places)
