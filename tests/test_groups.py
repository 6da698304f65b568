"""Effects of many groups and what they share, beside exact expectations."""

import numpy as np
import pytest
import torch
from hierarchies import many_groups
from torch.nn.functional import softplus

import dadvi

NODES = 24


def gauss_hermite():
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def exact_gradient(posterior, fields):
    """Return E_q[∇ log π] (D,) of the centred hierarchy: η = (μ, log τ, slopes, effects).

    Logits are Gaussian under a mean-field q, so that each row is a rule in one dimension; the prior is in closed form.
    """
    q = posterior.unconstrained
    mean, variance = q.loc.clone().requires_grad_(), q.stddev.square()
    (mu, log_tau), slope, effect = mean[:2], mean[2:4], mean[4:]
    x, y = torch.from_numpy(fields["x"]), torch.from_numpy(fields["y"])
    group = torch.from_numpy(fields["group"])
    logit = effect[group] + x @ slope
    sd = (variance[4:][group] + x.square() @ variance[2:4]).sqrt()
    at_nodes = ((logit + sd * node, weight) for node, weight in zip(*gauss_hermite(), strict=True))
    log_lik = sum(weight * (y * at - softplus(at)).sum() for at, weight in at_nodes)
    precision = (2 * variance[1] - 2 * log_tau).exp()  # E[1/τ²]
    spread = (effect - mu).square() + variance[4:] + variance[0]
    of_effects = -0.5 * precision * spread.sum() - len(effect) * log_tau
    of_scale = log_tau - 0.5 * (2 * log_tau + 2 * variance[1]).exp()  # τ ~ HalfNormal(1)
    log_prior = of_effects + of_scale - (mu.square() + slope.square().sum()) / 8
    return torch.autograd.grad(log_lik + log_prior, mean)[0]


@pytest.mark.parametrize(
    ("num_groups", "num_rows", "subsample_rows"),
    [
        pytest.param(3_000, 18_000, 4_000, id="few-rows-of-each"),
        pytest.param(1_500, 30_000, 15_000, id="ten-rows-of-each-in-the-subsample"),
    ],
)
def test_little_errors_of_many_effects_do_not_add_up_in_what_they_share(write, num_groups, num_rows, subsample_rows):
    """With rules of two points, what they leave of each effect moves slopes and scale by 0.15 and 0.04 sds."""
    model, fields = many_groups(True, num_groups, num_rows)
    data = write(fields, chunk_rows=500)
    method = dadvi.Anchored(subsample_rows=subsample_rows)
    posterior = dadvi.fit(model, data, method=method, client="serial", tol=0.05)
    assert posterior.status == "converged", posterior.reason
    assert posterior.names[:2] == ("mu", "tau")
    curvature = posterior.curvature
    distance = curvature.solve(exact_gradient(posterior, fields)) / curvature.stddev
    assert distance.abs().max() < 0.025
