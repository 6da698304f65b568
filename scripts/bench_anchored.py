"""How many passes the anchored solver needs, and how far it then is from the optimum, against a float64 reference.

For each problem: rows N, passes until the certificate was within 0.1 (everything read is counted), seconds with two
worker processes (reading included, the cluster up), RMS error of the mean in posterior sds, largest error of an sd
against the mean-field optimum, and certificate over true distance at every round where that was below 1.

The reference is the same fixed point found with all the data's curvature, in float64, to a tolerance of 0.001 sd.

usage: python scripts/bench_anchored.py [--quick] [PROBLEM ...]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.distributions import (
    Bernoulli,
    Categorical,
    Dirichlet,
    Gamma,
    HalfNormal,
    MixtureSameFamily,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
)

import dadvi
from dadvi.executors import SerialExecutor, make_executor
from dadvi.fit import bind_to

Fields = dict[str, np.ndarray]


def predictors(rng: np.random.Generator, num_rows: int, dim: int, condition: float) -> np.ndarray:
    """Return correlated predictors (N, D), an intercept first; the covariance has about the condition number given."""
    rotate = [np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(2)]
    mix = rotate[0] * np.logspace(0, -np.log10(condition) / 2, dim) @ rotate[1]
    x = rng.standard_normal((num_rows, dim), dtype=np.float32) @ mix.astype(np.float32)
    x /= x.std(0)
    x[:, 0] = 1
    return x


def logistic(rng: np.random.Generator, num_rows: int) -> tuple[Fields, dadvi.Model]:
    """D = 100, condition number about 1000."""
    x = predictors(rng, num_rows, 100, 1000)
    y = rng.random(num_rows) < 1 / (1 + np.exp(-x @ (0.3 * rng.standard_normal(100)).astype(np.float32)))
    prior = {"beta": Normal(torch.zeros(100), 1.0)}
    return {"x": x, "y": y}, dadvi.Model(prior, lambda beta, x: Bernoulli(logits=x @ beta), "y")


def counts(rng: np.random.Generator, num_rows: int) -> tuple[Fields, np.ndarray]:
    """Return predictors, offsets and log means, D = 50."""
    x = predictors(rng, num_rows, 50, 100)
    offset = rng.random(num_rows, dtype=np.float32)
    return {"x": x, "offset": offset}, offset - 0.5 + x @ (0.1 * rng.standard_normal(50)).astype(np.float32)


def poisson(rng: np.random.Generator, num_rows: int) -> tuple[Fields, dadvi.Model]:
    """Poisson regression with offsets."""
    fields, log_mean = counts(rng, num_rows)
    prior = {"beta": Normal(torch.zeros(50), 1.0)}
    model = dadvi.Model(prior, lambda beta, x, offset: Poisson((x @ beta + offset).exp()), "y")
    return {**fields, "y": rng.poisson(np.exp(log_mean))}, model


def negative_binomial(rng: np.random.Generator, num_rows: int) -> tuple[Fields, dadvi.Model]:
    """Negative-binomial regression with offsets and unknown size."""
    fields, log_mean = counts(rng, num_rows)
    y = rng.poisson(rng.gamma(2.0, np.exp(log_mean) / 2.0))
    prior = {"beta": Normal(torch.zeros(50), 1.0), "size": HalfNormal(5.0)}

    def likelihood(beta, size, x, offset):
        return NegativeBinomial(size, logits=x @ beta + offset - size.log())

    return {**fields, "y": y}, dadvi.Model(prior, likelihood, "y")


def student(rng: np.random.Generator, num_rows: int) -> tuple[Fields, dadvi.Model]:
    """Student-t regression with unknown degrees of freedom and scale."""
    x = predictors(rng, num_rows, 50, 100)
    noise = rng.standard_t(4, num_rows).astype(np.float32)
    y = x @ (0.3 * rng.standard_normal(50)).astype(np.float32) + np.float32(0.5) * noise
    prior = {"beta": Normal(torch.zeros(50), 1.0), "scale": HalfNormal(2.0), "df": Gamma(2.0, 0.1)}
    return {"x": x, "y": y}, dadvi.Model(prior, lambda beta, scale, df, x: StudentT(df, x @ beta, scale), "y")


def mixture(rng: np.random.Generator, num_rows: int) -> tuple[Fields, dadvi.Model]:
    """Two-component Gaussian mixture with ordered means."""
    first = rng.random(num_rows) < 0.3
    y = np.where(first, rng.normal(-1, 0.5, num_rows), rng.normal(2, 1, num_rows)).astype(np.float32)
    prior = {
        "share": Dirichlet(torch.ones(2)),
        "mean": dadvi.Constrained(Normal(torch.zeros(2), 5.0), dadvi.ordered),
        "sd": HalfNormal(torch.full((2,), 3.0)),
    }
    return {"y": y}, dadvi.Model(
        prior, lambda share, mean, sd: MixtureSameFamily(Categorical(share), Normal(mean, sd)), "y"
    )


PROBLEMS: dict[str, tuple[Callable[..., tuple[Fields, dadvi.Model]], list[int]]] = {
    "logistic": (logistic, [200_000, 2_000_000]),
    "poisson": (poisson, [1_000_000]),
    "negative_binomial": (negative_binomial, [1_000_000]),
    "student": (student, [1_000_000]),
    "mixture": (mixture, [1_000_000]),
}


def reference(model: dadvi.Model, data: dadvi.ShardedDataset) -> dadvi.posterior.Fitted:
    """Return the mean-field optimum, from the curvature of all the data in float64."""
    bound = replace(bind_to(model, data), dtype=torch.float64)
    method = dadvi.Anchored(curvature="data", num_draws=2)
    family = dadvi.MeanField()
    with SerialExecutor(bound, data) as executor:
        return method.fit(executor, family, tol=1e-3, max_passes=20, seed=1, report=lambda _: None)


def measure(name: str, num_rows: int, directory: Path) -> list[str]:
    """Return a row of the table."""
    fields, model = PROBLEMS[name][0](np.random.default_rng(0), num_rows)
    data = dadvi.write_shards(directory / f"{name}-{num_rows}.zarr", fields, shuffle=0)
    del fields
    best = reference(model, data)
    precision = dadvi.quadratic.measure_curvature(
        SerialExecutor(bind_to(model, data), data), best.q.loc[None], range(data.manifest.num_chunks), 0
    )
    sd = precision.stddev
    rounds: list[tuple[float, float]] = []

    with make_executor(bind_to(model, data), data, None, 2) as executor:
        method = dadvi.Anchored()
        visited = []
        original = dadvi.local.Surrogate.measured

        def spying(subsample, factor, executor, anchor, **rest):
            visited.append(anchor)
            return original(subsample, factor, executor, anchor, **rest)

        dadvi.local.Surrogate.measured = spying  # type: ignore[method-assign]
        try:
            start = time.perf_counter()
            found = method.fit(
                executor,
                dadvi.MeanField(),
                tol=0.1,
                max_passes=10,
                seed=0,
                report=lambda row: rounds.append((row.certificate, 0.0)),
            )
            seconds = time.perf_counter() - start
        finally:
            dadvi.local.Surrogate.measured = original  # type: ignore[method-assign]
    errors = [((anchor - best.q.loc) / sd).abs().max().item() for anchor in visited]
    ratios = [
        f"{certificate:.2g}/{true:.2g}" for (certificate, _), true in zip(rounds, errors, strict=False) if true < 1
    ]
    rms = float(((found.q.loc - best.q.loc) / sd).square().mean().sqrt())
    sd_error = float((found.q.stddev / best.q.stddev - 1).abs().max())
    return [
        name,
        f"{num_rows:,}",
        f"{found.passes:.2f}",
        found.status,
        f"{seconds:.1f}",
        f"{rms:.4f}",
        f"{sd_error:.1%}",
        " ".join(ratios),
    ]


def main() -> None:
    """Measure the problems asked for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help=f"of {', '.join(PROBLEMS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows")
    arguments = parser.parse_args()
    table = Table("problem", "N", "passes", "status", "seconds", "RMS error (sd)", "worst sd", "certificate/truth")
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.problems or PROBLEMS:
            for num_rows in PROBLEMS[name][1]:
                table.add_row(*measure(name, num_rows // 10 if arguments.quick else num_rows, Path(directory)))
    Console().print(table)


if __name__ == "__main__":
    main()
