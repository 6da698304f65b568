"""The front door, end to end: every optimiser and family ends at the optimum known in closed form, on every executor."""

from functools import partial

import numpy as np
import pytest
import targets
import torch
from torch.distributions import Bernoulli, Normal

import dadvi
from dadvi.errors import InputError, ModelError
from dadvi.optim import OPTIMIZERS

TOL = 0.05
"""What the fits are asked for. Means are to lie within it of the exact optimum, and sds within it as a fraction."""

CHUNK_ROWS, ROWS = 100, 2_000


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a target and its data on disk: 2 000 rows in 20 chunks, each chunk a minibatch."""
    cache = {}

    def write(name, num_rows=ROWS):
        if (name, num_rows) not in cache:
            target = targets.CONJUGATE[name](num_rows=num_rows)
            path = tmp_path_factory.mktemp(name) / "d.zarr"
            chunk_rows = num_rows * CHUNK_ROWS // ROWS
            cache[name, num_rows] = (
                target,
                dadvi.write_shards(path, target.fields, chunk_rows=chunk_rows, shard_rows=5 * chunk_rows),
            )
        return cache[name, num_rows]

    return write


def settings(**changes):
    """Return settings whose warm start sees four chunks of twenty: it is a few posterior sds away, with sds twice too wide."""
    return dadvi.ADVI(**{"subsample_rows": 400, **changes})


def errors(posterior, target, family):
    """Return the largest error of a mean, in sds of the family's optimum, and of an sd, as a fraction."""
    loc, sd = target.optimum(family)
    q = posterior.unconstrained
    return np.abs((q.loc.numpy() - loc) / sd).max(), np.abs(q.stddev.numpy() / sd - 1).max()


# Optimisers ------------------------------------------------------------------------------------------------------

CHOICES = {
    **{name: name for name in OPTIMIZERS},
    "NAdam": partial(torch.optim.NAdam, lr=0.05),
    "AdamW": partial(torch.optim.AdamW, lr=0.1, betas=(0.8, 0.99), weight_decay=0.0),
}


@pytest.mark.parametrize("name", targets.CONJUGATE)
@pytest.mark.parametrize("optimizer", CHOICES)
def test_every_optimizer_ends_at_the_exact_optimum(written, optimizer, name):
    target, data = written(name)
    family = "full_rank" if name == "linear_regression" else "mean_field"
    method = settings(optimizer=CHOICES[optimizer])
    posterior = dadvi.fit(target.model(), data, family=family, method=method, client="serial", tol=TOL, max_passes=100)
    mean_error, sd_error = errors(posterior, target, family)
    print(f"XX {optimizer} {name} {posterior.passes:.1f} {mean_error:.4f} {sd_error:.4f}")
    assert posterior.status == "converged", posterior.reason
    assert mean_error < TOL
    assert sd_error < TOL
