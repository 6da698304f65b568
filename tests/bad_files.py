"""A directory of files that are wrong in every way, beside whole ones: tables, data sets, models, job files, runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import zarr
from command import MODEL, dadvi, write_table
from torch.distributions import Bernoulli, Normal

import dadvi as package

ROWS, CHUNK, CHUNKS = 4_000, 100, 40
BAD_CHUNK = 19  # in the middle: neither of the two that are looked at before a fit
BAD_ROW = BAD_CHUNK * CHUNK + 7


def write_world(directory: Path) -> None:
    """Write it all."""
    write_tables(directory)
    write_groups(directory)
    write_models(directory)
    data = ["data.zarr", "--out", "run", "--serial", "--quiet", "--max-passes", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert dadvi("fit", "model.py:model", *data).code in (0, 3)
    shutil.copytree(directory / "run", directory / "newer_run")
    edit(directory / "newer_run" / "posterior.zarr", "dadvi_posterior", "document", "format", value=2)
    shutil.copytree(directory / "run" / "posterior.zarr", directory / "lost.zarr")
    (directory / "lost.zarr" / "loc" / "c" / "0").unlink()
    write_runs(directory)


def write_tables(directory: Path) -> None:
    table = write_table(directory / "table.csv")
    (directory / "short.csv").write_text("y,x,g\n1,2.0,AA\n")
    (directory / "header.csv").write_text("y,x,g\n")
    (directory / "empty.csv").write_text("")
    (directory / "notes.txt").write_text("not a table\n")
    (directory / "damaged.parquet").write_bytes(b"PAR1 and then nothing")
    table.to_parquet(directory / "table.parquet")
    many = pd.DataFrame({"g": [f"g{i:03d}" for i in range(300)], "n": range(300), "when": pd.Timestamp("2026-01-01")})
    many.to_parquet(directory / "many.parquet")
    holes = pd.DataFrame({"x": [1.0, None, 3.0, None], "z": [0.5, 1.5, 2.5, 3.5]})
    holes.to_csv(directory / "holes.csv", index=False)
    pd.DataFrame({"x": [1.0, 2.0, np.inf, -np.inf]}).to_parquet(directory / "infinite.parquet")
    pd.DataFrame({"x": [None, None]}, dtype=float).to_parquet(directory / "nothing.parquet")
    pd.DataFrame({"x": [1.5, 1.5], "lambda": [1, 2]}).to_csv(directory / "constant.csv", index=False)


def fields() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(ROWS)
    return {"y": (rng.random(ROWS) < 1 / (1 + np.exp(-x))).astype(np.int64), "x": x, "m": rng.random((ROWS, 2))}


def changed(name: str, row: int, value: object) -> dict[str, np.ndarray]:
    values = fields()
    values[name][row] = value
    return values


def write_groups(directory: Path) -> None:
    sizes = {"chunk_rows": CHUNK, "shard_rows": 4 * CHUNK}
    package.write_shards(directory / "data.zarr", fields(), **sizes)
    package.write_shards(directory / "first.zarr", changed("y", 3, 2), **sizes)
    package.write_shards(directory / "middle.zarr", changed("y", BAD_ROW, -1), **sizes)
    write_foreign(directory / "nan.zarr", changed("x", 5, np.nan))
    write_foreign(directory / "nan_middle.zarr", changed("x", BAD_ROW, np.nan))
    write_foreign(directory / "infinite_middle.zarr", changed("x", BAD_ROW, -np.inf))
    write_foreign(directory / "unequal.zarr", {"x": np.zeros(5), "y": np.zeros(7)})
    write_foreign(directory / "rowless.zarr", {"x": np.zeros(0)})
    zarr.open_group(directory / "empty.zarr", mode="w")
    for name in ("newer.zarr", "changed.zarr", "damaged.zarr", "shard_lost.zarr"):
        shutil.copytree(directory / "data.zarr", directory / name)
    edit(directory / "newer.zarr", "dadvi", "format", value=7)
    edit(directory / "changed.zarr", "dadvi", "manifest", "finite", value=False)
    flip(directory / "damaged.zarr" / "x" / "c" / "0", 100)
    (directory / "shard_lost.zarr" / "x" / "c" / "0").unlink()


def write_foreign(path: Path, values: dict[str, np.ndarray]) -> None:
    """Write a group that is not this package's, and thus may hold anything."""
    group = zarr.open_group(path, mode="w")
    for name, value in values.items():
        group.create_array(name, data=value, chunks=(max(1, min(CHUNK, len(value))), *value.shape[1:]))


def edit(group: Path, *keys: str, value: object) -> None:
    """Set an entry, found by its keys, among the attributes of a group."""
    document = json.loads((group / "zarr.json").read_text())
    set_entry(group / "zarr.json", document, ("attributes", *keys), value)


def set_entry(file: Path, document: Any, keys: tuple[str, ...], value: object) -> None:
    """Write a document in which an entry, found by its keys, has another value than it had."""
    entry = document
    for key in keys[:-1]:
        entry = entry[key]
    assert entry[keys[-1]] != value
    entry[keys[-1]] = value
    file.write_text(json.dumps(document))


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0xFF
    file.write_bytes(bytes(content))


def logistic() -> package.Model:
    """Return the model of `MODELS`."""
    prior = {"a": Normal(0.0, 2.0), "b": Normal(0.0, 2.0)}
    return package.Model(prior, lambda a, b, x: Bernoulli(logits=a + b * x), observed="y")


MODELS = """\
import torch
from torch.distributions import Bernoulli, Independent, Normal, Poisson

import dadvi

prior = {"a": Normal(0.0, 2.0), "b": Normal(0.0, 2.0)}


def logistic(a, b, x):
    return Bernoulli(logits=a + b * x)


model = dadvi.Model(prior, logistic, observed="y")
unknown_field = dadvi.Model(prior, lambda a, b, distance: Normal(a + b * distance, 1.0), observed="y")
unknown_observed = dadvi.Model(prior, logistic, observed="late")
unknown_weight = dadvi.Model(prior, logistic, observed="y", weight="w")
unknown_dims = dadvi.Model({"e": Normal(torch.zeros(2), 1.0)}, lambda e, x: Normal(e[0] * x, 1.0), "y", dims={"e": "g"})
observed_wide = dadvi.Model(prior, lambda a, b, x: Normal(a + b * x, 1.0), observed="m")
not_by_row = dadvi.Model(prior, lambda a, b, x: Normal(a + b * (x - x.mean()), 1.0), observed="y")
scalar = dadvi.Model(prior, log_likelihood=lambda a, b, x, y: Normal(a + b * x, 1.0).log_prob(y).sum())
not_finite = dadvi.Model(prior, log_likelihood=lambda a, b, x, y: Normal(a, 1.0).log_prob(y) - 1 / (b * 0.0 + 0.0))
raises = dadvi.Model(prior, lambda a, b, x: Normal(a + b @ x, 1.0), observed="y")
tensor = dadvi.Model(prior, lambda a, b, x: a + b * x, observed="y")
number = 3


def broken(data):
    return data.nothing


def in_numpy(a, b, x):
    return Bernoulli(logits=torch.tensor((a + b).numpy() + x.numpy()))


numpy = dadvi.Model(prior, in_numpy, observed="y")
wider = dadvi.Model({**prior, "b": Normal(0.0, 3.0)}, logistic, observed="y")
"""


JOBS = {
    "unknown": "max_pases = 3\n",
    "far": "z = 3\n",
    "table": "[fit]\ntol = 0.1\n",
    "twice": "max_passes = 3\nmax-passes = 4\n",
    "text": "tol = 'small'\n",
    "truth": "tol = true\n",
    "fraction": "workers = 1.5\n",
    "number": "model = 3\n",
    "choice": "family = 'full'\n",
    "flag": "serial = 'yes'\n",
    "path": "out = ['run']\n",
    "itself": "config = 'job.toml'\n",
    "broken": "tol = \n",
    "range": "tol = -1.0\n",
    "whole": "model = 'model.py:model'\ndata = 'data.zarr'\n",
}


def write_models(directory: Path) -> None:
    (directory / "model.py").write_text(MODELS)
    (directory / "table_model.py").write_text(MODEL)
    (directory / "syntax.py").write_text("x = 1\ny = = 2\n")
    (directory / "fails.py").write_text("import dadvi\n\nmodel = dadvi.Model({}, None)\n")
    (directory / "model.txt").write_text("model = 1\n")
    for name, text in JOBS.items():
        (directory / f"{name}.toml").write_text(text)
    (directory / "latin.toml").write_bytes("model = 'é.py:m'\n".encode("latin-1"))


def write_runs(directory: Path) -> None:
    """Write a run that stopped and can go on, and copies of it that cannot."""
    begun = ["--out", directory / "stopped", "--serial", "--quiet", "--method", "advi", "--tol", "1e-9"]
    ran = dadvi("fit", f"{directory / 'model.py'}:model", directory / "data.zarr", *begun, "--max-passes", "2")
    assert ran.code == 3, ran.err
    copies: dict[str, tuple[tuple[str, ...], object]] = {
        "version_run": (("versions", "torch"), "1.0"),
        "python_run": (("origin",), {}),
        "model_moved_run": (("origin", "model"), str(directory / "moved.py:model")),
        "model_changed_run": (("origin", "model"), str(directory / "later.py:model")),
        "prior_changed_run": (("origin", "model"), str(directory / "model.py:wider")),
        "data_moved_run": (("origin", "data"), str(directory / "moved.zarr")),
        "data_shorter_run": (("origin", "data"), str(directory / "shorter.zarr")),
        "data_changed_run": (("origin", "data"), str(directory / "first.zarr")),
        "data_chunked_run": (("origin", "data"), str(directory / "chunked.zarr")),
        "optimizer_run": (("method", "optimizer"), {"object": "my.Optimizer"}),
    }
    for name, (keys, value) in copies.items():
        shutil.copytree(directory / "stopped", directory / name)
        settings = directory / name / "settings.json"
        set_entry(settings, json.loads(settings.read_text()), keys, value)
    (directory / "later.py").write_text(MODELS.replace("logits=a + b * x", "logits=a - b * x"))
    package.write_shards(directory / "shorter.zarr", {name: value[:-7] for name, value in fields().items()})
    package.write_shards(directory / "chunked.zarr", fields(), chunk_rows=2 * CHUNK, shard_rows=4 * CHUNK)
    for name, content in {"empty": "", "cut": '{"method": {"name": "ADVI"', "list": "[1, 2]", "little": "{}"}.items():
        shutil.copytree(directory / "stopped", directory / f"settings_{name}_run")
        (directory / f"settings_{name}_run" / "settings.json").write_text(content)
    for name in ("flipped", "cut", "other"):
        shutil.copytree(directory / "stopped", directory / f"checkpoint_{name}_run")
        shutil.rmtree(directory / f"checkpoint_{name}_run" / "posterior.zarr")  # as if it had been interrupted
    flip(directory / "checkpoint_flipped_run" / "checkpoint", 1_000)
    checkpoint = directory / "checkpoint_cut_run" / "checkpoint"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    (directory / "checkpoint_other_run" / "checkpoint").write_text("notes")
