import numpy as np
import pytest

from dadvi.errors import InputError
from dadvi.sharding.manifest import Field, Manifest
from dadvi.sharding.sampling import batches, epoch_order, subsample


def manifest(num_chunks, chunks_per_shard):
    return Manifest(num_chunks * 10 - 3, {"x": Field("x", "float32")}, 10, 10 * chunks_per_shard, finite=True)


@pytest.mark.parametrize(("num_chunks", "chunks_per_shard"), [(1, 1), (7, 1), (7, 10), (23, 5), (64, 8)])
def test_an_epoch_reads_each_chunk_once(num_chunks, chunks_per_shard):
    order = epoch_order(manifest(num_chunks, chunks_per_shard), seed=0, epoch=3)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_chunks))


def test_order_is_a_function_of_seed_and_epoch():
    m = manifest(64, 8)
    assert np.array_equal(epoch_order(m, 1, 5), epoch_order(m, 1, 5))
    distinct = {tuple(epoch_order(m, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(distinct) == 9


def test_every_position_of_every_chunk_is_equally_probable():
    # 11 chunks in shards of 4, 4 and 3: the ragged shard is where a bias would be.
    m, epochs = manifest(11, 4), 4000
    counts = np.zeros((11, 11))
    for epoch in range(epochs):
        counts[np.arange(11), epoch_order(m, 0, epoch)] += 1
    expected = epochs / 11
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # A doubly stochastic table has 10 x 10 degrees of freedom; 4.5 sds of chi-squared above its mean.
    assert chi2 < 100 + 4.5 * np.sqrt(200)


def test_chunks_of_a_shard_come_in_random_order():
    # Of three chunks there are two orders up to rotation, which must be equally probable.
    epochs = 1000
    rotations = {(0, 1, 2), (1, 2, 0), (2, 0, 1)}
    forwards = sum(tuple(epoch_order(manifest(3, 3), 0, epoch).tolist()) in rotations for epoch in range(epochs))
    assert abs(forwards - epochs / 2) < 4.5 * np.sqrt(epochs / 4)


def test_every_run_takes_its_share_of_each_shard():
    m = manifest(96, 12)
    for epoch in range(20):
        for batch in batches(epoch_order(m, 0, epoch), 16):
            held = np.bincount(batch // 12, minlength=8)
            assert held.min() >= 1
            assert held.max() <= 3


@pytest.mark.parametrize(("total", "m"), [(1, 1), (10, 3), (10, 10), (10, 11), (128, 9)])
def test_batches_cut_the_order_evenly(total, m):
    order = np.random.default_rng(0).permutation(total)
    cut = batches(order, m)
    sizes = [len(batch) for batch in cut]
    assert np.array_equal(np.concatenate(cut), order)
    assert len(cut) == -(-total // m)
    assert max(sizes) <= m
    assert max(sizes) - min(sizes) <= 1


def test_a_batch_needs_a_chunk():
    with pytest.raises(InputError, match="chunks_per_batch=0"):
        batches(np.arange(3), 0)


def test_subsample_is_sorted_distinct_and_reproducible():
    m = manifest(50, 5)
    chosen = subsample(m, 20, seed=0, step=2)
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, subsample(m, 20, seed=0, step=2))
    assert not np.array_equal(chosen, subsample(m, 20, seed=0, step=3))


def test_subsample_includes_every_chunk_equally_often():
    m, draws = manifest(10, 3), 2000
    counts = sum(np.bincount(subsample(m, 4, 0, step), minlength=10) for step in range(draws))
    standard_error = np.sqrt(draws * 0.4 * 0.6)
    assert np.abs(counts - 0.4 * draws).max() < 4.5 * standard_error


@pytest.mark.parametrize("num_chunks", [0, 11])
def test_subsample_of_more_than_there_is_is_refused(num_chunks):
    with pytest.raises(InputError, match=f"num_chunks={num_chunks} must be from 1 to 10"):
        subsample(manifest(10, 3), num_chunks, 0)
