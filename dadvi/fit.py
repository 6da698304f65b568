"""The front door: check what was given, choose method and executor, fit, and hand back a posterior."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dadvi.advi import ADVI
from dadvi.anchored import Anchored
from dadvi.binding import CHECK_ROWS, bind_to, check_types, end_chunks
from dadvi.checkpoint import RunDirectory, seconds_between
from dadvi.clients import ClientLike, versions
from dadvi.errors import DataError, InputError, ModelError
from dadvi.executors import make_executor
from dadvi.families import Family, MeanField, check_known, family_from, make_family
from dadvi.fingerprint import fingerprint, model_parts
from dadvi.likelihood import BoundModel
from dadvi.memory import Budget, Need
from dadvi.model import Model
from dadvi.passes import Gradient
from dadvi.posterior import Coords, Posterior, TraceRow
from dadvi.probing import find_structure
from dadvi.progress import make_reporter
from dadvi.quadratic import DENSE_LIMIT, tangents_at_most
from dadvi.sharding import ShardedDataset
from dadvi.subsample import Subsample
from dadvi.types import is_number, whole_number

Method: TypeAlias = Anchored | ADVI
"""The settings of a method, which fit by it."""


def fit(
    model: Model,
    data: ShardedDataset,
    *,
    method: Method | Literal["auto"] = "auto",
    family: str | Family = "mean_field",
    client: ClientLike = None,
    num_workers: int | None = None,
    tol: float = 0.1,
    max_passes: float | None = None,
    seed: int = 0,
    memory_budget: Budget = None,
    run_dir: str | os.PathLike[str] | RunDirectory | None = None,
    overwrite: bool = False,
    checkpoint_seconds: float = 60.0,
    progress: bool | None = None,
    callbacks: Iterable[Callable[[TraceRow], None]] = (),
) -> Posterior:
    """Fit a Gaussian variational posterior to all the data.

    Parameters
    ----------
    model, data
        What to fit, and to what.
    method
        ``"auto"``: `Anchored` for up to 2 000 unconstrained coordinates, not counting the effects of groups if the
        family is mean field; beyond that ``ADVI(control_variate="anchor")``. Or the settings of either, such as
        ``ADVI(batch_rows=16_384)``.
    family
        ``"mean_field"``, ``"full_rank"``, ``"low_rank"``, or a family object such as ``LowRank(rank=5)``.
    client
        Who works: a `distributed.Client`, a scheduler's address, ``"serial"`` for this process, or None: this process
        while the data are small (256 MiB), otherwise local single-threaded worker processes. The result has the same
        bits.
    num_workers
        With None for `client`: start that many local worker processes.
    tol
        Converged means: within `tol` posterior sds of the optimum, by the certificate.
    max_passes
        Passes over the data after which no further round or epoch starts; None for the method's default. The first
        one, and the certificate after it, are always made.
    seed
        The result is a function of (model, data, settings, seed).
    memory_budget
        What a worker may hold, in bytes or as a text such as "1.5 GiB", besides some 450 MiB for Python and its
        libraries: the chunks in hand, what a pass makes of them, and chunks kept for the next pass. None for a quarter
        of a worker's memory.
    run_dir
        Directory for the settings, the trace, checkpoints and the posterior: a path, or a URL that fsspec understands.
        A fit that is interrupted, or whose cluster fails, goes on from there by `resume`.
    overwrite
        Whether an earlier run in `run_dir` may be replaced.
    checkpoint_seconds
        Seconds between checkpoints of stochastic ADVI, at most; the anchored solver writes one after every pass.
    progress
        Show progress on stderr: live on a terminal, else in lines; None shows it on a terminal only.
    callbacks
        Called with a `TraceRow` after every step (phase "step") and for every row of the trace.

    Raises
    ------
    ModelError
        If the model and the data do not go together.
    DataError
        If rows are not finite or outside the likelihood's support, or cannot be read.
    ClusterError
        If the cluster cannot be used.
    InputError
        If a setting is out of its range.

    """
    check_types(model, data)
    chosen = make_family(family)
    check_limits(tol, max_passes)
    callbacks = _callable(callbacks)
    seed = whole_number("seed", seed)
    bound = bind_to(model, data)
    settings = choose_method(method, bound, data, chosen)
    directory = None
    if run_dir is not None:
        check_known(chosen)
        directory = run_dir if isinstance(run_dir, RunDirectory) else RunDirectory(run_dir, overwrite=overwrite)
        directory.every = seconds_between(checkpoint_seconds)
        directory.check()
    task = _Task(bound, data, settings, chosen, tol, max_passes, seed)
    return task.run(client, num_workers, memory_budget, directory, progress, callbacks)


def resume(
    run_dir: str | os.PathLike[str] | RunDirectory,
    model: Model,
    data: ShardedDataset,
    *,
    method: Method | None = None,
    client: ClientLike = None,
    num_workers: int | None = None,
    memory_budget: Budget = None,
    max_passes: float | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool | None = None,
    callbacks: Iterable[Callable[[TraceRow], None]] = (),
) -> Posterior:
    """Go on with a fit that was interrupted, to the result that it would have had, to the bit.

    A run that has ended is not fitted again: its posterior is read. One that stopped goes on if it is given more
    passes.

    Parameters
    ----------
    run_dir
        What the fit was given.
    model, data
        What was fitted, and to what.
    method
        The settings of the method, if there was an object among them, such as a class of torch.optim.
    client, num_workers, memory_budget
        As in `fit`; the result does not depend on them.
    max_passes
        Passes at which the run now ends at the latest; None for as many as it was given at first. The learning rate
        of stochastic ADVI keeps to the schedule that it was given at first.
    checkpoint_seconds, progress, callbacks
        As in `fit`.

    Raises
    ------
    InputError
        If there is no run, another process is at work on it, or the model, the data, the method or the version of
        Python, torch or dadvi is not that of the run; the message names the difference.
    DataError
        If the checkpoint is damaged.

    """
    check_types(model, data)
    check_limits(1.0, max_passes)
    callbacks = _callable(callbacks)
    directory = run_dir if isinstance(run_dir, RunDirectory) else RunDirectory.existing(run_dir)
    directory.every = seconds_between(checkpoint_seconds)
    stored = directory.settings
    _refuse_differences(stored, model, data)
    chosen = family_from(stored["family"])
    settings = _stored_method(stored, method)
    max_passes = stored["max_passes"] if max_passes is None else max_passes
    posterior = directory.posterior()
    if posterior is not None and (posterior.status != "stopped" or posterior.settings["max_passes"] == max_passes):
        directory.tidy(posterior)
        return posterior
    task = _Task(bind_to(model, data), data, settings, chosen, stored["tol"], max_passes, stored["seed"])
    return task.run(client, num_workers, memory_budget, directory, progress, callbacks)


@dataclass(frozen=True)
class _Task:
    """What is to be fitted to what, and how; checked."""

    bound: BoundModel
    data: ShardedDataset
    method: Method
    family: Family
    tol: float
    max_passes: float | None
    seed: int

    def describe(self) -> dict[str, Any]:
        """Return the settings of the run as a JSON object."""
        data = self.data
        return {
            "method": {"name": type(self.method).__name__, **self.method.describe()},
            "family": self.family.describe(),
            "tol": self.tol,
            "max_passes": self.max_passes,
            "seed": self.seed,
            "data": {
                "location": str(data.location),
                "digest": data.digest,
                "num_rows": data.num_rows,
                "sample": _sample(data),
            },
            "model": model_parts(self.bound.model),
            "versions": _versions(),
        }

    def run(
        self,
        client: ClientLike,
        num_workers: int | None,
        memory_budget: Budget,
        directory: RunDirectory | None,
        progress: bool | None,
        callbacks: Iterable[Callable[[TraceRow], None]],
    ) -> Posterior:
        """Fit, and write what there is to be kept to the directory, if there is one."""
        coords = _coords(self.bound.model, self.data)
        self.method.check(self.family)
        settings = self.describe() if directory is None else {**self.describe(), "origin": directory.origin}
        fit = partial(self.method.fit, tol=self.tol, max_passes=self.max_passes, seed=self.seed)
        passes = self.method.passes_at_most(self.data.manifest, self.max_passes)
        points, tangents = self.method.points_at_most, tangents_at_most(self.bound.model)
        need = Need.of(self.bound, self.data.manifest, points, tangents, memory_budget)
        with directory or nullcontext():
            if directory is not None:
                directory.begin(settings)
                callbacks = [directory.append, *callbacks]
            with (
                make_executor(self.bound, self.data, client, num_workers, need) as executor,
                make_reporter(progress, passes, callbacks) as report,
            ):
                result = fit(executor, self.family, report=report, journal=directory)
            posterior = Posterior(
                space=self.bound.model.space,
                unconstrained=result.q,
                status=result.status,
                reason=result.reason,
                elbo=result.elbo,
                passes=result.passes,
                certificate=result.certificate,
                records=result.trace,
                curvature=result.curvature,
                coords=coords,
                settings=settings,
            )
            if directory is not None:
                directory.finish(posterior)
        return posterior


def _versions() -> dict[str, str]:
    """Return the versions on which the bits of a run depend: draws are made by NumPy and SciPy."""
    return {**versions(), **{name: metadata.version(name) for name in ("numpy", "scipy")}}


def _sample(data: ShardedDataset) -> str:
    """Return a digest of the first and the last chunk: what tells data from others of the same size and kind."""
    return fingerprint([dict(sorted(data.read(chunk).items())) for chunk in end_chunks(data)])


def _refuse_differences(stored: Mapping[str, Any], model: Model, data: ShardedDataset) -> None:
    """Refuse to go on with other versions, another model or other data than a run began with."""
    now = _versions()
    for name, version in stored["versions"].items():
        if now.get(name) != version:
            raise InputError(f"the run was made by {name} {version}, and this is {now.get(name)}; use that version")
    parts = model_parts(model)
    changed = [name for name in {**stored["model"], **parts} if stored["model"].get(name) != parts.get(name)]
    if changed:
        raise ModelError(
            f"the model is not that of the run: they differ in {', '.join(changed)}; give the model of the run, or "
            "fit anew"
        )
    was, location = stored["data"], data.location
    if data.num_rows != was["num_rows"]:
        raise DataError(f"{location} has {data.num_rows} rows, and the run's data had {was['num_rows']}; fit anew")
    if data.digest != was["digest"]:
        raise DataError(
            f"the metadata of {location} have the digest {data.digest}, and those of the run's data at "
            f"{was['location']} had {was['digest']}: fields, chunks, rows or origin differ; give the run's data, "
            "or fit anew"
        )
    if _sample(data) != was["sample"]:
        raise DataError(f"the rows of {location} are not those of the run's data; give the run's data, or fit anew")


def _stored_method(stored: Mapping[str, Any], given: Method | None) -> Method:
    """Return the method of a run, from its description, or as it is given."""
    described = dict(stored["method"])
    name = described.pop("name")
    if given is None:
        kind: type[Method] = {"Anchored": Anchored, "ADVI": ADVI}[name]
        objects = [setting for setting, value in described.items() if isinstance(value, dict)]
        if objects:
            raise InputError(
                f"{objects[0]} of the run was {described[objects[0]]['object']}, an object; give method=, with the "
                "settings of the run"
            )
        return kind(**described)
    told = {"name": type(given).__name__, **given.describe()}
    changed = [
        setting for setting in {**stored["method"], **told} if stored["method"].get(setting) != told.get(setting)
    ]
    if changed:
        what = changed[0]
        raise InputError(
            f"the method is not that of the run: {what} is {told.get(what)!r} and was {stored['method'].get(what)!r}"
        )
    return given


def full_gradient(
    model: Model, data: ShardedDataset, eta: Tensor, *, client: ClientLike = None
) -> tuple[Tensor, Tensor]:
    """Return log-likelihood and gradient sums over all rows at K unconstrained points, by one pass.

    Parameters
    ----------
    eta
        Unconstrained points (K, D), or one (D,).
    client
        As in `fit`.

    Returns
    -------
    log_lik, grad
        (K,) and (K, D), float64: Σ_i ℓ_i(η_k) and Σ_i ∇ℓ_i(η_k); prior and log-det are not in them.

    Raises
    ------
    InputError
        If `eta` has another number of coordinates than the model.

    """
    check_types(model, data)
    points = torch.atleast_2d(torch.as_tensor(eta, dtype=torch.float64)).detach()
    if points.dim() != 2 or points.shape[1] != model.dim:
        raise InputError(f"eta has shape {tuple(points.shape)}; it must be (K, {model.dim}) for {model!r}")
    with make_executor(bind_to(model, data), data, client) as executor:
        sums = executor.run(Gradient(points.numpy()), check=True)
    return torch.from_numpy(sums.log_lik), torch.from_numpy(sums.grad)


def check_limits(tol: float, max_passes: float | None) -> None:
    """Refuse limits of a run that are not positive and finite."""
    if not _positive(tol):
        raise InputError(f"tol={tol!r}: it must be positive and finite, in posterior sds")
    if max_passes is not None and not _positive(max_passes):
        raise InputError(f"max_passes={max_passes!r}: it must be positive and finite")


def _positive(value: float) -> bool:
    return is_number(value) and 0 < value < np.inf


def _callable(callbacks: Any) -> tuple[Callable[[TraceRow], None], ...]:
    """Return callbacks as they are to be called, where all can be."""
    if not isinstance(callbacks, Iterable):
        raise InputError(f"callbacks is a {type(callbacks).__name__}; give a list of functions of a TraceRow")
    given = tuple(callbacks)
    for each in given:
        if not callable(each):
            raise InputError(f"callbacks has {each!r}, a {type(each).__name__}; give functions of a TraceRow")
    return given


def choose_method(method: Any, bound: BoundModel, data: ShardedDataset, family: Family) -> Method:
    """Return the settings of the method that fits: those given, or for ``"auto"`` what the model's size asks for."""
    if method == "auto":
        few = bound.model.dim <= DENSE_LIMIT
        return Anchored() if few or _has_groups(bound, data, family) else ADVI(control_variate="anchor")
    if not isinstance(method, Method):
        raise InputError(
            f"method={method!r}: use 'auto', or the settings of a method: dadvi.Anchored() or dadvi.ADVI()"
        )
    return method


def _has_groups(bound: BoundModel, data: ShardedDataset, family: Family) -> bool:
    """Tell whether the model's many coordinates are effects of groups, as rows of the first and last chunk show."""
    ends = Subsample.load(bound, data, end_chunks(data))
    return isinstance(family, MeanField) and find_structure(ends.top(CHECK_ROWS), seed=0) is not None


def _coords(model: Model, data: ShardedDataset) -> Coords:
    """Return the labels of the dimensions that the model names after fields: their categories, or their columns."""
    coords = {}
    for site in model.space.sites:
        if site.name not in model.dims:
            continue
        dims = []
        for size, name in zip(site.shape, model.dims[site.name], strict=True):
            if name not in data.fields:
                raise ModelError(
                    f"dims of {site.name!r} name {name!r}, which is not a field of the data ({', '.join(data.fields)})"
                )
            labels = data.fields[name].categories or data.fields[name].columns
            if labels is None:
                raise ModelError(
                    f"dims of {site.name!r} name the field {name!r}, which has neither categories nor columns to "
                    "label with"
                )
            if len(labels) != size:
                raise ModelError(
                    f"{site.name!r} has {size} elements along {name!r}, and the field has {len(labels)} labels; make "
                    "them agree"
                )
            dims.append((name, tuple(map(str, labels))))
        coords[site.name] = tuple(dims)
    return coords
