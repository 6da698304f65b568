import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from dadvi.errors import DataError
from dadvi.sharding import shuffle as module
from dadvi.sharding.shuffle import RowSpool
from dadvi.types import Purpose, random_stream

N = 5000
MIB = 2**20


def rows(num_rows=N):
    index = np.arange(num_rows, dtype=np.int64)
    return {"i": index, "x": np.stack([index, -index], axis=1).astype(np.float32), "b": index % 3 == 0}


def cut(block, edges):
    bounds = [0, *edges, len(block["i"])]
    return [{name: values[start:stop] for name, values in block.items()} for start, stop in pairwise(bounds)]


def through(blocks, seed, directory, **settings):
    with RowSpool(seed, directory=directory, **settings) as spool:
        for block in blocks:
            spool.append(block)
        pieces = list(spool.blocks())
        assert spool.num_rows == sum(len(piece["i"]) for piece in pieces)
    assert list(directory.iterdir()) == []
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


@pytest.mark.parametrize("memory_bytes", [1_800, 100_000, 2**28], ids=["two levels", "one level", "in memory"])
@pytest.mark.parametrize("edges", [(), (1, 2, 700, 700, 4999)], ids=["one block", "blocks"])
def test_order_is_the_argsort_of_the_keys(tmp_path, memory_bytes, edges):
    shuffled = through(cut(rows(), edges), 7, tmp_path, memory_bytes=memory_bytes)
    keys = random_stream(7, Purpose.SHUFFLE).bit_generator.random_raw(N)
    assert np.array_equal(shuffled["i"], np.argsort(keys, kind="stable"))


def test_rows_stay_together_and_keep_their_dtype(tmp_path):
    block = rows()
    shuffled = through([block], 0, tmp_path, memory_bytes=50_000)
    for name, values in block.items():
        assert shuffled[name].dtype == values.dtype
        assert np.array_equal(shuffled[name], values[shuffled["i"]])


def test_seeds_differ(tmp_path):
    first, second = (through([rows()], seed, tmp_path)["i"] for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("memory_bytes", [4_000, 2**28])
def test_without_a_seed_order_is_kept(tmp_path, memory_bytes):
    kept = through(cut(rows(), (10, 4000)), None, tmp_path, memory_bytes=memory_bytes)
    assert all(np.array_equal(kept[name], values) for name, values in rows().items())


def test_rows_with_equal_keys_stay_in_order_of_arrival(tmp_path, monkeypatch):
    class ConstantKeys:
        bit_generator = type("", (), {"random_raw": staticmethod(lambda size: np.full(size, 2**63 + 5, np.uint64))})

    monkeypatch.setattr(module, "random_stream", lambda seed, purpose: ConstantKeys)
    tied = through([rows()], 0, tmp_path, memory_bytes=4_000)
    assert np.array_equal(tied["i"], np.arange(N))


def test_an_empty_spool_yields_nothing(tmp_path):
    with RowSpool(0, directory=tmp_path) as spool:
        spool.append(rows(0))
        assert [len(block["i"]) for block in spool.blocks() if len(block["i"])] == []


@pytest.mark.parametrize("seed", [0, None])
def test_memory_is_bounded_out_of_core(tmp_path, seed):
    budget, block_rows, num_blocks = 16 * MIB, 8192, 128
    rng = np.random.default_rng(0)
    block = {"i": np.arange(block_rows), "x": rng.standard_normal((block_rows, 24)).astype(np.float32)}
    total = num_blocks * sum(values.nbytes for values in block.values())
    assert total > 100 * MIB
    tracemalloc.start()
    try:
        with RowSpool(seed, memory_bytes=budget, directory=tmp_path) as spool:
            for _ in range(num_blocks):
                spool.append(block)
            num_rows = sum(len(piece["i"]) for piece in spool.blocks())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_rows == num_blocks * block_rows
    assert peak < budget


def test_a_failure_leaves_nothing_on_the_disk(tmp_path):
    def fail_with_rows_on_disk():
        with RowSpool(0, memory_bytes=4_000, directory=tmp_path) as spool:
            spool.append(rows())
            assert list(tmp_path.iterdir())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_with_rows_on_disk()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_take_rows_is_named(tmp_path, monkeypatch):
    def full(_path, _records):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_append_to", full)
    with RowSpool(0, memory_bytes=4_000, directory=tmp_path) as spool, pytest.raises(DataError, match="No space left"):
        spool.append(rows())
