from collections import Counter

import numpy as np
import pytest

from dadvi.errors import ClusterError
from dadvi.sharding.placement import place

WORKERS = ("a", "b", "c", "d", "e")


def cases():
    rng = np.random.default_rng(0)
    for _ in range(300):
        workers = [str(each) for each in rng.permutation(WORKERS)[: rng.integers(1, 6)]]
        shards = [int(each) for each in rng.permutation(30)[: rng.integers(0, 20)]]
        previous = {int(shard): str(rng.choice(WORKERS)) for shard in rng.permutation(30)[: rng.integers(0, 30)]}
        yield shards, workers, previous


def loads(placed, workers):
    counts = Counter(placed.values())
    return [counts[worker] for worker in workers]


def test_every_shard_gets_a_worker_and_loads_differ_by_at_most_one():
    for shards, workers, previous in cases():
        placed = place(shards, workers, previous)
        assert list(placed) == shards
        assert set(placed.values()) <= set(workers)
        assert max(loads(placed, workers)) - min(loads(placed, workers)) <= 1


def test_as_few_shards_move_as_balance_allows():
    for shards, workers, previous in cases():
        placed = place(shards, workers, previous)
        stayed = sum(placed[shard] == previous.get(shard) for shard in shards)
        # Whatever workers get the larger share, one keeps at most its share: the best choice is by what they hold.
        held = sorted((sum(previous.get(shard) == worker for shard in shards) for worker in workers), reverse=True)
        share, larger = divmod(len(shards), len(workers))
        most = sum(min(count, share + (rank < larger)) for rank, count in enumerate(held))
        assert stayed == most


def test_nothing_moves_when_nothing_changes():
    first = place(range(13), WORKERS, {})
    assert place(range(13), WORKERS, first) == first


def test_a_worker_that_left_gives_its_shards_away_and_no_other_moves():
    first = place(range(12), "abc", {})
    second = place(range(12), "ab", first)
    assert all(second[shard] == worker for shard, worker in first.items() if worker != "c")


def test_a_worker_that_joined_gets_its_share_and_no_more():
    first = place(range(12), "ab", {})
    second = place(range(12), "abc", first)
    moved = {shard for shard in first if first[shard] != second[shard]}
    assert {second[shard] for shard in moved} == {"c"}
    assert len(moved) == 4


def test_no_workers_are_refused():
    with pytest.raises(ClusterError, match="no workers for 3 shards"):
        place(range(3), [], {})
