"""The front door, end to end: every optimiser and family ends at the exact optimum, with the same bits everywhere."""

import json
from functools import partial

import numpy as np
import pytest
import targets
import torch
from torch.distributions import Bernoulli, Normal

import dadvi
from dadvi.errors import InputError, ModelError
from dadvi.optim import OPTIMIZERS

TOL = 0.07
"""What the fits are asked for: means within it of the optimum, in posterior sds, and sds within it as a fraction."""

ROWS, CHUNK_ROWS = 2_000, 100


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a target and its data on disk: 2 000 rows in 20 chunks, each chunk a minibatch."""
    return targets.writer(tmp_path_factory, ROWS, chunk_rows=CHUNK_ROWS, shard_rows=5 * CHUNK_ROWS)


def settings(**changes):
    """Return settings whose warm start sees 4 of 20 chunks: its means are sds away, and its sds twice too wide."""
    return dadvi.ADVI(**{"subsample_rows": 4 * CHUNK_ROWS, **changes})


def errors(posterior, target, family):
    """Return the largest error of a mean, in sds of the posterior, and of an sd, as a fraction of the family's best."""
    q = posterior.unconstrained
    loc, best_sd = target.optimum(family)
    posterior_sd = target.optimum("full_rank").sd
    return np.abs((q.loc.numpy() - loc) / posterior_sd).max(), np.abs(q.stddev.numpy() / best_sd - 1).max()


def bits(posterior):
    return {name: value.numpy().tobytes() for name, value in posterior.unconstrained.params.items()}


def fit_and_check(written, name, family="mean_field", max_passes=100, client="serial", tol=TOL, **changes):
    target, data = written(name)
    posterior = dadvi.fit(
        target.model(), data, family=family, method=settings(**changes), client=client, tol=tol, max_passes=max_passes
    )
    mean_error, sd_error = errors(posterior, target, family)
    assert posterior.status == "converged", posterior.reason
    assert mean_error < tol
    assert sd_error < tol
    return posterior


# Optimisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", targets.CONJUGATE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_shipped_optimizer_ends_at_the_exact_optimum(written, optimizer, name):
    fit_and_check(written, name, "full_rank" if name == "linear_regression" else "mean_field", optimizer=optimizer)


@pytest.mark.parametrize(
    "optimizer",
    [
        {"optimizer": torch.optim.NAdam, "learning_rate": 0.1},
        {"optimizer": partial(torch.optim.AdamW, lr=0.1, betas=(0.8, 0.99), weight_decay=0.0)},
    ],
    ids=["class", "partial"],
)
def test_any_optimizer_of_torch_ends_there_too(written, optimizer):
    fit_and_check(written, "inverse_gamma_normal", **optimizer)


# Families --------------------------------------------------------------------------------------------------------


def test_full_rank_finds_the_covariance_and_the_log_evidence(written):
    posterior = fit_and_check(written, "linear_regression", "full_rank")
    target, _ = written("linear_regression")
    sd = np.sqrt(np.diag(target.covariance))
    found = posterior.unconstrained.covariance_matrix.numpy() / np.outer(sd, sd)
    np.testing.assert_allclose(found, target.covariance / np.outer(sd, sd), atol=2 * TOL)
    # Entropy in closed form: what is left of log π − log q at the posterior is the noise of −½ε² over 8 pairs of draws.
    assert abs(posterior.elbo - target.log_evidence) < 4 * np.sqrt(5 * 0.5 / 8)


def test_mean_field_finds_its_own_optimum_not_the_marginals(written):
    target, _ = written("linear_regression")
    narrow, true = target.optimum("mean_field").sd, target.optimum("full_rank").sd
    assert (narrow / true).max() < 0.6  # predictors correlated by 0.9: the marginals are far wider
    fit_and_check(written, "linear_regression", "mean_field")


def test_low_rank_of_rank_d_minus_1_finds_the_covariance(written):
    # Its sds are not in the certificate, so that they are as good as the run was long.
    target, data = written("linear_regression")
    posterior = dadvi.fit(
        target.model(), data, family=dadvi.LowRank(rank=4), method=settings(), client="serial", tol=1e-9, max_passes=50
    )
    mean_error, sd_error = errors(posterior, target, "low_rank")
    assert np.isnan(posterior.certificate.sd_error)
    assert mean_error < TOL
    assert sd_error < 0.15
    sd = np.sqrt(np.diag(target.covariance))
    found = posterior.unconstrained.covariance_matrix.numpy() / np.outer(sd, sd)
    np.testing.assert_allclose(found, target.covariance / np.outer(sd, sd), atol=0.2)


# Executors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "optimizer"), [("poisson_gamma", "adam"), ("normal_normal", "adagrad")])
def test_dask_ends_at_the_same_optimum_with_the_same_bits(written, thread_client, name, optimizer):
    serial, dask = (
        fit_and_check(written, name, client=client, optimizer=optimizer, tol=0.1)
        for client in ("serial", thread_client)
    )
    assert bits(serial) == bits(dask)
    assert (serial.elbo, serial.passes, serial.certificate) == (dask.elbo, dask.passes, dask.certificate)
    timeless = [column for column in serial.trace.columns if column not in targets.TIMES]
    assert serial.trace[timeless].equals(dask.trace[timeless])


def test_worker_processes_give_the_same_bits(written, process_clients):
    target, data = written("linear_regression")
    run = partial(dadvi.fit, target.model(), data, family="full_rank", method=settings(), max_passes=6, seed=5)
    assert bits(run(client="serial")) == bits(run(client=process_clients(2)))


def test_small_data_are_fitted_in_this_process_without_a_client(written):
    target, data = written("normal_normal")
    run = partial(dadvi.fit, target.model(), data, method=settings(), max_passes=4)
    assert bits(run()) == bits(run(client="serial"))


# Seeds -----------------------------------------------------------------------------------------------------------


def test_a_fit_is_a_function_of_the_seed(written):
    target, data = written("linear_regression")
    run = partial(dadvi.fit, target.model(), data, method=settings(), client="serial", max_passes=5)
    first, again, other = run(seed=1), run(seed=1), run(seed=2)
    assert bits(first) == bits(again)
    assert bits(first) != bits(other)
    assert bits(run()) == bits(run(seed=0))


def test_bits_do_not_depend_on_torchs_threads_or_global_state(written):
    target, data = written("linear_regression")
    run = partial(dadvi.fit, target.model(), data, family="full_rank", method=settings(), client="serial", max_passes=4)
    before, threads = bits(run()), torch.get_num_threads()
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002  the legacy state must not matter
    torch.set_num_threads(threads + 1)
    try:
        assert bits(run()) == before
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


# What comes back -------------------------------------------------------------------------------------------------


def test_posterior_tells_what_was_done(written, tmp_path):
    target, data = written("inverse_gamma_normal")
    posterior = dadvi.fit(
        target.model(), data, method=settings(), client="serial", max_passes=60, seed=3, run_dir=tmp_path / "run"
    )
    assert posterior.names == ("s", "m")
    # tol = 0.1 in η; the mean of s also moves with its sd.
    for name, (mean, sd) in target.posterior.items():
        row = posterior.summary().loc[name]
        assert abs(row["mean"] - mean) < 0.1 * sd
        assert abs(row["sd"] / sd - 1) < 0.1
    assert posterior.settings["seed"] == 3
    assert posterior.settings["data"]["num_rows"] == ROWS
    assert posterior.settings["method"]["optimizer"] == "adam"
    json.dumps(posterior.settings, allow_nan=False)
    loaded = dadvi.load_posterior(tmp_path / "run" / "posterior.zarr")
    assert bits(loaded) == bits(posterior)
    assert loaded.trace.equals(posterior.trace)
    assert json.loads((tmp_path / "run" / "settings.json").read_text()) == posterior.settings
    assert len((tmp_path / "run" / "trace.jsonl").read_text().splitlines()) == len(posterior.trace)


def test_dimensions_are_labelled_by_fields(write):
    rng = np.random.default_rng(0)
    fields = {"x": rng.standard_normal((60, 2)), "carrier": rng.integers(0, 3, 60), "y": rng.integers(0, 2, 60)}
    data = write(fields, categories={"carrier": ["AA", "B6", "UA"]}, chunk_rows=16)

    def model(**dims):
        return dadvi.Model(
            prior={"beta": Normal(torch.zeros(2), 1.0), "effect": Normal(torch.zeros(3), 1.0)},
            likelihood=lambda beta, effect, x, carrier: Bernoulli(logits=x @ beta + effect[carrier]),
            observed="y",
            dims=dims,
        )

    posterior = dadvi.fit(model(effect="carrier"), data, client="serial", max_passes=4)
    assert posterior.names == ("beta[0]", "beta[1]", "effect[AA]", "effect[B6]", "effect[UA]")
    for dims, seen in [
        ({"effect": "airline"}, r"'airline', which is not a field"),
        ({"beta": "carrier"}, r"2 elements along 'carrier'.*3 labels"),
        ({"beta": "x"}, r"'x', which has neither categories nor columns"),
    ]:
        with pytest.raises(ModelError, match=seen):
            dadvi.fit(model(**dims), data, client="serial")


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        ({"tol": 0.0}, r"tol=0\.0.*positive"),
        ({"tol": float("nan")}, r"tol=nan"),
        ({"max_passes": -1.0}, r"max_passes=-1\.0.*positive"),
        ({"max_passes": float("inf")}, r"max_passes=inf.*finite"),
        ({"seed": -1}, r"seed=-1.*at least 0"),
        ({"seed": 1.5}, r"seed=1\.5.*whole number"),
        ({"seed": True}, r"seed=True"),
        ({"method": "nuts"}, r"method='nuts'.*'auto'"),
        ({"family": "meanfield"}, r"'meanfield'.*'mean_field'"),
        ({"method": dadvi.ADVI(optimizer="proximal"), "family": "low_rank"}, r"entropy"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_with_the_remedy(written, setting, seen):
    target, data = written("normal_normal")
    with pytest.raises(InputError, match=seen):
        dadvi.fit(target.model(), data, client="serial", **setting)


def test_other_types_are_refused(written):
    target, data = written("normal_normal")
    with pytest.raises(ModelError, match=r"model is a dict.*dadvi\.Model"):
        dadvi.fit({}, data)
    with pytest.raises(InputError, match=r"data is a dict.*open_shards"):
        dadvi.fit(target.model(), dict(target.fields))
