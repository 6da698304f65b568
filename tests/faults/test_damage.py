"""Bytes that changed, or could not be written: an error that says so, and never a wrong number."""

import errno
import os
import random
import shutil

import interrupted
import pytest
from interrupted import CASES, after_passes, fields, told

import dadvi
from dadvi.checkpoint import decoded
from dadvi.errors import DataError, InputError, WorkError
from dadvi.sharding import open_shards, write_shards

FLIPS = 200


def flip(path, rng):
    """Flip a bit of a random byte of a file, in place."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_no_flipped_byte_of_the_data_is_read(tmp_path):
    small = {name: values[:40] for name, values in fields().items()}
    location = tmp_path / "data.zarr"
    written = write_shards(location, small, chunk_rows=10, shard_rows=20)
    shards = sorted(path for path in location.rglob("c/*") if path.is_file())
    assert shards
    rng = random.Random(0)
    for _ in range(FLIPS):
        shard = rng.choice(shards)
        before = shard.read_bytes()
        flip(shard, rng)
        with pytest.raises(DataError, match=r"shard \d, chunk \d"):  # noqa: PT012  any of the chunks may be hit
            opened = open_shards(location)
            for chunk in range(written.manifest.num_chunks):
                opened.read(chunk)
        shard.write_bytes(before)
    for chunk in range(written.manifest.num_chunks):
        open_shards(location).read(chunk)


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """Return the directory of a fit that was interrupted."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with after_passes(30), pytest.raises(KeyboardInterrupt):
        dadvi.fit(interrupted.model(), data, client="serial", run_dir=run, **CASES["anchor"])
    return run


def test_no_flipped_byte_of_a_checkpoint_is_read(stopped, tmp_path):
    rng, path = random.Random(1), tmp_path / "checkpoint"
    for _ in range(FLIPS):
        shutil.copy(stopped / "checkpoint", path)
        flip(path, rng)
        with pytest.raises(DataError, match="is damaged"):
            decoded(path.read_bytes(), "checkpoint")
    content = (stopped / "checkpoint").read_bytes()
    for length in (0, 1, 30, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="is damaged"):
            decoded(path.read_bytes(), "checkpoint")


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
