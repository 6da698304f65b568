"""A row that makes the log-likelihood nan is found, and told with its draw and the latents there."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import dadvi
from dadvi.binding import bind_to
from dadvi.executors import SerialExecutor
from dadvi.nonfinite import first_nonfinite


def log_likelihood(a, x):
    """Nan where x > a: a logarithm of a negative number."""
    return (a - x).log()


@pytest.fixture
def executor(write):
    x = np.linspace(-1.0, 0.0, 95)
    x[[23, 71]] = 0.75
    model = dadvi.Model({"a": Normal(3.0, 1.0)}, log_likelihood=log_likelihood)
    data = write({"x": x}, chunk_rows=10, shard_rows=30)
    return SerialExecutor(bind_to(model, data), data)


def test_the_first_such_row_is_told_with_draw_and_latents(executor):
    eta = torch.tensor([[2.0], [0.5], [1.0]], dtype=torch.float64)
    found = first_nonfinite(executor, eta)
    assert found.startswith("the log-likelihood of row 23 (shard 0, chunk 2) is nan at draw 1")
    assert found.endswith("where latents are {'a': [0.5]}")
    assert "row 71 (shard 2, chunk 7)" in first_nonfinite(executor, eta, range(3, 10))
    assert executor.rows_read <= 4 * executor.data.num_rows  # two passes each


def test_nothing_is_told_where_all_is_finite(executor):
    assert first_nonfinite(executor, torch.full((2, 1), 2.0, dtype=torch.float64)) == ""
    assert first_nonfinite(executor, torch.full((1, 1), 0.5, dtype=torch.float64), [0, 1, 9]) == ""


def test_a_gradient_that_is_not_finite_is_told_by_its_chunk(write):
    def root(a, x):
        return (a - x).abs().sqrt()  # infinitely steep at a = x

    model = dadvi.Model({"a": Normal(0.3, 1.0)}, log_likelihood=root)
    data = write({"x": np.linspace(1.0, 2.0, 40)}, chunk_rows=10)
    found = first_nonfinite(SerialExecutor(bind_to(model, data), data), torch.tensor([[0.3], [2.0]]).double())
    assert found.startswith("the gradient of the log-likelihood in shard 3, chunk 3 is not finite at draw 1")


def test_a_diverged_fit_tells_the_row(write):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1.0, 0.0, 2_000)
    x[1_234] = 2.99  # only at a below it, which the prior's mean is not, and the data push a to
    model = dadvi.Model({"a": Normal(3.0, 1.0)}, log_likelihood=lambda a, x: (a - x).log() - 9 * a)
    data = write({"x": x}, chunk_rows=100)
    method = dadvi.Anchored(subsample_rows=200)
    posterior = dadvi.fit(model, data, method=method, client="serial")
    assert posterior.status == "diverged"
    assert "the log-likelihood of row 1234 (shard 6, chunk 12) is nan at draw" in posterior.reason
