"""The quadratic model of log π about q: its curvature, measured by Hessian-vector passes, and the certificate.

    P = −E_q[∇² log π]  (D, D)

Made positive definite by absolute eigenvalues, P whitens the search (posterior sds become the unit of every step) and
predicts the distance to the optimum from the full-data gradient: δ = P⁻¹ E_q[∇ log π]. In posterior sds, δ is the
certificate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import scipy.optimize
import torch
from torch import Tensor

from dadvi.elbo import draw_noise, log_joint
from dadvi.errors import InputError, ModelError
from dadvi.executors import Executor
from dadvi.families import Family, FullRank, Gaussian, LowRank, MeanField
from dadvi.model import Model
from dadvi.passes import Gradient, HessianVector, hessian_products
from dadvi.quadrature import Rule, in_pairs, stratified
from dadvi.sharding import Manifest
from dadvi.sharding.sampling import subsample
from dadvi.structure import Arrowhead, Root, Structure
from dadvi.types import FloatArray, Purpose, random_stream

DENSE_LIMIT = 2_000
"""Up to this many coordinates a curvature without structure is held in full; beyond, its diagonal is estimated."""

CURVATURE_WORK = 1e8
"""Rows times tangents spent on one measurement of the curvature; beyond, a sample of chunks stands for the data."""

DIAGONAL_PROBES = 32
CERTIFICATE_DRAWS = 16
PRIOR_DRAWS, FEWEST_PRIOR_DRAWS, PRIOR_NUMBERS = 512, 32, 2**18
"""Draws for the prior's part of an expectation: they cost no data, and the skewed scales of a hierarchy need them. In
many dimensions they are fewer, so that together they have about `PRIOR_NUMBERS` numbers."""

FLAT = 1e-11
"""Eigenvalues, at a unit diagonal, below this fraction of the largest make a direction flat: far below what collinear
predictors give (1e-5 for a correlation of 0.99999), and above float64's noise."""

_SMALLEST = 1e-12  # eigenvalues below this fraction of the largest are noise in float64


@dataclass(frozen=True, eq=False)
class Curvature:
    """A positive definite precision P, and a root of its inverse."""

    precision: Arrowhead  # P
    factor: Root  # R, P⁻¹ = R Rᵀ
    flat: bool = False  # whether log π hardly bends in some direction: there is no distance to an optimum then

    @classmethod
    def of(cls, matrix: Arrowhead) -> "Curvature":
        """Build from a symmetric matrix, which may be indefinite.

        Eigenvalues of the blocks and of the Schur complement are taken in absolute value, so that the step P⁻¹g is
        uphill also where log π is not concave, and after scaling to a unit diagonal, so that the coordinates' units do
        not matter.
        """
        _check_finite(matrix)
        units = matrix.blocks.diagonal(dim1=1, dim2=2).abs()
        units = torch.where(units > 0, units, torch.ones_like(units)).sqrt()  # (J, C)
        blocks, group_roots, flat_group = _definite(matrix.blocks, units)
        coupling = group_roots.mT @ matrix.cross
        flattened = coupling.flatten(0, 1)  # (J C, G)
        eliminated = flattened.T @ flattened
        unit = matrix.corner.diagonal().abs()
        unit = torch.where(unit > 0, unit, torch.ones_like(unit)).sqrt()
        schur, root, flat_dense = _definite(matrix.corner - eliminated, unit)
        if len(root):
            # A root is triangular after the QR decomposition of its transpose, without squaring its range.
            upper = torch.linalg.qr(root.T, mode="r").R
            root = upper.T * upper.diagonal().sign()
        corner = matrix.corner + (schur - (matrix.corner - eliminated))  # to the bit, where nothing was changed
        precision = Arrowhead(matrix.structure, corner, matrix.cross, blocks)
        return cls(precision, Root(matrix.structure, root, group_roots, coupling), flat_group or flat_dense)

    @classmethod
    def dense(cls, matrix: Tensor) -> "Curvature":
        """Build from a symmetric matrix (D, D), as `of`."""
        return cls.of(Arrowhead.dense((matrix + matrix.T) / 2))

    @classmethod
    def diagonal(cls, diagonal: Tensor) -> "Curvature":
        """Build from the elements (D,) of a diagonal, as `of`."""
        return cls.of(Arrowhead.of_diagonal(diagonal))

    @property
    def structure(self) -> Structure:
        """Which coordinates curve together."""
        return self.precision.structure

    @property
    def is_full(self) -> bool:
        """Whether any coordinate may curve with any other."""
        return self.structure.groups.numel() == 0

    @cached_property
    def precision_diagonal(self) -> Tensor:
        """P_jj (D,)."""
        return self.precision.diagonal()

    @property
    def stddev(self) -> Tensor:
        """Posterior sds √(P⁻¹)_jj (D,) of the quadratic model."""
        return self.factor.stddev

    @cached_property
    def root(self) -> Tensor:
        """R (D, D), lower triangular with a positive diagonal."""
        return self.factor.dense if self.is_full else Curvature.dense(self.precision.matrix()).factor.dense

    def root_times(self, v: Tensor) -> Tensor:
        """Return R v (..., D): v has unit covariance where R v has covariance P⁻¹."""
        return self.factor.times(v)

    def root_transpose_times(self, g: Tensor) -> Tensor:
        """Return Rᵀ g (..., D)."""
        return self.factor.transpose_times(g)

    def solve(self, g: Tensor) -> Tensor:
        """Return P⁻¹ g (..., D)."""
        return self.root_times(self.root_transpose_times(g))


def _check_finite(matrix: Arrowhead) -> None:
    finite = matrix.corner.isfinite().all() and matrix.cross.isfinite().all() and bool(matrix.blocks.isfinite().all())
    if finite:
        return
    bad = matrix.corner.new_zeros(matrix.structure.dim, dtype=torch.bool)
    bad[matrix.structure.dense] = ~matrix.corner.isfinite().all(1)
    bad[matrix.structure.groups] = ~(matrix.blocks.isfinite().all(2) & matrix.cross.isfinite().all(2))
    raise ModelError(
        f"the second derivative of the log posterior is not finite in unconstrained coordinate {int(bad.nonzero()[0])};"
        " the prior or the likelihood has none where the fit stands: move the start, which is the prior's mean, or "
        "smooth the model"
    )


def _definite(matrices: Tensor, units: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Make symmetric matrices (..., n, n) positive definite, by absolute eigenvalues in units (..., n).

    Returns
    -------
    definite, root, flat
        The matrices (..., n, n), unchanged where they were definite; roots (..., n, n) of their inverses, not
        triangular; and whether some eigenvalue is next to nothing beside the largest.

    """
    if matrices.numel() == 0:
        return matrices, matrices, False
    scale = units[..., :, None] * units[..., None, :]
    eigenvalues, vectors = torch.linalg.eigh(matrices / scale)
    size = eigenvalues.abs()
    largest = size.amax(-1, keepdim=True)
    flat = bool((size <= FLAT * largest.clamp(min=1)).any())  # 1: what the units are, before groups are eliminated
    size = torch.maximum(size, _SMALLEST * largest.clamp(min=_SMALLEST))
    changed = (size != eigenvalues).any(-1)[..., None, None]
    definite = torch.where(changed, (vectors * size[..., None, :]) @ vectors.mT * scale, matrices)
    return definite, vectors * size.rsqrt()[..., None, :] / units[..., :, None], flat


def measure_curvature(
    executor: Executor,
    eta: Tensor,
    chunks: Sequence[int],
    seed: int,
    structure: Structure | None,
    prior_eta: Tensor | None = None,
) -> Curvature:
    """Measure −mean_k ∇² log π(η_k) at points η (K, D) on the chunks given, which stand for all the data.

    The sum over m of C chunks is scaled by C/m. Prior and log-det enter once, at the same points or at `prior_eta`
    (K', D).

    Parameters
    ----------
    structure
        Of the Hessian. None for one without structure and too large to be held: its diagonal is then estimated from
        random ±1 probes (Bekas, Kokiopoulou & Saad 2007).

    """
    prior_eta = eta if prior_eta is None else prior_eta
    factor = executor.data.manifest.num_chunks / len(chunks)
    tangents = diagonal_probes(eta.shape[1], seed) if structure is None else structure.tangents()
    sums = executor.run(HessianVector(eta.numpy(), tangents), chunks, check=True, label="curvature")
    prior = prior_products(executor.model.model, Rule.equal(prior_eta), tangents)
    products = -(factor * torch.from_numpy(sums.products) + prior)
    return curvature_of(products, tangents, structure)


def diagonal_probes(dim: int, seed: int) -> FloatArray:
    """Return random ±1 tangents (T, D) that tell the diagonal of a matrix without structure."""
    return random_stream(seed, Purpose.CURVATURE).choice([-1.0, 1.0], size=(DIAGONAL_PROBES, dim))


def curvature_of(products: Tensor, tangents: FloatArray, structure: Structure | None) -> Curvature:
    """Return the curvature that products (T, D) with the structure's tangents tell; without one, with probes."""
    if structure is not None:
        return Curvature.of(structure.arrowhead(products))
    diagonal = (torch.from_numpy(tangents) * products).mean(0).abs()
    return Curvature.diagonal(diagonal.clamp(min=_SMALLEST * float(diagonal.max())))


def curvature_chunks(manifest: Manifest, structure: Structure | None, seed: int) -> Sequence[int]:
    """Return as many chunks as `CURVATURE_WORK` allows for: all of them, or a random sample."""
    tangents = DIAGONAL_PROBES if structure is None else structure.num_tangents
    num_chunks = max(1, int(CURVATURE_WORK / tangents / manifest.chunk_rows))
    if num_chunks >= manifest.num_chunks:
        return range(manifest.num_chunks)
    return [int(chunk) for chunk in subsample(manifest, num_chunks, seed, purpose=Purpose.CURVATURE, step=1)]


def prior_products(model: Model, at: Rule, tangents: FloatArray) -> Tensor:
    """Return the mean over points η (K, D) of Hessian-vector products (T, D) of log p(T(η)) + log|det J_T(η)|.

    Parameters
    ----------
    at
        The points, as nodes of a rule, and their weights.

    """
    eta = at.nodes.detach().requires_grad_()
    return hessian_products(at.weights @ model.log_prior(eta), eta, torch.from_numpy(tangents), 8 * eta.numel())


def prior_hessian(model: Model, at: Rule, structure: Structure) -> Arrowhead:
    """Return the mean over points η (K, D) of the Hessian of log p(T(η)) + log|det J_T(η)|."""
    return structure.prior_arrowhead(prior_products(model, at, structure.prior_tangents()))


def optimum(family: Family, loc: Tensor, curvature: Curvature) -> Gaussian:
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
    precision = unit[:, None] * curvature.precision.matrix() * unit
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

    `max` and `rms` are over the coordinates of the mean, in posterior sds: those of the inverse curvature, which a
    mean-field q, narrower where coordinates are correlated, does not have. What a finite number of draws leaves unknown
    is part of them, and is by itself `floor`: the largest coordinate that it alone would make. `sd_error` is the
    largest relative error of q's sds against the family's optimum, without what the draws leave unknown of that; nan
    for a family whose optimal sds do not follow from the curvature alone.
    """

    max: float
    rms: float
    sd_error: float
    floor: float = 0.0

    @classmethod
    def at(cls, grad: Tensor, curvature: Curvature, sd_error: float, grad_errors: Tensor) -> "Certificate":
        """Return the certificate of a gradient E_q[∇ log π] (D,): infinite where log π is flat in some direction.

        Parameters
        ----------
        grad_errors
            Draws (M, D) from the distribution of the gradient's error.

        """
        if curvature.flat:
            return cls(math.inf, math.inf, sd_error)
        away, errors = (curvature.solve(each) / curvature.stddev for each in (grad, grad_errors))
        return cls(*_expected(away, errors), sd_error, largest_error(grad_errors, curvature))

    def or_farther(self, q: Gaussian, aim: Gaussian, curvature: Curvature, grad_errors: Tensor) -> "Certificate":
        """Return the certificate of q with every figure at least as large as what lies between q and `aim`.

        A search on a local model goes on where one step of it would stop short: means and sds that depend on one
        another, as in a hierarchy, can lie several such steps from their optimum.
        """
        unit = curvature.stddev
        largest, rms = _expected((aim.loc - q.loc) / unit, curvature.solve(grad_errors) / unit)
        sd_error = float((q.stddev / aim.stddev - 1).abs().max())
        return Certificate(max(self.max, largest), max(self.rms, rms), max(self.sd_error, sd_error), self.floor)

    def within(self, tol: float) -> bool:
        """Tell whether means are within `tol` posterior sds, and sds, where that is known, within a fraction `tol`."""
        return self.max <= tol and not self.sd_error > tol


def largest_error(grad_errors: Tensor, curvature: Curvature) -> float:
    """Return the largest coordinate, in posterior sds, of the distance that errors of a gradient (M draws, D) make."""
    errors = curvature.solve(grad_errors) / curvature.stddev
    return _expected(torch.zeros_like(errors[0]), errors)[0]


def _expected(away: Tensor, errors: Tensor) -> tuple[float, float]:
    """Return the largest and the RMS coordinate of a distance (D,) with an error (M draws, D): RMS over draws."""
    squares = (away + errors).square()  # (M, D)
    return float(squares.amax(1).mean().sqrt()), float(squares.mean().sqrt())


def tangents_at_most(model: Model) -> int:
    """Return how many tangents tell a Hessian, as far as the shapes of the latents show.

    Where coordinates are too many for any two to curve together, the largest latent is taken to be effects of groups.
    """
    return model.dim if model.dim <= DENSE_LIMIT else model.dim - max(site.size for site in model.space.sites) + 1


def certify(
    executor: Executor, q: Gaussian, seed: int, structure: Structure | None
) -> tuple[Certificate | None, float, Curvature | None]:
    """Return the certificate of q, its ELBO and the curvature, from one pass of gradients over all the data.

    None stands for certificate and curvature where the Hessian has no structure and is too large to be held: without
    it there is no distance. The draws come in pairs ±ε, which takes the noise of a quadratic log π out of the mean
    gradient.
    """
    rng, dim, model = random_stream(seed, Purpose.CERTIFICATE), q.family.noise_dim(q.dim), executor.model.model
    rule = in_pairs(draw_noise("orthogonal", CERTIFICATE_DRAWS, dim, rng), rng)
    prior_rule = stratified(prior_draws(dim), dim, rng)
    eta, prior_eta = q.transform(rule.nodes), q.transform(prior_rule.nodes)
    sums = executor.run(Gradient(eta.numpy()), label="certificate")
    nothing = torch.zeros(len(prior_eta), dtype=torch.float64)
    prior, prior_grad = log_joint(model, prior_eta, nothing, torch.zeros_like(prior_eta))
    grads = torch.from_numpy(sums.grad)
    elbo = float(sums.log_lik.mean() + prior.mean() + q.entropy())
    if structure is None:
        return None, elbo, None
    pair = eta[[0, CERTIFICATE_DRAWS // 2]]  # one antithetic pair
    chunks = curvature_chunks(executor.data.manifest, structure, seed)
    curvature = measure_curvature(executor, pair, chunks, seed, structure, prior_eta)
    grad, errors = rule.mean(grads) + prior_rule.mean(prior_grad), rule.errors(grads) + prior_rule.errors(prior_grad)
    return Certificate.at(grad, curvature, _sd_error(q, curvature), errors), elbo, curvature


def prior_draws(dim: int) -> int:
    """Return how many draws the expectations of the prior take: an even number, so that all have a bounded size."""
    return 2 * max(FEWEST_PRIOR_DRAWS // 2, min(PRIOR_DRAWS, PRIOR_NUMBERS // dim) // 2)


def _sd_error(q: Gaussian, curvature: Curvature) -> float:
    if isinstance(q.family, MeanField):
        optimum = curvature.precision_diagonal.rsqrt()  # the ELBO's optimum has E_q[−∂²_j log π] = 1/σ_j²
    elif isinstance(q.family, FullRank):
        optimum = curvature.stddev
    else:
        return float("nan")
    return float((q.stddev / optimum - 1).abs().max())
