"""Stochastic ADVI sees the data through minibatches: over an epoch its estimates add up to those of the full data."""

import numpy as np
import pytest
import targets
import torch

import dadvi
from dadvi.binding import bind_to
from dadvi.elbo import draw_noise, estimate, log_joint
from dadvi.executors import SerialExecutor
from dadvi.families import Gaussian, MeanField
from dadvi.passes import Gradient
from dadvi.sharding import sampling
from dadvi.structure import Structure
from dadvi.subsample import Subsample, warm_start

ROWS, CHUNK = 83, 10  # 9 chunks, the last of 3 rows


def steps_of(target, data, chunks_per_batch):
    """Return the ELBO estimates of the first epoch of a run that stands still: draws fixed, a step of 1e-12 sds."""
    rows = []
    method = dadvi.ADVI(
        batch_rows=chunks_per_batch * CHUNK,
        num_draws=4,
        optimizer="sgd",
        learning_rate=1e-12,
        fixed_draws=True,
        subsample_rows=ROWS,
    )
    dadvi.fit(target.model(), data, method=method, client="serial", max_passes=0.5, callbacks=[rows.append])
    steps = [row for row in rows if row.phase == "step"]
    assert len(steps) >= -(-9 // chunks_per_batch)
    return [row.elbo for row in steps[: -(-9 // chunks_per_batch)]]


@pytest.mark.parametrize("name", ["poisson_gamma", "inverse_gamma_normal"])
@pytest.mark.parametrize("chunks_per_batch", [1, 2, 4])
def test_mean_of_step_elbos_over_an_epoch_is_the_elbo_on_all_rows(write, name, chunks_per_batch):
    # Scaling by rows instead of chunks, no scaling, or a prior in every minibatch's sum would all show.
    target = targets.CONJUGATE[name](num_rows=ROWS)
    data = write(target.fields, chunk_rows=CHUNK, shard_rows=3 * CHUNK)
    (whole,) = steps_of(target, data, 9)
    parts = steps_of(target, data, chunks_per_batch)
    sizes = [len(batch) for batch in sampling.batches(sampling.epoch_order(data.manifest, 0, 0), chunks_per_batch)]
    assert np.average(parts, weights=sizes) == pytest.approx(whole, rel=1e-9)
    assert np.ptp(parts) > 1e-3 * abs(whole)  # the minibatches differ


def test_warm_start_on_all_rows_has_the_posterior_mean(write):
    # Unscaled on S: with S the whole data it is the posterior's. Antithetic draws make the mean of a quadratic exact.
    target = targets.linear_regression(num_rows=ROWS)
    data = write(target.fields, chunk_rows=CHUNK, shard_rows=3 * CHUNK)
    q = warm_start(Subsample.load(bind_to(target.model(), data), data, range(9)), Structure.full(5), seed=0)
    optimum = target.optimum("mean_field")
    np.testing.assert_allclose((q.loc.numpy() - optimum.loc) / optimum.sd, 0, atol=2e-2)


@pytest.mark.parametrize("name", targets.CONJUGATE)
def test_full_data_gradient_vanishes_at_the_optimum(write, name):
    # The whole chain (shards, pass, prior, log-det, entropy, pullback) at the optimum, by the designs that are exact
    # for a quadratic; Monte Carlo draws where log π is none.
    target = targets.CONJUGATE[name](num_rows=ROWS)
    data = write(target.fields, chunk_rows=CHUNK, shard_rows=3 * CHUNK)
    executor = SerialExecutor(bind_to(target.model(), data), data)
    loc, sd = (torch.from_numpy(each) for each in target.optimum("mean_field"))
    family, params = MeanField(), {"loc": loc, "log_scale": sd.log()}
    num_draws = 2 * len(loc) if target.gaussian else 4_000
    noise = draw_noise("orthogonal", num_draws, len(loc), np.random.default_rng(0), fixed=target.gaussian)
    eta = Gaussian(family, params).transform(noise)
    sums = executor.run(Gradient(eta.numpy()))
    value, grad = log_joint(executor.model.model, eta, torch.from_numpy(sums.log_lik), torch.from_numpy(sums.grad))
    est = estimate(family, params, noise, value, grad)
    if target.gaussian:
        tolerance = {"loc": 1e-10, "log_scale": 1e-10}
    else:
        tolerance = {
            "loc": 4.5 * (sd * grad).std(0) / num_draws**0.5,
            "log_scale": 4.5 * (sd * grad * noise).std(0) / num_draws**0.5,
        }
    assert ((sd * est.grad["loc"]).abs() <= tolerance["loc"]).all()
    assert (est.grad["log_scale"].abs() <= tolerance["log_scale"]).all()
    if not target.gaussian:
        assert est.elbo < target.log_evidence + 4.5 * float(value.std()) / num_draws**0.5
        assert est.elbo > target.log_evidence - 0.1  # a Gaussian comes near
