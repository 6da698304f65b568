"""Finding groups: which models have them, which coordinates stay dense, and when there is no structure to be found."""

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, HalfNormal, MultivariateNormal, Normal

import dadvi
from dadvi import probing
from dadvi.binding import bind_to
from dadvi.passes import HessianVector
from dadvi.probing import find_structure
from dadvi.quadratic import prior_hessian, prior_products
from dadvi.quadrature import Rule
from dadvi.structure import Structure
from dadvi.subsample import Subsample

J, L, ROWS = 30, 20, 400


def fields(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "g": rng.integers(0, J, ROWS),
        "h": rng.integers(0, L, ROWS),
        "also": rng.integers(0, J, ROWS),
        "x": rng.standard_normal((ROWS, 3)),
        "t": rng.standard_normal(ROWS),
        "y": rng.integers(0, 2, ROWS),
        "late": 1.0 * (np.arange(ROWS) % 100 >= 20),  # in its chunk
    }


@pytest.fixture
def find(write):
    """Return a function that gives a model's structure, its subsample and the places of its latents."""
    data = write(fields(), chunk_rows=100)

    def structure_of(model, seed=0):
        subsample = Subsample.load(bind_to(model, data), data, range(data.manifest.num_chunks))
        at = {site.name: torch.arange(site.offset, site.offset + site.size) for site in model.space.sites}
        return find_structure(subsample, seed), subsample, at

    return structure_of


def centred(num_groups=J):
    return dadvi.Model(
        prior={
            "mu": Normal(torch.tensor(0.0), 2.0),
            "tau": HalfNormal(torch.tensor(1.0)),
            "effect": lambda mu, tau: Normal(mu, tau).expand([num_groups]),
            "beta": Normal(torch.zeros(3), 2.0),
        },
        likelihood=lambda effect, beta, g, x: Bernoulli(logits=effect[g] + x @ beta),
        observed="y",
    )


def non_centred():
    return dadvi.Model(
        prior={
            "beta": Normal(torch.zeros(3), 2.0),
            "tau": HalfNormal(torch.tensor(1.0)),
            "raw": Normal(torch.zeros(J), 1.0),
        },
        likelihood=lambda beta, tau, raw, g, x: Bernoulli(logits=tau * raw[g] + x @ beta),
        observed="y",
    )


def regression(dim=3):
    return dadvi.Model(
        prior={"beta": Normal(torch.zeros(dim), 2.0)},
        likelihood=lambda beta, x: Bernoulli(logits=x @ beta[:3] + 0.1 * beta.sum() ** 2),
        observed="y",
    )


def assert_right(structure, subsample, seed=5):
    """The Hessians of likelihood and prior are what the structure holds of them, at a point it was not found at."""
    model = subsample.model.model
    dim = model.dim
    point = Rule.equal(0.5 * torch.from_numpy(np.random.default_rng(seed).standard_normal((1, dim))))
    of_data = torch.from_numpy(subsample.run(HessianVector(point.nodes.numpy(), np.eye(dim))).products)
    of_prior = prior_products(model, point, np.eye(dim))
    for matrix in (of_data, of_prior):
        torch.testing.assert_close(structure.from_matrix(matrix).matrix(), matrix, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prior_hessian(model, point, structure).matrix(), of_prior, rtol=1e-9, atol=1e-9)


# Groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_effects_of_a_centred_hierarchy_are_groups_and_the_rest_is_dense(find, seed):
    structure, subsample, at = find(centred(), seed)
    assert structure.groups.tolist() == at["effect"][:, None].tolist()
    assert structure.dense.tolist() == torch.cat([at["mu"], at["tau"], at["beta"]]).tolist()
    # The prior lets mu and tau curve with the effects, and slopes by themselves.
    assert structure.hubs.tolist() == [True, True, False, False, False]
    assert_right(structure, subsample)


def test_effects_of_a_non_centred_hierarchy_are_groups(find):
    structure, subsample, at = find(non_centred())
    assert structure.groups.tolist() == at["raw"][:, None].tolist()
    assert structure.dense.tolist() == torch.cat([at["beta"], at["tau"]]).tolist()
    assert structure.hubs.tolist() == [False] * 4  # the prior has them all apart
    assert_right(structure, subsample)


def test_two_latents_of_the_same_groups_join(find):
    model = dadvi.Model(
        prior={
            "tau": HalfNormal(torch.tensor(1.0)),
            "slope": lambda tau: Normal(torch.zeros(J), tau),
            "effect": Normal(torch.zeros(J), 1.0),
        },
        likelihood=lambda slope, effect, g, t: Bernoulli(logits=effect[g] + slope[g] * t),
        observed="y",
    )
    structure, subsample, at = find(model)
    assert structure.groups.shape == (J, 2)
    assert {tuple(column.tolist()) for column in structure.groups.T} == {
        tuple(at["slope"].tolist()),
        tuple(at["effect"].tolist()),
    }
    assert structure.dense.tolist() == at["tau"].tolist()
    assert structure.hubs.tolist() == [True]
    assert_right(structure, subsample)


def test_effects_that_curve_together_in_late_rows_alone_are_no_groups(find, monkeypatch):
    monkeypatch.setattr(probing, "FEW_ROWS", 20)
    model = dadvi.Model(
        prior={"effect": Normal(torch.zeros(J), 1.0)},
        likelihood=lambda effect, g, also, late: Bernoulli(logits=effect[g] + late * effect[also]),
        observed="y",
    )
    structure, subsample, _ = find(model)
    assert structure.groups.numel() == 0
    assert_right(structure, subsample)


def test_what_few_rows_show_to_be_no_groups_is_not_looked_for_in_more(find, monkeypatch):
    monkeypatch.setattr(probing, "FEW_ROWS", 20)
    asked, run = [], Subsample.run
    monkeypatch.setattr(Subsample, "run", lambda self, work: (asked.append(self.num_rows), run(self, work))[1])
    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(J), 1.0)},
        likelihood=lambda beta, t: Bernoulli(logits=t * beta.sum()),
        observed="y",
    )
    assert find(model)[0].groups.numel() == 0
    assert set(asked) == {4 * 20}


@pytest.mark.parametrize("rows_first", [True, False])
def test_random_slopes_in_one_latent_are_columns_of_its_groups(find, rows_first):
    # (J, 2) or (2, J), with correlated effects and slopes of the same group.
    shape = (J, 2) if rows_first else (2, J)
    model = dadvi.Model(
        prior={"u": Normal(torch.zeros(shape), 1.0)},
        likelihood=lambda u, g, t: Bernoulli(
            logits=(u if rows_first else u.T)[g, 0] + (u if rows_first else u.T)[g, 1] * t
        ),
        observed="y",
    )
    structure, subsample, at = find(model)
    expected = at["u"].reshape(shape)
    assert structure.groups.tolist() == (expected if rows_first else expected.T).tolist()
    assert structure.dense.numel() == 0
    assert_right(structure, subsample)


def test_of_crossed_groupings_the_larger_is_grouped_and_the_smaller_dense(find):
    model = dadvi.Model(
        prior={
            "tau": HalfNormal(torch.tensor(1.0)),
            "few": lambda tau: Normal(torch.zeros(L), tau),
            "many": Normal(torch.zeros(J), 1.0),
        },
        likelihood=lambda few, many, g, h: Bernoulli(logits=few[h] + many[g]),
        observed="y",
    )
    structure, subsample, at = find(model)
    assert structure.groups.tolist() == at["many"][:, None].tolist()
    assert structure.dense.tolist() == sorted([*at["few"].tolist(), *at["tau"].tolist()])
    assert structure.dense[structure.hubs].tolist() == at["tau"].tolist()  # effects curve with their scale alone
    assert_right(structure, subsample)


@pytest.mark.parametrize("seed", range(5))
def test_of_two_crossed_groupings_of_as_many_groups_one_is_dense(find, seed):
    model = dadvi.Model(
        prior={"a": Normal(torch.zeros(J), 1.0), "b": Normal(torch.zeros(J), 1.0)},
        likelihood=lambda a, b, g, also: Bernoulli(logits=a[g] + b[also]),
        observed="y",
    )
    structure, subsample, at = find(model, seed)
    assert structure.groups.tolist() == at["a"][:, None].tolist()
    assert structure.dense.tolist() == at["b"].tolist()
    assert not structure.hubs.any()
    assert_right(structure, subsample)


# None --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_slopes_of_a_regression_are_dense(find, seed):
    structure, subsample, _ = find(regression(40), seed)
    assert structure.groups.numel() == 0
    assert structure.dense.tolist() == list(range(40))
    assert not structure.hubs.any()
    assert_right(structure, subsample)


@pytest.mark.parametrize("seed", range(5))
def test_effects_that_the_prior_correlates_are_dense(find, seed):
    # The likelihood has them apart, as effects of groups; a Gaussian process has not.
    place = torch.linspace(0, 1, J).double()
    covariance = torch.exp(-8 * (place[:, None] - place).abs()) + 0.01 * torch.eye(J)
    model = dadvi.Model(
        prior={"curve": MultivariateNormal(torch.zeros(J).double(), covariance)},
        likelihood=lambda curve, g: Bernoulli(logits=curve[g]),
        observed="y",
    )
    structure, subsample, _ = find(model, seed)
    assert structure.groups.numel() == 0
    assert int((~structure.hubs).sum()) == 1  # the last one has nothing left to curve with
    assert_right(structure, subsample)


def test_two_neighbours_alone_that_the_likelihood_couples_make_all_of_them_dense(find):
    # One product of effects in one row of 400.
    largest = float(fields()["t"].max())

    def rows(effect, g, t):
        return -0.5 * (effect[g] - t) ** 2 + torch.where(t >= largest, effect[3] * effect[7], torch.zeros_like(t))

    model = dadvi.Model(prior={"effect": Normal(torch.zeros(J), 1.0)}, log_likelihood=rows)
    for seed in range(5):
        # Two probes agree by chance if the product of the two signs is the same in both: half of the time.
        structure, _, _ = find(model, seed)
        if structure.groups.numel() == 0:
            break
    else:
        raise AssertionError("five pairs of probes have not seen it")


def test_fewer_groups_than_are_worth_probing_are_dense(find, monkeypatch):
    model = centred()
    monkeypatch.setattr(probing, "FEWEST_GROUPS", J + 1)
    structure, subsample, _ = find(model)
    assert structure.groups.numel() == 0
    assert structure.dense.tolist() == list(range(J + 5))
    assert structure.hubs.tolist() == [True, True, *[False] * J, False, False, False]
    assert_right(structure, subsample)
    monkeypatch.setattr(probing, "FEWEST_GROUPS", J)
    assert find(model)[0].groups.shape == (J, 1)


def test_beyond_the_limit_there_is_none_without_groups(find, monkeypatch):
    monkeypatch.setattr(probing, "DENSE_LIMIT", 10)
    assert find(regression(10))[0].num_tangents == 10
    assert find(regression(11))[0] is None
    structure, _, _ = find(centred())  # 35 coordinates, 5 of them dense
    assert (len(structure.dense), structure.groups.shape) == (5, (J, 1))
    monkeypatch.setattr(probing, "DENSE_LIMIT", 4)
    assert find(centred())[0] is None


def test_what_the_dense_share_with_the_groups_has_to_be_held(find, monkeypatch):
    monkeypatch.setattr(probing, "LARGEST_CROSS", 5 * 35)
    assert find(centred())[0] is not None
    monkeypatch.setattr(probing, "LARGEST_CROSS", 5 * 35 - 1)
    assert find(centred())[0] is None


def test_a_structure_is_a_function_of_the_seed(find):
    first, again, other = (find(centred(), seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first.signs, again.signs)
    assert not torch.equal(first.signs, other.signs)
    assert torch.equal(first.groups, other.groups)
    assert isinstance(first, Structure)
