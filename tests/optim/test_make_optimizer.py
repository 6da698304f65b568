"""Every optimiser is made and used in one way, finds a Gaussian, and resumes; what cannot be used is refused."""

import copy
from functools import partial

import pytest
import torch

from dadvi.errors import InputError
from dadvi.optim import OPTIMIZERS, DoWG, PolynomialAveraging, make_optimizer

D = 5


def target():
    """Return the precision H of a Gaussian with unit conditional variances, correlated: whitened coordinates."""
    return torch.eye(D, dtype=torch.float64) + 0.15 * (1 - torch.eye(D, dtype=torch.float64))


class Fit:
    """Mean-field ADVI on N(0, H⁻¹) from 3 sds away, with gradient noise as of subsampled rows."""

    def __init__(self, optimizer, noise=1.0):
        self.noise = noise
        self.loc = torch.full((D,), 3.0, dtype=torch.float64)
        self.log_scale = torch.full((D,), -1.0, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(0)
        groups = [{"params": [self.loc]}, {"params": [self.log_scale], "entropy": True}]
        self.optimizer = make_optimizer(optimizer, groups)

    def step(self):
        H = target()
        noise = self.noise * torch.randn(2, D, generator=self.generator, dtype=torch.float64)
        entropy = 0.0 if hasattr(self.optimizer, "takes_energy_gradient") else 1.0
        sigma = self.log_scale.exp()
        self.loc.grad = H @ self.loc + noise[0]
        self.log_scale.grad = H.diagonal() * sigma**2 + noise[1] * sigma - entropy
        self.optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_shipped_optimizer_finds_the_optimum_untuned(name):
    fit, averaging = Fit(name), PolynomialAveraging()
    params = {"loc": fit.loc, "log_scale": fit.log_scale}
    state = averaging.init(params)
    for _ in range(4000):
        fit.step()
        state = averaging.update(state, params)
    found = averaging.value(state)
    # The average of T steps of noise 1 cannot be nearer than about √(9/T)/curvature, 0.05 here; the optimum is 0, 0.
    assert found["loc"].abs().max() < 0.2
    assert found["log_scale"].abs().max() < 0.2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_shipped_optimizer_resumes_with_the_same_bits(name):
    fit = Fit(name)
    for _ in range(7):
        fit.step()
    resumed = Fit(name)
    resumed.loc.copy_(fit.loc)
    resumed.log_scale.copy_(fit.log_scale)
    resumed.generator.set_state(fit.generator.get_state())
    resumed.optimizer.load_state_dict(copy.deepcopy(fit.optimizer.state_dict()))  # torch's would share tensors
    before = fit.loc.clone()
    for _ in range(7):
        fit.step()
    for _ in range(7):
        resumed.step()
    assert torch.equal(fit.loc, resumed.loc)
    assert torch.equal(fit.log_scale, resumed.log_scale)
    assert not torch.equal(fit.loc, before)


def groups():
    return [{"params": [torch.zeros(2, dtype=torch.float64)]}, {"params": [torch.zeros(2, dtype=torch.float64)]}]


@pytest.mark.parametrize("optimizer", ["sgd", torch.optim.SGD, partial(torch.optim.SGD, lr=7.0), DoWG])
def test_learning_rate_is_passed_on_however_the_optimizer_is_given(optimizer):
    made = make_optimizer(optimizer, groups(), learning_rate=0.25)
    assert [group["lr"] for group in made.param_groups] == [0.25, 0.25]


def test_without_a_learning_rate_the_optimizer_keeps_its_own():
    made = make_optimizer(partial(torch.optim.Adam, lr=0.5, betas=(0.8, 0.9)), groups())
    assert made.param_groups[0]["lr"] == 0.5
    assert made.param_groups[0]["betas"] == (0.8, 0.9)
    assert isinstance(make_optimizer(lambda g: torch.optim.RAdam(g), groups()), torch.optim.RAdam)


def test_unknown_name_lists_the_known():
    with pytest.raises(InputError, match=r"optimizer is 'lion'; known are 'adam', 'sgd', .*'dowg', 'proximal'"):
        make_optimizer("lion", groups())


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, partial(torch.optim.LBFGS, history_size=5)])
def test_an_optimizer_that_needs_a_closure_is_refused_for_that_reason(optimizer):
    with pytest.raises(InputError, match=r"LBFGS evaluates the objective several times a step"):
        make_optimizer(optimizer, groups())
    with pytest.raises(InputError, match=r"LBFGS evaluates the objective several times a step"):
        make_optimizer(lambda g: torch.optim.LBFGS(g[0]["params"]), groups())


def test_what_makes_no_optimizer_is_refused():
    with pytest.raises(InputError, match=r"made a dict; it must make a torch.optim.Optimizer"):
        make_optimizer(lambda g: {}, groups())
    with pytest.raises(InputError, match=r"optimizer is a Adam; give a name"):
        make_optimizer(torch.optim.Adam(groups()), groups())


def test_what_refuses_its_arguments_is_reported_with_them():
    with pytest.raises(
        InputError, match=r"SGD refused to be made from 2 parameter groups, lr=-1.0: Invalid learning rate"
    ):
        make_optimizer(torch.optim.SGD, groups(), learning_rate=-1.0)
    with pytest.raises(InputError, match=r"<lambda> refused.*unexpected keyword argument 'lr'"):
        make_optimizer(lambda g: torch.optim.SGD(g), groups(), learning_rate=0.1)
    with pytest.raises(InputError, match=r"DoWG's lr is 0; it must be above 0"):
        make_optimizer("dowg", groups(), learning_rate=0)
