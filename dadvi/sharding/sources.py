"""Arrays of every kind as streams of NumPy pieces, aligned to blocks of rows, and checked.

A source yields the pieces that are natural to it, each computed once: a Dask array its blocks, a Zarr array its chunks,
what lies in memory or in a mapped file some megabytes at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isnan, prod
from typing import Any

import dask.base
import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from dadvi.errors import DataError
from dadvi.sharding.manifest import storable
from dadvi.sharding.shuffle import Block

PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Source:
    """An array of rows, whatever holds it."""

    kind: str
    """Where it came from: "numpy", "torch", "dask" or "zarr"."""
    dtype: np.dtype[Any]
    """Dtype of the pieces, native and storable."""
    shape: tuple[int, ...]
    """(rows, *row shape)."""
    pieces: Callable[[], Iterator[NDArray[Any]]]
    """Yields consecutive rows, all of them once, each piece (some rows, *row shape)."""


def source(name: str, array: Any) -> Source:
    """Return the source of a field.

    Parameters
    ----------
    name
        Name of the field, for messages.
    array
        A NumPy array or memmap, torch tensor, Dask array, Zarr array, or anything that `np.asarray` takes.

    Raises
    ------
    DataError
        When the array has no rows or no row axis, a length that is not known, masked values or an unusable dtype.
    """
    if isinstance(array, torch.Tensor):
        return _torch_source(name, array)
    if isinstance(array, zarr.Array):
        step = _step(name, array.shape, array.dtype)
        rows = array.chunks[0] * max(1, step // array.chunks[0])
        return _sliced("zarr", name, array.shape, array.dtype, lambda start: array[start : start + rows], rows)
    if dask.base.is_dask_collection(array):
        return _dask_source(name, array)
    if np.ma.isMaskedArray(array) and np.ma.is_masked(array):
        raise DataError(
            f"field '{name}' has {np.ma.count_masked(array)} masked values, of which none is allowed; "
            "remove those rows, or fill them with `.filled(value)`"
        )
    values = np.asarray(array)
    rows = _step(name, values.shape, values.dtype)
    return _sliced("numpy", name, values.shape, values.dtype, lambda start: values[start : start + rows], rows)


def _torch_source(name: str, tensor: torch.Tensor) -> Source:
    if tensor.layout != torch.strided:
        raise DataError(f"field '{name}' is a sparse tensor ({tensor.layout}); convert it with `.to_dense()`")
    try:
        dtype = tensor[:0].detach().cpu().numpy().dtype if tensor.ndim else np.dtype(np.float64)
    except TypeError as error:
        raise DataError(
            f"field '{name}' has dtype {tensor.dtype}, which NumPy lacks; convert it with `.float()`"
        ) from error
    rows = _step(name, tuple(tensor.shape), dtype)

    def read(start: int) -> NDArray[Any]:
        return tensor[start : start + rows].detach().cpu().numpy()

    return _sliced("torch", name, tuple(tensor.shape), dtype, read, rows)


def _dask_source(name: str, array: Any) -> Source:
    # Slow to import, and there is nothing of its kind in a process that has not imported it.
    from dask.array import Array

    if not isinstance(array, Array):
        raise DataError(
            f"field '{name}' is a Dask {type(array).__name__}, not an array; "
            "convert it, for instance with `.to_dask_array(lengths=True)`"
        )
    if any(isnan(size) for size in array.shape):
        raise DataError(
            f"field '{name}' is a Dask array of unknown length {array.shape}; call `.compute_chunk_sizes()` on it"
        )
    _step(name, array.shape, array.dtype)

    def pieces() -> Iterator[NDArray[Any]]:
        for block in range(array.numblocks[0]):
            yield np.asarray(array.blocks[block].compute())

    return Source("dask", storable(name, np.dtype(array.dtype)), tuple(int(size) for size in array.shape), pieces)


def _sliced(
    kind: str, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], read: Callable[[int], Any], rows: int
) -> Source:
    def pieces() -> Iterator[NDArray[Any]]:
        for start in range(0, shape[0], rows):
            yield np.asarray(read(start))

    return Source(kind, storable(name, dtype), shape, pieces)


def _step(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Return the rows of a piece of PIECE_BYTES. Raises DataError when there is no row axis, or nothing in it."""
    if not shape:
        raise DataError(f"field '{name}' is 0-dimensional; every field needs rows as its first axis")
    if not prod(shape):
        raise DataError(
            f"empty data: field '{name}' has shape {tuple(shape)}; at least one row, and one value a row, are needed"
        )
    return int(max(1, PIECE_BYTES // (dtype.itemsize * prod(shape[1:]))))


def aligned(sources: Mapping[str, Source]) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield blocks that hold the same rows of every source, cut wherever a piece of any of them ends."""
    streams = {name: each.pieces() for name, each in sources.items()}
    rest = {name: np.empty((0, *each.shape[1:]), each.dtype) for name, each in sources.items()}
    remaining = min(each.shape[0] for each in sources.values())
    while remaining:
        for name, stream in streams.items():
            while not len(rest[name]):
                rest[name] = next(stream).astype(sources[name].dtype, copy=False)
        length = min(len(piece) for piece in rest.values())
        yield {name: piece[:length] for name, piece in rest.items()}
        rest = {name: piece[length:] for name, piece in rest.items()}
        remaining -= length


def checked(blocks: Iterable[Block], num_categories: Mapping[str, int]) -> Iterator[Block]:
    """Pass blocks on until one holds a value that must not be there; then only count such values to the end, and raise.

    Parameters
    ----------
    blocks
        Blocks of consecutive rows, from row 0 on.
    num_categories
        Number of categories of the fields that are codes.

    Raises
    ------
    DataError
        At the end, naming for each field the count of NaN and infinite values, of codes outside the categories, or of
        integers above the largest int64; and the first of them with its row.
    """
    faults: dict[str, tuple[str, int]] = {}
    row = 0
    for block in blocks:
        for name, values in block.items():
            bad, rule = _faults(values, num_categories.get(name))
            if bad is not None and (count := int(bad.sum())):
                position = np.unravel_index(int(bad.argmax()), bad.shape)
                first = f"{rule}; the first is {values[position]} in row {row + int(position[0])}"
                first, total = faults.get(name, (first, 0))
                faults[name] = first, total + count
        if not faults:
            yield block
        row += len(next(iter(block.values())))
    if faults:
        each = ". ".join(f"field '{name}' has {total} {first}" for name, (first, total) in faults.items())
        raise DataError(f"{each}. Remove or correct those rows")


def _faults(values: NDArray[Any], num_categories: int | None) -> tuple[NDArray[np.bool_] | None, str]:
    """Return which values must not be there, or None when all can be, and what is wrong with them."""
    if values.dtype.kind == "f":
        return ~np.isfinite(values), "values that are NaN or infinite, of which none is allowed"
    if num_categories is not None:
        return (values < 0) | (values >= num_categories), f"codes outside 0 to {num_categories - 1}, its categories"
    if values.dtype == np.uint64:
        limit = np.iinfo(np.int64).max
        return values > limit, f"integers above {limit}, the largest usable; convert it to float64"
    return None, ""
