"""PyMC's ADVI on minibatches of rows in memory: a grid of batch sizes and learning rates, for a budget of seconds each.

Minibatches are drawn by pm.Minibatch, the optimiser is Adam at a constant rate. In float64: in float32 the first
gradient of this model was not a number. Compiled by Numba, for PyTensor from PyPI has no BLAS for its C mode. The clock
starts after the first step, when all is compiled; parameters are copied at `points` equally spaced times.

usage: python pymc_advi.py DATA OUT SPEC, where SPEC is JSON: batches, rates, budget, points
"""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pymc as pm
import pytensor

MOST_STEPS = 10**7  # the budget ends a run


class Recorder:
    """A callback that copies the parameters of q as time passes, and stops the run at the end of the budget."""

    def __init__(self, budget: float, points: int) -> None:
        self._due = np.linspace(budget / points, budget, points).tolist()
        self._start, self.steps = 0.0, 0
        self.seconds: list[float] = []
        self.loc: list[list[float]] = []
        self.sd: list[list[float]] = []

    def __call__(self, approx: Any, _losses: Any, step: int) -> None:
        """Take note of the step; PyMC calls this after each, and ends the run on StopIteration."""
        now = time.perf_counter()
        if step == 1:
            self._start = now
        if now - self._start < self._due[0]:
            return
        params = {name: value.get_value().astype(float) for name, value in approx.params_dict.items()}
        self.seconds.append(now - self._start)
        self.loc.append(params["mu"].tolist())
        self.sd.append(np.logaddexp(0, params["rho"]).tolist())
        self.steps = step
        self._due.pop(0)
        if not self._due:
            raise StopIteration


def run(x: np.ndarray, y: np.ndarray, batch: int, rate: float, budget: float, points: int) -> dict[str, Any]:
    recorder = Recorder(budget, points)
    with pm.Model():
        some_x, some_y = pm.Minibatch(x, y, batch_size=batch)
        beta = pm.Normal("beta", 0, 1, shape=x.shape[1])
        pm.Bernoulli("y", logit_p=some_x @ beta, observed=some_y, total_size=len(y))
        pm.ADVI(random_seed=0).fit(
            MOST_STEPS,
            obj_optimizer=pm.adam(learning_rate=rate),
            callbacks=[recorder],
            score=True,  # with False, PyMC 5.28 takes the same minibatch and the same noise at every step
            progressbar=False,
        )
    return {
        "settings": {"batch": batch, "rate": rate, "budget": budget, "steps": recorder.steps},
        "seconds": recorder.seconds,
        "loc": recorder.loc,
        "sd": recorder.sd,
    }


def main() -> None:
    pytensor.config.mode = "NUMBA"
    directory, out, spec = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    x = np.load(directory / "x.npy", mmap_mode="r").astype(np.float64)
    y = np.load(directory / "y.npy").astype(np.int32)
    runs = [
        run(x, y, batch, rate, spec["budget"], spec["points"]) for batch in spec["batches"] for rate in spec["rates"]
    ]
    versions = {"python": platform.python_version(), "pymc": pm.__version__, "pytensor": pytensor.__version__}
    out.write_text(json.dumps({"versions": versions, "runs": runs}))


if __name__ == "__main__":
    main()
