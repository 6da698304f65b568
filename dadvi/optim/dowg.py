"""DoWG, gradient descent whose step size is the distance travelled over the weighted gradients seen.

Khaled, Mishchenko and Jin (2023), "DoWG Unleashed: An Efficient Universal Parameter-Free Gradient Descent Method",
Algorithm 1. From x_0 and a first guess r_ε > 0 of the distance to the optimum, with r̄_{-1} = r_ε and v_{-1} = 0:

    r̄_t = max(r̄_{t-1}, ‖x_t − x_0‖)        the farthest that any iterate has been from the start
    v_t = v_{t-1} + r̄_t² ‖g_t‖²            squared gradient norms, weighted by the distance
    x_{t+1} = x_t − lr · r̄_t² / √v_t · g_t   (lr = 1 in the paper)

x is all parameters of all groups as one vector: there is one distance and one step size.

The guarantee is for an average of the iterates, which the paper weights by r̄_t²; the last iterate moves at the
edge of stability and does not settle under noise. Use it with `PolynomialAveraging`, as is usual for its sibling
DoG (Ivgi, Hinder and Carmon 2023).

The theory is for convex functions. In log-scales the negative ELBO is not convex, and gradients of much noise can
carry it off for hundreds of steps before it returns: give it more rows or draws a step, or take Adam.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from dadvi.errors import InputError


class DoWG(Optimizer):
    """Distance over weighted gradients: no learning rate to tune.

    Parameters
    ----------
    params
        Tensors, or parameter groups, as for every torch optimiser.
    lr
        Multiplies every step. Leave it at 1, the paper's method, unless a schedule is to shrink the steps.
    initial_distance
        r_ε, the norm of the very first step, in the units of the parameters. Those of a variational family are
        whitened, so that 1 is about one posterior sd per coordinate: the default is a step that no model can take
        amiss. The method doubles its way up from it in some ten steps, so results hardly depend on it unless it
        exceeds the true distance.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float = 1.0, initial_distance: float = 1e-2
    ) -> None:
        if not lr > 0:
            raise InputError(f"DoWG's lr is {lr}; it must be above 0, and 1 is the published method")
        if not initial_distance > 0:
            raise InputError(
                f"DoWG's initial_distance is {initial_distance}; it must be above 0, since from 0 it could never move: "
                "give a small part of the expected distance, such as 0.01 posterior sds"
            )
        super().__init__(params, {"lr": lr, "initial_distance": initial_distance})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step against the gradients in `.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        params: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        # What belongs to no single parameter lives with the first one, so that state_dict() carries it.
        joint = self.state[params[0]]
        if not joint:
            for p in params:
                self.state[p]["start"] = p.clone()
            joint["distance"] = params[0].new_tensor(self.defaults["initial_distance"])  # r̄, ()
            joint["weighted_sum"] = params[0].new_zeros(())  # v, ()

        zero = params[0].new_zeros(())
        travelled = sum(((p - self.state[p]["start"]).square().sum() for p in params), start=zero).sqrt()
        squared_gradient = sum((p.grad.square().sum() for p in params if p.grad is not None), start=zero)
        # New tensors, no updates in place: load_state_dict() shares tensors with the optimiser that they came from.
        joint["distance"] = torch.maximum(joint["distance"], travelled)
        joint["weighted_sum"] = joint["weighted_sum"] + joint["distance"].square() * squared_gradient
        if joint["weighted_sum"] == 0:  # every gradient so far was 0: this is a stationary point, and 0/0 no step size
            return loss

        step_size = joint["distance"].square() / joint["weighted_sum"].sqrt()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * step_size * p.grad)
        return loss
