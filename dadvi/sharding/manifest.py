"""What a data set is: its fields, its rows, and how rows are cut into chunks and shards.

A chunk is a run of rows that is read at once, the unit of sampling; a shard is a run of chunks in one Zarr shard, the
unit of a task, of placement and of reduction. Chunk c holds rows [c·chunk_rows, (c+1)·chunk_rows) and shard s holds
chunks [s·k, (s+1)·k) with k = shard_rows / chunk_rows; the last of each may be shorter.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, Self, TypeAlias

import numpy as np

from dadvi.errors import DataError
from dadvi.types import IntArray

FORMAT = 1
"""Version of the stored form of a manifest. A newer one is refused, an older one must still be read."""

Category: TypeAlias = str | int | float | bool
JSON: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Field:
    """One named array of the data set, with rows along its first axis."""

    name: str
    """Name by which a model asks for the field."""
    dtype: str
    """NumPy name of the stored dtype, such as "float32"."""
    shape: tuple[int, ...] = ()
    """Shape of one row; () when a row is a scalar."""
    columns: tuple[str, ...] | None = None
    """Source columns stacked into the field, in order; None when it did not come from a table."""
    categories: tuple[Category, ...] | None = None
    """What the integer codes 0, 1, ... stand for; None when the values are not codes."""
    mean: tuple[float, ...] | None = None
    """Per column, what was subtracted: stored = (raw - mean) / scale; None when not standardised."""
    scale: tuple[float, ...] | None = None
    """Per column, what was divided by; None when not standardised."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as stored."""
        return np.dtype(self.dtype).itemsize * prod(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object from which `from_json` makes an equal field."""
        lists = {
            key: None if value is None else list(value)
            for key in ("columns", "categories", "mean", "scale")
            for value in [getattr(self, key)]
        }
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), **lists}

    @classmethod
    def from_json(cls, document: JSON) -> Self:
        """Return the field that `to_json` described. Raises KeyError or TypeError for any other document."""
        lists = {
            key: None if document[key] is None else tuple(document[key])
            for key in ("columns", "categories", "mean", "scale")
        }
        return cls(document["name"], document["dtype"], tuple(document["shape"]), **lists)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A data set described once: what every other part may trust without looking at the data.

    Raises
    ------
    DataError
        When there are no rows or fields, or the cut into chunks and shards is impossible.
    """

    num_rows: int
    """N, the number of rows."""
    fields: Mapping[str, Field]
    """Field by name, in the order in which they were written; read-only."""
    chunk_rows: int
    """Rows of every chunk but the last."""
    shard_rows: int
    """Rows of every shard but the last, a multiple of `chunk_rows`."""
    finite: bool
    """Whether every value was seen to be finite when it was written."""
    made: JSON = field(default_factory=dict)
    """How the data were made: version, sources, shuffle seed, policy for missing values, rows dropped, a digest of what
    was written; JSON."""

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise DataError("empty data: 0 rows, at least 1 is needed; check the sources and any filter on them")
        if not self.fields:
            raise DataError("empty data: no fields, at least 1 is needed")
        if self.chunk_rows < 1 or self.shard_rows < 1 or self.shard_rows % self.chunk_rows:
            raise DataError(
                f"shard_rows={self.shard_rows} must be a positive multiple of chunk_rows={self.chunk_rows}; "
                f"the nearest is {max(1, round(self.shard_rows / max(self.chunk_rows, 1))) * max(self.chunk_rows, 1)}"
            )
        object.__setattr__(self, "fields", MappingProxyType(dict(self.fields)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only mapping does not pickle; the JSON form does.
        return Manifest.from_json, (self.to_json(),)

    @property
    def num_chunks(self) -> int:
        """C, the number of chunks, the ragged last one included."""
        return -(-self.num_rows // self.chunk_rows)

    @property
    def num_shards(self) -> int:
        """S, the number of shards, the ragged last one included."""
        return -(-self.num_rows // self.shard_rows)

    @property
    def chunks_per_shard(self) -> int:
        """Chunks of every shard but the last."""
        return self.shard_rows // self.chunk_rows

    @property
    def chunk_sizes(self) -> IntArray:
        """Rows of each chunk, (C,)."""
        sizes = np.full(self.num_chunks, self.chunk_rows, dtype=np.int64)
        sizes[-1] = self.num_rows - (self.num_chunks - 1) * self.chunk_rows
        return sizes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as stored, over all fields."""
        return sum(each.row_bytes for each in self.fields.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of the data set, uncompressed."""
        return self.num_rows * self.row_bytes

    def rows(self, chunk: int) -> tuple[int, int]:
        """Return (start, stop) of the rows of a chunk. Raises DataError when there is no such chunk."""
        if not 0 <= chunk < self.num_chunks:
            raise DataError(f"chunk {chunk} does not exist: the data have chunks 0 to {self.num_chunks - 1}")
        start = int(chunk) * self.chunk_rows
        return start, min(start + self.chunk_rows, self.num_rows)

    def chunks(self, shard: int) -> range:
        """Return the chunks of a shard, in order. Raises DataError when there is no such shard."""
        if not 0 <= shard < self.num_shards:
            raise DataError(f"shard {shard} does not exist: the data have shards 0 to {self.num_shards - 1}")
        start = int(shard) * self.chunks_per_shard
        return range(start, min(start + self.chunks_per_shard, self.num_chunks))

    def shard(self, chunk: int) -> int:
        """Return the shard that holds a chunk. Raises DataError when there is no such chunk."""
        return self.rows(chunk)[0] // self.shard_rows

    def select(self, names: Iterable[str]) -> tuple[Field, ...]:
        """Return the named fields, in the order asked for. Raises DataError naming those that do not exist."""
        names = tuple(names)
        if unknown := [name for name in names if name not in self.fields]:
            raise DataError(f"no field named {', '.join(unknown)}: the data have {', '.join(self.fields)}")
        return tuple(self.fields[name] for name in names)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object from which `from_json` makes an equal manifest."""
        return {
            "num_rows": self.num_rows,
            "fields": [each.to_json() for each in self.fields.values()],
            "chunk_rows": self.chunk_rows,
            "shard_rows": self.shard_rows,
            "finite": self.finite,
            "made": dict(self.made),
        }

    @classmethod
    def from_json(cls, document: JSON) -> Self:
        """Return the manifest that `to_json` described. Raises DataError for any other document."""
        try:
            fields = [Field.from_json(each) for each in document["fields"]]
            return cls(
                num_rows=int(document["num_rows"]),
                fields={each.name: each for each in fields},
                chunk_rows=int(document["chunk_rows"]),
                shard_rows=int(document["shard_rows"]),
                finite=bool(document["finite"]),
                made=dict(document["made"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the manifest cannot be read ({error!r}); write the data set again") from error


def storable(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype, in native byte order, in which values of `dtype` are held.

    Raises
    ------
    DataError
        When torch could not hold such values.
    """
    if dtype.kind in "fiub" and dtype.itemsize <= 8:
        return dtype.newbyteorder("=")
    remedies = {
        "O": "convert it to numbers, or names to integer codes",
        "U": "convert it to integer codes",
        "S": "convert it to integer codes",
        "T": "convert it to integer codes",
        "M": "convert it to a number, such as days since a date",
        "m": "convert it to a number, such as seconds",
        "c": "store real and imaginary parts as two columns",
    }
    raise DataError(
        f"field '{name}' has dtype {dtype}; floats of at most 64 bits, integers and booleans can be used: "
        f"{remedies.get(dtype.kind, 'convert it to float64')}"
    )


def digest(manifest: Manifest, arrays: Mapping[str, JSON]) -> str:
    """Return the sha256 of a manifest and of the metadata of its arrays, in hexadecimal.

    Parameters
    ----------
    manifest
        The manifest.
    arrays
        The Zarr metadata document of each array by field name: shape, dtype, chunk and shard grid, codecs. Free
        attributes, which do not change how bytes are read, are left out of the digest.
    """
    core = {
        name: {key: value for key, value in document.items() if key != "attributes"}
        for name, document in arrays.items()
    }
    canonical = json.dumps({"manifest": manifest.to_json(), "arrays": core}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
