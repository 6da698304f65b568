import numpy as np
import pytest

from dadvi.errors import DataError
from dadvi.sharding import runs as module
from dadvi.sharding.runs import BUCKETS, Room, RunReader, RunWriter, stable_argsort, stretches
from dadvi.types import Purpose, random_stream

SIZES = (3000, 0, 1, 2500)
DTYPES = {"i": np.dtype(np.int64), "x": np.dtype((np.float32, (2,))), "b": np.dtype(bool)}


def rows(start, stop):
    index = np.arange(start, stop, dtype=np.int64)
    return {"i": index, "x": np.stack([index, -index], axis=1).astype(np.float32), "b": index % 3 == 0}


def put(writer, start, stop):
    room = writer.append(stop - start)
    for name, values in rows(start, stop).items():
        room[name][:] = values


def write(directory, seed, run_bytes=2**20, block_rows=700):
    """Write units of the given sizes, and return the rows by bucket."""
    counts, first, room = 0, 0, Room()
    for unit, size in enumerate(SIZES):
        writer = RunWriter(directory, unit, seed, DTYPES, run_bytes, room)
        for start in range(first, first + size, block_rows):
            put(writer, start, min(start + block_rows, first + size))
        writer.flush()
        counts, first = counts + writer.counts, first + size
    return counts


def read(directory, counts, seed, shard_rows=600):
    readers = [RunReader(directory, each, DTYPES, shuffled=seed is not None) for each in stretches(counts, shard_rows)]
    return {
        name: [np.concatenate([block.copy() for block in reader.read(name)]) for reader in readers] for name in DTYPES
    }


def keys(seed):
    return np.concatenate(
        [random_stream(seed, Purpose.SHUFFLE, unit).bit_generator.random_raw(size) for unit, size in enumerate(SIZES)]
    )


@pytest.mark.parametrize("run_bytes", [1, 20_000, 2**20])
@pytest.mark.parametrize("shard_rows", [1, 600, 5501, 10_000])
def test_shards_are_cut_from_the_argsort_of_the_keys(tmp_path, monkeypatch, run_bytes, shard_rows):
    # A run is written in several pieces, the last one ragged, and a shard is read in several steps.
    monkeypatch.setattr(module, "PIECE_BYTES", 3_000)
    monkeypatch.setattr(module, "READ_BYTES", 1)
    if shard_rows == 1:
        shard_rows = 97
    shards = read(tmp_path, write(tmp_path, 7, run_bytes), 7, shard_rows)
    assert [len(each) for each in shards["i"][:-1]] == [shard_rows] * (len(shards["i"]) - 1)
    order = np.argsort(keys(7), kind="stable")
    everything = rows(0, sum(SIZES))
    for name, values in everything.items():
        found = np.concatenate(shards[name])
        assert found.dtype == values.dtype
        assert np.array_equal(found, values[order])


@pytest.mark.parametrize("run_bytes", [1, 2**20])
def test_without_a_seed_order_is_kept(tmp_path, monkeypatch, run_bytes):
    monkeypatch.setattr(module, "PIECE_BYTES", 3_000)
    monkeypatch.setattr(module, "READ_BYTES", 1)
    kept = read(tmp_path, write(tmp_path, None, run_bytes), None)
    for name, values in rows(0, sum(SIZES)).items():
        assert np.array_equal(np.concatenate(kept[name]), values)


@pytest.mark.parametrize("key", [0, 2**63 + 5, 2**64 - 1])
def test_rows_with_equal_keys_stay_in_order_of_arrival(tmp_path, monkeypatch, key):
    class ConstantKeys:
        bit_generator = type("", (), {"random_raw": staticmethod(lambda size: np.full(size, key, np.uint64))})

    monkeypatch.setattr(module, "random_stream", lambda *_: ConstantKeys)
    tied = read(tmp_path, write(tmp_path, 0, 20_000), 0)
    assert np.array_equal(np.concatenate(tied["i"]), np.arange(sum(SIZES)))


@pytest.mark.parametrize("distinct", [1, 7, 2**63])
def test_equal_keys_are_sorted_stably(distinct):
    tied = np.random.default_rng(0).integers(0, distinct, 5_000, np.uint64)
    assert np.array_equal(stable_argsort(tied), np.argsort(tied, kind="stable"))


def test_a_shard_reads_its_rows_and_at_most_a_bucket_at_either_end(tmp_path):
    counts = write(tmp_path, 3)
    assert counts.shape == (BUCKETS,)
    for each in stretches(counts, 600):
        reader = RunReader(tmp_path, each, DTYPES, shuffled=True)
        assert sum(len(piece) for step in reader._steps for piece in step.pieces) <= 600 + 2 * counts.max()


def test_a_unit_that_is_written_twice_counts_once(tmp_path):
    counts = write(tmp_path, 7, 20_000)
    once = read(tmp_path, counts, 7)
    write(tmp_path, 7, 20_000)
    (tmp_path / "00000000-000000.0123").write_bytes(b"half an attempt")
    again = read(tmp_path, counts, 7)
    assert all(np.array_equal(np.concatenate(once[name]), np.concatenate(again[name])) for name in DTYPES)


@pytest.mark.parametrize("seed", [7, None])
def test_a_run_that_is_missing_is_seen(tmp_path, seed):
    counts = write(tmp_path, seed)
    next(tmp_path.glob("00000003-*.run")).unlink()
    with pytest.raises(FileNotFoundError, match=r"of the 600 rows 3000 to 3599"):
        RunReader(tmp_path, stretches(counts, 600)[5], DTYPES, shuffled=seed is not None)


@pytest.mark.parametrize("seed", [7, None])
def test_a_run_that_is_cut_short_is_seen(tmp_path, seed):
    counts = write(tmp_path, seed)
    path = next(tmp_path.glob("00000003-*.run"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=r"00000003-000000.run ends before its rows do"):
        read(tmp_path, counts, seed)


def test_a_disk_that_cannot_take_rows_is_named(tmp_path):
    writer = RunWriter(tmp_path / "gone", 0, 0, DTYPES, 2**20, Room())
    put(writer, 0, 10)
    with pytest.raises(DataError, match=r"cannot spool rows to .*gone: .*No such file"):
        writer.flush()
