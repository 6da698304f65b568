"""Output that appears whole or not at all.

A local data set is written under a temporary name beside its final one and renamed when complete, so that a reader, or
a crash, never meets half of it, and what was there before is replaced only by a complete one, at one stroke where the
system can. Other stores have no rename: there the manifest is written last, and a group without it does not open.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import zarr
from zarr.abc.store import Store
from zarr.core.sync import sync
from zarr.storage import LocalStore

from dadvi.errors import DataError
from dadvi.sharding.location import Location, Options, open_store, resolve
from dadvi.sharding.manifest import FORMAT
from dadvi.sharding.reader import ATTRIBUTE, is_group

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and glibc's stdio.h


class Output:
    """Where to write one data set."""

    def __init__(self, store: Store, scratch: Path | None) -> None:
        self.scratch = scratch
        """A directory on the same disk for temporary files; None when the output is not on a local disk."""
        self.started = False
        """Whether the store was touched."""
        self.store = store
        """The store to write to."""

    def create_group(self) -> zarr.Group:
        """Return an empty group at the root, replacing what was there; it is unfinished until it gets its manifest."""
        self.started = True
        return zarr.create_group(self.store, overwrite=True, attributes={ATTRIBUTE: {"format": FORMAT}})

    def sweep(self) -> None:
        """Remove what a process that was killed as it wrote has left: Zarr renames a file when it is whole."""
        if isinstance(self.store, LocalStore):
            for path in self.store.root.rglob("*.partial"):
                path.unlink()


def _is_zarr_group(path: Path) -> bool:
    return is_group(LocalStore(path, read_only=True))


@contextmanager
def output(location: Location, *, overwrite: bool = False, options: Options = None) -> Iterator[Output]:
    """Give a place to write; keep what was written if the body succeeds, and remove it if not.

    Parameters
    ----------
    location
        A path, a URL, or a Zarr store.
    overwrite
        Whether a Zarr group that is there already may be replaced. At a path it is replaced after the new one is
        complete; a URL or store is cleared when the writing starts.
    options
        What fsspec needs to reach a URL.

    Raises
    ------
    DataError
        At once, when there is something at the location that must not be replaced, or nothing can be written there.
    """
    resolved = resolve(location, options)
    if isinstance(resolved, Path):
        with staged(resolved, overwrite=overwrite) as directory:
            yield Output(LocalStore(directory), resolved.parent)
        return
    store = open_store(resolved, options, read_only=False)
    if store.read_only:
        raise DataError(f"{resolved} is read-only; open it for writing")
    if (
        not store.supports_deletes
    ):  # a Zip archive: neither the manifest, which comes last, nor a failure could be seen to
        raise DataError(f"{resolved} cannot replace what is in it; write to a directory and pack that")
    if not sync(store.is_empty("")):
        check_replaceable(resolved, overwrite, replaceable=is_group(store))
    target = Output(store, None)
    try:
        yield target
    except BaseException:
        if target.started:
            sync(store.delete_dir(""))
        raise


@contextmanager
def staged(path: Path, *, overwrite: bool = False, is_ours: Callable[[Path], bool] = _is_zarr_group) -> Iterator[Path]:
    """Give an empty directory that becomes `path` if the body succeeds, and is removed if not.

    Parameters
    ----------
    path
        Where the directory is to appear.
    overwrite
        Whether an earlier one may be replaced.
    is_ours
        Tells whether what stands at `path` is of the kind that may be replaced.

    Raises
    ------
    DataError
        At once, when something stands at `path` that must not be replaced, or nothing can be written beside it; and at
        the end, when something came there meanwhile.
    """
    check_free(path, overwrite=overwrite, is_ours=is_ours)
    directory = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        directory.mkdir()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # as any later write to a full disk does: no other directory need be chosen
        raise DataError(
            f"cannot write to {path.parent}: {error.strerror}; create that directory, or choose one that can be written"
        ) from error
    try:
        yield directory
        check_free(path, overwrite=overwrite, is_ours=is_ours)  # something may have come there meanwhile
        if path.exists():  # which is then lost: a power cut must not find the new one half on the disk
            flush_all(directory)
        put_in_place(directory, path)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or which files a directory has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (error.errno == errno.EINVAL and path.is_dir()):  # some file systems flush no directories
            raise
    finally:
        os.close(descriptor)


def flush_all(directory: Path) -> None:
    """Have the disk hold a directory with all that is in it."""
    for path in [*directory.rglob("*"), directory]:
        flush(path)


def check_free(path: Path, *, overwrite: bool, is_ours: Callable[[Path], bool]) -> None:
    """Raise DataError when something stands at `path` that must not be replaced; for the arguments see `staged`."""
    if path.exists():
        empty = path.is_dir() and not any(path.iterdir())
        check_replaceable(path, overwrite, replaceable=empty or is_ours(path))


def put_in_place(directory: Path, path: Path) -> None:
    """Have a directory take the place of the one at `path`, if there is one, which is removed as far as it can be.

    Where directories can be exchanged, a process that is killed leaves one of them at `path`, whole. The other one may
    remain under a hidden name, which is harmless.
    """
    old = directory
    if not path.exists():
        directory.rename(path)
    elif not _exchanged(directory, path):
        old = directory.with_name(f".old{directory.name}")
        try:
            path.rename(old)  # until the next line nothing is at `path`: an exchange has no such moment
            directory.rename(path)
        finally:
            if not path.exists():
                old.rename(path)
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two directories at one stroke; return False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    return renameat2 is not None and renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def check_replaceable(where: Path | str | Store, overwrite: bool, *, replaceable: bool) -> None:
    """Raise DataError when what is at the location must not be replaced."""
    if not replaceable:
        raise DataError(
            f"{where} exists and is nothing that dadvi wrote, so it is not overwritten; "
            "choose another output or remove it"
        )
    if not overwrite:
        raise DataError(f"{where} exists; choose another output, or replace it with overwrite=True (--overwrite)")
