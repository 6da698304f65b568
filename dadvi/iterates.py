"""The iterates of stochastic ADVI: θ, which an optimiser of torch moves in place, and running means over its steps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from dadvi.families import Params
from dadvi.optim import takes_energy_gradient
from dadvi.types import FloatArray


class Iterates:
    """θ where it is, and what moves it.

    Parameters
    ----------
    theta
        The parameters of a member of a family, in the coordinates of the search, leaves of autograd.
    optimizer
        Of these parameters.
    schedule
        Of the optimiser's learning rates.

    """

    def __init__(self, theta: Params, optimizer: torch.optim.Optimizer, schedule: LRScheduler) -> None:
        self.theta = theta
        self.energy_only = takes_energy_gradient(optimizer)
        """Whether a step takes the gradient of the energy alone, without that of the entropy."""
        self._optimizer, self._schedule = optimizer, schedule

    def step(self, grad: Mapping[str, Tensor]) -> None:
        """Move θ by one step along a gradient, upwards."""
        for name, parameter in self.theta.items():
            parameter.grad = -grad[name]  # torch minimises
        self._optimizer.step()
        self._schedule.step()

    @property
    def vector(self) -> FloatArray:
        """Locations v and log scales (2D,), a copy."""
        return torch.cat([self.theta["loc"], self.theta["log_scale"]]).detach().numpy()

    @property
    def is_gaussian(self) -> bool:
        """Whether θ is still a Gaussian's."""
        scale = self.theta["log_scale"].exp()
        return bool((scale > 0).all() and all(p.isfinite().all() for p in (scale, *self.theta.values())))

    def describe(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """Return θ, and optimiser and schedule as torch describes them: what `restore` takes."""
        theta = {name: parameter.detach() for name, parameter in self.theta.items()}
        return theta, self._optimizer.state_dict(), self._schedule.state_dict()

    def restore(self, theta: Mapping[str, Tensor], optimizer: dict[str, Any], schedule: dict[str, Any]) -> None:
        """Go back to where all was described."""
        self._optimizer.load_state_dict(optimizer)
        self._schedule.load_state_dict(schedule)
        with torch.no_grad():
            for name, parameter in self.theta.items():
                parameter.copy_(theta[name])


@dataclass(frozen=True, eq=False)
class Stretch:
    """Running means over the steps of some whole epochs."""

    weight: int = 0
    elbo: float = 0.0
    iterate: FloatArray | float = 0.0  # (2D,): v and log scale
    square: FloatArray | float = 0.0  # (D,): v²
    steps: int = 0
    epochs: int = 0  # that have ended

    def add(self, weight: int, elbo: float, iterate: FloatArray) -> "Stretch":
        """Return the means with one more step, of so many chunks."""
        total = self.weight + weight
        share = weight / total
        with np.errstate(over="ignore", invalid="ignore"):  # where steps are about to diverge
            square = self.square + (iterate[: len(iterate) // 2] ** 2 - self.square) * share
        return replace(
            self,
            weight=total,
            elbo=self.elbo + (elbo - self.elbo) * share,
            iterate=self.iterate + (iterate - self.iterate) * share,
            square=square,
            steps=self.steps + 1,
        )

    def distance(self, location: FloatArray) -> float:
        """Return the RMS distance of the locations v from a point (D,), in posterior sds."""
        mean = np.asarray(self.iterate)[: len(location)]
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.sqrt(np.maximum(self.square - 2 * location * mean + location**2, 0).mean()))
