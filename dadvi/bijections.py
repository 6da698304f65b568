"""Bijections from R^n onto each kind of support, with log-dets that hold to float64 precision far from zero.

Where the values of a support have fewer free coordinates than entries, the determinant is with respect to those that
torch's densities are written in: all but the last entry of a simplex, the strict lower triangle of a Cholesky factor of
a correlation matrix, the lower triangle of a symmetric matrix (Stan reference manual, chapter "Constraint transforms").

torch has transforms for some of these supports. They are not used: the softplus in the sigmoid's log-det drops
2e-9 beyond 20; stick breaking and the correlation Cholesky subtract numbers close to one; an exponential
rounds onto its bound; and the positive definite one takes n² numbers, without a log-det.

Each transform takes any number of leading dimensions, the draws. Its log-det is elementwise, or summed over what makes
up one value; `dadvi.transforms.Bijection` sums the rest.
"""

import math

import torch
from torch import Tensor
from torch.distributions.transforms import Transform
from torch.nn.functional import pad, softplus

# ruff: noqa: D102 (the methods are those of torch's Transform, and are described there)


def _log_sigmoid(x: Tensor) -> Tensor:
    # Beyond its threshold softplus is linear: at 40 that is exact in float64. (torch's logsigmoid warns under vmap.)
    return -softplus(-x, threshold=40)


# Elementwise supports ------------------------------------------------------------------------------------------------


class HalfLine(Transform):
    """y = bound + direction·exp(x): the numbers strictly above (direction 1) or below (-1) a bound."""

    def __init__(self, bound: Tensor, direction: int) -> None:
        super().__init__()
        self.bound = bound
        self.direction = direction

    def _call(self, x: Tensor) -> Tensor:
        bound = self.bound.to(x)
        nearest = _next_to(bound, self.direction)
        y = bound + self.direction * x.exp()
        return torch.maximum(y, nearest) if self.direction > 0 else torch.minimum(y, nearest)

    def _inverse(self, y: Tensor) -> Tensor:
        return (self.direction * (y - self.bound.to(y))).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return x


class Interval(Transform):
    """y = lower + (upper - lower)·σ(x), strictly inside the bounds."""

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        super().__init__()
        self.lower = lower
        self.upper = upper

    def _bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.lower.to(x), self.upper.to(x)

    def _call(self, x: Tensor) -> Tensor:
        lower, upper = self._bounds(x)
        width = upper - lower
        # From the nearer bound, so that the distance to it keeps its precision.
        y = torch.where(x < 0, lower + width * x.sigmoid(), upper - width * (-x).sigmoid())
        return torch.minimum(torch.maximum(y, _next_to(lower, 1)), _next_to(upper, -1))

    def _inverse(self, y: Tensor) -> Tensor:
        lower, upper = self._bounds(y)
        return (y - lower).log() - (upper - y).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        lower, upper = self._bounds(x)
        return (upper - lower).log() + _log_sigmoid(x) + _log_sigmoid(-x)


def _next_to(bound: Tensor, direction: int) -> Tensor:
    """Return the number next to a bound above (1) or below (-1) it, never a subnormal one."""
    step = torch.finfo(bound.dtype).tiny * direction
    neighbour = bound.nextafter(torch.full_like(bound, direction * math.inf))
    return torch.maximum(neighbour, bound + step) if direction > 0 else torch.minimum(neighbour, bound + step)


# Vectors -------------------------------------------------------------------------------------------------------------


class Ordered(Transform):
    """y_1 = x_1, y_k = y_{k-1} + exp(x_k), along the last dimension."""

    def _call(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :1], x[..., 1:].exp()], -1).cumsum(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.cat([y[..., :1], y.diff(dim=-1).log()], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return x[..., 1:].sum(-1)


class Simplex(Transform):
    """Stick breaking: y_k = z_k·Π_{j<k} (1 - z_j) for k < n, z_k = σ(x_k - log(n - k)), and y_n = Π (1 - z_j).

    x (..., n-1) → y (..., n); x = 0 is the centre. With ∂y_k/∂x_k = y_k (1 - z_k), log|det| = Σ_{k≤n} log y_k.
    """

    def _log_call(self, x: Tensor) -> Tensor:
        logits = x - self._log_offset(x)
        log_left = _log_sigmoid(-logits).cumsum(-1)  # log of what is left of the stick after break k
        return pad(_log_sigmoid(logits), (0, 1)) + pad(log_left, (1, 0))

    def _log_offset(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device).log()

    def _call(self, x: Tensor) -> Tensor:
        return self._log_call(x).exp().clamp_min(torch.finfo(x.dtype).tiny)

    def _inverse(self, y: Tensor) -> Tensor:
        left = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        x = y[..., :-1].log() - left.log()
        return x + self._log_offset(x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002 (y may have underflowed)
        return self._log_call(x).sum(-1)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] - 1))


# Matrices ------------------------------------------------------------------------------------------------------------


class LowerTriangular(Transform):
    """The lower triangle of an (n, n) matrix, `diagonal` and below, in row order: x (..., m) → y (..., n, n)."""

    diagonal = 0

    def _fill(self, x: Tensor) -> Tensor:
        """Put the m entries of x where they belong, zeros elsewhere: (..., n, n)."""
        m = x.shape[-1]
        n = (math.isqrt(8 * m + 1) - 1) // 2 - self.diagonal
        place = torch.full((n, n), m)
        rows, columns = torch.tril_indices(n, n, self.diagonal)
        place[rows, columns] = torch.arange(m)
        return pad(x, (0, 1))[..., place.to(x.device)]  # not an assignment: torch.func.vmap forbids those

    def _extract(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], self.diagonal, device=y.device)
        return y[..., rows, columns]

    def _call(self, x: Tensor) -> Tensor:
        return self._fill(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self._extract(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return x.new_zeros(x.shape[:-1])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        n = shape[-1] + self.diagonal
        return torch.Size((*shape[:-2], n * (n + 1) // 2))


class Symmetric(LowerTriangular):
    """y = y^T, by its lower triangle."""

    def _call(self, x: Tensor) -> Tensor:
        lower = self._fill(x)
        return lower + lower.tril(-1).mT


class LowerCholesky(LowerTriangular):
    """A lower triangle, the exponentials of its diagonal entries on the diagonal."""

    def _log_diagonal(self, x: Tensor) -> Tensor:
        return self._fill(x).diagonal(dim1=-2, dim2=-1)

    def _call(self, x: Tensor) -> Tensor:
        diagonal = self._log_diagonal(x).exp().clamp_min(torch.finfo(x.dtype).tiny)
        return self._fill(x).tril(-1) + diagonal.diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        return self._extract(y.tril(-1) + y.diagonal(dim1=-2, dim2=-1).log().diag_embed())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        return self._log_diagonal(x).sum(-1)


class PositiveDefinite(LowerCholesky):
    """y = L L^T: the Jacobian of L → y is 2^n·Π_i L_ii^(n-i+1), of x → L it is Π_i L_ii."""

    def _call(self, x: Tensor) -> Tensor:
        L = super()._call(x)
        return L @ L.mT

    def _inverse(self, y: Tensor) -> Tensor:
        L, info = torch.linalg.cholesky_ex(y)
        return super()._inverse(L.masked_fill((info != 0)[..., None, None], math.nan))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        log_diagonal = self._log_diagonal(x)
        n = log_diagonal.shape[-1]
        power = torch.arange(n + 1, 1, -1, dtype=x.dtype, device=x.device)
        return n * math.log(2) + (power * log_diagonal).sum(-1)


class CorrCholesky(LowerTriangular):
    """Rows of unit length: y_ij = tanh(x_ij)·Π_{k<j} sech(x_ik) for j < i, and y_ii = Π_{k<i} sech(x_ik).

    (Lewandowski, Kurowicka & Joe 2009, with canonical partial correlations tanh x_ij.) With ∂y_ij/∂x_ij =
    sech²(x_ij)·Π_{k<j} sech(x_ik), log|det| = Σ_{j<i} (2 log sech x_ij + Σ_{k<j} log sech x_ik).
    """

    diagonal = -1

    def _log_sech(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log sech x_ij and its sum over k < j: (..., n, n) both."""
        log_sech = self._fill(math.log(2) + (_log_sigmoid(2 * x) + _log_sigmoid(-2 * x)) / 2)
        return log_sech, pad(log_sech.cumsum(-1)[..., :-1], (1, 0))

    def _call(self, x: Tensor) -> Tensor:
        _, before = self._log_sech(x)
        length = before.exp().clamp_min(torch.finfo(x.dtype).tiny)  # of what is left of the row's unit length
        return self._fill(x.tanh()) * length + length.diagonal(dim1=-2, dim2=-1).diag_embed()

    def _inverse(self, y: Tensor) -> Tensor:
        left = (y * y).flip(-1).cumsum(-1).flip(-1)
        after = pad(left[..., 1:], (0, 1)).sqrt()
        return (self._extract(y) / self._extract(after)).asinh()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        log_sech, before = self._log_sech(x)
        return self._extract(2 * log_sech + before).sum(-1)
