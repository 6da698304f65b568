"""Stochastic ADVI: minibatches of chunks, draws, a torch optimiser, an average of its iterates.

    θ ← θ + step(∇ÊLBO(θ)),   ∇ÊLBO from draws η_k = t(θ, ε_k) and  (C/m) Σ_{c in batch} ∇ℓ_c(η_k)

with C chunks in all and m in the batch: unbiased, ragged chunks included; by choice without most of the noise of which
rows were drawn (`dadvi.control`). Kucukelbir et al. (2017), "Automatic
differentiation variational inference"; averaging and stopping follow Dhaka et al. (2020), "Robust, accurate
stochastic optimization for variational inference". The search runs in coordinates whitened at a warm start, so a
learning rate is in posterior sds a step.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dadvi.checkpoint import Checkpoint, Journal, NoJournal
from dadvi.control import Anchor, Control, ControlVariate, Mixing
from dadvi.elbo import Design, Entropy, Estimate, draw_noise, log_joint
from dadvi.errors import InputError
from dadvi.executors import Executor
from dadvi.families import Family, Gaussian, MeanField, Params
from dadvi.fingerprint import ADDRESS, fingerprint
from dadvi.iterates import Iterates, Stretch
from dadvi.nonfinite import first_nonfinite
from dadvi.optim import (
    Averaging,
    OptimizerFactory,
    make_averaging,
    make_optimizer,
    make_schedule,
    settled,
    takes_energy_gradient,
)
from dadvi.passes import Gradient, single_thread
from dadvi.posterior import Fitted, Status, TraceRow
from dadvi.probing import find_structure
from dadvi.quadratic import DENSE_LIMIT, Certificate, Curvature, certify, curvature_chunks, measure_curvature
from dadvi.records import pack, record_classes, unpack
from dadvi.sharding import Manifest, sampling
from dadvi.structure import Arrowhead, Root, Structure
from dadvi.subsample import Subsample, warm_start, warn_if_ordered
from dadvi.types import FloatArray, IntArray, Purpose, is_number, random_stream
from dadvi.whitening import Whitening

LARGEST_BATCH, STEPS_PER_EPOCH = 65_536, 20
"""Without batch_rows: rows of a minibatch at most, and steps of an epoch at least, as far as chunks allow."""

STRETCH_STEPS = 25
"""Iterates are averaged and judged in stretches of whole epochs with at least this many steps."""

DEFAULT_PASSES = 50.0
DEFAULT_STEPS = 2_000
"""Without max_passes a run ends after `DEFAULT_PASSES`, or on small data after `DEFAULT_STEPS`, whichever is later."""

MAX_SKIPPED = 10
"""Steps in a row without a finite gradient before a run counts as diverged."""

ALLOWED_FALL = 10.0
"""Nats per coordinate by which the ELBO may fall below its best before a run counts as diverged.

In its first epochs a run is measured by its first step, and from one minibatch the ELBO is known only roughly: there it
may fall by as many nats per row besides.
"""


@dataclass(frozen=True)
class ADVI:
    """Settings of stochastic ADVI.

    Parameters
    ----------
    batch_rows
        Rows of a minibatch, rounded to whole chunks, at least one; None for a twentieth of the data, at most 65 536.
    num_draws
        K, draws of the latents a step.
    optimizer
        ``"adam"``, ``"sgd"``, ``"rmsprop"``, ``"adagrad"``, ``"dowg"`` (Khaled et al. 2023), ``"proximal"`` (Domke
        2020), or any first-order class of torch.optim that takes vectors and dense gradients, or a
        functools.partial of one.
    learning_rate
        In posterior sds; None for the optimiser's default.
    schedule
        ``"constant"``, ``"inverse_sqrt"`` or ``"cosine"``: how the learning rate changes on the way to `max_passes`.
    averaging
        ``"tail"``, ``"polynomial"``, ``"none"``, or a rule of `dadvi.optim`.
    estimator
        How the entropy enters: ``"closed_form"``, ``"stl"`` (path derivative) or ``"monte_carlo"``.
    design
        Of the draws: ``"random"``, ``"antithetic"`` or ``"orthogonal"``.
    fixed_draws
        The same noise at every step (sample-average approximation) instead of fresh noise.
    subsample_rows
        Rows of the resident subsample that the warm start is fitted to, rounded to whole chunks.
    rhat_max
        The average counts as settled when R-hat of the iterates is at most this and its MCSE at most a third of `tol`.
    control_variate
        ``"none"``, or ``"anchor"``: minibatch gradients are corrected by the full-data gradient at an anchor, the warm
        start's mean and later the average. It costs a pass for each anchor and one more point beside the draws of a
        step, and lets minibatches be smaller, so that an epoch has more steps.

    Raises
    ------
    InputError
        If a setting is out of its range.

    """

    batch_rows: int | None = None
    num_draws: int = 8
    optimizer: str | OptimizerFactory = "adam"
    learning_rate: float | None = None
    schedule: str = "inverse_sqrt"
    averaging: str | Averaging[Any] = "tail"
    estimator: Entropy = "closed_form"
    design: Design = "antithetic"
    fixed_draws: bool = False
    subsample_rows: int = 20_000
    rhat_max: float = 1.1
    control_variate: ControlVariate = "none"

    def __post_init__(self) -> None:
        for name in ("batch_rows", "subsample_rows"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value >= 1):
                raise InputError(f"{name}={value!r}: at least 1 row is needed")
        rate = self.learning_rate
        if rate is not None and not (is_number(rate) and 0 < rate < math.inf):
            raise InputError(f"learning_rate={rate!r}: it must be positive and finite, in posterior sds a step")
        for name, known in (("estimator", get_args(Entropy)), ("control_variate", get_args(ControlVariate))):
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}: use one of {', '.join(map(repr, known))}")
        draw_noise(self.design, self.num_draws, 1, np.random.default_rng(0))  # refuses an impossible design
        make_averaging(self.averaging)
        self.check(MeanField())

    def check(self, family: Family) -> None:
        """Refuse an optimiser or schedule that does not exist, or does not go with the family."""
        zero = torch.zeros(1, dtype=torch.float64)
        theta = family.init(zero, zero + 1, np.random.default_rng(0))
        make_schedule(self.schedule, self.make_optimizer(family, theta), 1)

    def make_optimizer(self, family: Family, theta: Params) -> torch.optim.Optimizer:
        """Return the optimiser of parameters θ.

        Raises
        ------
        InputError
            If there is no such optimiser, or it does not go with the family or the estimator.

        """
        entropy = {"entropy": True} if family.linear_scale else {}
        others = [parameter for name, parameter in theta.items() if name != "log_scale"]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": [theta["log_scale"]], **entropy}]
        optimizer = make_optimizer(self.optimizer, groups, self.learning_rate)
        if takes_energy_gradient(optimizer) and self.estimator != "closed_form":
            raise InputError(
                f"optimizer {self.optimizer!r} takes the step of the entropy by itself, so "
                f"estimator={self.estimator!r} "
                "has no place in it; use estimator='closed_form'"
            )
        return optimizer

    def batch_chunks(self, manifest: Manifest) -> int:
        """Return the chunks of a minibatch."""
        batch_rows = self.batch_rows or min(LARGEST_BATCH, manifest.num_rows / STEPS_PER_EPOCH)
        return min(manifest.num_chunks, max(1, round(batch_rows / manifest.chunk_rows)))

    def passes_at_most(self, manifest: Manifest, max_passes: float | None) -> float:
        """Return the passes at which a run ends at the latest."""
        steps_per_epoch = -(-manifest.num_chunks // self.batch_chunks(manifest))
        return max(DEFAULT_PASSES, DEFAULT_STEPS / steps_per_epoch) if max_passes is None else max_passes

    @property
    def points_at_most(self) -> int:
        """K, points of a pass at most."""
        return self.num_draws + (self.control_variate == "anchor")

    def describe(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: value if isinstance(value, str | int | float | None) else _described(value)
            for name, value in values.items()
        }

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

        Ends "converged" when the certificate is within `tol`, "stopped" at `max_passes`, "diverged" when steps are no
        longer finite or the ELBO falls far below its best. A certificate costs a pass: it is asked for once the
        average has settled, again each time the run has grown by half, and at the end.
        """
        search = _Search(self, executor, family, max_passes, seed, report, journal or NoJournal())
        try:
            while True:
                search.run_stretch()
                fitted = search.judge(tol)
                if fitted is not None:
                    return fitted
                search.move_anchor(tol)
        except BaseException as error:
            # Whatever stops a run, a reader's keyboard or a cluster that is gone, it can go on from here; bad rows,
            # which the first epoch checks for, leave nothing behind.
            if not (isinstance(error, InputError) and search.state.epoch == 0):
                search.keep()
            raise


def _described(value: object) -> dict[str, str]:
    """Return an object among the settings as JSON: by its name, and a digest of what it is."""
    return {"object": ADDRESS.sub("", repr(value)), "digest": fingerprint(value)}


@dataclass(frozen=True, eq=False)
class _State:
    """Where a search stands between two steps, but for θ and its optimiser, which torch moves in place."""

    average: Any  # of the iterates, as the averaging rule has it
    q: Gaussian  # the average after the last whole stretch
    control: Control | None
    rows_read: int
    step: int = 0  # steps taken
    epoch: int = 0  # epochs ended
    batch: int = 0  # minibatches of this epoch that are done
    skipped: int = 0  # steps in a row without a finite gradient
    elbo: float = -math.inf  # of the last stretch
    best_elbo: float = -math.inf
    stretch: Stretch = field(default_factory=Stretch)  # the one under way
    last: Stretch = field(default_factory=Stretch)  # the one before
    phase: Literal["steps", "judge", "move"] = "steps"  # what comes next
    history: tuple[FloatArray, ...] = ()  # mean iterate of every stretch (2D,)
    certified_at: int = 0  # stretches at the last certificate
    trace: tuple[TraceRow, ...] = ()


@dataclass(frozen=True, eq=False)
class _Kept:
    """All that a search needs to go on."""

    state: _State
    whitening: Whitening
    structure: Structure | None
    theta: dict[str, Tensor]
    optimizer: dict[str, Any]  # as torch describes it
    schedule: dict[str, Any]
    planned: float  # passes for which the schedule was made


KEPT = (
    *(_Kept, _State, Stretch, TraceRow, Whitening, Curvature, Arrowhead, Root, Structure),
    *(Gaussian, Control, Anchor, Mixing),
)
"""The records that this is made of, besides those of the averaging rule."""


class _Search:
    """The iterates of one run: where they are, how they got there, and their average."""

    def __init__(
        self,
        settings: ADVI,
        executor: Executor,
        family: Family,
        max_passes: float | None,
        seed: int,
        report: Callable[[TraceRow], None],
        journal: Journal,
    ) -> None:
        manifest = executor.data.manifest
        self.settings, self.executor, self.family, self.seed = settings, executor, family, seed
        self._report, self._journal = report, journal
        self.batch_chunks = settings.batch_chunks(manifest)
        self.steps_per_epoch = -(-manifest.num_chunks // self.batch_chunks)
        self.stretch_epochs = -(-STRETCH_STEPS // self.steps_per_epoch)
        self.max_passes = settings.passes_at_most(manifest, max_passes)
        self.trouble = ""
        self._started = time.perf_counter()
        self._moving = False
        self._draws = torch.empty(0)  # of the last step (K, D)
        self._subsample = sampling.subsample(manifest, sampling.chunks_for(manifest, settings.subsample_rows), seed)
        self._other_rows = int(manifest.chunk_sizes[self._subsample].sum())

        dim = executor.model.model.dim
        zeros, ones = torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)
        theta = family.init(zeros, ones, random_stream(seed, Purpose.FAMILY))
        for parameter in theta.values():
            parameter.requires_grad_()
        self.averaging = make_averaging(settings.averaging)
        last = journal.last()
        kept = None if last is None else self._unpacked(last, theta)
        self.planned = self.max_passes if kept is None else kept.planned
        self._refuse_longer_cosine()
        optimizer = settings.make_optimizer(family, theta)
        schedule = make_schedule(settings.schedule, optimizer, math.ceil(self.planned * self.steps_per_epoch))
        self.iterates = Iterates(theta, optimizer, schedule)
        if kept is None:
            self._begin()
        else:
            self._restore(kept)
            self._started -= last.seconds if last is not None else 0.0
        chosen = curvature_chunks(manifest, self.structure, seed)
        self._certificate_passes = 1 + int(manifest.chunk_sizes[list(chosen)].sum()) / manifest.num_rows

    def _begin(self) -> None:
        """Whiten the coordinates at a warm start, and put the anchor there."""
        self.whitening, self.structure = self._warm_start()
        center = self.whitening.center
        average = self.averaging.init(self.iterates.theta)
        q = self.whitening.member(self.averaging.value(average))
        anchor = self._anchor(center, torch.zeros_like(center)) if self.settings.control_variate == "anchor" else None
        self.state = _State(average, q, None if anchor is None else Control(anchor), self.executor.rows_read)

    def _warm_start(self) -> tuple[Whitening, Structure | None]:
        """Fit the resident subsample, then measure the curvature of the full-data log posterior about its mean."""
        manifest, data, model = self.executor.data.manifest, self.executor.data, self.executor.model
        subsample = Subsample.load(model, data, self._subsample.tolist())
        full = self.family.takes_rotation and model.model.dim <= DENSE_LIMIT
        structure = Structure.full(model.model.dim) if full else find_structure(subsample, self.seed)
        q = warm_start(subsample, structure, self.seed)
        warn_if_ordered(subsample, q.loc)
        chosen = curvature_chunks(manifest, structure, self.seed)
        curvature = measure_curvature(self.executor, q.loc[None], chosen, self.seed, structure)
        found = Whitening.around(self.family, q.loc, curvature), structure
        canonical: tuple[Whitening, Structure | None] = unpack(pack(found, self._known), KEPT, self._known)
        return canonical  # as a resumed run has it

    def _anchor(self, eta: Tensor, location: Tensor) -> Anchor | None:
        """Return the anchor at η (D,), unless the data have no finite gradient there."""
        anchor = Anchor.at(self.executor, eta, location)
        return anchor if anchor.finite else None

    # From and to the journal -----------------------------------------------------------------------------------------

    @property
    def _known(self) -> dict[str, object]:
        return {"family": self.family}

    def keep(self) -> None:
        """Write down where the search stands, unless it was stopped in the middle of a move."""
        if self._moving:
            return
        state = replace(self.state, trace=())
        kept = _Kept(state, self.whitening, self.structure, *self.iterates.describe(), self.planned)
        self._journal.save(Checkpoint(pack(kept, self._known), self.state.trace, self._seconds))

    def _unpacked(self, last: Checkpoint, theta: Params) -> _Kept:
        classes = {*KEPT, *record_classes(self.averaging.init(theta))}
        kept: _Kept = unpack(last.state, classes, self._known)
        return replace(kept, state=replace(kept.state, trace=last.trace))

    def _restore(self, kept: _Kept) -> None:
        self.state, self.whitening, self.structure = kept.state, kept.whitening, kept.structure
        self.executor.rows_read = kept.state.rows_read
        if kept.state.trace:
            self.executor.profile = kept.state.trace[-1].profile
        self.iterates.restore(kept.theta, kept.optimizer, kept.schedule)

    def _refuse_longer_cosine(self) -> None:
        if self.settings.schedule == "cosine" and self.max_passes > self.planned:
            raise InputError(
                f"max_passes={self.max_passes:g}: schedule='cosine' took the learning rate to 0 at {self.planned:g} "
                "passes, and nothing moves beyond; fit again with more passes, or with another schedule"
            )

    # How far the run may go ------------------------------------------------------------------------------------------

    @property
    def passes(self) -> float:
        """Rows read so far, over N."""
        return (self.executor.rows_read + self._other_rows) / self.executor.data.num_rows

    @property
    def exhausted(self) -> bool:
        """Whether another epoch and the certificate after it would exceed the run's passes."""
        return not self._affords(1)

    def _affords(self, passes: int) -> bool:
        """Whether the run's passes allow for so many and a certificate."""
        return self.passes + passes + self._certificate_passes <= self.max_passes

    # Steps -----------------------------------------------------------------------------------------------------------

    def run_stretch(self) -> None:
        """Take the steps of some whole epochs that are left of a stretch; then move `q` to the new average."""
        manifest = self.executor.data.manifest
        while self._stepping():
            order = sampling.epoch_order(manifest, self.seed, self.state.epoch)
            for chunks in sampling.batches(order, self.batch_chunks)[self.state.batch :]:
                self._take_step(chunks)
                if not self._stepping():
                    return
                if self._journal.due:
                    self.keep()
            self._end_epoch()

    def _stepping(self) -> bool:
        return self.state.phase == "steps" and not self.trouble

    def _end_epoch(self) -> None:
        state, stretch = self.state, replace(self.state.stretch, epochs=self.state.stretch.epochs + 1)
        control = None if state.control is None else state.control.end_epoch()
        state = replace(state, epoch=state.epoch + 1, batch=0, control=control, stretch=stretch)
        if stretch.epochs == self.stretch_epochs or self.exhausted:
            if stretch.elbo < state.best_elbo - ALLOWED_FALL * state.q.dim:
                fall = f"from {state.best_elbo:.8g} to {stretch.elbo:.8g}"
                self.trouble = f"the ELBO fell {fall} at step {state.step}; lower the learning rate"
                return
            average = self.averaging.end_epoch(state.average)
            state = replace(
                state,
                elbo=stretch.elbo,
                best_elbo=max(state.best_elbo, stretch.elbo),
                average=average,
                q=self.whitening.member(self.averaging.value(average)),
                history=(*state.history, np.asarray(stretch.iterate)),
                last=stretch,
                stretch=Stretch(),
                phase="judge",
            )
        self.state = state

    def _take_step(self, chunks: IntArray) -> None:
        est, control = self._estimate(chunks)
        state = replace(
            self.state,
            step=self.state.step + 1,
            batch=self.state.batch + 1,
            control=control,
            rows_read=self.executor.rows_read,
        )
        grad = est.energy_grad if self.iterates.energy_only else est.grad
        if not (math.isfinite(est.elbo) and all(bool(g.isfinite().all()) for g in grad.values())):
            self.state = state = replace(state, skipped=state.skipped + 1)
            if state.skipped >= MAX_SKIPPED:
                trouble = f"{state.skipped} steps in a row up to step {state.step} had no finite gradient"
                self.trouble = "; ".join(filter(None, [trouble, first_nonfinite(self.executor, self._draws, chunks)]))
            return
        best = est.elbo - ALLOWED_FALL * self.executor.data.num_rows if state.step == 1 else state.best_elbo
        self._moving = True  # from here on θ and the state are not of the same step
        self.iterates.step(grad)
        if not self.iterates.is_gaussian:
            self.trouble = (
                f"step {state.step} left a scale or mean that is not finite or not positive; lower the learning rate"
            )
            return
        self.state = replace(
            state,
            skipped=0,
            best_elbo=best,
            average=self.averaging.update(state.average, self.iterates.theta),
            stretch=state.stretch.add(len(chunks), est.elbo, self.iterates.vector),
        )
        self._moving = False
        self._report(self._row("step", est.elbo))

    def _estimate(self, chunks: IntArray) -> tuple[Estimate, Control | None]:
        """Return the ELBO of θ and its gradient, from one minibatch, and the control variate that has seen it."""
        settings, step, control = self.settings, self.state.step + 1, self.state.control
        rng = random_stream(self.seed, Purpose.DRAWS, 0 if settings.fixed_draws else step)
        dim = self.family.noise_dim(self.state.q.dim)
        noise = draw_noise(settings.design, settings.num_draws, dim, rng, fixed=settings.fixed_draws)
        factor = self.executor.data.manifest.num_chunks / len(chunks)

        def scaled_log_joint(eta: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal control
            self._draws = eta
            points = eta.numpy() if control is None else control.points(eta)
            check = self.state.epoch == 0
            sums = self.executor.run(Gradient(points), chunks, check=check, label=f"step {step}")
            if control is None:
                log_lik, grad = (factor * torch.from_numpy(part) for part in sums)
            else:
                log_lik, grad = control.estimate(sums, factor)
                control = control.observe(sums, factor, self.whitening.curvature.root_transpose_times)
            return log_joint(self.executor.model.model, eta, log_lik, grad)

        return self.whitening.estimate(self.iterates.theta, noise, scaled_log_joint, settings.estimator), control

    # Between stretches -----------------------------------------------------------------------------------------------

    def judge(self, tol: float) -> Fitted | None:
        """Tell whether the average has settled, and how near the optimum it is; return the result if the run ends."""
        if self.trouble:
            return self._fitted("diverged", f"{self.trouble}; the result is the average before that")
        if self.state.phase != "judge":
            return None
        state = self.state
        settling = settled(np.stack(state.history), tol / 3, self.settings.rhat_max)
        rows = [self._row("epochs", state.elbo, rhat=settling.rhat, mcse=settling.mcse)]
        self._report(rows[0])
        certified_at = state.certified_at
        if self.exhausted or (settling.settled and len(state.history) >= 1.5 * certified_at):
            certified_at = len(state.history)
            self.keep()  # here a run goes on that stopped, when it is allowed more passes
            certificate, elbo, curvature = certify(self.executor, state.q, self.seed, self.structure)
            rows.append(self._row("certificate", elbo, certificate=certificate.max if certificate else math.nan))
            self._report(rows[1])
            found = (elbo, certificate, curvature, tuple(rows))
            if certificate is not None and certificate.within(tol):
                return self._fitted("converged", f"the certificate is within tol={tol:g}", *found)
            if certificate is None and settling.settled:
                reason = (
                    f"the average settled; with {state.q.dim} coordinates, over {DENSE_LIMIT} and without "
                    "structure, no certificate"
                )
                return self._fitted("stopped", reason, *found)
            if self.exhausted:
                how = "after its average had settled" if settling.settled else "before its average settled"
                return self._fitted("stopped", f"max_passes={self.max_passes:g} reached, {how}", *found)
        self.state = replace(
            state,
            phase="move",
            certified_at=certified_at,
            rows_read=self.executor.rows_read,
            trace=(*state.trace, *rows),
        )
        return None

    def move_anchor(self, tol: float) -> None:
        """Move the anchor to the average, if that is worth a pass and an epoch can follow."""
        state, control = self.state, self.state.control
        if control is not None and self._affords(2):
            average = self.averaging.value(state.average)["loc"]
            to_anchor = state.last.distance(control.anchor.location.numpy())
            if control.outdated(to_anchor, state.last.distance(average.numpy()), state.last.steps, tol):
                anchor = self._anchor(state.q.loc, average)
                row = self._row("anchor", state.elbo)
                self._report(row)
                control = control if anchor is None else Control(anchor)
                state = replace(state, control=control, trace=(*state.trace, row), rows_read=self.executor.rows_read)
        self.state = replace(state, phase="steps")

    # What is told ----------------------------------------------------------------------------------------------------

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _row(self, phase: str, elbo: float, **figures: float) -> TraceRow:
        rows_read = self.executor.rows_read + self._other_rows
        profile = asdict(self.executor.profile)
        return TraceRow(phase, self.state.step, self.passes, rows_read, self._seconds, elbo, **profile, **figures)

    def _fitted(
        self,
        status: Status,
        reason: str,
        elbo: float | None = None,
        certificate: Certificate | None = None,
        curvature: Curvature | None = None,
        rows: tuple[TraceRow, ...] = (),
    ) -> Fitted:
        """Return the result."""
        return Fitted(
            q=self.state.q,
            status=status,
            reason=reason,
            elbo=self.state.elbo if elbo is None else elbo,
            passes=self.passes,
            certificate=certificate,
            trace=(*self.state.trace, *rows),
            curvature=curvature,
        )
