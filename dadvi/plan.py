"""What a fit is going to do, told before it does it: from metadata and a few rows, without a worker."""

from dataclasses import dataclass

from distributed.system import MEMORY_LIMIT

from dadvi.binding import bind_to
from dadvi.families import Family
from dadvi.fit import Method, choose_method
from dadvi.memory import Budget, Need
from dadvi.model import Model
from dadvi.quadratic import tangents_at_most
from dadvi.sharding import ShardedDataset

PROCESS_BYTES = 450 * 2**20
"""Resident, of a worker that has made a pass over a few rows: 446 MiB, of which 297 are its own."""


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
    """At most, one for each shard: once it is known how fast passes go, a task has some seconds' worth of shards."""
    bytes_per_pass: int
    """Of the fields that the model uses, as a pass without any cache reads them."""
    bytes_at_most: int
    """`bytes_per_pass` times `passes_at_most`."""
    worker_bytes: int
    """Estimated memory of a worker alone on this machine: its process, what a pass has in use, and chunks kept."""


def make_plan(
    model: Model,
    data: ShardedDataset,
    *,
    method: Method | str,
    family: Family,
    max_passes: float | None,
    memory_budget: Budget = None,
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
    need = Need.of(bound, manifest, settings.points_at_most, tangents_at_most(model), memory_budget)
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
        worker_bytes=need.working + min(need.room(MEMORY_LIMIT), per_pass) + PROCESS_BYTES,
    )
