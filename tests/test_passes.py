"""Passes: sums over rows against hand computation and autograd, minibatches that add up to the whole, refusals."""

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr
from torch.distributions import Bernoulli, HalfNormal, Normal

import dadvi
from dadvi import summing
from dadvi.binding import bind_to
from dadvi.errors import DataError, InputError, ModelError
from dadvi.executors import SerialExecutor
from dadvi.passes import Gradient, GradientSums, HessianVector, LogLik, add, scale, tree_sum
from dadvi.sharding import sampling

ROWS = 43  # chunks of 8, the last of 3; shards of 2 chunks


def logistic_fields(dtype=np.float64):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, 3)).astype(dtype)
    return {"x": x, "y": rng.random(ROWS) < 0.4, "w": rng.uniform(0, 2, ROWS).astype(dtype)}


def logistic(weight="w"):
    return dadvi.Model(
        prior={"tau": HalfNormal(1.0), "b": lambda tau: Normal(torch.zeros(3), tau)},
        likelihood=lambda tau, b, x: Bernoulli(logits=x @ b * tau),  # not concave, and mixed second derivatives
        observed="y",
        weight=weight,
    )


@pytest.fixture
def executor(write):
    data = write(logistic_fields(), chunk_rows=8, shard_rows=16)
    assert data.manifest.chunk_sizes.tolist() == [8, 8, 8, 8, 8, 3]
    with SerialExecutor(bind_to(logistic(), data), data) as serial:
        yield serial


def points(num_draws=3, dim=4, seed=1):
    return np.random.default_rng(seed).standard_normal((num_draws, dim))


def all_rows(eta):
    """Return Σ_i w_i ℓ_i (K,) of the logistic model on all rows at η (K, D), by hand."""
    x, y, w = (torch.from_numpy(values) for values in logistic_fields().values())
    logits = eta[:, :1].exp() * (eta[:, 1:] @ x.T)
    return (w * torch.where(y, -torch.nn.functional.softplus(-logits), -torch.nn.functional.softplus(logits))).sum(1)


# --- the sums


def test_gradient_on_two_rows_by_hand(write):
    # ℓ = -½(y - μ)² - ½ log 2π: at μ = 0.5 with y = 1, 3 it is -0.125 - 3.125 - log 2π, and its gradient 0.5 + 2.5
    data = write({"y": np.array([1.0, 3.0])})
    model = dadvi.Model({"mu": Normal(0.0, 1.0)}, lambda mu: Normal(mu, 1.0), "y")
    sums = SerialExecutor(bind_to(model, data), data).run(Gradient(np.array([[0.5], [0.0]])))
    np.testing.assert_allclose(sums.log_lik, [-3.25 - np.log(2 * np.pi), -5.0 - np.log(2 * np.pi)], rtol=1e-14)
    np.testing.assert_allclose(sums.grad, [[3.0], [4.0]], rtol=1e-14)


def test_gradient_on_two_rows_through_the_bijection_by_hand(write):
    # Exponential rate λ = e^η: ℓ = η - λ y, dℓ/dη = 1 - λ y; y = 1, 2 at λ = 3: 2 log 3 - 9, gradient 2 - 9
    data = write({"y": np.array([1.0, 2.0])})
    model = dadvi.Model({"rate": HalfNormal(1.0)}, lambda rate: torch.distributions.Exponential(rate), "y")
    sums = SerialExecutor(bind_to(model, data), data).run(Gradient(np.array([[np.log(3.0)]])))
    np.testing.assert_allclose(sums.log_lik, [2 * np.log(3.0) - 9], rtol=1e-13)
    np.testing.assert_allclose(sums.grad, [[-7.0]], rtol=1e-13)


def test_gradient_against_autograd_on_all_rows(executor):
    eta = torch.from_numpy(points()).requires_grad_()
    value = all_rows(eta)
    (grad,) = torch.autograd.grad(value.sum(), eta)
    sums = executor.run(Gradient(points()))
    assert sums.log_lik.dtype == sums.grad.dtype == np.float64
    np.testing.assert_allclose(sums.log_lik, value.detach(), rtol=1e-12)
    np.testing.assert_allclose(sums.grad, grad, rtol=1e-11, atol=1e-12)
    np.testing.assert_array_equal(executor.run(LogLik(points())).log_lik, sums.log_lik)


@pytest.mark.parametrize("num_points", [1, 3])
@pytest.mark.parametrize("num_tangents", [1, 32, 33, 70])  # taken 32 at a time
def test_hessian_vector_products_against_the_hessian(executor, num_points, num_tangents):
    eta, tangents = points(num_points), points(num_tangents, seed=2)
    hessians = [
        torch.autograd.functional.hessian(lambda point: all_rows(point[None])[0], point)
        for point in torch.from_numpy(eta)
    ]
    expected = tangents @ torch.stack(hessians).mean(0).numpy()
    products = executor.run(HessianVector(eta, tangents)).products
    assert products.shape == (num_tangents, 4)
    np.testing.assert_allclose(products, expected, rtol=1e-10, atol=1e-10)


def test_likelihoods_linear_in_eta_or_free_of_it(write):
    data = write({"y": np.arange(5.0)}, chunk_rows=2, shard_rows=2)
    linear = dadvi.Model({"a": Normal(torch.zeros(2), 1.0)}, log_likelihood=lambda a, y: a[0] * y)
    constant = dadvi.Model({"a": Normal(torch.zeros(2), 1.0)}, lambda: Normal(0.0, 1.0), "y")
    unused = dadvi.Model({"a": Normal(torch.zeros(2), 1.0)}, log_likelihood=lambda a, y: -y)
    for model, grad in ((linear, [10.0, 0.0]), (constant, [0.0, 0.0]), (unused, [0.0, 0.0])):
        serial = SerialExecutor(bind_to(model, data), data)
        assert serial.run(Gradient(np.ones((2, 2)))).grad.tolist() == [grad] * 2
        assert not serial.run(HessianVector(np.ones((2, 2)), np.eye(2))).products.any()


@pytest.mark.parametrize(("rows_at_once", "calls"), [(1, [4, 4, 2]), (9, [8, 2]), (8_000, [10])])
def test_small_chunks_are_summed_together_up_to_a_number_of_rows(write, monkeypatch, rows_at_once, calls):
    seen = []

    def log_likelihood(a, y):
        seen.append(len(y))
        return -((y - a) ** 2)

    y = np.arange(10.0)
    data = write({"y": y}, chunk_rows=4, shard_rows=12)
    bound = bind_to(dadvi.Model({"a": Normal(0.0, 1.0)}, log_likelihood=log_likelihood), data)
    monkeypatch.setattr(summing, "ROWS_AT_ONCE", rows_at_once)
    seen.clear()
    sums = SerialExecutor(bound, data).run(Gradient(np.array([[2.0]])))
    assert seen == calls
    assert (sums.log_lik.item(), sums.grad.item()) == (-((y - 2) ** 2).sum(), 2 * (y - 2).sum())


def test_rows_with_large_likelihoods_are_not_summed_together(write):
    wide = write({"x": np.zeros((10, 2)), "y": np.zeros(10)}, chunk_rows=2, shard_rows=10)
    bound = bind_to(dadvi.Model({"a": Normal(0.0, 1.0)}, lambda a, x: Normal(a * x.sum(-1), 1.0), "y"), wide)
    assert summing.chunks_at_once(bound, wide.manifest) == summing.ROWS_AT_ONCE // 2
    assert summing.chunks_at_once(replace(bound, saved_bytes=2.0**22), wide.manifest) == 1


def test_rows_of_float32_are_summed_in_float64(write, monkeypatch):
    # 2²⁴ + 1 is not a float32: a sum kept in one, over rows or over chunks of one row, loses every row but the first
    y = np.ones(101, dtype=np.float32)
    y[0] = 2**24
    data = write({"y": y}, chunk_rows=1, shard_rows=20)
    monkeypatch.setattr(summing, "ROWS_AT_ONCE", 1)
    model = dadvi.Model({"a": Normal(0.0, 1.0)}, log_likelihood=lambda a, y: a * y)
    bound = bind_to(model, data)
    assert bound.dtype == torch.float32
    sums = SerialExecutor(bound, data).run(Gradient(np.ones((1, 1))))
    exact = 2**24 + 100
    assert sums.log_lik.item() == sums.grad.item() == exact
    assert float(y.cumsum(dtype=np.float32)[-1]) == 2**24
    # and log-likelihoods within a chunk; a gradient is summed there by the products that make it, in the rows' dtype
    batch = {"y": torch.tensor([2.0**24, 1.0, -(2.0**24)])}
    assert bound.log_lik(torch.ones(1, 1).double(), batch).item() == 1.0


def test_float32_rows_agree_with_float64_to_single_precision(write):
    single, exact = write(logistic_fields(np.float32), "single"), write(logistic_fields(), "exact")
    values = [SerialExecutor(bind_to(logistic(), data), data).run(Gradient(points())) for data in (single, exact)]
    np.testing.assert_allclose(values[0].log_lik, values[1].log_lik, rtol=1e-6)
    np.testing.assert_allclose(values[0].grad, values[1].grad, rtol=1e-5, atol=1e-5)


# --- reduction


def test_tree_sum_is_the_fixed_pairwise_tree():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 5, 6, 7, 8):
        parts = [
            GradientSums(a, b)
            for a, b in zip(rng.standard_normal((count, 2)), rng.standard_normal((count, 2, 3)), strict=True)
        ]

        def expected(first, last, level, parts=parts):
            """The tree by its definition: a node of level l spans 2ˡ leaves."""
            if last - first == 1:
                return parts[first]
            while 2 ** (level - 1) >= last - first:
                level -= 1
            middle = first + 2 ** (level - 1)
            left, right = expected(first, middle, level), expected(middle, last, level)
            return GradientSums(*(a + b for a, b in zip(left, right, strict=True)))

        seen, tree = tree_sum(parts), expected(0, count, 3)
        assert isinstance(seen, GradientSums)
        assert all(np.array_equal(a, b) for a, b in zip(seen, tree, strict=True))
    big = [GradientSums(np.array([v]), np.zeros((1, 1))) for v in (1e16, 1.0, 1.0, -1e16)]
    assert tree_sum(big).log_lik == 0.0  # (1e16 + 1) + (1 - 1e16), and no other order
    with pytest.raises(InputError, match="no chunks"):
        tree_sum([])


def test_add_and_scale_keep_the_type_and_leave_their_arguments_alone():
    a = GradientSums(np.array([1.0]), np.array([[2.0]]))
    assert add(a, scale(a, 3.0)) == GradientSums(np.array([4.0]), np.array([[8.0]]))
    assert a == GradientSums(np.array([1.0]), np.array([[2.0]]))


# --- minibatches


@pytest.mark.parametrize("chunks_per_batch", [1, 2, 4, 6])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_mean_of_minibatch_gradients_over_an_epoch_is_the_full_gradient(executor, chunks_per_batch, epoch):
    work, manifest = Gradient(points()), executor.data.manifest
    full = executor.run(work)
    order = sampling.epoch_order(manifest, seed=5, epoch=epoch)
    total = scale(full, 0.0)
    for batch in sampling.batches(order, chunks_per_batch):
        estimate = scale(executor.run(work, batch), manifest.num_chunks / len(batch))  # scaled as a fit scales it
        total = add(total, scale(estimate, len(batch) / manifest.num_chunks))
    np.testing.assert_allclose(total.log_lik, full.log_lik, rtol=1e-12)
    np.testing.assert_allclose(total.grad, full.grad, rtol=1e-11, atol=1e-12)


def test_scaling_by_chunks_is_unbiased_and_scaling_by_rows_is_not(executor):
    work, manifest = Gradient(points(1)), executor.data.manifest
    full = executor.run(work)
    parts = [executor.run(work, [chunk]).grad for chunk in range(manifest.num_chunks)]
    sets = list(itertools.combinations(range(manifest.num_chunks), 2))
    by_chunks = np.mean([manifest.num_chunks / 2 * (parts[a] + parts[b]) for a, b in sets], axis=0)
    np.testing.assert_allclose(by_chunks, full.grad, rtol=1e-12)
    sizes = manifest.chunk_sizes
    by_rows = np.mean([ROWS / (sizes[a] + sizes[b]) * (parts[a] + parts[b]) for a, b in sets], axis=0)
    assert np.abs(by_rows / full.grad - 1).max() > 1e-3  # the ragged chunk


def test_each_chunk_is_an_equally_likely_first_batch(executor):
    # The estimate from the first batch of an epoch is unbiased over seeds: every chunk comes first equally often.
    manifest, num_seeds = executor.data.manifest, 3_000
    firsts = [int(sampling.epoch_order(manifest, seed, 0)[0]) for seed in range(num_seeds)]
    share = np.bincount(firsts, minlength=6) / num_seeds
    assert np.abs(share - 1 / 6).max() < 4.5 * np.sqrt(1 / 6 * 5 / 6 / num_seeds)


def test_rows_read_are_counted(executor):
    executor.run(LogLik(points()))
    assert executor.rows_read == ROWS
    executor.run(LogLik(points()), [5, 0])
    assert executor.rows_read == ROWS + 3 + 8


def test_order_of_chunks_asked_for_does_not_matter(executor):
    first, second = executor.run(Gradient(points()), [4, 0, 3]), executor.run(Gradient(points()), np.array([0, 3, 4]))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


# --- failures


def test_errors_name_pass_shard_chunk_and_rows(write):
    data = write({"group": np.repeat([0, 1, 2, 3], 8)}, chunk_rows=4, shard_rows=8)
    prior = {"u": Normal(torch.zeros(4), 1.0)}
    bound = bind_to(dadvi.Model(prior, log_likelihood=lambda u, group: u[group]), data)
    bad = bind_to(dadvi.Model(prior, log_likelihood=lambda u, group: u[group]), data)

    def fails_on_group_2(u, group):
        if (group == 2).any():
            raise ArithmeticError("not that one")
        return u[group]

    bad.model.row_function = fails_on_group_2
    assert SerialExecutor(bound, data).run(LogLik(np.zeros((1, 4)))).log_lik == 0.0
    with pytest.raises(ModelError) as caught:
        SerialExecutor(bad, data).run(LogLik(np.zeros((1, 4))), label="step 7")
    for part in ("step 7", "'log_lik'", "shard 2, chunk 4", "rows 16 to 19", "ArithmeticError: not that one"):
        assert part in str(caught.value)


@pytest.fixture
def with_nan(tmp_path):
    """A foreign Zarr group, whose values nobody has checked, with NaN in rows 13 and 14 (chunk 3)."""
    x = np.ones(20)
    x[13:15] = np.nan
    group = zarr.create_group(tmp_path / "foreign.zarr")
    group.create_array("x", data=x, chunks=(4,), shards=(8,))
    data = dadvi.open_shards(tmp_path / "foreign.zarr")
    assert not data.manifest.finite
    return data


def test_check_refuses_rows_that_are_not_finite(with_nan):
    model = dadvi.Model({"a": Normal(0.0, 1.0)}, lambda a: Normal(a, 1.0), "x")
    executor = SerialExecutor(bind_to(model, with_nan), with_nan)
    work = Gradient(np.zeros((1, 1)))
    with pytest.raises(DataError) as caught:
        executor.run(work, check=True, label="epoch 0")
    for part in ("epoch 0", "field 'x' has 2 rows", "not finite", "row 13 ", "shard 1, chunk 3"):
        assert part in str(caught.value)
    assert np.isfinite(executor.run(work, [0, 1, 2, 4], check=True).log_lik)
    assert np.isnan(executor.run(work).log_lik)


def test_check_refuses_values_outside_the_support(write):
    y = np.zeros(20, dtype=np.int64)
    y[11] = 2
    data = write({"y": y}, chunk_rows=4, shard_rows=8)
    model = dadvi.Model(
        {"p": dadvi.Flat((), torch.distributions.constraints.unit_interval)}, lambda p: Bernoulli(p), "y"
    )
    executor = SerialExecutor(bind_to(model, data), data)
    with pytest.raises(DataError, match=r"'y' has 1 rows outside the support of Bernoulli.* row 11 .*shard 1, chunk 2"):
        executor.run(LogLik(np.zeros((1, 1))), check=True)


def test_full_gradient_is_the_pass_over_all_rows(executor, with_nan):
    log_lik, grad = dadvi.full_gradient(
        executor.model.model, executor.data, torch.from_numpy(points()), client="serial"
    )
    sums = executor.run(Gradient(points()))
    assert np.array_equal(log_lik, sums.log_lik)
    assert np.array_equal(grad, sums.grad)
    one, _ = dadvi.full_gradient(executor.model.model, executor.data, torch.from_numpy(points()[0]))
    assert one.shape == (1,)
    with pytest.raises(InputError, match=r"\(2, 5\).*\(K, 4\)"):
        dadvi.full_gradient(executor.model.model, executor.data, torch.zeros(2, 5))
    model = dadvi.Model({"a": Normal(0.0, 1.0)}, lambda a: Normal(a, 1.0), "x")
    with pytest.raises(DataError, match="row 13 "):
        dadvi.full_gradient(model, with_nan, torch.zeros(1))


def test_a_code_beyond_a_latent_is_bad_input_and_named(write):
    """One row in the middle, which the check of the first and the last chunk does not see."""
    group = np.arange(40) % 3
    group[17] = 7
    data = write({"g": group, "y": np.zeros(40)}, chunk_rows=8, shard_rows=16)
    model = dadvi.Model({"u": Normal(torch.zeros(3), 1.0)}, lambda u, g: Normal(u[g], 1.0), "y")
    with pytest.raises(DataError, match=r"shard 1, chunk 2 \(rows 16 to 23\).*'g': '0 to 7'"):
        dadvi.full_gradient(model, data, model.start, client="serial")


def test_a_gradient_does_without_what_torch_imports_for_symbolic_shapes():
    program = """
import sys, torch, zarr, dadvi
from torch.distributions import Bernoulli, Normal
from dadvi.binding import bind_to
from dadvi.passes import Gradient, HessianVector
fields = {"x": torch.ones(50, 2).numpy(), "y": torch.ones(50).numpy()}
model = dadvi.Model({"b": Normal(torch.zeros(2), 1.0)}, lambda b, x: Bernoulli(logits=x @ b), observed="y")
data = dadvi.write_shards(zarr.storage.MemoryStore(), fields)
bound, point = bind_to(model, data), torch.zeros(1, 2).double().numpy()
Gradient(point).on_chunk(bound, data.read(0))
HessianVector(point, point + 1).on_chunk(bound, data.read(0))
print("sympy" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("False\n", "")
