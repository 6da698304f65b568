"""The resident subsample S: rows of a few random chunks in memory, and the fit to S alone that a run starts from.

The warm start is the posterior *given S alone*, unscaled: scales of a hierarchy stay sane, because shrinkage is then
right for the rows that S has. Its mean lies within about √(N / rows in S) posterior sds of where the run is to end.
"""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, reduce
from typing import TypeAlias

import numpy as np
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from dadvi.elbo import log_joint
from dadvi.errors import ModelError, ShuffleWarning
from dadvi.families import Gaussian, MeanField
from dadvi.likelihood import BoundModel
from dadvi.model import Model
from dadvi.passes import Gradient, HessianVector, Pass, Sums, add, single_thread
from dadvi.quadratic import curvature_of, diagonal_probes, prior_products
from dadvi.quadrature import Rule, stratified
from dadvi.sharding import ShardedDataset, sampling
from dadvi.structure import Structure
from dadvi.types import Batch, FloatArray, Purpose, random_stream
from dadvi.whitening import Whitening

WARM_START_DRAWS, WARM_START_NUMBERS = 16, 2**18
"""Draws of the warm start: fewer in many dimensions, where together they have about `WARM_START_NUMBERS` numbers."""

WARM_START_ROUNDS = 8
ROUND_ITERATIONS, ROUND_SETTLED = 50, 1e-5
"""Iterations of a round at most, and the relative change of the ELBO in one that ends it: the next sees better."""

LARGEST_CHANGE = 2.0
"""Change of a log sd in one round at most: a line search that overshoots would collapse the Gaussian to a point."""

SETTLED_NATS = 0.1
"""A round that raises the ELBO by less is the last."""

NARROWINGS = 16
CUTS = 20

Objective: TypeAlias = Callable[[FloatArray], tuple[float, FloatArray]]

FALSE_ALARM = 1e-4
"""Probability of a warning about data in random order."""


WORTH_THREADS = 2**20
"""Rows times coordinates of a subsample below which handing out its chunks to threads would cost more than it gains."""


@cache
def _threads() -> ThreadPoolExecutor:
    """Return threads for the chunks of a subsample, each with one torch thread: the bits must not depend on cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(cores, "subsample", initializer=torch.set_num_threads, initargs=(1,))


@dataclass(frozen=True)
class Subsample:
    """Chunks held in memory, on which passes run at once."""

    model: BoundModel  # with float64 arithmetic: in float32 a solve stalls tenths of an sd away
    batches: Mapping[int, Batch]  # by chunk, in increasing order
    curvature_rows: float = math.inf  # about as many of its rows are for measuring curvatures

    @classmethod
    def load(cls, model: BoundModel, data: ShardedDataset, chunks: Sequence[int]) -> "Subsample":
        """Read the chunks; floating fields become float64."""
        return cls(replace(model, dtype=torch.float64), {}).extended(data, chunks)

    def extended(self, data: ShardedDataset, chunks: Sequence[int]) -> "Subsample":
        """Return the subsample of these chunks and those it has, reading what is new."""
        batches = dict(self.batches)
        for chunk in set(chunks) - set(batches):
            batch = data.read(chunk, self.model.fields)
            self.model.check_rows(batch, data.manifest.rows(chunk)[0], finite=data.manifest.finite)
            batches[chunk] = {
                name: value.double() if value.is_floating_point() else value for name, value in batch.items()
            }
        return Subsample(self.model, dict(sorted(batches.items())), self.curvature_rows)

    @property
    def for_curvature(self) -> "Subsample":
        """The part of S on which curvatures are measured: they cost more than gradients, and steer the search only."""
        if self.curvature_rows >= self.num_rows:
            return self
        return self.top(math.ceil(self.curvature_rows / len(self.batches)))

    @property
    def num_rows(self) -> int:
        """Rows of S."""
        return sum(len(next(iter(batch.values()))) for batch in self.batches.values())

    def part(self, num_rows: float) -> "Subsample":
        """Return the subsample's first chunks, with so many rows at least, or all of them."""
        if num_rows >= self.num_rows:
            return self
        chosen: dict[int, Batch] = {}
        for chunk, batch in self.batches.items():
            chosen[chunk] = batch
            if Subsample(self.model, chosen).num_rows >= num_rows:
                break
        return Subsample(self.model, chosen)

    def sliced(self, num_slices: int) -> "Subsample":
        """Return the same rows in so many batches of equal size, as far as there are rows; they are no chunks."""
        rows = {name: torch.cat([batch[name] for batch in self.batches.values()]) for name in self.model.fields}
        pieces = zip(*(values.tensor_split(num_slices) for values in rows.values()), strict=True)
        batches = (dict(zip(rows, piece, strict=True)) for piece in pieces)
        return Subsample(
            self.model, {number: batch for number, batch in enumerate(batches) if len(next(iter(batch.values())))}
        )

    def top(self, num_rows: int) -> "Subsample":
        """Return the subsample of the first rows of each chunk, so many of them at most."""
        batches = {
            chunk: {name: values[:num_rows] for name, values in batch.items()} for chunk, batch in self.batches.items()
        }
        return replace(self, batches=batches)

    def copied(self) -> "Subsample":
        """Return the same rows in memory of their own: of the chunks that they were taken from, nothing is held."""
        batches = {
            chunk: {name: values.clone() for name, values in batch.items()} for chunk, batch in self.batches.items()
        }
        return replace(self, batches=batches)

    def each(self, work: Pass[Sums]) -> list[Sums]:
        """Return the sums of a pass over each chunk of S, as many at a time as there are cores."""

        def on_one(batch: Batch) -> Sums:
            return work.on_chunk(self.model, batch)

        if self.num_rows * self.model.model.dim < WORTH_THREADS:
            with single_thread():
                return [on_one(batch) for batch in self.batches.values()]
        return list(_threads().map(on_one, self.batches.values()))

    def run(self, work: Pass[Sums]) -> Sums:
        """Return the sums of a pass over S."""
        return reduce(add, self.each(work))


def warm_start(subsample: Subsample, structure: Structure | None, seed: int) -> Gaussian:
    """Fit a mean-field Gaussian to the posterior given S alone, by rounds of L-BFGS on the ELBO at fixed draws.

    Each round searches in coordinates whitened by the curvature where it starts, so that predictors may have any scale.

    Parameters
    ----------
    structure
        Of that curvature; None for its diagonal alone.

    Raises
    ------
    ModelError
        If the log posterior is not finite around the start however narrow the first Gaussian.

    """
    model = subsample.model.model
    num_draws = 2 * max(2, min(WARM_START_DRAWS, WARM_START_NUMBERS // model.dim) // 2)
    noise = stratified(num_draws, model.dim, random_stream(seed, Purpose.SUBSAMPLE, 1)).nodes
    q, elbo = _improve(subsample, structure, model.start, noise, seed)
    # Without a structure the curvature is its diagonal, which does not tell what there is to gain.
    least_gain = 0.0 if structure is None else SETTLED_NATS
    for _ in range(WARM_START_ROUNDS - 1):
        better, better_elbo = _improve(subsample, structure, q.loc, noise, seed, least_gain)
        if not better_elbo > elbo + SETTLED_NATS:
            break
        q, elbo = better, better_elbo
    return q


def _improve(
    subsample: Subsample, structure: Structure | None, center: Tensor, noise: Tensor, seed: int, least_gain: float = 0.0
) -> tuple[Gaussian, float]:
    """Search from N(center, 1/curvature) and return the Gaussian found and its ELBO.

    There is no search where Newton's step from the center would gain less than `least_gain` nats.
    """
    model = subsample.model.model
    tangents = diagonal_probes(model.dim, seed) if structure is None else structure.tangents()
    products = torch.from_numpy(subsample.run(HessianVector(center[None].numpy(), tangents)).products)
    products = -(products + prior_products(model, Rule.equal(center[None]), tangents))
    whitening = Whitening.around(MeanField(), center, curvature_of(products, tangents, structure))

    def log_joint_given_s(eta: Tensor) -> tuple[Tensor, Tensor]:
        sums = subsample.run(Gradient(eta.numpy()))
        return log_joint(model, eta, torch.from_numpy(sums.log_lik), torch.from_numpy(sums.grad))

    def theta_at(x: FloatArray) -> dict[str, Tensor]:
        v, change = torch.from_numpy(x.copy()).split(model.dim)
        return {"loc": unit * v, "log_scale": log_scale + LARGEST_CHANGE * (change / LARGEST_CHANGE).tanh()}

    def negative_elbo(x: FloatArray) -> tuple[float, FloatArray]:
        if not np.isfinite(x).all():  # after an infinite value the line search asks for anything
            return np.inf, np.zeros_like(x)
        est = whitening.estimate(theta_at(x), noise, log_joint_given_s)
        if not np.isfinite(est.elbo):
            return np.inf, np.zeros_like(x)
        rate = 1 - torch.from_numpy(np.tanh(x[model.dim :] / LARGEST_CHANGE)).square()
        return -est.elbo, -torch.cat([unit * est.grad["loc"], rate * est.grad["log_scale"]]).numpy()

    unit, log_scale = 1.0, 0.0
    x = np.zeros(2 * model.dim)

    def narrowed_by(change: float) -> float:
        nonlocal log_scale
        log_scale = change
        return negative_elbo(x)[0]

    log_scale = _first_log_scale(narrowed_by, model, center)
    value, grad = negative_elbo(x)
    if 0.5 * float(np.square(grad[: model.dim]).sum()) < least_gain:
        return whitening.member(theta_at(x)), -value
    # L-BFGS tries a step of length 1 first.
    unit = _first_step(negative_elbo, x, value, grad[: model.dim], np.exp(log_scale))
    solution = scipy.optimize.minimize(
        negative_elbo,
        x,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": ROUND_ITERATIONS, "maxcor": 30, "ftol": ROUND_SETTLED},
    )
    if not (np.isfinite(solution.x).all() and np.isfinite(solution.fun)):
        return whitening.member(theta_at(x)), -negative_elbo(x)[0]
    return whitening.member(theta_at(solution.x)), -float(solution.fun)


def _first_step(objective: Objective, x: FloatArray, value: float, location_grad: FloatArray, shortest: float) -> float:
    """Return the length of a first step of the location that descends: Newton's, cut until it does.

    Far from the optimum Newton's step is many sds long, and a search that began with one sd would end there; where the
    log posterior is steeper ahead, it overshoots.
    """
    dim, along = len(location_grad), -location_grad
    step = np.zeros_like(x)
    for _ in range(CUTS):
        step[:dim] = along
        if np.linalg.norm(along) <= shortest or objective(x + step)[0] < value:
            break
        along = along / 10
    return max(shortest, float(np.linalg.norm(along)))


def _first_log_scale(negative_elbo: Callable[[float], float], model: Model, center: Tensor) -> float:
    """Return the first log scale, 0 or a negative multiple of log 10, at which narrowing no longer raises the ELBO.

    A flat start can be so wide that its draws overflow the likelihood.
    """
    best, log_scale = np.inf, 0.0
    for narrowing in range(NARROWINGS):
        narrower = -narrowing * np.log(10)
        value = negative_elbo(narrower)
        if np.isfinite(best) and not value < best:
            return log_scale
        best, log_scale = value, narrower
    if np.isfinite(best):
        return log_scale
    latents, _ = model.space.constrain(center[None])
    values = {name: z[0].tolist() for name, z in latents.items() if z[0].numel() <= 8}
    raise ModelError(
        f"the log posterior is not finite around {values}, even within {10.0 ** (1 - NARROWINGS):g} of the sds that "
        "its curvature gives; rescale the predictors or choose tighter priors"
    )


def warn_if_ordered(subsample: Subsample, eta: Tensor) -> None:
    """Warn if the chunks of S differ by more than rows drawn at random would, as in data ordered by time or by label.

    The gradients of chunks, as far as S has them, vary about their mean as much as those of a chunk's even and odd rows
    differ, if rows stand in random order: an F test with that ratio, coordinate by coordinate.

    Parameters
    ----------
    eta
        A point (D,) near the posterior's mean.

    """
    halves = []  # (C, 2, D)
    for batch in subsample.batches.values():
        if len(next(iter(batch.values()))) > 1:
            parts = ({name: values[first::2] for name, values in batch.items()} for first in (0, 1))
            halves.append([Gradient(eta[None].numpy()).on_chunk(subsample.model, part).grad[0] for part in parts])
    if len(halves) < sampling.FEWEST_CHUNKS:
        return
    even, odd = np.stack(halves, axis=1)  # (C, D) each
    total, difference = even + odd, even - odd
    spread = np.sqrt(np.mean(difference**2, axis=0))  # (D,)
    seen = ((even != 0) & (odd != 0)).all(0)  # a latent that few rows touch has no normal gradients to test
    between = total[:, seen].std(0, ddof=1)
    ratio = float(np.square(between / spread[seen]).max(initial=0.0))
    chance = float(scipy.stats.f.isf(FALSE_ALARM / max(1, int(seen.sum())), len(halves) - 1, len(halves)))
    if ratio > chance:
        warnings.warn(
            f"chunks differ by more than rows in random order would: the variance between {len(halves)} chunks is "
            f"{ratio:.3g} "
            f"times that within them, chance gives at most {chance:.3g}. Batches of such chunks mislead the fit; "
            "write the "
            "data again in random order, with write_shards(..., shuffle=0) or `dadvi ingest --shuffle 0`",
            ShuffleWarning,
            stacklevel=2,
        )
