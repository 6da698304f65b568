"""The anchored solver: rounds of one pass each, around a local model of the full-data log posterior.

A round visits an anchor: one pass over the data measures a `LocalModel` there, which gives the ELBO, the gradient and
the curvature on all the data, and so the certificate. Then q moves to the local model's optimum, without touching the
data, and the next round visits the new mean. A step is kept if the next visit finds that the ELBO, at common draws,
rose; if not, the run goes back and takes a shorter one.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dadvi.elbo import draw_noise
from dadvi.errors import InputError
from dadvi.executors import Executor
from dadvi.families import Family, Gaussian, MeanField
from dadvi.local import NEGLIGIBLE_NATS, Expectations, LocalModel, Noise, Surrogate, Taylor, solve
from dadvi.passes import HessianVector, single_thread
from dadvi.posterior import Fitted, Status, TraceRow
from dadvi.quadratic import DENSE_LIMIT, PRIOR_DRAWS, Certificate, DenseCurvature, optimum
from dadvi.sharding import Manifest, sampling
from dadvi.subsample import Subsample, warm_start, warn_if_ordered
from dadvi.types import Purpose, random_stream

CurvatureFrom = Literal["auto", "subsample", "data"]

DEFAULT_PASSES = 30.0
SUBSAMPLE_ROWS, ROWS_PER_COORDINATE = 20_000, 200
"""Rows of the resident subsample, or for each coordinate if that is more, unless told otherwise."""

POORLY_SEEN = 0.15
"""Relative noise of a precision measured on the subsample, above which curvature is measured on all the data."""

SLICES = 16
"""Parts of the subsample whose curvatures are compared to estimate that noise."""

FEWEST_DRAWS, MOST_DRAWS, DRAWS_WORK = 4, 64, 8e6
"""Draws of q, and the product of draws, coordinates and rows of the subsample that bounds them, unless told."""

ELBO_NOISE = 1e-7
"""Relative error of an ELBO from float32 rows: a smaller fall is no fall."""

SHORTEST_RADIUS = 1e-3


@dataclass(frozen=True)
class Anchored:
    """Settings of the anchored solver, for models with up to `DENSE_LIMIT` coordinates.

    Parameters
    ----------
    subsample_rows
        Rows of the resident subsample, rounded to whole chunks; None for 20 000, or 200 for each coordinate if more.
    num_draws
        K, draws of q at which expectations of the likelihood are taken; None for as many, from 4 to 64, as keep
        K times coordinates times rows of the subsample within 8 million: small data have wide, skewed posteriors.
    curvature
        Where the curvature comes from: ``"subsample"`` (a `Surrogate`, one point a pass), ``"data"`` (a `Taylor`
        model, D tangents a pass), or ``"auto"``: the subsample if it sees every latent well enough.

    Raises
    ------
    InputError
        If a setting is out of its range.

    """

    subsample_rows: int | None = None
    num_draws: int | None = None
    curvature: CurvatureFrom = "auto"

    def __post_init__(self) -> None:
        if self.subsample_rows is not None and self.subsample_rows < 1:
            raise InputError(f"subsample_rows={self.subsample_rows}: at least 1 row is needed")
        if self.num_draws is not None:
            draw_noise("antithetic", self.num_draws, 1, np.random.default_rng(0))  # refuses an odd number
        if self.curvature not in get_args(CurvatureFrom):
            known = ", ".join(map(repr, get_args(CurvatureFrom)))
            raise InputError(f"unknown curvature {self.curvature!r}: use one of {known}")

    def check(self, family: Family) -> None:
        """Every family will do."""

    def passes_at_most(self, manifest: Manifest, max_passes: float | None) -> float:  # noqa: ARG002  as ADVI's
        """Return the passes at which a run ends at the latest."""
        return DEFAULT_PASSES if max_passes is None else max_passes

    def describe(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @single_thread()  # the coordinator's linear algebra must not depend on its number of cores
    def fit(
        self,
        executor: Executor,
        family: Family,
        *,
        tol: float,
        max_passes: float | None,
        seed: int,
        report: Callable[[TraceRow], None],
    ) -> Fitted:
        """Fit the family on the executor's data.

        Ends "converged" when the certificate is within `tol`; "stopped" at `max_passes`, or when no step raises the
        ELBO any more; "diverged" when the log posterior on all the data is not finite where the warm start ended.
        """
        dim = executor.model.model.dim
        if dim > DENSE_LIMIT:
            raise InputError(f"the model has {dim} coordinates, and Anchored() takes {DENSE_LIMIT} at most; use ADVI()")
        passes = self.passes_at_most(executor.data.manifest, max_passes)
        run = _Rounds(self, executor, family, tol, passes, seed, report)
        here = run.visit(run.start())
        if not math.isfinite(here.seen.elbo):
            return run.fitted(here, "diverged", "the log posterior is not finite at the first anchor", None)
        while True:
            certificate = here.seen.certificate(here.q)
            run.record(here, certificate)
            if certificate.within(tol):
                return run.fitted(here, "converged", f"the certificate is within tol={tol:g}", certificate)
            if here.seen.curvature.flat:
                reason = "the log posterior is flat in some direction, so it has no optimum; give proper priors"
                return run.fitted(here, "stopped", reason, certificate)
            if run.exhausted:
                return run.fitted(here, "stopped", f"max_passes={run.max_passes:g} reached", certificate)
            there = run.step(here)
            if there is None:
                return run.fitted(here, "stopped", "no step raises the ELBO", certificate)
            here = there


@dataclass(frozen=True, eq=False)
class _Visit:
    """A Gaussian, and what the pass at its mean found."""

    q: Gaussian
    local: LocalModel
    seen: Expectations


class _Rounds:
    """One run: its subsample, its draws, and how far a step may go."""

    def __init__(
        self,
        settings: Anchored,
        executor: Executor,
        family: Family,
        tol: float,
        max_passes: float,
        seed: int,
        report: Callable[[TraceRow], None],
    ) -> None:
        self.executor, self.family, self.tol, self.max_passes = executor, family, tol, max_passes
        self.seed, self._report = seed, report
        self.prior = executor.model.model
        self.radius = math.inf  # posterior sds
        self.visits = 0
        self.trace: list[TraceRow] = []
        self._started = time.perf_counter()
        self._curvature_from = settings.curvature

        manifest, dim = executor.data.manifest, self.prior.dim
        rows = settings.subsample_rows or max(SUBSAMPLE_ROWS, ROWS_PER_COORDINATE * dim)
        num_chunks = sampling.chunks_for(manifest, rows)
        chunks = sampling.subsample(manifest, num_chunks, seed)
        self._subsample_rows = int(manifest.chunk_sizes[chunks].sum())
        self.factor = manifest.num_chunks / num_chunks
        self.subsample = Subsample.load(executor.model, executor.data, chunks.tolist())

        affordable = 2 * int(DRAWS_WORK / (2 * dim * self._subsample_rows))
        num_draws = settings.num_draws or min(MOST_DRAWS, max(FEWEST_DRAWS, affordable))
        rng = random_stream(seed, Purpose.DRAWS)
        self.noise = _draws(num_draws, family.noise_dim(dim), rng)
        self._start_noise = self.noise if family.noise_dim(dim) == dim else _draws(num_draws, dim, rng)

    def start(self) -> Gaussian:
        """Fit the subsample, and narrow the result to what all the data will say."""
        warm = warm_start(self.subsample, self.seed)
        warn_if_ordered(self.subsample, warm.loc)
        log_scale = warm.params["log_scale"] - 0.5 * math.log(self.factor)
        narrow = Gaussian(MeanField(), {"loc": warm.loc, "log_scale": log_scale})
        local = Surrogate.untilted(self.subsample, self.factor, warm.loc)
        curvature = self._start_noise.expectations(self.prior, local, narrow).curvature
        if self._curvature_from == "auto":
            noise = self._precision_noise(warm.loc, curvature)
            self._curvature_from = "data" if noise > POORLY_SEEN else "subsample"
        return optimum(self.family, warm.loc, curvature)

    def _precision_noise(self, eta: Tensor, curvature: DenseCurvature) -> float:
        """Return the largest standard error, over coordinates, of a precision scaled up from the subsample, over it."""
        if self.factor == 1:  # the subsample is all there is
            return 0.0
        rows = {
            name: torch.cat([batch[name] for batch in self.subsample.batches]) for name in self.subsample.model.fields
        }
        work = HessianVector(eta[None].numpy(), np.eye(len(eta)))
        pieces = zip(*(torch.tensor_split(values, SLICES) for values in rows.values()), strict=True)
        diagonals = np.stack(
            [
                work.on_chunk(self.subsample.model, dict(zip(rows, piece, strict=True))).products.diagonal()
                for piece in pieces
                if len(piece[0])
            ]
        )  # (slices, D)
        unsampled = 1 - 1 / self.factor
        error = self.factor * diagonals.std(0, ddof=1) * math.sqrt(len(diagonals) * unsampled)
        return float((torch.from_numpy(error) / curvature.precision_diagonal).max())

    def visit(self, q: Gaussian) -> _Visit:
        """Measure the local model at q by one pass over the data."""
        self.visits += 1
        check, label = self.visits == 1, f"round {self.visits}"
        local: LocalModel
        if self._curvature_from == "data":
            local = Taylor.measured(self.executor, q, self.noise.likelihood, check=check, label=label)
        else:
            local = Surrogate.measured(self.subsample, self.factor, self.executor, q.loc, check=check, label=label)
        return _Visit(q, local, self.noise.expectations(self.prior, local, q))

    def step(self, here: _Visit) -> _Visit | None:
        """Move to the local optimum, or less far until the ELBO rises; None when none raises it or passes run out."""
        while self.radius > SHORTEST_RADIUS:
            q = solve(self.prior, here.local, here.q, self.noise, self.tol, self.radius)
            if q is here.q:
                return None
            length = float(((q.loc - here.q.loc) / here.seen.curvature.stddev).abs().max())
            there = self.visit(q)
            slack = NEGLIGIBLE_NATS + ELBO_NOISE * abs(here.seen.elbo)
            if there.seen.elbo >= here.seen.elbo - slack:  # False for nan
                self.radius = max(self.radius, 4 * length)
                return there
            self.record(there, None, phase="rejected")
            self.radius = min(self.radius, length) / 4
            if self.exhausted:
                break
        return None

    @property
    def passes(self) -> float:
        """Rows read so far, over N."""
        return (self.executor.rows_read + self._subsample_rows) / self.executor.data.num_rows

    @property
    def exhausted(self) -> bool:
        """Whether another round would exceed the run's passes."""
        return self.passes + 1 > self.max_passes

    def record(self, here: _Visit, certificate: Certificate | None, phase: str = "round") -> None:
        """Add a row to the trace and report it."""
        row = TraceRow(
            phase=phase,
            step=self.visits,
            passes=self.passes,
            rows_read=self.executor.rows_read + self._subsample_rows,
            seconds=time.perf_counter() - self._started,
            elbo=here.seen.elbo,
            certificate=math.nan if certificate is None else certificate.max,
        )
        self.trace.append(row)
        self._report(row)

    def fitted(self, here: _Visit, status: Status, reason: str, certificate: Certificate | None) -> Fitted:
        """Return the result."""
        return Fitted(here.q, status, reason, here.seen.elbo, self.passes, certificate, tuple(self.trace))


def _draws(num_draws: int, dim: int, rng: np.random.Generator) -> Noise:
    return Noise(
        likelihood=draw_noise("orthogonal", num_draws, dim, rng, fixed=True),
        prior=draw_noise("orthogonal", PRIOR_DRAWS, dim, rng, fixed=True),
    )
