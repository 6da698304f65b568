"""Bayesian models on data too large for memory: data-subsampled ADVI on a Dask cluster, with a certificate."""

from importlib import metadata

from dadvi.advi import ADVI
from dadvi.anchored import Anchored
from dadvi.errors import ClusterError, DadviError, DataError, InputError, ModelError, WorkError
from dadvi.families import FullRank, LowRank, MeanField
from dadvi.fit import fit, full_gradient, resume
from dadvi.ingest import ingest
from dadvi.model import Model
from dadvi.optim import DoWG, PolynomialAveraging, ProximalEntropy, TailAveraging
from dadvi.posterior import Posterior, load_posterior
from dadvi.sharding import ShardedDataset, open_shards, write_shards
from dadvi.supports import Constrained, Flat, ordered

__version__ = metadata.version("dadvi")

__all__ = [
    "ADVI",
    "Anchored",
    "ClusterError",
    "Constrained",
    "DadviError",
    "DataError",
    "DoWG",
    "Flat",
    "FullRank",
    "InputError",
    "LowRank",
    "MeanField",
    "Model",
    "ModelError",
    "PolynomialAveraging",
    "Posterior",
    "ProximalEntropy",
    "ShardedDataset",
    "TailAveraging",
    "WorkError",
    "__version__",
    "fit",
    "full_gradient",
    "ingest",
    "load_posterior",
    "open_shards",
    "ordered",
    "resume",
    "write_shards",
]
