"""Linear response: the covariance that a mean-field Gaussian lacks, from how its means answer to a small push.

    Cov_LR = upper-left block of (−∇²_θ ELBO)⁻¹,      θ = (μ, ω), σ = exp ω

(Giordano, Broderick & Jordan 2018, "Covariances, robustness, and variational Bayes", JMLR 19, theorem 1). Where log π
is quadratic it is P⁻¹ with P = −E_q[∇² log π], which a fit has measured already; what is left, the coupling of means
and sds by third derivatives, matters where scales multiply effects, and on small data.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dadvi.binding import IN_TORCH
from dadvi.errors import InputError
from dadvi.executors import Executor
from dadvi.families import Arrow, FullRank, Gaussian
from dadvi.model import Model, argument_names
from dadvi.passes import MeanFieldHessian, expected_hessian
from dadvi.quadratic import DENSE_LIMIT, Curvature, prior_draws
from dadvi.quadrature import Rule, gauss_hermite, stratified
from dadvi.structure import Arrowhead, Structure
from dadvi.types import FloatArray, Purpose, random_stream

PAIRS = 4
"""Pairs of draws at which the likelihood's derivatives are taken."""


def from_curvature(loc: Tensor, curvature: Curvature) -> Gaussian:
    """Return N(loc, P⁻¹)."""
    if curvature.is_full:
        root = curvature.root
        return Gaussian(FullRank(), {"loc": loc, "log_scale": root.diagonal().log(), "lower": root.tril(-1)})
    return Arrow.member(loc, curvature.factor)


@dataclass(frozen=True, eq=False)
class Response:
    """The negative Hessian of a mean-field ELBO in θ = (μ, ω), as products with tangents: one pass for a batch of them.

    The draws are fixed, so that all products are those of one matrix.
    """

    executor: Executor
    q: Gaussian
    likelihood: Rule
    prior: Rule

    @classmethod
    def at(cls, executor: Executor, q: Gaussian, seed: int) -> "Response":
        """Return it at q, with the draws of that seed."""
        rng = random_stream(seed, Purpose.RESPONSE)
        likelihood = gauss_hermite(2 * PAIRS, q.dim, rng)
        return cls(executor, q, likelihood, stratified(prior_draws(q.dim), q.dim, rng))

    def times(self, tangents: FloatArray) -> Tensor:
        """Return products (T, 2D) of −∇²_θ ELBO with tangents (T, 2D), by one pass. The entropy is linear in ω."""
        theta = torch.cat([self.q.loc, self.q.params["log_scale"]])
        work = MeanFieldHessian(theta.numpy(), self.likelihood.nodes.numpy(), self.likelihood.weights.numpy(), tangents)
        of_data = torch.from_numpy(self.executor.run(work, label="linear response").products)
        model: Model = self.executor.model.model
        of_prior = expected_hessian(model.log_prior, theta, self.prior.nodes, self.prior.weights, tangents, 0)
        return -(of_data + of_prior)

    def gaussian(self, structure: Structure) -> Gaussian:
        """Return the Gaussian with the covariance of linear response.

        Parameters
        ----------
        structure
            Of the Hessian of log π. Where θ has up to `DENSE_LIMIT` coordinates, two for each of the model's, it is not
            needed, and nothing is neglected; beyond, the sds of dense coordinates are held, which leaves an arrowhead.

        """
        dim = self.q.dim
        if 2 * dim <= DENSE_LIMIT:
            precision = self.times(np.eye(2 * dim))
            root = Curvature.dense(precision).root
            covariance = (root @ root.T)[:dim, :dim]
            return from_curvature(self.q.loc, Curvature.dense(torch.linalg.inv(covariance)))
        joint = Structure(
            structure.dense,
            torch.cat([structure.groups, dim + structure.groups], 1),
            structure.signs,
            structure.hubs,
        )
        of_means, of_scales = structure.tangents(), structure.probes()
        tangents = np.zeros((len(of_means) + len(of_scales), 2 * dim))
        tangents[: len(of_means), :dim], tangents[len(of_means) :, dim:] = of_means, of_scales
        matrix = joint.arrowhead(self.times(tangents))
        return from_curvature(self.q.loc, Curvature.of(_without_scales(matrix, structure)))

    def variances(self, gradients: Tensor, tolerance: float, max_passes: int) -> tuple[Tensor, int]:
        """Return gᵀ Cov_LR g for gradients g (F, D), by conjugate gradients, a pass an iteration for all of them.

        Preconditioned by the mean-field optimum, at which −∂²ELBO is 1/σ² for a mean and 2 for a log sd (Hestenes &
        Stiefel 1952).

        Parameters
        ----------
        tolerance
            Relative change of every variance in an iteration, below which they are done.
        max_passes
            Iterations at most.

        Returns
        -------
        variances, passes
            (F,) and the passes made.

        """
        scale = torch.cat([self.q.stddev.square(), torch.full_like(self.q.stddev, 0.5)])
        target = torch.cat([gradients, torch.zeros_like(gradients)], dim=1)  # (F, 2D)
        solution, residual = torch.zeros_like(target), target.clone()
        direction = scale * residual
        squared = (residual * direction).sum(1)
        variances = torch.zeros_like(squared)
        for iteration in range(1, max_passes + 1):
            product = self.times(direction.numpy())
            step = squared / (direction * product).sum(1).clamp(min=torch.finfo(squared.dtype).tiny)
            solution = solution + step[:, None] * direction
            residual = residual - step[:, None] * product
            found = (target * solution).sum(1)
            change = (found - variances).abs() / found.abs().clamp(min=torch.finfo(found.dtype).tiny)
            variances = found
            conditioned = scale * residual
            squared, before = (residual * conditioned).sum(1), squared
            if bool((change < tolerance).all()):
                return variances, iteration
            direction = conditioned + (squared / before.clamp(min=torch.finfo(before.dtype).tiny))[:, None] * direction
        return variances, max_passes


def _without_scales(matrix: Arrowhead, structure: Structure) -> Arrowhead:
    """Return the arrowhead of the means alone, the groups' log sds eliminated: the Schur complement within a group."""
    half = structure.groups.shape[1]
    of_means, between, of_scales = (
        matrix.blocks[:, :half, :half],
        matrix.blocks[:, :half, half:],
        matrix.blocks[:, half:, half:],
    )
    cross_means, cross_scales = matrix.cross[:, :half], matrix.cross[:, half:]
    solved = torch.linalg.solve(of_scales, torch.cat([between.mT, cross_scales], dim=2))  # (J, C, C + G)
    of_between, of_cross = solved[:, :, :half], solved[:, :, half:]
    return Arrowhead(
        structure,
        corner=matrix.corner - torch.einsum("jcg,jch->gh", cross_scales, of_cross),
        cross=cross_means - between @ of_cross,
        blocks=of_means - between @ of_between,
    )


def expectations_of(
    functions: Mapping[str, Callable[..., Tensor]], model: Model, q: Gaussian, seed: int
) -> tuple[Tensor, Tensor]:
    """Return means (F,) under q, and mean gradients (F, D) in η, of scalar functions of latents by argument name.

    Raises
    ------
    InputError
        If a function takes what is not a latent, fails, does not return one number, or hides latents from gradients.

    """
    if not functions:
        raise InputError("there are no functions; give at least one, such as {'a': lambda a: a}")
    nodes = stratified(prior_draws(q.dim), q.dim, random_stream(seed, Purpose.RESPONSE, 1)).nodes
    eta = q.transform(nodes).requires_grad_()
    latents, _ = model.space.constrain(eta)
    means, gradients = [], []
    for name, function in functions.items():
        required, optional = argument_names(function, f"the function {name!r}")
        if unknown := sorted(set(required) - set(latents)):
            raise InputError(f"the function {name!r} takes {unknown[0]!r}; the latents are {', '.join(latents)}")
        taken = [latent for latent in (*required, *optional) if latent in latents]
        try:
            values = [function(**{latent: latents[latent][k] for latent in taken}) for k in range(len(eta))]
        except Exception as error:
            raise InputError(
                f"the function {name!r} failed: {type(error).__name__}: {error}; keep it {IN_TORCH}"
            ) from error
        if not isinstance(values[0], Tensor):
            raise InputError(
                f"the function {name!r} returned a {type(values[0]).__name__}; it must return one number as a tensor: "
                f"keep it {IN_TORCH}"
            )
        if values[0].numel() != 1:
            raise InputError(
                f"the function {name!r} returned shape {tuple(values[0].shape)}; it must return one number"
            )
        each = torch.stack([value.reshape(()).to(eta.dtype) for value in values])
        if not each.requires_grad and (each != each[0]).any():  # a constant has no gradient, and no variance
            raise InputError(
                f"the function {name!r} changes with the latents, but no gradient reaches them; keep it {IN_TORCH}, "
                "and without comparisons, which have none"
            )
        mean = each.mean() + 0 * eta.sum()
        gradients.append(torch.autograd.grad(mean, eta, retain_graph=True)[0].sum(0))
        means.append(mean.detach())
    return torch.stack(means), torch.stack(gradients)
