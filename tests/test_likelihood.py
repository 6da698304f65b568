"""The likelihood on data: three ways of evaluating it that must agree, and what is refused at the door."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Binomial,
    Categorical,
    Distribution,
    Gamma,
    HalfNormal,
    Independent,
    Laplace,
    LogNormal,
    MixtureSameFamily,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
    Uniform,
    constraints,
)
from torch.utils._python_dispatch import TorchDispatchMode

import dadvi
from dadvi.binding import bind
from dadvi.errors import DataError, ModelError

ROWS = 30
RNG = np.random.default_rng(0)


def rows_of_every_kind() -> dict[str, Tensor]:
    counts = RNG.integers(0, 5, ROWS)
    fields = {
        "x": RNG.standard_normal((ROWS, 3)),
        "group": RNG.integers(0, 4, ROWS),
        "real": RNG.standard_normal(ROWS),
        "positive": RNG.gamma(2.0, size=ROWS),
        "fraction": RNG.uniform(0.05, 0.95, ROWS),
        "flag": RNG.random(ROWS) < 0.4,
        "count": counts,
        "trials": counts + RNG.integers(1, 4, ROWS),
        "code": RNG.integers(0, 3, ROWS),
        "pair": RNG.standard_normal((ROWS, 2)),
        "w": RNG.uniform(0.0, 2.0, ROWS),
    }
    return {name: torch.from_numpy(np.asarray(values)) for name, values in fields.items()}


BATCH = rows_of_every_kind()
B = {"b": Normal(torch.zeros(3), 1.0)}
B_AND_SCALE = {**B, "s": HalfNormal(1.0)}
GROUPS = {"tau": HalfNormal(1.0), "u": lambda tau: Normal(torch.zeros(4), tau)}
MATRIX = {"b": Normal(torch.zeros(3, 3), 1.0)}


class Shifted(Normal):
    """A distribution with more parameters than arg_constraints has: rebuilt from these alone, it scores wrongly."""

    def __init__(self, loc, scale, shift=0.0):
        self.shift = shift
        super().__init__(loc, scale)

    def log_prob(self, value):
        return super().log_prob(value - self.shift)


# name: prior, likelihood, observed, the strategy that must be chosen
LIKELIHOODS = {
    "bernoulli": (B, lambda b, x: Bernoulli(logits=x @ b), "flag", "parameters"),
    "bernoulli_probs": (B, lambda b, x: Bernoulli(probs=torch.sigmoid(x @ b)), "flag", "parameters"),
    "binomial": (B, lambda b, x, trials: Binomial(trials, logits=x @ b), "count", "parameters"),
    "poisson": (B, lambda b, x: Poisson((x @ b).exp()), "count", "parameters"),
    "normal": (B_AND_SCALE, lambda b, s, x: Normal(x @ b, s), "real", "parameters"),
    "student": (B_AND_SCALE, lambda b, s, x: StudentT(4.0, x @ b, s), "real", "parameters"),
    "negative_binomial": (B_AND_SCALE, lambda b, s, x: NegativeBinomial(s, logits=x @ b), "count", "parameters"),
    "gamma": (B_AND_SCALE, lambda b, s, x: Gamma(s, s * (x @ b).exp()), "positive", "parameters"),
    "beta": (B_AND_SCALE, lambda b, s, x: Beta(s * (x @ b).exp(), s), "fraction", "vmap"),
    "categorical": (MATRIX, lambda b, x: Categorical(logits=x @ b), "code", "parameters"),
    "categorical_probs": (MATRIX, lambda b, x: Categorical(probs=(x @ b).softmax(-1)), "code", "parameters"),
    "log_normal": (B_AND_SCALE, lambda b, s, x: LogNormal(x @ b, s), "positive", "vmap"),
    "multivariate_normal": (
        B_AND_SCALE,
        lambda b, s, x: MultivariateNormal(x[:, :2] * b[:2], scale_tril=s * torch.eye(2, dtype=x.dtype)),
        "pair",
        "vmap",
    ),
    "independent": (B_AND_SCALE, lambda b, s, x: Independent(Normal(x[:, :2] * b[:2], s), 1), "pair", "vmap"),
    "mixture": (
        B_AND_SCALE,
        lambda b, s, x: MixtureSameFamily(
            Categorical(logits=x[:, :2] * b[2]), Normal(torch.stack([x @ b, -(x @ b)], -1), s)
        ),
        "real",
        "vmap",
    ),
    "gather": (GROUPS, lambda u, group: Normal(u[group], 1.5), "real", "parameters"),
    "gather_counts": (GROUPS, lambda u, group: Poisson(u[group].exp()), "count", "parameters"),
    "scalar_batch": (B_AND_SCALE, lambda b, s: Normal(b[0], s), "real", "parameters"),
    "scalar_batch_gamma": ({"s": HalfNormal(1.0)}, lambda s: Gamma(s, 2.0), "positive", "parameters"),
    "scalar_batch_laplace": (B, lambda b: Laplace(b.sum(), 2.0), "real", "parameters"),
    "without_latents": (B, lambda x: Normal(x[:, 0], 1.0), "real", None),
    "without_anything": (B, lambda: Normal(0.0, 1.0), "real", None),
    "branching": (B_AND_SCALE, lambda b, s, x: Normal(x @ b, s if s > 0.8 else 2 * s), "real", "loop"),
    "own_state": (B, lambda b, x: Shifted(x @ b, 1.0, 0.5), "real", "vmap"),
}


def bound_model(name, **options):
    prior, likelihood, observed, _ = LIKELIHOODS[name]
    return bind_rows(dadvi.Model(prior, likelihood, observed, **options), BATCH)


def bind_rows(model, batch):
    half = len(next(iter(batch.values()))) // 2
    chunks = [(0, {k: v[:half] for k, v in batch.items()}), (half, {k: v[half:] for k, v in batch.items()})]
    return bind(model, {name: values.dtype for name, values in batch.items()}, chunks)


def points(model, num_draws=4):
    noise = np.random.default_rng(1).standard_normal((num_draws, model.dim))
    return model.start + 0.7 * torch.from_numpy(noise)


def by_hand(name, eta, batch):
    """Return ℓ (K, rows) and its gradient over all rows (K, D), one draw at a time, from the user's function alone."""
    prior, likelihood, observed, _ = LIKELIHOODS[name]
    space = dadvi.Model(prior, likelihood, observed).space
    wanted = likelihood.__code__.co_varnames[: likelihood.__code__.co_argcount]
    values, grads = [], []
    for point in eta:
        leaf = point.clone().requires_grad_()
        latents = {key: z[0] for key, z in space.constrain(leaf[None])[0].items()}
        distribution = likelihood(**{key: latents[key] if key in latents else batch[key] for key in wanted})
        log_prob = distribution.log_prob(batch[observed].double())
        (grad,) = torch.autograd.grad(log_prob.sum() + 0 * leaf.sum(), leaf)
        values.append(log_prob.detach())
        grads.append(grad)
    return torch.stack(values), torch.stack(grads)


@pytest.mark.parametrize("num_draws", [1, 4])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_strategy_that_runs_agrees_with_calling_the_function_once_a_draw(name, num_draws):
    bound = bound_model(name)
    expected_strategy = LIKELIHOODS[name][3]
    assert expected_strategy in {bound.strategy, None}
    eta = points(bound.model, num_draws).requires_grad_()
    rows, grad = by_hand(name, eta.detach(), BATCH)
    for strategy in {"loop", bound.strategy}:
        log_lik = replace(bound, strategy=strategy).log_lik(eta, BATCH)
        (seen,) = torch.autograd.grad(log_lik.sum(), eta)
        torch.testing.assert_close(log_lik.detach(), rows.sum(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen, grad, rtol=1e-10, atol=1e-10)
    latents, _ = bound.model.space.constrain(eta)
    torch.testing.assert_close(bound.log_lik_rows(latents, BATCH).detach(), rows, rtol=1e-12, atol=1e-12)


class Sizes(TorchDispatchMode):
    """The most elements that each operation had as output."""

    def __init__(self):
        super().__init__()
        self.most = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            name = func.overloadpacket.__name__
            self.most[name] = max(self.most.get(name, 0), output.numel())
        return output


@pytest.mark.parametrize("num_draws", [1, 4])
def test_functions_of_a_parameter_without_rows_are_taken_once_a_draw(num_draws):
    prior = {**B, "s": HalfNormal(1.0), "df": Gamma(2.0, 0.1)}
    bound = bind_rows(dadvi.Model(prior, lambda b, s, df, x: StudentT(df, x @ b, s), "real"), BATCH)
    eta = points(bound.model, num_draws).requires_grad_()
    with Sizes() as sizes:
        torch.autograd.grad(bound.log_lik(eta, BATCH).sum(), eta)
    assert sizes.most["lgamma"] == sizes.most["digamma"] == num_draws
    assert sizes.most["log1p"] == num_draws * ROWS


@pytest.mark.parametrize("name", ["bernoulli", "gather", "scalar_batch", "mixture", "branching", "without_latents"])
def test_weights_multiply_each_row(name):
    bound = bound_model(name, weight="w")
    eta = points(bound.model)
    rows, _ = by_hand(name, eta, BATCH)
    for strategy in {"loop", bound.strategy}:
        log_lik = replace(bound, strategy=strategy).log_lik(eta, BATCH)
        torch.testing.assert_close(log_lik, (rows * BATCH["w"]).sum(1), rtol=1e-12, atol=1e-12)


def test_integer_weights():
    model = dadvi.Model(B, lambda b, x: Normal(x @ b, 1.0), "real", weight="count")
    eta = points(model)
    expected = (by_hand_normal(eta) * BATCH["count"]).sum(1)
    torch.testing.assert_close(bind_rows(model, BATCH).log_lik(eta, BATCH), expected)


def by_hand_normal(eta):
    return Normal(eta @ BATCH["x"].T, 1.0).log_prob(BATCH["real"])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32])
def test_observed_of_any_dtype(dtype):
    batch = {**BATCH, "flag": BATCH["flag"].to(dtype)}
    model = dadvi.Model(B, lambda b, x: Bernoulli(logits=x @ b), "flag")
    eta = points(model)
    expected, _ = by_hand("bernoulli", eta, BATCH)
    torch.testing.assert_close(bind_rows(model, batch).log_lik(eta, batch), expected.sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("dtypes", "arithmetic"),
    [
        ({"x": torch.float32, "real": torch.float32}, torch.float32),
        ({"x": torch.float64, "real": torch.float32}, torch.float64),
        ({"x": torch.float32, "real": torch.float64}, torch.float64),
        ({"x": torch.float16, "real": torch.float32}, torch.float32),
    ],
)
def test_arithmetic_is_in_the_widest_dtype_of_the_fields_used_and_sums_in_float64(dtypes, arithmetic):
    batch = {**BATCH, **{name: BATCH[name].to(dtype) for name, dtype in dtypes.items()}}
    model = dadvi.Model(B, lambda b, x: Normal(x @ b, 1.0), "real")
    bound = bind_rows(model, batch)
    assert bound.dtype == arithmetic
    assert bound.fields == ("x", "real")  # a field that is not used neither travels nor widens the arithmetic
    eta = points(model)
    latents, _ = model.space.constrain(eta)
    assert bound.log_lik_rows(latents, batch).dtype == arithmetic
    exact = Normal(eta @ batch["x"].double().T, 1.0).log_prob(batch["real"].double()).sum(1)
    value = bound.log_lik(eta, batch)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, exact, rtol=1e-6 if arithmetic == torch.float32 else 1e-13, atol=0)


def test_integers_alone_are_summed_in_float64():
    model = dadvi.Model({"rate": HalfNormal(1.0)}, lambda rate: Poisson(rate), "count")
    assert bind_rows(model, BATCH).dtype == torch.float64


def test_log_likelihood_form_with_a_mixture():
    prior = {
        "p": dadvi.Flat((), constraints.unit_interval),
        "m": dadvi.Constrained(Normal(torch.zeros(2), 3.0), dadvi.ordered),
    }

    def log_likelihood(p, m, real):
        parts = Normal(m, 1.0).log_prob(real[:, None]) + torch.stack([p, 1 - p]).log()
        return torch.logsumexp(parts, -1)

    model = dadvi.Model(prior, log_likelihood=log_likelihood)
    bound = bind_rows(model, BATCH)
    assert bound.strategy == "vmap"
    eta = points(model)
    latents, _ = model.space.constrain(eta)
    for k, value in enumerate(bound.log_lik(eta, BATCH)):
        p, m = latents["p"][k], latents["m"][k]
        density = (
            p * Normal(m[0], 1.0).log_prob(BATCH["real"]).exp()
            + (1 - p) * Normal(m[1], 1.0).log_prob(BATCH["real"]).exp()
        )
        torch.testing.assert_close(value, density.log().sum(), rtol=1e-12, atol=0)


# --- refusals: the model


def refused(model, *parts, batch=None, error=ModelError):
    with pytest.raises(error) as caught:
        bind_rows(model, BATCH if batch is None else batch)
    for part in parts:
        assert part in str(caught.value)


NOT_ADDITIVE = {
    "centred": lambda b, x: Normal((x - x.mean(0)) @ b, 1.0),
    "batch_norm": lambda b, x: Normal(torch.nn.functional.batch_norm(x, None, None, training=True) @ b, 1.0),
    "running_sum": lambda b, x: Normal(x.cumsum(0) @ b, 1.0),
    "mean_over_rows": lambda b, x: Normal(x @ b, float(len(x))),
    "ranks": lambda b, x: Normal(x[:, 0].argsort().argsort() / 10 * b[0], 1.0),
}


@pytest.mark.parametrize("name", NOT_ADDITIVE)
def test_likelihoods_that_mix_rows_are_refused(name):
    refused(dadvi.Model(B, NOT_ADDITIVE[name], "real"), "not additive over rows", "when the data are written")


def test_a_chunk_by_itself_can_show_that_rows_are_mixed():
    # A small data set is one chunk: both halves of the check come from it.
    model = dadvi.Model(B, NOT_ADDITIVE["centred"], "real")
    with pytest.raises(ModelError, match="not additive"):
        bind(model, {name: values.dtype for name, values in BATCH.items()}, [(0, BATCH)])


@pytest.mark.parametrize("observed", ["pair", "x"])
def test_observed_of_another_shape_is_refused(observed):
    refused(dadvi.Model(B, lambda b, x: Normal(x @ b, 1.0), observed), "Shapes", "'x': (15, 3)")


def test_shapes_that_broadcast_into_a_square_are_refused():
    batch = {**BATCH, "real": BATCH["real"][:, None]}
    model = dadvi.Model(B, lambda b, x: Normal(x @ b, 1.0), "real")
    refused(model, "(15, 15)", "(15,)", "squeeze", batch=batch)


def test_unreduced_event_dimensions_are_refused():
    model = dadvi.Model(B, lambda b, x: Normal(x[:, :2] * b[:2], 1.0), "pair")
    refused(model, "(15, 2)", "Independent")


def test_log_likelihoods_that_are_sums_or_numbers_are_refused():
    refused(dadvi.Model(B, log_likelihood=lambda b, x: (x @ b).sum()), "()", "(15,)")
    refused(dadvi.Model(B, log_likelihood=lambda b, x: 3.0), "float")


def test_names_are_refused():
    refused(dadvi.Model(B, lambda b, xx: Normal(xx @ b, 1.0), "real"), "'xx'", "neither a latent (b)", "group")
    refused(dadvi.Model(B, lambda b, x: Normal(x @ b, 1.0), "y"), "observed is 'y'")
    refused(dadvi.Model(B, lambda b, x: Normal(x @ b, 1.0), "real", weight="v"), "weight is 'v'")
    clash = dadvi.Model({"x": Normal(0.0, 1.0)}, lambda x: Normal(x, 1.0), "real")
    refused(clash, "'x' is both a latent and a field")


def test_functions_that_fail_are_refused_with_the_shapes_of_their_arguments():
    model = dadvi.Model(B, lambda b, x: Normal(x @ b[:2], 1.0), "real")
    refused(model, "RuntimeError", "'b': (3,)", "'x': (15, 3)")

    def likelihood(b, x):  # noqa: ARG001
        raise KeyError("no such thing")

    refused(dadvi.Model(B, likelihood, "real"), "KeyError", "no such thing")
    refused(dadvi.Model(B, lambda b, x: x @ b, "real"), "Tensor", "must return a torch distribution")


def test_weights_of_another_shape_or_sign_are_refused():
    model = dadvi.Model(B, lambda b, x: Normal(x @ b, 1.0), "real", weight="w")
    refused(model, "'w'", "(15, 1)", batch={**BATCH, "w": BATCH["w"][:, None]})
    weight = BATCH["w"].clone()
    weight[[20, 21]] = -1.0
    refused(model, "'w' is negative in 2 rows", "row 20", "-1", batch={**BATCH, "w": weight}, error=DataError)


def test_start_without_a_finite_likelihood_is_refused():
    prior = {"b": Normal(torch.full((3,), 400.0), 1.0)}
    refused(dadvi.Model(prior, lambda b, x: Poisson((x**2 @ b).exp()), "count"), "row 2 ", "starting point", "400")


# --- refusals: the data


def test_values_outside_the_support_are_named_with_row_and_count():
    values = BATCH["count"].clone()
    values[[7, 9, 11]] = -3
    model = dadvi.Model(B, lambda b, x: Poisson((x @ b).exp()), "count")
    batch = {**BATCH, "count": values}
    refused(model, "'count'", "3 rows", "Poisson", "row 7 ", "value -3", batch=batch, error=DataError)

    flags = BATCH["flag"].long()
    flags[22] = 2  # in the second chunk
    model = dadvi.Model(B, lambda b, x: Bernoulli(logits=x @ b), "flag")
    refused(model, "1 rows", "row 22 ", batch={**BATCH, "flag": flags}, error=DataError)

    model = dadvi.Model(B, lambda b, x, trials: Binomial(trials, logits=x @ b), "count")
    few = {**BATCH, "trials": BATCH["trials"].clone()}
    few["trials"][4] = 0
    few["count"] = BATCH["count"].clone()
    few["count"][4] = 1
    refused(model, "1 rows", "row 4 ", "Binomial", batch=few, error=DataError)

    model = dadvi.Model(MATRIX, lambda b, x: Categorical(logits=x @ b), "code")
    code = BATCH["code"].clone()
    code[3] = 3
    refused(model, "row 3 ", batch={**BATCH, "code": code}, error=DataError)


@pytest.mark.parametrize(
    ("name", "field", "bad"),
    [("log_normal", "positive", -1.0), ("beta", "fraction", 1.5), ("gamma", "positive", -0.5)],
)
def test_continuous_values_outside_the_support_are_refused(name, field, bad):
    prior, likelihood, observed, _ = LIKELIHOODS[name]
    values = BATCH[field].clone()
    values[5] = bad
    refused(
        dadvi.Model(prior, likelihood, observed),
        f"'{field}'",
        "row 5 ",
        batch={**BATCH, field: values},
        error=DataError,
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["x", "real", "w"])
def test_values_that_are_not_finite_are_named_with_row_and_count(field, bad):
    values = BATCH[field].clone()
    values[17] = bad
    values[20] = bad
    model = dadvi.Model(B, lambda b, x: Normal(x @ b, 1.0), "real", weight="w")
    refused(model, f"'{field}' has 2 rows", "row 17 ", batch={**BATCH, field: values}, error=DataError)


def test_values_that_were_finite_when_written_are_not_looked_at_again_but_what_the_model_asks_of_them_is():
    bound = bind_rows(dadvi.Model(B, lambda b, x: Normal(x @ b, 1.0), "real", weight="w"), BATCH)
    damaged = {**BATCH, "x": torch.full_like(BATCH["x"], float("nan"))}
    with pytest.raises(DataError, match="'x' has"):
        bound.check_rows(damaged, 0)
    bound.check_rows(damaged, 0, finite=True)
    with pytest.raises(DataError, match="'w' is negative"):
        bound.check_rows({**BATCH, "w": -BATCH["w"]}, 0, finite=True)


def test_fields_that_are_not_used_may_hold_anything():
    model = dadvi.Model(B, lambda b, x: Normal(x @ b, 1.0), "real")
    bind_rows(model, {**BATCH, "w": torch.full((ROWS,), float("nan"))})


def test_a_distribution_without_a_support_is_scored_as_it_is():
    class Own(Distribution):
        arg_constraints = {}  # noqa: RUF012

        def __init__(self, loc):
            self.loc = loc
            super().__init__(loc.shape)

        def log_prob(self, value):
            return -((value - self.loc) ** 2)

    model = dadvi.Model(B, lambda b, x: Own(x @ b), "real")
    eta = points(model)
    expected = -((BATCH["real"] - eta @ BATCH["x"].T) ** 2).sum(1)
    torch.testing.assert_close(bind_rows(model, BATCH).log_lik(eta, BATCH), expected)


def test_a_support_that_no_parameter_moves_is_checked_without_calling_the_likelihood():
    calls = []

    def likelihood(b, x):
        calls.append(len(x))
        return Bernoulli(logits=x @ b)

    bound = bind_rows(dadvi.Model(B, likelihood, "flag"), BATCH)
    calls.clear()
    bound.check_rows(BATCH, 0)
    flags = BATCH["flag"].long()
    flags[22] = 2
    with pytest.raises(DataError, match=r"'flag' has 1 rows outside the support of Bernoulli, the first in row 122"):
        bound.check_rows({**BATCH, "flag": flags}, 100)
    assert not calls
    moves = dadvi.Model(B, lambda b, x, trials: Binomial(trials, logits=x @ b), "count")
    assert bind_rows(moves, BATCH).support is None


def test_supports_with_bounds_from_the_latents():
    # Uniform(-s, s) with s about 0.8 at the start: rows beyond have density 0 there
    model = dadvi.Model({"s": HalfNormal(1.0)}, lambda s: Uniform(-s, s), "real")
    refused(model, "outside the support of Uniform", batch=BATCH, error=DataError)


@pytest.mark.parametrize(
    "likelihood",
    [
        lambda b, s, x: Normal(x @ b.detach(), s),
        lambda b, s, x: Normal(x @ torch.tensor(b.tolist(), dtype=x.dtype), s),
    ],
    ids=["detach", "tolist"],
)
def test_a_latent_that_no_gradient_reaches_is_refused(likelihood):
    prior = {**B, "s": HalfNormal(1.0)}
    refused(dadvi.Model(prior, likelihood, "real"), "latent 'b' changes the log-likelihood but no gradient reaches it")


def test_tensors_of_a_dtype_of_their_own_are_refused():
    """Passes over float32 rows would work, and the solve on the subsample, in float64, would not."""
    mix = torch.eye(3)
    model = dadvi.Model(B, lambda b, x: Normal(x @ (mix @ b), 1.0), "real")
    batch = {**BATCH, "x": BATCH["x"].float(), "real": BATCH["real"].float()}
    refused(model, "fails in float64", "x.to(beta.dtype)", batch=batch)


def test_a_distribution_of_the_users_is_never_made_again_from_its_parameters():
    """What else it holds would be lost: here, a floor that only rows elsewhere in the data reach."""

    class Floored(Normal):
        def __init__(self, loc, scale, floor=-1e9, validate_args=None):
            super().__init__(loc, scale, validate_args=validate_args)
            self.floor = floor

        def log_prob(self, value):
            return super().log_prob(value).clamp(min=self.floor)

    model = dadvi.Model(B, lambda b, x: Floored(x @ b, 1.0, floor=-5.0), "real")
    bound = bind(model, {name: values.dtype for name, values in BATCH.items()}, [(0, BATCH)])
    assert bound.strategy != "parameters"
    far = {**BATCH, "real": BATCH["real"] + 100}
    assert bound.log_lik(model.start[None], far).item() == pytest.approx(-5.0 * ROWS)
