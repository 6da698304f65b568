"""Bytes that changed, or could not be written: an error that says so, and never a wrong number."""

import errno
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import interrupted
import pytest
import torch
from interrupted import CASES, after_passes, fields, told
from objects import BUCKET, system
from zarr.storage import ZipStore

import dadvi
from dadvi.checkpoint import decoded
from dadvi.errors import DataError, InputError, WorkError
from dadvi.sharding import ShardedDataset, open_shards, write_shards

FLIPS = 200

SHARD = re.compile(r"\w+/c/[\d/]+")
"""The name of a shard in a data set."""


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Return the content with a bit of a random byte changed."""
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


# Data sets, wherever they lie -----------------------------------------------------------------------------------------


class Files:
    """A data set, or a posterior, as the files of a directory."""

    def __init__(self, location: Path | str) -> None:
        self.location = location

    def names(self) -> list[str]:
        return sorted(str(file.relative_to(self.location)) for file in self.location.rglob("*") if file.is_file())

    def read(self, name: str) -> bytes:
        return (self.location / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        (self.location / name).write_bytes(content)

    @contextmanager
    def opened(self) -> Iterator[ShardedDataset]:
        yield open_shards(self.location)

    def flipped_in_turn(self, names: list[str], flips: int, rng: random.Random) -> Iterator[str]:
        """Yield random ones of some names, each while a bit of what it names is flipped."""
        for _ in range(flips):
            name = rng.choice(names)
            before = self.read(name)
            self.write(name, flipped(before, rng))
            yield name
            self.write(name, before)


class Objects(Files):
    """A data set as the objects below a URL."""

    def names(self) -> list[str]:
        root = self.location.removeprefix("s3://")
        return [name.removeprefix(f"{root}/") for name in system().find(root)]

    def read(self, name: str) -> bytes:
        return system().cat_file(f"{self.location}/{name}")

    def write(self, name: str, content: bytes) -> None:
        system().pipe_file(f"{self.location}/{name}", content)


class Members(Files):
    """A data set as the members of a Zip archive, as they lie there; and what else is in the archive."""

    def __init__(self, location: Path) -> None:
        super().__init__(location)
        self._spans: dict[str, slice] = {}
        content, end = location.read_bytes(), 0
        with zipfile.ZipFile(location) as archive:
            for member in archive.infolist():
                sizes = content[member.header_offset + 26 : member.header_offset + 30]  # of the name, and of extras
                start = member.header_offset + 30 + int.from_bytes(sizes[:2], "little")
                start += int.from_bytes(sizes[2:], "little")
                end = start + member.compress_size
                self._spans[f"header of {member.filename}"] = slice(member.header_offset, start)
                self._spans[member.filename] = slice(start, end)
        self._spans["directory of the archive"] = slice(end, len(content))

    def names(self) -> list[str]:
        return list(self._spans)

    def read(self, name: str) -> bytes:
        return self.location.read_bytes()[self._spans[name]]

    def write(self, name: str, content: bytes) -> None:
        archive = bytearray(self.location.read_bytes())
        archive[self._spans[name]] = content
        self.location.write_bytes(archive)

    @contextmanager
    def opened(self) -> Iterator[ShardedDataset]:
        store = ZipStore(self.location, mode="r")
        try:
            yield open_shards(store)
        finally:
            if store._is_open:
                store.close()


def stored(where: str, directory: Path, **options: str) -> Files:
    """Write a small data set, two shards of two chunks each for every field, and return it as what lies there."""
    small = {name: values[:40] for name, values in fields().items()}
    location = f"{BUCKET}/data.zarr" if where == "S3" else directory / "data.zarr"
    write_shards(location, small, chunk_rows=10, shard_rows=20, **options)
    if where.endswith("Zip"):
        # Stored or deflated, as zarr and most programs do. Some bits that end a deflated member mean nothing.
        method = zipfile.ZIP_STORED if where == "Zip" else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(directory / "packed.zip", "w", method) as archive:
            for file in sorted(path for path in location.rglob("*") if path.is_file()):
                archive.write(file, file.relative_to(location))
        return Members(directory / "packed.zip")
    return Objects(location) if where == "S3" else Files(location)


@pytest.fixture
def keep(request, tmp_path) -> Iterator[Callable[..., Files]]:
    """Write a data set somewhere: keep("Zip")."""

    def kept(where: str, **options: str) -> Files:
        if where == "S3":
            request.getfixturevalue("bucket")
        return stored(where, tmp_path, **options)

    return kept


def values_of(opened: ShardedDataset, *fields: str) -> list[dict[str, torch.Tensor]]:
    return [opened.read(chunk, fields or None) for chunk in range(opened.manifest.num_chunks)]


def assert_equal_data(opened: ShardedDataset, whole: ShardedDataset, values: list[dict[str, torch.Tensor]]) -> None:
    """Assert that a data set is the whole one, with these values: all that is known of it, to the bit."""
    assert (opened.manifest, opened.digest) == (whole.manifest, whole.digest)
    for found, expected in zip(values_of(opened), values, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)


@pytest.mark.parametrize(
    ("where", "compression", "flips"),
    [
        ("directory", None, FLIPS),
        ("directory", "zstd", FLIPS),
        ("Zip", None, 40),
        ("Zip", "zstd", 40),
        ("S3", None, 15),
    ],
)
def test_no_flipped_byte_of_the_data_is_read(keep, where, compression, flips):
    data, rng = keep(where, compression=compression), random.Random(0)
    shards = [name for name in data.names() if SHARD.fullmatch(name)]
    assert len(shards) == 6
    with data.opened() as whole:
        values = values_of(whole)
        for shard in data.flipped_in_turn(shards, flips, rng):
            field = shard.partition("/")[0]
            with data.opened() as opened, pytest.raises(DataError, match=rf"field '{field}', shard \d, chunk \d"):
                values_of(opened, field)
        with data.opened() as opened:
            assert_equal_data(opened, whole, values)


@pytest.mark.parametrize(
    ("where", "flips"), [("directory", FLIPS), ("Zip", FLIPS), ("deflated Zip", FLIPS), ("S3", 15)]
)
def test_no_flipped_byte_of_what_tells_of_the_data_makes_other_data_of_them(keep, where, flips):
    """JSON that nothing depends on may change without harm; a Zip archive has headers and a directory, too."""
    data, rng = keep(where), random.Random(1)
    told = [name for name in data.names() if where == "deflated Zip" or not SHARD.fullmatch(name)]
    assert {"zarr.json", "x/zarr.json", "group/zarr.json", "y/zarr.json"} <= set(told)
    refused = 0
    with data.opened() as whole:
        values = values_of(whole)
        for _ in data.flipped_in_turn(told, flips, rng):
            try:
                with data.opened() as opened:
                    assert_equal_data(opened, whole, values)
            except (DataError, WorkError):  # the latter where a flip names another compression, which has an OSError
                refused += 1
    assert refused > flips // 2


def test_no_flipped_bit_of_the_manifests_name_makes_the_data_anothers(keep):
    """Without a manifest they would be used as a group of unknown origin: without categories, or a check of rows."""
    data = keep("directory")
    before = data.read("zarr.json")
    start = before.index(b'"dadvi":') + 1
    for bit in range(8 * len("dadvi")):
        content = bytearray(before)
        content[start + bit // 8] ^= 1 << bit % 8
        data.write("zarr.json", content)
        with pytest.raises(DataError), data.opened():
            pass


# Posteriors -----------------------------------------------------------------------------------------------------------


def all_of(posterior):
    """Return all that is kept of a posterior, to the bit."""
    curvature = posterior.curvature.precision
    parts = (curvature.structure.dense, curvature.structure.groups, curvature.corner, curvature.cross, curvature.blocks)
    params = {name: value.numpy().tobytes() for name, value in posterior.unconstrained.params.items()}
    return params, [part.numpy().tobytes() for part in parts], repr(posterior._to_json())


def test_no_flipped_byte_of_a_posterior_makes_another_of_it(data, tmp_path):
    """An error, or the same."""
    fitted = dadvi.fit(interrupted.model("hierarchy"), data, client="serial", **CASES["hierarchy"])
    location, rng = tmp_path / "posterior.zarr", random.Random(2)
    fitted.save(location)
    files = Files(location)
    assert len(files.names()) > 10
    same = 0
    for name in files.flipped_in_turn(files.names(), FLIPS, rng):
        try:
            loaded = dadvi.load_posterior(location)
        except DataError as error:
            if str(location) not in str(error):
                raise
        else:
            assert Path(name).name == "zarr.json", f"{name} changed, and nobody noticed"
            assert all_of(loaded) == all_of(fitted)
            same += 1
    assert same < FLIPS // 4
    assert all_of(dadvi.load_posterior(location)) == all_of(fitted)


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """Return the directory of a fit that was interrupted."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with after_passes(30), pytest.raises(KeyboardInterrupt):
        dadvi.fit(interrupted.model(), data, client="serial", run_dir=run, **CASES["anchor"])
    return run


def test_no_flipped_byte_of_a_checkpoint_is_read(stopped):
    rng, content = random.Random(1), (stopped / "checkpoint").read_bytes()
    for _ in range(FLIPS):
        with pytest.raises(DataError, match="is damaged"):
            decoded(flipped(content, rng), "checkpoint")
    for length in (0, 1, 30, len(content) // 2, len(content) - 1):
        with pytest.raises(DataError, match="is damaged"):
            decoded(content[:length], "checkpoint")


def test_damaged_settings_are_refused(stopped, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    for content in ("", "{}", "[]", "\x00" * 10):
        (run / "settings.json").write_text(content)
        with pytest.raises(InputError, match=r"settings\.json cannot be read"):
            dadvi.resume(run, interrupted.model(), data, client="serial")


@pytest.mark.parametrize("case", ["adam", "surrogate"])
def test_a_full_disk_leaves_the_checkpoint_before(data, tmp_path, monkeypatch, case):
    run, real, written = tmp_path / "run", os.fsync, [0]
    expected = dadvi.fit(interrupted.model(case), data, client="serial", **CASES[case])

    def full(descriptor):
        written[0] += 1
        if written[0] > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkError, match=r"cannot write .*No space left on device.*resume"):
        dadvi.fit(interrupted.model(case), data, client="serial", run_dir=run, checkpoint_seconds=0.0, **CASES[case])
    monkeypatch.setattr(os, "fsync", real)
    assert not list(run.glob(".*"))
    assert decoded((run / "checkpoint").read_bytes(), "checkpoint")
    assert told(dadvi.resume(run, interrupted.model(case), data, client="serial")) == told(expected)
