"""Which worker reads which shard: a pure function, so that a shard meets the worker whose cache holds it."""

from collections.abc import Mapping, Sequence

from dadvi.errors import ClusterError


def place(shards: Sequence[int], workers: Sequence[str], previous: Mapping[int, str]) -> dict[int, str]:
    """Return the worker of each shard: loads differ by at most one, and as few shards as possible leave their worker.

    With S shards and W workers, S mod W workers have room for ceil(S / W) shards and the others for floor(S / W); the
    larger room goes to those that have most shards now. A worker keeps the first of its shards, up to its room; the
    rest, and the shards of workers that left, go to the least loaded workers. Ties fall to the order of the arguments.

    Parameters
    ----------
    shards
        Shards to place, distinct, (S,).
    workers
        Addresses of the workers there are, distinct, (W,).
    previous
        Worker of each shard before; may name workers that left, and shards that are not to be placed.

    Returns
    -------
    dict
        Worker by shard, in the order of `shards`.

    Raises
    ------
    ClusterError
        When there are no workers.
    """
    if not workers:
        raise ClusterError(f"no workers for {len(shards)} shards; start at least one")
    held: dict[str, list[int]] = {worker: [] for worker in workers}
    for shard in shards:
        if previous.get(shard) in held:
            held[previous[shard]].append(shard)

    share, larger = divmod(len(shards), len(workers))
    room = dict.fromkeys(workers, share)
    for worker in sorted(workers, key=lambda each: -len(held[each]))[:larger]:
        room[worker] += 1

    kept = {shard: worker for worker in workers for shard in held[worker][: room[worker]]}
    load = {worker: min(len(held[worker]), room[worker]) for worker in workers}
    placed = {}
    for shard in shards:
        if shard in kept:
            placed[shard] = kept[shard]
            continue
        open_workers = [worker for worker in workers if load[worker] < room[worker]]
        worker = min(open_workers, key=load.__getitem__)
        load[worker] += 1
        placed[shard] = worker
    return placed
