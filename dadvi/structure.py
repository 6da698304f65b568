"""Which coordinates curve together: the structure of a Hessian, and matrices of that structure.

A Hessian of log π is an *arrowhead*: G *dense* coordinates (slopes, scales) share curvature with every other; the rest
fall into J *groups* of C coordinates (the effects of a user, a school, a product), which share curvature with the dense
ones and within their group, but not with other groups, because a row touches the effects of its own group only:

    H = [ A   Bᵀ ]      A (G, G),   B_j (C, G),   D = diag of J blocks D_j (C, C)
        [ B   D  ]

It is known from G + C products: H e_g for each dense coordinate, and for each column c of the groups one probe H v with
v = ±1 on that column and 0 elsewhere (signs are random, so that what little curvature a structure neglects is noise and
not a bias). With J = 0 it is a dense matrix, with G = 0 and C = 1 a diagonal. All that a step needs is linear in J.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dadvi.types import FloatArray


@dataclass(frozen=True, eq=False)
class Structure:
    """The dense coordinates, and those of each group."""

    dense: Tensor  # (G,) int64, increasing
    groups: Tensor  # (J, C) int64
    signs: Tensor  # ±1 (J,) of the probes
    hubs: Tensor  # (G,) bool: dense coordinates, such as scales, without which the prior would couple no dense one

    @classmethod
    def full(cls, dim: int) -> "Structure":
        """Return the structure without groups: any coordinate may curve with any other."""
        none, all_of_them = torch.empty(0, dtype=torch.float64), torch.ones(dim, dtype=torch.bool)
        return cls(torch.arange(dim), torch.empty(0, 0, dtype=torch.int64), none, all_of_them)

    @classmethod
    def diagonal(cls, dim: int) -> "Structure":
        """Return the structure in which no two coordinates curve together."""
        signs, none = torch.ones(dim, dtype=torch.float64), torch.empty(0, dtype=torch.bool)
        return cls(torch.empty(0, dtype=torch.int64), torch.arange(dim)[:, None], signs, none)

    @classmethod
    def grouped(cls, dim: int, columns: Sequence[Tensor], rng: np.random.Generator) -> "Structure":
        """Return the structure whose groups have these columns of coordinates, each (J,); the others are dense."""
        groups = torch.stack(list(columns), dim=1)
        dense = torch.ones(dim, dtype=torch.bool)
        dense[groups.flatten()] = False
        signs = torch.from_numpy(rng.choice([-1.0, 1.0], size=len(groups)))
        coordinates = dense.nonzero()[:, 0]
        return cls(coordinates, groups, signs, torch.ones(len(coordinates), dtype=torch.bool))

    @property
    def dim(self) -> int:
        """D, the number of coordinates."""
        return len(self.dense) + self.groups.numel()

    @property
    def num_tangents(self) -> int:
        """G + C, the products that tell a matrix of this structure."""
        return len(self.dense) + self.groups.shape[1]

    def probes(self) -> FloatArray:
        """Return the probes (C, D) of the groups."""
        probes = np.zeros((self.groups.shape[1], self.dim))
        for probe, column in zip(probes, self.groups.T, strict=True):
            probe[column.numpy()] = self.signs.numpy()
        return probes

    def tangents(self) -> FloatArray:
        """Return the tangents (G + C, D) whose products tell the matrix: unit vectors, then probes."""
        units = np.zeros((len(self.dense), self.dim))
        units[np.arange(len(self.dense)), self.dense.numpy()] = 1
        return np.concatenate([units, self.probes()])

    def arrowhead(self, products: Tensor) -> "Arrowhead":
        """Return the matrix from its products (G + C, D) with `tangents`."""
        of_dense, of_probes = products.split([len(self.dense), self.groups.shape[1]])
        corner = of_dense[:, self.dense]
        blocks = (of_probes[:, self.groups] * self.signs[:, None]).permute(1, 2, 0)  # [j, c', c]
        return Arrowhead(
            self,
            corner=(corner + corner.T) / 2,
            cross=of_dense[:, self.groups].permute(1, 2, 0),
            blocks=(blocks + blocks.mT) / 2,
        )

    def prior_tangents(self) -> FloatArray:
        """Return the tangents whose products tell the prior's Hessian.

        They are fewer: one probe does for all the dense coordinates that curve with hubs at most, such as slopes, or
        effects and not their scale (star colouring: Coleman & Moré 1984). It is that of the groups, if there are any.
        """
        units, hubs, probes = self.tangents()[: len(self.dense)], self.hubs.numpy(), self.probes()
        others = units[~hubs].sum(0, keepdims=True)
        return np.concatenate([units[hubs], others + probes[:1] if len(probes) else others, probes[1:]])

    def prior_arrowhead(self, products: Tensor) -> "Arrowhead":
        """Return the prior's Hessian from its products with `prior_tangents`."""
        of_hubs, of_probes = products.tensor_split([int(self.hubs.sum())])
        hubs, others = self.dense[self.hubs], self.dense[~self.hubs]
        of_dense = products.new_zeros(len(self.dense), self.dim)
        of_dense[self.hubs] = of_hubs
        # What an other has in common with a hub is known from the hub.
        with_hubs = products.new_zeros(len(others), self.dim)
        with_hubs[:, hubs] = of_hubs[:, others].T
        with_hubs[torch.arange(len(others)), others] = of_probes[0, others]
        of_dense[~self.hubs] = with_hubs
        return self.arrowhead(torch.cat([of_dense, of_probes[: self.groups.shape[1]]]))

    def from_matrix(self, matrix: Tensor) -> "Arrowhead":
        """Return what a symmetric matrix (D, D) has in the places of this structure."""
        return Arrowhead(
            self,
            corner=matrix[self.dense][:, self.dense],
            cross=matrix[self.groups][:, :, self.dense],
            blocks=matrix[self.groups[:, :, None], self.groups[:, None, :]],
        )


@dataclass(frozen=True, eq=False)
class Arrowhead:
    """A symmetric matrix of a `Structure`, not necessarily definite."""

    structure: Structure
    corner: Tensor  # A (G, G)
    cross: Tensor  # B (J, C, G)
    blocks: Tensor  # D (J, C, C)

    @classmethod
    def dense(cls, matrix: Tensor) -> "Arrowhead":
        """Return a symmetric matrix (D, D) as it is."""
        return Structure.full(len(matrix)).from_matrix(matrix)

    @classmethod
    def of_diagonal(cls, diagonal: Tensor) -> "Arrowhead":
        """Return the diagonal matrix of the elements (D,)."""
        structure = Structure.diagonal(len(diagonal))
        return cls(
            structure,
            corner=diagonal.new_zeros(0, 0),
            cross=diagonal.new_zeros(len(diagonal), 1, 0),
            blocks=diagonal[:, None, None],
        )

    def __add__(self, other: "Arrowhead") -> "Arrowhead":
        return Arrowhead(
            self.structure, self.corner + other.corner, self.cross + other.cross, self.blocks + other.blocks
        )

    def __mul__(self, factor: float) -> "Arrowhead":
        return Arrowhead(self.structure, factor * self.corner, factor * self.cross, factor * self.blocks)

    def __neg__(self) -> "Arrowhead":
        return self * -1.0

    def times(self, v: Tensor) -> Tensor:
        """Return the products (K, D) with vectors (K, D)."""
        dense, groups = self.structure.dense, self.structure.groups
        of_dense, of_groups = v[:, dense], v[:, groups]  # (K, G), (K, J, C)
        result = torch.empty_like(v)
        result[:, dense] = of_dense @ self.corner + torch.einsum("jcg,kjc->kg", self.cross, of_groups)
        result[:, groups] = torch.einsum("jcg,kg->kjc", self.cross, of_dense) + torch.einsum(
            "jcb,kjb->kjc", self.blocks, of_groups
        )
        return result

    def diagonal(self) -> Tensor:
        """Return the diagonal (D,)."""
        result = self.corner.new_empty(self.structure.dim)
        result[self.structure.dense] = self.corner.diagonal()
        result[self.structure.groups] = self.blocks.diagonal(dim1=1, dim2=2)
        return result

    def matrix(self) -> Tensor:
        """Return the matrix in full (D, D)."""
        return self.times(torch.eye(self.structure.dim, dtype=self.corner.dtype))


@dataclass(frozen=True, eq=False)
class Root:
    """A root R of the inverse of a positive definite arrowhead P: P⁻¹ = R Rᵀ.

    R is triangular by blocks, groups first: eliminating the groups leaves the Schur complement of the dense
    coordinates, S = A − Σ_j B_jᵀ D_j⁻¹ B_j.
    """

    structure: Structure
    dense: Tensor  # (G, G), lower triangular with a positive diagonal: S⁻¹ is its product with its transpose
    groups: Tensor  # (J, C, C): likewise of each D_j⁻¹, not triangular
    coupling: Tensor  # W_j = groupsᵀ_j B_j (J, C, G)

    def times(self, v: Tensor) -> Tensor:
        """Return R v (..., D): v has unit covariance where R v has covariance P⁻¹."""
        result = torch.empty_like(v)
        dense = v[..., self.structure.dense] @ self.dense.T
        rest = v[..., self.structure.groups] - torch.einsum("jcg,...g->...jc", self.coupling, dense)
        result[..., self.structure.dense] = dense
        result[..., self.structure.groups] = torch.einsum("jbc,...jc->...jb", self.groups, rest)
        return result

    def transpose_times(self, g: Tensor) -> Tensor:
        """Return Rᵀ g (..., D)."""
        result = torch.empty_like(g)
        groups = torch.einsum("jbc,...jb->...jc", self.groups, g[..., self.structure.groups])
        dense = g[..., self.structure.dense] - torch.einsum("jcg,...jc->...g", self.coupling, groups)
        result[..., self.structure.dense] = dense @ self.dense
        result[..., self.structure.groups] = groups
        return result

    def inverse_times(self, x: Tensor) -> Tensor:
        """Return R⁻¹ x (..., D)."""
        result = torch.empty_like(x)
        dense, groups = x[..., self.structure.dense], x[..., self.structure.groups]
        result[..., self.structure.dense] = torch.linalg.solve_triangular(self.dense, dense[..., None], upper=False)[
            ..., 0
        ]
        result[..., self.structure.groups] = torch.linalg.solve(self.groups, groups[..., None])[..., 0] + torch.einsum(
            "jcg,...g->...jc", self.coupling, dense
        )
        return result

    @cached_property
    def stddev(self) -> Tensor:
        """The square root of the diagonal of P⁻¹ (D,)."""
        variance = self.dense.new_empty(self.structure.dim)
        variance[self.structure.dense] = self.dense.square().sum(1)
        shared = self.groups @ (self.coupling @ self.dense)  # (J, C, G)
        variance[self.structure.groups] = self.groups.square().sum(2) + shared.square().sum(2)
        return variance.sqrt()

    def matrix(self) -> Tensor:
        """Return R in full (D, D)."""
        return self.times(torch.eye(self.structure.dim, dtype=self.dense.dtype)).T

    def log_det(self) -> Tensor:
        """Return log|det R|."""
        log_det: Tensor = self.dense.diagonal().log().sum() + torch.linalg.slogdet(self.groups).logabsdet.sum()
        return log_det
