"""dadvi beside NumPyro, PyMC and scikit-learn on the same rows, in one run.

Problem 1, logistic regression: 100 predictors, the first an intercept, condition number about 1000, Normal(0, 1)
priors, float32. The reference is the mean-field optimum in float64, by Newton's method with exact expectations over all
rows. Two clocks for every contestant: seconds until the RMS error of the means is within 0.1 posterior sds of the
reference and stays there, and seconds until every sd is within 5 % of the reference's as well.

Problem 2, a non-centred hierarchy: groups of unequal size, an intercept, 20 slopes, a HalfNormal scale. The ELBO of
what each contestant ended with, against its seconds. One function evaluates every ELBO: on all rows, in float64, by
quadrature without draws.

What the clocks count:

- dadvi: the whole of `dadvi.fit`, reading Zarr shards included, on two worker processes which were up and had made a
  pass; the median of several fits. Parameters after an earlier round are those of the same fit with fewer passes.
- NumPyro, PyMC: steps only. Rows are in memory, and compiling does not count. Every run of a grid of batch sizes,
  learning rates and budgets is made; the table shows the best of the grid, chosen with the reference in hand.
- scikit-learn: `fit` only, rows in memory, the better of float32 and float64. It gives the mode, and no sds.

A ratio is a contestant's seconds over dadvi's. Peers run one after the other, on all cores, each in an environment of
its own that is made first.

usage: python scripts/bench_peers.py [--quick] [--logistic | --grouping] [--beside PEER ...] [--rows N] [--json PATH]
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from distributed import Client
from problems import bernoulli, logistic, mixing, predictors
from rich.console import Console
from rich.table import Column, Table
from torch.distributions import Bernoulli, HalfNormal, Normal

import dadvi
from dadvi.clients import start_local

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"

ENVIRONMENTS = {
    "numpyro": ("numpyro==0.22.0", "jax==0.10.2", "jaxlib==0.10.2", "numpy==2.4.6", "scipy==1.17.1"),
    "sklearn": ("scikit-learn==1.9.1", "numpy==2.4.6", "scipy==1.17.1"),
    "pymc": ("pymc==5.28.5", "pytensor==2.38.3", "numba==0.65.1", "numpy==2.4.6", "scipy==1.17.1"),
}

WORKERS = 2
MEANS_WITHIN = 0.1  # posterior sds, RMS
SDS_WITHIN = 0.05  # of the family's optimum, the worst
BLOCK_ROWS = 100_000
MEMORY_BYTES = 10e9  # a contestant whose rows and copies of them need more is left out
PATIENCE_SECONDS = 60  # of fits by dadvi, or by one solver of scikit-learn, after which none is repeated
NUM_SLOPES = 20

Fields = dict[str, np.ndarray]
console = Console(width=140, highlight=False)


class Solver(NamedTuple):
    """Settings of scikit-learn's solver, and what it holds for every value of x."""

    settings: dict[str, Any]
    bytes_per_value: int


SOLVERS = [
    Solver({"solver": "lbfgs", "dtype": "float32"}, 4),
    Solver({"solver": "lbfgs", "dtype": "float64"}, 8),
    Solver({"solver": "lbfgs", "dtype": "float32", "tol": 1e-8, "max_iter": 1000}, 4),
    Solver({"solver": "lbfgs", "dtype": "float64", "tol": 1e-8, "max_iter": 1000}, 8),
    Solver({"solver": "newton-cholesky", "dtype": "float32"}, 8),
    Solver({"solver": "newton-cholesky", "dtype": "float64"}, 16),
    Solver({"solver": "newton-cg", "dtype": "float32"}, 4),
]


@dataclass(frozen=True)
class Plan:
    """How much is run."""

    rows: int
    groups: int
    repeats: int  # of dadvi's and scikit-learn's fits
    grouping_passes: float | None  # of dadvi's at most, on the hierarchy; None for its default
    svi: dict[str, Any]  # NumPyro's grid on the logistic regression
    grouping: dict[str, Any]  # and on the hierarchy
    advi: dict[str, Any]  # PyMC's
    solver_seconds: float  # after which a solver of scikit-learn is given up
    beside: tuple[str, ...] = tuple(ENVIRONMENTS)  # on the logistic regression


FULL = Plan(
    rows=2_000_000,
    groups=1_000,
    repeats=3,
    grouping_passes=None,
    svi={"batches": [1_000, 10_000], "rates": [0.003, 0.01, 0.03], "budgets": [1.5, 3, 6, 12, 30], "points": 20},
    grouping={"batches": [1_000, 10_000], "rates": [0.003, 0.01, 0.03], "budgets": [10, 20, 40], "points": 1},
    advi={"batches": [1_000, 10_000], "rates": [0.003, 0.01, 0.03], "budget": 20, "points": 20},
    solver_seconds=180,
)
QUICK = Plan(
    rows=200_000,
    groups=50,
    repeats=1,
    grouping_passes=4,
    svi={"batches": [1_000, 10_000], "rates": [0.01], "budgets": [1.5, 4], "points": 10},
    grouping={"batches": [1_000, 10_000], "rates": [0.01], "budgets": [4, 8], "points": 1},
    advi={"batches": [1_000], "rates": [0.01], "budget": 8, "points": 5},
    solver_seconds=20,
)


@dataclass(frozen=True)
class Run:
    """What a contestant had after so many seconds, and how far that was from the reference."""

    who: str
    settings: dict[str, Any]
    seconds: list[float]  # (P,)
    loc: np.ndarray  # (P, D), unconstrained
    sd: np.ndarray | None  # (P, D); None for a point estimate
    rms: list[float] = field(default_factory=list)  # (P,) of the means, in posterior sds
    sd_error: list[float] = field(default_factory=list)  # (P,) of the worst sd, relative
    elbo: float = math.nan  # of the last, nats

    def clocks(self) -> tuple[float, float]:
        """Return seconds until the means, and until means and sds, are within their limits and stay there."""
        means = np.array(self.rms) <= MEANS_WITHIN
        return self._lasting(means), self._lasting(means & (np.array(self.sd_error) <= SDS_WITHIN))

    def _lasting(self, within: np.ndarray) -> float:
        lasting = np.logical_and.accumulate(within[::-1])[::-1]
        return self.seconds[int(lasting.argmax())] if lasting.any() else math.inf

    def record(self) -> dict[str, Any]:
        """Return what JSON can hold of it: no parameters."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("loc", "sd")}
        return plain | dict(zip(("means_seconds", "sds_seconds"), self.clocks(), strict=True))


# Environments and subprocesses ---------------------------------------------------------------------------------------


def make_environment(directory: Path, requirements: tuple[str, ...]) -> None:
    """Make a virtual environment with these versions, unless that has been done."""
    stamp, wanted = directory / "installed.txt", "\n".join(requirements)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    console.print(f"making {directory} with {', '.join(requirements)}")
    venv.create(directory, clear=True, with_pip=True)
    pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *requirements], check=True)
    stamp.write_text(wanted)


class Peers:
    """Runs the peers' scripts, and gathers the versions they tell."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.versions: dict[str, str] = {}

    def run(self, peer: str, script: str, data: Path, spec: dict[str, Any], limit: float | None = None) -> list[Run]:
        """Return the runs of a script; none when it took longer than the limit."""
        out = data / "out.json"
        command = [str(self.directory / peer / "bin" / "python"), str(PEERS / script), str(data), str(out)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        try:
            subprocess.run(
                [*command, json.dumps(spec)], check=True, capture_output=True, text=True, env=environment, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return []
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{script} failed with {spec}:\n{error.stderr[-3000:]}") from error
        result = json.loads(out.read_text())
        self.versions |= result["versions"]
        return [
            Run(
                script.removesuffix(".py"),
                run["settings"],
                run["seconds"],
                np.array(run["loc"]),
                None if run["sd"] is None else np.array(run["sd"]),
            )
            for run in result["runs"]
        ]


# Data ----------------------------------------------------------------------------------------------------------------


def logistic_rows(rng: np.random.Generator) -> Callable[[int], Fields]:
    """Return what draws rows of `problems.logistic`, here block by block into files that peers can read."""
    mix, beta = mixing(rng, 100, 1000), (0.3 * rng.standard_normal(100)).astype(np.float32)

    def draw(num_rows: int) -> Fields:
        x = predictors(rng, num_rows, mix)
        return {"x": x, "y": bernoulli(rng, x @ beta)}

    return draw


def grouping_rows(rng: np.random.Generator, num_groups: int) -> Callable[[int], Fields]:
    """Return what draws rows whose group has rank r with a probability that goes as r^-0.8."""
    share = np.arange(1, num_groups + 1) ** -0.8
    slopes = (0.5 * rng.standard_normal(NUM_SLOPES)).astype(np.float32)
    effects = (0.8 * rng.standard_normal(num_groups)).astype(np.float32)

    def draw(num_rows: int) -> Fields:
        x = rng.standard_normal((num_rows, NUM_SLOPES), dtype=np.float32)
        group = rng.choice(num_groups, num_rows, p=share / share.sum()).astype(np.int32)
        y = rng.random(num_rows) < 1 / (1 + np.exp(0.5 - x @ slopes - effects[group]))
        return {"x": x, "group": group, "y": y}

    return draw


def grouping_model(num_groups: int) -> dadvi.Model:
    prior = {
        "a": Normal(0.0, 1.0),
        "b": Normal(torch.zeros(NUM_SLOPES), 1.0),
        "tau": HalfNormal(1.0),
        "z": Normal(torch.zeros(num_groups), 1.0),
    }
    return dadvi.Model(prior, lambda a, b, tau, z, x, group: Bernoulli(logits=a + x @ b + tau * z[group]), "y")


def store(directory: Path, num_rows: int, draw: Callable[[int], Fields]) -> Fields:
    """Write rows to .npy files, block by block, and return them as memory maps."""
    directory.mkdir()
    files: Fields = {}
    for start in range(0, num_rows, BLOCK_ROWS):
        block = draw(min(BLOCK_ROWS, num_rows - start))
        for name, values in block.items():
            if name not in files:
                shape = (num_rows, *values.shape[1:])
                path = directory / f"{name}.npy"
                files[name] = np.lib.format.open_memmap(path, mode="w+", dtype=values.dtype, shape=shape)
            files[name][start : start + BLOCK_ROWS] = values
    return {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in files}


def in_blocks(fields: Fields) -> Iterator[dict[str, torch.Tensor]]:
    """Yield blocks of rows in float64, group indices in int64."""
    for start in range(0, len(fields["y"]), BLOCK_ROWS):
        block = {name: torch.tensor(values[start : start + BLOCK_ROWS]) for name, values in fields.items()}
        yield {name: values.long() if name == "group" else values.double() for name, values in block.items()}


# References ----------------------------------------------------------------------------------------------------------


def gauss_hermite(order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return nodes and weights (order,) of expectations under N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


@dataclass(frozen=True)
class Optimum:
    """The mean-field optimum of the logistic regression."""

    mean: torch.Tensor  # (D,)
    sd: torch.Tensor  # (D,) of the family's optimum
    marginal: torch.Tensor  # (D,) by the inverse of the whole curvature: the unit of the means' errors

    def judge(self, run: Run) -> Run:
        """Return the run with its errors."""
        mean, sd, marginal = self.mean.numpy(), self.sd.numpy(), self.marginal.numpy()
        rms = np.sqrt(np.square((run.loc - mean) / marginal).mean(1))
        sd_error = np.full(len(run.loc), np.nan) if run.sd is None else np.abs(run.sd / sd - 1).max(1)
        return replace(run, rms=rms.tolist(), sd_error=sd_error.tolist())


def mean_field_optimum(fields: Fields, start: Optimum | None = None) -> Optimum:
    """Return the fixed point: gradient of the ELBO in the means zero, sds of the curvature's diagonal.

    x_i·β ~ N(x_i·μ, Σ_j x_ij² σ_j²) under q, so that every expectation over q is one Gauss-Hermite rule for each row.
    """
    nodes, weights = gauss_hermite(9)
    dim = fields["x"].shape[1]
    mean = torch.zeros(dim, dtype=torch.float64) if start is None else start.mean
    sd = torch.zeros(dim, dtype=torch.float64) if start is None else start.sd
    for _ in range(30):
        grad, precision = -mean, torch.eye(dim, dtype=torch.float64)
        for block in in_blocks(fields):
            x = block["x"]
            spread = (x.square() @ sd.square()).sqrt()
            p = torch.sigmoid((x @ mean)[:, None] + spread[:, None] * nodes)  # (rows, nodes)
            grad = grad + x.T @ (block["y"] - p @ weights)
            precision += (x.T * ((p * (1 - p)) @ weights)) @ x
        step, new_sd = torch.linalg.solve(precision, grad), precision.diagonal().rsqrt()
        moved = max(float((step / new_sd).abs().max()), float((sd / new_sd - 1).abs().max()))
        mean, sd = mean + step, new_sd
        if moved < 1e-5:
            return Optimum(mean, sd, precision.inverse().diagonal().sqrt())
    raise SystemExit("Newton's method did not find the reference; nothing to measure against")


def reference(fields: Fields) -> Optimum:
    """Return the optimum for all rows, started from that of a tenth of them."""
    few = mean_field_optimum({name: values[: len(values) // 10] for name, values in fields.items()})
    return mean_field_optimum(fields, replace(few, sd=few.sd * 0.1**0.5))


def grouping_elbo(fields: Fields, loc: np.ndarray, sd: np.ndarray) -> float:
    """Return the ELBO of N(loc, diag(sd²)) over (a, b, log τ, z), on all rows.

    Given τ the logit a + x·b + τ z_g of a row is Gaussian, so the expectation of its log-likelihood is a Gauss-Hermite
    rule over the logit within one over log τ.
    """
    mean, var = torch.from_numpy(loc), torch.from_numpy(sd).square()
    sizes = [1, NUM_SLOPES, 1, len(loc) - NUM_SLOPES - 2]
    (a, b, log_tau, z), (a_var, b_var, log_tau_var, z_var) = mean.split(sizes), var.split(sizes)
    outer, outer_weights = gauss_hermite(7)
    inner, inner_weights = gauss_hermite(11)
    tau = (log_tau + log_tau_var.sqrt() * outer).exp()  # (outer,)
    total = 0.0
    for block in in_blocks(fields):
        x, group, y = block["x"], block["group"], block["y"]
        center = (a + x @ b)[:, None] + tau * z[group][:, None]  # (rows, outer)
        spread = ((a_var + x.square() @ b_var)[:, None] + tau.square() * z_var[group][:, None]).sqrt()
        logits = center[:, :, None] + spread[:, :, None] * inner
        log_lik = y[:, None] * center - torch.nn.functional.softplus(logits) @ inner_weights
        total += float((log_lik @ outer_weights).sum())
    gaussian = torch.cat([a, b, z]).square().sum() + torch.cat([a_var, b_var, z_var]).sum()
    log_prior = -0.5 * (gaussian + (len(loc) - 1) * math.log(2 * math.pi))
    half_normal = 0.5 * math.log(2 / math.pi) - 0.5 * (2 * (log_tau + log_tau_var)).exp() + log_tau
    entropy = 0.5 * (var.log().sum() + len(loc) * (1 + math.log(2 * math.pi)))
    return total + float(log_prior + half_normal + entropy)


# Contestants ---------------------------------------------------------------------------------------------------------


class Round(NamedTuple):
    """The end of a round of dadvi's."""

    seconds: float
    passes: float
    elbo: float  # dadvi's own


class Fit(NamedTuple):
    """A fit of dadvi's, on the caller's clock."""

    seconds: float
    posterior: dadvi.Posterior
    rounds: list[Round]

    def run(self, points: list[tuple[float, dadvi.Posterior]]) -> Run:
        """Return the record of the fit, with what it had after so many seconds."""
        certificate = self.posterior.certificate
        settings = {
            "status": self.posterior.status,
            "passes": round(self.posterior.passes, 2),
            "certificate": None if certificate is None else certificate.max,
            "rounds": [each._asdict() for each in self.rounds],
        }
        gaussians = [posterior.unconstrained for _, posterior in points]
        loc = np.stack([q.loc.numpy() for q in gaussians])
        sd = np.stack([q.stddev.numpy() for q in gaussians])
        return Run("dadvi", settings, [seconds for seconds, _ in points], loc, sd)


def fit(model: dadvi.Model, data: dadvi.ShardedDataset, client: Client, max_passes: float | None = None) -> Fit:
    rounds: list[Round] = []
    start = time.perf_counter()

    def note(row: Any) -> None:
        if row.phase == "round":
            rounds.append(Round(time.perf_counter() - start, row.passes, row.elbo))

    posterior = dadvi.fit(
        model, data, client=client, family="mean_field", max_passes=max_passes, progress=False, callbacks=[note]
    )
    return Fit(time.perf_counter() - start, posterior, rounds)


@contextmanager
def workers(model: dadvi.Model, data: dadvi.ShardedDataset) -> Iterator[Client]:
    """Yield a client of workers that have made a pass."""
    client, cluster = start_local(WORKERS)
    with cluster, client:
        dadvi.full_gradient(model, data, torch.zeros(model.dim), client=client)
        yield client


def median_fit(
    model: dadvi.Model, data: dadvi.ShardedDataset, client: Client, repeats: int, max_passes: float | None = None
) -> Fit:
    """Return the fit of median length; no more are made once they have taken long."""
    fits: list[Fit] = []
    while len(fits) < repeats and sum(each.seconds for each in fits) < PATIENCE_SECONDS:
        fits.append(fit(model, data, client, max_passes))
    console.print("dadvi's fits:", ", ".join(f"{each.seconds:.1f} s" for each in fits))
    return sorted(fits, key=lambda each: each.seconds)[len(fits) // 2]


def run_dadvi(model: dadvi.Model, data: dadvi.ShardedDataset, repeats: int) -> Run:
    """Return the fit of median length, with the parameters after each of its rounds."""
    with workers(model, data) as client:
        median = median_fit(model, data, client, repeats)
        points = [
            (each.seconds, fit(model, data, client, max_passes=each.passes + 1e-9).posterior)
            for each in median.rounds[:-1]
        ]
    return median.run([*points, (median.seconds, median.posterior)])


def median_solver(peers: Peers, data: Path, solver: Solver, plan: Plan) -> list[Run]:
    """Return the run of median length, repeated as dadvi's fits are; none where a run took longer than the limit."""
    turns: list[Run] = []
    while len(turns) < plan.repeats and sum(turn.seconds[0] for turn in turns) < PATIENCE_SECONDS:
        found = peers.run("sklearn", "sklearn_logistic.py", data, solver.settings, plan.solver_seconds)
        if not found:
            console.print(f"scikit-learn {solver.settings}: not done within {plan.solver_seconds:g} s, left out")
            return []
        turns += found
    return [sorted(turns, key=lambda turn: turn.seconds[0])[len(turns) // 2]]


def run_sklearn(peers: Peers, data: Path, x: np.ndarray, plan: Plan) -> list[Run]:
    """Return a run for each solver that fits into memory and time."""
    runs: list[Run] = []
    for solver in SOLVERS:
        if solver.bytes_per_value * x.size > MEMORY_BYTES:
            console.print(f"scikit-learn {solver.settings}: left out, needs more than {MEMORY_BYTES / 1e9:g} GB")
        else:
            runs += median_solver(peers, data, solver, plan)
    return runs


# Problems ------------------------------------------------------------------------------------------------------------


def told(run: Run) -> str:
    """Return the settings that tell a run from the others of its contestant."""
    if run.who == "dadvi":
        return f"{run.settings['passes']} passes, {run.settings['status']}"
    names = {"budget": "{} s", "batch": "batch {:,}", "rate": "rate {}", "tol": "tol {}"}
    parts = [names[name].format(run.settings[name]) for name in names if name in run.settings]
    return ", ".join([str(run.settings[name]) for name in ("solver", "dtype") if name in run.settings] + parts)


def measured(seconds: float, own: float) -> tuple[str, str]:
    """Return seconds and their ratio to dadvi's, as a table shows them."""
    return (f"{seconds:.1f}", f"{seconds / own:.2f}") if math.isfinite(seconds) else ("no", "")


def by_means(run: Run) -> tuple[float, float]:
    """Return what a contestant's best run for the means has least of."""
    return run.clocks()[0], run.rms[-1]


def better_dtype(solvers: list[Run]) -> list[Run]:
    """Return the better of a solver's runs that differ in dtype alone."""
    alike: dict[tuple[Any, Any], list[Run]] = {}
    for run in solvers:
        alike.setdefault((run.settings["solver"], run.settings.get("tol")), []).append(run)
    return [min(runs, key=by_means) for runs in alike.values()]


def logistic_line(label: str, run: Run, own: Run) -> list[str]:
    clocks = [measured(*pair) for pair in zip(run.clocks(), own.clocks(), strict=True)]
    sds = ("gives none", "") if run.sd is None else clocks[1]
    worst = "" if run.sd is None else f"{run.sd_error[-1]:.1%}"
    return [label, told(run), *clocks[0], *sds, f"{run.seconds[-1]:.1f}", f"{run.rms[-1]:.3f}", worst]


def logistic_table(rows: int, own: Run, svi: list[Run], advi: list[Run], solvers: list[Run]) -> Table:
    headers = ["means to 0.1 sd, s", "ratio", "sds to 5 % too, s", "ratio", "in all, s", "RMS error, sd", "worst sd"]
    title = f"logistic regression, {rows:,} x 100 float32"
    table = Table("", "", *(Column(header, justify="right") for header in headers), title=title)
    table.add_row(*logistic_line("dadvi", own, own))
    for peer, runs in {"NumPyro SVI": svi, "PyMC ADVI": advi}.items():
        if not runs:
            continue
        by_sds = min(runs, key=lambda run: (run.clocks()[1], run.sd_error[-1]))
        table.add_row(*logistic_line(f"{peer}, best means of {len(runs)}", min(runs, key=by_means), own))
        table.add_row(*logistic_line(f"{peer}, best sds of {len(runs)}", by_sds, own))
    for run in better_dtype(solvers):
        table.add_row(*logistic_line("scikit-learn", run, own))
    return table


def bench_logistic(plan: Plan, peers: Peers, directory: Path) -> dict[str, Any]:
    """Run problem 1, print its table and return the record."""
    rng = np.random.default_rng(0)
    model = logistic(rng, 1_000).model
    fields = store(directory, plan.rows, logistic_rows(rng))
    optimum = reference(fields)
    data = dadvi.write_shards(directory / "rows.zarr", fields)
    own = optimum.judge(run_dadvi(model, data, plan.repeats))
    svi, advi, solvers = [], [], []
    if "numpyro" in plan.beside:
        svi = peers.run("numpyro", "numpyro_svi.py", directory, {"problem": "logistic", **plan.svi})
    if "sklearn" in plan.beside:
        solvers = run_sklearn(peers, directory, fields["x"], plan)
    if "pymc" in plan.beside and 16 * fields["x"].size <= MEMORY_BYTES:
        advi = peers.run("pymc", "pymc_advi.py", directory, plan.advi)
    svi, advi, solvers = ([optimum.judge(run) for run in runs] for runs in (svi, advi, solvers))

    console.print(logistic_table(plan.rows, own, svi, advi, solvers))
    trail = zip(own.seconds, own.rms, own.sd_error, strict=True)
    console.print("dadvi's rounds:", "; ".join(f"{at:.1f} s: {rms:.2g} sd, sds {sd:.1%}" for at, rms, sd in trail))
    for peer, runs in {"NumPyro": svi, "PyMC": advi}.items():
        if runs:
            reached = sum(math.isfinite(run.clocks()[0]) for run in runs)
            worst = min(min(run.sd_error) for run in runs)
            console.print(
                f"{peer}: {reached} of {len(runs)} runs reached 0.1 sd; least error of the worst sd {worst:.1%}"
            )
    return {"rows": plan.rows, "runs": [run.record() for run in (own, *svi, *advi, *solvers)]}


def grouping_table(plan: Plan, own: Run, rounds: list[Round], best: list[Run]) -> Table:
    """Return a row for the best run of each budget: its ELBO, and when dadvi was there."""
    headers = ["s", "ELBO", "below dadvi's end, nats", "dadvi there after, s", "ratio"]
    title = f"non-centred hierarchy, {plan.rows:,} rows, {plan.groups:,} groups, {NUM_SLOPES} slopes"
    table = Table("", "", *(Column(header, justify="right") for header in headers), title=title)
    table.add_row("dadvi", told(own), f"{own.seconds[-1]:.1f}", f"{own.elbo:,.1f}", "", "", "")
    for run in best:
        there = next((each.seconds for each in rounds if each.elbo >= run.elbo), math.inf)
        reached, ratio = (f"{there:.1f}", f"{run.seconds[-1] / there:.2f}") if math.isfinite(there) else ("no", "")
        figures = [f"{run.seconds[-1]:.1f}", f"{run.elbo:,.1f}", f"{own.elbo - run.elbo:,.1f}", reached, ratio]
        table.add_row("NumPyro SVI, best of its budget", told(run), *figures)
    return table


def bench_grouping(plan: Plan, peers: Peers, directory: Path) -> dict[str, Any]:
    """Run problem 2, print its table and return the record.

    The ELBOs of dadvi's rounds are its own, shifted by what its last differs from that of `grouping_elbo`.
    """
    fields = store(directory, plan.rows, grouping_rows(np.random.default_rng(0), plan.groups))
    data = dadvi.write_shards(directory / "rows.zarr", fields)
    model = grouping_model(plan.groups)
    with workers(model, data) as client:
        median = median_fit(model, data, client, plan.repeats, plan.grouping_passes)
    svi = peers.run("numpyro", "numpyro_svi.py", directory, {"problem": "grouping", **plan.grouping})
    own, *svi = (
        replace(run, elbo=grouping_elbo(fields, run.loc[-1], run.sd[-1]))
        for run in (median.run([(median.seconds, median.posterior)]), *svi)
    )
    shift = own.elbo - median.rounds[-1].elbo
    rounds = [each._replace(elbo=each.elbo + shift) for each in median.rounds]
    best = [
        max((run for run in svi if run.settings["budget"] == budget), key=lambda run: run.elbo)
        for budget in plan.grouping["budgets"]
    ]
    console.print(grouping_table(plan, own, rounds, best))
    console.print("dadvi's rounds:", "; ".join(f"{each.seconds:.1f} s: {each.elbo:,.1f}" for each in rounds))
    console.print(f"dadvi's own ELBO of its end is {-shift:+.2f} nats from the table's")
    return {"rows": plan.rows, "groups": plan.groups, "runs": [run.record() for run in (own, *svi)]}


def without_nan(value: Any) -> Any:
    """Return the record with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plan_of(options: argparse.Namespace) -> Plan:
    """Return what the options ask for; a solver's limit grows with the rows."""
    plan = QUICK if options.quick else FULL
    rows = options.rows or plan.rows
    budgets = {"budgets": options.budgets or plan.svi["budgets"]}
    limit = plan.solver_seconds * max(1, rows / plan.rows)
    return replace(plan, rows=rows, svi=plan.svi | budgets, solver_seconds=limit, beside=tuple(options.beside))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="of both problems; default 2 000 000")
    parser.add_argument("--quick", action="store_true", help="200 000 rows and short budgets")
    parser.add_argument("--budgets", type=float, nargs="+", help="NumPyro's, in seconds, on the logistic regression")
    parser.add_argument(
        "--beside", nargs="+", choices=tuple(ENVIRONMENTS), default=tuple(ENVIRONMENTS), help="peers on problem 1"
    )
    parser.add_argument(
        "--envs", type=Path, default=ROOT / ".bench-envs", help="the peers' environments; default %(default)s"
    )
    parser.add_argument("--json", type=Path, help="where to write all figures")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--logistic", action="store_true", help="problem 1 alone")
    which.add_argument("--grouping", action="store_true", help="problem 2 alone")
    options = parser.parse_args()
    plan = plan_of(options)

    for name, requirements in ENVIRONMENTS.items():
        make_environment(options.envs / name, requirements)
    peers, problems = Peers(options.envs), {}
    with tempfile.TemporaryDirectory() as directory:
        if not options.grouping:
            problems["logistic"] = bench_logistic(plan, peers, Path(directory) / "logistic")
        if not options.logistic:
            problems["grouping"] = bench_grouping(plan, peers, Path(directory) / "grouping")
    versions = {"dadvi": dadvi.__version__, "torch": torch.__version__, **peers.versions}
    console.print(
        f"{os.cpu_count()} cores, {WORKERS} workers; " + ", ".join(" ".join(each) for each in versions.items())
    )
    if options.json:
        machine = {"cores": os.cpu_count(), "platform": platform.platform(), "command": sys.argv}
        record = {"machine": machine, "versions": versions, "problems": problems}
        options.json.write_text(json.dumps(without_nan(record), indent=1))


if __name__ == "__main__":
    main()
