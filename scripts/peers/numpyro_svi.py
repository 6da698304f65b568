"""NumPyro's SVI on minibatches of rows in memory: a grid of batch sizes, learning rates and budgets.

A step takes the next contiguous slice of rows, which are independent and identically distributed as they lie. The
likelihood is scaled by N / batch, the objective is Trace_ELBO with one draw. The optimiser is Adam, its rate constant
for the first half of the budget, then falling to zero along a cosine. Guides start at the prior's mean. A budget of
seconds becomes a number of steps by the speed measured beforehand; neither compiling nor loading counts. Parameters are
copied at `points` equally spaced steps.

usage: python numpyro_svi.py DATA OUT SPEC, where SPEC is JSON: problem, batches, rates, budgets, points
"""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from numpyro.infer.initialization import init_to_mean

CALIBRATION_STEPS = 100
CALIBRATION_SECONDS = 1.0

Rows = dict[str, jax.Array]


def observe(logits: jax.Array, y: jax.Array, num_rows: int) -> None:
    with numpyro.handlers.scale(scale=num_rows / len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def logistic(rows: Rows, num_rows: int) -> None:
    beta = numpyro.sample("beta", dist.Normal(0, 1).expand([rows["x"].shape[1]]).to_event(1))
    observe(rows["x"] @ beta, rows["y"], num_rows)


def grouping(rows: Rows, num_rows: int, num_groups: int) -> None:
    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.Normal(0, 1).expand([rows["x"].shape[1]]).to_event(1))
    tau = numpyro.sample("tau", dist.HalfNormal(1))
    z = numpyro.sample("z", dist.Normal(0, 1).expand([num_groups]).to_event(1))
    observe(a + rows["x"] @ b + tau * z[rows["group"]], rows["y"], num_rows)


class Problem(NamedTuple):
    """A model, its guide, and the data."""

    model: Any
    guide: Any
    sites: list[str] | None  # the guide's latents in order, None for a guide of one vector
    rows: Rows
    sizes: tuple[int, ...]  # what the model is told: rows, groups

    def flat(self, params: dict[str, jax.Array], what: str) -> list[float]:
        """Return loc or scale of all unconstrained coordinates."""
        names = ["auto"] if self.sites is None else [f"{site}_auto" for site in self.sites]
        return np.concatenate([np.ravel(params[f"{name}_{what}"]) for name in names]).astype(float).tolist()


def load(name: str, directory: Path) -> Problem:
    rows = {path.stem: jnp.asarray(np.load(path, mmap_mode="r")) for path in directory.glob("*.npy")}
    rows["y"] = rows["y"].astype(jnp.float32)
    num_rows = len(rows["y"])
    if name == "logistic":
        return Problem(logistic, AutoDiagonalNormal, None, rows, (num_rows,))
    return Problem(grouping, AutoNormal, ["a", "b", "tau", "z"], rows, (num_rows, int(rows["group"].max()) + 1))


class Trainer:
    """SVI with a given batch and schedule, and a compiled block of its steps."""

    def __init__(self, problem: Problem, batch: int, rate: float, total_steps: int, block_steps: int) -> None:
        def schedule(step: jax.Array) -> jax.Array:
            falling = jnp.clip(2 * step / total_steps - 1, 0, 1)
            return rate * (1 + jnp.cos(jnp.pi * falling)) / 2

        guide = problem.guide(problem.model, init_loc_fn=init_to_mean)
        self.svi = SVI(problem.model, guide, numpyro.optim.Adam(schedule), Trace_ELBO())
        num_batches = len(problem.rows["y"]) // batch

        def step(_: int, carry: tuple[Any, Rows]) -> tuple[Any, Rows]:
            state, rows = carry
            start = (state.optim_state[0] % num_batches) * batch
            part = {name: jax.lax.dynamic_slice_in_dim(values, start, batch) for name, values in rows.items()}
            return self.svi.update(state, part, *problem.sizes)[0], rows

        def block(state: Any, rows: Rows) -> Any:
            return jax.lax.fori_loop(0, block_steps, step, (state, rows))[0]

        first = {name: values[:batch] for name, values in problem.rows.items()}
        self.state = self.svi.init(jax.random.key(0), first, *problem.sizes)
        self._rows = problem.rows
        self._block = jax.jit(block).lower(self.state, self._rows).compile()

    def advance(self) -> dict[str, jax.Array]:
        """Run a block and return the parameters after it."""
        self.state = jax.block_until_ready(self._block(self.state, self._rows))
        return self.svi.get_params(self.state)


def steps_per_second(problem: Problem, batch: int) -> float:
    trainer = Trainer(problem, batch, 0.001, 10**9, CALIBRATION_STEPS)
    trainer.advance()
    start, steps = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < CALIBRATION_SECONDS:
        trainer.advance()
        steps += CALIBRATION_STEPS
    return steps / seconds


def run(problem: Problem, batch: int, rate: float, budget: float, speed: float, points: int) -> dict[str, Any]:
    block_steps = max(1, round(speed * budget / points))
    trainer = Trainer(problem, batch, rate, block_steps * points, block_steps)
    seconds, copies = [], []
    start = time.perf_counter()
    for _ in range(points):
        copies.append(trainer.advance())
        seconds.append(time.perf_counter() - start)
    return {
        "settings": {"batch": batch, "rate": rate, "budget": budget, "steps": block_steps * points},
        "seconds": seconds,
        "loc": [problem.flat(params, "loc") for params in copies],
        "sd": [problem.flat(params, "scale") for params in copies],
    }


def main() -> None:
    directory, out, spec = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    problem = load(spec["problem"], directory)
    runs = []
    for batch in spec["batches"]:
        speed = steps_per_second(problem, batch)
        for rate in spec["rates"]:
            runs += [run(problem, batch, rate, budget, speed, spec["points"]) for budget in spec["budgets"]]
    versions = {"python": platform.python_version(), "numpyro": numpyro.__version__, "jax": jax.__version__}
    out.write_text(json.dumps({"versions": versions, "runs": runs}))


if __name__ == "__main__":
    main()
