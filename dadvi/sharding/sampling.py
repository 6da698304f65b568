"""Which chunks are read when: pure functions of the manifest, a seed and the number of the epoch.

A batch is a run of chunks of an epoch's order, so an order has to be random and, for the sake of balanced work, spread
over the shards.
"""

import numpy as np

from dadvi.errors import InputError
from dadvi.sharding.manifest import Manifest
from dadvi.types import IntArray, Purpose, random_stream

FEWEST_CHUNKS = 8
"""A sample of rows comes from at least so many chunks: from fewer it would say little of how chunks differ."""


def epoch_order(manifest: Manifest, seed: int, epoch: int) -> IntArray:
    """Return the order in which an epoch reads the chunks: each chunk once, shards evenly interleaved.

    A shard's n chunks, in random order, get the keys (j + u) / n for j = 0, ..., n - 1 with one uniform u a shard;
    sorted by key, any run of the order takes from each shard its share of chunks, to within one or two. A random
    rotation then makes the position of every chunk exactly uniform, so that the chunks of any batch are an unbiased
    sample.

    Parameters
    ----------
    manifest
        What is read.
    seed
        Seed of the fit.
    epoch
        Number of the epoch, 0 or more. Epochs have independent streams.

    Returns
    -------
    IntArray
        A permutation of the chunks, (C,).
    """
    rng = random_stream(seed, Purpose.EPOCH, epoch)
    chunks, keys = [], []
    for shard in range(manifest.num_shards):
        shuffled = rng.permutation(np.asarray(manifest.chunks(shard), dtype=np.int64))
        chunks.append(shuffled)
        keys.append((np.arange(len(shuffled)) + rng.random()) / len(shuffled))
    order = np.concatenate(chunks)[np.argsort(np.concatenate(keys), kind="stable")]
    return np.roll(order, rng.integers(manifest.num_chunks))


def batches(order: IntArray, chunks_per_batch: int) -> list[IntArray]:
    """Cut an order (C,) into ceil(C / m) batches of at most m = `chunks_per_batch` chunks, of sizes within 1.

    Raises
    ------
    InputError
        When m is less than 1.
    """
    if chunks_per_batch < 1:
        raise InputError(f"chunks_per_batch={chunks_per_batch} must be at least 1")
    return np.array_split(order, -(-len(order) // chunks_per_batch))


def subsample(
    manifest: Manifest, num_chunks: int, seed: int, step: int = 0, *, purpose: Purpose = Purpose.SUBSAMPLE
) -> IntArray:
    """Return `num_chunks` distinct chunks in increasing order, (num_chunks,), every such set being equally probable.

    A larger sample from the same stream holds the smaller ones.

    Parameters
    ----------
    manifest
        What is sampled.
    num_chunks
        How many chunks, 1 to C.
    seed, step, purpose
        Name the random stream.

    Raises
    ------
    InputError
        When there are not so many chunks.
    """
    if not 1 <= num_chunks <= manifest.num_chunks:
        raise InputError(
            f"num_chunks={num_chunks} must be from 1 to {manifest.num_chunks}, the number of chunks of the data"
        )
    chosen = random_stream(seed, purpose, step).permutation(manifest.num_chunks)[:num_chunks]
    return np.sort(chosen).astype(np.int64)


def chunks_for(manifest: Manifest, rows: int) -> int:
    """Return how many chunks hold about so many rows: `FEWEST_CHUNKS` at least, as far as there are."""
    return min(manifest.num_chunks, max(FEWEST_CHUNKS, round(rows / manifest.chunk_rows)))
