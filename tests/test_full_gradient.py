"""One pass by hand: the sums are those of autograd over all rows at once, and prior and log-det are not in them."""

import numpy as np
import pytest
import torch
from torch.distributions import HalfNormal, Normal, Poisson

import dadvi
from dadvi.errors import InputError

ROWS, P = 57, 3


@pytest.fixture
def fields():
    rng = np.random.default_rng(0)
    x = 0.3 * rng.standard_normal((ROWS, P))
    return {"x": x, "y": rng.poisson(2.0, ROWS), "w": rng.uniform(0.0, 2.0, ROWS)}


@pytest.fixture
def data(write, fields):
    return write(fields, chunk_rows=8, shard_rows=16)  # ragged: the last chunk has one row


@pytest.fixture
def model():
    return dadvi.Model(
        prior={"tau": HalfNormal(torch.tensor(1.0)), "beta": lambda tau: Normal(torch.zeros(P), tau)},
        likelihood=lambda beta, tau, x: Poisson((x @ beta + tau).exp()),
        observed="y",
        weight="w",
    )


def by_autograd(fields, eta):
    """Σ_i w_i log Poisson(y_i; exp(x_i·β + τ)) and its gradient in η = (log τ, β), one point."""
    eta = eta.clone().requires_grad_()
    rate = (torch.from_numpy(fields["x"]) @ eta[1:] + eta[0].exp()).exp()
    log_lik = Poisson(rate, validate_args=False).log_prob(torch.from_numpy(fields["y"]).double())
    value = (torch.from_numpy(fields["w"]) * log_lik).sum()
    return value.detach(), torch.autograd.grad(value, eta)[0]


@pytest.mark.parametrize("num_points", [1, 3])
def test_equals_autograd_on_all_rows(model, data, fields, num_points):
    eta = torch.from_numpy(np.random.default_rng(1).normal(0.0, 0.5, (num_points, 1 + P)))
    log_lik, grad = dadvi.full_gradient(model, data, eta, client="serial")
    assert (log_lik.shape, grad.shape) == ((num_points,), (num_points, 1 + P))
    assert log_lik.dtype == grad.dtype == torch.float64
    expected = [by_autograd(fields, point) for point in eta]
    torch.testing.assert_close(log_lik, torch.stack([value for value, _ in expected]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, torch.stack([g for _, g in expected]), rtol=1e-12, atol=1e-12)


def test_one_point_may_be_given_as_a_vector(model, data):
    eta = torch.linspace(-0.5, 0.5, 1 + P)
    for one, many in zip(
        dadvi.full_gradient(model, data, eta, client="serial"),
        dadvi.full_gradient(model, data, eta[None], client="serial"),
        strict=True,
    ):
        assert torch.equal(one, many)


@pytest.mark.parametrize("shape", [(P,), (2, P), (1, 1, 1 + P), ()])
def test_points_of_another_shape_are_refused(model, data, shape):
    with pytest.raises(InputError, match=r"eta has shape .*\(K, 4\)"):
        dadvi.full_gradient(model, data, torch.zeros(shape), client="serial")


def test_dask_gives_the_bits_of_serial(model, data, thread_client):
    eta = torch.from_numpy(np.random.default_rng(2).normal(0.0, 0.5, (3, 1 + P)))
    serial = dadvi.full_gradient(model, data, eta, client="serial")
    dask = dadvi.full_gradient(model, data, eta, client=thread_client)
    assert all(torch.equal(a, b) for a, b in zip(serial, dask, strict=True))
