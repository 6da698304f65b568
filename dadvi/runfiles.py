"""Where the directory of a run lies: on a local disk, or on an object store that fsspec reaches by a URL.

On a disk a file is written under another name, flushed and renamed, and so is there whole or not at all; a lock ends
with its process; and a run that is to be replaced is put aside, in the same directory, until the new one has a
checkpoint: a process that is killed before loses neither.

An object store writes an object whole or not at all by itself, but renames nothing. There a lock is an object that is
created where there is none, and stays when its process is killed; a new run keeps what it has to write until its first
checkpoint, when the one that it replaces is removed; and a posterior, of many objects, is there when its description
is, the last.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import fsspec
import psutil

from dadvi.errors import DataError, InputError, WorkError
from dadvi.posterior import ATTRIBUTE, Posterior
from dadvi.sharding.location import resolve
from dadvi.sharding.output import check_free, check_replaceable, flush, flush_all, put_in_place

POSTERIOR, TRACE, SETTINGS = "posterior.zarr", "trace.jsonl", "settings.json"
CHECKPOINT, MODEL, LOCK = "checkpoint", "model.py", "lock"
NAMES = {POSTERIOR, TRACE, SETTINGS, CHECKPOINT, MODEL, LOCK}
PARTIAL = ".partial"
"""What the names of unfinished files end with; they begin with a dot."""

EARLIER, MOVING = f".earlier{PARTIAL}", f".moving{PARTIAL}"
"""Folders of a run that another one is to replace: whole, and on its way there or back."""

FIT_AGAIN, RESUME = "fit again", "resume"
"""What to do once a file can be written that could not be, where no run is left to go on with, and where one is."""


class LocalFiles:
    """Files in a directory on a local disk."""

    grows = True

    def __init__(self, path: Path) -> None:
        self.location = path
        self.again = FIT_AGAIN
        self._lock: int | None = None

    def check(self, *, overwrite: bool) -> None:
        """Raise InputError if a new run cannot be written here."""
        check_free(self.location, overwrite=overwrite or _has_not_begun(self.names()), is_ours=_is_of_run)
        if not os.access(self.location.parent, os.W_OK):
            raise InputError(
                f"cannot write to {self.location.parent}; create that directory, or choose one that can be written"
            )

    def lock(self, *, replacing: bool) -> None:
        """Keep other processes out: until `unlock`, or until this one ends."""
        path = self.location
        try:
            path.mkdir(exist_ok=True)
            self._lock = _locked(path)
            self._clear_up(replacing=replacing)
            if replacing:
                self._put_aside()
        except OSError as error:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._cannot_write("", error) from error
            raise InputError(f"cannot write to {path}: {error.strerror}; choose another directory") from error

    def unlock(self, *, undo: bool) -> None:
        """Let others in, and settle which run is here: none that failed, if told to undo it, or that has not begun."""
        names = self.names()
        if undo or SETTINGS not in names:
            if EARLIER in names:
                self._bring_back()
            else:
                for name in names - {LOCK}:
                    _remove(self.location / name)
        elif names & {CHECKPOINT, POSTERIOR}:
            self.commit()
        self.remove(LOCK)
        with suppress(OSError):
            self.location.rmdir()  # if it is empty
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def recover(self) -> None:
        """Bring a run back whose replacement was killed before it had begun."""
        names = self.names()
        if MOVING in names or (EARLIER in names and SETTINGS not in names):
            self.lock(replacing=False)
            self.unlock(undo=False)

    def commit(self) -> None:
        """Have what was written since `lock` replace the run that was here."""
        shutil.rmtree(self.location / EARLIER, ignore_errors=True)

    def _put_aside(self) -> None:
        """Have the run that is here wait for its replacement, whatever the moment at which this process is killed."""
        moving = self.location / MOVING
        moving.mkdir()
        for name in self.names() - {LOCK, MOVING}:
            (self.location / name).rename(moving / name)
        moving.rename(self.location / EARLIER)

    def _bring_back(self) -> None:
        """Have the run that waits take the place of its replacement."""
        self.remove(SETTINGS)  # first: what is half removed is no run to go on with
        for name in self.names() - {LOCK, EARLIER}:
            _remove(self.location / name)
        (self.location / EARLIER).rename(self.location / MOVING)
        self._move_back()

    def _move_back(self) -> None:
        for entry in (self.location / MOVING).iterdir():
            entry.rename(self.location / entry.name)
        (self.location / MOVING).rmdir()

    def _clear_up(self, *, replacing: bool) -> None:
        """Settle which run is here after a process that was killed, and remove its unfinished files."""
        if (self.location / MOVING).exists():
            self._move_back()
        if self.names() & {CHECKPOINT, POSTERIOR}:
            self.commit()
        elif (self.location / EARLIER).exists() and (replacing or SETTINGS not in self.names()):
            self._bring_back()
        for leftover in self.location.glob(f".*{PARTIAL}"):
            if leftover.name != EARLIER:
                _remove(leftover)

    def names(self) -> set[str]:
        """Return what is in the directory."""
        return {entry.name for entry in self.location.iterdir()} if self.location.is_dir() else set()

    def read(self, name: str) -> bytes | None:
        """Return a file; None if there is none."""
        path = self.location / name
        return path.read_bytes() if path.exists() else None

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Write a file under another name, flush it to the disk, and rename it."""
        path, partial = self.location / name, self.location / f".{name}{PARTIAL}"
        try:
            with partial.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            flush(path.parent)
        except OSError as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise self._cannot_write(name, error) from error

    def append(self, name: str, text: str) -> None:
        """Add to a file, which is not flushed to the disk: nothing reads it back, and resuming writes it anew."""
        try:
            with (self.location / name).open("a") as file:
                file.write(text)
        except OSError as error:
            raise self._cannot_write(name, error) from error

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.location / name).unlink(missing_ok=True)

    def save(self, posterior: Posterior) -> None:
        """Write the posterior under another name, flush it to the disk, and rename it."""
        final, partial = self.location / POSTERIOR, self.location / f".{POSTERIOR}{PARTIAL}"
        try:
            posterior.save(partial, overwrite=True)
            flush_all(partial)
            put_in_place(partial, final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._cannot_write(POSTERIOR, error) from error

    @property
    def finished(self) -> bool:
        """Whether there is a posterior."""
        return (self.location / POSTERIOR).exists()

    def _cannot_write(self, name: str, error: OSError) -> WorkError:
        return WorkError(
            f"cannot write {self.location / name}: {error.strerror or error}; what was there before is as it was. Make "
            f"room, then {self.again}"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


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
        if not _is_at(descriptor, directory / LOCK):  # it was removed since by the process that held it
            os.close(descriptor)
            return _locked(directory)
    except BlockingIOError as error:
        holder = os.read(descriptor, 1_000).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise InputError(
            f"{directory} is in use by another process ({holder}); wait for it to end, or choose another directory"
        ) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether a file that is open is the one at a path."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


class ObjectFiles:
    """Files on an object store, each an object below a URL."""

    grows = False

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError, OSError) as error:
            raise InputError(
                f"{url} cannot be used ({error}); give a path, or a URL such as s3://bucket/run"
            ) from error
        self.again = FIT_AGAIN
        self._kept: dict[str, bytes] | None = None  # what is to be written in place of the earlier run, if there is one
        self._held = b""  # the lock as this process wrote it

    def check(self, *, overwrite: bool) -> None:
        """Raise InputError if something is in the way of a new run."""
        if names := self.names():
            check_replaceable(self.location, overwrite or _has_not_begun(names), replaceable=_of_run(names))

    def lock(self, *, replacing: bool) -> None:
        """Keep other processes out, until `unlock`, and begin to replace the run that is here, if told to."""
        process, host, now = psutil.Process(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds")
        lock = {"process": process.pid, "host": host, "since": now, "started": process.create_time(), "id": uuid4().hex}
        content = json.dumps(lock).encode()
        if _is_over(self.read(LOCK)):
            self.remove(LOCK)
        try:
            self._system.pipe_file(self._path(LOCK), content, mode="create")
        except Exception as error:
            # There is one already, or the store cannot be reached: what is raised is up to the file system.
            held = self.read(LOCK)
            if held is None:
                raise InputError(
                    f"cannot write to {self.location}: {_told(error)}; choose another directory"
                ) from error
            if held != content:  # it is where an answer was lost and the request was made again
                raise InputError(
                    f"{self.location} is in use by another process ({_holder(held)}); wait for it to end, or choose "
                    f"another directory. If it was killed, remove the object {below(self.location, LOCK)}"
                ) from error
        self._held, self._kept = content, {} if replacing else None

    def unlock(self, *, undo: bool) -> None:
        """Let others in; what was written since `lock` is undone, if told to. A store that is gone is left alone."""
        with suppress(Exception):
            if undo and self._kept is None:
                self._clear()
            elif not undo:
                self.commit()
        self._kept = None
        with suppress(Exception):
            if self.read(LOCK) == self._held:  # not one that someone took after this one was removed
                self.remove(LOCK)

    def commit(self) -> None:
        """Have what was written since `lock` replace the run that was here."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self._clear()
            for name, content in kept.items():
                self.write(name, content)

    def names(self) -> set[str]:
        """Return what is in the directory."""
        try:
            self._system.invalidate_cache()
            found = self._system.ls(self._root, detail=False)
        except FileNotFoundError:
            return set()
        except Exception as error:
            raise self._cannot_read(error) from error
        return {each.rstrip("/").rpartition("/")[2] for each in found}

    def read(self, name: str) -> bytes | None:
        """Return a file; None if there is none."""
        if self._kept is not None:
            return self._kept.get(name)
        try:
            return bytes(self._system.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        except Exception as error:
            raise self._cannot_read(error) from error

    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Write a file, in place of the one before."""
        content = b"".join(parts)
        if self._kept is not None:
            self._kept[name] = content
            return
        try:
            self._system.pipe_file(self._path(name), content)
        except Exception as error:
            raise self._cannot_write(name, error) from error

    def append(self, name: str, text: str) -> None:
        """Do nothing: an object does not grow."""

    def recover(self) -> None:
        """Do nothing: a run is not removed before its replacement has a checkpoint."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self._system.invalidate_cache()
        with suppress(FileNotFoundError):
            self._system.rm(self._path(name), recursive=True)

    def save(self, posterior: Posterior) -> None:
        """Write the posterior in place of the one before."""
        self.commit()
        try:
            posterior.save(below(self.location, POSTERIOR), overwrite=True)
        except Exception as error:
            raise self._cannot_write(POSTERIOR, error) from error

    @property
    def finished(self) -> bool:
        """Whether there is a posterior: its description is written last."""
        group = self.read(f"{POSTERIOR}/zarr.json")
        return group is not None and ATTRIBUTE in json.loads(group).get("attributes", {})

    def _clear(self) -> None:
        """Remove all but the lock; the posterior first, lest it be taken for that of another run."""
        for name in sorted(self.names() - {LOCK}, key=lambda name: name != POSTERIOR):
            self.remove(name)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _cannot_read(self, error: Exception) -> DataError:
        return DataError(f"{self.location} cannot be read: {_told(error)}; check that the store can be reached")

    def _cannot_write(self, name: str, error: Exception) -> WorkError:
        return WorkError(
            f"cannot write {below(self.location, name)}: {_told(error)}; check that the store can be reached, "
            f"then {self.again}"
        )


RunFiles: TypeAlias = LocalFiles | ObjectFiles
"""The files of a run, by name."""


def files_at(location: str | os.PathLike[str]) -> RunFiles:
    """Return the files of the directory at a path or URL. Raises InputError if a URL cannot be used."""
    resolved = resolve(location)
    return LocalFiles(resolved) if isinstance(resolved, Path) else ObjectFiles(str(resolved))


def below(directory: str | os.PathLike[str], name: str) -> str:
    """Return the path or URL of what is in a directory."""
    text = os.fspath(directory)
    return f"{text.rstrip('/')}/{name}" if "://" in text else str(Path(text) / name)


def is_run(location: str | os.PathLike[str]) -> bool:
    """Return whether the directory of a run that has begun, and nothing else, stands at a path or URL."""
    names = files_at(location).names()
    return _of_run(names) and not _has_not_begun(names)


def _is_of_run(path: Path) -> bool:
    return _of_run(LocalFiles(path).names())


def _of_run(names: set[str]) -> bool:
    strange = {name for name in names - NAMES if not (name.startswith(".") and name.endswith(PARTIAL))}
    # A file called model.py alone may be anyone's.
    return bool(names & {SETTINGS, LOCK, EARLIER, MOVING}) and not strange


def _has_not_begun(names: set[str]) -> bool:
    """Return whether there is at most what a process leaves that is killed before its run has settings."""
    begun = names & {SETTINGS, CHECKPOINT, POSTERIOR, TRACE, EARLIER, MOVING}
    return not names or (_of_run(names) and not begun)


def _told(error: Exception) -> str:
    return str(error).strip() or repr(error)


def _holder(lock: bytes) -> str:
    try:
        held = json.loads(lock)
        return f"process {held['process']} on {held['host']}, since {held['since']}"
    except (ValueError, KeyError, TypeError):
        return "unknown"


def _is_over(lock: bytes | None) -> bool:
    """Return whether a lock is that of a process of this machine which is no more."""
    try:
        held = json.loads(lock or b"null")
        if held["host"] != socket.gethostname():
            return False
        return bool(psutil.Process(held["process"]).create_time() != held["started"])
    except psutil.NoSuchProcess:
        return True
    except (ValueError, KeyError, TypeError):
        return False
