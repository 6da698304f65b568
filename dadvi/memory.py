"""How much memory a worker needs, told before a run, and how much is left for keeping chunks.

A budget is for what a pass holds: the chunks in hand, what the likelihood makes of them at K draws, arrays in D, and
chunks kept for the next pass. Python, torch and Dask themselves come on top, about 450 MiB a process with the pages of
their files.
"""

import ctypes
import os
import platform
from dataclasses import dataclass
from typing import Self, TypeAlias

from dask.utils import format_bytes, parse_bytes

from dadvi.errors import InputError
from dadvi.likelihood import BoundModel
from dadvi.passes import tangents_at_once
from dadvi.sharding import Manifest
from dadvi.summing import chunks_at_once, row_bytes

Budget: TypeAlias = int | str | None
"""Bytes for a worker, as a number or a text such as "1.5 GiB"; None for a share of what there is."""

CHUNKS_IN_HAND = 2
"""The chunk being summed and the one being read."""

LIVE = 4.0
"""Bytes that a differentiation has at once, over those that it saved on the way forward."""

ARRAYS_OF_DRAWS, ARRAYS_OF_TANGENTS = 8, 8
"""Arrays of draws times coordinates (points, latents, gradients, sums of these), and of tangents times coordinates."""

SHARE = 4
"""Without a budget it is this part of the memory that there is."""


LARGEST_FROM_HEAP, KEPT_FREE = 2**25, 2**26
"""Bytes of an array up to which it comes from the heap, and of free heap that is kept: where glibc gets by itself."""

SET_BY_NANNY = "65536"
"""Dask's default of MALLOC_TRIM_THRESHOLD_."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed arrays for the next ones, as it learns to do where nothing is set.

    Dask's nanny sets MALLOC_TRIM_THRESHOLD_ for its worker, so that memory is given back early, and with it glibc no
    longer learns: every array of more than 128 KiB is mapped anew, page by page, and a pass at 8 draws or more takes
    twice as long. Any other value is a user's, and is left as it is.
    """
    by_nanny = os.environ.get("MALLOC_TRIM_THRESHOLD_") == SET_BY_NANNY and "MALLOC_MMAP_THRESHOLD_" not in os.environ
    if by_nanny and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_FREE)


def parse_budget(budget: Budget) -> int | None:
    """Return a budget in bytes.

    Raises
    ------
    InputError
        If it is not a positive number of bytes.

    """
    if budget is None:
        return None
    try:
        number = -1 if isinstance(budget, bool) or budget == "" else parse_bytes(budget)
    except (ValueError, TypeError, AttributeError):
        number = -1
    if number < 1:
        raise InputError(f"memory_budget={budget!r}: give bytes as a positive number or a text such as '1.5 GiB'")
    return int(number)


@dataclass(frozen=True)
class Need:
    """What a worker may hold, and what it has in use while it sums a pass."""

    working: int = 0  # bytes
    budget: int | None = None  # bytes

    @classmethod
    def of(cls, model: BoundModel, manifest: Manifest, num_points: int, num_tangents: int, budget: Budget) -> Self:
        """Return the need of passes at so many points, and of Hessians there with so many tangents.

        Raises
        ------
        InputError
            If a pass alone needs more than the budget, or the budget is no number of bytes.

        """
        working = working_bytes(model, manifest, num_points, num_tangents)
        limit = parse_budget(budget)
        if limit is not None and working > limit:
            raise InputError(
                f"memory_budget={budget!r} is {format_bytes(limit)}, and a worker needs {format_bytes(working)} to sum "
                f"chunks of {manifest.chunk_rows} rows at {num_points} draws of {model.model.dim} coordinates; raise "
                "it, lower num_draws, or write the data in smaller chunks (chunk_rows=)"
            )
        return cls(working, limit)

    def room(self, available: int) -> int:
        """Return the bytes of chunks to keep on a worker that has so many bytes for everything."""
        return max(0, (available // SHARE if self.budget is None else self.budget) - self.working)


def working_bytes(model: BoundModel, manifest: Manifest, num_points: int, num_tangents: int) -> int:
    """Return the bytes that a worker has in use while it sums a pass at K points, and Hessians there."""
    at_once = chunks_at_once(model, manifest)
    rows = min(manifest.num_rows, at_once * manifest.chunk_rows)
    chunks = CHUNKS_IN_HAND + (at_once > 1) + 1  # perhaps joined, and cast
    at_draws = model.saved_bytes * num_points * rows
    tangents = min(num_tangents, tangents_at_once(at_draws)) * at_draws
    in_d = 8 * (ARRAYS_OF_DRAWS * num_points + ARRAYS_OF_TANGENTS * num_tangents) * model.model.dim
    return int(chunks * rows * row_bytes(model, manifest) + LIVE * (at_draws + tangents) + in_d)
