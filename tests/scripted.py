"""Scripted failures: a data set whose reads fail, hang or are refused on given invocations, counted in files.

Counts are kept on disk, one byte an invocation, so that they add up over processes and outlive a killed worker.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from dadvi.errors import DataError, WorkError
from dadvi.sharding import Manifest, ShardedDataset

HANG_SECONDS = 60.0


class ScriptedDataset:
    """A data set as executors see it, with a script: chunk to what its 1st, 2nd, ... reading does.

    An action is "ok", "os_error" or "work_error" (which may pass), "refuse" (bad input) or "hang": write the process's
    id to `hanging` and wait to be killed. Readings beyond the script are ok.
    """

    shareable = True

    def __init__(self, data: ShardedDataset, directory: Path, script: Mapping[int, Sequence[str]]) -> None:
        self.data, self.directory, self.script = data, directory, dict(script)
        directory.mkdir(exist_ok=True)

    @property
    def manifest(self) -> Manifest:
        return self.data.manifest

    @property
    def decoding(self) -> float:
        return self.data.decoding

    @property
    def hanging(self) -> Path:
        return self.directory / "hanging"

    def count(self, chunk: int) -> int:
        """Return how often a chunk was read, by any process."""
        path = self.directory / f"chunk-{chunk}"
        return path.stat().st_size if path.exists() else 0

    def read(self, chunk: int, fields: Iterable[str] | None = None) -> dict[str, Tensor]:
        with (self.directory / f"chunk-{chunk}").open("ab") as file:
            file.write(b".")
        actions = self.script.get(chunk, ())
        invocation = self.count(chunk)
        action = actions[invocation - 1] if invocation <= len(actions) else "ok"
        if action == "os_error":
            raise OSError(f"the store blinked at invocation {invocation}")
        if action == "work_error":
            raise WorkError(f"the store blinked at invocation {invocation}")
        if action == "refuse":
            raise DataError(f"bad rows in chunk {chunk}")
        if action == "hang":
            partial = self.hanging.with_suffix(".partial")
            partial.write_text(str(os.getpid()))
            partial.rename(self.hanging)
            time.sleep(HANG_SECONDS)
            raise AssertionError("nobody killed the process that hung")
        return self.data.read(chunk, fields)
