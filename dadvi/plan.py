"""What a fit is going to do, told before it does it: from metadata and a few rows, without a worker."""

from dataclasses import dataclass

import numpy as np
import psutil

from dadvi.advi import ADVI
from dadvi.anchored import MOST_DRAWS
from dadvi.families import Family
from dadvi.fit import Method, choose_method
from dadvi.likelihood import bind_to
from dadvi.model import Model
from dadvi.passes import NUMBERS_AT_ONCE
from dadvi.sharding import Manifest, ShardedDataset
from dadvi.sharding.cache import CACHE_BYTES

NUMBERS_PER_ROW = 8
"""Numbers that a likelihood and its gradient hold at once for each row and draw: parameters, densities, adjoints."""


@dataclass(frozen=True)
class Plan:
    """The size of a fit."""

    rows: int
    """N."""
    chunks: int
    shards: int
    data_bytes: int
    """Of all fields, uncompressed."""
    coordinates: int
    """D, unconstrained."""
    method: str
    family: str
    passes_at_most: float
    """After which no further round or epoch starts."""
    tasks_per_pass: int
    """One for each shard."""
    bytes_per_pass: int
    """Of the fields that the model uses, as a pass without any cache reads them."""
    bytes_at_most: int
    """`bytes_per_pass` times `passes_at_most`."""
    worker_bytes: int
    """Estimated memory of a worker: a process with dadvi loaded, its cache, a chunk, and the arithmetic on it."""


def make_plan(
    model: Model,
    data: ShardedDataset,
    *,
    method: Method | str,
    family: Family,
    max_passes: float | None,
) -> Plan:
    """Return what `dadvi.fit` would do with the same arguments. It reads rows of the first and last chunk only.

    Raises
    ------
    ModelError, DataError, InputError
        As `dadvi.fit` does before its first pass.

    """
    bound, manifest = bind_to(model, data), data.manifest
    settings = choose_method(method, bound, data, family)
    settings.check(family)
    passes = settings.passes_at_most(manifest, max_passes)
    per_pass = manifest.num_rows * sum(each.row_bytes for each in manifest.select(bound.fields))
    draws = settings.num_draws if isinstance(settings, ADVI) else settings.num_draws or MOST_DRAWS
    return Plan(
        rows=manifest.num_rows,
        chunks=manifest.num_chunks,
        shards=manifest.num_shards,
        data_bytes=manifest.num_bytes,
        coordinates=model.dim,
        method=type(settings).__name__,
        family=family.name,
        passes_at_most=passes,
        tasks_per_pass=manifest.num_shards,
        bytes_per_pass=per_pass,
        bytes_at_most=round(per_pass * passes),
        worker_bytes=_worker_bytes(manifest, bound.fields, draws),
    )


def _worker_bytes(manifest: Manifest, fields: tuple[str, ...], draws: int) -> int:
    """Return the memory of a worker of one thread, when it holds as much of the data as its cache takes.

    This process has loaded what a worker loads, so what it holds now stands for that.
    """
    chunk_rows = min(manifest.chunk_rows, manifest.num_rows)
    decoded = sum(
        each.row_bytes * 8 // np.dtype(each.dtype).itemsize if np.dtype(each.dtype).kind in "iu" else each.row_bytes
        for each in manifest.select(fields)
    )  # of a row: integers are read as int64
    arithmetic = 8 * max(NUMBERS_PER_ROW * draws * chunk_rows, NUMBERS_AT_ONCE)
    cache = min(CACHE_BYTES, decoded * manifest.num_rows)
    return int(psutil.Process().memory_info().rss + cache + 2 * decoded * chunk_rows + arithmetic)
