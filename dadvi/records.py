"""Records as JSON and arrays, and back: how the state of a run goes to disk, and comes from it, without running code.

A *record* is a frozen dataclass or a NamedTuple of tensors, arrays, numbers, texts, tuples, lists, dictionaries and
records. Packed, tensors and arrays are numbered and the rest is a JSON document; unpacked, records are made of the
classes that the reader names and of no others. Objects that need not be stored, such as rows that can be read again,
are known to both sides by a name.

Packing and unpacking also gives a record its *canonical form*: every tensor contiguous and in memory of its own. How a
tensor lies in memory decides the last bits of a product with it, so a computation that is to go on with the same bits
from memory and from disk has to go on from the canonical form in both cases.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dadvi.errors import InputError


@dataclass(frozen=True)
class Packed:
    """A value as JSON and arrays."""

    document: Any  # JSON, but for nan and infinities, which Python's json reads and writes
    arrays: Mapping[str, NDArray[Any]]


def pack(value: Any, known: Mapping[str, object] | None = None) -> Packed:
    """Return a value as JSON and arrays; an array that is in it twice is stored once.

    Parameters
    ----------
    known
        Objects that are stored as their name alone, told by identity.

    Raises
    ------
    InputError
        If there is anything else in it than records are made of.

    """
    names = {id(each): name for name, each in (known or {}).items()}
    arrays: dict[str, NDArray[Any]] = {}
    numbered: dict[int, str] = {}

    def stored(each: Any, array: NDArray[Any]) -> str:
        if id(each) not in numbered:
            numbered[id(each)] = str(len(arrays))
            arrays[numbered[id(each)]] = np.ascontiguousarray(array).reshape(array.shape)
        return numbered[id(each)]

    def packed(each: Any) -> Any:
        if id(each) in names:
            return {"known": names[id(each)]}
        if each is None or isinstance(each, bool | int | float | str):
            return each.item() if isinstance(each, np.generic) else each
        if isinstance(each, Tensor):
            return {"tensor": stored(each, each.detach().numpy())}
        if isinstance(each, np.ndarray):
            return {"array": stored(each, each)}
        if is_dataclass(each) and not isinstance(each, type):
            return {"record": type(each).__name__, "of": {f.name: packed(getattr(each, f.name)) for f in fields(each)}}
        if isinstance(each, tuple) and hasattr(each, "_asdict"):
            return {"record": type(each).__name__, "of": {name: packed(of) for name, of in each._asdict().items()}}
        if isinstance(each, tuple | list):
            return {type(each).__name__: [packed(of) for of in each]}
        if isinstance(each, Mapping):
            return {"dict": [[packed(key), packed(of)] for key, of in each.items()]}
        raise InputError(
            f"the state of the run has a {type(each).__name__} in it, which cannot be stored; use optimizers and "
            "averages whose state is made of tensors and numbers, or fit without a run directory"
        )

    return Packed(packed(value), arrays)


def unpack(packed: Packed, classes: Iterable[type], known: Mapping[str, object] | None = None) -> Any:
    """Return the value that was packed, its tensors contiguous and in memory of their own.

    Parameters
    ----------
    classes
        Of the records that may be in it.
    known
        What the names of known objects stand for.

    Raises
    ------
    KeyError, TypeError
        If it has records of other classes, of other fields, or other names.

    """
    by_name = {each.__name__: each for each in classes}
    tensors: dict[str, Tensor] = {}

    def tensor(number: str) -> Tensor:
        if number not in tensors:
            tensors[number] = torch.tensor(packed.arrays[number])  # a copy, aligned as torch does
        return tensors[number]

    def unpacked(each: Any) -> Any:
        if not isinstance(each, dict):
            return each
        if "record" in each:
            return by_name[each["record"]](**{name: unpacked(of) for name, of in each["of"].items()})
        ((kind, of),) = each.items()
        match kind:
            case "known":
                return (known or {})[of]
            case "tensor":
                return tensor(of)
            case "array":
                return packed.arrays[of].copy()
            case "list":
                return [unpacked(one) for one in of]
            case "tuple":
                return tuple(unpacked(one) for one in of)
            case "dict":
                return {unpacked(key): unpacked(one) for key, one in of}
        raise KeyError(kind)

    return unpacked(packed.document)


def record_classes(value: Any) -> set[type]:
    """Return the classes of the NamedTuples in a value, at any depth."""
    found: set[type] = set()
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        found.add(type(value))
    if isinstance(value, Mapping):
        value = value.values()
    if isinstance(value, Iterable) and not isinstance(value, str | Tensor):
        for each in value:
            found |= record_classes(each)
    return found
