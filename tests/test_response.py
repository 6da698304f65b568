"""Linear response: the true covariance where log π is quadratic, the closed form where it is not, by every route."""

import math
import re
from functools import partial

import numpy as np
import pytest
import targets
import torch
from torch.distributions import Bernoulli, HalfNormal, Normal

import dadvi
from dadvi import response
from dadvi.binding import bind_to
from dadvi.errors import InputError, ModelError
from dadvi.executors import SerialExecutor
from dadvi.passes import expected_hessian
from dadvi.probing import find_structure
from dadvi.response import Response
from dadvi.subsample import Subsample

ROWS = 300


@pytest.fixture
def fitted(write):
    """Fit a target in mean field: fitted("linear_regression") gives target, data, model and posterior."""

    def fit(name, num_rows=ROWS, **settings):
        target = targets.CONJUGATE[name](num_rows=num_rows)
        data, model = write(target.fields, f"{name}.zarr", chunk_rows=64), target.model()
        return target, data, model, dadvi.fit(model, data, client="serial", tol=1e-3, **settings)

    return fit


def covariance(posterior):
    return posterior.unconstrained.covariance_matrix.numpy()


@pytest.mark.parametrize("route", ["curvature", "data"])
@pytest.mark.parametrize("name", ["normal_normal", "linear_regression"])
def test_covariance_of_a_gaussian_posterior_is_exact(fitted, name, route):
    target, data, model, posterior = fitted(name)
    arguments = () if route == "curvature" else (model, data)
    corrected = posterior.linear_response(*arguments)
    scale = np.sqrt(np.outer(np.diag(target.covariance), np.diag(target.covariance)))
    np.testing.assert_allclose(covariance(corrected) / scale, target.covariance / scale, atol=1e-6)
    if name == "linear_regression":  # mean field itself is far from it
        assert (posterior.unconstrained.stddev.numpy() / np.sqrt(np.diag(target.covariance))).min() < 0.7
    np.testing.assert_array_equal(corrected.unconstrained.loc, posterior.unconstrained.loc)
    assert math.isnan(corrected.elbo)
    assert math.isnan(corrected.certificate.sd_error)
    assert corrected.certificate.max == posterior.certificate.max
    assert corrected.status == posterior.status


@pytest.mark.parametrize("num_rows", [5, 40])
def test_coupling_of_mean_and_sd_has_the_closed_form(fitted, num_rows):
    # The ELBO of N(u, e^{2w}) in log λ, a u − b exp(u + e^{2w}/2) + w, has at its optimum, where b exp(.) = a and
    # v = 1/a, the Hessian −[[a, 1], [1, 2 + v]]: so Cov_LR = 1/(a − 1/(2 + v)), larger than the curvature's 1/a.
    target, data, model, posterior = fitted("poisson_gamma", num_rows=num_rows)
    v = float(target.optimum("mean_field").sd[0]) ** 2
    exact = 1 / (1 / v - 1 / (2 + v))
    assert covariance(posterior.linear_response())[0, 0] == pytest.approx(v, rel=0.02)
    found = covariance(posterior.linear_response(model, data))[0, 0]
    # The rule is exact to degree 5 in ε: what is left is of the order of the sd to the fourth.
    assert found == pytest.approx(exact, rel=max(0.01 * exact / v - 0.01, 2 * v**2 / 15))
    assert abs(found / exact - 1) < 0.3 * (exact / v - 1)
    table = posterior.linear_response_of({"log_rate": lambda rate: rate.log()}, model, data)
    assert table.loc["log_rate", "sd"] ** 2 == pytest.approx(found, rel=1e-6)
    assert table.loc["log_rate", "mean"] == pytest.approx(float(posterior.unconstrained.loc[0]), abs=1e-9)


def test_functions_of_latents_by_conjugate_gradients(fitted):
    target, data, model, posterior = fitted("linear_regression")
    weights = {"first": [1.0, 0, 0, 0, 0], "contrast": [1.0, -1, 0, 0, 0], "sum": [1.0] * 5}
    functions = {name: lambda beta, w=w: (beta * torch.tensor(w).double()).sum() for name, w in weights.items()}
    table = posterior.linear_response_of(functions, model, data, tolerance=1e-9)
    for name, w in weights.items():
        assert table.loc[name, "sd"] == pytest.approx(math.sqrt(w @ target.covariance @ np.array(w)), rel=1e-6)
        assert table.loc[name, "mean"] == pytest.approx(float(np.array(w) @ posterior.unconstrained.loc.numpy()))
    assert 1 < table.attrs["passes"] <= 12  # at most a step for each eigenvalue, in exact arithmetic
    few = posterior.linear_response_of(functions, model, data, tolerance=1e-9, max_passes=1)
    assert few.attrs["passes"] == 1
    assert (few["sd"] < table["sd"]).all()  # variances grow from below


def test_products_are_those_of_the_elbos_hessian(fitted):
    _, data, model, posterior = fitted("inverse_gamma_normal", num_rows=20)
    executor = SerialExecutor(bind_to(model, data), data)
    at = Response.at(executor, posterior.unconstrained, seed=0)
    theta = torch.cat([posterior.unconstrained.loc, posterior.unconstrained.params["log_scale"]])
    rows = {name: torch.cat([data.read(chunk)[name] for chunk in range(data.manifest.num_chunks)]) for name in ("x",)}

    def elbo(point):
        loc, log_scale = point.split(2)
        data_part = executor.model.log_lik(loc + log_scale.exp() * at.likelihood.nodes, rows)
        prior_part = model.log_prior(loc + log_scale.exp() * at.prior.nodes)
        return at.likelihood.weights @ data_part + at.prior.weights @ prior_part + log_scale.sum()

    hessian = torch.autograd.functional.hessian(elbo, theta)
    torch.testing.assert_close(at.times(np.eye(4)), -hessian, rtol=1e-9, atol=1e-9 * float(hessian.abs().max()))


def test_expected_hessian_of_a_cubic_by_hand():
    # f = η³: E f = μ³ + 3 μ σ², with σ = e^ω: ∂²/∂μ² = 6μ, ∂²/∂μ∂ω = 6σ², ∂²/∂ω² = 12 μ σ².
    mu, omega = 0.7, -0.4
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    found = expected_hessian(
        lambda eta: eta[:, 0] ** 3,
        torch.tensor([mu, omega], dtype=torch.float64),
        torch.from_numpy(nodes)[:, None],
        torch.from_numpy(weights / weights.sum()),
        np.eye(2),
        0,
    )
    variance = math.exp(2 * omega)
    np.testing.assert_allclose(found, [[6 * mu, 6 * variance], [6 * variance, 12 * mu * variance]], rtol=1e-12)


# Effects of groups -------------------------------------------------------------------------------------------------


def grouped(write, num_groups=30, num_rows=900):
    rng = np.random.default_rng(0)
    group = rng.integers(num_groups, size=num_rows)
    effect = rng.normal(0, 0.7, num_groups)
    x = rng.standard_normal((num_rows, 2))
    y = rng.random(num_rows) < 1 / (1 + np.exp(-(x @ [0.5, -0.5] + effect[group])))
    model = dadvi.Model(
        prior={
            "slope": Normal(torch.zeros(2), 1.0),
            "tau": HalfNormal(1.0),
            "effect": lambda tau: Normal(torch.zeros(num_groups), tau),
        },
        likelihood=lambda slope, effect, x, group: Bernoulli(logits=x @ slope + effect[group]),
        observed="y",
    )
    data = write({"x": x, "group": group, "y": y}, chunk_rows=100)
    return model, data, dadvi.fit(model, data, client="serial", tol=0.01)


def test_response_of_groups_is_an_arrow_that_agrees_with_the_dense_one(write, monkeypatch):
    model, data, posterior = grouped(write)
    arrow = posterior.linear_response()
    assert arrow.unconstrained.family.name == "arrow"
    P = posterior.curvature.precision.matrix()
    torch.testing.assert_close(
        arrow.unconstrained.covariance_matrix, torch.linalg.inv(P), rtol=1e-8, atol=1e-8 * float(1 / P.diagonal().min())
    )
    dense = posterior.linear_response(model, data)
    assert dense.unconstrained.family.name == "full_rank"
    monkeypatch.setattr(response, "DENSE_LIMIT", 10)
    exact = posterior.linear_response(model, data)
    assert exact.unconstrained.family.name == "arrow"
    tau = posterior.names.index("tau")
    ratio = (exact.unconstrained.stddev / dense.unconstrained.stddev).numpy()
    np.testing.assert_allclose(np.delete(ratio, tau), 1, atol=0.02)
    assert ratio[tau] == pytest.approx(1, abs=0.15)  # the response of log τ's own sd is held
    # The coupling of the scale with the sds of its effects is seen: without it τ's sd is too small.
    assert exact.unconstrained.stddev[tau] > 1.1 * arrow.unconstrained.stddev[tau]


def test_arrow_posterior_is_saved_and_read(write, tmp_path):
    _, _, posterior = grouped(write)
    arrow = posterior.linear_response()
    arrow.save(tmp_path / "arrow.zarr")
    loaded = dadvi.load_posterior(tmp_path / "arrow.zarr")
    for name, value in arrow.sample(10, seed=1).items():
        assert torch.equal(loaded.sample(10, seed=1)[name], value)
    assert loaded.summary().equals(arrow.summary())
    again = loaded.linear_response()
    torch.testing.assert_close(again.unconstrained.stddev, arrow.unconstrained.stddev, rtol=1e-9, atol=0)


def test_without_groups_sds_the_schur_complement_is_that_of_the_dense_matrix(write):
    model, data, posterior = grouped(write)
    structure = find_structure(Subsample.load(bind_to(model, data), data, [0, 1]), 0)
    dim, half = posterior.unconstrained.dim, structure.groups.shape[1]
    rng = np.random.default_rng(0)
    width = len(structure.dense) + 2 * structure.groups.numel()
    root = torch.from_numpy(rng.standard_normal((width, width)))
    matrix = root @ root.T + width * torch.eye(width, dtype=torch.float64)
    keep = torch.zeros(width, width, dtype=torch.bool)
    place = {int(c): k for k, c in enumerate(structure.dense)}
    num_dense, num_groups = len(place), len(structure.groups)
    keep[:num_dense] = keep[:, :num_dense] = True
    for j in range(num_groups):  # mean and log sd of group j stand side by side
        block = num_dense + 2 * half * j
        keep[block : block + 2 * half, block : block + 2 * half] = True
    matrix = torch.where(keep, matrix, torch.zeros(()).double())
    members = torch.arange(num_dense, width).reshape(num_groups, 2 * half)
    joint = dadvi.structure.Structure(torch.arange(num_dense), members, structure.signs, structure.hubs)
    found = response._without_scales(joint.from_matrix(matrix), structure)
    means = [*range(num_dense), *(int(m) for m in members[:, :half].flatten())]
    expected = torch.linalg.inv(torch.linalg.inv(matrix)[means][:, means])
    order = torch.cat([structure.dense, structure.groups.flatten()])
    assert len(order) == dim
    torch.testing.assert_close(found.matrix()[order][:, order], expected, rtol=1e-9, atol=1e-9)


# Bad input ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_answered_is_refused_with_the_remedy(fitted):
    _, data, model, posterior = fitted("linear_regression")
    refused = partial(pytest.raises, InputError)
    with refused(match="model and data, or neither"):
        posterior.linear_response(model)
    with refused(match="'gamma'.*latents are beta"):
        posterior.linear_response_of({"f": lambda gamma: gamma}, model, data)
    with refused(match=r"'f' returned shape \(5,\)"):
        posterior.linear_response_of({"f": lambda beta: beta}, model, data)
    with refused(match="no functions; give at least one"):
        posterior.linear_response_of({}, model, data)
    with refused(match="'f' failed: IndexError: .*keep it in torch"):
        posterior.linear_response_of({"f": lambda beta: beta[9]}, model, data)
    with refused(match="'f' failed: RuntimeError: Can't call numpy.*keep it in torch, without .item"):
        posterior.linear_response_of({"f": lambda beta: torch.tensor(beta.numpy().sum())}, model, data)
    with refused(match="'f' returned a float; it must return one number as a tensor: keep it in torch"):
        posterior.linear_response_of({"f": lambda beta: beta[0].item()}, model, data)
    for hidden in (lambda beta: beta[0].detach(), lambda beta: beta[0] > posterior.unconstrained.loc[0]):
        with refused(match="'f' changes with the latents, but no gradient reaches them; keep it in torch"):
            posterior.linear_response_of({"f": hidden}, model, data)
    full = dadvi.fit(model, data, family="full_rank", client="serial")
    with refused(match="full_rank"):
        full.linear_response(model, data)
    np.testing.assert_allclose(covariance(full.linear_response()), covariance(full), rtol=1e-2)


def test_a_constant_has_no_variance(fitted):
    _, data, model, posterior = fitted("linear_regression")
    functions = {"one": lambda beta: torch.tensor(1.0), "beta": lambda beta: beta[0]}
    table = posterior.linear_response_of(functions, model, data)
    assert tuple(table.loc["one"]) == (1.0, 0.0)
    assert table.loc["beta", "sd"] > 0


def test_another_model_than_was_fitted_is_refused_before_any_pass(fitted, tmp_path, monkeypatch):
    _, data, model, posterior = fitted("linear_regression")
    size = model.dim
    posterior.save(tmp_path / "p.zarr")
    stored = dadvi.load_posterior(tmp_path / "p.zarr")
    stored.linear_response(model, data)
    monkeypatch.delattr("dadvi.posterior.make_executor")

    def linear(prior, likelihood):
        return dadvi.Model(prior, likelihood, observed="y")

    others = {
        f"it has the latents beta[{size}], s[], and the posterior has beta[{size}]": {
            "beta": Normal(torch.zeros(size), 1.0),
            "s": Normal(0.0, 1.0),
        },
        "it has the latents beta[2], and": {"beta": Normal(torch.zeros(2), 1.0)},
        "'beta' has the support GreaterThanEq(lower_bound=0.0) in it, and": {"beta": HalfNormal(torch.ones(size))},
    }
    for told, prior in others.items():
        other = linear(prior, lambda beta, x: Normal(beta.sum() + x.sum(-1), 1.0))
        for ask in (
            lambda of, other=other: of.linear_response(other, data),
            lambda of, other=other: of.linear_response_of({"f": lambda beta: beta[0]}, other, data),
        ):
            for of in (posterior, stored):
                with pytest.raises(ModelError, match=re.escape(told)) as refused:
                    ask(of)
                assert "the model is not that of the posterior" in str(refused.value)
    with pytest.raises(ModelError, match="model is a int; give a"):
        posterior.linear_response(3, data)
    with pytest.raises(InputError, match="data is a int; give what"):
        posterior.linear_response_of({"f": lambda beta: beta[0]}, model, 3)
