"""The front door: check what was given, choose method and executor, fit, and hand back a posterior."""

import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dadvi.advi import ADVI
from dadvi.anchored import Anchored
from dadvi.checkpoint import RunDirectory
from dadvi.errors import InputError, ModelError
from dadvi.executors import ClientLike, make_executor, versions
from dadvi.families import Family, MeanField, check_known, make_family
from dadvi.likelihood import CHECK_ROWS, BoundModel, bind_to, end_chunks
from dadvi.model import Model
from dadvi.passes import Gradient
from dadvi.posterior import Coords, Posterior, TraceRow
from dadvi.probing import find_structure
from dadvi.progress import make_reporter
from dadvi.quadratic import DENSE_LIMIT
from dadvi.sharding import ShardedDataset
from dadvi.subsample import Subsample
from dadvi.types import whole_number

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
    run_dir: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
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
    run_dir
        Directory to write the posterior, trace and settings to, when the fit has ended.
    overwrite
        Whether an earlier run in `run_dir` may be replaced.
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
    _check_types(model, data)
    chosen = make_family(family)
    check_limits(tol, max_passes)
    seed = whole_number("seed", seed)
    coords = _coords(model, data)
    bound = bind_to(model, data)
    settings = choose_method(method, bound, data, chosen)
    directory = None
    if run_dir is not None:
        check_known(chosen)
        directory = RunDirectory(run_dir, overwrite=overwrite)
    settings.check(chosen)
    with (
        make_executor(bound, data, client, num_workers) as executor,
        make_reporter(progress, settings.passes_at_most(data.manifest, max_passes), callbacks) as report,
    ):
        result = settings.fit(executor, chosen, tol=tol, max_passes=max_passes, seed=seed, report=report)
    posterior = Posterior(
        space=model.space,
        unconstrained=result.q,
        status=result.status,
        reason=result.reason,
        elbo=result.elbo,
        passes=result.passes,
        certificate=result.certificate,
        records=result.trace,
        curvature=result.curvature,
        coords=coords,
        settings={
            "method": {"name": type(settings).__name__, **settings.describe()},
            "family": chosen.describe(),
            "tol": tol,
            "max_passes": max_passes,
            "seed": seed,
            "data": {"location": str(data.location), "digest": data.digest, "num_rows": data.num_rows},
            "versions": versions(),
        },
    )
    if directory is not None:
        directory.write(posterior)
    return posterior


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
    _check_types(model, data)
    points = torch.atleast_2d(torch.as_tensor(eta, dtype=torch.float64)).detach()
    if points.dim() != 2 or points.shape[1] != model.dim:
        raise InputError(f"eta has shape {tuple(points.shape)}; it must be (K, {model.dim}) for {model!r}")
    with make_executor(bind_to(model, data), data, client) as executor:
        sums = executor.run(Gradient(points.numpy()), check=True)
    return torch.from_numpy(sums.log_lik), torch.from_numpy(sums.grad)


def check_limits(tol: float, max_passes: float | None) -> None:
    """Refuse limits of a run that are not positive and finite."""
    if not 0 < tol < np.inf:
        raise InputError(f"tol={tol}: it must be positive and finite, in posterior sds")
    if max_passes is not None and not 0 < max_passes < np.inf:
        raise InputError(f"max_passes={max_passes}: it must be positive and finite")


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


def _check_types(model: Any, data: Any) -> None:
    if not isinstance(model, Model):
        raise ModelError(f"model is a {type(model).__name__}; give a dadvi.Model")
    if not isinstance(data, ShardedDataset):
        raise InputError(f"data is a {type(data).__name__}; give what dadvi.open_shards or dadvi.write_shards returns")


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
