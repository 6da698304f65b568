"""A model meets its data: names resolved, the likelihood checked on some rows, and how to evaluate it chosen."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from dadvi.affine import AffineHessian, has_affine_parameters
from dadvi.batching import DrawsFirst, Pick
from dadvi.errors import InputError, ModelError
from dadvi.likelihood import BoundModel, Strategy, concatenated, fixed_support
from dadvi.model import Model, unvalidated
from dadvi.passes import single_thread
from dadvi.sharding import ShardedDataset
from dadvi.types import Batch, Purpose, random_stream

CHECK_ROWS = 2_048
"""Rows of each of two chunks on which the likelihood is checked before a fit."""

FAR = 10.0
"""How far the points at which parameters are compared lie from one another, in each coordinate."""

IN_TORCH = "in torch, without .item(), .detach(), .numpy() or NumPy functions of latents"

AFFINE_AGREEMENT = 1e-3
"""Difference of two ways to a product of a Hessian, beside its largest element, up to which they agree in float32."""


def check_types(model: Any, data: Any) -> None:
    """Refuse what is not a model, or not a data set."""
    if not isinstance(model, Model):
        raise ModelError(f"model is a {type(model).__name__}; give a dadvi.Model")
    if not isinstance(data, ShardedDataset):
        raise InputError(f"data is a {type(data).__name__}; give what dadvi.open_shards or dadvi.write_shards returns")


def end_chunks(data: ShardedDataset) -> list[int]:
    """Return the first and the last chunk, on whose rows a likelihood is checked."""
    return sorted({0, data.manifest.num_chunks - 1})


def bind_to(model: Model, data: ShardedDataset) -> BoundModel:
    """Check a model against rows of the first and the last chunk of a data set, and resolve its names."""
    chunks = []
    for chunk in end_chunks(data):
        batch = {name: values[:CHECK_ROWS] for name, values in data.read(chunk).items()}
        chunks.append((data.manifest.rows(chunk)[0], batch))
    return bind(model, {name: values.dtype for name, values in chunks[0][1].items()}, chunks)


@single_thread()  # what is decided here must not depend on the number of cores
def bind(model: Model, fields: Mapping[str, torch.dtype], chunks: Sequence[tuple[int, Batch]]) -> BoundModel:
    """Resolve a model's names against the data, check its likelihood on rows of two chunks, choose how to evaluate it.

    Parameters
    ----------
    fields
        Name to dtype of every field of the data set.
    chunks
        One or two (first row, batch), of at least one row each.

    Raises
    ------
    ModelError
        If a name is unknown or ambiguous, the likelihood fails, has the wrong shape, is not finite at the start, or
        is not additive over rows.
    DataError
        If these rows are not finite, have negative codes or lie outside the likelihood's support.

    """
    bound = _resolve_names(model, fields)
    bound = replace(bound, codes=_codes(bound, chunks[0][1]))
    for first_row, batch in chunks:
        bound.check_values(batch, first_row)
        _check_result(bound, batch, first_row)
        bound.check_observed(batch, first_row)
        _check_finite_start(bound, batch, first_row)
    _check_additive(bound, [batch for _, batch in chunks])
    _check_gradient(bound, chunks[0][1])
    bound = replace(bound, strategy=_fastest_strategy(bound, chunks[0][1]))
    bound = replace(bound, affine=_is_affine(bound, chunks[0][1]), picks=_picks(bound, chunks[0][1]))
    bound = replace(bound, support=_support(bound, chunks[0][1]))
    return replace(bound, saved_bytes=_saved_bytes(bound, chunks[0][1]))


def _resolve_names(model: Model, fields: Mapping[str, torch.dtype]) -> BoundModel:
    latents = {site.name for site in model.space.sites}
    both = sorted(latents & set(fields) & {*model.required, *model.optional})
    if both:
        raise ModelError(f"{both[0]!r} is both a latent and a field; rename one of them")
    wanted: list[tuple[str, str]] = [(name, "the likelihood takes") for name in model.required if name not in latents]
    wanted += [
        (name, f"{role} is")
        for role, name in (("observed", model.observed), ("weight", model.weight))
        if name is not None
    ]
    for name, role in wanted:
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise ModelError(
                f"{role} {name!r}, which is neither a latent ({', '.join(sorted(latents))}) nor a field of the data "
                f"({known})"
            )
    arguments = tuple(name for name in (*model.required, *model.optional) if name in fields)
    used = tuple(dict.fromkeys((*arguments, *(name for name, role in wanted if role != "the likelihood takes"))))
    floating = [fields[name] for name in used if fields[name].is_floating_point]
    dtype = torch.float64
    if floating:
        dtype = torch.float64 if torch.float64 in floating else torch.float32
    return BoundModel(
        model=model,
        fields=used,
        arguments=arguments,
        latents=tuple(name for name in (*model.required, *model.optional) if name in latents),
        dtype=dtype,
    )


def _start_and_nearby(model: Model) -> Tensor:
    noise = random_stream(0, Purpose.CHECK).standard_normal(model.dim)
    return torch.stack([model.start, model.start + 0.1 * torch.from_numpy(noise)])


def _check_result(bound: BoundModel, batch: Batch, first_row: int) -> None:
    """Call the likelihood on one draw as the user wrote it, and check what it returns."""
    latents, _ = bound.model.space.constrain(bound.model.start[None])
    one = {name: latents[name][0].to(bound.dtype) for name in bound.latents}
    rows = bound._cast(batch)
    num_rows = len(next(iter(rows.values())))
    shapes = {name: tuple(value.shape) for name, value in {**one, **rows}.items()}
    try:
        result = bound._call(one, rows)
        if bound.model.observed is not None and not isinstance(result, Distribution):
            raise ModelError(
                f"likelihood returned a {type(result).__name__}; it must return a torch distribution (or use "
                "log_likelihood=)"
            )
        try:
            with unvalidated():  # a value outside the support has its own message, with row and count
                log_lik = bound._log_lik_of_one(one, rows)
        except (IndexError, RuntimeError):
            bound.check_observed(batch, first_row)  # some densities fail there instead of telling
            raise
    except InputError:
        raise
    except Exception as error:
        raise ModelError(
            f"the likelihood failed on {num_rows} rows: {type(error).__name__}: {error}. Shapes of its arguments: "
            f"{shapes}"
        ) from error
    if not isinstance(log_lik, Tensor) or log_lik.shape != (num_rows,):
        seen = f"shape {tuple(log_lik.shape)}" if isinstance(log_lik, Tensor) else f"type {type(log_lik).__name__}"
        raise ModelError(
            f"the log-likelihood of {num_rows} rows has {seen}; it must have shape ({num_rows},), one number a row. "
            f"Shapes of the arguments: {shapes}. Where a row holds several values, wrap the distribution in "
            f"torch.distributions.Independent(..., 1); where shapes broadcast, squeeze the field"
        )
    if bound.model.weight is not None and rows[bound.model.weight].shape != (num_rows,):
        raise ModelError(
            f"weight {bound.model.weight!r} has shape {tuple(rows[bound.model.weight].shape)}; it must be one number "
            f"a row, ({num_rows},)"
        )


def _check_finite_start(bound: BoundModel, batch: Batch, first_row: int) -> None:
    latents, _ = bound.model.space.constrain(bound.model.start[None])
    log_lik = bound.log_lik_rows(latents, batch)[0]
    if not torch.isfinite(log_lik).all():
        row = int((~torch.isfinite(log_lik)).nonzero()[0, 0])
        values = {name: z[0].tolist() for name, z in latents.items() if z[0].numel() <= 8}
        raise ModelError(
            f"the log-likelihood of row {first_row + row} is {log_lik[row].item()} at the starting point; it must be "
            "finite there. "
            f"Latents at the start: {values}. Rescale the predictors or centre the prior nearer to the data"
        )


def _check_additive(bound: BoundModel, batches: Sequence[Batch]) -> None:
    """Check that a row's log-likelihood does not depend on which rows stand beside it, in float64."""
    rows = concatenated(batches)
    num_rows = len(next(iter(rows.values())))
    if num_rows < 2:
        return
    exact = replace(bound, dtype=torch.float64)
    latents, _ = bound.model.space.constrain(_start_and_nearby(bound.model))
    try:
        together = exact.log_lik_rows(latents, rows)
    except Exception as error:
        raise ModelError(
            f"the likelihood works in {bound.dtype} and fails in float64, in which fits start: {type(error).__name__}: "
            f"{error}. Give tensors that it makes or closes over the dtype of its arguments, as by x.to(beta.dtype)"
        ) from error
    half = num_rows // 2
    parts = [{name: value[part] for name, value in rows.items()} for part in (slice(half), slice(half, None))]
    apart = torch.cat([exact.log_lik_rows(latents, part) for part in parts], dim=1)
    if not torch.allclose(together, apart, rtol=1e-6, atol=1e-8, equal_nan=True):
        row = int((together - apart).abs().nan_to_num().amax(0).argmax())
        raise ModelError(
            f"the likelihood is not additive over rows: row {row} of {num_rows} has log-likelihood "
            f"{together[0, row].item():.8g} "
            f"beside all of them and {apart[0, row].item():.8g} beside half of them. It must treat each row by "
            "itself: compute "
            f"means, standardisations and ranks when the data are written"
        )


def _check_gradient(bound: BoundModel, batch: Batch) -> None:
    """Refuse a latent that moves the log-likelihood but gets no gradient, as after .item(), .detach() or NumPy."""
    space = bound.model.space
    eta = _start_and_nearby(bound.model)[1:]
    with _told_of("the prior"):
        _value_and_grad(lambda eta, _: bound.model.log_prior(eta) + eta[:, :0].sum(1), eta, batch)
    with _told_of("the likelihood"):
        value, grad = _value_and_grad(bound.log_lik, eta, batch)
    for site in space.sites:
        block = slice(site.offset, site.offset + site.size)
        if site.name not in bound.latents or grad[0, block].any():
            continue
        moved = eta.clone()
        moved[0, block] += 0.5
        if bound.log_lik(moved, batch).detach() != value:
            raise ModelError(
                f"latent {site.name!r} changes the log-likelihood but no gradient reaches it; keep the likelihood "
                f"{IN_TORCH}"
            )


@contextmanager
def _told_of(what: str) -> Iterator[None]:
    """Tell of a function of the user's that fails where gradients are taken, though its values could be had."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # What torch advises, to detach the tensor, would leave the latent without a gradient.
        numpy = "Can't call numpy() on Tensor that requires grad" in str(error)
        reason = "it takes a latent to NumPy" if numpy else f"{type(error).__name__}: {error}"
        raise ModelError(f"{what} has values but no gradients: {reason}; keep {what} {IN_TORCH}") from error


def _fastest_strategy(bound: BoundModel, batch: Batch) -> Strategy:
    """Return the first strategy whose values and gradients agree with calling the likelihood once a draw."""
    eta = _start_and_nearby(bound.model)
    reference = _value_and_grad(bound.log_lik, eta, batch)
    candidates: tuple[Strategy, ...] = ("parameters", "vmap") if bound.model.observed is not None else ("vmap",)
    for strategy in candidates:
        try:
            candidate = _value_and_grad(replace(bound, strategy=strategy).log_lik, eta, batch)
        except Exception:  # noqa: BLE001, S112  whatever stops this way, the next one is tried; the last is the reference
            continue
        if all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)
            for a, b in zip(candidate, reference, strict=True)
        ):
            return strategy
    return "loop"


def _support(bound: BoundModel, batch: Batch) -> tuple[str, Constraint] | None:
    """Return the support of the likelihood's distribution, and its name, if one holds for all rows and latents."""
    if bound.model.observed is None:
        return None
    distribution = bound.at_start(batch)
    support = fixed_support(distribution)
    return None if support is None else (type(distribution).__name__, support)


def _codes(bound: BoundModel, batch: Batch) -> tuple[str, ...]:
    """Return the integer fields by which the likelihood picks elements of tensors, of latents or of what it computes.

    What it does after it has failed is not seen.
    """
    latents, _ = bound.model.space.constrain(bound.model.start[None])
    one = {name: latents[name][0].to(bound.dtype) for name in bound.latents}
    rows = bound._cast(batch)
    mode = DrawsFirst(one, rows)
    with suppress(Exception), unvalidated():  # `_check_result` tells of it
        bound._call(one, rows, mode)
    return tuple(mode.codes)


def _picks(bound: BoundModel, batch: Batch) -> tuple[Pick, ...]:
    """Return by which fields of codes the likelihood picks elements of which latents, where that can be told apart."""
    if bound.strategy == "loop":
        return ()
    latents, _ = bound.model.space.constrain(bound.model.start[None])
    one = {name: latents[name][0].to(bound.dtype) for name in bound.latents}
    rows = bound._cast(batch)
    mode = DrawsFirst(one, rows)
    try:
        bound._call(one, rows, mode)
        eta = _start_and_nearby(bound.model)
        latents, _ = bound.model.space.constrain(eta)
        picked = {
            (name, field): latents[name].to(bound.dtype).index_select(1, batch[field]) for name, field in mode.picks
        }
        as_it_is, apart = (bound.log_lik_rows(latents, batch, each).sum(1) for each in ({}, picked))
    except Exception:  # noqa: BLE001  whatever stops this way, there is the likelihood as it is
        return ()
    return tuple(mode.picks) if torch.allclose(as_it_is, apart, rtol=1e-3, atol=1e-3, equal_nan=True) else ()


def _is_affine(bound: BoundModel, batch: Batch) -> bool:
    """Return whether the parameters of the likelihood's distribution seem affine in η, and give the same Hessian."""
    if bound.strategy != "parameters":
        return False
    model, weights = bound.model, torch.tensor([0.25, 0.75], dtype=torch.float64)
    noise = torch.from_numpy(random_stream(0, Purpose.CHECK, 1).standard_normal((6, model.dim)))
    points, tangents = model.start + 0.1 * noise[:2], noise[2:3]
    eta = points.clone().requires_grad_()
    if not has_affine_parameters(replace(bound, dtype=torch.float64), batch, FAR * noise[3:]):
        return False
    hessian = AffineHessian(bound, points, weights, tangents, numbers_at_once=CHECK_ROWS)
    if not hessian.add(batch):
        return False
    products = hessian.products()
    (grad,) = torch.autograd.grad(weights @ bound.log_lik(eta, batch), eta, create_graph=True)
    reference = torch.autograd.grad((grad * tangents).sum(), eta)[0].sum(0) if grad.requires_grad else 0 * eta[0]
    return bool(((products[0] - reference).abs() <= AFFINE_AGREEMENT * reference.abs().max()).all())


def _saved_bytes(bound: BoundModel, batch: Batch) -> float:
    """Return the bytes that a differentiation saves on its way forward, for each further row and draw."""
    eta = _start_and_nearby(bound.model).requires_grad_()
    num_rows = len(next(iter(batch.values())))

    def saved_by(rows: Batch) -> int:
        cast = bound._cast(rows)
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            value = bound.log_lik(eta, cast)  # held, so that no storage is freed and another put in its place
        fields = {each.untyped_storage().data_ptr() for each in (*rows.values(), *cast.values())}
        del value
        return sum(size for storage, size in saved.items() if storage not in fields)

    half = {name: values[: num_rows // 2] for name, values in batch.items()}
    more = saved_by(batch) - (saved_by(half) if num_rows > 1 else 0)
    return max(1.0, more / (len(eta) * (num_rows - num_rows // 2)))


def _value_and_grad(function: Callable[[Tensor, Batch], Tensor], eta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    eta = eta.clone().requires_grad_()
    value = function(eta, batch)
    (grad,) = torch.autograd.grad(value.sum(), eta, allow_unused=True, materialize_grads=True)
    return value.detach(), grad
