"""Data sets on Zarr: ingested or written, opened, read chunk by chunk, sampled and placed."""

from dadvi.sharding.manifest import Field, Manifest
from dadvi.sharding.reader import ShardedDataset, open_shards
from dadvi.sharding.writer import write_shards

__all__ = ["Field", "Manifest", "ShardedDataset", "open_shards", "write_shards"]
