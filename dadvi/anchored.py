"""The anchored solver: rounds of one pass each, around a local model of the full-data log posterior.

A round visits an anchor: one pass over the data measures a `LocalModel` there, which gives the ELBO, the gradient and
the curvature on all the data, and so the certificate. Then q moves to the local model's optimum, without touching the
data, and the next round visits the new mean. A step is kept if the next visit finds that the ELBO, at common draws,
rose; if not, the run goes back and takes a shorter one. Where steps fail, L-BFGS on all the data takes over.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch

from dadvi.acceleration import Iterate
from dadvi.descent import descend
from dadvi.elbo import draw_noise
from dadvi.errors import InputError
from dadvi.executors import Executor
from dadvi.families import Family, Gaussian, MeanField
from dadvi.local import (
    NEGLIGIBLE_NATS,
    SOLVED,
    Expectations,
    LocalModel,
    Noise,
    Surrogate,
    Taylor,
    accelerated_member,
    distance,
    iterate,
    solve,
)
from dadvi.passes import HessianVector, single_thread
from dadvi.posterior import Fitted, Status, TraceRow
from dadvi.probing import find_structure
from dadvi.quadratic import DENSE_LIMIT, Certificate, Curvature, optimum, prior_draws, prior_hessian
from dadvi.quadrature import Rule, gauss_hermite, orthogonal, stratified
from dadvi.scales import find_scales
from dadvi.sharding import Manifest, sampling
from dadvi.structure import Arrowhead
from dadvi.subsample import Subsample, warm_start, warn_if_ordered
from dadvi.types import Purpose, random_stream

CurvatureFrom = Literal["auto", "subsample", "data"]

DEFAULT_PASSES = 30.0
SUBSAMPLE_ROWS, ROWS_PER_COORDINATE = 20_000, 200
"""Rows of the resident subsample, or for each dense coordinate if that is more, unless told otherwise."""

ROOT_ROWS = 6.0
"""The subsample has at least this many times √(N D) rows, D counting dense coordinates.

With n rows a run starts about √(N/n) posterior sds from its end, and a round leaves √(D/n) of that: after the second
round about N^½ D / n^{3/2}, which falls with N.
"""

WARM_ROWS, WARM_ROWS_PER_COORDINATE = 4_000, 50
"""Rows of the part of the subsample on which the search for a start begins, or for each dense coordinate if more."""

WARM_DISTANCE = 10.0
"""The start is near enough to the subsample's optimum when a thirtieth of this many of its posterior sds away."""

SLICES = 16
"""Parts of the subsample whose curvatures are compared to estimate their noise."""

POORLY_SEEN = 0.04
"""Relative noise of a precision measured on the subsample, twice that of an sd, above which the curvature is that of
all the data."""

NARROW = 0.003
"""Relative difference of precisions at q's mean and averaged over q, below which those at the mean will do."""

COARSE = 0.03
"""Norm of the relative errors, over the effects of groups, of precisions averaged by rules of three points along a
direction, above which there are five: errors of all groups together move the scale that they share."""

TAYLOR_DRAWS = 32
"""Draws of q for a pass that measures Hessians too: beside these they cost little."""

FEWEST_DRAWS, MOST_DRAWS, DRAWS_WORK, FEWEST_COORDINATES = 4, 64, 2e6, 16
"""Draws of q, and the product of draws, coordinates (or `FEWEST_COORDINATES`) and rows of the subsample that bounds
them, unless told."""

ELBO_NOISE = 1e-7
"""Relative error of an ELBO from float32 rows: a smaller fall is no fall."""

NEAR = 6.0
"""Length of a step, in posterior sds, up to which rounds are accelerated."""

FARTHEST = 8.0
"""Length of the first step, in posterior sds given the subsample alone: the posterior of all the data lies nearer."""

MOST_REJECTED = 3
"""Steps rejected in a row after which the last resort takes over."""

DESCENT_PASSES = 20
"""Evaluations of the last resort before the curvature is measured anew."""


@dataclass(frozen=True)
class Anchored:
    """Settings of the anchored solver.

    It is for models whose curvature can be held: up to `DENSE_LIMIT` coordinates that curve together with any others,
    and any number of effects of groups.

    Parameters
    ----------
    subsample_rows
        Rows of the resident subsample, rounded to whole chunks; None for the largest of 20 000, 200 for each dense
        coordinate, and 6 √(N D). Of those, curvatures are measured on 20 000, or 200 for each dense coordinate.
    num_draws
        K, draws of q at which expectations of the likelihood are taken, besides its mean; None for as many, from 4 to
        64, as keep K times coordinates times rows of the subsample within 2 million: small data have wide, skewed
        posteriors.
    curvature
        Where the curvature comes from: ``"subsample"`` (a `Surrogate`, one point a pass), ``"data"`` (a `Taylor`
        model, a tangent for each dense coordinate a pass), or ``"auto"``: the subsample if it sees every latent well
        enough.

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

    @property
    def points_at_most(self) -> int:
        """K, points of a pass at most."""
        return self.num_draws or TAYLOR_DRAWS

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
        passes = self.passes_at_most(executor.data.manifest, max_passes)
        run = _Rounds(self, executor, family, tol, passes, seed, report)
        here = run.visit(run.start())
        if not (math.isfinite(here.seen.elbo) and here.seen.grad.isfinite().all()):
            return run.fitted(here, "diverged", "the log posterior is not finite at the first anchor", None)
        while True:
            aim = run.aim(here)
            certificate = here.seen.certificate(here.q).or_farther(here.q, aim.q, here.seen.curvature)
            run.record(here, certificate)
            if certificate.within(tol):
                return run.fitted(here, "converged", f"the certificate is within tol={tol:g}", certificate)
            if here.seen.curvature.flat:
                reason = "the log posterior is flat in some direction, so it has no optimum; give proper priors"
                return run.fitted(here, "stopped", reason, certificate)
            if run.exhausted:
                return run.fitted(here, "stopped", f"max_passes={run.max_passes:g} reached", certificate)
            there = run.step(here, aim) or run.descend(here)
            if there is None:
                spent = f"max_passes={run.max_passes:g} reached" if run.exhausted else "no step raises the ELBO"
                return run.fitted(here, "stopped", spent, certificate)
            here = there


@dataclass(frozen=True, eq=False)
class _Visit:
    """A Gaussian, and what the pass at its mean found."""

    q: Gaussian
    local: LocalModel
    seen: Expectations
    length: float  # of the step that led here, in posterior sds


@dataclass(frozen=True, eq=False)
class _Aim:
    """The next Gaussian, and what is known of the local model there."""

    q: Gaussian
    seen: Expectations | None
    gain: float  # of the ELBO, as the local model predicts it


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
        self.radius = FARTHEST  # in posterior sds given the subsample alone
        self.history: list[Iterate] = []  # rounds since which no step was long or rejected
        self.visits = 0
        self.trace: list[TraceRow] = []
        self._started = time.perf_counter()
        self._curvature_from, self._num_draws = settings.curvature, settings.num_draws
        self._load(settings.subsample_rows)
        draws = partial(fixed_draws, settings.num_draws, num_rows=self.subsample.num_rows)
        self.noise = draws(family.noise_dim(self.prior.dim), rng=random_stream(seed, Purpose.DRAWS))
        warm = draws(self.prior.dim, rng=random_stream(seed, Purpose.DRAWS, 1))
        self._warm_noise = replace(warm, curvature=Rule.equal(torch.zeros(1, self.prior.dim, dtype=torch.float64)))

    def _load(self, subsample_rows: int | None) -> None:
        """Read the subsample, and find the structure of the Hessian on it, which tells how large it should be."""
        manifest, data, dim = self.executor.data.manifest, self.executor.data, self.prior.dim
        chunks = sampling.subsample(
            manifest, sampling.chunks_for(manifest, subsample_rows or SUBSAMPLE_ROWS), self.seed
        )
        self.subsample = Subsample.load(self.executor.model, data, chunks.tolist())
        structure = find_structure(self.subsample, self.seed)
        if structure is None or (dim > DENSE_LIMIT and not isinstance(self.family, MeanField)):
            what = "too many for a curvature" if structure is None else f"too many for {self.family.name!r}"
            raise InputError(
                f"the model has {dim} coordinates, {what}: the limit is {DENSE_LIMIT}, not counting the effects of "
                "groups that a mean-field family has; use method=ADVI(control_variate='anchor')"
            )
        self.structure = structure
        if subsample_rows is None:
            num_dense = len(structure.dense)
            enough = max(SUBSAMPLE_ROWS, ROWS_PER_COORDINATE * num_dense)
            rows = max(enough, int(ROOT_ROWS * math.sqrt(manifest.num_rows * num_dense)))
            more = sampling.subsample(manifest, sampling.chunks_for(manifest, rows), self.seed)
            self.subsample = replace(self.subsample, curvature_rows=enough).extended(data, more.tolist())
        self.factor = manifest.num_chunks / len(self.subsample.batches)
        if self.factor == 1:  # the fit is exact, and so are its curvatures
            self.subsample = replace(self.subsample, curvature_rows=math.inf)

    def start(self) -> Gaussian:
        """Fit the subsample, and narrow the result to what all the data will say."""
        warm_rows = max(WARM_ROWS, WARM_ROWS_PER_COORDINATE * len(self.structure.dense))
        warm = warm_start(self.subsample.part(warm_rows), self.structure, self.seed)
        alone = Surrogate.untilted(self.subsample, self.structure, 1.0, warm.loc)
        warm, seen_alone = self._solve(alone, warm, self._warm_noise, WARM_DISTANCE)
        warn_if_ordered(self.subsample, warm.loc)
        at = Rule.equal(warm.loc[None])
        work = HessianVector(at.nodes.numpy(), self.structure.tangents())
        seen = self.subsample.for_curvature.sliced(SLICES)
        parts = [self.structure.arrowhead(torch.from_numpy(sums.products)) for sums in seen.each(work)]
        factor = self.executor.data.manifest.num_chunks / len(self.subsample.for_curvature.batches)
        of_prior = prior_hessian(self.prior, at, self.structure)
        curvature = Curvature.of(-(sum(parts[1:], parts[0]) * factor + of_prior))
        if self._curvature_from == "auto":
            noise = _precision_noise(parts, factor, curvature)
            self._curvature_from = "data" if noise > POORLY_SEEN else "subsample"
        if self._curvature_from == "data":
            self._scales = find_scales(seen, self.structure, self.seed)
        self._start_curvature, self._unit = curvature, seen_alone.curvature.stddev
        q = optimum(self.family, warm.loc, curvature)
        if self._curvature_from == "data":
            self.noise = self._draws_for_expansion(q, seen, factor)
        return self._solve(alone, q, self.noise, self.tol)[0] if self.factor == 1 else q

    def _draws_for_expansion(self, q: Gaussian, seen: Subsample, factor: float) -> Noise:
        """Return the draws for passes that measure Hessians too, and whose local model has no other draws."""
        num_draws, dim = self._num_draws or TAYLOR_DRAWS, self.family.noise_dim(self.prior.dim)
        if len(self.noise.likelihood.nodes) > num_draws:
            return self.noise
        coarse, fine = (
            fixed_draws(num_draws, dim, 1, random_stream(self.seed, Purpose.DRAWS, 2), num_points)
            for num_points in (3, 5)
        )
        if not self.structure.groups.numel():
            return coarse
        nodes = q.transform(torch.cat([coarse.curvature.nodes, fine.curvature.nodes]))
        weights = torch.cat([coarse.curvature.weights, -fine.curvature.weights])
        work = HessianVector(nodes.numpy(), self.structure.probes(), weights.numpy())
        products = torch.from_numpy(seen.run(work).products)[:, self.structure.groups]
        difference = factor * products.diagonal(dim1=0, dim2=2) * self.structure.signs[:, None]  # of precisions (J, C)
        error = difference / self._start_curvature.precision_diagonal[self.structure.groups]
        return fine if float(error.norm()) > COARSE else coarse

    def _solve(self, local: LocalModel, q: Gaussian, noise: Noise, tol: float) -> tuple[Gaussian, Expectations]:
        return solve(self.prior, local, q, noise.expectations(self.prior, local, q), noise, tol)

    def visit(self, q: Gaussian, seen: Expectations | None = None, length: float = math.nan) -> _Visit:
        """Measure the local model at q by one pass over the data.

        Parameters
        ----------
        seen
            What q saw of the surrogate, where it is known: the next one has the same curvature, for they differ by a
            linear function.
        length
            Of the step that led to q.

        """
        self.visits += 1
        check, label = self.visits == 1, f"round {self.visits}"
        local: LocalModel
        if self._curvature_from == "data":
            local = Taylor.measured(self.executor, q, self.noise, self._scales, check=check, label=label)
            seen = None
        else:
            local = Surrogate.measured(
                self.subsample, self.structure, self.factor, self.executor, q.loc, check=check, label=label
            )
        found = self.noise.expectations(self.prior, local, q, known=seen)
        if self.visits == 1 and self._curvature_from == "subsample" and self.factor > 1:
            change = found.curvature.precision_diagonal / self._start_curvature.precision_diagonal - 1
            if float(change.abs().max()) < NARROW:  # what q spreads over has the curvature of its mean
                center = Rule.equal(torch.zeros_like(self.noise.curvature.nodes[:1]))
                self.noise = replace(self.noise, curvature=center)
        return _Visit(q, local, found, length)

    def aim(self, here: _Visit) -> _Aim:
        """Return the local model's optimum, as far as the radius allows, or what is better.

        What the local model lacks makes rounds converge linearly, such as third-order terms in a hierarchy; once they
        are near, acceleration takes its place.
        """
        unit = self._unit
        # The way to an optimum within the radius may lead beyond it: along a ridge that bends.
        for radius in (math.inf, self.radius) if self.radius == FARTHEST else (self.radius,):
            q, seen = solve(self.prior, here.local, here.q, here.seen, self.noise, self.tol, radius, unit)
            if distance(here.q, q, unit) <= self.radius:
                break
        far = distance(here.q, q, here.seen.curvature.stddev) > NEAR or distance(here.q, q, unit) > self.radius / 2
        gain = seen.elbo - here.seen.elbo
        if far:  # the optimum is far, or the radius cut the way to it
            self.history.clear()
            return _Aim(q, seen, gain)
        self.history.append(iterate(here.q, q, unit))
        faster = accelerated_member(here.q, self.history, unit)
        return _Aim(q, seen, gain) if faster is None else _Aim(faster, None, gain)

    def step(self, here: _Visit, aim: _Aim) -> _Visit | None:
        """Move to where it was aimed, or less far until the ELBO rises; None if it does not, or passes run out."""
        for _ in range(MOST_REJECTED):
            if aim.q is here.q:
                return None
            length = distance(here.q, aim.q, self._unit)
            there = self.visit(aim.q, aim.seen, distance(here.q, aim.q, here.seen.curvature.stddev))
            # Where E_q[∇ log π] = 0, the ELBO at these draws is not quite the largest; coordinates add up at random.
            slack = NEGLIGIBLE_NATS * math.sqrt(self.prior.dim) + ELBO_NOISE * abs(here.seen.elbo)
            gain = self.noise.gain(here.seen, there.seen, there.q)
            if gain >= -slack:  # False for nan
                self._adapt(gain, aim.gain, length)
                return there
            self.record(there, None, phase="rejected")
            self.radius = min(self.radius, length) / 4
            self.history.clear()
            if self.exhausted:
                return None
            aim = self.aim(here)
        return None

    def _adapt(self, gain: float, predicted: float, length: float) -> None:
        """Trust the local model farther, or less far, after a step (Nocedal & Wright 2006, algorithm 4.1)."""
        if gain < 0.25 * predicted:
            self.radius = length / 2
        elif gain > 0.75 * predicted:
            self.radius = max(self.radius, 2 * length)

    def descend(self, here: _Visit) -> _Visit | None:
        """Move the mean by the last resort; None if it finds nothing better, or passes run out."""
        passes_left = int(self.max_passes - self.passes)
        if passes_left < 2:  # one evaluation, and the visit after it
            return None

        def record(value: float) -> None:
            elbo = value + float(here.q.entropy())
            self._add(self._row("descent", elbo))

        evaluations = min(DESCENT_PASSES, passes_left - 1)
        curvature = here.seen.curvature
        q = descend(self.executor, here.q, curvature, self.noise, SOLVED * self.tol, evaluations, record)
        if q is None:
            return None
        self.radius = FARTHEST
        self.history.clear()
        return self.visit(q, length=distance(here.q, q, curvature.stddev))

    @property
    def passes(self) -> float:
        """Rows read so far, over N."""
        return (self.executor.rows_read + self.subsample.num_rows) / self.executor.data.num_rows

    @property
    def exhausted(self) -> bool:
        """Whether another round would exceed the run's passes."""
        return self.passes + 1 > self.max_passes

    def record(self, here: _Visit, certificate: Certificate | None, phase: str = "round") -> None:
        """Add a row to the trace and report it."""
        largest = math.nan if certificate is None else certificate.max
        self._add(self._row(phase, here.seen.elbo, certificate=largest, length=here.length))

    def _row(self, phase: str, elbo: float, **figures: float) -> TraceRow:
        return TraceRow(
            phase=phase,
            step=self.visits,
            passes=self.passes,
            rows_read=self.executor.rows_read + self.subsample.num_rows,
            seconds=time.perf_counter() - self._started,
            elbo=elbo,
            **asdict(self.executor.profile),
            **figures,
        )

    def _add(self, row: TraceRow) -> None:
        self.trace.append(row)
        self._report(row)

    def fitted(self, here: _Visit, status: Status, reason: str, certificate: Certificate | None) -> Fitted:
        """Return the result."""
        return Fitted(
            here.q, status, reason, here.seen.elbo, self.passes, certificate, tuple(self.trace), here.seen.curvature
        )


def _precision_noise(parts: Sequence[Arrowhead], factor: float, curvature: Curvature) -> float:
    """Return the largest standard error, over coordinates, of a precision scaled up from the subsample, over it.

    Parameters
    ----------
    parts
        The Hessian of each of as many slices of the subsample.
    factor
        What scales their sum up to all the data.

    """
    if factor == 1:  # the subsample is all there is
        return 0.0
    diagonals = torch.stack([part.diagonal() for part in parts])  # (m, D)
    error = factor * diagonals.std(0) * math.sqrt(len(parts) * (1 - 1 / factor))
    return float((error / curvature.precision_diagonal).max())


def fixed_draws(
    num_draws: int | None, noise_dim: int, num_rows: int, rng: np.random.Generator, num_points: int = 3
) -> Noise:
    """Return the draws of a run.

    Parameters
    ----------
    num_draws
        For the log-likelihood; None for as many as is affordable.
    noise_dim
        Length of a draw.
    num_rows
        Rows of the subsample.
    num_points
        Of each Gauss-Hermite rule.

    """
    affordable = 2 * int(DRAWS_WORK / (2 * max(noise_dim, FEWEST_COORDINATES) * num_rows))
    num_draws = num_draws or min(MOST_DRAWS, max(FEWEST_DRAWS, affordable))
    prior = stratified(prior_draws(noise_dim), noise_dim, rng)
    if num_draws >= 2 * noise_dim:
        everywhere = orthogonal(num_draws, noise_dim, rng)
        return Noise(everywhere, everywhere, prior)
    along = gauss_hermite(num_draws, noise_dim, rng, num_points)
    return Noise(along, gauss_hermite(num_points - 1, noise_dim, rng, num_points), prior)
