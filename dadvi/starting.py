"""Where a run of the anchored solver starts: the fit to the subsample alone, and what is decided there for the run.

The start's curvature comes from slices of the subsample. By how these differ it is known how well the subsample sees
every latent; by what they see around the start, whether the curvature at a mean stands for that averaged over q.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dadvi.families import Family, Gaussian
from dadvi.local import Bends, LocalModel, Noise, Surrogate, Taylor, solve
from dadvi.model import Model
from dadvi.passes import HessianVector, scale
from dadvi.quadratic import Curvature, largest_error, optimum, prior_draws, prior_hessian
from dadvi.quadrature import Rule, gauss_hermite, orthogonal, spherical, stratified
from dadvi.scales import Scales, find_scales
from dadvi.structure import Arrowhead, Structure
from dadvi.subsample import Subsample, warm_start, warn_if_ordered
from dadvi.types import Purpose, random_stream

CurvatureFrom = Literal["auto", "subsample", "data"]

WARM_ROWS, WARM_ROWS_PER_COORDINATE, WARM_ROWS_PER_EFFECT = 4_000, 50, 5
"""Rows of the part of the subsample on which the search for a start begins, or for each dense coordinate if more; and
for each effect of a group in addition."""

WARM_DISTANCE = 10.0
"""The start is near enough to the subsample's optimum when a thirtieth of this many of its posterior sds away."""

SLICES = 16
"""Parts of the subsample whose curvatures are compared to estimate their noise."""

SLICES_FOR_SPREAD = 2
"""Of them, those whose curvatures are averaged over q as well, to compare: with the same rows this tells enough."""

POORLY_SEEN = 0.02
"""Relative noise of an sd whose curvature is measured on the subsample above which the curvature is that of all the
data; half the tolerance, if that is less."""

NARROW = 0.003
"""Relative difference of precisions at q's mean and averaged over q, below which those at the mean will do."""

FEW_POINTS, MORE_POINTS = 3, 5
"""Points along each direction of the draws for a pass that measures Hessians too. With two, what they leave of the mean
of each effect adds up, over two thousand effects, to hundredths of an sd of their scale."""

COARSE = 0.01
"""Norm of the relative errors, over the effects of groups, of precisions averaged by fewer points, above which there
are more: errors of all groups together move the scale that they share."""

TAYLOR_DRAWS = 32
"""Draws of q for a pass that measures Hessians too, at most."""

ROWS_OF_AN_EFFECT = 10
"""Rows of the subsample for each effect of a group from which on it tells that fewer points and draws will do: by too
few it takes the effects that it sees for known, and with them what q spreads over."""

LITTLE = 0.04
"""What these draws may leave unknown of the tolerance, by the subsample: with all rows and the prior's draws it was up
to nine times that."""

DIRECTIONS = 4
"""Directions of draws at least: by the differences of fewer, a single coordinate's error can look like none."""

FEWEST_DRAWS, MOST_DRAWS, DRAWS_WORK, FEWEST_COORDINATES = 4, 256, 2e6, 16
"""Draws of q, and the product of draws, coordinates (or `FEWEST_COORDINATES`) and rows of the subsample that bounds
them, unless told."""

FEWEST_MATRICES = 2
"""Of a spherical rule, by whose differences its error is known."""


@dataclass(frozen=True, eq=False)
class Start:
    """What the warm start found, which holds for the run."""

    q: Gaussian
    unit: Tensor  # posterior sds given the subsample alone (D,)
    noise: Noise  # the draws of the run
    scales: Scales | None  # of an expansion with the curvature of all the data; None for a surrogate
    sd_noise: float  # relative error of an sd by that curvature, where a subsample tells it


@dataclass(frozen=True, eq=False)
class Search:
    """What a start is found by.

    Parameters
    ----------
    subsample, structure
        S, and the structure of the Hessian on it.
    factor
        What scales sums over S up to all the data.
    family
        Of q.
    num_draws, curvature_from
        As in `Anchored`.
    tol, near
        The tolerance of the run, and that of its searches.
    seed
        Of the run.

    """

    subsample: Subsample
    structure: Structure
    factor: float
    family: Family
    num_draws: int | None
    curvature_from: CurvatureFrom
    tol: float
    near: float
    seed: int

    @property
    def model(self) -> Model:
        """The model, whose prior is exact."""
        return self.subsample.model.model

    @cached_property
    def noise(self) -> Noise:
        """Draws of q: always the same, so that those for the prior, many numbers, need not be kept with a state."""
        return self._draws(self.family.noise_dim(self.model.dim))

    def _draws(self, noise_dim: int, stream: int = 0, num_points: int = 3) -> Noise:
        affordable = 2 * int(DRAWS_WORK / (2 * max(noise_dim, FEWEST_COORDINATES) * self.subsample.num_rows))
        num_draws = self.num_draws or min(MOST_DRAWS, max(FEWEST_DRAWS, affordable))
        return self._fixed_draws(num_draws, noise_dim, stream, num_points)

    def _fixed_draws(self, num_draws: int, noise_dim: int, stream: int, num_points: int) -> Noise:
        rng, grouped = random_stream(self.seed, Purpose.DRAWS, stream), self.structure.groups.numel() > 0
        return fixed_draws(num_draws, noise_dim, rng, num_points if grouped else None, self.subsample.model.affine)

    def find(self) -> tuple[Start, Bends | None]:
        """Fit the subsample, and narrow the result to what all the data will say.

        Returns
        -------
        Start, Bends or None
            What the surrogate bends like at its mean, where the run can go on with that.

        """
        noise, warm_noise = self.noise, self._draws(self.model.dim, 1)  # a mean field, whatever the family of the run
        center = Rule.equal(torch.zeros(1, self.model.dim, dtype=torch.float64))
        warm_rows = max(WARM_ROWS, WARM_ROWS_PER_COORDINATE * len(self.structure.dense))
        warm_rows += WARM_ROWS_PER_EFFECT * self.structure.groups.numel()
        warm = warm_start(self.subsample.part(warm_rows).top(warm_rows), self.structure, self.seed)
        alone = Surrogate.untilted(self.subsample, self.structure, 1.0, warm.loc)
        warm = self._solve(alone, warm, replace(warm_noise, curvature=center), WARM_DISTANCE, curved=False)
        warn_if_ordered(self.subsample, warm.loc)
        at = Rule.equal(warm.loc[None])
        work = HessianVector(at.nodes.numpy(), self.structure.tangents())
        seen = self.subsample.for_curvature.sliced(SLICES)
        parts = [self.structure.arrowhead(torch.from_numpy(sums.products)) for sums in seen.each(work)]
        more = self.subsample.num_rows / seen.num_rows
        of_subsample, of_prior = sum(parts[1:], parts[0]) * more, prior_hessian(self.model, at, self.structure)
        unit = Curvature.of(-(of_subsample + of_prior)).stddev
        factor, bend = self.factor * more, of_subsample * self.factor
        curvature = Curvature.of(-(bend + of_prior))
        q = optimum(self.family, warm.loc, curvature)
        scales, sd_noise, bends = None, 0.5 * _precision_noise(parts, factor, curvature), None
        poorly_seen = self.curvature_from == "auto" and sd_noise > min(POORLY_SEEN, self.tol / 2)
        if poorly_seen or self.curvature_from == "data":
            scales, sd_noise = find_scales(seen, self.structure, self.seed), 0.0
            noise = self._draws_for_expansion(q, noise, curvature, seen, factor, scales)
        elif self.factor > 1 and self._is_narrow(q, noise, seen, parts, curvature):
            mean = Rule.equal(torch.zeros_like(noise.curvature.nodes[:1]))
            # Over so little no third point, between two along the same directions, tells more.
            pairs = self._draws(self.family.noise_dim(self.model.dim), num_points=2)
            noise = replace(noise, likelihood=pairs.likelihood, curvature=mean)
            around = Rule(q.transform(noise.prior.nodes), noise.prior.weights)  # the prior may bend where rows do not
            bends = Bends(Curvature.of(-(bend + prior_hessian(self.model, around, self.structure))), bend)
        if self.factor == 1:
            q = self._solve(alone, q, noise, self.near)
        return Start(q, unit, noise, scales, sd_noise), bends

    def _is_narrow(
        self, q: Gaussian, noise: Noise, seen: Subsample, parts: Sequence[Arrowhead], curvature: Curvature
    ) -> bool:
        """Return whether what q spreads over has the curvature of its mean, as some slices of S tell.

        Parameters
        ----------
        seen
            The slices.
        parts
            The Hessian of each at the mean.
        curvature
            That of all the data there.

        """
        around = q.transform(noise.curvature.nodes)
        work = HessianVector(around.numpy(), self.structure.tangents(), noise.curvature.weights.numpy())
        some = replace(seen, batches=dict(list(seen.batches.items())[:SLICES_FOR_SPREAD]))
        spread = self.structure.arrowhead(torch.from_numpy(some.run(work).products))
        change = spread.diagonal() - sum(part.diagonal() for part in parts[:SLICES_FOR_SPREAD])
        factor = self.factor * self.subsample.num_rows / some.num_rows
        return float((factor * change / curvature.precision_diagonal).abs().max()) < NARROW

    def _draws_for_expansion(
        self, q: Gaussian, noise: Noise, curvature: Curvature, seen: Subsample, factor: float, scales: Scales
    ) -> Noise:
        """Return the draws for passes that measure Hessians too, and whose local model has no other draws.

        There are as few as an expansion says will do that is made on slices of S (`seen`), times `factor`, if S has
        enough rows to tell.
        """
        most = self.num_draws or TAYLOR_DRAWS
        # What is affordable on S is so on all the data if S is all of them.
        if len(noise.likelihood.nodes) > most and (self.num_draws is not None or self.factor == 1):
            return noise

        def drawn(num_draws: int, num_points: int) -> Noise:
            fixed = self._fixed_draws(num_draws, self.family.noise_dim(self.model.dim), 2, num_points)
            return replace(fixed, prior=noise.prior)

        if not self.structure.groups.numel():
            return drawn(most, FEW_POINTS)
        if seen.num_rows < ROWS_OF_AN_EFFECT * self.structure.groups.numel():
            return drawn(most, MORE_POINTS)
        num_points = self._points_along(q, curvature, seen, factor, scales)
        if self.num_draws is not None:
            return drawn(most, num_points)
        of_direction = 2 * (num_points // 2)  # draws but 0
        some = drawn(DIRECTIONS * of_direction, num_points)
        sums = scale(seen.run(Taylor.work(q, some, scales)), factor)
        unknown = largest_error(Taylor.of(sums, q, some, scales).left_errors, curvature)
        directions = max(DIRECTIONS, math.ceil(DIRECTIONS * (unknown / (LITTLE * self.tol)) ** 2))  # it falls like 1/√K
        return drawn(min(directions * of_direction, most), num_points)

    def _points_along(self, q: Gaussian, curvature: Curvature, seen: Subsample, factor: float, scales: Scales) -> int:
        """Return how many points along a direction tell the precisions of groups' effects, as slices of S say."""
        groups, dim = self.structure.groups, self.family.noise_dim(self.model.dim)

        def along(num_points: int) -> Rule:
            return gauss_hermite(1, dim, random_stream(self.seed, Purpose.DRAWS, 3), num_points)

        coarse, fine = along(FEW_POINTS), along(MORE_POINTS)
        nodes = scales.at_origin(q.transform(torch.cat([coarse.nodes, fine.nodes])), q.loc)
        weights = torch.cat([coarse.weights, -fine.weights])
        work = HessianVector(nodes.numpy(), self.structure.probes(), weights.numpy())
        products = torch.from_numpy(seen.run(work).products)[:, groups]
        difference = factor * products.diagonal(dim1=0, dim2=2) * self.structure.signs[:, None]  # of precisions (J, C)
        error = difference / curvature.precision_diagonal[groups]
        return MORE_POINTS if float(error.norm()) > COARSE else FEW_POINTS

    def _solve(self, local: LocalModel, q: Gaussian, noise: Noise, tol: float, *, curved: bool = True) -> Gaussian:
        return solve(self.model, local, q, noise.expectations(self.model, local, q), noise, tol, curved=curved)[0]


def _precision_noise(parts: Sequence[Arrowhead], factor: float, curvature: Curvature) -> float:
    """Return the largest standard error, over coordinates, of a precision scaled up from the subsample, over it.

    Parameters
    ----------
    parts
        The Hessian of each of as many slices of the subsample.
    factor
        What scales their sum up to all the data.

    """
    if factor == 1:  # the subsample is all there is
        return 0.0
    diagonals = torch.stack([part.diagonal() for part in parts])  # (m, D)
    error = factor * diagonals.std(0) * math.sqrt(len(parts) * (1 - 1 / factor))
    return float((error / curvature.precision_diagonal).max())


def fixed_draws(
    num_draws: int, noise_dim: int, rng: np.random.Generator, num_points: int | None, affine: bool
) -> Noise:
    """Return the draws of a run.

    Parameters
    ----------
    num_draws
        For the log-likelihood, and at least as many for the prior.
    noise_dim
        Length of a draw.
    num_points
        Of Gauss-Hermite rules, for rows that depend on one uncertain latent each, such as the effect of their group.
        With the same generator their directions are the same for 2 and 3. None for rules for rows that depend on many.
    affine
        Whether Hessians cost the same whatever the number of draws.

    """
    prior = stratified(max(prior_draws(noise_dim), num_draws), noise_dim, rng)
    if num_draws >= FEWEST_MATRICES * 2 * noise_dim:
        everywhere = spherical(num_draws, noise_dim, rng)
        return Noise(everywhere, everywhere, prior)
    if num_points is not None:
        along = gauss_hermite(num_draws, noise_dim, rng, num_points)
        return Noise(along, gauss_hermite(num_points - 1, noise_dim, rng, num_points), prior)
    everywhere = orthogonal(num_draws, noise_dim, rng)
    return Noise(everywhere, everywhere if affine else orthogonal(2, noise_dim, rng), prior)
