"""What is wanted of a table, a field at a time: `NAME[=COLUMN,...][:MODIFIER...]`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import numpy as np

from dadvi.errors import DataError

DTYPES = (
    *("float16", "float32", "float64", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
MODIFIERS = ("category", "standardize")


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """A field to be made from columns of a table.

    Raises
    ------
    DataError
        When the parts contradict each other.
    """

    name: str
    """Name of the field."""
    columns: tuple[str, ...]
    """Columns it is made from: one gives scalars, (rows,); p > 1 are stacked, (rows, p)."""
    dtype: str | None = None
    """Dtype to store; None for that of the columns."""
    category: bool = False
    """Whether the values become integer codes."""
    standardize: bool = False
    """Whether each column is shifted and scaled to mean 0 and sd 1."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise DataError(f"field '{self.name}': dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        if self.category and self.standardize:
            raise DataError(f"field '{self.name}': codes of categories cannot be standardised; drop one of the two")
        if self.category and len(self.columns) > 1:
            raise DataError(
                f"field '{self.name}': {len(self.columns)} columns cannot share codes; make a field of each"
            )
        kind = None if self.dtype is None else np.dtype(self.dtype).kind
        if self.category and kind not in (None, "i", "u"):
            raise DataError(f"field '{self.name}': codes of categories are integers, not {self.dtype}; use int32")
        if self.standardize and kind not in (None, "f"):
            raise DataError(f"field '{self.name}': standardised values are floats, not {self.dtype}; use float32")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the spec that a text such as `x=hour,distance:standardize:float32` describes.

        Raises
        ------
        DataError
            When the text is not of the form `NAME[=COLUMN,...][:MODIFIER...]`.
        """
        body, *modifiers = text.split(":")
        name, equals, columns = body.partition("=")
        wanted = tuple(columns.split(",")) if equals else (name,)
        if "," in name:
            raise DataError(
                f"'{text}' is not a field; separate fields by spaces ('{name.replace(',', ' ')}'), or name what the "
                f"columns are stacked into (x={name})"
            )
        if not name or not all(wanted):
            raise DataError(
                f"'{text}' is not a field; write NAME, NAME=COLUMN or NAME=COLUMN,COLUMN, and then :MODIFIER if wanted"
            )
        dtypes = [each for each in modifiers if each in DTYPES]
        if unknown := [each for each in modifiers if each not in DTYPES + MODIFIERS]:
            raise DataError(
                f"'{text}' has the unknown modifier '{unknown[0]}'; "
                f"there are {', '.join(MODIFIERS)}, and the dtypes {', '.join(DTYPES)}"
            )
        if len(dtypes) > 1:
            raise DataError(f"'{text}' has the dtypes {' and '.join(dtypes)}; give one")
        return cls(name, wanted, next(iter(dtypes), None), "category" in modifiers, "standardize" in modifiers)


FieldSpecs: TypeAlias = str | Sequence[str | FieldSpec]
"""Specs in one text, separated by white space, or one by one."""


def parse_specs(fields: FieldSpecs) -> tuple[FieldSpec, ...]:
    """Return the specs. Raises DataError when there is none, one cannot be read, or two have the same name."""
    texts = fields.split() if isinstance(fields, str) else fields
    specs = tuple(each if isinstance(each, FieldSpec) else FieldSpec.parse(each) for each in texts)
    names = [each.name for each in specs]
    if not specs:
        raise DataError("no fields are named; name at least one, or leave `fields` out to take every column")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"field '{twice[0]}' is named {names.count(twice[0])} times; field names must be distinct")
    return specs
