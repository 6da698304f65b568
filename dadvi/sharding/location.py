"""Where a data set lies: a local path, a URL that fsspec understands, or a Zarr store."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, MemoryStore, WrapperStore

from dadvi.errors import DataError

Location: TypeAlias = str | os.PathLike[str] | Store
Options: TypeAlias = Mapping[str, Any] | None
"""What fsspec needs to reach a URL: credentials, endpoint; None for nothing."""


def resolve(location: Location, options: Options = None) -> Path | str | Store:
    """Return an absolute path, a URL or a store: what names the same data in any process and working directory.

    Raises
    ------
    DataError
        When storage options come with a location that is not a URL, where they would be ignored; or a URL has a
        password in it, which would get into logs and into the settings of a run.
    """
    if isinstance(location, str) and "://" in location and not location.startswith("file://"):
        if (parts := urlsplit(location)).password is not None:
            raise DataError(
                f"the URL {parts.scheme}://...@{parts.hostname}{parts.path} has a password in it; give credentials by "
                "the environment or by storage_options"
            )
        return location
    if options:
        raise DataError(f"storage_options go with a URL, and {location!s} is not one; leave them out")
    if isinstance(location, LocalStore):
        return location.root.resolve()
    if isinstance(location, Store):
        return location
    return Path(os.fspath(location).removeprefix("file://")).expanduser().resolve()


def open_store(resolved: Path | str | Store, options: Options, *, read_only: bool) -> Store:
    """Return a store at a resolved location.

    Raises
    ------
    DataError
        When the URL cannot be reached, or the package for its protocol is not installed.
    """
    if isinstance(resolved, Store):
        return resolved
    if isinstance(resolved, Path):
        return LocalStore(resolved, read_only=read_only)
    try:
        store = FsspecStore.from_url(resolved, storage_options=dict(options or {}), read_only=read_only)
        store.fs.invalidate_cache()  # of listings made before, which others may have changed since
    except Exception as error:
        # Every file system that fsspec drives raises errors of its own.
        raise DataError(f"cannot reach {resolved}: {error}; check the URL and storage_options") from error
    return store


def is_shareable(resolved: Path | str | Store) -> bool:
    """Return whether another process can open the same data: not when they lie in this process's memory."""
    if isinstance(resolved, str):
        return not resolved.startswith("memory://")
    if isinstance(resolved, FsspecStore):
        # A synchronous file system comes wrapped in an asynchronous one, whose protocol is the wrapper's.
        return "memory" not in protocols(getattr(resolved.fs, "sync_fs", resolved.fs))
    return not isinstance(resolved, MemoryStore)


def protocols(file_system: Any) -> tuple[str, ...]:
    """Return the names of the protocols of an fsspec file system, such as "file" or "s3"."""
    protocol = file_system.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


class TimedStore(WrapperStore[Store]):
    """A store that counts the seconds it takes to get bytes, in `seconds`."""

    seconds = 0.0

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return the bytes of a key."""
        started = time.perf_counter()
        try:
            return await super().get(key, prototype, byte_range)
        finally:
            self.seconds += time.perf_counter() - started


class RemoteStore(WrapperStore[Store]):
    """A store reached by fsspec, where whatever its client raises is an OSError.

    Some clients have errors of their own for a server that is gone, and those would be taken for damaged chunks.
    """

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return the bytes of a key; None if it is not there. Raises OSError when the store cannot be read."""
        try:
            return await super().get(key, prototype, byte_range)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            raise OSError(f"{error}") from error


class CompleteStore(TimedStore):
    """A store in which a missing chunk is an error.

    Zarr reads a missing shard as fill values, as if someone had meant zeros. Data sets written by this package store
    every chunk, so there a missing one has been lost.
    """

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return the bytes of a key. Raises FileNotFoundError for a chunk that is not there."""
        value = await super().get(key, prototype, byte_range)
        if value is None and not key.endswith("zarr.json"):
            raise FileNotFoundError(f"{key} is missing")
        return value
