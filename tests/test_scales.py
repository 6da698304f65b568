"""Scales that multiply effects: found by what they do to gradients, and exact in an expansion, however far."""

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, HalfNormal, Normal

import dadvi
from dadvi.binding import bind_to
from dadvi.executors import SerialExecutor
from dadvi.families import Gaussian, MeanField
from dadvi.local import Noise, Taylor
from dadvi.passes import Gradient, HessianVector, single_thread
from dadvi.probing import find_structure
from dadvi.quadrature import Rule, gauss_hermite, stratified
from dadvi.scales import Scales, find_scales
from dadvi.structure import Arrowhead, Structure
from dadvi.subsample import Subsample

J, L, ROWS = 20, 4, 600


@pytest.fixture(autouse=True)
def one_thread():
    with single_thread():
        yield


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# The change of coordinates ----------------------------------------------------------------------------------------


@pytest.fixture
def scales():
    """Two scales among five dense coordinates: one multiplies two others and a column of groups, one both columns."""
    rng = np.random.default_rng(1)
    structure = Structure.grouped(17, [torch.arange(5, 11), torch.arange(11, 17)], rng)
    powers = torch.zeros(2, 17).double()
    powers[0, [1, 3, *range(5, 11)]] = 1.0
    powers[1, 5:] = 0.5
    return Scales(structure, (0, 4), powers)


def quadratic_in_w(scales, seed=2):
    """Return Hessian and gradient at w = 0 of a quadratic in w that no scale enters but by w."""
    half, linear = normal(17, 17, seed=seed), normal(17, seed=seed + 1)
    half[scales.coordinates], linear[scales.coordinates] = 0, 0
    bend = scales.structure.from_matrix(half @ half.T)
    return bend, linear


def changed(scales, eta, origin):
    """Return w at η (D,), by its definition."""
    change = (eta - origin)[scales.coordinates]
    return eta * (change @ scales.powers).exp()


def test_gradient_and_hessian_against_autograd(scales):
    bend, linear = quadratic_in_w(scales)
    origin, eta = normal(17, seed=5), normal(17, seed=6)

    def value(eta):
        w = changed(scales, eta, origin)
        return linear @ w + 0.5 * w @ bend.matrix() @ w

    growth = scales.growth(eta[None], origin)
    w = growth * eta
    torch.testing.assert_close(w[0], changed(scales, eta, origin))
    of_w = linear + bend.times(w)
    leaf = eta.clone().requires_grad_()
    torch.testing.assert_close(scales.grad(of_w, w, growth)[0], torch.autograd.grad(value(leaf), leaf)[0])
    hessian = torch.autograd.functional.hessian(value, eta)
    torch.testing.assert_close(scales.hessian(bend, of_w[0], w[0], growth[0]).matrix(), hessian)
    torch.testing.assert_close(scales.structure.from_matrix(hessian).matrix(), hessian)  # it is an arrowhead


def test_the_gradient_in_w_is_the_one_whose_average_is_given(scales):
    _, linear = quadratic_in_w(scales)
    origin, weights = normal(17, seed=5), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    rule = Rule(origin + 0.4 * normal(3, 17, seed=6), weights)
    growth = scales.growth(rule.nodes, origin)
    w = growth * rule.nodes
    grads = linear.expand(3, -1)
    of_eta = rule.mean(scales.grad(grads, w, growth))
    torch.testing.assert_close(scales.grad_in_w(of_eta, rule, origin), linear)


def test_without_scales_nothing_changes():
    structure = Structure.full(4)
    none, eta, bend = Scales.none(structure), normal(3, 4), Arrowhead.dense(torch.eye(4).double())
    assert torch.equal(none.growth(eta, eta[0]), torch.ones(3, 4).double())
    assert torch.equal(none.grad(eta, eta, torch.ones(3, 4).double()), eta)
    assert none.hessian(bend, eta[0], eta[0], torch.ones(4).double()) is bend
    rule = Rule.equal(eta)
    assert torch.equal(none.unbent(bend).matrix(), bend.matrix())
    assert torch.equal(none.at_origin(eta, eta[0]), eta)
    assert torch.equal(none.grad_in_w(eta[1], rule, eta[0]), eta[1])


# Finding them -----------------------------------------------------------------------------------------------------


def fields(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "g": rng.integers(0, J, ROWS),
        "h": rng.integers(0, L, ROWS),
        "x": rng.standard_normal(ROWS),
        "y": rng.integers(0, 2, ROWS),
    }


PRIOR = {"a": Normal(0.0, 1.0), "b": Normal(0.0, 1.0)}
EFFECTS = {"z": Normal(torch.zeros(J), 1.0)}
ONE, TWO = {"tau": HalfNormal(1.0)}, {"tau": HalfNormal(torch.ones(2))}


def logits(a, b, x, effect):
    return Bernoulli(logits=a + b * x + effect)


MODELS = {
    "one scale": (
        {**PRIOR, **ONE, **EFFECTS},
        lambda a, b, tau, z, x, g: logits(a, b, x, tau * z[g]),
        {("tau", "z"): 1.0},
    ),
    "a scale's square root": (
        {**PRIOR, **ONE, **EFFECTS},
        lambda a, b, tau, z, x, g: logits(a, b, x, tau.sqrt() * z[g]),
        {("tau", "z"): 0.5},
    ),
    "a scale of the slope too": (
        {**PRIOR, **ONE, **EFFECTS},
        lambda a, b, tau, z, x, g: logits(a, tau * b, x, tau * z[g]),
        {("tau", "z"): 1.0, ("tau", "b"): 1.0},
    ),
    "a scale of each column": (
        {**PRIOR, **TWO, "z": Normal(torch.zeros(J, 2), 1.0)},
        lambda a, b, tau, z, x, g: logits(a, b, x, (tau * z)[g][:, 0] + (tau * z)[g][:, 1] * x),
        {("tau", "z"): torch.eye(2).double()},
    ),
    "crossed": (
        {**PRIOR, **TWO, **EFFECTS, "v": Normal(torch.zeros(L), 1.0)},
        lambda a, b, tau, z, v, x, g, h: logits(a, b, x, tau[0] * z[g] + tau[1] * v[h]),
        {("tau", "z"): torch.tensor([[1.0], [0.0]]).double(), ("tau", "v"): torch.tensor([[0.0], [1.0]]).double()},
    ),
    "centred": (
        {**PRIOR, **ONE, "z": lambda tau: Normal(torch.zeros(J), tau)},
        lambda a, b, z, x, g: logits(a, b, x, z[g]),
        {},
    ),
    "a scale that adds something": (
        {**PRIOR, **ONE, **EFFECTS},
        lambda a, b, tau, z, x, g: logits(a, b, x, tau * z[g] + 1e-3 * tau),
        {},
    ),
    "not a power": (
        {**PRIOR, **ONE, **EFFECTS},
        lambda a, b, tau, z, x, g: logits(a, b, x, (1 + tau) * z[g]),
        {},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_find_scales(write, name):
    prior, likelihood, expected = MODELS[name]
    model = dadvi.Model(prior, likelihood, "y")
    data = write(fields(), chunk_rows=100)
    subsample = Subsample.load(bind_to(model, data), data, range(data.manifest.num_chunks))
    structure = find_structure(subsample, 0)
    at = {site.name: torch.arange(site.offset, site.offset + site.size) for site in model.space.sites}
    powers = torch.zeros(model.dim, model.dim).double()
    for (scale, effects), power in expected.items():
        of_site = torch.as_tensor(power).double().expand(len(at[scale]), -1 if torch.is_tensor(power) else 1)
        powers[at[scale][:, None], at[effects]] = of_site.repeat(1, len(at[effects]) // of_site.shape[1])
    found = find_scales(subsample, structure, 0)
    assert torch.equal(found.coordinates, powers.any(1).nonzero()[:, 0])
    assert torch.equal(found.powers, powers[found.coordinates])
    assert found.affine == bool(expected)  # given the scales, logits are affine in what they multiply


def test_what_bends_given_the_scales_is_not_taken_for_affine(write):
    model = dadvi.Model(
        {**PRIOR, **ONE, **EFFECTS},
        lambda a, b, tau, z, x, g: Bernoulli(probs=torch.sigmoid(a + b * x + tau * z[g])),
        "y",
    )
    data = write(fields(), chunk_rows=100)
    subsample = Subsample.load(bind_to(model, data), data, range(data.manifest.num_chunks))
    found = find_scales(subsample, find_structure(subsample, 0), 0)
    assert len(found.places) == 1
    assert not found.affine


def test_hessians_at_the_scales_of_the_origin_are_those_in_w(write):
    """Of a likelihood whose parameters are affine given the scales, and by automatic differentiation of it in w."""
    prior, likelihood, _ = MODELS["crossed"]
    model = dadvi.Model(prior, likelihood, "y")
    data = write(fields(), chunk_rows=100)
    bound = bind_to(model, data)
    subsample = Subsample.load(bound, data, range(data.manifest.num_chunks))
    scales = find_scales(subsample, find_structure(subsample, 0), 0)
    origin, weights = 0.5 * normal(model.dim), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    eta = origin + 0.4 * normal(3, model.dim, seed=6)
    growth = scales.growth(eta, origin)
    points, w = scales.at_origin(eta, origin), growth * eta
    executor = SerialExecutor(bound, data)
    np.testing.assert_allclose(
        executor.run(Gradient(points.numpy())).log_lik, executor.run(Gradient(eta.numpy())).log_lik, rtol=1e-10
    )

    def of_w(at, scale_values):
        """Return the log-likelihood at w (D,), for values of the scales that it must not depend on."""
        back = at / torch.exp((scale_values - origin[scales.coordinates]) @ scales.powers)
        back = back.index_put((scales.coordinates,), scale_values)
        return subsample.model.log_lik(back[None], data_all)[0]

    data_all = {name: torch.cat([batch[name] for batch in subsample.batches.values()]) for name in fields()}
    exact = sum(
        weight * torch.autograd.functional.hessian(lambda at, k=k: of_w(at, eta[k, scales.coordinates]), w[k])
        for k, weight in enumerate(weights)
    )
    tangents = normal(6, model.dim, seed=2)
    tangents[:, scales.coordinates] = 0.0
    held = tuple(scales.coordinates.tolist())
    for each in (held, ()):
        work = HessianVector(points.numpy(), tangents.numpy(), weights.numpy(), each)
        found = torch.from_numpy(executor.run(work).products)
        found[:, scales.coordinates] = 0.0
        torch.testing.assert_close(found, tangents @ exact, rtol=1e-8, atol=1e-8)


# An expansion with them -------------------------------------------------------------------------------------------


def test_an_expansion_is_exact_however_far_where_the_likelihood_is_quadratic_in_what_it_sees(write):
    rng = np.random.default_rng(3)
    rows = {"g": rng.integers(0, J, ROWS), "x": rng.standard_normal(ROWS), "y": rng.standard_normal(ROWS)}
    model = dadvi.Model(
        {**PRIOR, **ONE, **EFFECTS}, lambda a, b, tau, z, x, g: Normal(a + b * x + tau * z[g], 0.7), "y"
    )
    data = write(rows, chunk_rows=100)
    bound = bind_to(model, data)
    subsample = Subsample.load(bound, data, range(data.manifest.num_chunks))
    scales = find_scales(subsample, find_structure(subsample, 0), 0)
    noise = Noise(gauss_hermite(8, model.dim, rng), gauss_hermite(2, model.dim, rng), stratified(8, model.dim, rng))
    q = Gaussian(MeanField(), {"loc": 0.3 * normal(model.dim), "log_scale": torch.full((model.dim,), -1.0).double()})
    local = Taylor.measured(SerialExecutor(bound, data), q, noise, scales, check=True, label="test")
    far = q.loc + 2 * normal(5, model.dim, seed=1)
    value, grad = local.log_lik(far)
    for each, found, found_grad in zip(far, value, grad, strict=True):
        leaf = each.clone().requires_grad_()
        a, b, tau, *z = leaf
        mean = a + b * torch.from_numpy(rows["x"]) + tau.exp() * torch.stack(z)[torch.from_numpy(rows["g"])]
        exact = Normal(mean, 0.7).log_prob(torch.from_numpy(rows["y"])).sum()
        torch.testing.assert_close(found, exact.detach(), rtol=1e-6, atol=0)
        exact_grad = torch.autograd.grad(exact, leaf)[0]
        torch.testing.assert_close(found_grad, exact_grad, rtol=0, atol=1e-6 * float(exact_grad.abs().max()))
