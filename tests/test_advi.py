"""The stochastic solver: whatever the settings it ends at the optimum; what it reads on the way, and why it stops."""

import itertools
import json
import math
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import targets
import torch
from torch.distributions import Normal

import dadvi
from dadvi.binding import bind_to
from dadvi.errors import InputError
from dadvi.executors import SerialExecutor
from dadvi.families import FullRank, MeanField
from dadvi.optim import PolynomialAveraging, TailAveraging
from dadvi.posterior import TraceRow

ROWS, CHUNK_ROWS = 1_000, 50


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a target of 1 000 rows and its data in 20 chunks; a warm start sees four of them."""
    return targets.writer(tmp_path_factory, ROWS, chunk_rows=CHUNK_ROWS, shard_rows=4 * CHUNK_ROWS)


def run(target, data, family="mean_field", *, tol=0.1, max_passes=60, seed=0, callbacks=(), **settings):
    method = dadvi.ADVI(**{"subsample_rows": 4 * CHUNK_ROWS, **settings})
    return dadvi.fit(
        target.model(),
        data,
        family=family,
        method=method,
        client="serial",
        tol=tol,
        max_passes=max_passes,
        seed=seed,
        callbacks=callbacks,
    )


def errors(posterior, optimum):
    q = posterior.unconstrained
    return np.abs((q.loc.numpy() - optimum.loc) / optimum.sd).max(), np.abs(q.stddev.numpy() / optimum.sd - 1).max()


def assert_optimal(posterior, optimum, tol=0.1):
    mean_error, sd_error = errors(posterior, optimum)
    assert posterior.status == "converged", posterior.reason
    assert mean_error < tol
    assert sd_error < tol


# Every way to the optimum ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), [("poisson_gamma", "mean_field"), ("linear_regression", "full_rank")])
@pytest.mark.parametrize("estimator", ["closed_form", "stl", "monte_carlo"])
def test_every_estimator_ends_at_the_optimum(written, estimator, name, family):
    target, data = written(name)
    assert_optimal(run(target, data, family, estimator=estimator), target.optimum(family))


@pytest.mark.parametrize(
    ("draws", "tol"),
    [
        ({"design": "random"}, 0.1),
        ({"design": "random", "num_draws": 1}, 0.25),  # one draw a step says little of an sd
        ({"design": "antithetic", "num_draws": 2}, 0.1),
        ({"design": "orthogonal", "num_draws": 4}, 0.1),
    ],
    ids=str,
)
def test_every_design_of_draws_ends_at_the_optimum(written, draws, tol):
    target, data = written("poisson_gamma")
    assert_optimal(run(target, data, tol=tol, **draws), target.optimum("mean_field"), tol)


def test_fixed_orthogonal_draws_are_exact_on_a_gaussian(written):
    # 2D fixed draws with covariance exactly I: the ELBO of a quadratic has no noise of draws, and chunks leave the
    # scales' gradient as it is, because draws come in pairs. What is left of the sds' error is the optimiser's.
    target, data = written("linear_regression")
    posterior = run(
        target, data, design="orthogonal", num_draws=10, fixed_draws=True, schedule="cosine", averaging="polynomial"
    )
    mean_error, sd_error = errors(posterior, target.optimum("mean_field"))
    assert sd_error < 0.01
    assert mean_error < 0.1


def test_fixed_draws_stay_fixed(written):
    # The posterior's sd is then that of these draws: σ² mean(ε²) = 1/P, the same whatever the order of chunks.
    target, data = written("normal_normal")
    optimum = target.optimum("mean_field")
    found = {
        seed: float(
            run(target, data, seed=seed, num_draws=2, fixed_draws=True, tol=1e-9, max_passes=30).unconstrained.stddev
        )
        for seed in (0, 1)
    }
    for seed, sd in found.items():
        rng = dadvi.types.random_stream(seed, dadvi.types.Purpose.DRAWS, 0)
        noise = dadvi.elbo.draw_noise("antithetic", 2, 1, rng, fixed=True)
        assert sd == pytest.approx(float(optimum.sd[0]) / float(noise.square().mean().sqrt()), rel=0.02)


@pytest.mark.parametrize(
    "averaging",
    ["tail", "polynomial", "none", PolynomialAveraging(eta=3.0), TailAveraging()],
    ids=["tail", "polynomial", "none", "polynomial rule", "tail rule"],
)
def test_every_averaging_rule_ends_at_the_optimum(written, averaging):
    # Without an average the steps have to shrink to 0.
    target, data = written("poisson_gamma")
    schedule = "cosine" if averaging == "none" else "inverse_sqrt"
    posterior = run(target, data, max_passes=40, averaging=averaging, schedule=schedule, tol=0.1)
    assert_optimal(posterior, target.optimum("mean_field"))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "inverse_sqrt"])
def test_every_schedule_ends_at_the_optimum(written, schedule):
    target, data = written("poisson_gamma")
    assert_optimal(run(target, data, schedule=schedule), target.optimum("mean_field"))


# Any data --------------------------------------------------------------------------------------------------------


def test_weights_multiply_the_rows(write):
    # Whole weights are repeated rows, and a row of weight 0 is none: the closed form with Xᵀ W X.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, 2)) @ [[1.0, 0.6], [0.0, 0.8]]
    w = rng.integers(0, 4, ROWS)
    y = x @ [1.0, -2.0] + 0.5 * rng.standard_normal(ROWS)
    y[w == 0] += 100.0
    data = write({"x": x, "y": y, "w": w}, chunk_rows=CHUNK_ROWS)
    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(2), 1.0)},
        likelihood=lambda beta, x: Normal(x @ beta, 0.5),
        observed="y",
        weight="w",
    )
    precision = (x.T * w) @ x / 0.25 + np.eye(2)
    mean = np.linalg.solve(precision, (x.T * w) @ y / 0.25)
    posterior = dadvi.fit(
        model, data, family="full_rank", method=dadvi.ADVI(subsample_rows=200), client="serial", max_passes=60
    )
    assert_optimal(posterior, targets.Optimum(mean, np.sqrt(np.diag(np.linalg.inv(precision)))))


def test_float32_rows_end_at_the_same_optimum(write):
    target = targets.linear_regression(num_rows=ROWS)
    rows = {name: values.astype(np.float32) for name, values in target.fields.items()}
    data = write(rows, chunk_rows=CHUNK_ROWS, shard_rows=200)
    assert_optimal(run(target, data, "full_rank"), target.optimum("full_rank"))


@pytest.mark.parametrize("num_rows", [1, 2, 60])
def test_one_chunk_is_enough(write, num_rows):
    target = targets.normal_normal(num_rows=num_rows)
    data = write(target.fields)
    assert data.manifest.num_chunks == 1
    assert_optimal(run(target, data, max_passes=500), target.optimum("mean_field"))


@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
def test_posterior_sds_of_any_size_are_found_untuned(write, family):
    # Predictors in thousandths and thousands, a noise of 30: posterior sds of 1e3 and 1e-3 under prior sds of 1e6.
    rng = np.random.default_rng(1)
    x = rng.standard_normal((ROWS, 2)) * [1e-3, 1e3]
    y = x @ [2e3, 1e-2] + 30.0 * rng.standard_normal(ROWS)
    data = write({"x": x, "y": y}, chunk_rows=CHUNK_ROWS)
    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(2), 1e6)}, likelihood=lambda beta, x: Normal(x @ beta, 30.0), observed="y"
    )
    precision = x.T @ x / 900 + np.eye(2) / 1e12
    mean, covariance = np.linalg.solve(precision, x.T @ y / 900), np.linalg.inv(precision)
    sd = np.sqrt(np.diag(covariance)) if family == "full_rank" else np.diag(precision) ** -0.5
    assert sd[0] > 900
    assert sd[1] < 1.1e-3
    posterior = dadvi.fit(
        model, data, family=family, method=dadvi.ADVI(subsample_rows=200), client="serial", max_passes=80
    )
    assert_optimal(posterior, targets.Optimum(mean, sd))


def test_a_parameter_the_data_do_not_speak_of_keeps_its_prior(write):
    x = np.random.default_rng(2).normal(0.0, 1.0, 400)
    model = dadvi.Model(
        prior={"mu": Normal(torch.tensor(0.0), 10.0), "idle": Normal(torch.tensor(-3.0), 0.25)},
        likelihood=lambda mu: Normal(mu, 1.0),
        observed="x",
    )
    posterior = dadvi.fit(model, write({"x": x}, chunk_rows=20), client="serial", max_passes=80)
    precision = 400 + 1 / 100
    assert_optimal(posterior, targets.Optimum(np.array([x.sum() / precision, -3.0]), np.array([precision**-0.5, 0.25])))


# How it ends -----------------------------------------------------------------------------------------------------


def test_converged_means_certified(written):
    target, data = written("inverse_gamma_normal")
    for tol, max_passes in [(0.2, 60), (0.02, 15)]:
        posterior = run(target, data, tol=tol, max_passes=max_passes)
        assert (posterior.status == "converged") == posterior.certificate.within(tol)
        last = posterior.trace.iloc[-1]
        assert last["phase"] == "certificate"
        assert last["certificate"] == posterior.certificate.max
        assert last["elbo"] == posterior.elbo
        mean_error, _ = errors(posterior, target.optimum("mean_field"))
        assert mean_error < posterior.certificate.max + 0.05  # noise of the certificate's draws


def test_out_of_passes_means_stopped(written):
    target, data = written("linear_regression")
    posterior = run(target, data, tol=1e-6, max_passes=8)
    assert posterior.status == "stopped"
    assert posterior.reason == "max_passes=8 reached, before its average settled"
    assert posterior.certificate.max > 1e-6
    assert 6 < posterior.passes <= 8


@pytest.mark.parametrize(
    ("optimizer", "family"),
    [
        *itertools.product(["adam", "sgd", "rmsprop", "adagrad"], ["mean_field", "full_rank", "low_rank"]),
        ("proximal", "mean_field"),
        ("proximal", "full_rank"),
    ],
)
def test_a_learning_rate_far_too_large_diverges_and_leaves_the_last_good_state(written, optimizer, family):
    target, data = written("linear_regression")
    posterior = run(target, data, family, optimizer=optimizer, learning_rate=1e4)
    assert posterior.status == "diverged", posterior.reason
    q = posterior.unconstrained
    assert torch.isfinite(q.loc).all()
    assert torch.isfinite(q.stddev).all()
    assert (q.stddev > 0).all()
    assert posterior.certificate is None
    assert posterior.sample(3)["beta"].isfinite().all()


def test_an_elbo_that_falls_ends_the_run_at_the_average_before(written):
    # A rate at which steps double their error but stay finite for a while: what is kept is the state before the fall.
    target, data = written("normal_normal")
    posterior = run(target, data, optimizer="sgd", learning_rate=3.0)
    assert posterior.status == "diverged"
    start, _ = errors(
        run(target, data, optimizer="sgd", learning_rate=1e-12, max_passes=4), target.optimum("mean_field")
    )
    mean_error, _ = errors(posterior, target.optimum("mean_field"))
    assert mean_error <= start + 1e-6


# What it reads and tells -----------------------------------------------------------------------------------------


class Recording(SerialExecutor):
    """Keeps (label, chunks) of every pass."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = []

    def run(self, work, chunks=None, *, check=False, label=""):
        everything = range(self.data.manifest.num_chunks)
        self.calls.append((label, sorted(int(chunk) for chunk in (everything if chunks is None else chunks)), check))
        return super().run(work, chunks, check=check, label=label)


@pytest.fixture
def recorded(write):
    """A run over 103 rows in 7 ragged chunks, two chunks a step, all of them in the subsample."""
    target = targets.normal_normal(num_rows=103)
    data = write(target.fields, chunk_rows=16, shard_rows=32)
    executor = Recording(bind_to(target.model(), data), data)
    rows = []
    method = dadvi.ADVI(batch_rows=32, subsample_rows=48)
    fitted = method.fit(executor, MeanField(), tol=1e-9, max_passes=14, seed=4, report=rows.append)
    return executor, fitted, rows


def test_passes_are_rows_read_over_n_by_hand(recorded):
    executor, fitted, _ = recorded
    sizes = executor.data.manifest.chunk_sizes
    labels = [label for label, _, _ in executor.calls]
    steps = [chunks for label, chunks, _ in executor.calls if label.startswith("step")]
    assert labels[0] == "curvature"
    assert labels[-2:] == ["certificate", "curvature"]
    assert labels[1 : 1 + len(steps)] == [f"step {k}" for k in range(1, len(steps) + 1)]
    assert all(chunks == list(range(7)) for label, chunks, _ in executor.calls if not label.startswith("step"))
    # 4 batches an epoch, of sizes 2, 2, 2, 1. Three chunks of S, then curvature, epochs, a certificate of two passes.
    assert len(steps) % 4 == 0
    epochs = len(steps) // 4
    assert fitted.passes == pytest.approx(sizes.sum() / 103 + 1 + epochs + 2, rel=1e-12)
    assert 13 < fitted.passes <= 14
    assert fitted.trace[-1].rows_read == round(fitted.passes * 103)


def test_every_epoch_reads_every_chunk_once_in_an_order_of_its_own(recorded):
    executor, _, _ = recorded
    steps = [chunks for label, chunks, _ in executor.calls if label.startswith("step")]
    epochs = [steps[k : k + 4] for k in range(0, len(steps), 4)]
    for epoch in epochs:
        assert Counter(chunk for batch in epoch for chunk in batch) == Counter(range(7))
    assert len({str(epoch) for epoch in epochs}) > len(epochs) // 2  # two of so few chunks may happen to agree


def test_rows_are_checked_in_the_first_epoch_only(recorded):
    executor, _, _ = recorded
    checks = [check for label, _, check in executor.calls if label.startswith("step")]
    assert checks == [True] * 4 + [False] * (len(checks) - 4)


def test_reports_have_a_row_for_every_step_and_every_row_of_the_trace(recorded):
    _, fitted, rows = recorded
    steps = [row for row in rows if row.phase == "step"]
    assert [row.step for row in steps] == list(range(1, steps[-1].step + 1))
    assert [row for row in rows if row.phase != "step"] == list(fitted.trace)
    for before, after in itertools.pairwise(rows):
        assert before.rows_read <= after.rows_read
        assert before.seconds <= after.seconds
    assert all(row.passes == row.rows_read / 103 for row in rows)
    assert {row.phase for row in fitted.trace} == {"epochs", "certificate"}
    assert all(math.isfinite(row.elbo) for row in rows)


def test_callbacks_get_these_rows(written):
    target, data = written("normal_normal")
    first, second = [], []
    posterior = run(target, data, max_passes=6, callbacks=[first.append, second.append])
    assert first == second or repr(first) == repr(second)
    assert all(isinstance(row, TraceRow) for row in first)
    assert repr([row for row in first if row.phase != "step"]) == repr(list(posterior.records))
    assert list(posterior.trace.columns) == [each.name for each in fields(TraceRow)]
    assert len(posterior.trace) == len(posterior.records)


def test_elbo_of_a_step_is_an_unbiased_estimate_of_the_elbo(written):
    # With rates so small that θ stays where it is, the ELBO of steps averages to that of all the data: over whole
    # epochs the C/m scaling leaves no noise of sampling.
    target, data = written("normal_normal")
    rows = []
    posterior = run(
        target, data, optimizer="sgd", learning_rate=1e-12, tol=1e-9, max_passes=30, callbacks=[rows.append]
    )
    elbos = np.array([row.elbo for row in rows if row.phase == "step"])
    assert len(elbos) % 20 == 0
    q, (loc, sd) = posterior.unconstrained, target.optimum("mean_field")
    kl = torch.distributions.kl_divergence(
        Normal(q.loc, q.stddev), Normal(torch.from_numpy(loc), torch.from_numpy(sd))
    ).item()
    exact = target.log_evidence - kl
    # Of one step: log π at q's draws, less its mean over the 4 pairs that are drawn.
    ratio = float(q.stddev / sd[0])
    noise = ratio**2 * math.sqrt(0.5 / 4)
    assert abs(elbos.reshape(-1, 20).mean(1).mean() - exact) < 4.5 * noise / math.sqrt(len(elbos)) * 1.5


@pytest.mark.parametrize("subsample_rows", [1, ROWS])
def test_the_size_of_the_warm_start_changes_the_way_not_the_end(written, subsample_rows):
    target, data = written("poisson_gamma")
    posterior = run(target, data, FullRank(), subsample_rows=subsample_rows)
    assert_optimal(posterior, target.optimum("full_rank"))


# Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        ({"batch_rows": 0}, r"batch_rows=0"),
        ({"subsample_rows": -5}, r"subsample_rows=-5"),
        ({"num_draws": 0}, r"num_draws=0"),
        ({"num_draws": 3}, r"num_draws=3.*even"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0.*positive"),
        ({"learning_rate": float("nan")}, r"learning_rate=nan"),
        ({"optimizer": "sdg"}, r"'sdg'.*'sgd'"),
        ({"optimizer": torch.optim.LBFGS}, r"LBFGS"),
        ({"schedule": "linear"}, r"'linear'.*'cosine'"),
        ({"averaging": "ema"}, r"'ema'.*'tail'"),
        ({"estimator": "reinforce"}, r"'reinforce'.*'stl'"),
        ({"design": "sobol"}, r"'sobol'.*'orthogonal'"),
        ({"control_variate": "svrg"}, r"control_variate 'svrg'.*'none', 'anchor'"),
        ({"optimizer": "proximal", "estimator": "stl"}, r"estimator='stl'.*closed_form"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused_when_it_is_made(setting, seen):
    with pytest.raises(InputError, match=seen):
        dadvi.ADVI(**setting)


def test_settings_describe_themselves_as_json():
    described = dadvi.ADVI(optimizer=torch.optim.NAdam, averaging=PolynomialAveraging(3.0), batch_rows=512).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["batch_rows"] == 512
    assert "NAdam" in described["optimizer"]["object"]
    assert set(described) == {each.name for each in fields(dadvi.ADVI)}
