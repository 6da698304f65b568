"""What a pass can sum over rows, and how one shard is summed.

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

from dadvi.errors import DataError, InputError, ModelError, WorkError
from dadvi.likelihood import BoundModel
from dadvi.sharding import Manifest
from dadvi.sharding.cache import ChunkCache
from dadvi.structure import Structure
from dadvi.types import Batch, FloatArray

MOST_TANGENTS, NUMBERS_AT_ONCE = 32, 2**22
"""Tangents of a Hessian taken at once, and numbers that they may need in a step: the two bound its memory."""

Sums = TypeVar("Sums", bound=tuple[FloatArray, ...])
"""What a pass yields: a NamedTuple of float64 arrays, summed elementwise."""


class Pass(ABC, Generic[Sums]):
    """A quantity summed over rows; its arguments are the fields of a frozen dataclass."""

    name: ClassVar[str]

    @abstractmethod
    def on_chunk(self, model: BoundModel, batch: Batch) -> Sums:
        """Return the sums over the rows of one chunk."""


class LogLikSums(NamedTuple):
    """Sums of ℓ_i."""

    log_lik: FloatArray  # (K,)


@dataclass(frozen=True)
class LogLik(Pass[LogLikSums]):
    """Log-likelihoods Σ_i ℓ_i(η_k) at K points."""

    name: ClassVar[str] = "log_lik"
    points: FloatArray  # (K, D) unconstrained

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

    def on_chunk(self, model: BoundModel, batch: Batch) -> GradientSums:
        """Return the log-likelihoods and gradients of one chunk."""
        eta = torch.tensor(self.points, requires_grad=True)
        log_lik = model.log_lik(eta, batch)
        (grad,) = torch.autograd.grad(log_lik.sum(), eta, allow_unused=True, materialize_grads=True)
        return GradientSums(log_lik.detach().numpy(), grad.numpy())


class HessianSums(NamedTuple):
    """Sums of Hessian-vector products."""

    products: FloatArray  # (T, D)


@dataclass(frozen=True)
class HessianVector(Pass[HessianSums]):
    """Hessian-vector products Σ_k w_k Σ_i ∇²ℓ_i(η_k) v_t at T tangents, by reverse over reverse (Pearlmutter 1994)."""

    name: ClassVar[str] = "hessian_vector"
    points: FloatArray  # (K, D) unconstrained
    tangents: FloatArray  # (T, D)
    weights: FloatArray | None = None  # w (K,); None for the mean over the points

    def on_chunk(self, model: BoundModel, batch: Batch) -> HessianSums:
        """Return the products of one chunk."""
        num_points = len(self.points)
        weights = np.full(num_points, 1 / num_points) if self.weights is None else self.weights
        eta = torch.tensor(self.points, requires_grad=True)
        log_lik = torch.from_numpy(weights) @ model.log_lik(eta, batch)
        work = num_points * len(next(iter(batch.values())))
        return HessianSums(hessian_products(log_lik, eta, torch.from_numpy(self.tangents), work).numpy())


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

    def on_chunk(self, model: BoundModel, batch: Batch) -> ExpansionSums:
        """Return the sums for one chunk."""
        hessian = HessianVector(self.points, self.structure.tangents(), self.weights)
        return ExpansionSums(*self.gradient.on_chunk(model, batch), hessian.on_chunk(model, batch).products)


@dataclass(frozen=True)
class MeanFieldHessian(Pass[HessianSums]):
    """Products of ∇²_θ E_q[Σ_i ℓ_i] with tangents (T, 2D), θ = (μ, ω) of a mean-field Gaussian, at fixed draws."""

    name: ClassVar[str] = "mean_field_hessian"
    theta: FloatArray  # (2D,)
    noise: FloatArray  # ε (K, D)
    weights: FloatArray  # w (K,)
    tangents: FloatArray  # (T, 2D)

    def on_chunk(self, model: BoundModel, batch: Batch) -> HessianSums:
        """Return the products (T, 2D) of one chunk."""
        theta, noise, weights = (torch.from_numpy(each) for each in (self.theta, self.noise, self.weights))
        work = len(noise) * len(next(iter(batch.values())))
        products = expected_hessian(lambda eta: model.log_lik(eta, batch), theta, noise, weights, self.tangents, work)
        return HessianSums(products.numpy())


def expected_hessian(
    function: Callable[[Tensor], Tensor], theta: Tensor, noise: Tensor, weights: Tensor, tangents: FloatArray, work: int
) -> Tensor:
    """Return products (T, 2D) of ∇²_θ Σ_k w_k f(μ + exp(ω) ⊙ ε_k), θ = (μ, ω), with tangents (T, 2D).

    `function` maps η (K, D) to f (K,); `work` is as in `hessian_products`.
    """
    point = theta[None].clone().requires_grad_()
    loc, log_scale = point[0].split(noise.shape[1])
    value = weights @ function(loc + log_scale.exp() * noise)
    return hessian_products(value, point, torch.from_numpy(tangents), max(work, noise.numel()))


def hessian_products(value: Tensor, eta: Tensor, tangents: Tensor, work: int) -> Tensor:
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
        Numbers that one tangent needs in a step of the computation; bounds how many are taken at once.

    """
    nothing = torch.zeros(tangents.shape, dtype=eta.dtype)
    if not value.requires_grad:  # constant in η
        return nothing
    (grad,) = torch.autograd.grad(value, eta, create_graph=True, allow_unused=True, materialize_grads=True)
    if not grad.requires_grad:  # linear in η
        return nothing
    at_once = max(1, min(MOST_TANGENTS, NUMBERS_AT_ONCE // max(work, eta.numel())))
    products = []
    for part in tangents.split(at_once):
        outputs = part[:, None].expand(-1, *eta.shape)  # (t, K, D)
        (product,) = torch.autograd.grad(
            grad, eta, outputs, is_grads_batched=True, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        products.append(product.sum(1))
    return torch.cat(products)


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


def sum_shard(
    work: Pass[Sums], model: BoundModel, chunks: ChunkCache, members: Sequence[int], *, check: bool = False
) -> Sums:
    """Sum a pass over chunks of one shard, in the order of `members`.

    Chunks with fewer rows than the model has coordinates are taken some at a time: gradients and the like have an
    element for every coordinate, whatever the rows, and should not be made anew for a few of these.

    Parameters
    ----------
    chunks
        Where chunks are read.
    members
        Which chunks, all of one shard.
    check
        Check the rows as they are read: set when they are read for the first time.

    Raises
    ------
    DataError
        If a row is refused, or a chunk cannot be read; with shard and chunk.
    ModelError
        If the likelihood fails on some rows; with shard and chunk.
    WorkError
        If memory runs out, or a store cannot be read at the moment; with shard and chunk.

    """
    at_once = max(1, model.model.dim // chunks.data.manifest.chunk_rows)
    total: Sums | None = None
    with single_thread():
        for first in range(0, len(members), at_once):
            part = _sum_together(work, model, chunks, members[first : first + at_once], check=check)
            total = part if total is None else add(total, part)
    if total is None:
        raise DataError(f"pass {work.name!r} was given no chunks")
    return total


def _sum_together(
    work: Pass[Sums], model: BoundModel, chunks: ChunkCache, members: Sequence[int], *, check: bool
) -> Sums:
    """Return the sums over the rows of some chunks, as `sum_shard`."""
    manifest = chunks.data.manifest
    read: list[Batch] = []
    shard, chunk = manifest.shard(members[0]), members[0]
    where = f"shard {shard}, chunk {chunk}"
    try:
        for chunk in members:
            where = f"shard {shard}, chunk {chunk}"
            read.append(chunks.read(chunk, model.fields))
            if check:
                model.check_rows(read[-1], manifest.rows(chunk)[0])
        if len(read) > 1:
            where = f"shard {shard}, chunks {members[0]} to {chunk}"
            batch: Batch = {name: torch.cat([each[name] for each in read]) for name in model.fields}
        else:
            batch = read[0]
        return work.on_chunk(model, batch)
    except InputError as error:
        raise type(error)(str(error) if where in str(error) else f"{error} ({where})") from error
    except OSError as error:  # may pass: the executor retries it
        raise OSError(f"{where} could not be read: {type(error).__name__}: {error}") from error
    except IndexError as error:
        codes = {
            name: f"{int(values.min())} to {int(values.max())}"
            for name, values in ((name, torch.cat([each[name] for each in read])) for name in model.fields)
            if not (values.is_floating_point() or values.dtype == torch.bool)
        }
        raise DataError(
            f"{error} in {where} ({_rows(manifest, members)}): an integer field indexes beyond a latent. Their values "
            f"there: {codes}; give the latent an element for every code, or mend the data"
        ) from error
    except Exception as error:
        # What the likelihood raises on these rows it will raise again; memory, or a store, may come back.
        kind = WorkError if isinstance(error, WorkError | MemoryError) else ModelError
        raise kind(
            f"pass {work.name!r} failed on {where} ({_rows(manifest, members)}): {type(error).__name__}: {error}"
        ) from error


def _rows(manifest: Manifest, members: Sequence[int]) -> str:
    return f"rows {manifest.rows(members[0])[0]} to {manifest.rows(members[-1])[1] - 1}"


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one thread: parallelism comes from workers, and the bits must not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
