"""The model as the user writes it: named priors, and a likelihood of one row given the latents.

`Model` resolves the priors into a `LatentSpace` (names, shapes, supports, offsets in R^D) and evaluates
log p(T(η)) + log|det J_T(η)|. What it takes to evaluate the likelihood on data is in `dadvi.likelihood`.
"""

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

from dadvi.errors import ModelError
from dadvi.supports import support_to_json
from dadvi.transforms import LatentSpace, Site
from dadvi.types import Latents

T = TypeVar("T")

Prior: TypeAlias = Distribution | Callable[..., Distribution]


class Model:
    """A prior and a likelihood, in plain torch.

    Parameters
    ----------
    prior
        Name to distribution, or to a function that returns one; a function's arguments are latents that stand before
        it. A latent has the distribution's shape (batch_shape + event_shape).
    likelihood
        Function of latents and fields, by argument name, that returns the distribution of the observed field, with
        batch shape (rows,). It sees one draw of the latents and the rows of one chunk, and treats every row by
        itself.
    observed
        Field that the likelihood's distribution scores.
    log_likelihood
        In place of `likelihood` and `observed`: a function that returns log p(x_i | z) of shape (rows,).
    weight
        Field (rows,) that multiplies each row's log-likelihood.
    dims
        Latent to the fields that its dimensions run along, to label it in results: ``{"effect": "carrier"}`` labels
        its elements by the categories of the field ``carrier``, or by its columns.

    Raises
    ------
    ModelError
        If a latent is discrete or its support depends on another latent, an argument's name is unknown, a shape does
        not fit, or the prior's density is not finite at the starting point.

    """

    def __init__(
        self,
        prior: Mapping[str, Prior],
        likelihood: Callable[..., Distribution] | None = None,
        observed: str | None = None,
        *,
        log_likelihood: Callable[..., Tensor] | None = None,
        weight: str | None = None,
        dims: Mapping[str, str | Sequence[str]] | None = None,
    ) -> None:
        if (likelihood is None) == (log_likelihood is None):
            given = "both were" if likelihood is not None else "neither was"
            raise ModelError(f"Model needs either likelihood= with observed=, or log_likelihood=; {given} given")
        if (likelihood is None) != (observed is None):
            raise ModelError(
                "likelihood= and observed= go together: observed names the field that the likelihood's distribution "
                "scores"
            )
        if not prior:
            raise ModelError("prior={}: a model needs at least one latent")
        self.row_function: Callable[..., Any] = likelihood or log_likelihood  # type: ignore[assignment]
        self.observed = observed
        self.weight = weight
        self.required, self.optional = argument_names(self.row_function, "the likelihood")
        self._priors, self.space, self.start = _resolve(prior)
        self.dims = {name: (along,) if isinstance(along, str) else tuple(along) for name, along in (dims or {}).items()}
        _check_dims(self.dims, self.space)
        value = self.log_prior(self.start[None])[0]
        if not torch.isfinite(value):
            values = {name: z[0].tolist() for name, z in self.space.constrain(self.start[None])[0].items()}
            raise ModelError(
                f"the prior's log-density at the starting point is {value}; it must be finite there. Start: {values}"
            )

    @property
    def dim(self) -> int:
        """D, the number of unconstrained coordinates."""
        return self.space.size

    def log_prior(self, eta: Tensor) -> Tensor:
        """Return log p(T(η)) + log|det J_T(η)| of shape (K,) at η (K, D)."""
        latents, total = self.space.constrain(eta)
        with unvalidated():
            for prior in self._priors:
                total = total + prior.log_prob(latents)
        return total

    def __repr__(self) -> str:
        sites = ", ".join(f"{site.name}{list(site.shape)}" for site in self.space.sites)
        return f"Model({sites}; D={self.dim})"


def _check_dims(dims: Mapping[str, tuple[str, ...]], space: LatentSpace) -> None:
    shapes = {site.name: tuple(site.shape) for site in space.sites}
    taken = {"chain", "draw"} | {field for along in dims.values() for field in along}
    if clash := sorted(taken & set(shapes)):
        raise ModelError(f"latent {clash[0]!r} has the name of a dimension of the results; rename it")
    for name, along in dims.items():
        if len(set(along)) < len(along):
            raise ModelError(f"dims of {name!r} are {along}; a latent can run along a field once only")
        if name not in shapes:
            raise ModelError(f"dims name {name!r}, which is not a latent ({', '.join(shapes)})")
        if len(along) != len(shapes[name]):
            raise ModelError(
                f"dims of {name!r} are {along}, and its shape is {shapes[name]}; give a field for each dimension"
            )


def argument_names(function: Callable[..., Any], what: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of a function's arguments without and with a default; variadic ones are refused."""
    required: list[str] = []
    optional: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ModelError(
                f"{what} takes the argument {str(parameter)!r}; name every latent and field it uses as an argument "
                "instead"
            )
        (required if parameter.default is parameter.empty else optional).append(parameter.name)
    return tuple(required), tuple(optional)


def one_by_one(function: Callable[[Latents], Tensor], latents: Latents) -> Tensor:
    """Apply a function of one draw to K draws one after the other, as is done where vmap cannot."""
    num_draws = len(next(iter(latents.values())))
    return torch.stack([function({name: z[k] for name, z in latents.items()}) for k in range(num_draws)])


def double(value: T) -> T:
    """Return a distribution with its tensors in float64: torch scores in the dtype of its parameters."""
    result: Any = value
    if isinstance(value, Tensor):
        result = value.double() if value.is_floating_point() else value
    elif isinstance(value, list | tuple):
        result = type(value)(double(each) for each in value)
    elif isinstance(value, Distribution | Transform):
        result = copy.copy(value)
        result.__dict__ = {name: double(each) for name, each in vars(value).items()}
    return cast(T, result)


_lock = threading.Lock()
_depth = 0
_validated_outside = True


@contextmanager
def unvalidated() -> Iterator[None]:
    """Switch torch.distributions' argument checks off: they cost kernels, and their data-dependent branches stop vmap.

    The switch is one for the whole process, so nested and concurrent uses are counted, and the last one out restores
    it.
    """
    global _depth, _validated_outside
    with _lock:
        if _depth == 0:
            _validated_outside = Distribution._validate_args
            Distribution.set_default_validate_args(False)
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                Distribution.set_default_validate_args(_validated_outside)


@dataclass
class _SitePrior:
    """The prior of one site: a distribution, or a function of the parents named."""

    name: str
    spec: Prior
    parents: tuple[str, ...]
    vectorised: bool = True

    def distribution(self, latents: Latents) -> Distribution:
        """Return the distribution given one draw of the parents."""
        if isinstance(self.spec, Distribution):
            return self.spec
        return double(self.spec(**{parent: latents[parent] for parent in self.parents}))

    def log_prob(self, latents: Latents) -> Tensor:
        """Return log p(z | parents) (K,) for K draws."""
        if isinstance(self.spec, Distribution):
            density: Tensor = self.spec.log_prob(latents[self.name])
            return density.reshape(len(density), -1).sum(1)
        used = {name: latents[name] for name in (*self.parents, self.name)}
        if not self.vectorised:
            return one_by_one(self._log_prob_of_one, used)
        mapped: Tensor = torch.func.vmap(self._log_prob_of_one)(used)
        return mapped

    def _log_prob_of_one(self, latents: Latents) -> Tensor:
        return self.distribution(latents).log_prob(latents[self.name]).sum()


def _resolve(prior: Mapping[str, Prior]) -> tuple[list[_SitePrior], LatentSpace, Tensor]:
    """Place every latent in R^D, one after the other, each given the earlier ones at their start."""
    priors: list[_SitePrior] = []
    sites: list[Site] = []
    starts: list[Tensor] = []
    latents: dict[str, Tensor] = {}  # one draw, at the start
    for name, spec in prior.items():
        if not (isinstance(name, str) and name.isidentifier()):
            raise ModelError(
                f"latent name {name!r} is not an identifier; the likelihood could not take it as an argument"
            )
        parents = _parents(name, spec, latents)
        site_prior = _SitePrior(name, double(spec) if isinstance(spec, Distribution) else spec, parents)
        distribution = _evaluate(site_prior, latents)
        shape = distribution.batch_shape + distribution.event_shape
        offset = sites[-1].offset + sites[-1].size if sites else 0
        site = Site.make(name, shape, _support(name, distribution), offset)
        start = _start(distribution, site)
        latents[name] = site.constrain(start[None])[0][0]
        _check_log_prob_shape(site_prior, distribution, latents)
        priors.append(site_prior)
        sites.append(site)
        starts.append(start)
    space = LatentSpace(tuple(sites))
    start = torch.cat(starts)
    nearby, _ = space.constrain(torch.stack([start, start + 0.25]))
    for site_prior, site in zip(priors, sites, strict=True):
        if site_prior.parents:
            _check_fixed_support(site_prior, site, {name: z[1] for name, z in nearby.items()})
            site_prior.vectorised = _vmap_agrees(site_prior, nearby)
    return priors, space, start


def _parents(name: str, spec: Prior, earlier: Latents) -> tuple[str, ...]:
    if isinstance(spec, Distribution):
        return ()
    if not callable(spec):
        raise ModelError(
            f"prior of {name!r} is a {type(spec).__name__}; give a torch distribution, or a function that returns one"
        )
    required, optional = argument_names(spec, f"the prior of {name!r}")
    for parent in required:
        if parent not in earlier:
            before = ", ".join(map(repr, earlier)) or "none"
            raise ModelError(
                f"the prior of {name!r} takes {parent!r}, which is not a latent before it (those are: {before}); "
                "reorder or rename"
            )
    return (*required, *(parent for parent in optional if parent in earlier))


def _evaluate(site_prior: _SitePrior, latents: Latents) -> Distribution:
    try:
        distribution = site_prior.distribution(latents)
    except Exception as error:
        shapes = {parent: tuple(latents[parent].shape) for parent in site_prior.parents}
        raise ModelError(
            f"the prior of {site_prior.name!r} failed on latents of shape {shapes}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(distribution, Distribution):
        raise ModelError(
            f"the prior of {site_prior.name!r} returned a {type(distribution).__name__}; it must return a torch "
            "distribution"
        )
    return distribution


def _support(name: str, distribution: Distribution) -> Constraint:
    try:
        support = distribution.support
    except NotImplementedError:
        support = None
    if support is None:
        kind = type(distribution).__name__
        raise ModelError(
            f"the prior of {name!r}, a {kind}, does not tell its support; give dadvi.Constrained(it, support)"
        )
    return support


def _start(distribution: Distribution, site: Site) -> Tensor:
    """Return where the site starts, unconstrained (size,): the prior's mean where that has a finite density, else 0."""
    zero = torch.zeros(site.size, dtype=torch.float64)
    try:
        mean = distribution.mean.double().expand(site.shape)
        start = site.unconstrain(mean[None])[0]
        density = distribution.log_prob(site.constrain(start[None])[0][0])
    except (NotImplementedError, ValueError, RuntimeError):  # no mean, or one outside the support
        return zero
    return start if torch.isfinite(start).all() and torch.isfinite(density).all() else zero


def _check_log_prob_shape(site_prior: _SitePrior, distribution: Distribution, latents: Latents) -> None:
    try:
        density = distribution.log_prob(latents[site_prior.name])
    except Exception as error:
        raise ModelError(
            f"the prior of {site_prior.name!r} cannot score its own starting value: {type(error).__name__}: {error}"
        ) from error
    if density.shape != distribution.batch_shape:
        raise ModelError(
            f"the log-density of {site_prior.name!r} has shape {tuple(density.shape)}; its distribution's batch "
            "shape is "
            f"{tuple(distribution.batch_shape)}. Wrap it in torch.distributions.Independent, or expand it"
        )


def _check_fixed_support(site_prior: _SitePrior, site: Site, elsewhere: Latents) -> None:
    distribution = _evaluate(site_prior, elsewhere)
    shape = distribution.batch_shape + distribution.event_shape
    there = Site.make(site.name, shape, _support(site.name, distribution))
    if there.shape != site.shape or support_to_json(there.support) != support_to_json(site.support):
        raise ModelError(
            f"the shape or support of {site_prior.name!r} changes with the value of {', '.join(site_prior.parents)}; "
            "it must stay "
            f"as it is. Put the prior on a latent of fixed support and compute the other from it, for instance "
            f"Uniform(0, 1) times the bound in place of Uniform(0, bound)"
        )


def _vmap_agrees(site_prior: _SitePrior, latents: Latents) -> bool:
    """Tell whether the prior's function can run under vmap; if not it runs once a draw."""
    with unvalidated():
        one_by_one = torch.stack(
            [site_prior._log_prob_of_one({name: z[k] for name, z in latents.items()}) for k in range(2)]
        )
        try:
            together = site_prior.log_prob(latents)
        except Exception:  # noqa: BLE001  whatever stops vmap, the loop gives the answer
            return False
        return torch.allclose(together, one_by_one, rtol=1e-6, equal_nan=True)
