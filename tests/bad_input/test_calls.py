"""Bad input from Python, a row a mistake: the class of the error, what it says, and that nothing is left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_files import BAD_ROW, changed, fields, logistic
from command import FIELDS, unchanged
from torch.distributions import Bernoulli, HalfNormal, Normal, Poisson
from zarr.storage import MemoryStore

import dadvi as package
from dadvi.errors import DataError, InputError, ModelError


def fit(world: Path, data: str = "data.zarr", **settings: Any) -> None:
    package.fit(logistic(), package.open_shards(world / data), **{"client": "serial", "max_passes": 3, **settings})


def fit_poisson(world: Path) -> None:
    model = package.Model({"a": Normal(0.0, 1.0)}, lambda a, x: Poisson((a * x).exp()), observed="x")
    package.fit(model, package.open_shards(world / "data.zarr"), client="serial")


def fit_one(world: Path, likelihood: Callable[..., object]) -> None:
    model = package.Model({"a": Normal(0.0, 1.0)}, likelihood, observed="y")
    package.fit(model, package.open_shards(world / "data.zarr"), client="serial")


def fit_groups(_: Path, row: int, likelihood: Callable[..., object]) -> None:
    g = np.arange(1_000) % 3
    g[row] = -1
    data = package.write_shards(MemoryStore(), {"y": np.arange(1_000) % 2, "g": g}, chunk_rows=100, shard_rows=200)
    package.fit(package.Model({"u": Normal(torch.zeros(3), 1.0)}, likelihood, observed="y"), data, client="serial")


class NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("none known")


Call = Callable[[Path], object]

WRITE: dict[str, tuple[Call, list[str]]] = {
    "nan": (
        lambda world: package.write_shards(world / "new.zarr", {"x": np.array([0.0, np.nan, 1.0, np.nan])}),
        ["field 'x' has 2 values that are NaN or infinite", "the first is nan in row 1. Remove or correct those rows"],
    ),
    "infinity": (
        lambda world: package.write_shards(
            world / "new.zarr", {"y": [0, 1], "x": torch.tensor([[1.0, 2.0], [3.0, -torch.inf]])}
        ),
        ["field 'x' has 1 values that are NaN or infinite", "the first is -inf in row 1"],
    ),
    "shuffled nan": (
        lambda world: package.write_shards(world / "new.zarr", changed("x", BAD_ROW, np.nan), shuffle=0),
        [f"the first is nan in row {BAD_ROW}"],
    ),
    "unequal length": (
        lambda world: package.write_shards(world / "new.zarr", {"x": np.zeros(3), "y": np.zeros(4)}),
        ["fields have unequal length: x has 3 rows, y has 4 rows"],
    ),
    "no rows": (
        lambda world: package.write_shards(world / "new.zarr", {"x": np.zeros((0, 2))}),
        ["empty data: field 'x' has shape (0, 2); at least one row"],
    ),
    "no fields": (lambda world: package.write_shards(world / "new.zarr", {}), ["empty data: no fields are given"]),
    "text": (
        lambda world: package.write_shards(world / "new.zarr", {"x": np.array(["a", "b"])}),
        ["field 'x' has dtype <U1", "convert it to integer codes"],
    ),
    "code outside": (
        lambda world: package.write_shards(world / "new.zarr", {"g": np.array([0, 3, 1])}, categories={"g": "abc"}),
        ["field 'g' has 1 codes outside 0 to 2, its categories; the first is 3 in row 1"],
    ),
    "uint64": (
        lambda world: package.write_shards(world / "new.zarr", {"n": np.array([1, 2**63], dtype=np.uint64)}),
        ["field 'n' has 1 integers above 9223372036854775807, the largest usable", "in row 1"],
    ),
    "exists": (
        lambda world: package.write_shards(world / "data.zarr", {"x": np.zeros(3)}),
        ["data.zarr exists; choose another output, or replace it with overwrite=True"],
    ),
    "seed": (
        lambda world: package.write_shards(world / "new.zarr", {"x": np.zeros(3)}, shuffle=-1),
        ["=-1: it must be a whole number, at least 0"],
    ),
    "seed of ingest": (
        lambda world: package.ingest(world / "table.csv", world / "new.zarr", FIELDS, shuffle=-1),
        ["=-1: it must be a whole number, at least 0"],
    ),
}


CALLS: dict[str, tuple[Call, type[Exception], list[str]]] = {
    "method": (lambda world: fit(world, method="nuts"), InputError, ["method='nuts': use 'auto'", "dadvi.ADVI()"]),
    "family": (
        lambda world: fit(world, family="flow"),
        InputError,
        ["'flow'", "'mean_field'", "'full_rank'", "'low_rank'"],
    ),
    "model": (
        lambda world: package.fit(3, package.open_shards(world / "data.zarr")),
        ModelError,
        ["model is a int; give a"],
    ),
    "data": (
        lambda world: package.fit(logistic(), "data.zarr"),
        InputError,
        ["data is a str; give what dadvi.open_shards"],
    ),
    "seed": (lambda world: fit(world, seed=1.5), InputError, ["seed=1.5: it must be a whole number, at least 0"]),
    "tol": (lambda world: fit(world, tol=float("inf")), InputError, ["tol=inf: it must be positive and finite"]),
    "max_passes": (
        lambda world: fit(world, max_passes=-2),
        InputError,
        ["max_passes=-2: it must be positive and finite"],
    ),
    "tol a text": (lambda world: fit(world, tol="a"), InputError, ["tol='a': it must be positive and finite"]),
    "tol nothing": (lambda world: fit(world, tol=None), InputError, ["tol=None: it must be positive and finite"]),
    "max_passes a text": (
        lambda world: fit(world, max_passes="9"),
        InputError,
        ["max_passes='9': it must be"],
    ),
    "callback no function": (
        lambda world: fit(world, callbacks=[print, 3]),
        InputError,
        ["callbacks has 3, a int; give functions of a TraceRow"],
    ),
    "callbacks no list": (
        lambda world: fit(world, callbacks=print),
        InputError,
        ["callbacks is a builtin_function_or_method; give a list of functions"],
    ),
    "callback no function, resuming": (
        lambda world: package.resume(
            world / "run", logistic(), package.open_shards(world / "data.zarr"), callbacks=[3]
        ),
        InputError,
        ["callbacks has 3, a int"],
    ),
    "checkpoint_seconds": (
        lambda world: fit(world, run_dir=world / "new", checkpoint_seconds="a"),
        InputError,
        ["checkpoint_seconds='a': it must be at least 0, and finite"],
    ),
    "batch_rows a text": (lambda _: package.ADVI(batch_rows="a"), InputError, ["batch_rows='a': at least 1 row"]),
    "learning_rate a text": (lambda _: package.ADVI(learning_rate="a"), InputError, ["learning_rate='a': it must be"]),
    "optimizer of matrices": (
        lambda _: package.ADVI(optimizer=torch.optim.Muon),
        InputError,
        ["Muon only supports 2D parameters", "if it is the parameters, which are vectors, take an optimizer for such"],
    ),
    "NumPy in the likelihood": (
        lambda world: fit_one(world, lambda a, x: Bernoulli(logits=torch.tensor(a.numpy() + x.numpy()))),
        ModelError,
        ["it takes a latent to NumPy; keep the likelihood in torch, without .item(), .detach(), .numpy() or NumPy"],
    ),
    "NumPy in the prior": (
        lambda world: package.fit(
            package.Model(
                {"s": HalfNormal(1.0), "a": lambda s: Normal(0.0, torch.tensor(s.numpy()))},
                lambda a, x: Bernoulli(logits=a + x),
                observed="y",
            ),
            package.open_shards(world / "data.zarr"),
            client="serial",
        ),
        ModelError,
        ["it takes a latent to NumPy; keep the prior in torch"],
    ),
    "likelihood without a derivative": (
        lambda world: fit_one(world, lambda a, x: Bernoulli(logits=NoDerivative.apply(a) + x)),
        ModelError,
        ["the likelihood has values but no gradients: NotImplementedError: none known; keep the likelihood in torch"],
    ),
    "negative code": (
        lambda world: fit_groups(world, 7, lambda u, g: Bernoulli(logits=u[g])),
        DataError,
        [
            "field 'g', by which the likelihood picks, has 1 rows with a negative code, the first in row 7 (value -1)",
            "give missing values a code of their own",
        ],
    ),
    "negative code in the middle": (
        lambda world: fit_groups(world, 507, lambda u, g: Bernoulli(logits=u[g])),
        DataError,
        ["'g', by which the likelihood picks, has 1 rows with a negative code, the first in row 507 (value -1)"],
    ),
    "negative code for what is computed": (
        lambda world: fit_groups(world, 507, lambda u, g: Bernoulli(logits=(2 * u[:, None])[g, 0])),
        DataError,
        ["'g', by which the likelihood picks, has 1 rows with a negative code"],
    ),
    "posterior of data": (
        lambda world: package.load_posterior(world / "data.zarr"),
        DataError,
        ["data.zarr is a data set, not a posterior; as data it is opened by open_shards"],
    ),
    "posterior of others": (
        lambda world: package.load_posterior(world / "nan.zarr"),
        DataError,
        ["nan.zarr is a Zarr group, not a posterior"],
    ),
    "posterior in a directory of files": (
        lambda world: package.load_posterior(world / "run"),
        DataError,
        ["there is no posterior at ", "run; give what Posterior.save wrote, such as a run's posterior.zarr"],
    ),
    "optimizer": (lambda _: package.ADVI(optimizer="newton"), InputError, ["optimizer is 'newton'; known are 'adam'"]),
    "schedule": (lambda _: package.ADVI(schedule="linear"), InputError, ["schedule is 'linear'; known are 'constant'"]),
    "averaging": (lambda _: package.ADVI(averaging="ema"), InputError, ["averaging is 'ema'; known are"]),
    "estimator": (lambda _: package.ADVI(estimator="iwae"), InputError, ["unknown estimator 'iwae'"]),
    "design": (lambda _: package.ADVI(design="sobol"), InputError, ["'sobol'", "antithetic"]),
    "batch_rows": (lambda _: package.ADVI(batch_rows=-5), InputError, ["batch_rows=-5: at least 1 row is needed"]),
    "support": (
        fit_poisson,
        DataError,
        ["observed field 'x' has", "rows outside the support of Poisson, the first in row 0"],
    ),
    "nan": (
        lambda world: fit(world, "nan.zarr"),
        DataError,
        ["field 'x' has 1 rows that are not finite, the first in row 5"],
    ),
    "run_dir": (
        lambda world: fit(world, run_dir=world / "run"),
        InputError,
        ["run exists; choose another output, or replace it with overwrite=True"],
    ),
    "data in memory on workers": (
        lambda _: package.fit(logistic(), package.write_shards(MemoryStore(), fields()), client="tcp://127.0.0.1:1x"),
        InputError,
        ["'tcp://127.0.0.1:1x'"],
    ),
    "eta": (
        lambda world: package.full_gradient(logistic(), package.open_shards(world / "data.zarr"), torch.zeros(2, 3)),
        InputError,
        ["eta has shape (2, 3); it must be (K, 2)"],
    ),
    "posterior missing": (
        lambda world: package.load_posterior(world / "gone"),
        DataError,
        ["there is nothing at ", "gone; give what Posterior.save wrote"],
    ),
    "posterior exists": (
        lambda world: package.load_posterior(world / "run" / "posterior.zarr").save(world / "lost.zarr"),
        DataError,
        ["lost.zarr exists; choose another output"],
    ),
}


@pytest.mark.parametrize("mistake", WRITE)
def test_writing_refuses(world, mistake):
    call, fragments = WRITE[mistake]
    with unchanged(world), pytest.raises(InputError) as refused:
        call(world)
    for fragment in fragments:
        assert fragment in str(refused.value)


@pytest.mark.parametrize("mistake", CALLS)
def test_calls_refuse(world, mistake):
    call, error, fragments = CALLS[mistake]
    with unchanged(world), pytest.raises(error) as refused:
        call(world)
    for fragment in fragments:
        assert fragment in str(refused.value)
