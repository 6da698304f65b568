"""The directory that all tests of bad input share, and that each has to leave as it was."""

from pathlib import Path

import pytest
from bad_files import write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A directory of files that are wrong in every way."""
    directory = tmp_path_factory.mktemp("bad")
    write_world(directory)
    return directory


@pytest.fixture
def here(world, monkeypatch) -> Path:
    """The same, where the test runs."""
    monkeypatch.chdir(world)
    return world
