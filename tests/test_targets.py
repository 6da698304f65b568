"""The targets themselves: their closed forms against quadrature over the model that dadvi evaluates."""

import itertools

import numpy as np
import pytest
import targets
import torch

from dadvi.binding import bind_to
from dadvi.sharding import write_shards

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(24)


@pytest.fixture(params=targets.CONJUGATE, scope="module")
def target(request):
    return targets.CONJUGATE[request.param](num_rows=40)


@pytest.fixture(scope="module")
def log_posterior(target, tmp_path_factory):
    """log π (K,) at η (K, D), unnormalised."""
    data = write_shards(tmp_path_factory.mktemp("targets") / "d.zarr", target.fields)
    model = target.model()
    bound = bind_to(model, data)
    batch = data.read(0)
    return lambda eta: model.log_prior(eta) + bound.log_lik(eta, batch)


def grid(dim):
    """Gauss-Hermite nodes of N(0, I), (K, D), and weights (K,), exact for polynomials; few in high dimension."""
    nodes, weights = (NODES, WEIGHTS) if dim <= 2 else np.polynomial.hermite_e.hermegauss(3)
    points = torch.tensor(list(itertools.product(nodes, repeat=dim)))
    mass = torch.tensor(list(itertools.product(weights / weights.sum(), repeat=dim))).prod(1)
    return points, mass


@pytest.mark.parametrize("family", ["mean_field", "full_rank"])
def test_elbo_is_stationary_at_the_optimum(target, log_posterior, family):
    # E[∇ log π] = 0, and -E[∇² log π] = Σ⁻¹ (full rank) or its diagonal 1/σ² (mean field).
    loc, sd = (torch.from_numpy(each) for each in target.optimum(family))
    root = torch.linalg.cholesky(torch.from_numpy(target.covariance)) if family == "full_rank" else sd.diag()
    noise, mass = grid(len(loc))
    eta = (loc + noise @ root.T).requires_grad_()
    (grad,) = torch.autograd.grad(log_posterior(eta).sum(), eta)
    torch.testing.assert_close(sd * (mass @ grad), torch.zeros_like(loc), atol=1e-8, rtol=0)
    # Stein: E[∇² log π] = E[∇ log π εᵀ] L⁻¹, so -Lᵀ E[∇² log π] L = I is
    curvature = -root.T @ (grad.T * mass) @ noise
    expected = torch.eye(len(loc), dtype=torch.float64)
    if family == "mean_field":
        curvature, expected = curvature.diagonal(), torch.ones_like(loc)
    torch.testing.assert_close(curvature, expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(
        torch.from_numpy(target.covariance).diagonal().sqrt(), torch.from_numpy(target.optimum("full_rank").sd)
    )


def test_evidence_and_moments_by_importance_quadrature(target, log_posterior):
    root = torch.linalg.cholesky(torch.from_numpy(target.covariance))
    loc = torch.from_numpy(target.optimum("full_rank").loc)
    noise, mass = grid(len(loc))
    eta = loc + noise @ root.T
    q = torch.distributions.MultivariateNormal(loc, scale_tril=root)
    log_ratio = log_posterior(eta) - q.log_prob(eta)  # constant where the posterior is Gaussian
    log_evidence = torch.logsumexp(log_ratio + mass.log(), 0)
    # The nodes integrate the ratio of the two densities: exactly for a Gaussian, to about 1e-4 for 40 rows otherwise.
    tolerance = 1e-9 if target.gaussian else 1e-3
    assert float(log_evidence) == pytest.approx(target.log_evidence, abs=tolerance)
    weights = torch.softmax(log_ratio + mass.log(), 0)
    latents, _ = target.model().space.constrain(eta)
    for name, (mean, sd) in target.posterior.items():
        z = latents[name].reshape(len(eta), -1)
        seen = weights @ z
        np.testing.assert_allclose(seen, mean.reshape(-1), atol=tolerance * sd.max())
        np.testing.assert_allclose((weights @ (z - seen).square()).sqrt(), sd.reshape(-1), rtol=5 * tolerance)
