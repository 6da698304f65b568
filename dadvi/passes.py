"""What a pass can sum over rows.

A pass is a pure function of (model, batch, arguments). It is summed over a shard's chunks in order, by one thread on
one worker, and over shards by a fixed tree, so that the result has the same bits wherever and in whatever order
shards are worked on. Sums are float64 whatever the dtype of the rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dadvi.affine import AffineHessian
from dadvi.batching import add_gradients, pick
from dadvi.errors import InputError
from dadvi.likelihood import BoundModel, weighted
from dadvi.stopwatch import Stopwatch
from dadvi.structure import Structure
from dadvi.types import Batch, FloatArray

MOST_TANGENTS, BYTES_AT_ONCE = 32, 2**25
"""Tangents of a Hessian taken at once, and bytes that a differentiation may save for them: both bound its memory."""

AFFINE_ARRAYS = 6
"""Arrays with a number for each tangent that a Hessian needs at once where parameters are affine."""

Sums = TypeVar("Sums", bound=tuple[FloatArray, ...])
"""What a pass yields: a NamedTuple of float64 arrays, summed elementwise."""


class Summation(ABC, Generic[Sums]):
    """The sums of a pass over the rows of the batches so far."""

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Add the rows of a batch."""

    @abstractmethod
    def sums(self) -> Sums:
        """Return the sums over all rows added."""


class Pass(ABC, Generic[Sums]):
    """A quantity summed over rows; its arguments are the fields of a frozen dataclass."""

    name: ClassVar[str]

    @abstractmethod
    def size(self, dim: int) -> int:
        """Return how many numbers its sums have, for D coordinates."""

    @abstractmethod
    def on_chunk(self, model: BoundModel, batch: Batch) -> Sums:
        """Return the sums over the rows of one chunk."""

    def over(self, model: BoundModel, watch: Stopwatch) -> Summation[Sums]:
        """Return a summation that has no rows yet, and counts its time by phase."""
        return _ByChunk(self, model, watch)


class _ByChunk(Summation[Sums]):
    """A summation of what each batch gives by itself."""

    def __init__(self, work: Pass[Sums], model: BoundModel, watch: Stopwatch) -> None:
        self._work, self._model, self._watch = work, model, watch
        self._total: Sums | None = None

    def add(self, batch: Batch) -> None:
        """Add the rows of a batch."""
        part = self._work.on_chunk(self._model, batch)
        self._total = part if self._total is None else add(self._total, part)
        self._watch.lap("forward")

    def sums(self) -> Sums:
        """Return the sums over all rows added."""
        if self._total is None:
            raise InputError("no chunks to sum over")
        return self._total


class LogLikSums(NamedTuple):
    """Sums of ℓ_i."""

    log_lik: FloatArray  # (K,)


@dataclass(frozen=True)
class LogLik(Pass[LogLikSums]):
    """Log-likelihoods Σ_i ℓ_i(η_k) at K points."""

    name: ClassVar[str] = "log_lik"
    points: FloatArray  # (K, D) unconstrained

    def size(self, dim: int) -> int:  # noqa: ARG002
        """Return how many numbers its sums have."""
        return len(self.points)

    def on_chunk(self, model: BoundModel, batch: Batch) -> LogLikSums:
        """Return the log-likelihoods of one chunk."""
        with torch.no_grad():
            return LogLikSums(model.log_lik(torch.from_numpy(self.points), batch).numpy())


class GradientSums(NamedTuple):
    """Sums of ℓ_i and of its gradient."""

    log_lik: FloatArray  # (K,)
    grad: FloatArray  # (K, D)


@dataclass(frozen=True)
class Gradient(Pass[GradientSums]):
    """Log-likelihoods and gradients Σ_i ∇ℓ_i(η_k) at K points, by reverse-mode automatic differentiation."""

    name: ClassVar[str] = "gradient"
    points: FloatArray  # (K, D) unconstrained

    def size(self, dim: int) -> int:
        """Return how many numbers its sums have."""
        return len(self.points) * (1 + dim)

    def on_chunk(self, model: BoundModel, batch: Batch) -> GradientSums:
        """Return the log-likelihoods and gradients of one chunk."""
        total = self.over(model, Stopwatch())
        total.add(batch)
        return total.sums()

    def over(self, model: BoundModel, watch: Stopwatch) -> Summation[GradientSums]:
        """Return a summation that has no rows yet."""
        return _GradientSummation(self.points, model, watch)


class _GradientSummation(Summation[GradientSums]):
    """Gradients with respect to the constrained latents, which η is made to have once, when all rows are added."""

    def __init__(self, points: FloatArray, model: BoundModel, watch: Stopwatch) -> None:
        self._model, self._watch = model, watch
        self._eta = torch.tensor(points, requires_grad=True)
        latents, _ = model.model.space.constrain(self._eta)
        self._outputs = [latents[name] for name in model.latents]
        self._leaves = {
            name: z.detach().to(model.dtype).requires_grad_(name in model.latents) for name, z in latents.items()
        }
        self._wanted = {name: self._leaves[name] for name in model.latents}
        self._log_lik = torch.zeros(len(points), dtype=torch.float64)
        self._grads = {name: torch.zeros(leaf.shape, dtype=torch.float64) for name, leaf in self._wanted.items()}

    def add(self, batch: Batch) -> None:
        """Add the rows of a batch."""
        picked = pick(self._model.picks, self._leaves, batch)
        log_lik = self._model.log_lik_rows(self._leaves, batch, picked)  # (K, rows)
        self._log_lik += log_lik.detach().sum(1, dtype=torch.float64)
        self._watch.lap("forward")
        if log_lik.requires_grad:  # unlike one that is free of latents
            add_gradients(log_lik.sum(), self._wanted, picked, batch, self._grads)
        self._watch.lap("backward")

    def sums(self) -> GradientSums:
        """Return the log-likelihoods and gradients over all rows added."""
        value = weighted([*self._outputs, self._eta], [*self._grads.values(), torch.zeros_like(self._eta)])
        (grad,) = torch.autograd.grad(value, self._eta)
        self._watch.lap("backward")
        return GradientSums(self._log_lik.numpy(), grad.numpy())


class HessianSums(NamedTuple):
    """Sums of Hessian-vector products."""

    products: FloatArray  # (T, D)


@dataclass(frozen=True)
class HessianVector(Pass[HessianSums]):
    """Hessian-vector products Σ_k w_k Σ_i ∇²ℓ_i(η_k) v_t at T tangents.

    By `dadvi.affine` where that holds, else by reverse over reverse (Pearlmutter 1994).
    """

    name: ClassVar[str] = "hessian_vector"
    points: FloatArray  # (K, D) unconstrained
    tangents: FloatArray  # (T, D)
    weights: FloatArray | None = None  # w (K,); None for the mean over the points
    held: tuple[int, ...] = ()  # coordinates without interest, the same at all points: it may be affine given them

    def size(self, dim: int) -> int:
        """Return how many numbers its sums have."""
        return len(self.tangents) * dim

    def on_chunk(self, model: BoundModel, batch: Batch) -> HessianSums:
        """Return the products of one chunk."""
        total = self.over(model, Stopwatch())
        total.add(batch)
        return total.sums()

    def over(self, model: BoundModel, watch: Stopwatch) -> Summation[HessianSums]:
        """Return a summation that has no rows yet."""
        return _HessianSummation(self, model, watch)


class _HessianSummation(Summation[HessianSums]):
    """Products where parameters are affine, and where they are not."""

    def __init__(self, work: HessianVector, model: BoundModel, watch: Stopwatch) -> None:
        self._model, self._watch = model, watch
        self._points, self._tangents = torch.from_numpy(work.points), torch.from_numpy(work.tangents)
        num_points = len(work.points)
        self._weights = torch.from_numpy(np.full(num_points, 1 / num_points) if work.weights is None else work.weights)
        self._affine = None
        if model.affine or work.held:
            self._affine = AffineHessian(
                model,
                self._points,
                self._weights,
                self._tangents,
                held=work.held,
                numbers_at_once=BYTES_AT_ONCE // (8 * AFFINE_ARRAYS),
            )
        self._differently: Tensor | None = None  # products of batches whose parameters are not affine

    def add(self, batch: Batch) -> None:
        """Add the rows of a batch."""
        if self._affine is None or not self._affine.add(batch):
            products = self._differentiated(batch)
            self._differently = products if self._differently is None else self._differently + products
        self._watch.lap("backward")

    def sums(self) -> HessianSums:
        """Return the products over all rows added."""
        products = torch.zeros_like(self._tangents) if self._affine is None else self._affine.products()
        if self._differently is not None:
            products += self._differently
        self._watch.lap("backward")
        return HessianSums(products.numpy())

    def _differentiated(self, batch: Batch) -> Tensor:
        """Return the products of one batch, by differentiating its log-likelihood twice."""
        (num_points, dim), rows = self._points.shape, len(next(iter(batch.values())))
        if num_points == 1 and dim <= rows:
            return self._weights[0] * _products_side_by_side(self._model, batch, self._points, self._tangents)
        eta = self._points.clone().requires_grad_()
        log_lik = self._weights @ self._model.log_lik(eta, batch)
        return hessian_products(log_lik, eta, self._tangents, self._model.saved_bytes * num_points * rows)


def _products_side_by_side(model: BoundModel, batch: Batch, point: Tensor, tangents: Tensor) -> Tensor:
    """Return ∇²ℓ(η) v_t (T, D) at one point (1, D), by the gradient at as many copies of it as there are tangents.

    Products of predictors and tangents are then products of matrices. `hessian_products` would batch them as so many
    products with a vector, which take several times as long.
    """
    products = []
    for part in tangents.split(tangents_at_once(model.saved_bytes * len(next(iter(batch.values()))))):
        eta = point.repeat(len(part), 1).requires_grad_()
        (grad,) = torch.autograd.grad(model.log_lik(eta, batch).sum(), eta, create_graph=True)
        bends = grad.requires_grad
        products.append(torch.autograd.grad(weighted([grad], [part]), eta)[0] if bends else torch.zeros_like(part))
    return torch.cat(products)


class ExpansionSums(NamedTuple):
    """Sums of ℓ_i, of its gradient, and of Hessian-vector products."""

    log_lik: FloatArray  # (K,)
    grad: FloatArray  # (K, D)
    products: FloatArray  # (G + C, D)


@dataclass(frozen=True)
class Expansion(Pass[ExpansionSums]):
    """What an expansion needs, in one read: `Gradient` at some points, and products of a weighted sum of Hessians.

    Their tangents are those of the structure and are made here, so that the message grows with D alone.
    """

    name: ClassVar[str] = "expansion"
    gradient: Gradient
    points: FloatArray  # of the Hessians (K, D) unconstrained
    weights: FloatArray  # w (K,)
    structure: Structure
    held: tuple[int, ...] = ()  # as those of `HessianVector`

    def size(self, dim: int) -> int:
        """Return how many numbers its sums have."""
        return self.gradient.size(dim) + self.structure.num_tangents * dim

    def on_chunk(self, model: BoundModel, batch: Batch) -> ExpansionSums:
        """Return the sums for one chunk."""
        total = self.over(model, Stopwatch())
        total.add(batch)
        return total.sums()

    def over(self, model: BoundModel, watch: Stopwatch) -> Summation[ExpansionSums]:
        """Return a summation that has no rows yet."""
        hessian = HessianVector(self.points, self.structure.tangents(), self.weights, self.held)
        return _ExpansionSummation(self.gradient.over(model, watch), hessian.over(model, watch))


@dataclass(frozen=True, eq=False)
class _ExpansionSummation(Summation[ExpansionSums]):
    gradient: Summation[GradientSums]
    hessian: Summation[HessianSums]

    def add(self, batch: Batch) -> None:
        """Add the rows of a batch."""
        self.gradient.add(batch)
        self.hessian.add(batch)

    def sums(self) -> ExpansionSums:
        """Return the sums over all rows added."""
        return ExpansionSums(*self.gradient.sums(), *self.hessian.sums())


@dataclass(frozen=True)
class MeanFieldHessian(Pass[HessianSums]):
    """Products of ∇²_θ E_q[Σ_i ℓ_i] with tangents (T, 2D), θ = (μ, ω) of a mean-field Gaussian, at fixed draws."""

    name: ClassVar[str] = "mean_field_hessian"
    theta: FloatArray  # (2D,)
    noise: FloatArray  # ε (K, D)
    weights: FloatArray  # w (K,)
    tangents: FloatArray  # (T, 2D)

    def size(self, dim: int) -> int:
        """Return how many numbers its sums have."""
        return len(self.tangents) * 2 * dim

    def on_chunk(self, model: BoundModel, batch: Batch) -> HessianSums:
        """Return the products (T, 2D) of one chunk."""
        theta, noise, weights = (torch.from_numpy(each) for each in (self.theta, self.noise, self.weights))
        work = model.saved_bytes * len(noise) * len(next(iter(batch.values())))
        products = expected_hessian(lambda eta: model.log_lik(eta, batch), theta, noise, weights, self.tangents, work)
        return HessianSums(products.numpy())


def expected_hessian(
    function: Callable[[Tensor], Tensor],
    theta: Tensor,
    noise: Tensor,
    weights: Tensor,
    tangents: FloatArray,
    work: float,
) -> Tensor:
    """Return products (T, 2D) of ∇²_θ Σ_k w_k f(μ + exp(ω) ⊙ ε_k), θ = (μ, ω), with tangents (T, 2D).

    `function` maps η (K, D) to f (K,); `work` is as in `hessian_products`.
    """
    point = theta[None].clone().requires_grad_()
    loc, log_scale = point[0].split(noise.shape[1])
    value = weights @ function(loc + log_scale.exp() * noise)
    return hessian_products(value, point, torch.from_numpy(tangents), max(work, 8 * noise.numel()))


def hessian_products(value: Tensor, eta: Tensor, tangents: Tensor, work: float) -> Tensor:
    """Return Σ_k ∇²f_k(η_k) v_t (T, D) for a scalar Σ_k f_k(η_k).

    Parameters
    ----------
    value
        The scalar.
    eta
        Points (K, D) that it was computed from.
    tangents
        v (T, D): the same at every point.
    work
        Bytes that the computation saves for a differentiation; bounds how many tangents are taken at once.

    """
    nothing = torch.zeros(tangents.shape, dtype=eta.dtype)
    if not value.requires_grad:  # constant in η
        return nothing
    (grad,) = torch.autograd.grad(value, eta, create_graph=True, allow_unused=True, materialize_grads=True)
    if not grad.requires_grad:  # linear in η
        return nothing
    products = []
    for part in tangents.split(tangents_at_once(max(work, 8 * eta.numel()))):
        outputs = part[:, None].expand(-1, *eta.shape)  # (t, K, D)
        (product,) = torch.autograd.grad(
            grad, eta, outputs, is_grads_batched=True, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        products.append(product.sum(1))
    return torch.cat(products)


def tangents_at_once(saved_bytes: float) -> int:
    """Return how many tangents to take at once where the computation saves so many bytes for a differentiation."""
    return max(1, min(MOST_TANGENTS, int(BYTES_AT_ONCE / max(saved_bytes, 1.0))))


def add(a: Sums, b: Sums) -> Sums:
    """Return the elementwise sum of two results of the same pass."""
    return _like(a, [x + y for x, y in zip(a, b, strict=True)])


def scale(sums: Sums, factor: float) -> Sums:
    """Return the sums times a factor."""
    return _like(sums, [factor * x for x in sums])


def _like(sums: Sums, values: list[FloatArray]) -> Sums:
    make: Any = type(sums)._make  # type: ignore[attr-defined]
    made: Sums = make(values)
    return made


def tree_sum(parts: Sequence[Sums]) -> Sums:
    """Reduce results in the order given by a fixed pairwise tree: ((0+1)+(2+3))+..."""
    if not parts:
        raise InputError("no chunks to sum over")
    level = list(parts)
    while len(level) > 1:
        level = [reduce(add, level[i : i + 2]) for i in range(0, len(level), 2)]
    return level[0]


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one thread: parallelism comes from workers, and the bits must not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
