"""What a run leaves on disk: a directory with its settings, its trace, its last checkpoint and its posterior.

    settings.json    what is fitted to what, and how; with digests of the model and the data
    model.py         the model's file, where the model came from one
    trace.jsonl      a line for every row of the trace, as the run goes
    checkpoint       the state of the solver, from which `dadvi.resume` goes on; gone when the run needs none any more
    posterior.zarr   the result
    lock             held while a process works here, and gone with it

Every file is written under another name, flushed to the disk and renamed, so that it is there whole or not at all;
reading one never runs code. Only the trace grows in place: what it has beyond the checkpoint is dropped on resuming.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import socket
import time
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from uuid import uuid4

import numpy as np

from dadvi.errors import DataError, InputError, WorkError
from dadvi.posterior import Posterior, TraceRow, load_posterior
from dadvi.records import Packed
from dadvi.sharding.output import check_free

POSTERIOR, TRACE, SETTINGS = "posterior.zarr", "trace.jsonl", "settings.json"
CHECKPOINT, MODEL, LOCK = "checkpoint", "model.py", "lock"
NAMES = {POSTERIOR, TRACE, SETTINGS, CHECKPOINT, MODEL, LOCK}
PARTIAL = ".partial"
"""What the names of unfinished files end with; they begin with a dot."""

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
    path
        Where the directory is, or is to appear.
    overwrite
        Whether an earlier run there may be replaced.
    model_file
        The file of the model, a copy of which is kept.
    origin
        Where model and data came from, JSON: what the command line needs to find them again.

    Raises
    ------
    InputError
        If something stands at `path` that is not an earlier run, or is one and `overwrite` is not set; or if nothing
        can be written there.

    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        model_file: Path | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path).expanduser().resolve()
        self.origin = dict(origin or {})
        self.every = 60.0
        """Seconds between checkpoints, for solvers that ask whether one is due."""
        self._model_file = model_file
        self._aside: Path | None = None  # the earlier run that this one replaces
        self._resuming = False
        self._overwrite = overwrite
        self._saved_at = time.monotonic()
        self._lock: int | None = None
        self._entered = False

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> Self:
        """Return the directory of a run that is to go on.

        Raises
        ------
        InputError
            If there is no run at `path`.

        """
        directory = cls(path)
        if not is_run(directory.path):
            raise InputError(f"{directory.path} is not the directory of a run; give what a fit was told to write to")
        directory._resuming = True
        directory.origin = directory.settings.get("origin", {})
        return directory

    def check(self) -> None:
        """Refuse at once what `__enter__` would."""
        if not self._resuming:
            check_free(self.path, overwrite=self._overwrite, is_ours=is_run)
            if not os.access(self.path.parent, os.W_OK):
                raise InputError(
                    f"cannot write to {self.path.parent}; create that directory, or choose one that can be written"
                )

    # Coming and going ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.check()
        replaced = not self._resuming and is_run(self.path)
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = _locked(self.path)
            if replaced:
                self._aside = self.path.with_name(f".{self.path.name}.{uuid4().hex[:8]}.old")
                self.path.rename(self._aside)
                self.path.mkdir()
                earlier, self._lock = self._lock, _locked(self.path)
                os.close(earlier)
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}; choose another directory") from error
        for leftover in self.path.glob(f".*{PARTIAL}"):  # of a process that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self._saved_at, self._entered = time.monotonic(), True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed = error is not None and isinstance(error, Exception)  # an interrupt is none
        if failed and not self._resuming and not (self.path / CHECKPOINT).exists():
            shutil.rmtree(self.path, ignore_errors=True)
            if self._aside is not None:
                self._aside.rename(self.path)
                (self.path / LOCK).unlink(missing_ok=True)
        else:
            self._forget_earlier()
            (self.path / LOCK).unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _forget_earlier(self) -> None:
        if self._aside is not None:
            shutil.rmtree(self._aside, ignore_errors=True)
            self._aside = None

    # What is in it ---------------------------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Whether there is a run here that has not ended."""
        ended = (self.path / POSTERIOR).exists() and not (self.path / CHECKPOINT).exists()
        return (self.path / SETTINGS).exists() and not ended and self._entered

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run.

        Raises
        ------
        DataError
            If they cannot be read.

        """
        try:
            found = json.loads((self.path / SETTINGS).read_text())
            missing = {"method", "family", "seed", "tol", "max_passes", "data", "model", "versions"} - set(found)
            if missing:
                raise KeyError(*sorted(missing))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path / SETTINGS} cannot be read ({error!r}); restore it, or fit again") from error
        return dict(found)

    @property
    def model_source(self) -> str | None:
        """The text of the model's file as it was when the run began."""
        file = self.path / MODEL
        return file.read_text() if file.exists() else None

    def posterior(self) -> Posterior | None:
        """Return the result of the run, if it has ended."""
        return load_posterior(self.path / POSTERIOR) if (self.path / POSTERIOR).exists() else None

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is older than it may be."""
        return time.monotonic() >= self._saved_at + self.every

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write what the run is."""
        if self._model_file is not None and not self._resuming:
            _write(self.path / MODEL, self._model_file.read_bytes())
        _write(self.path / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
        last = self.last()
        self._write_trace(() if last is None else last.trace)

    def last(self) -> Checkpoint | None:
        """Return the last checkpoint; None if there is none.

        Raises
        ------
        DataError
            If any byte of it has changed since it was written.

        """
        path = self.path / CHECKPOINT
        return read_checkpoint(path) if path.exists() else None

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint in place of the one before.

        Raises
        ------
        WorkError
            If it cannot be written, as when the disk is full; the one before is as it was.

        """
        write_checkpoint(self.path / CHECKPOINT, checkpoint)
        self._forget_earlier()
        self._saved_at = time.monotonic()

    def append(self, row: TraceRow) -> None:
        """Add a row to the trace; single steps are not in it."""
        if row.phase != "step":
            try:
                with (self.path / TRACE).open("a") as file:
                    file.write(_line(row))
            except OSError as error:
                raise _cannot_write(self.path / TRACE, error) from error

    def finish(self, posterior: Posterior) -> None:
        """Write the results. The checkpoint of a run that stopped is kept, for it can be taken further."""
        partial = self.path / f".{POSTERIOR}{PARTIAL}"
        try:
            posterior.save(partial, overwrite=True)
            for file in sorted(partial.rglob("*")):
                _flush(file)
            final, replaced = self.path / POSTERIOR, self.path / f".replaced{PARTIAL}"
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            shutil.rmtree(replaced, ignore_errors=True)
            self._write_trace(posterior.records)
            if posterior.status != "stopped":
                (self.path / CHECKPOINT).unlink(missing_ok=True)
            _flush(self.path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _cannot_write(self.path / POSTERIOR, error) from error

    def _write_trace(self, rows: Iterable[TraceRow]) -> None:
        _write(self.path / TRACE, "".join(map(_line, rows)).encode())


def seconds_between(checkpoint_seconds: float) -> float:
    """Return the seconds between checkpoints; InputError if they cannot be."""
    if not 0 <= checkpoint_seconds < math.inf:
        raise InputError(f"checkpoint_seconds={checkpoint_seconds}: it must be at least 0, and finite")
    return checkpoint_seconds


def is_run(path: Path) -> bool:
    """Return whether the directory of a run, and nothing else, stands at `path`."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    strange = {name for name in names - NAMES if not (name.startswith(".") and name.endswith(PARTIAL))}
    return bool(names & {SETTINGS, LOCK}) and not strange  # a lock alone: its process was killed as it began


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all. Raises WorkError if it cannot be written."""
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
    _write(path, MAGIC, hashlib.sha256(content).digest(), content)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises DataError if any byte of it has changed since it was written."""
    damaged = f"{path} is damaged; restore it, or remove it and resume from the beginning"
    content = memoryview(path.read_bytes())
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
        raise DataError(f"{path} cannot be read by this version of dadvi ({error!r}); fit again") from error


def _write(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file under another name, flush it to the disk, and rename it."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _flush(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> WorkError:
    return WorkError(
        f"cannot write {path}: {error.strerror or error}; what was there before is as it was. Make room, then resume"
    )


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(row: TraceRow) -> str:
    """Return a row as a line of JSON; null stands for what is not a finite number."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(row).items()
    }
    return json.dumps(values) + "\n"


def _locked(directory: Path) -> int:
    """Return the descriptor of a lock on a directory, which ends with this process.

    Raises
    ------
    InputError
        If another process holds it, with its id and host.

    """
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 1_000).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise InputError(
            f"{directory} is in use by another process ({holder}); wait for it to end, or choose another directory"
        ) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
