from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dadvi.errors import DataError


@contextmanager
def _refused(directory: Path, *parts: str) -> Iterator[None]:
    """Assert a DataError whose message has all the parts, and that the directory lists as before."""
    before = sorted(directory.rglob("*"))
    with pytest.raises(DataError) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)
    assert sorted(directory.rglob("*")) == before


@pytest.fixture
def refused(tmp_path):
    return lambda *parts: _refused(tmp_path, *parts)
