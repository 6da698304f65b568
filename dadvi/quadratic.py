"""The quadratic model of log π about q: its curvature, measured by Hessian-vector passes, and the certificate.

    P = −E_q[∇² log π]  (D, D)

Made positive definite by absolute eigenvalues, P whitens the search (posterior sds become the unit of every step) and
predicts the distance to the optimum from the full-data gradient: δ = P⁻¹ E_q[∇ log π]. In posterior sds, δ is the
certificate.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from dadvi.elbo import draw_noise, log_joint
from dadvi.errors import InputError, ModelError
from dadvi.executors import Executor
from dadvi.families import Family, FullRank, Gaussian, LowRank, MeanField
from dadvi.model import Model
from dadvi.passes import Gradient, HessianVector
from dadvi.sharding import Manifest
from dadvi.sharding.sampling import subsample
from dadvi.types import FloatArray, Purpose, random_stream

DENSE_LIMIT = 2_000
"""Up to this many coordinates the curvature is held as a dense matrix; beyond, its diagonal is estimated."""

CURVATURE_WORK = 1e8
"""Rows times tangents spent on one measurement of the curvature; beyond, a sample of chunks stands for the data."""

DIAGONAL_PROBES = 32
CERTIFICATE_DRAWS = 16
TANGENTS_AT_ONCE = 32
PRIOR_DRAWS = 512
"""Draws for the prior's part of a certificate: they cost no data, and the skewed scales of a hierarchy need them."""

FLAT = 1e-11
"""Eigenvalues, at a unit diagonal, below this fraction of the largest make a direction flat: far below what collinear
predictors give (1e-5 for a correlation of 0.99999), and above float64's noise."""

_SMALLEST = 1e-12  # eigenvalues below this fraction of the largest are noise in float64


class Curvature(ABC):
    """A positive definite precision P, with P⁻¹ = R Rᵀ for a root R."""

    precision_diagonal: Tensor  # P_jj (D,)

    @abstractmethod
    def root_times(self, v: Tensor) -> Tensor:
        """Return R v (D,): v has unit covariance where R v has covariance P⁻¹."""

    @abstractmethod
    def root_transpose_times(self, g: Tensor) -> Tensor:
        """Return Rᵀ g (D,)."""


@dataclass(frozen=True, eq=False)
class DenseCurvature(Curvature):
    """A curvature known in full."""

    precision_diagonal: Tensor  # (D,)
    root: Tensor  # R (D, D), lower triangular with a positive diagonal
    flat: bool = False  # whether log π hardly bends in some direction: there is no distance to an optimum then

    @classmethod
    def of(cls, matrix: Tensor) -> "DenseCurvature":
        """Build from a symmetric matrix (D, D), which may be indefinite.

        Eigenvalues are taken after scaling to a unit diagonal, so that the coordinates' units do not matter, and in
        absolute value, so that the step P⁻¹g is uphill also where log π is not concave.
        """
        if not matrix.isfinite().all():
            first = int((~matrix.isfinite()).any(1).nonzero()[0, 0])
            raise ModelError(
                f"the second derivative of the log posterior is not finite in unconstrained coordinate {first}; the "
                "prior or the "
                "likelihood has none where the fit stands: move the start, which is the prior's mean, or smooth the "
                "model"
            )
        diagonal = matrix.diagonal().abs()
        unit = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).sqrt()  # (D,)
        eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.T) / 2 / unit[:, None] / unit)
        eigenvalues = eigenvalues.abs()
        flat = bool(eigenvalues.min() <= FLAT * eigenvalues.max())
        eigenvalues = eigenvalues.clamp(min=_SMALLEST * float(eigenvalues.max().clamp(min=_SMALLEST)))
        # V Λ^-½ is a root of P⁻¹, and so is the triangular factor of its QR decomposition, without squaring Λ's range.
        upper = torch.linalg.qr((vectors * eigenvalues.rsqrt()).T, mode="r").R
        root = upper.T * upper.diagonal().sign() / unit[:, None]
        return cls((vectors.square() @ eigenvalues) * unit.square(), root, flat)

    @property
    def stddev(self) -> Tensor:
        """Posterior sds √(P⁻¹)_jj (D,) of the quadratic model."""
        return self.root.square().sum(1).sqrt()

    @property
    def precision(self) -> Tensor:
        """The matrix P (D, D)."""
        inverse = torch.linalg.solve_triangular(
            self.root, torch.eye(len(self.root), dtype=self.root.dtype), upper=False
        )
        precision: Tensor = inverse.T @ inverse
        return precision

    def root_times(self, v: Tensor) -> Tensor:
        """Return R v (D,)."""
        return self.root @ v

    def root_transpose_times(self, g: Tensor) -> Tensor:
        """Return Rᵀ g (D,)."""
        return self.root.T @ g

    def solve(self, g: Tensor) -> Tensor:
        """Return P⁻¹ g (D,)."""
        return self.root @ (self.root.T @ g)


@dataclass(frozen=True, eq=False)
class DiagonalCurvature(Curvature):
    """The diagonal of a curvature too large to be held in full."""

    precision_diagonal: Tensor  # (D,)

    def root_times(self, v: Tensor) -> Tensor:
        """Return v / √P_jj."""
        return v * self.precision_diagonal.rsqrt()

    def root_transpose_times(self, g: Tensor) -> Tensor:
        """Return g / √P_jj."""
        return g * self.precision_diagonal.rsqrt()


def curvature_of(hessian_times: Callable[[FloatArray], Tensor], dim: int, seed: int) -> Curvature:
    """Measure a curvature through products with its matrix.

    Parameters
    ----------
    hessian_times
        Maps tangents (T, D) to products (T, D) with −E_q[∇² log π].
    dim
        D. Up to `DENSE_LIMIT` the unit vectors are the tangents; beyond, the diagonal is estimated from random ±1
        probes (Bekas, Kokiopoulou & Saad 2007).

    """
    if dim <= DENSE_LIMIT:
        return DenseCurvature.of(hessian_times(np.eye(dim)))
    probes = random_stream(seed, Purpose.CURVATURE).choice([-1.0, 1.0], size=(DIAGONAL_PROBES, dim))
    diagonal = (torch.from_numpy(probes) * hessian_times(probes)).mean(0).abs()
    return DiagonalCurvature(diagonal.clamp(min=_SMALLEST * float(diagonal.max())))


def measure_curvature(
    executor: Executor, eta: Tensor, chunks: Sequence[int], seed: int, prior_eta: Tensor | None = None
) -> Curvature:
    """Measure −mean_k ∇² log π(η_k) at points η (K, D) on the chunks given, which stand for all the data.

    The sum over m of C chunks is scaled by C/m. Prior and log-det enter once, at the same points or at `prior_eta`
    (K', D).
    """
    prior_eta = eta if prior_eta is None else prior_eta
    factor = executor.data.manifest.num_chunks / len(chunks)

    def hessian_times(tangents: FloatArray) -> Tensor:
        sums = executor.run(HessianVector(eta.numpy(), tangents), chunks, check=True, label="curvature")
        return -(factor * torch.from_numpy(sums.products) + prior_products(executor.model.model, prior_eta, tangents))

    return curvature_of(hessian_times, eta.shape[1], seed)


def curvature_chunks(manifest: Manifest, dim: int, seed: int) -> Sequence[int]:
    """Return as many chunks as `CURVATURE_WORK` allows for: all of them, or a random sample."""
    tangents = dim if dim <= DENSE_LIMIT else DIAGONAL_PROBES
    num_chunks = max(1, int(CURVATURE_WORK / tangents / manifest.chunk_rows))
    if num_chunks >= manifest.num_chunks:
        return range(manifest.num_chunks)
    return [int(chunk) for chunk in subsample(manifest, num_chunks, seed, purpose=Purpose.CURVATURE, step=1)]


def prior_products(model: Model, eta: Tensor, tangents: FloatArray) -> Tensor:
    """Return the mean over points η (K, D) of Hessian-vector products (T, D) of log p(T(η)) + log|det J_T(η)|."""
    eta = eta.detach().requires_grad_()
    prior = model.log_prior(eta).sum()
    grad = torch.autograd.grad(prior, eta, create_graph=True)[0] if prior.requires_grad else prior
    if not grad.requires_grad:  # constant or linear in η
        return torch.zeros(tangents.shape, dtype=eta.dtype)
    products = []
    for part in torch.from_numpy(tangents).split(TANGENTS_AT_ONCE):
        outputs = part[:, None].expand(-1, *eta.shape)  # (t, K, D): the same tangent at every point
        (product,) = torch.autograd.grad(
            grad, eta, outputs, is_grads_batched=True, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        products.append(product.mean(1))
    return torch.cat(products)


def optimum(family: Family, loc: Tensor, curvature: DenseCurvature) -> Gaussian:
    """Return the member at `loc` (D,) with the largest ELBO where log π has this curvature.

    Mean field has Σ_jj = 1/P_jj and full rank Σ = P⁻¹. Low rank maximises −½ tr(PΣ) + ½ log|Σ|, by L-BFGS in units of
    the mean-field sds, from the leading directions of the covariance.
    """
    if isinstance(family, MeanField):
        return Gaussian(family, {"loc": loc, "log_scale": -0.5 * curvature.precision_diagonal.log()})
    if isinstance(family, FullRank):
        root = curvature.root
        return Gaussian(family, {"loc": loc, "log_scale": root.diagonal().log(), "lower": root.tril(-1)})
    if not isinstance(family, LowRank):
        raise InputError(f"family {family.name!r} has no optimum by curvature; use mean_field, full_rank or low_rank")
    unit = curvature.precision_diagonal.rsqrt()
    root = curvature.root / unit[:, None]  # of the covariance in u = (η − loc)/unit
    precision = unit[:, None] * curvature.precision * unit
    values, vectors = torch.linalg.eigh(root @ root.T)
    leading = (values[-family.rank :] - 1).clamp(min=0.1).sqrt() * vectors[:, -family.rank :]
    missing = family.rank - leading.shape[1]  # a rank above D leaves columns without use
    start = torch.cat([torch.zeros(len(loc), 1, dtype=root.dtype), leading, leading.new_zeros(len(loc), missing)], 1)

    def loss(x: FloatArray) -> tuple[float, FloatArray]:
        table = torch.from_numpy(x.reshape(start.shape).copy()).requires_grad_()
        log_scale, factor = table[:, 0], table[:, 1:]
        trace = (precision.diagonal() * (2 * log_scale).exp()).sum() + (factor * (precision @ factor)).sum()
        q = family.distribution({"loc": torch.zeros_like(loc), "log_scale": log_scale, "factor": factor})
        value = 0.5 * trace - q.entropy()
        (grad,) = torch.autograd.grad(value, table)
        return float(value.detach()), grad.numpy().ravel()

    found = scipy.optimize.minimize(loss, start.numpy().ravel(), jac=True, method="L-BFGS-B", options={"ftol": 1e-12})
    table = torch.from_numpy(found.x.reshape(start.shape))
    params = {"loc": torch.zeros_like(loc), "log_scale": table[:, 0], "factor": table[:, 1:]}
    return Gaussian(family, family.affine(params, loc, unit))


@dataclass(frozen=True)
class Certificate:
    """How far q is from the ELBO's optimum, as the full-data gradient and the curvature predict it.

    `max` and `rms` are over the coordinates of the mean, in posterior sds. `sd_error` is the largest relative error
    of q's sds against the family's optimum; nan for a family whose optimal sds do not follow from the curvature
    alone.
    """

    max: float
    rms: float
    sd_error: float

    @classmethod
    def at(cls, grad: Tensor, curvature: DenseCurvature, sd_error: float) -> "Certificate":
        """Return the certificate of a gradient E_q[∇ log π] (D,): infinite where log π is flat in some direction."""
        if curvature.flat:
            return cls(math.inf, math.inf, sd_error)
        distance = curvature.solve(grad) / curvature.stddev
        return cls(float(distance.abs().max()), float(distance.square().mean().sqrt()), sd_error)

    def within(self, tol: float) -> bool:
        """Tell whether means are within `tol` posterior sds, and sds, where that is known, within a fraction `tol`."""
        return self.max <= tol and not self.sd_error > tol


def certify(executor: Executor, q: Gaussian, seed: int) -> tuple[Certificate | None, float]:
    """Return the certificate of q and its ELBO, from one pass of gradients over all the data.

    None stands for the certificate where D exceeds `DENSE_LIMIT`: without the curvature in full there is no distance.
    The draws come in pairs ±ε, which takes the noise of a quadratic log π out of the mean gradient.
    """
    rng, dim, model = random_stream(seed, Purpose.CERTIFICATE), q.family.noise_dim(q.dim), executor.model.model
    eta = q.transform(draw_noise("orthogonal", CERTIFICATE_DRAWS, dim, rng))
    prior_eta = q.transform(draw_noise("antithetic", PRIOR_DRAWS, dim, rng))
    sums = executor.run(Gradient(eta.numpy()), label="certificate")
    nothing = torch.zeros(PRIOR_DRAWS, dtype=torch.float64)
    prior, prior_grad = log_joint(model, prior_eta, nothing, torch.zeros_like(prior_eta))
    grad = torch.from_numpy(sums.grad).mean(0) + prior_grad.mean(0)
    elbo = float(sums.log_lik.mean() + prior.mean() + q.entropy())
    if q.dim > DENSE_LIMIT:
        return None, elbo
    pair = eta[[0, CERTIFICATE_DRAWS // 2]]  # one antithetic pair
    curvature = measure_curvature(
        executor, pair, curvature_chunks(executor.data.manifest, q.dim, seed), seed, prior_eta
    )
    assert isinstance(curvature, DenseCurvature)  # as D is within the limit
    return Certificate.at(grad, curvature, _sd_error(q, curvature)), elbo


def _sd_error(q: Gaussian, curvature: DenseCurvature) -> float:
    if isinstance(q.family, MeanField):
        optimum = curvature.precision_diagonal.rsqrt()  # the ELBO's optimum has E_q[−∂²_j log π] = 1/σ_j²
    elif isinstance(q.family, FullRank):
        optimum = curvature.stddev
    else:
        return float("nan")
    return float((q.stddev / optimum - 1).abs().max())
