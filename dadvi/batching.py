"""How the operations of a likelihood, written for one draw, are evaluated for K draws at once.

Vmap has one rule for each operation, whatever the shapes. Its product of a few predictors with K vectors is slow, and
its `u[group]` picks number by number. What takes their place here yields the draws first in memory, so that what
follows runs through both without strides.

An effect that is picked by a field of codes, `u[group]`, is told from all others of its latent: rows then have effects
of their own, whose gradients are added up where they belong, and no chunk has a gradient for groups that it lacks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dadvi.types import Batch, Latents

Pick: TypeAlias = tuple[str, str]
"""A latent and the field of codes by which its elements are picked, one for each row."""

Picked: TypeAlias = Mapping[Pick, Tensor]
"""What was picked."""

NARROW = 32
"""Columns up to which `b @ x.T` takes less time than `x @ b`: with more, it reads x from memory more slowly."""

_PRODUCTS: tuple[Any, ...] = (torch.Tensor.matmul, torch.matmul, torch.Tensor.mv, torch.mv)


class DrawsFirst(TorchFunctionMode):
    """Where entered, takes narrow products `x @ b` as `b @ x.T`, and `u[i]` by `index_select`, for i a field of codes.

    Values and derivatives are the same but for rounding.

    Parameters
    ----------
    latents, fields
        The arguments of a likelihood, as it is called where this is entered.
    picked
        What some picks are to yield, (rows, ...) each: where a latent itself is picked from, by a field itself.

    """

    def __init__(self, latents: Latents, fields: Batch, picked: Picked | None = None) -> None:
        super().__init__()
        self._latents = {id(each): name for name, each in latents.items()}
        self._codes = {id(each): name for name, each in fields.items() if _are_codes(each)}
        self._picked = picked or {}
        self._integers = {id(each): name for name, each in fields.items() if is_integer(each)}
        self.picks: dict[Pick, None] = {}  # that were met
        self.codes: dict[str, None] = {}  # fields that were met as an index of anything

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Evaluate a call of torch."""
        if len(args) == 2 and not kwargs:
            left, right = args
            if func is torch.Tensor.__getitem__:
                index = right if isinstance(right, tuple) else (right,)
                self.codes |= {self._integers[id(each)]: None for each in index if id(each) in self._integers}
            if func in _PRODUCTS:
                if left.dim() == 2 and right.dim() == 1 and left.shape[1] == len(right) <= NARROW:
                    return torch.matmul(right, left.mT)
            elif func is torch.Tensor.__getitem__ and id(right) in self._codes and left.dim():
                return self._pick(left, right)
        return func(*args, **(kwargs or {}))

    def _pick(self, values: Tensor, codes: Tensor) -> Tensor:
        if id(values) in self._latents:
            pick = self._latents[id(values)], self._codes[id(codes)]
            self.picks[pick] = None
            if pick in self._picked:
                return self._picked[pick].clone()  # which the likelihood may change
        return torch.index_select(values, 0, codes) if _select(codes, len(values)) else values[codes]


def pick(picks: Iterable[Pick], latents: Latents, batch: Batch) -> dict[Pick, Tensor]:
    """Return elements (K, rows, ...) picked from latents (K, J, ...), as leaves of a graph that needs their gradients.

    Where that pays: from latents with more elements than there are rows. Codes that count from the end, or lie beyond
    it, are left to the likelihood itself.
    """
    return {
        (latent, field): latents[latent].detach().index_select(1, batch[field]).requires_grad_()
        for latent, field in picks
        if latents[latent].shape[1] > len(batch[field]) and _select(batch[field], latents[latent].shape[1])
    }


def add_gradients(value: Tensor, leaves: Latents, picked: Picked, batch: Batch, totals: Latents) -> None:
    """Add the gradient of a scalar with respect to latents (K, ...), and to what was picked from them, to totals."""
    # What is of no use has no gradient, such as all effects where those of the rows were picked.
    grads: Sequence[Tensor | None]
    grads = torch.autograd.grad(value, [*leaves.values(), *picked.values()], allow_unused=True)
    for latent, grad in zip(leaves, grads[: len(leaves)], strict=True):
        if grad is not None:
            totals[latent].add_(grad)
    for (latent, field), grad in zip(picked, grads[len(leaves) :], strict=True):
        if grad is not None:
            totals[latent].index_add_(1, batch[field], grad.to(totals[latent].dtype))


def is_integer(field: Tensor) -> bool:
    """Return whether a field holds integers, which may be codes."""
    return not (field.is_floating_point() or field.dtype == torch.bool)


def _are_codes(field: Tensor) -> bool:
    return field.dtype == torch.int64 and field.dim() == 1


def _select(codes: Tensor, num_elements: int) -> bool:
    """Return whether `index_select` knows all codes: none counts from the end, or is beyond it."""
    if not len(codes):
        return True
    lowest, highest = codes.aminmax()
    return int(lowest) >= 0 and int(highest) < num_elements
