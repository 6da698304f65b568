"""The last resort of the anchored solver: preconditioned L-BFGS on all the data, one pass an evaluation.

The scale of q stays as it is, and its mean maximises E_q[log π] at fixed draws: a smooth function of D variables,
bounded wherever the posterior is proper, on which L-BFGS with a line search converges (Nocedal & Wright 2006, section
7.2). The search runs in posterior sds, whitened by the curvature at its start. It is a function of its evaluations: one
that was interrupted comes to the same place, with no pass, by those it has made.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor

from dadvi.elbo import log_joint
from dadvi.executors import Executor
from dadvi.families import Gaussian
from dadvi.local import Noise
from dadvi.passes import Gradient
from dadvi.quadratic import Curvature
from dadvi.types import FloatArray

FAR_ABOVE = 1e3
"""A loss that is not finite counts as this many times the first one's size: the line search then turns back."""

MEMORY = 20
"""Pairs of steps and gradients from which L-BFGS makes its curvature."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one pass found at a mean."""

    value: float  # E_q[log π]
    grad: Tensor  # its gradient in the mean (D,)


class _Spent(Exception):  # noqa: N818  it ends the search, and is no error
    """All evaluations that were allowed have been made."""


def descend(
    executor: Executor,
    q: Gaussian,
    curvature: Curvature,
    noise: Noise,
    distance: float,
    max_passes: int,
    report: Callable[[Evaluation], None],
    past: Sequence[Evaluation] = (),
) -> Gaussian | None:
    """Move the mean of q until it is within a predicted distance of its optimum, or passes run out.

    Parameters
    ----------
    curvature
        −E_q[∇² log π], or what there is of it: the search is right whatever it is, and fast if it is near.
    distance
        In posterior sds, as the curvature predicts it from the gradient.
    max_passes
        Evaluations at most, past ones included; at least 1 is made.
    report
        Called after every evaluation that takes a pass.
    past
        The evaluations that this search has made before it was interrupted.

    Returns
    -------
    Gaussian or None
        None if nothing better than q was found.

    """
    model = executor.model.model
    best_value, best, first, last_grad = -np.inf, q.loc, -np.inf, torch.full_like(q.loc, np.inf)
    evaluations = 0

    def expected_log_joint(mean: Tensor) -> Evaluation:
        moved = Gaussian(q.family, {**q.params, "loc": mean})
        eta, prior_eta = moved.transform(noise.likelihood.nodes), moved.transform(noise.prior.nodes)
        sums = executor.run(Gradient(eta.numpy()), label="descent")
        prior, prior_grad = log_joint(model, prior_eta, torch.zeros(len(prior_eta)).double(), 0 * prior_eta)
        value = noise.likelihood.mean(torch.from_numpy(sums.log_lik)) + noise.prior.mean(prior)
        grad = noise.likelihood.mean(torch.from_numpy(sums.grad)) + noise.prior.mean(prior_grad)
        return Evaluation(float(value), grad)

    def loss(v: FloatArray) -> tuple[float, FloatArray]:
        nonlocal best_value, best, first, last_grad, evaluations
        if evaluations == max_passes:
            raise _Spent
        evaluations += 1
        mean = q.loc + curvature.root_times(torch.from_numpy(v.copy()))
        if evaluations <= len(past):
            evaluation = past[evaluations - 1]
        else:
            evaluation = expected_log_joint(mean)
            report(evaluation)
        value, grad = evaluation.value, evaluation.grad
        if not (np.isfinite(value) and grad.isfinite().all()):
            return FAR_ABOVE * (1 + abs(first)), np.zeros_like(v)  # an infinite value would end the line search
        first = value if evaluations == 1 else first
        if value > best_value:
            best_value, best = value, mean
        last_grad = grad
        return -value, -curvature.root_transpose_times(grad).numpy()

    def stop_if_near(intermediate_result: OptimizeResult) -> None:  # noqa: ARG001  SciPy goes by the name
        if float((curvature.solve(last_grad) / curvature.stddev).abs().max()) <= distance:
            raise StopIteration

    with suppress(_Spent):
        scipy.optimize.minimize(
            loss,
            np.zeros(q.dim),
            jac=True,
            method="L-BFGS-B",
            callback=stop_if_near,
            options={"maxfun": np.inf, "maxiter": max_passes, "maxcor": MEMORY, "ftol": 0, "gtol": 0},
        )
    return Gaussian(q.family, {**q.params, "loc": best}) if best_value > first else None
