"""The names that every part shares: batches, latents, and the purposes of random streams."""

import operator
from collections.abc import Mapping
from enum import IntEnum
from numbers import Real
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dadvi.errors import InputError

Batch: TypeAlias = Mapping[str, Tensor]
"""The tensors of one chunk by field name, each of shape (rows, *row shape)."""

Latents: TypeAlias = Mapping[str, Tensor]
"""Constrained latents by name, each of shape (K, *shape) for K draws, or (*shape) for one."""

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]


class Purpose(IntEnum):
    """What a random stream is for. Two purposes never share a stream; a number, once given, keeps its meaning."""

    SHUFFLE = 0
    EPOCH = 1
    DRAWS = 2
    SUBSAMPLE = 3
    POSTERIOR = 4
    CHECK = 5
    CERTIFICATE = 6
    CURVATURE = 7
    FAMILY = 8
    RESPONSE = 9


def is_number(value: object) -> bool:
    """Return whether a value is a real number, Python's or NumPy's, and can be compared with limits."""
    return isinstance(value, Real)


def whole_number(name: str, value: object) -> int:
    """Return a whole number of at least 0, such as a seed, as a Python int, NumPy's included.

    Raises
    ------
    InputError
        If the value is anything else.

    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < 0:
        raise InputError(f"{name}={value!r}: it must be a whole number, at least 0")
    return number


def random_stream(seed: int, purpose: Purpose, step: int = 0) -> np.random.Generator:
    """Return the generator of (seed, purpose, step): independent streams, never seed arithmetic."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(int(purpose), step))))
