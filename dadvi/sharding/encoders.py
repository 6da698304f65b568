"""Table columns made into fields, in two stages.

While a unit of the table streams by, an encoder turns each batch into the columns' own numbers, or into codes in order
of appearance, and gathers what only the whole data can tell: extremes, mean and variance, categories. Encoders of
following units are merged; `finish` then gives the field and the map from what was encoded to what is stored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dadvi.errors import DataError
from dadvi.sharding.fieldspec import FieldSpec
from dadvi.sharding.manifest import Field
from dadvi.types import FloatArray

STACK_ROWS = 2048
"""Rows of columns that are stacked at once: a block of this height stays in the processor's cache."""

Transform: TypeAlias = Callable[[NDArray[Any]], NDArray[Any]]
"""From rows as encoded to rows as stored; it can be pickled."""


class Encoder(Protocol):
    """What makes one field from a stream of batches."""

    @property
    def encoded(self) -> np.dtype[Any]:
        """Dtype of one encoded row, with its shape (p,) if there are several columns."""
        ...

    def encode(self, columns: Sequence[Any], out: NDArray[Any]) -> None:
        """Put p Arrow arrays of finite values into `out` as rows, (rows,) or (rows, p); remember their statistics."""
        ...

    def merge(self, other: Self) -> None:
        """Take in the statistics of rows that follow those seen so far."""
        ...

    def finish(self) -> tuple[Field, Transform]:
        """Return the field and its last step. Raises DataError when the values do not go with what was asked."""
        ...


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and squared deviations of p columns, merged without cancellation (Chan, Golub, LeVeque 1983)."""

    count: int
    """Rows seen."""
    mean: FloatArray
    """Mean, (p,)."""
    m2: FloatArray
    """Sum of squared deviations from the mean, (p,)."""

    @classmethod
    def of(cls, values: NDArray[Any]) -> Self:
        """Return the moments of values (rows, p), with at least one row."""
        wide = values.astype(np.float64, copy=False)
        # An overflow makes the variance infinite or NaN, which is refused where it is used.
        with np.errstate(over="ignore", invalid="ignore"):
            mean = wide.mean(axis=0)
            return cls(len(wide), mean, np.square(wide - mean).sum(axis=0))

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of the rows of both."""
        count = self.count + other.count
        with np.errstate(over="ignore", invalid="ignore"):
            delta = other.mean - self.mean
            mean = self.mean + delta * (other.count / count)
            return Moments(count, mean, self.m2 + other.m2 + delta**2 * (self.count * other.count / count))


@dataclass(frozen=True, slots=True)
class Cast:
    """Rows in another dtype."""

    dtype: np.dtype[Any]

    def __call__(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the rows in the dtype."""
        return values.astype(self.dtype, copy=False)


@dataclass(frozen=True, slots=True)
class Standardize:
    """Rows less their mean, over their sd, computed in float64."""

    mean: FloatArray
    """(p,) or ()."""
    scale: FloatArray
    """(p,) or ()."""
    dtype: np.dtype[Any]

    def __call__(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the standardised rows in the dtype."""
        wide: FloatArray = values - self.mean
        wide /= self.scale
        return wide.astype(self.dtype, copy=False)


@dataclass(frozen=True, slots=True)
class Recode:
    """Codes for other codes."""

    codes: NDArray[Any]
    """The new code by the old one, (categories,)."""

    def __call__(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the new codes."""
        recoded: NDArray[Any] = self.codes[values]
        return recoded


class NumericEncoder:
    """Numbers and booleans, of p columns stacked in their common dtype."""

    def __init__(self, spec: FieldSpec, types: Mapping[str, Any]) -> None:
        self._spec = spec
        self._dtype = np.result_type(*(np.dtype(types[name].to_pandas_dtype()) for name in spec.columns))
        self._moments: Moments | None = None
        self._low: NDArray[Any] | None = None  # (p,)
        self._high: NDArray[Any] | None = None  # (p,)
        self._fraction: tuple[str, Any] | None = None

    @property
    def encoded(self) -> np.dtype[Any]:
        """The common dtype, with the shape (p,) of a row of several columns."""
        count = len(self._spec.columns)
        return np.dtype((self._dtype, (count,))) if count > 1 else self._dtype

    def encode(self, columns: Sequence[Any], out: NDArray[Any]) -> None:
        """Stack the columns in `out`, (rows,) or (rows, p)."""
        arrays = [column.to_numpy(zero_copy_only=False).astype(self._dtype, copy=False) for column in columns]
        values = out.reshape(len(out), len(arrays))
        for start in range(0, len(values), STACK_ROWS):
            rows = slice(start, start + STACK_ROWS)
            for position, each in enumerate(arrays):
                values[rows, position] = each[rows]
        if len(values):
            # Of the columns, which are contiguous.
            self._widen(np.array([each.min() for each in arrays]), np.array([each.max() for each in arrays]))
            self._find_fraction(values)
            if self._spec.standardize:
                self._add(Moments.of(values))

    def merge(self, other: Self) -> None:
        """Take in the extremes, moments and first fraction of rows that follow."""
        if other._low is not None and other._high is not None:
            self._widen(other._low, other._high)
        if other._moments is not None:
            self._add(other._moments)
        self._fraction = self._fraction or other._fraction

    def _widen(self, low: NDArray[Any], high: NDArray[Any]) -> None:
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)

    def _add(self, moments: Moments) -> None:
        self._moments = moments if self._moments is None else self._moments.merge(moments)

    def finish(self) -> tuple[Field, Transform]:
        """Return the field, and the cast to its dtype after the standardisation if there is one."""
        spec = self._spec
        shape = (len(spec.columns),) if len(spec.columns) > 1 else ()
        if self._moments is None:
            dtype = self._dtype if spec.dtype is None else np.dtype(spec.dtype)
            self._check_range(dtype)
            return Field(spec.name, dtype.name, shape, spec.columns), Cast(dtype)
        mean, scale = self._moments.mean, np.sqrt(self._moments.m2 / self._moments.count)
        self._check_scale(scale)
        dtype = np.dtype(spec.dtype or (self._dtype if self._dtype.kind == "f" else np.float64))
        field = Field(
            spec.name, dtype.name, shape, spec.columns, mean=tuple(mean.tolist()), scale=tuple(scale.tolist())
        )
        location, spread = (mean, scale) if shape else (mean[0], scale[0])
        return field, Standardize(location, spread, dtype)

    def _extremes(self) -> list[tuple[str, Any, Any]]:
        """Return the column, lowest and highest value of each column; nothing before the first row."""
        if self._low is None or self._high is None:
            return []
        return list(zip(self._spec.columns, self._low.tolist(), self._high.tolist(), strict=True))

    def _find_fraction(self, values: NDArray[Any]) -> None:
        if self._fraction is None and self._dtype.kind == "f" and self._spec.dtype is not None:
            fractions = values != np.trunc(values)
            if np.dtype(self._spec.dtype).kind != "f" and fractions.any():
                row, column = np.unravel_index(int(fractions.argmax()), fractions.shape)
                self._fraction = self._spec.columns[column], values[row, column]

    def _check_range(self, dtype: np.dtype[Any]) -> None:
        if self._fraction is not None:
            column, value = self._fraction
            raise DataError(f"column '{column}' has the value {value}, which is no {dtype}; use a float dtype")
        low_limit, high_limit = _limits(dtype)
        for column, low, high in self._extremes():
            if low < low_limit or high > high_limit:
                value = low if low < low_limit else high
                raise DataError(
                    f"column '{column}' has the value {value}, and {dtype} goes from {low_limit} to {high_limit}; "
                    f"use a wider dtype for field '{self._spec.name}'"
                )

    def _check_scale(self, scale: FloatArray) -> None:
        for (column, low, high), sd in zip(self._extremes(), scale, strict=True):
            if not np.isfinite(sd):
                raise DataError(
                    f"column '{column}' goes from {low} to {high}, too far to be standardised in float64; rescale it"
                )
            if low == high:
                raise DataError(
                    f"column '{column}' is constant ({low}), so its sd is 0 and it cannot be standardised; "
                    f"leave it out of field '{self._spec.name}', or leave out :standardize"
                )
            if sd == 0:  # whose square is no float64
                raise DataError(
                    f"column '{column}' goes from {low} to {high}, too little to be standardised in float64; rescale it"
                )


class CategoryEncoder:
    """Any values as integer codes, in the sorted order of the values seen."""

    def __init__(self, spec: FieldSpec) -> None:
        self._spec = spec
        self._codes: dict[Any, int] = {}

    @property
    def encoded(self) -> np.dtype[Any]:
        """The dtype of codes in order of appearance."""
        return np.dtype(np.int32)

    def encode(self, columns: Sequence[Any], out: NDArray[Any]) -> None:
        """Put the codes in order of appearance into `out`, int32 (rows,)."""
        encoded = columns[0].dictionary_encode()
        local = [self._codes.setdefault(value, len(self._codes)) for value in encoded.dictionary.to_pylist()]
        indices: NDArray[np.int32] = encoded.indices.to_numpy(zero_copy_only=False)
        out[:] = np.asarray(local, dtype=np.int32)[indices]

    def merge(self, other: Self) -> None:
        """Take in the values of rows that follow."""
        for value in other._codes:
            self._codes.setdefault(value, len(self._codes))

    def codes_of(self, other: "CategoryEncoder") -> NDArray[np.int32]:
        """Return, by the code of another encoder that was merged into this one, the code here."""
        return np.array([self._codes[value] for value in other._codes], dtype=np.int32)

    def finish(self) -> tuple[Field, Transform]:
        """Return the field with its categories, and the map to codes in sorted order."""
        categories = sorted(self._codes)
        largest = len(categories) - 1
        fitting = [each for each in ("int8", "int16", "int32") if largest <= np.iinfo(each).max]
        dtype = np.dtype(self._spec.dtype or fitting[0])
        if largest > np.iinfo(dtype).max:
            raise DataError(
                f"field '{self._spec.name}' has {len(categories)} categories, and the codes of {dtype} end at "
                f"{np.iinfo(dtype).max}; use {fitting[0]}"
            )
        codes = np.empty(len(categories), dtype=dtype)
        codes[[self._codes[each] for each in categories]] = np.arange(len(categories), dtype=dtype)
        field = Field(self._spec.name, dtype.name, (), self._spec.columns, categories=tuple(categories))
        return field, Recode(codes)


def _limits(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    if dtype.kind == "f":
        return float(np.finfo(dtype).min), float(np.finfo(dtype).max)
    if dtype.kind == "b":
        return 0, 1
    # torch, which the rows go to, has no larger integers than int64.
    return int(np.iinfo(dtype).min), min(int(np.iinfo(dtype).max), int(np.iinfo(np.int64).max))


def resolve_spec(spec: FieldSpec, types: Mapping[str, Any], *, automatic: bool) -> FieldSpec:
    """Return the spec, made a category if it is text and was not named by the user.

    Parameters
    ----------
    spec
        What is wanted.
    types
        Arrow type by column.
    automatic
        Whether the field was not named, but made from a column because every column was wanted.

    Raises
    ------
    DataError
        When a column holds what cannot be a field: dates, nested values, or text that is not to be a category.
    """
    for name in spec.columns:
        kind = types[name]
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if text and automatic:
            return replace(spec, category=True)
        if text and not spec.category:
            raise DataError(f"column '{name}' is text; make it integer codes with {spec.name}={name}:category")
        if not number and not text:
            remedy = "leave it out by naming the fields wanted, or convert it"
            if pa.types.is_temporal(kind):
                remedy += " to a number first, such as an hour or days since a date"
            raise DataError(
                f"column '{name}' has type {kind}, and only numbers, booleans and text can be used; {remedy}"
            )
    return spec


def encoder(spec: FieldSpec, types: Mapping[str, Any]) -> Encoder:
    """Return the encoder of a resolved spec, whose columns have the given Arrow types."""
    return CategoryEncoder(spec) if spec.category else NumericEncoder(spec, types)
