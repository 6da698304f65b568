"""The anchored solver: rounds of one pass each, around a local model of the full-data log posterior.

A round visits an anchor: one pass over the data measures a `LocalModel` there, which gives the ELBO, the gradient and
the curvature on all the data, and so the certificate. Then q moves to the local model's optimum, without touching the
data, and the next round visits the new mean. A step is kept if the next visit finds that the ELBO, at common draws,
rose; if not, the run goes back and takes a shorter one. Where steps fail, L-BFGS on all the data takes over.

All that a run knows beyond its subsample is a `_State`, which every pass makes anew: written down, the run can go on.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

import numpy as np
import torch

from dadvi.acceleration import DEPTH, Iterate
from dadvi.checkpoint import Checkpoint, Journal, NoJournal
from dadvi.descent import Evaluation, descend
from dadvi.elbo import draw_noise
from dadvi.errors import InputError
from dadvi.executors import Executor
from dadvi.families import Family, Gaussian, MeanField
from dadvi.local import (
    NEGLIGIBLE_NATS,
    SOLVED,
    Bends,
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
from dadvi.nonfinite import first_nonfinite
from dadvi.passes import single_thread
from dadvi.posterior import Fitted, Status, TraceRow
from dadvi.probing import find_structure
from dadvi.quadratic import DENSE_LIMIT, Certificate, Curvature
from dadvi.quadrature import Rule
from dadvi.records import pack, unpack
from dadvi.scales import Scales
from dadvi.sharding import Manifest, sampling
from dadvi.starting import TAYLOR_DRAWS, CurvatureFrom, Search, Start
from dadvi.structure import Arrowhead, Root, Structure
from dadvi.subsample import Subsample

DEFAULT_PASSES = 30.0
SUBSAMPLE_ROWS, ROWS_PER_COORDINATE = 20_000, 200
"""Rows of the resident subsample, or for each dense coordinate if that is more, unless told otherwise."""

ROOT_ROWS = 6.0
"""The subsample has at least this many times √(N D) rows, D counting dense coordinates.

With n rows a run starts about √(N/n) posterior sds from its end, and a round leaves √(D/n) of that: after the second
round about N^½ D / n^{3/2}, which falls with N.
"""

COUPLED = 0.1
"""How much nearer a search gets, after the warm start, where there are groups: a scale that effects share follows all
their sds, slowly."""

OF_WHAT_IS_LEFT = 0.3
"""How near a search on a surrogate gets, of the distance that its round leaves anyway."""

ELBO_NOISE = 1e-7
"""Relative error of an ELBO from float32 rows: a smaller fall is no fall."""

NEAR = 6.0
"""Length of a step, in posterior sds, up to which rounds are accelerated."""

FARTHEST = 8.0
"""Length of the first step, in posterior sds given the subsample alone: the posterior of all the data lies nearer."""

MOSTLY = 1.5
"""A certificate below this many times its floor is mostly the error of the draws, which no step makes smaller."""

MOST_DRAWS_ADVISED = 10_000
"""Draws beyond which more are no remedy for what the draws leave unknown."""

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
        coordinate, and 6 √(N D); where there are effects of groups all rows of these chunks. Of those, curvatures are
        measured on 20 000, or 200 for each dense coordinate.
    num_draws
        K, draws of q at which expectations of the likelihood are taken, besides its mean; None for as many, from 4 to
        256, as keep K times coordinates times rows of the subsample within 2 million: small data have wide, skewed
        posteriors. With the curvature of all the data 32, or fewer if a subsample that sees every group well says that
        these leave little unknown.
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
        journal: Journal | None = None,
    ) -> Fitted:
        """Fit the family on the executor's data, from the journal's last checkpoint if it has one.

        Ends "converged" when the certificate is within `tol`; "stopped" at `max_passes`, when no step raises the ELBO
        any more, or when the draws leave more than `tol` unknown; "diverged" when the log posterior on all the data is
        not finite where the warm start ended.
        """
        passes = self.passes_at_most(executor.data.manifest, max_passes)
        run = _Rounds(self, executor, family, tol, passes, seed, report, journal or NoJournal())
        state = run.begin()
        if not (math.isfinite(state.here.seen.elbo) and state.here.seen.grad.isfinite().all()):
            reason = "the log posterior is not finite at the first anchor"
            return run.fitted(state, "diverged", "; ".join(filter(None, [reason, run.second_look(state)])))
        while True:
            state = run.keep(state)
            aim = run.aim(state)
            if state.certificate is None:
                state = run.judge(state, aim)
            if state.certificate is not None and state.certificate.within(tol):
                return run.fitted(state, "converged", f"the certificate is within tol={tol:g}")
            if state.here.seen.curvature.flat:
                reason = "the log posterior is flat in some direction, so it has no optimum; give proper priors"
                return run.fitted(state, "stopped", reason)
            if run.exhausted:
                return run.fitted(state, "stopped", f"max_passes={run.max_passes:g} reached")
            if (unknown := run.unknown(state)) is not None:
                return run.fitted(state, "stopped", unknown)
            after = run.step(state, aim)
            if after is None:
                spent = f"max_passes={run.max_passes:g} reached" if run.exhausted else "no step raises the ELBO"
                return run.fitted(state, "stopped", spent)
            state = after


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
    history: tuple[Iterate, ...]  # of the state, if the step is taken


@dataclass(frozen=True, eq=False)
class _State:
    """Where a run stands after a pass."""

    start: Start
    here: _Visit
    visits: int
    rows_read: int
    radius: float = FARTHEST  # how far a step may go, in units of the start
    history: tuple[Iterate, ...] = ()  # rounds since which no step was long or rejected
    certificate: Certificate | None = None  # of `here`, once it is judged
    rejected: int = 0  # steps from here that did not raise the ELBO
    evaluations: tuple[Evaluation, ...] = ()  # that the last resort has made from here
    trace: tuple[TraceRow, ...] = ()


STATE = (
    *(_State, Start, _Visit, Noise, Rule, Iterate, Certificate, Evaluation, TraceRow),
    *(Gaussian, Surrogate, Taylor, Scales, Expectations, Curvature, Arrowhead, Root, Structure),
)
"""The records that a state is made of."""


class _Rounds:
    """One run: its subsample, and what it does with a state."""

    def __init__(
        self,
        settings: Anchored,
        executor: Executor,
        family: Family,
        tol: float,
        max_passes: float,
        seed: int,
        report: Callable[[TraceRow], None],
        journal: Journal,
    ) -> None:
        self.executor, self.family, self.tol, self.max_passes = executor, family, tol, max_passes
        self.seed, self._report, self._journal = seed, report, journal
        self.prior = executor.model.model
        self._started = time.perf_counter()
        self._load(settings.subsample_rows)
        near = tol * (COUPLED if self.structure.groups.numel() else 1.0)
        self._search = Search(
            self.subsample, self.structure, self.factor, family, settings.num_draws, settings.curvature, tol, near, seed
        )
        self._known = {
            "subsample": self.subsample,
            "structure": self.structure,
            "family": family,
            "prior draws": self._search.noise.prior,
        }

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
        self.structure: Structure = structure
        rows = None
        if subsample_rows is None:
            num_dense = len(structure.dense)
            enough = max(SUBSAMPLE_ROWS, ROWS_PER_COORDINATE * num_dense)
            rows = max(enough, int(ROOT_ROWS * math.sqrt(manifest.num_rows * num_dense)))
            more = sampling.subsample(manifest, sampling.chunks_for(manifest, rows), self.seed)
            self.subsample = replace(self.subsample, curvature_rows=enough).extended(data, more.tolist())
        self._rows_of_subsample = self.subsample.num_rows
        self.factor = manifest.num_chunks / len(self.subsample.batches)
        if self.factor == 1:  # the fit is exact, and so are its curvatures
            self.subsample = replace(self.subsample, curvature_rows=math.inf)
        elif rows is not None and not structure.groups.numel():  # of each group there are few rows: all are of use
            part = self.subsample.top(math.ceil(rows / len(self.subsample.batches)))
            if part.num_rows < self.subsample.num_rows:
                self.factor *= self.subsample.num_rows / part.num_rows
                self.subsample = part.copied()

    # From and to the journal -----------------------------------------------------------------------------------------

    def begin(self) -> _State:
        """Return the state of the journal's last checkpoint, or else that after the warm start and a first pass."""
        last = self._journal.last()
        if last is None:
            start, bends = self._search.find()
            here = self._visit(start, start.q, 1, bends)
            return _State(start, here, visits=1, rows_read=self.executor.rows_read)
        state: _State = unpack(last.state, STATE, self._known)
        self.executor.rows_read = state.rows_read
        if last.trace:
            self.executor.profile = last.trace[-1].profile
        self._started -= last.seconds
        return replace(state, trace=last.trace)

    def keep(self, state: _State) -> _State:
        """Write a state down, and return its canonical form, from which the run is to go on."""
        packed = pack(replace(state, trace=()), self._known)
        self._journal.save(Checkpoint(packed, state.trace, self._seconds))
        canonical: _State = unpack(packed, STATE, self._known)
        return replace(canonical, trace=state.trace)

    # Rounds ----------------------------------------------------------------------------------------------------------

    def _visit(
        self,
        start: Start,
        q: Gaussian,
        number: int,
        known: Bends | None = None,
        before: LocalModel | None = None,
        length: float = math.nan,
    ) -> _Visit:
        """Measure the local model at q by one pass over the data.

        Parameters
        ----------
        number
            Of the visit, counted from 1.
        known
            What q sees of a surrogate, or its second derivatives alone, where that is known: the next surrogate differs
            by a linear function.
        before
            That surrogate.
        length
            Of the step that led to q.

        """
        check, label, noise = number == 1, f"round {number}", start.noise
        if start.scales is not None:
            taylor = Taylor.measured(self.executor, q, noise, start.scales, check=check, label=label)
            return _Visit(q, taylor, noise.expectations(self.prior, taylor, q), length)
        local = Surrogate.measured(
            self.subsample, self.structure, self.factor, self.executor, q.loc, check=check, label=label
        )
        if isinstance(known, Expectations) and isinstance(before, Surrogate):
            return _Visit(q, local, known.plus(*local.less(before, q.loc)), length)
        return _Visit(q, local, noise.expectations(self.prior, local, q, known), length)

    def aim(self, state: _State) -> _Aim:
        """Return the local model's optimum, as far as the radius allows, or what is better.

        What the local model lacks makes rounds converge linearly, such as third-order terms in a hierarchy; once they
        are near, acceleration takes its place.
        """
        here, unit, near = state.here, state.start.unit, self._near(state.here)
        # The way to an optimum within the radius may lead beyond it: along a ridge that bends.
        for radius in (math.inf, state.radius) if state.radius == FARTHEST else (state.radius,):
            tol = min(near, radius)
            q, seen = solve(self.prior, here.local, here.q, here.seen, state.start.noise, tol, radius, unit)
            if distance(here.q, q, unit) <= state.radius:
                break
        far = distance(here.q, q, here.seen.curvature.stddev) > NEAR or distance(here.q, q, unit) > state.radius / 2
        gain = seen.elbo - here.seen.elbo
        if far:  # the optimum is far, or the radius cut the way to it
            return _Aim(q, seen, gain, ())
        history = (*state.history, iterate(here.q, q, unit))[-DEPTH - 1 :]
        faster = accelerated_member(here.q, history, unit)
        return _Aim(q, seen, gain, history) if faster is None else _Aim(faster, None, gain, history)

    def _near(self, here: _Visit) -> float:
        """Return the tolerance of the search from here.

        A round on a surrogate leaves about √(D/n) of the distance, however near its search gets.
        """
        near = self._search.near
        if self.factor == 1 or self.structure.groups.numel() or not isinstance(here.local, Surrogate):
            return near
        left = min(1.0, math.sqrt(self.prior.dim / self.subsample.num_rows))
        first = distance(here.q, here.seen.target(here.q), here.seen.curvature.stddev)
        return max(near, OF_WHAT_IS_LEFT * left * first / SOLVED)

    def judge(self, state: _State, aim: _Aim) -> _State:
        """Return the state with the certificate of where it stands, and a row of the trace that tells it."""
        here = state.here
        seen = here.seen
        certificate = seen.certificate(here.q).or_farther(here.q, aim.q, seen.curvature, seen.grad_errors)
        certificate = replace(certificate, sd_error=math.hypot(certificate.sd_error, state.start.sd_noise))
        return self.record(replace(state, certificate=certificate), here)

    def unknown(self, state: _State) -> str | None:
        """Return in words what no step can tell, where that is more than the tolerance; None if a step can."""
        certificate, num_draws = state.certificate, len(state.start.noise.likelihood.nodes) // 2 * 2  # without 0
        if certificate is None:
            return None
        if certificate.max <= self.tol < state.start.sd_noise:
            rows = self.subsample.for_curvature.num_rows
            return (
                f"{rows} rows tell sds to {state.start.sd_noise:.2g} of themselves, and tol={self.tol:g}; use "
                "method=Anchored(curvature='auto'), or a larger tol"
            )
        if certificate.floor <= self.tol or certificate.max > MOSTLY * certificate.floor:
            return None
        enough = 2 * math.ceil(num_draws * (certificate.floor / self.tol) ** 2)  # the error falls like 1/√K
        more = f"method=Anchored(num_draws={enough}), or " if enough <= MOST_DRAWS_ADVISED else ""
        return (
            f"{num_draws} draws of the posterior leave {certificate.floor:.2g} sds of the optimum unknown, more than "
            f"tol={self.tol:g}; use {more}a larger tol"
        )

    def step(self, state: _State, aim: _Aim) -> _State | None:
        """Move to where it was aimed, and stay there if the ELBO rose; go less far next time if not.

        Where there is nowhere to go, or too many steps were rejected, the last resort moves the mean; None if it finds
        nothing better, or passes run out.
        """
        here, unit = state.here, state.start.unit
        if aim.q is here.q or state.rejected == MOST_REJECTED:
            return self._descend(state)
        length, visits = distance(here.q, aim.q, unit), state.visits + 1
        of_step = distance(here.q, aim.q, here.seen.curvature.stddev)
        there = self._visit(state.start, aim.q, visits, aim.seen, here.local, of_step)
        state = replace(state, visits=visits, rows_read=self.executor.rows_read)
        # Where E_q[∇ log π] = 0, the ELBO at these draws is not quite the largest; coordinates add up at random.
        slack = NEGLIGIBLE_NATS * math.sqrt(self.prior.dim) + ELBO_NOISE * abs(here.seen.elbo)
        gain = state.start.noise.gain(here.seen, there.seen, there.q)
        if gain >= -slack:  # False for nan
            radius = _adapted(state.radius, gain, aim.gain, length)
            return replace(
                state, here=there, radius=radius, history=aim.history, certificate=None, rejected=0, evaluations=()
            )
        state = self.record(state, there, phase="rejected")
        return replace(state, radius=min(state.radius, length) / 4, history=(), rejected=state.rejected + 1)

    def _descend(self, state: _State) -> _State | None:
        """Move the mean by the last resort; None if it finds nothing better, or passes run out."""
        here = state.here
        done = len(state.evaluations) * self.executor.data.num_rows
        passes_left = int(self.max_passes - self._passes(self.executor.rows_read - done))
        if passes_left < 2:  # one evaluation, and the visit after it
            return None

        def record(evaluation: Evaluation) -> None:
            nonlocal state
            row = self._row(state, "descent", evaluation.value + float(here.q.entropy()))
            evaluations = (*state.evaluations, evaluation)
            state = self._add(replace(state, evaluations=evaluations, rows_read=self.executor.rows_read), row)
            self.keep(state)

        evaluations = min(DESCENT_PASSES, passes_left - 1)
        curvature, enough = here.seen.curvature, SOLVED * self.tol
        q = descend(self.executor, here.q, curvature, state.start.noise, enough, evaluations, record, state.evaluations)
        if q is None:
            return None
        visits, length = state.visits + 1, distance(here.q, q, curvature.stddev)
        there = self._visit(state.start, q, visits, length=length)
        return _State(state.start, there, visits=visits, rows_read=self.executor.rows_read, trace=state.trace)

    # What is told ----------------------------------------------------------------------------------------------------

    @property
    def exhausted(self) -> bool:
        """Whether another round would exceed the run's passes."""
        return self._passes(self.executor.rows_read) + 1 > self.max_passes

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _passes(self, rows_read: int) -> float:
        """Return the rows read, those of the subsample included, over N."""
        return (rows_read + self._rows_of_subsample) / self.executor.data.num_rows

    def record(self, state: _State, there: _Visit, phase: str = "round") -> _State:
        """Return the state with a row in the trace for a visit, and report the row."""
        largest = math.nan if phase == "rejected" or state.certificate is None else state.certificate.max
        return self._add(state, self._row(state, phase, there.seen.elbo, certificate=largest, length=there.length))

    def _row(self, state: _State, phase: str, elbo: float, **figures: float) -> TraceRow:
        rows_read = self.executor.rows_read
        return TraceRow(
            phase=phase,
            step=state.visits,
            passes=self._passes(rows_read),
            rows_read=rows_read + self._rows_of_subsample,
            seconds=self._seconds,
            elbo=elbo,
            **asdict(self.executor.profile),
            **figures,
        )

    def _add(self, state: _State, row: TraceRow) -> _State:
        self._report(row)
        return replace(state, trace=(*state.trace, row))

    def second_look(self, state: _State) -> str:
        """Return in words which row made the log-likelihood infinite or nan, at q's mean (draw 0) or its draws."""
        q = state.here.q
        return first_nonfinite(self.executor, torch.cat([q.loc[None], q.transform(state.start.noise.likelihood.nodes)]))

    def fitted(self, state: _State, status: Status, reason: str) -> Fitted:
        """Return the result."""
        here, passes = state.here, self._passes(self.executor.rows_read)
        curvature = here.seen.curvature
        return Fitted(here.q, status, reason, here.seen.elbo, passes, state.certificate, state.trace, curvature)


def _adapted(radius: float, gain: float, predicted: float, length: float) -> float:
    """Trust the local model farther, or less far, after a step (Nocedal & Wright 2006, algorithm 4.1)."""
    if gain < 0.25 * predicted:
        return length / 2
    return max(radius, 2 * length) if gain > 0.75 * predicted else radius
