"""Finding the structure of a model's Hessian: which latents are effects of groups, by tests and not by assumption."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dadvi.model import Model
from dadvi.passes import HessianVector
from dadvi.quadratic import DENSE_LIMIT, prior_products
from dadvi.quadrature import Rule
from dadvi.structure import Structure
from dadvi.subsample import Subsample
from dadvi.transforms import Site
from dadvi.types import Purpose, random_stream

FEWEST_GROUPS = 16
"""Groups below which a latent's coordinates are taken as dense: probing would save next to nothing."""

LARGEST_CROSS = 4e7
"""Numbers in the curvature that dense coordinates share with all others, at most."""

FEW_ROWS = 250
"""Rows of each chunk that are looked at first."""

HUB_SPREAD = (0.3, 1.0, 3.0)
"""How far from the start points lie at which it is seen what the prior couples."""

AGREEMENT = 1e-6
"""Difference of two probes, beside the largest curvature, up to which they agree."""


def find_structure(subsample: Subsample, seed: int) -> Structure | None:
    """Return the structure of the Hessians of likelihood and prior, as probes of the subsample show it.

    A latent is a candidate if it has many elements along its longest axis: its groups. Two probes of ±1 along that
    axis, with independent signs, give the same curvature within every group if no two groups curve together, and
    hardly ever if some do. The candidate with most groups is taken first; others of as many groups join it if theirs
    are the same groups, such as intercepts and slopes of the same users.

    Returns
    -------
    Structure or None
        None if D exceeds `DENSE_LIMIT` and there is no structure that makes the curvature small enough to be held.

    """
    space, dim = subsample.model.model.space, subsample.model.model.dim
    rng = random_stream(seed, Purpose.CURVATURE, 2)
    candidates = sorted((columns(site) for site in space.sites), key=lambda each: -len(each[0]))
    taken: list[Tensor] = []
    for candidate in candidates:
        as_many = not taken or len(candidate[0]) == len(taken[0])
        if len(candidate[0]) >= FEWEST_GROUPS and as_many and _agree(subsample, [*taken, *candidate], rng):
            taken += candidate
    if not taken and dim > DENSE_LIMIT:
        return None
    structure = Structure.grouped(dim, taken, rng) if taken else Structure.full(dim)
    num_dense = len(structure.dense)
    if num_dense > DENSE_LIMIT or num_dense * dim > LARGEST_CROSS:
        return None
    return replace(structure, hubs=_hubs(subsample.model.model, structure, rng))


def _hubs(model: Model, structure: Structure, rng: np.random.Generator) -> Tensor:
    """Return dense coordinates (G,) without which the prior, near the start, would let no dense one curve with others.

    Those that curve with effects of groups, and then one after the other what most of the rest curve with.
    """
    spread = torch.tensor(HUB_SPREAD, dtype=torch.float64)[:, None]  # a coupling may be 0 at one of several points
    points = Rule.equal(model.start + spread * torch.from_numpy(rng.standard_normal((len(spread), model.dim))))
    products = prior_products(model, points, structure.tangents())[: len(structure.dense)]
    hubs = (products[:, structure.groups.flatten()] != 0).any(1)
    coupled = products[:, structure.dense] != 0
    coupled |= coupled.T.clone()
    coupled.fill_diagonal_(False)
    coupled[hubs], coupled[:, hubs] = False, False
    degrees = coupled.sum(1)
    while degrees.any():
        most = int(degrees.argmax())
        hubs[most], degrees[most] = True, 0
        degrees -= coupled[most].long()
        coupled[most], coupled[:, most] = False, False
    return hubs


def columns(site: Site) -> list[Tensor]:
    """Return a latent's coordinates by column, each (J,), its longest axis being that of the groups."""
    shape = site.unconstrained_shape or torch.Size([1])
    coordinates = torch.arange(site.offset, site.offset + site.size).reshape(shape)
    axis = int(np.argmax(shape))
    return list(coordinates.movedim(axis, 0).reshape(shape[axis], -1).unbind(1))


def _agree(subsample: Subsample, columns: Sequence[Tensor], rng: np.random.Generator) -> bool:
    """Return whether two probes show the same blocks, in the likelihood and in the prior, at a point near the start.

    Few rows tell most that do not, and all rows are asked about the others.
    """
    few = subsample.top(FEW_ROWS)
    if few.num_rows < subsample.num_rows and not _agree_on(few, columns, rng):
        return False
    return _agree_on(subsample, columns, rng)


def _agree_on(subsample: Subsample, columns: Sequence[Tensor], rng: np.random.Generator) -> bool:
    model = subsample.model.model
    points = (model.start + 0.3 * torch.from_numpy(rng.standard_normal(model.dim)))[None]
    seen: list[list[Tensor]] = [[], []]
    for _ in range(2):
        structure = Structure.grouped(model.dim, columns, rng)
        probes = structure.probes()
        products = (
            torch.from_numpy(subsample.run(HessianVector(points.numpy(), probes)).products),
            prior_products(model, Rule.equal(points), probes),
        )
        for blocks, product in zip(seen, products, strict=True):
            blocks.append(product[:, structure.groups] * structure.signs[:, None])
    return all(bool(((one - two).abs() <= AGREEMENT * one.abs().max()).all()) for one, two in seen)
