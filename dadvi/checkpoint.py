"""What a run leaves on disk or on an object store: a directory with its settings, trace, last checkpoint and posterior.

    settings.json    what is fitted to what, and how; with digests of the model and the data
    model.py         the model's file, where the model came from one
    trace.jsonl      a line for every row of the trace, as the run goes; on an object store, as of the last checkpoint
    checkpoint       the state of the solver, from which `dadvi.resume` goes on; gone when the run needs none any more
    posterior.zarr   the result
    lock             held while a process works here, and gone with it

Every file is there whole or not at all (`dadvi.runfiles`), and reading one never runs code. Only the trace grows in
place: what it has beyond the checkpoint is dropped on resuming.
"""

import hashlib
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from dadvi.errors import DataError, InputError, WorkError
from dadvi.posterior import Posterior, TraceRow, load_posterior
from dadvi.records import Packed
from dadvi.runfiles import CHECKPOINT, MODEL, POSTERIOR, RESUME, SETTINGS, TRACE, below, files_at, is_run
from dadvi.types import is_number

MAGIC = b"dadvi checkpoint 1\n"
"""What a checkpoint begins with. Then come the sha256 of the rest, and the rest, an npz archive."""

DOCUMENT = "document"
"""The array of the archive that holds the JSON."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a solver, and what the trace has told until then."""

    state: Packed
    trace: tuple[TraceRow, ...]
    seconds: float  # that the run has taken


class Journal(Protocol):
    """Where a solver writes down how far it is."""

    @property
    def due(self) -> bool:
        """Whether it is time for another checkpoint, for a solver whose steps are too short for one each."""
        ...

    def last(self) -> Checkpoint | None:
        """Return the checkpoint to go on from; None for a run that begins."""
        ...

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint in place of the one before."""
        ...


class NoJournal:
    """Keeps nothing: for a run without a directory."""

    due = False

    def last(self) -> None:
        """Return None: there is nothing to go on from."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Drop it."""


class RunDirectory:
    """The directory of one run, which one process at a time works in: a context manager, and a `Journal`.

    Entered, it holds the lock. A run that fails before its first checkpoint leaves nothing behind, and the earlier run
    that it was to replace as it was; one that is interrupted can be resumed.

    Parameters
    ----------
    location
        Where the directory is, or is to appear: a path, or a URL that fsspec understands.
    overwrite
        Whether an earlier run there may be replaced.
    model_file
        The file of the model, a copy of which is kept.
    origin
        Where model and data came from, JSON: what the command line needs to find them again.

    Raises
    ------
    InputError
        If something stands at `location` that is not an earlier run, or is one and `overwrite` is not set; or if
        nothing can be written there.

    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        model_file: Path | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self._files = files_at(location)
        self.location = self._files.location
        """An absolute path, or a URL."""
        self.origin = dict(origin or {})
        self.every = 60.0
        """Seconds between checkpoints, for solvers that ask whether one is due."""
        self.begun = False
        """Whether there is a run here that has begun and not ended."""
        self._model_file = model_file
        self._resuming = False
        self._overwrite = overwrite
        self._saved_at = time.monotonic()
        self._saved = False

    @classmethod
    def existing(cls, location: str | os.PathLike[str]) -> Self:
        """Return the directory of a run that is to go on.

        Raises
        ------
        InputError
            If there is no run at `location`.

        """
        directory = cls.begun_at(location)
        if directory is None:
            raise InputError(
                f"{files_at(location).location} is not the directory of a run; give what a fit was told to write to"
            )
        return directory

    @classmethod
    def begun_at(cls, location: str | os.PathLike[str]) -> Self | None:
        """Return the directory of a run that is to go on, if one has begun at `location`."""
        directory = cls(location)
        directory._files.recover()
        if not is_run(location):
            return None
        directory._resuming, directory._files.again = True, RESUME
        directory.origin = directory.settings.get("origin", {})
        return directory

    def check(self) -> None:
        """Refuse at once what `__enter__` would."""
        if not self._resuming:
            self._files.check(overwrite=self._overwrite)

    # Coming and going ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.check()
        self._files.lock(replacing=not self._resuming and is_run(self.location))
        self._saved_at = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed = error is not None and isinstance(error, Exception)  # an interrupt is none
        undo = failed and not self._resuming and not self._saved
        self.begun = self.begun and not undo
        self._files.unlock(undo=undo)

    # What is in it ---------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run.

        Raises
        ------
        DataError
            If they cannot be read.

        """
        try:
            found = json.loads(self._files.read(SETTINGS) or b"")
            missing = {"method", "family", "seed", "tol", "max_passes", "data", "model", "versions"} - set(found)
            if missing:
                raise KeyError(*sorted(missing))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{below(self.location, SETTINGS)} cannot be read ({error!r}); restore it, or fit again"
            ) from error
        return dict(found)

    @property
    def model_source(self) -> str | None:
        """The text of the model's file as it was when the run began."""
        content = self._files.read(MODEL)
        return None if content is None else content.decode()

    def posterior(self) -> Posterior | None:
        """Return the result of the run, if it has ended."""
        return load_posterior(below(self.location, POSTERIOR)) if self._files.finished else None

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is older than it may be."""
        return time.monotonic() >= self._saved_at + self.every

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write what the run is."""
        last = self.last()  # first: where it is damaged, all stays as it is
        if self._model_file is not None and not self._resuming:
            self._files.write(MODEL, self._model_file.read_bytes())
        self._files.write(SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
        self._write_trace(() if last is None else last.trace)
        self.begun = True

    def last(self) -> Checkpoint | None:
        """Return the last checkpoint; None if there is none.

        Raises
        ------
        DataError
            If any byte of it has changed since it was written.

        """
        content = self._files.read(CHECKPOINT)
        return None if content is None else decoded(content, below(self.location, CHECKPOINT))

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint in place of the one before.

        Raises
        ------
        WorkError
            If it cannot be written, as when the disk is full; the one before is as it was.

        """
        self._files.write(CHECKPOINT, *encoded(checkpoint))
        self._files.commit()
        self._saved, self._saved_at, self._files.again = True, time.monotonic(), RESUME
        if not self._files.grows:
            self._write_trace(checkpoint.trace)

    def append(self, row: TraceRow) -> None:
        """Add a row to the trace; single steps are not in it."""
        if row.phase != "step":
            self._files.append(TRACE, _line(row))

    def finish(self, posterior: Posterior) -> None:
        """Write the results. The checkpoint of a run that stopped is kept, for it can be taken further."""
        self._files.save(posterior)
        self._write_trace(posterior.records)
        if posterior.status != "stopped":
            self._files.remove(CHECKPOINT)
            self.begun = False

    def tidy(self, posterior: Posterior) -> None:
        """Do what `finish` left to do, if its process was killed after it had written these results, and if one may."""
        if posterior.status != "stopped" and CHECKPOINT in self._files.names():
            with suppress(InputError, WorkError), self:
                self._write_trace(posterior.records)
                self._files.remove(CHECKPOINT)

    def _write_trace(self, rows: Iterable[TraceRow]) -> None:
        self._files.write(TRACE, "".join(map(_line, rows)).encode())


def seconds_between(checkpoint_seconds: float) -> float:
    """Return the seconds between checkpoints; InputError if they cannot be."""
    if not (is_number(checkpoint_seconds) and 0 <= checkpoint_seconds < math.inf):
        raise InputError(f"checkpoint_seconds={checkpoint_seconds!r}: it must be at least 0, and finite")
    return checkpoint_seconds


def encoded(checkpoint: Checkpoint) -> tuple[bytes | memoryview, ...]:
    """Return a checkpoint as the parts of a file."""
    document = {
        "state": checkpoint.state.document,
        "trace": [asdict(row) for row in checkpoint.trace],
        "seconds": checkpoint.seconds,
    }
    archive = io.BytesIO()
    text = np.frombuffer(json.dumps(document).encode(), dtype=np.uint8)
    arrays: dict[str, Any] = {DOCUMENT: text, **checkpoint.state.arrays}
    np.savez(archive, allow_pickle=False, **arrays)
    content = archive.getbuffer()
    return MAGIC, hashlib.sha256(content).digest(), content


def decoded(stored: bytes, where: str) -> Checkpoint:
    """Return the checkpoint of a file. Raises DataError if any byte of it has changed since it was written."""
    damaged = f"{where} is damaged; restore it, or remove it and resume from the beginning"
    content = memoryview(stored)
    start = len(MAGIC) + hashlib.sha256().digest_size
    if bytes(content[: len(MAGIC)]) != MAGIC:
        raise DataError(f"{damaged}: it does not begin as checkpoints of this version of dadvi do")
    if hashlib.sha256(content[start:]).digest() != content[len(MAGIC) : start]:
        raise DataError(f"{damaged}: its checksum does not agree")
    try:
        with np.load(io.BytesIO(content[start:]), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        document = json.loads(arrays.pop(DOCUMENT).tobytes())
        trace = tuple(TraceRow(**row) for row in document["trace"])
        return Checkpoint(Packed(document["state"], arrays), trace, document["seconds"])
    except (ValueError, KeyError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{where} cannot be read by this version of dadvi ({error!r}); fit again") from error


def _line(row: TraceRow) -> str:
    """Return a row as a line of JSON; null stands for what is not a finite number."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(row).items()
    }
    return json.dumps(values) + "\n"
