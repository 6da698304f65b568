"""The resident subsample S: a few random chunks in memory, and the fit to S alone that a run starts from.

The warm start is the posterior *given S alone*, unscaled: scales of a hierarchy stay sane, because shrinkage is then
right for the rows that S has. Its mean lies within about √(N / rows in S) posterior sds of where the run is to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from dadvi.elbo import draw_noise, estimate, log_joint
from dadvi.errors import ModelError
from dadvi.families import Gaussian, MeanField
from dadvi.likelihood import BoundModel
from dadvi.passes import Gradient, HessianVector, Pass, Sums, add, single_thread
from dadvi.quadratic import curvature_of, prior_products
from dadvi.sharding import ShardedDataset
from dadvi.types import Batch, FloatArray, Purpose, random_stream

WARM_START_DRAWS = 16
WARM_START_ITERATIONS = 300
_NARROWINGS = 8


@dataclass(frozen=True)
class Subsample:
    """Chunks held in memory, on which passes run at once."""

    model: BoundModel  # with float64 arithmetic: in float32 a solve stalls tenths of an sd away
    batches: tuple[Batch, ...]

    @classmethod
    def load(cls, model: BoundModel, data: ShardedDataset, chunks: Sequence[int]) -> "Subsample":
        """Read the chunks; floating fields become float64."""
        batches = []
        for chunk in chunks:
            batch = data.read(chunk, model.fields)
            model.check_rows(batch, data.manifest.rows(chunk)[0])
            batches.append(
                {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
            )
        return cls(replace(model, dtype=torch.float64), tuple(batches))

    def run(self, work: Pass[Sums]) -> Sums:
        """Return the sums of a pass over S."""
        with single_thread():
            return reduce(add, [work.on_chunk(self.model, batch) for batch in self.batches])


def warm_start(subsample: Subsample, seed: int) -> Gaussian:
    """Fit a mean-field Gaussian to the posterior given S alone, by L-BFGS on the ELBO at fixed draws.

    The search runs in coordinates whitened by the curvature at the start, so that predictors may have any scale.

    Raises
    ------
    ModelError
        If the log posterior is not finite around the start however narrow the first Gaussian.

    """
    model, family = subsample.model.model, MeanField()
    center = model.start

    def hessian_times(tangents: FloatArray) -> Tensor:
        products = torch.from_numpy(subsample.run(HessianVector(center[None].numpy(), tangents)).products)
        return -(products + prior_products(model, center[None], tangents))

    curvature = curvature_of(hessian_times, model.dim, seed)
    log_scale = -0.5 * curvature.precision_diagonal.log()
    noise = draw_noise("antithetic", WARM_START_DRAWS, model.dim, random_stream(seed, Purpose.SUBSAMPLE, 1))

    def params_at(x: FloatArray) -> dict[str, Tensor]:
        v, change = torch.from_numpy(x.copy()).split(model.dim)
        return {"loc": center + curvature.root_times(v), "log_scale": log_scale + change}

    def negative_elbo(x: FloatArray) -> tuple[float, FloatArray]:
        params = params_at(x)
        eta = family.transform(params, noise)
        if not torch.isfinite(eta).all():
            return np.inf, np.zeros_like(x)
        sums = subsample.run(Gradient(eta.numpy()))
        value, grad = log_joint(model, eta, torch.from_numpy(sums.log_lik), torch.from_numpy(sums.grad))
        est = estimate(family, params, noise, value, grad)
        if not np.isfinite(est.elbo):
            return np.inf, np.zeros_like(x)
        grads = torch.cat([curvature.root_transpose_times(est.grad["loc"]), est.grad["log_scale"]])
        return -est.elbo, -grads.numpy()

    x = np.zeros(2 * model.dim)
    for _ in range(_NARROWINGS):  # a flat start can be so wide that its draws overflow the likelihood
        if np.isfinite(negative_elbo(x)[0]):
            break
        x[model.dim :] -= np.log(10)
    else:
        values = {
            name: z[0].tolist() for name, z in model.space.constrain(center[None])[0].items() if z[0].numel() <= 8
        }
        raise ModelError(
            f"the log posterior is not finite around the starting point {values}, even within {10.0**-_NARROWINGS:g} "
            "of the sds "
            f"its curvature gives; rescale the predictors or choose tighter priors"
        )
    options = {"maxiter": WARM_START_ITERATIONS, "maxcor": 30, "ftol": 1e-8}
    solution = scipy.optimize.minimize(negative_elbo, x, jac=True, method="L-BFGS-B", options=options)
    return Gaussian(family, params_at(solution.x))
