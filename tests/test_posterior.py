"""A posterior against closed forms: what it says of the latents, and that it comes back from disk bit by bit."""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr
from scipy import integrate, special, stats
from torch.distributions import constraints

import dadvi
from dadvi.errors import DataError, InputError
from dadvi.families import Arrow, FullRank, Gaussian, LowRank, MeanField
from dadvi.posterior import SUMMARY_DRAWS, Posterior, TraceRow
from dadvi.quadratic import Certificate, Curvature
from dadvi.structure import Structure
from dadvi.supports import ordered
from dadvi.transforms import LatentSpace

SUPPORTS = {
    "scalar": ((), constraints.real),
    "vector": ((3,), constraints.real),
    "matrix": ((2, 2), constraints.real),
    "positive": ((2,), constraints.positive),
    "above": ((), constraints.greater_than(1.5)),
    "below": ((2,), constraints.less_than(torch.tensor([3.0, -1.0]))),
    "between": ((), constraints.interval(2.0, 5.0)),
    "unit": ((2,), constraints.unit_interval),
    "simplex": ((4,), constraints.simplex),
    "increasing": ((3,), ordered),
    "corr": ((3, 3), constraints.corr_cholesky),
    "chol": ((2, 2), constraints.lower_cholesky),
    "spd": ((2, 2), constraints.positive_definite),
    "independent": ((2, 3), constraints.independent(constraints.positive, 1)),
}


def gaussian(family, dim, seed=0, sd=0.5):
    rng = np.random.default_rng(seed)
    params = {"loc": rng.normal(0.0, 0.7, dim), "log_scale": rng.normal(np.log(sd), 0.2, dim)}
    if isinstance(family, FullRank):
        params["lower"] = np.tril(rng.normal(0.0, 0.1, (dim, dim)), -1)
    if isinstance(family, LowRank):
        params["factor"] = rng.normal(0.0, 0.2, (dim, family.rank))
    return Gaussian(family, {name: torch.from_numpy(value) for name, value in params.items()})


def posterior_of(latents, unconstrained=None, family=None, **changes):
    space = LatentSpace.of(latents)
    settings = {
        "space": space,
        "unconstrained": unconstrained or gaussian(family or MeanField(), space.size),
        "status": "converged",
        "reason": "the certificate is within tol=0.1",
        "elbo": -12.25,
        "passes": 7.5,
        "certificate": Certificate(0.05, 0.02, 0.01),
    }
    return Posterior(**{**settings, **changes})


def scalar(support, loc, sd, shape=()):
    """A posterior of one latent whose coordinates are N(loc, sd²)."""
    size = math.prod(shape)
    q = {
        name: torch.full((size,), value, dtype=torch.float64)
        for name, value in (("loc", loc), ("log_scale", math.log(sd)))
    }
    return posterior_of({"z": (shape, support)}, Gaussian(MeanField(), q))


# What it says of the latents -------------------------------------------------------------------------------------


def test_summary_of_a_real_latent_is_the_normals():
    row = scalar(constraints.real, 1.25, 0.4).summary(quantiles=(0.025, 0.5, 0.9)).loc["z"]
    assert list(row.index) == ["mean", "sd", "2.5%", "50%", "90%"]
    expected = stats.norm(1.25, 0.4)
    np.testing.assert_allclose(row, [1.25, 0.4, *expected.ppf([0.025, 0.5, 0.9])], rtol=1e-7)


@pytest.mark.parametrize("sd", [0.01, 0.5, 1.5])
@pytest.mark.parametrize("lower", [0.0, -3.0])
def test_summary_of_a_positive_latent_is_the_log_normals(sd, lower):
    row = scalar(constraints.greater_than(lower), 0.3, sd).summary().loc["z"]
    expected = stats.lognorm(s=sd, scale=math.exp(0.3))
    assert row["mean"] == pytest.approx(lower + expected.mean(), rel=1e-10)
    assert row["sd"] == pytest.approx(expected.std(), rel=1e-9)
    np.testing.assert_allclose(row[["5%", "50%", "95%"]], lower + expected.ppf([0.05, 0.5, 0.95]), rtol=1e-7)


def test_summary_of_a_latent_below_a_bound():
    # z = 3 - exp(η) falls as η rises: its 5 % quantile comes from the 95 % quantile of η.
    row = scalar(constraints.less_than(3.0), 0.3, 0.5).summary(quantiles=(0.05, 0.3, 0.95)).loc["z"]
    expected = stats.lognorm(s=0.5, scale=math.exp(0.3))
    assert row["mean"] == pytest.approx(3 - expected.mean(), rel=1e-10)
    assert row["sd"] == pytest.approx(expected.std(), rel=1e-9)
    np.testing.assert_allclose(row[["5%", "30%", "95%"]], 3 - expected.ppf([0.95, 0.7, 0.05]), rtol=1e-7)


@pytest.mark.parametrize("sd", [0.3, 1.0, 2.0])
def test_summary_of_a_latent_between_bounds(sd):
    # z = 2 + 3 sigmoid(η); the mean and sd by adaptive quadrature.
    row = scalar(constraints.interval(2.0, 5.0), -0.4, sd).summary().loc["z"]
    eta = stats.norm(-0.4, sd)

    def moment(power):
        return integrate.quad(lambda e: (2 + 3 * special.expit(e)) ** power * eta.pdf(e), -25, 25, epsabs=1e-13)[0]

    assert row["mean"] == pytest.approx(moment(1), rel=1e-6)
    assert row["sd"] == pytest.approx(math.sqrt(moment(2) - moment(1) ** 2), rel=1e-4)
    np.testing.assert_allclose(row[["5%", "50%", "95%"]], 2 + 3 * special.expit(eta.ppf([0.05, 0.5, 0.95])), rtol=1e-7)


def test_summary_has_a_row_for_each_scalar_and_its_own_marginal():
    posterior = posterior_of({"a": ((), constraints.real), "b": ((2, 2), constraints.positive)}, family=FullRank())
    summary = posterior.summary(quantiles=(0.5,))
    assert list(summary.index) == ["a", "b[0, 0]", "b[0, 1]", "b[1, 0]", "b[1, 1]"]
    q = posterior.unconstrained
    np.testing.assert_allclose(summary["50%"], [q.loc[0], *q.loc[1:].exp()], rtol=1e-10)
    variance = q.covariance_matrix.diagonal()[1:]
    np.testing.assert_allclose(summary["mean"][1:], (q.loc[1:] + variance / 2).exp(), rtol=1e-10)


def test_summary_of_a_simplex_is_that_of_draws():
    # Two parts: the first is a sigmoid of a normal, the second is the rest.
    posterior = posterior_of({"p": ((2,), constraints.simplex)})
    loc, sd = float(posterior.unconstrained.loc), float(posterior.unconstrained.stddev)
    first = special.expit(loc + sd * np.random.default_rng(0).standard_normal(1_000_000))
    summary = posterior.summary()
    assert list(summary.index) == ["p[0]", "p[1]"]
    error = first.std() / math.sqrt(SUMMARY_DRAWS)
    # Which part is the sigmoid depends on the transform; the two means add up to 1 either way.
    assert min(abs(summary["mean"] - first.mean())) < 4 * error
    assert summary["mean"].sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(summary["sd"], first.std(), rtol=4 / math.sqrt(2 * SUMMARY_DRAWS))


def test_summary_of_an_ordered_latent_is_that_of_draws():
    # z = (η_1, η_1 + exp η_2)
    posterior = posterior_of({"c": ((2,), ordered)})
    (m1, m2), (s1, s2) = posterior.unconstrained.loc.tolist(), posterior.unconstrained.stddev.tolist()
    gap = stats.lognorm(s=s2, scale=math.exp(m2))
    means, sds = np.array([m1, m1 + gap.mean()]), np.array([s1, math.hypot(s1, gap.std())])
    summary = posterior.summary()
    assert (abs(summary["mean"] - means) < 4 * sds / math.sqrt(SUMMARY_DRAWS)).all()
    np.testing.assert_allclose(summary["sd"], sds, rtol=0.05)  # a log-normal's fourth moment makes this noisier
    assert summary["5%"].iloc[0] == pytest.approx(m1 - 1.645 * s1, abs=4 * s1 * 2.1 / math.sqrt(SUMMARY_DRAWS))


def test_quantiles_are_strictly_between_0_and_1():
    for quantiles in [(0.0, 0.5), (0.5, 1.0), (1.5,)]:
        with pytest.raises(InputError, match="strictly between 0 and 1"):
            scalar(constraints.real, 0.0, 1.0).summary(quantiles)


@pytest.mark.parametrize("family", [MeanField(), FullRank(), LowRank(rank=2)], ids=lambda family: family.name)
def test_samples_have_the_moments_of_q_and_lie_in_the_supports(family):
    posterior = posterior_of(SUPPORTS, family=family)
    num_draws = 4_000
    latents = posterior.sample(num_draws, seed=1)
    assert list(latents) == list(SUPPORTS)
    for site in posterior.space.sites:
        z = latents[site.name]
        assert z.shape == (num_draws, *site.shape)
        assert z.dtype == torch.float64
        assert bool(site.support.check(z).all())
    q = posterior.unconstrained
    eta = posterior.space.unconstrain(latents)
    assert ((eta.mean(0) - q.loc).abs() < 4.5 * q.stddev / math.sqrt(num_draws)).all()
    correlation = q.covariance_matrix / q.stddev[:, None] / q.stddev
    error = ((1 - correlation.square()) / math.sqrt(num_draws)).clamp(min=1e-6)
    assert ((torch.corrcoef(eta.T) - correlation).abs() < 5 * error).all()


def test_samples_are_a_function_of_the_seed():
    posterior = posterior_of(SUPPORTS)
    first, again, other = (posterior.sample(5, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in SUPPORTS)
    assert not any(torch.equal(first[name], other[name]) for name in SUPPORTS)
    assert torch.equal(posterior.sample(5)["scalar"], first["scalar"])
    with pytest.raises(InputError, match="num_draws=0"):
        posterior.sample(0)


def test_names_tell_the_latent_of_every_coordinate():
    posterior = posterior_of(
        {"a": ((), constraints.positive), "b": ((2, 2), constraints.real), "p": ((3,), constraints.simplex)}
    )
    assert posterior.names == ("a", "b[0, 0]", "b[0, 1]", "b[1, 0]", "b[1, 1]", "p[0]", "p[1]")
    assert len(posterior.names) == posterior.unconstrained.dim


def test_labels_come_from_categories_and_columns():
    latents = {"effect": ((2, 3), constraints.real), "p": ((3,), constraints.simplex)}
    color = ("color", ("red", "green", "blue"))
    coords = {"effect": (("size", ("S", "L")), color), "p": (color,)}
    posterior = posterior_of(latents, coords=coords)
    assert posterior.names[:4] == ("effect[S, red]", "effect[S, green]", "effect[S, blue]", "effect[L, red]")
    assert posterior.names[6:] == ("p[0]", "p[1]")  # coordinates of a simplex are not its elements
    assert list(posterior.summary().index[6:]) == ["p[red]", "p[green]", "p[blue]"]


# On disk ---------------------------------------------------------------------------------------------------------

RECORDS = (
    TraceRow("epochs", 20, 1.5, 1500, 0.25, -20.125, rhat=1.5, mcse=0.1),
    TraceRow("certificate", 20, 2.5, 2500, 0.5, -19.0, certificate=0.05),
)


def full_posterior(family):
    return posterior_of(
        SUPPORTS,
        family=family,
        certificate=Certificate(0.05, 0.02, math.nan if isinstance(family, LowRank) else 0.01),
        records=RECORDS,
        coords={"vector": (("carrier", ("AA", "B6", "Ünïted")),)},
        settings={"seed": 3, "tol": 0.1, "max_passes": None, "method": {"name": "ADVI"}},
    )


def assert_same(a, b):
    assert [(s.name, s.shape, s.offset, repr(s.support)) for s in a.space.sites] == [
        (s.name, s.shape, s.offset, repr(s.support)) for s in b.space.sites
    ]
    assert a.unconstrained.family == b.unconstrained.family
    assert set(a.unconstrained.params) == set(b.unconstrained.params)
    for name, value in a.unconstrained.params.items():
        assert value.dtype == b.unconstrained.params[name].dtype == torch.float64
        assert torch.equal(value, b.unconstrained.params[name])
    assert (a.status, a.reason, a.elbo, a.passes) == (b.status, b.reason, b.elbo, b.passes)
    assert repr((a.certificate, a.records)) == repr((b.certificate, b.records))  # nan is not equal to itself
    assert (a.coords, a.settings, a.names) == (b.coords, b.settings, b.names)
    for name, value in a.sample(50, seed=4).items():
        assert torch.equal(value, b.sample(50, seed=4)[name])


@pytest.mark.parametrize("family", [MeanField(), FullRank(), LowRank(rank=2)], ids=lambda family: family.name)
def test_a_saved_posterior_comes_back_bit_by_bit(family, tmp_path):
    posterior = full_posterior(family)
    posterior.save(tmp_path / "p.zarr")
    loaded = dadvi.load_posterior(tmp_path / "p.zarr")
    assert_same(posterior, loaded)
    np.testing.assert_array_equal(posterior.summary(), loaded.summary())
    pd.testing.assert_frame_equal(posterior.trace, loaded.trace, check_exact=True)


CURVATURES = ["full", "diagonal", "grouped", "columns"]


def curvature_of(kind, dim, definite=True):
    rng = np.random.default_rng(5)
    structure = {
        "full": Structure.full(dim),
        "diagonal": Structure.diagonal(dim),
        "grouped": Structure.grouped(dim, [torch.arange(3, dim - 2)], rng),
        "columns": Structure.grouped(dim, list(torch.arange(2, 2 + 2 * ((dim - 3) // 2)).reshape(2, -1)), rng),
    }[kind]
    root = torch.from_numpy(rng.standard_normal((dim, dim)))
    matrix = root @ root.T + 4 * dim * torch.eye(dim) if definite else root + root.T
    units = torch.from_numpy(rng.uniform(0.1, 10, dim))
    return Curvature.of(structure.from_matrix(matrix * (units[:, None] * units)))


def tensors_of(curvature):
    precision, factor = curvature.precision, curvature.factor
    return {
        **{name: getattr(precision.structure, name) for name in ("dense", "groups")},
        **{name: getattr(precision, name) for name in ("corner", "cross", "blocks")},
        **{f"root {name}": getattr(factor, name) for name in ("dense", "groups", "coupling")},
    }


@pytest.mark.parametrize("kind", CURVATURES)
def test_the_curvature_of_a_saved_posterior_comes_back_bit_by_bit(tmp_path, kind):
    dim = LatentSpace.of(SUPPORTS).size
    posterior = posterior_of(SUPPORTS, curvature=curvature_of(kind, dim))
    posterior.save(tmp_path / "p.zarr")
    loaded = dadvi.load_posterior(tmp_path / "p.zarr")
    assert_same(posterior, loaded)
    kept, found = tensors_of(posterior.curvature), tensors_of(loaded.curvature)
    for name, value in kept.items():
        assert value.dtype == found[name].dtype
        assert torch.equal(value, found[name]), name
    assert loaded.curvature.flat == posterior.curvature.flat


@pytest.mark.parametrize("kind", CURVATURES)
def test_the_curvature_of_a_saved_posterior_comes_back_to_the_last_digits(tmp_path, kind):
    dim = LatentSpace.of(SUPPORTS).size
    for definite in (True, False):
        posterior = posterior_of(SUPPORTS, curvature=curvature_of(kind, dim, definite))
        posterior.save(tmp_path / "p.zarr", overwrite=True)
        loaded = dadvi.load_posterior(tmp_path / "p.zarr")
        a, b = posterior.curvature, loaded.curvature
        torch.testing.assert_close(a.precision.matrix(), b.precision.matrix(), rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(a.stddev, b.stddev, rtol=1e-9, atol=0)
        torch.testing.assert_close(a.factor.log_det(), b.factor.log_det(), rtol=1e-10, atol=0)


def test_a_posterior_without_a_curvature_comes_back_without(tmp_path):
    posterior = posterior_of(SUPPORTS)
    assert posterior.curvature is None
    posterior.save(tmp_path / "p.zarr")
    assert dadvi.load_posterior(tmp_path / "p.zarr").curvature is None
    assert set(dadvi.load_posterior(tmp_path / "p.zarr").unconstrained.params) == {"loc", "log_scale"}


@pytest.mark.parametrize("kind", CURVATURES)
def test_an_arrow_comes_back_bit_by_bit(tmp_path, kind):
    space = LatentSpace.of(SUPPORTS)
    loc = gaussian(MeanField(), space.size).loc
    posterior = posterior_of(SUPPORTS, unconstrained=Arrow.member(loc, curvature_of(kind, space.size).factor))
    posterior.save(tmp_path / "p.zarr")
    loaded = dadvi.load_posterior(tmp_path / "p.zarr")
    assert loaded.unconstrained.family == Arrow()
    for name, value in posterior.unconstrained.params.items():
        assert value.dtype == loaded.unconstrained.params[name].dtype
        assert torch.equal(value, loaded.unconstrained.params[name])
    for name, value in posterior.sample(50, seed=4).items():
        assert torch.equal(value, loaded.sample(50, seed=4)[name])
    np.testing.assert_array_equal(posterior.summary(), loaded.summary())


def test_a_changed_curvature_is_refused(tmp_path):
    dim = LatentSpace.of(SUPPORTS).size
    posterior_of(SUPPORTS, curvature=curvature_of("grouped", dim)).save(tmp_path / "p.zarr")
    group = zarr.open_group(tmp_path / "p.zarr", mode="r+")
    group["curvature.blocks"][0] = group["curvature.blocks"][0] * 1.5
    with pytest.raises(DataError, match="has changed"):
        dadvi.load_posterior(tmp_path / "p.zarr")


def test_what_a_fit_without_an_end_leaves_is_saved_too(tmp_path):
    # A run that diverges before its first epoch has ended has no ELBO and no certificate.
    posterior = posterior_of({"z": ((), constraints.real)}, status="diverged", elbo=-math.inf, certificate=None)
    posterior.save(tmp_path / "p.zarr")
    assert_same(posterior, dadvi.load_posterior(str(tmp_path / "p.zarr")))


def files_under(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_nothing_stored_is_code(tmp_path):
    full_posterior(LowRank(rank=2)).save(tmp_path / "p.zarr")
    files = files_under(tmp_path / "p.zarr")
    assert len(files) > 3
    for file in files:
        content = file.read_bytes()
        if file.name == "zarr.json":
            json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert b"pickle" not in content
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


def test_a_damaged_byte_is_never_another_posterior(tmp_path):
    posterior = posterior_of({"z": ((3,), constraints.positive)}, family=FullRank(), records=RECORDS)
    posterior.save(tmp_path / "p.zarr")
    for file in files_under(tmp_path / "p.zarr"):
        content = bytearray(file.read_bytes())
        refused = 0
        positions = range(0, len(content), max(1, len(content) // 40))
        for at in positions:
            damaged = content.copy()
            damaged[at] ^= 0x01
            file.write_bytes(damaged)
            try:
                loaded = dadvi.load_posterior(tmp_path / "p.zarr")
            except DataError:
                refused += 1
            else:  # a space, or metadata that nothing depends on
                assert file.name == "zarr.json"
                assert_same(posterior, loaded)
        file.write_bytes(content)
        assert refused == len(positions) if file.name != "zarr.json" else refused > 0
    assert_same(posterior, dadvi.load_posterior(tmp_path / "p.zarr"))


def test_a_number_that_damage_made_infinite_is_refused(tmp_path):
    posterior_of({"z": ((), constraints.real)}, elbo=-1e300).save(tmp_path / "p.zarr")
    file = tmp_path / "p.zarr" / "zarr.json"
    content = file.read_bytes()
    assert content.count(b"-1e+300") == 1
    file.write_bytes(content.replace(b"-1e+300", b"-1e+380"))  # one bit, and JSON that is read as -inf
    with pytest.raises(DataError, match=r"p\.zarr"):
        dadvi.load_posterior(tmp_path / "p.zarr")


@pytest.mark.parametrize("part", ["loc", "log_scale", "zarr.json"])
def test_a_missing_part_is_refused(tmp_path, part):
    posterior_of({"z": ((3,), constraints.positive)}).save(tmp_path / "p.zarr")
    (tmp_path / "p.zarr" / part).rename(tmp_path / "elsewhere")
    with pytest.raises(DataError):
        dadvi.load_posterior(tmp_path / "p.zarr")


def test_what_is_no_posterior_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is nothing at .*nothing\.zarr"):
        dadvi.load_posterior(tmp_path / "nothing.zarr")
    dadvi.write_shards(tmp_path / "data.zarr", {"x": np.zeros(4)})
    with pytest.raises(DataError, match=r"data\.zarr is a data set, not a posterior"):
        dadvi.load_posterior(tmp_path / "data.zarr")


def test_a_later_format_is_refused_with_the_remedy(tmp_path):
    posterior_of({"z": ((), constraints.real)}).save(tmp_path / "p.zarr")
    file = tmp_path / "p.zarr" / "zarr.json"
    document = json.loads(file.read_text())
    document["attributes"]["dadvi_posterior"]["document"]["format"] = 99
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"format 99.*upgrade"):
        dadvi.load_posterior(tmp_path / "p.zarr")


def test_what_exists_is_replaced_only_on_demand(tmp_path):
    first, second = (posterior_of({"z": ((), constraints.real)}, passes=passes) for passes in (1.0, 2.0))
    path = tmp_path / "p.zarr"
    first.save(path)
    with pytest.raises(DataError, match="exists"):
        second.save(path)
    assert dadvi.load_posterior(path).passes == 1.0
    second.save(path, overwrite=True)
    assert dadvi.load_posterior(path).passes == 2.0
    assert [file.name for file in tmp_path.iterdir()] == ["p.zarr"]  # nothing half-written is left
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    with pytest.raises(DataError, match="nothing that dadvi wrote"):
        first.save(foreign, overwrite=True)
    assert (foreign / "chapter.txt").read_text() == "years of work"


# For ArviZ -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def az():
    with warnings.catch_warnings():
        # ArviZ 0.x announces its successor whenever it is imported; there is nothing to do about it here.
        warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
        return pytest.importorskip("arviz")


@pytest.fixture(scope="module")
def labelled():
    latents = {
        "tau": ((), constraints.positive),
        "effect": ((2, 3), constraints.real),
        "p": ((3,), constraints.simplex),
        "empty_label": ((2,), constraints.real),
    }
    coords = {"effect": (("size", ("S", "L")), ("color", ("red", "green", "blue")))}
    return posterior_of(latents, family=FullRank(), coords=coords)


def test_datatree_holds_the_draws_with_their_labels(labelled):
    tree = labelled.to_datatree(num_draws=200, seed=3)
    assert isinstance(tree, xr.DataTree)
    draws = labelled.sample(200, seed=3)
    group = tree["posterior"].dataset
    for name, value in draws.items():
        assert group[name].dims[:2] == ("chain", "draw")
        np.testing.assert_array_equal(group[name].values[0], value.numpy())
    assert group["effect"].dims == ("chain", "draw", "size", "color")
    assert list(group["color"].values) == ["red", "green", "blue"]
    assert group["p"].dims[2:] == ("p_dim_0",)
    np.testing.assert_array_equal(
        group["effect"].sel(size="L", color="green").values[0], draws["effect"][:, 1, 1].numpy()
    )
    attributes = group.attrs
    assert (attributes["inference_library"], attributes["family"]) == ("dadvi", "full_rank")
    assert (attributes["status"], attributes["elbo"], attributes["passes"]) == ("converged", -12.25, 7.5)
    assert attributes["certificate_max"] == 0.05
    eta = labelled.space.unconstrain(draws)
    log_q = tree["sample_stats"]["log_q"].values[0]
    np.testing.assert_allclose(log_q, labelled.unconstrained.log_prob(eta), rtol=1e-6)


def test_arviz_reads_the_datatree(labelled, az):
    tree = labelled.to_datatree(num_draws=4_000)
    read = az.from_datatree(tree) if hasattr(az, "from_datatree") else tree
    table = az.summary(read, kind="stats", round_to="none")
    summary = labelled.summary()
    assert set(table.index) == set(summary.index)
    error = summary["sd"] / math.sqrt(4_000)
    assert (abs(table["mean"][summary.index] - summary["mean"]) < 4.5 * error).all()
    np.testing.assert_allclose(table["sd"][summary.index], summary["sd"], rtol=0.15)


def test_a_datatree_goes_to_netcdf_and_back(labelled, tmp_path):
    pytest.importorskip("h5netcdf")
    tree = labelled.to_datatree(num_draws=10)
    tree.to_netcdf(tmp_path / "p.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "p.nc", engine="h5netcdf") as back:
        xr.testing.assert_identical(back["posterior"].to_dataset(), tree["posterior"].to_dataset())
