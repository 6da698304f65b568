"""The model of a worker's memory, and the budget that rests on it."""

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal

import dadvi
from dadvi.binding import bind_to
from dadvi.errors import InputError
from dadvi.executors import SerialExecutor
from dadvi.memory import Need, parse_budget, working_bytes
from dadvi.passes import Gradient
from dadvi.sharding import write_shards

MIB = 2**20


def problem(path, rows, columns, chunk_rows, width=None):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    data = write_shards(path, {"x": x, "y": rng.random(rows) < 0.5}, chunk_rows=chunk_rows, shard_rows=4 * chunk_rows)
    if width is None:
        prior = {"b": Normal(torch.zeros(columns), 1.0)}
        return bind_to(dadvi.Model(prior, lambda b, x: Bernoulli(logits=x @ b), observed="y"), data), data
    prior = {"w": Normal(torch.zeros(columns, width), 1.0), "v": Normal(torch.zeros(width), 1.0)}
    likelihood = lambda w, v, x: Bernoulli(logits=torch.tanh(x @ w) @ v)
    return bind_to(dadvi.Model(prior, likelihood, observed="y"), data), data


@pytest.mark.parametrize(("budget", "bytes_"), [("1 GiB", 2**30), ("1.5MB", 1_500_000), (4096, 4096), (None, None)])
def test_budgets_are_bytes_or_texts(budget, bytes_):
    assert parse_budget(budget) == bytes_


@pytest.mark.parametrize("budget", [0, -5, "0", "much", "", True, [1]])
def test_what_is_no_number_of_bytes_is_refused(budget):
    with pytest.raises(InputError, match=r"memory_budget=.*give bytes as a positive number"):
        parse_budget(budget)


def test_the_bytes_that_a_row_makes_are_measured_on_the_likelihood(tmp_path):
    narrow, _ = problem(tmp_path / "narrow", 400, 3, 100)
    wide, _ = problem(tmp_path / "wide", 400, 3, 100, width=50)
    # One float32 for each row and draw at least, and one for each hidden unit.
    assert 4 <= narrow.saved_bytes <= 64
    assert 4 * 50 <= wide.saved_bytes <= 4 * 50 * 4


@pytest.mark.parametrize(("columns", "width", "num_points"), [(50, None, 1), (50, None, 32), (5, 40, 8)])
def test_a_pass_stays_within_what_is_modelled(tmp_path, columns, width, num_points):
    """torch's own account of what it allocated, at its peak, against the model: not above, and not far below."""
    bound, data = problem(tmp_path / "data", 16_000, columns, 4_000, width)
    work = Gradient(np.zeros((num_points, bound.model.dim)))
    executor = SerialExecutor(bound, data, Need(budget=1))
    executor.run(work)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        executor.run(work)
    peak = live = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    chunks = 3 * 4_000 * (4 * columns + 1)  # read, summed, cast: mapped, torch does not see them
    modelled = working_bytes(bound, data.manifest, num_points, 0)
    assert peak <= modelled <= chunks + 20 * peak


def test_a_budget_below_what_a_pass_needs_is_refused_with_both_numbers(tmp_path):
    bound, data = problem(tmp_path / "data", 4_000, 50, 1_000)
    needed = working_bytes(bound, data.manifest, 8, 50)
    with pytest.raises(InputError, match=r"memory_budget=1000 is 0.98 kiB, and a worker needs .* MiB .* 1000 rows"):
        Need.of(bound, data.manifest, 8, 50, 1_000)
    with pytest.raises(InputError, match="memory_budget='1 kiB'"):
        dadvi.fit(bound.model, data, memory_budget="1 kiB")
    assert Need.of(bound, data.manifest, 8, 50, needed).room(0) == 0
    assert Need.of(bound, data.manifest, 8, 50, needed + 7).room(0) == 7


def test_without_a_budget_a_quarter_is_for_chunks_and_work():
    assert Need(working=10).room(400) == 90
    assert Need(working=500).room(400) == 0


def test_what_a_budget_leaves_keeps_chunks_and_the_result_is_the_same(tmp_path):
    bound, data = problem(tmp_path / "data", 4_000, 50, 1_000)
    chunk = 1_000 * (50 * 4 + 1)
    reads = []

    class Counted:
        manifest, decoding = data.manifest, 0.0

        def read(self, chunk, fields):
            reads.append(chunk)
            return data.read(chunk, fields)

    work = Gradient(np.zeros((2, 50)))
    expected = SerialExecutor(bound, data).run(work)
    executor = SerialExecutor(bound, Counted(), Need(working=100, budget=100 + 2 * chunk))
    for _ in range(2):
        for one, other in zip(executor.run(work), expected, strict=True):
            np.testing.assert_array_equal(one, other)
    assert sorted(reads) == [0, 1, 2, 2, 3, 3]
