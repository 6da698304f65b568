"""The result of a fit: a Gaussian over unconstrained latents, what it says of them, and how well it was fitted."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
import xarray as xr
import zarr
from torch import Tensor
from torch.distributions.constraints import Constraint
from zarr.errors import GroupNotFoundError

from dadvi.binding import bind_to, check_types
from dadvi.clients import ClientLike
from dadvi.errors import DataError, InputError, ModelError
from dadvi.executors import Executor, make_executor
from dadvi.families import Gaussian, MeanField, check_known, family_from
from dadvi.model import Model
from dadvi.quadratic import Certificate, Curvature
from dadvi.response import Response, expectations_of, from_curvature
from dadvi.sharding import ShardedDataset
from dadvi.sharding.location import Location, Options, open_store, resolve
from dadvi.sharding.output import output
from dadvi.sharding.reader import ATTRIBUTE as OF_DATA
from dadvi.stopwatch import Profile
from dadvi.structure import Arrowhead, Structure
from dadvi.supports import support_from_json, support_to_json
from dadvi.transforms import LatentSpace, Site
from dadvi.types import Purpose, random_stream

Status = Literal["converged", "stopped", "diverged"]

Coords: TypeAlias = Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]]
"""Latent to (dimension's name, its labels), one for each of the latent's dimensions."""

FORMAT = 1
"""Version of the stored form of a posterior. A newer one is refused, an older one must still be read."""

ATTRIBUTE = "dadvi_posterior"
CURVATURE = "curvature."
"""What the names of the arrays of a stored curvature begin with."""

QUADRATURE_NODES = 64
SUMMARY_DRAWS = 20_000


@dataclass(frozen=True)
class TraceRow:
    """One line of a run's trace."""

    phase: str  # "round", "rejected", "descent" (anchored); "step", "epochs", "anchor", "certificate" (ADVI)
    step: int  # steps or rounds so far
    passes: float  # rows read so far, over N
    rows_read: int
    seconds: float  # since the run started
    elbo: float  # of the phase: mean over its steps, or on all the data for a certificate
    rhat: float = math.nan  # RMS of split R-hat of the iterates
    mcse: float = math.nan  # largest Monte Carlo standard error of their average, in posterior sds
    certificate: float = math.nan  # largest predicted distance to the optimum, in posterior sds
    length: float = math.nan  # of the step that led here, its largest coordinate in posterior sds
    read: float = 0.0  # seconds of passes so far, as `Profile`: those of workers as a mean over workers
    decode: float = 0.0
    check: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    wait: float = 0.0
    transfer: float = 0.0
    reduce: float = 0.0

    @property
    def profile(self) -> Profile:
        """Where the time of passes went so far."""
        return Profile(**{each.name: getattr(self, each.name) for each in fields(Profile)})


@dataclass(frozen=True, eq=False)
class Fitted:
    """What a solver returns."""

    q: Gaussian
    status: Status
    reason: str
    elbo: float
    passes: float
    certificate: Certificate | None
    trace: tuple[TraceRow, ...]
    curvature: Curvature | None  # −E_q[∇² log π]; None where it could not be held


@dataclass(frozen=True, eq=False)
class Posterior:
    """A fitted posterior.

    `unconstrained` is the member of the variational family, with ``loc`` (D,), ``stddev`` (D,) and
    ``covariance_matrix`` (D, D). `status` is "converged" (the certificate is within the tolerance), "stopped" or
    "diverged", and `reason` says why the run ended. `certificate` is None where the run ended without one. `elbo` is
    in nats, `passes` is rows read over N. `curvature` is −E_q[∇² log π] on all the data, None where it was not held.
    """

    space: LatentSpace
    unconstrained: Gaussian
    status: Status
    reason: str
    elbo: float
    passes: float
    certificate: Certificate | None
    curvature: Curvature | None = None
    records: tuple[TraceRow, ...] = ()
    coords: Coords = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trace(self) -> pd.DataFrame:
        """The run's trace, a row for each `TraceRow`."""
        return pd.DataFrame([asdict(row) for row in self.records], columns=[each.name for each in fields(TraceRow)])

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Which latent each of the D unconstrained coordinates belongs to, such as "beta[3]"."""
        return tuple(
            label for site in self.space.sites for label in (self._labels(site) if site.elementwise else site.labels)
        )

    def __repr__(self) -> str:
        how = f"{self.status}, {self.passes:.1f} passes"
        if self.certificate is not None:
            how += f", means within {self.certificate.max:.2g} sd of the optimum"
        return f"<Posterior {self.unconstrained.family.name} of {_latents_in(self.space)}: {how}>"

    def sample(self, num_draws: int, seed: int = 0) -> dict[str, Tensor]:
        """Return independent draws of the latents, name to (num_draws, *shape), float64.

        Raises
        ------
        InputError
            If `num_draws` is below 1.

        """
        return self._draw(num_draws, seed)[0]

    def _draw(self, num_draws: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        if num_draws < 1:
            raise InputError(f"num_draws={num_draws}: at least 1 is needed")
        eta = self.unconstrained.rsample(num_draws, random_stream(seed, Purpose.POSTERIOR))
        return self.space.constrain(eta)[0], eta

    def summary(self, quantiles: Sequence[float] = (0.05, 0.5, 0.95)) -> pd.DataFrame:
        """Return mean, sd and quantiles of every scalar of every latent.

        For latents transformed element by element they are those of q, by Gauss-Hermite quadrature and the transform of
        the Gaussian's quantiles; for others, such as a simplex, they are those of 20 000 draws.

        Raises
        ------
        InputError
            If a quantile is not strictly between 0 and 1.

        """
        if not all(0 < p < 1 for p in quantiles):
            raise InputError(f"quantiles={tuple(quantiles)}: each must be strictly between 0 and 1")
        columns = ["mean", "sd", *(f"{100 * p:g}%" for p in quantiles)]
        tables = []
        draws: dict[str, Tensor] | None = None
        for site in self.space.sites:
            if site.elementwise:
                values = self._elementwise_summary(site, quantiles)
            else:
                draws = draws or self.sample(SUMMARY_DRAWS)
                z = draws[site.name].reshape(SUMMARY_DRAWS, -1)
                values = torch.stack([z.mean(0), z.std(0), *(z.quantile(p, dim=0) for p in quantiles)])
            tables.append(pd.DataFrame(values.T.numpy(), index=self._labels(site), columns=columns))
        return pd.concat(tables)

    def _elementwise_summary(self, site: Site, quantiles: Sequence[float]) -> Tensor:
        """Return (2 + quantiles, size) for a site whose transform acts on each element by itself."""
        block = slice(site.offset, site.offset + site.size)
        loc, sd = self.unconstrained.loc[block], self.unconstrained.stddev[block]

        def at(standard: Tensor) -> Tensor:
            """Map standard normal values (n,) of every coordinate to the latent, (n, size)."""
            return site.constrain(loc + standard[:, None] * sd)[0].reshape(len(standard), -1)

        nodes, weights = np.polynomial.hermite_e.hermegauss(QUADRATURE_NODES)
        w = torch.from_numpy(weights / weights.sum())
        z = at(torch.from_numpy(nodes))
        mean = w @ z
        deviation = (w @ (z - mean).square()).sqrt()
        p = torch.tensor(list(quantiles), dtype=torch.float64)
        standard = torch.distributions.Normal(0.0, 1.0).icdf(torch.stack([p, 1 - p]).flatten())
        rising, falling = at(standard).reshape(2, len(p), -1)  # onto an upper-bounded support the transform falls
        levels = torch.where(z[-1] >= z[0], rising, falling)
        return torch.cat([mean[None], deviation[None], levels])

    def _labels(self, site: Site) -> list[str]:
        """Return a label for each scalar of a constrained latent, by coordinate name where there is one."""
        axes: Iterable[Sequence[object]] = [range(size) for size in site.shape]
        if site.name in self.coords:
            axes = [labels for _, labels in self.coords[site.name]]
        return [f"{site.name}[{', '.join(map(str, at))}]" if at else site.name for at in product(*axes)]

    def linear_response(
        self,
        model: Model | None = None,
        data: ShardedDataset | None = None,
        *,
        client: ClientLike = None,
        seed: int = 0,
    ) -> "Posterior":
        """Return the posterior with the covariance of linear response, which repairs mean-field sds.

        Without arguments it is that of the curvature which the fit measured on all the data, P⁻¹ with P = −E_q[∇² log
        π]: exact where log π is quadratic. With `model` and `data`, one pass of Hessian-vector products at fixed draws
        gives (−∇²_θ ELBO)⁻¹ itself (Giordano, Broderick & Jordan 2018), for a mean-field posterior; beyond 1 000
        coordinates without the response of the dense coordinates' sds.

        The result is a full-rank Gaussian, or for a posterior with effects of groups one with an arrowhead precision.
        Its `elbo` is nan, and its certificate is that of the means.

        Parameters
        ----------
        client
            As in `fit`.
        seed
            Of the draws.

        Raises
        ------
        InputError
            If the fit held no curvature, one of `model` and `data` is missing, the model has other latents than the
            posterior, or the family is not mean field.

        """
        if model is None or data is None:
            if model is not None or data is not None:
                raise InputError("linear_response needs model and data, or neither; give both")
            q = from_curvature(self.unconstrained.loc, self._curvature())
        else:
            self._check_is_of(model, data)
            with make_executor(bind_to(model, data), data, client) as executor:
                q = self._response(executor, seed).gaussian(self._curvature().structure)
        certificate = None if self.certificate is None else replace(self.certificate, sd_error=math.nan)
        return replace(self, unconstrained=q, elbo=math.nan, certificate=certificate)

    def _check_is_of(self, model: Model, data: ShardedDataset) -> None:
        """Refuse what is not a model or not a data set, and a model with other latents than were fitted."""
        check_types(model, data)
        own, others = map(_latents_in, (self.space, model.space))
        if own != others:
            raise ModelError(
                f"the model is not that of the posterior: it has the latents {others}, and the posterior has {own}; "
                "give the model that was fitted"
            )
        for site, other in zip(self.space.sites, model.space.sites, strict=True):
            if _known(site.support) != _known(other.support):
                raise ModelError(
                    f"the model is not that of the posterior: {site.name!r} has the support {other.support!r} in it, "
                    f"and {site.support!r} in the posterior; give the model that was fitted"
                )

    def linear_response_of(
        self,
        functions: Mapping[str, Callable[..., Tensor]],
        model: Model,
        data: ShardedDataset,
        *,
        client: ClientLike = None,
        seed: int = 0,
        tolerance: float = 0.01,
        max_passes: int = 100,
    ) -> pd.DataFrame:
        """Return mean and sd of named functions of latents by linear response, whatever the number of coordinates.

        The sd is that of the function's mean gradient (delta method), by conjugate gradients on all the data: a pass an
        iteration for all functions together.

        Parameters
        ----------
        functions
            Name to a function of latents, by argument name, that returns one number: ``{"contrast": lambda beta:
            beta[0] - beta[1]}``.
        tolerance
            Relative change of a variance in an iteration below which it is done.
        max_passes
            Iterations at most.

        Returns
        -------
        DataFrame
            ``mean`` and ``sd`` by function; ``attrs["passes"]`` tells the passes made.

        Raises
        ------
        InputError
            If the model has other latents than the posterior, the family is not mean field, or a function is not one
            of latents to one number.

        """
        self._check_is_of(model, data)
        means, gradients = expectations_of(functions, model, self.unconstrained, seed)
        with make_executor(bind_to(model, data), data, client) as executor:
            variances, passes = self._response(executor, seed).variances(gradients, tolerance, max_passes)
        table = pd.DataFrame({"mean": means.numpy(), "sd": variances.sqrt().numpy()}, index=list(functions))
        table.attrs["passes"] = passes
        return table

    def _curvature(self) -> Curvature:
        if self.curvature is None:
            raise InputError(
                f"this fit of {self.unconstrained.dim} coordinates held no curvature; use "
                "linear_response_of(functions, model, data)"
            )
        return self.curvature

    def _response(self, executor: Executor, seed: int) -> Response:
        if not isinstance(self.unconstrained.family, MeanField):
            raise InputError(
                f"linear response on the data repairs mean-field posteriors; this one is "
                f"{self.unconstrained.family.name!r}: its covariance needs none"
            )
        return Response.at(executor, self.unconstrained, seed)

    def to_datatree(self, num_draws: int = 1_000, seed: int = 0) -> xr.DataTree:
        """Return draws as an xarray DataTree in ArviZ's layout.

        The group ``posterior`` has variables (chain=1, draw, *shape), with coordinates from category and column names
        where the model names its dimensions; ``sample_stats`` has ``log_q``, the log-density of each draw under q.
        How well the posterior was fitted is in the attributes.
        """
        latents, eta = self._draw(num_draws, seed)
        coords: dict[str, Any] = {"chain": [0], "draw": np.arange(num_draws)}
        variables = {}
        for site in self.space.sites:
            dims = [f"{site.name}_dim_{axis}" for axis in range(len(site.shape))]
            if site.name in self.coords:
                dims = [name for name, _ in self.coords[site.name]]
                coords |= {name: list(labels) for name, labels in self.coords[site.name]}
            else:
                coords |= {dim: np.arange(size) for dim, size in zip(dims, site.shape, strict=True)}
            variables[site.name] = (("chain", "draw", *dims), latents[site.name].numpy()[None])
        stats = {"log_q": (("chain", "draw"), self.unconstrained.log_prob(eta).numpy()[None])}
        attributes: dict[str, Any] = {
            "inference_library": "dadvi",
            "family": self.unconstrained.family.name,
            "status": self.status,
            "reason": self.reason,
            "elbo": self.elbo,
            "passes": self.passes,
        }
        if self.certificate is not None:
            attributes |= {f"certificate_{name}": value for name, value in asdict(self.certificate).items()}
        shared = {name: coords[name] for name in ("chain", "draw")}
        groups = {
            "posterior": xr.Dataset(variables, coords, attributes),
            "sample_stats": xr.Dataset(stats, shared, {"inference_library": "dadvi"}),
        }
        return xr.DataTree.from_dict(groups)

    def save(self, location: Location, *, overwrite: bool = False, storage_options: Options = None) -> None:
        """Write the posterior as a Zarr group with a JSON description: no code, nothing pickled.

        It appears whole or not at all.

        Raises
        ------
        DataError
            If something exists at `location` (unless `overwrite`), or nothing can be written there.
        InputError
            If the family is not one of dadvi's: there would be no way to read it back.

        """
        check_known(self.unconstrained.family)
        params = {name: value.detach().numpy() for name, value in self.unconstrained.params.items()}
        params |= {f"{CURVATURE}{name}": value.numpy() for name, value in _curvature_arrays(self.curvature).items()}
        document = self._to_json()
        with output(location, overwrite=overwrite, options=storage_options) as target:
            group = target.create_group()
            for name, value in params.items():
                group.create_array(name, data=value)
            group.attrs[ATTRIBUTE] = {"document": document, "digest": _digest(document, params)}

    def _to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "sites": [
                {"name": site.name, "shape": list(site.shape), "support": support_to_json(site.support)}
                for site in self.space.sites
            ],
            "family": self.unconstrained.family.describe(),
            "status": self.status,
            "reason": self.reason,
            "elbo": _finite(self.elbo),
            "passes": self.passes,
            "certificate": _to_plain(asdict(self.certificate)) if self.certificate else None,
            "trace": [_to_plain(asdict(row)) for row in self.records],
            "coords": {name: [[dim, list(labels)] for dim, labels in dims] for name, dims in self.coords.items()},
            "settings": dict(self.settings),
        }


def _latents_in(space: LatentSpace) -> str:
    return ", ".join(f"{site.name}{list(site.shape)}" for site in space.sites)


def _known(support: Constraint) -> Any:
    """Return what can be compared of a support; None for one of the user's own."""
    try:
        return support_to_json(support)
    except ModelError:
        return None


def load_posterior(location: Location, storage_options: Options = None) -> Posterior:
    """Read a posterior that `Posterior.save` wrote. Nothing stored in it is executed.

    Raises
    ------
    DataError
        If there is no posterior at `location`, it was written by a later version, or any part of it has changed since.

    """
    resolved = resolve(location, storage_options)
    if isinstance(resolved, Path) and not resolved.exists():
        raise DataError(
            f"there is nothing at {resolved}; give what Posterior.save wrote, such as a run's posterior.zarr"
        )
    try:
        group = zarr.open_group(open_store(resolved, storage_options, read_only=True), mode="r")
        attributes = group.attrs.asdict()
        if ATTRIBUTE not in attributes:
            what = "data set" if OF_DATA in attributes else "Zarr group"
            raise DataError(f"{resolved} is a {what}, not a posterior; as data it is opened by open_shards")
        stored: Any = attributes[ATTRIBUTE]
        document, recorded = stored["document"], stored["digest"]
        later = document["format"] > FORMAT
        params = {} if later else {name: np.asarray(array[...]) for name, array in group.arrays()}
        actual = "" if later else _digest(document, params)
    except DataError:
        raise
    except GroupNotFoundError as error:
        raise DataError(
            f"there is no posterior at {resolved}; give what Posterior.save wrote, such as a run's posterior.zarr"
        ) from error
    except Exception as error:
        # Damaged bytes make a store, a codec or a lookup raise anything.
        raise DataError(
            f"{resolved} does not hold a posterior that can be read ({error!r}); give what Posterior.save wrote"
        ) from error
    if later:
        raise DataError(
            f"{resolved} has format {document['format']}; this version of dadvi reads up to {FORMAT}: upgrade dadvi"
        )
    if actual != recorded:
        raise DataError(
            f"{resolved} has changed since it was written: its digest is {actual}, and {recorded} was recorded; fit "
            "again"
        )
    return _from_json(document, params)


def _from_json(document: Mapping[str, Any], params: Mapping[str, np.ndarray]) -> Posterior:
    certificate = document["certificate"]
    arrays = {name: torch.from_numpy(value) for name, value in params.items()}
    of_curvature = {name.removeprefix(CURVATURE): each for name, each in arrays.items() if name.startswith(CURVATURE)}
    return Posterior(
        space=LatentSpace.of(
            {site["name"]: (site["shape"], support_from_json(site["support"])) for site in document["sites"]}
        ),
        unconstrained=Gaussian(
            family_from(document["family"]),
            {name: each for name, each in arrays.items() if not name.startswith(CURVATURE)},
        ),
        status=document["status"],
        reason=document["reason"],
        elbo=float(document["elbo"]),
        passes=document["passes"],
        certificate=Certificate(**_from_plain(certificate)) if certificate else None,
        curvature=_curvature_from(of_curvature) if of_curvature else None,
        records=tuple(TraceRow(**_from_plain(row)) for row in document["trace"]),
        coords={name: tuple((dim, tuple(labels)) for dim, labels in dims) for name, dims in document["coords"].items()},
        settings=document["settings"],
    )


def _curvature_arrays(curvature: Curvature | None) -> dict[str, Tensor]:
    if curvature is None:
        return {}
    matrix = curvature.precision
    indices = {"dense": matrix.structure.dense, "groups": matrix.structure.groups}
    return {**indices, "corner": matrix.corner, "cross": matrix.cross, "blocks": matrix.blocks}


def _curvature_from(arrays: Mapping[str, Tensor]) -> Curvature:
    dense, groups = arrays["dense"], arrays["groups"]
    structure = Structure(dense, groups, arrays["corner"].new_ones(len(groups)), torch.ones_like(dense).bool())
    return Curvature.of(Arrowhead(structure, arrays["corner"], arrays["cross"], arrays["blocks"]))


def _digest(document: Mapping[str, Any], params: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 of the description and of every parameter, name, shape and bits."""
    digest = sha256(json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())
    for name, value in sorted(params.items()):
        digest.update(f"{name}{value.dtype.str}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _finite(value: Any) -> Any:
    """Return a float that JSON lacks, nan or an infinity, as its name; anything else as it is."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _to_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _finite(value) for name, value in values.items()}


def _from_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(value) if value in ("nan", "inf", "-inf") else value for name, value in values.items()}
