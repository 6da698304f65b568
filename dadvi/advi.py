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
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from dadvi.control import Anchor, Control, ControlVariate
from dadvi.elbo import Design, Entropy, Estimate, draw_noise, log_joint
from dadvi.errors import InputError
from dadvi.executors import Executor
from dadvi.families import Family, MeanField, Params
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
from dadvi.sharding import Manifest, sampling
from dadvi.structure import Structure
from dadvi.subsample import Subsample, warm_start, warn_if_ordered
from dadvi.types import FloatArray, IntArray, Purpose, random_stream
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
        2020), or any first-order class of torch.optim, or a functools.partial of one.
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
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: at least 1 row is needed")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise InputError(
                f"learning_rate={self.learning_rate}: it must be positive and finite, in posterior sds a step"
            )
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
            name: value if isinstance(value, str | int | float | None) else repr(value)
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
    ) -> Fitted:
        """Fit the family on the executor's data.

        Ends "converged" when the certificate is within `tol`, "stopped" at `max_passes`, "diverged" when steps are no
        longer finite or the ELBO falls far below its best. A certificate costs a pass: it is asked for once the
        average has settled, again each time the run has grown by half, and at the end.
        """
        search = _Search(self, executor, family, max_passes, seed, report)
        certified_at = 0
        while True:
            search.run_stretch()
            if search.trouble:
                return search.fitted("diverged", f"{search.trouble}; the result is the average before that")
            settling = settled(np.stack(search.history), tol / 3, self.rhat_max)
            search.record("epochs", search.elbo, rhat=settling.rhat, mcse=settling.mcse)
            if search.exhausted or (settling.settled and len(search.history) >= 1.5 * certified_at):
                certified_at = len(search.history)
                certificate, elbo, curvature = certify(executor, search.q, seed, search.structure)
                search.record("certificate", elbo, certificate=certificate.max if certificate else math.nan)
                if certificate is not None and certificate.within(tol):
                    return search.fitted(
                        "converged", f"the certificate is within tol={tol:g}", elbo, certificate, curvature
                    )
                if certificate is None and settling.settled:
                    reason = (
                        f"the average settled; with {search.q.dim} coordinates, over {DENSE_LIMIT} and without "
                        "structure, no certificate"
                    )
                    return search.fitted("stopped", reason, elbo)
                if search.exhausted:
                    how = "after its average had settled" if settling.settled else "before its average settled"
                    reason = f"max_passes={search.max_passes:g} reached, {how}"
                    return search.fitted("stopped", reason, elbo, certificate, curvature)
            search.move_anchor(tol)


@dataclass(eq=False)
class _Stretch:
    """Running means over the steps of some whole epochs."""

    weight: int = 0
    elbo: float = 0.0
    iterate: FloatArray | float = 0.0  # (2D,): v and log scale
    square: FloatArray | float = 0.0  # (D,): v²
    steps: int = 0

    def add(self, weight: int, elbo: float, iterate: FloatArray) -> None:
        self.steps += 1
        self.weight += weight
        share = weight / self.weight
        self.elbo += (elbo - self.elbo) * share
        self.iterate = self.iterate + (iterate - self.iterate) * share
        with np.errstate(over="ignore", invalid="ignore"):  # where steps are about to diverge
            self.square = self.square + (iterate[: len(iterate) // 2] ** 2 - self.square) * share

    def distance(self, location: FloatArray) -> float:
        """Return the RMS distance of the locations v from a point (D,), in posterior sds."""
        mean = np.asarray(self.iterate)[: len(location)]
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.sqrt(np.maximum(self.square - 2 * location * mean + location**2, 0).mean()))


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
    ) -> None:
        manifest = executor.data.manifest
        self.settings, self.executor, self.family, self.seed, self._report = settings, executor, family, seed, report
        self.batch_chunks = settings.batch_chunks(manifest)
        steps_per_epoch = -(-manifest.num_chunks // self.batch_chunks)
        self.stretch_epochs = -(-STRETCH_STEPS // steps_per_epoch)
        self.max_passes = settings.passes_at_most(manifest, max_passes)
        self.step = self.epoch = self.skipped = 0
        self.trace: list[TraceRow] = []
        self.history: list[FloatArray] = []
        self.elbo = self.best_elbo = -math.inf
        self.trouble = ""
        self._started = time.perf_counter()
        self._other_rows = 0

        self.whitening = self._whitening()
        dim = len(self.whitening.center)
        zeros, ones = torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)
        self.theta = family.init(zeros, ones, random_stream(seed, Purpose.FAMILY))
        for parameter in self.theta.values():
            parameter.requires_grad_()
        self.optimizer = settings.make_optimizer(family, self.theta)
        self.energy_only = takes_energy_gradient(self.optimizer)
        self.schedule = make_schedule(settings.schedule, self.optimizer, math.ceil(self.max_passes * steps_per_epoch))
        self.averaging = make_averaging(settings.averaging)
        self.average = self.averaging.init(self.theta)
        self.q = self.whitening.member(self.averaging.value(self.average))
        self.last = _Stretch()
        self.control: Control | None = None
        if settings.control_variate == "anchor":
            self._anchor(self.whitening.center, zeros)

    def _anchor(self, eta: Tensor, location: Tensor) -> None:
        """Put the anchor at η (D,), unless the data have no finite gradient there."""
        anchor = Anchor.at(self.executor, eta, location)
        if anchor.finite:
            self.control = Control(anchor)

    def _whitening(self) -> Whitening:
        """Fit the resident subsample, then measure the curvature of the full-data log posterior about its mean."""
        manifest, data = self.executor.data.manifest, self.executor.data
        num_chunks = sampling.chunks_for(manifest, self.settings.subsample_rows)
        chunks = sampling.subsample(manifest, num_chunks, self.seed)
        self._other_rows = int(manifest.chunk_sizes[chunks].sum())
        subsample = Subsample.load(self.executor.model, data, chunks.tolist())
        full = self.family.takes_rotation and self.executor.model.model.dim <= DENSE_LIMIT
        self.structure = Structure.full(self.executor.model.model.dim) if full else find_structure(subsample, self.seed)
        q = warm_start(subsample, self.structure, self.seed)
        warn_if_ordered(subsample, q.loc)
        chosen = curvature_chunks(manifest, self.structure, self.seed)
        self._certificate_passes = 1 + int(manifest.chunk_sizes[list(chosen)].sum()) / manifest.num_rows
        curvature = measure_curvature(self.executor, q.loc[None], chosen, self.seed, self.structure)
        return Whitening.around(self.family, q.loc, curvature)

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

    def move_anchor(self, tol: float) -> None:
        """Move the anchor to the average, if that is worth a pass and an epoch can follow."""
        if self.control is None or not self._affords(2):
            return
        average, stretch = self.averaging.value(self.average)["loc"], self.last
        to_anchor = stretch.distance(self.control.anchor.location.numpy())
        if self.control.outdated(to_anchor, stretch.distance(average.numpy()), stretch.steps, tol):
            self._anchor(self.q.loc, average)
            self.record("anchor", self.elbo)

    def run_stretch(self) -> None:
        """Take the steps of some whole epochs; unless there was trouble, move `q` to the new average."""
        stretch = _Stretch()
        for _ in range(self.stretch_epochs):
            order = sampling.epoch_order(self.executor.data.manifest, self.seed, self.epoch)
            for chunks in sampling.batches(order, self.batch_chunks):
                self._take_step(chunks, stretch)
                if self.trouble:
                    return
            self.epoch += 1
            if self.control is not None:
                self.control = self.control.end_epoch()
            if self.exhausted:
                break
        if stretch.elbo < self.best_elbo - ALLOWED_FALL * self.q.dim:
            fall = f"from {self.best_elbo:.8g} to {stretch.elbo:.8g}"
            self.trouble = f"the ELBO fell {fall} at step {self.step}; lower the learning rate"
            return
        self.elbo = stretch.elbo
        self.best_elbo = max(self.best_elbo, stretch.elbo)
        self.average = self.averaging.end_epoch(self.average)
        self.q = self.whitening.member(self.averaging.value(self.average))
        self.history.append(np.asarray(stretch.iterate))
        self.last = stretch

    def _take_step(self, chunks: IntArray, stretch: _Stretch) -> None:
        self.step += 1
        est = self._estimate(chunks)
        grad = est.energy_grad if self.energy_only else est.grad
        if not (math.isfinite(est.elbo) and all(bool(g.isfinite().all()) for g in grad.values())):
            self.skipped += 1
            if self.skipped >= MAX_SKIPPED:
                self.trouble = f"{self.skipped} steps in a row up to step {self.step} had no finite gradient"
            return
        self.skipped = 0
        if self.step == 1:
            self.best_elbo = est.elbo - ALLOWED_FALL * self.executor.data.num_rows
        for name, parameter in self.theta.items():
            parameter.grad = -grad[name]  # torch minimises
        self.optimizer.step()
        self.schedule.step()
        if not self._is_gaussian():
            self.trouble = (
                f"step {self.step} left a scale or mean that is not finite or not positive; lower the learning rate"
            )
            return
        self.average = self.averaging.update(self.average, self.theta)
        self._report(self._row("step", est.elbo))
        stretch.add(len(chunks), est.elbo, torch.cat([self.theta["loc"], self.theta["log_scale"]]).detach().numpy())

    def _is_gaussian(self) -> bool:
        """Whether θ is still a Gaussian's."""
        scale = self.theta["log_scale"].exp()
        return bool((scale > 0).all() and all(p.isfinite().all() for p in (scale, *self.theta.values())))

    def _estimate(self, chunks: IntArray) -> Estimate:
        """Return the ELBO of θ and its gradient, from one minibatch."""
        settings = self.settings
        rng = random_stream(self.seed, Purpose.DRAWS, 0 if settings.fixed_draws else self.step)
        dim = self.family.noise_dim(self.q.dim)
        noise = draw_noise(settings.design, settings.num_draws, dim, rng, fixed=settings.fixed_draws)
        factor = self.executor.data.manifest.num_chunks / len(chunks)

        def scaled_log_joint(eta: Tensor) -> tuple[Tensor, Tensor]:
            control = self.control
            points = eta.numpy() if control is None else control.points(eta)
            sums = self.executor.run(Gradient(points), chunks, check=self.epoch == 0, label=f"step {self.step}")
            if control is None:
                log_lik, grad = (factor * torch.from_numpy(part) for part in sums)
            else:
                log_lik, grad = control.estimate(sums, factor)
                self.control = control.observe(sums, factor, self.whitening.curvature.root_transpose_times)
            return log_joint(self.executor.model.model, eta, log_lik, grad)

        return self.whitening.estimate(self.theta, noise, scaled_log_joint, settings.estimator)

    def record(self, phase: str, elbo: float, **figures: float) -> None:
        """Add a row to the trace and report it."""
        row = self._row(phase, elbo, **figures)
        self.trace.append(row)
        self._report(row)

    def _row(self, phase: str, elbo: float, **figures: float) -> TraceRow:
        rows_read = self.executor.rows_read + self._other_rows
        seconds = time.perf_counter() - self._started
        profile = asdict(self.executor.profile)
        return TraceRow(phase, self.step, self.passes, rows_read, seconds, elbo, **profile, **figures)

    def fitted(
        self,
        status: Status,
        reason: str,
        elbo: float | None = None,
        certificate: Certificate | None = None,
        curvature: Curvature | None = None,
    ) -> Fitted:
        """Return the result."""
        return Fitted(
            q=self.q,
            status=status,
            reason=reason,
            elbo=self.elbo if elbo is None else elbo,
            passes=self.passes,
            certificate=certificate,
            trace=tuple(self.trace),
            curvature=curvature,
        )
