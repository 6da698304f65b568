"""Anchored minibatches: without bias whatever the anchor, without noise at it, and no worse than plain far from it."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import targets
import torch
from torch.distributions import Normal

import dadvi
from dadvi.binding import bind_to
from dadvi.control import Anchor, Control, Mixing
from dadvi.errors import InputError
from dadvi.executors import SerialExecutor
from dadvi.families import FullRank
from dadvi.iterates import Stretch
from dadvi.passes import Gradient
from dadvi.sharding import sampling

ROWS, CHUNK = 83, 10  # 9 chunks, the last of 3 rows


def executor_of(target, data):
    return SerialExecutor(bind_to(target.model(), data), data)


def points_about(target, num_draws, away=0.0, seed=0):
    """Return draws (K, D) of the mean-field optimum moved by so many of its sds, in alternating directions."""
    loc, sd = (torch.from_numpy(each) for each in target.optimum("mean_field"))
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((num_draws, len(loc))))
    return loc + sd * (noise + away * (-1.0) ** torch.arange(len(loc)))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a target and its data in chunks of 50 rows, 1 000 rows unless told; a warm start sees eight chunks."""
    return targets.writer(tmp_path_factory, 1_000, chunk_rows=50, shard_rows=200)


def run(target, data, family="mean_field", *, client="serial", tol=0.1, max_passes=60, seed=0, **settings):
    method = dadvi.ADVI(**{"subsample_rows": 200, "control_variate": "anchor", **settings})
    return dadvi.fit(
        target.model(), data, family=family, method=method, client=client, tol=tol, max_passes=max_passes, seed=seed
    )


def mean_error(posterior, target, family="mean_field"):
    loc, sd = target.optimum(family)
    return np.abs((posterior.unconstrained.loc.numpy() - loc) / sd).max()


# The estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", targets.CONJUGATE)
@pytest.mark.parametrize("coefficient", [0.0, 0.37, 1.0])
@pytest.mark.parametrize("num_chunks", [1, 2, 8])
def test_mean_over_all_batches_is_the_full_data_value_and_gradient(write, name, coefficient, num_chunks):
    # Over all sets of m chunks, one of them ragged: a term left out of a (G_S − G₀), or scaled by rows, would show.
    target = targets.CONJUGATE[name](num_rows=ROWS)
    data = write(target.fields, chunk_rows=CHUNK, shard_rows=3 * CHUNK)
    executor, eta = executor_of(target, data), points_about(target, 4)
    away = points_about(target, 1, away=2.0, seed=1)[0]
    control = Control(Anchor.at(executor, away, away), coefficient)
    whole = executor.run(Gradient(eta.numpy()))
    estimates = [
        control.estimate(executor.run(Gradient(control.points(eta)), batch), 9 / num_chunks)
        for batch in itertools.combinations(range(9), num_chunks)
    ]
    values, grads = (torch.stack(part).numpy() for part in zip(*estimates, strict=True))
    np.testing.assert_allclose(values.mean(0), whole.log_lik, rtol=1e-12)
    np.testing.assert_allclose(grads.mean(0), whole.grad, rtol=1e-11, atol=1e-11 * np.abs(whole.grad).max())
    assert np.ptp(values, axis=0).min() > 1e-9 * np.abs(values).max()  # the batches differ


def test_over_an_epoch_of_equal_batches_too(write):
    target = targets.poisson_gamma(num_rows=ROWS)
    data = write(target.fields, chunk_rows=CHUNK, shard_rows=3 * CHUNK)
    executor, eta = executor_of(target, data), points_about(target, 4)
    away = points_about(target, 1, away=2.0, seed=1)[0]
    control = Control(Anchor.at(executor, away, away), 0.6)
    whole = executor.run(Gradient(eta.numpy()))
    batches = sampling.batches(sampling.epoch_order(data.manifest, 0, 0), 3)
    estimates = [control.estimate(executor.run(Gradient(control.points(eta)), batch), 3.0) for batch in batches]
    values, grads = (torch.stack(part).mean(0).numpy() for part in zip(*estimates, strict=True))
    np.testing.assert_allclose(values, whole.log_lik, rtol=1e-12)
    np.testing.assert_allclose(grads, whole.grad, rtol=1e-11)


@pytest.mark.parametrize("name", targets.CONJUGATE)
def test_at_the_anchor_itself_there_is_no_noise(write, name):
    target = targets.CONJUGATE[name](num_rows=ROWS)
    data = write(target.fields, chunk_rows=CHUNK, shard_rows=3 * CHUNK)
    executor, eta = executor_of(target, data), points_about(target, 1, away=1.0)
    control = Control(Anchor.at(executor, eta[0], eta[0]))
    whole = executor.run(Gradient(eta.numpy()))
    scale = np.abs(whole.grad).max() + np.abs(whole.log_lik).max()
    for chunk in range(9):
        value, grad = control.estimate(executor.run(Gradient(control.points(eta)), [chunk]), 9.0)
        np.testing.assert_allclose(value, whole.log_lik, rtol=1e-12)
        np.testing.assert_allclose(grad, whole.grad, atol=1e-12 * scale)


# The coefficient -------------------------------------------------------------------------------------------------


def mixed(slope, num_steps=400, drift=0.0, noise=0.0, seed=0):
    """Return what is measured of g_b = slope·d_b + drift·b + noise, in three coordinates with deviations of sd 4."""
    rng = np.random.default_rng(seed)
    mixing = Mixing()
    for step in range(num_steps):
        deviation = torch.from_numpy(4.0 * rng.standard_normal(3))
        mixing = mixing.update(
            slope * deviation + drift * step + noise * torch.from_numpy(rng.standard_normal(3)), deviation
        )
    return mixing


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("num_steps", [20, 400])
def test_the_coefficient_is_the_slope_of_the_regression_while_the_search_moves(slope, num_steps):
    # A drift of 0.1 a step, as far as Adam goes: a running mean of 50 steps would lag by up to 5, more than the noise.
    error = 0.5 / (4 * math.sqrt(3 * min(num_steps, 50) / 2))
    expected = pytest.approx(slope, abs=4.5 * error)
    assert mixed(slope, num_steps, drift=0.1, noise=0.5).coefficient == expected
    assert mixed(slope, num_steps, drift=0.1).coefficient == pytest.approx(slope, abs=0.03)


def test_the_coefficient_is_clipped_and_begins_at_1():
    assert Mixing().coefficient == 1.0
    assert mixed(0.5, num_steps=1).coefficient == 1.0  # no two batches to compare
    assert mixed(-2.0).coefficient == 0.0
    assert mixed(3.0).coefficient == 1.0


def test_noise_is_the_sd_left_a_coordinate_by_any_coefficient():
    mixing = mixed(0.8, num_steps=2_000, drift=0.05, noise=0.5)
    for coefficient in (0.0, 0.5, 0.8, 1.0):
        expected = math.hypot(4 * (0.8 - coefficient), 0.5)
        assert mixing.noise(coefficient) == pytest.approx(expected, rel=4.5 / math.sqrt(2 * 3 * 50))
    assert Mixing().noise(1.0) == mixed(0.8, num_steps=1).noise(1.0) == 0.0


def test_a_batch_that_is_not_finite_does_not_count():
    mixing, one = mixed(0.5), torch.ones(3, dtype=torch.float64)
    for bad in (math.nan, math.inf):
        assert mixing.update(bad * one, one) is mixing
        assert mixing.update(one, bad * one) is mixing


def watched(executor, target, anchor, num_epochs=6):
    """Return (a, sd of plain, sd of anchored gradients) about the optimum, in its sds, over epochs of two chunks."""
    loc, sd = (torch.from_numpy(each) for each in target.optimum("mean_field"))
    control, manifest = Control(Anchor.at(executor, anchor, anchor)), executor.data.manifest
    plain, anchored = [], []
    for epoch in range(2 * num_epochs):
        for batch in sampling.batches(sampling.epoch_order(manifest, 0, epoch), 2):
            eta = points_about(target, 4, seed=len(plain))
            eta = torch.cat([eta, 2 * loc - eta])
            factor = manifest.num_chunks / len(batch)
            sums = executor.run(Gradient(control.points(eta)), batch)
            if epoch >= num_epochs:
                plain.append(sd * factor * torch.from_numpy(sums.grad[:-1]).mean(0))
                anchored.append(sd * control.estimate(sums, factor)[1].mean(0))
            before, control = control, control.observe(sums, factor, lambda grad: sd * grad)
            assert control.coefficient == before.coefficient  # an epoch has one
        control = control.end_epoch()
        assert control.coefficient == control.mixing.coefficient
    return control.coefficient, *(float(torch.stack(each).var(0).sum().sqrt()) for each in (plain, anchored))


@pytest.mark.parametrize("name", ["poisson_gamma", "linear_regression", "inverse_gamma_normal"])
def test_near_the_anchor_hardly_any_noise_is_left(written, name):
    target, data = written(name)
    anchor = torch.from_numpy(target.optimum("mean_field").loc)
    coefficient, plain, anchored = watched(executor_of(target, data), target, anchor)
    assert coefficient > 0.98
    assert anchored < 0.02 * plain


@pytest.mark.parametrize(("name", "away"), [("poisson_gamma", 60.0), ("linear_regression", 100.0)])
def test_a_stale_anchor_is_let_go(written, name, away):
    # There the rows' gradients are others: with a = 1 the noise would be more than ten times that of plain batches.
    target, data = written(name)
    executor, anchor = executor_of(target, data), points_about(target, 1, away=away)[0]
    coefficient, plain, anchored = watched(executor, target, anchor)
    assert coefficient < 0.1
    assert anchored < 1.05 * plain


def test_a_run_holds_the_coefficient_for_an_epoch_and_lets_a_stale_anchor_go(written, monkeypatch):
    target, data = written("linear_regression")
    at, estimate, used = Anchor.at, Control.estimate, []

    def stale(executor, eta, location):
        return at(executor, eta + 10 * (points_about(target, 1, away=10.0)[0] - eta), location)

    def keep(self, sums, factor):
        used.append(self.coefficient)
        return estimate(self, sums, factor)

    monkeypatch.setattr(Anchor, "at", stale)
    monkeypatch.setattr(Control, "estimate", keep)
    run(target, data, "full_rank", tol=100.0, max_passes=8)
    epochs = np.reshape(used, (-1, 20))
    assert (epochs == epochs[:, :1]).all()
    assert epochs[0, 0] == 1.0
    assert len(epochs) > 2
    assert epochs[1:].max() < 0.1


def test_deviations_are_measured_in_posterior_sds(write, monkeypatch):
    # Of posterior sds of 1e3 and 1e-3: a batch of one chunk in 20 has deviations of sd √(20 − 1) in each coordinate.
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1_000, 2)) * [1e-3, 1e3]
    data = write({"x": x, "y": x @ [2e3, 1e-2] + 30.0 * rng.standard_normal(1_000)}, chunk_rows=50)
    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(2), 1e6)}, likelihood=lambda beta, x: Normal(x @ beta, 30.0), observed="y"
    )
    seen, update = [], Mixing.update

    def keep(self, at_draws, deviation):
        seen.append(deviation.numpy())
        return update(self, at_draws, deviation)

    monkeypatch.setattr(Mixing, "update", keep)
    dadvi.fit(model, data, method=dadvi.ADVI(control_variate="anchor"), client="serial", max_passes=12)
    rms = np.sqrt(np.square(seen).mean(0))
    np.testing.assert_allclose(rms, math.sqrt(19), rtol=0.35)  # that of 20 chunks: ±16 %
    epochs = np.reshape(seen[: 20 * (len(seen) // 20)], (-1, 20, 2))
    assert np.abs(epochs.sum(1)).max() < 1e-9 * np.abs(seen).max()  # an epoch has every chunk once


# Moving the anchor -----------------------------------------------------------------------------------------------


def test_an_anchor_is_moved_where_noise_matters_and_the_average_is_nearer():
    control = Control(Anchor(torch.zeros(3), torch.zeros(3), 0.0, torch.zeros(3)), 1.0, mixed(1.0, noise=1.0))
    assert control.mixing.noise(1.0) == pytest.approx(1.0, rel=0.3)
    assert control.outdated(2.0, 1.0, steps=25, tol=0.1)  # 1/√25 = 0.2 sd
    assert not control.outdated(2.0, 1.0, steps=25, tol=0.4)
    assert not control.outdated(2.0, 1.0, steps=400, tol=0.1)
    assert not control.outdated(2.0, 1.2, steps=25, tol=0.1)


def test_the_distance_of_a_stretch_is_the_rms_over_its_iterates():
    rng, stretch = np.random.default_rng(0), Stretch()
    iterates, weights = 3.0 + rng.standard_normal((30, 2 * 4)), rng.integers(1, 4, 30)
    for iterate, weight in zip(iterates, weights, strict=True):
        stretch = stretch.add(int(weight), -1.0, iterate)
    point = rng.standard_normal(4)
    squares = np.square(iterates[:, :4] - point).mean(1)
    assert stretch.distance(point) == pytest.approx(math.sqrt(np.average(squares, weights=weights)), rel=1e-12)
    assert stretch.steps == 30


class Recording(SerialExecutor):
    """Keeps (label, rows, points) of every pass."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = []

    def run(self, work, chunks=None, *, check=False, label=""):
        before = self.rows_read
        sums = super().run(work, chunks, check=check, label=label)
        self.calls.append((label, self.rows_read - before, getattr(work, "points", None)))
        return sums


def recorded(written, max_passes, tol=1e-9, **settings):
    target, data = written("linear_regression")
    executor, rows = Recording(bind_to(target.model(), data), data), []
    method = dadvi.ADVI(**{"subsample_rows": 200, "control_variate": "anchor", **settings})
    fitted = method.fit(executor, FullRank(), tol=tol, max_passes=max_passes, seed=0, report=rows.append)
    return target, executor, fitted, rows


@pytest.mark.parametrize("max_passes", [5, 8, 11, 14, 30])
def test_every_pass_of_an_anchor_is_counted_and_none_is_too_many(written, max_passes):
    _, executor, fitted, _ = recorded(written, max_passes)
    labels = [label for label, _, _ in executor.calls]
    assert labels[:3] == ["curvature", "anchor", "step 1"]
    steps, anchors = sum(label.startswith("step") for label in labels), labels.count("anchor")
    moved = [row for row in fitted.trace if row.phase == "anchor"]
    assert len(moved) == anchors - 1
    # Eight chunks in S; curvature; 20 steps an epoch, one chunk each; anchors; and two for the certificate.
    assert fitted.passes == pytest.approx(0.4 + 1 + steps / 20 + anchors + 2, rel=1e-12)
    assert max_passes - 2 < fitted.passes <= max(max_passes, 5.4)
    assert fitted.trace[-1].rows_read == round(1_000 * fitted.passes)
    assert all(rows == 1_000 for label, rows, _ in executor.calls if label == "anchor")
    # An epoch follows every anchor: its pass is not spent on nothing.
    for index, label in enumerate(labels):
        assert label != "anchor" or labels[index + 1].startswith("step")


def test_anchors_are_at_the_warm_start_then_at_the_average(written):
    target, executor, fitted, _ = recorded(written, 30)
    anchors = [points[0] for label, _, points in executor.calls if label == "anchor"]
    assert 2 <= len(anchors) <= 6  # it stays where it serves
    loc, sd = target.optimum("full_rank")
    distance = [np.sqrt(np.square((anchor - loc) / sd).mean()) for anchor in anchors]
    assert distance[0] > 0.5
    assert distance[-1] < 0.1 * distance[0]
    steps = [points for label, _, points in executor.calls if label.startswith("step")]
    used = {tuple(points[-1]) for points in steps}
    assert used == {tuple(anchor) for anchor in anchors}
    assert all(points.shape == (8 + 1, 5) for points in steps)
    assert fitted.trace[-1].certificate < 0.05


def test_a_loose_tolerance_moves_no_anchor(written):
    _, executor, _, _ = recorded(written, 30, tol=0.5)
    assert [label for label, _, _ in executor.calls].count("anchor") == 1


@pytest.mark.parametrize(("log_lik", "grad"), [(-math.inf, 0.0), (0.0, math.nan)])
def test_an_anchor_that_is_not_finite_is_not_used(written, monkeypatch, log_lik, grad):
    # The steps are then those of plain minibatches. (The schedule must not depend on max_passes: the pass is lost.)
    target, data = written("poisson_gamma")
    plain = run(target, data, max_passes=6, control_variate="none", schedule="constant")
    at = Anchor.at

    def spoilt(*arguments):
        anchor = at(*arguments)
        return Anchor(anchor.eta, anchor.location, anchor.log_lik + log_lik, anchor.grad + grad)

    monkeypatch.setattr(Anchor, "at", spoilt)
    assert bits(run(target, data, max_passes=7, schedule="constant")) == bits(plain)


# Fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"), [*((name, "mean_field") for name in targets.CONJUGATE), ("linear_regression", "full_rank")]
)
def test_a_fit_ends_at_the_exact_optimum(written, name, family):
    target, data = written(name)
    posterior = run(target, data, family)
    assert posterior.status == "converged", posterior.reason
    assert mean_error(posterior, target, family) < 0.1
    assert np.abs(posterior.unconstrained.stddev.numpy() / target.optimum(family).sd - 1).max() < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"design": "random", "estimator": "stl"},
        {"optimizer": "proximal", "schedule": "constant"},
        {"averaging": "none", "schedule": "cosine", "max_passes": 40},
        {"batch_rows": 400},
    ],
    ids=str,
)
def test_other_settings_go_with_an_anchor(written, settings):
    target, data = written("inverse_gamma_normal")
    posterior = run(target, data, **settings)
    assert posterior.status == "converged", posterior.reason
    assert mean_error(posterior, target) < 0.1


@pytest.mark.parametrize("seed", range(2))
def test_after_as_many_passes_the_mean_is_nearer_than_without(written, seed):
    # 100 steps an epoch, each on a hundredth of the rows: plain gradients have noise of 10 posterior sds.
    target, data = written("linear_regression", 5_000)
    plain, anchored = (
        run(target, data, "full_rank", max_passes=12, tol=1e-9, seed=seed, batch_rows=50, control_variate=each)
        for each in ("none", "anchor")
    )
    assert anchored.passes <= plain.passes + 1e-9
    errors = [mean_error(each, target, "full_rank") for each in (plain, anchored)]
    assert errors[1] < 0.25 * errors[0]
    assert errors[1] < 0.05


def test_a_learning_rate_far_too_large_still_diverges_without_a_warning(written):
    target, data = written("linear_regression")
    posterior = run(target, data, optimizer="proximal", learning_rate=1e4)
    assert posterior.status == "diverged", posterior.reason
    assert posterior.unconstrained.loc.isfinite().all()


def test_one_chunk_is_enough(write):
    target = targets.normal_normal(num_rows=20)
    posterior = run(target, write(target.fields), max_passes=500)
    assert posterior.status == "converged", posterior.reason
    assert mean_error(posterior, target) < 0.1


def bits(posterior):
    return {name: value.numpy().tobytes() for name, value in posterior.unconstrained.params.items()}


def test_dask_gives_the_same_bits(written, thread_client, process_clients):
    target, data = written("linear_regression")
    fit = partial(run, target, data, "full_rank", max_passes=12, tol=1e-9, seed=5)
    serial, threads, processes = (fit(client=each) for each in ("serial", thread_client, process_clients(2)))
    assert (serial.trace.phase == "anchor").any()
    assert bits(serial) == bits(threads) == bits(processes)
    timeless = [column for column in serial.trace.columns if column not in targets.TIMES]
    assert serial.trace[timeless].equals(threads.trace[timeless])


def test_an_unknown_control_variate_is_refused():
    with pytest.raises(InputError, match=r"unknown control_variate 'svrg': use one of 'none', 'anchor'"):
        dadvi.ADVI(control_variate="svrg")
