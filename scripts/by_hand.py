"""Likelihoods with their sums and gradients at K draws, written out in torch: what a pass of dadvi is measured against.

Each is what one would write for this model alone, with draws batched by hand and in the dtype of the rows: in closed
form for the logistic regressions, by torch's automatic differentiation of batched code for the others. Sums of
log-likelihoods are added up in float64; gradients are those with respect to the unconstrained coordinates.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Gamma, HalfNormal, Normal, StudentT
from torch.nn.functional import logsigmoid, softplus

import dadvi
from dadvi.passes import GradientSums
from dadvi.types import Batch


class ByHand(ABC):
    """A model, rows for it, and its pass by hand."""

    columns: int

    @abstractmethod
    def model(self) -> dadvi.Model:
        """Return the model as a user of dadvi writes it."""

    @abstractmethod
    def add(self, eta: Tensor, batch: Batch, log_lik: Tensor, grad: Tensor) -> None:
        """Add the rows of a batch to log-likelihoods (K,) and gradients (K, D) at points (K, D), in float32."""

    def fields(self, rng: np.random.Generator, rows: int) -> dict[str, Any]:
        """Return fields of so many rows."""
        x = rng.standard_normal((rows, self.columns), dtype=np.float32)
        beta = (rng.standard_normal(self.columns) / self.columns**0.5).astype(np.float32)
        return {"x": x, "y": rng.random(rows, dtype=np.float32) < 1 / (1 + np.exp(-x @ beta))}

    def sums(self, points: np.ndarray, batches: Sequence[Batch]) -> GradientSums:
        """Return log-likelihoods (K,) and gradients (K, D) over all rows, on torch's present number of threads."""
        log_lik = torch.zeros(len(points), dtype=torch.float64)
        grad = torch.zeros(points.shape, dtype=torch.float64)
        eta = torch.from_numpy(points).float()
        for batch in batches:
            self.add(eta, batch, log_lik, grad)
        return GradientSums(log_lik.numpy(), grad.numpy())


@dataclass(frozen=True)
class Logistic(ByHand):
    """Logistic regression, in closed form."""

    columns: int = 100

    def model(self) -> dadvi.Model:
        """Return the model."""
        prior = {"beta": Normal(torch.zeros(self.columns), 1.0)}
        return dadvi.Model(prior, lambda beta, x: Bernoulli(logits=x @ beta), "y")

    def add(self, eta: Tensor, batch: Batch, log_lik: Tensor, grad: Tensor) -> None:
        """Add the rows of a batch."""
        x, y = batch["x"], batch["y"].float()[:, None]
        logits = x @ eta.T  # (n, K)
        log_lik += (y * logits - softplus(logits)).sum(0, dtype=torch.float64)
        grad += (y - torch.sigmoid(logits)).T @ x


@dataclass(frozen=True)
class Groups(ByHand):
    """Logistic regression with an effect for each group, in closed form."""

    groups: int
    columns: int = 20

    def model(self) -> dadvi.Model:
        """Return the model."""
        prior = {"beta": Normal(torch.zeros(self.columns), 1.0), "u": Normal(torch.zeros(self.groups), 1.0)}
        return dadvi.Model(prior, lambda beta, u, x, group: Bernoulli(logits=x @ beta + u[group]), "y")

    def fields(self, rng: np.random.Generator, rows: int) -> dict[str, Any]:
        """Return fields of so many rows."""
        return {**super().fields(rng, rows), "group": rng.integers(self.groups, size=rows)}

    def add(self, eta: Tensor, batch: Batch, log_lik: Tensor, grad: Tensor) -> None:
        """Add the rows of a batch."""
        x, group, y = batch["x"], batch["group"], batch["y"].float()[:, None]
        beta, u = eta[:, : self.columns], eta[:, self.columns :]
        logits = x @ beta.T + u.T.contiguous()[group]  # (n, K)
        log_lik += (y * logits - softplus(logits)).sum(0, dtype=torch.float64)
        residual = y - torch.sigmoid(logits)
        grad[:, : self.columns] += residual.T @ x
        grad[:, self.columns :] += torch.zeros(self.groups, len(eta)).index_add_(0, group, residual).T


class _Differentiated(ByHand):
    """By automatic differentiation of code that is batched by hand."""

    @abstractmethod
    def log_lik(self, eta: Tensor, batch: Batch) -> Tensor:
        """Return ℓ_i(η_k), (n, K)."""

    def add(self, eta: Tensor, batch: Batch, log_lik: Tensor, grad: Tensor) -> None:
        """Add the rows of a batch."""
        with torch.enable_grad():
            leaf = eta.clone().requires_grad_()
            each = self.log_lik(leaf, batch)
            log_lik += each.detach().sum(0, dtype=torch.float64)
            grad += torch.autograd.grad(each.sum(), leaf)[0]


@dataclass(frozen=True)
class Student(_Differentiated):
    """Regression with Student-t noise of unknown scale and degrees of freedom."""

    columns: int = 20

    def model(self) -> dadvi.Model:
        """Return the model."""
        prior = {
            "beta": Normal(torch.zeros(self.columns), 1.0),
            "scale": HalfNormal(1.0),
            "df": Gamma(2.0, 0.1),
        }
        return dadvi.Model(prior, lambda beta, scale, df, x: StudentT(df, x @ beta, scale), "y")

    def fields(self, rng: np.random.Generator, rows: int) -> dict[str, Any]:
        """Return fields of so many rows."""
        x = rng.standard_normal((rows, self.columns), dtype=np.float32)
        noise = rng.standard_t(5, rows).astype(np.float32)
        return {"x": x, "y": x @ np.ones(self.columns, np.float32) / self.columns + noise}

    def log_lik(self, eta: Tensor, batch: Batch) -> Tensor:
        """Return ℓ_i(η_k), (n, K)."""
        beta, (scale, df) = eta[:, : self.columns], eta[:, self.columns :].exp().T
        z = (batch["y"][:, None] - batch["x"] @ beta.T) / scale
        normaliser = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (df * torch.pi).log() - scale.log()
        return normaliser - 0.5 * (df + 1) * torch.log1p(z.square() / df)


@dataclass(frozen=True)
class Network(_Differentiated):
    """A network of three layers before a Bernoulli: x W1 → tanh → W2 → tanh → w3."""

    columns: int = 20
    hidden: int = 16

    def model(self) -> dadvi.Model:
        """Return the model."""
        shapes = {"w1": (self.columns, self.hidden), "w2": (self.hidden, self.hidden), "w3": (self.hidden,)}
        prior = {name: Normal(torch.zeros(shape), 1.0) for name, shape in shapes.items()}

        def likelihood(w1: Tensor, w2: Tensor, w3: Tensor, x: Tensor) -> Bernoulli:
            return Bernoulli(logits=torch.tanh(torch.tanh(x @ w1) @ w2) @ w3)

        return dadvi.Model(prior, likelihood, "y")

    def log_lik(self, eta: Tensor, batch: Batch) -> Tensor:
        """Return ℓ_i(η_k), (n, K)."""
        sizes = [self.columns * self.hidden, self.hidden**2, self.hidden]
        w1, w2, w3 = eta.split(sizes, 1)
        first = torch.tanh(batch["x"] @ w1.view(-1, self.columns, self.hidden))  # (K, n, hidden)
        second = torch.tanh(first @ w2.view(-1, self.hidden, self.hidden))
        logits = (second @ w3[..., None])[..., 0]
        return logsigmoid(torch.where(batch["y"], logits, -logits)).T
