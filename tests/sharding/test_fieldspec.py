import pytest

from dadvi.errors import DataError
from dadvi.sharding.fieldspec import FieldSpec, parse_specs


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("late", FieldSpec("late", ("late",))),
        ("y=late", FieldSpec("y", ("late",))),
        ("x=hour,distance:standardize:float32", FieldSpec("x", ("hour", "distance"), "float32", standardize=True)),
        ("carrier:category", FieldSpec("carrier", ("carrier",), category=True)),
        ("carrier:int16:category", FieldSpec("carrier", ("carrier",), "int16", category=True)),
        ("y=Arr Delay", FieldSpec("y", ("Arr Delay",))),
    ],
)
def test_a_text_describes_a_spec(text, spec):
    assert FieldSpec.parse(text) == spec


def test_one_text_or_a_list_of_texts_and_specs():
    wanted = (FieldSpec("a", ("a",)), FieldSpec("b", ("c",), category=True))
    assert parse_specs("a  b=c:category\n") == wanted
    assert parse_specs(["a", wanted[1]]) == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no fields"),
        ("=a", "'=a' is not a field"),
        ("x=", "'x=' is not a field"),
        ("x=a,,b", "'x=a,,b' is not a field"),
        ("x:log", "unknown modifier 'log'; there are category, standardize, and the dtypes float16"),
        ("x:float32:int8", "float32 and int8; give one"),
        ("x:category:standardize", "cannot be standardised"),
        ("x=a,b:category", "2 columns cannot share codes"),
        ("x:category:float32", "integers, not float32"),
        ("x:standardize:int32", "floats, not int32"),
        ("x y x", "'x' is named 2 times"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(DataError, match=message):
        parse_specs(text)


def test_a_spec_of_unknown_dtype_is_refused():
    with pytest.raises(DataError, match="complex64 is not one of float16"):
        FieldSpec("x", ("x",), "complex64")
