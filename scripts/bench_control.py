"""Stochastic ADVI with and without an anchor: the error of its means by passes over the data.

A logistic regression on 100 000 rows and 20 correlated predictors. Errors are those of the means of q against the
optimum found by `dadvi.Anchored`, in posterior sds, RMS over coordinates, and their median, least and largest over
seeds.

    python scripts/bench_control.py            # one process; about ten minutes
    python scripts/bench_control.py --seeds 1
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.distributions import Bernoulli, Normal

import dadvi

ROWS, DIM, CHUNK_ROWS = 100_000, 20, 500

BATCHES = {"default": None, "1000": 1_000}
PASSES = (8, 12, 16, 25)


def write(path: Path) -> dadvi.ShardedDataset:
    rng = np.random.default_rng(0)
    correlation = 0.7 ** np.abs(np.subtract.outer(np.arange(DIM), np.arange(DIM)))
    x = rng.standard_normal((ROWS, DIM)) @ np.linalg.cholesky(correlation).T
    logits = x @ (rng.standard_normal(DIM) / DIM**0.5)
    y = (rng.random(ROWS) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    return dadvi.write_shards(path, {"x": x, "y": y}, chunk_rows=CHUNK_ROWS, shard_rows=20 * CHUNK_ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    model = dadvi.Model(
        prior={"beta": Normal(torch.zeros(DIM), 2.0)},
        likelihood=lambda beta, x: Bernoulli(logits=x @ beta),
        observed="y",
    )
    with tempfile.TemporaryDirectory() as directory:
        data = write(Path(directory) / "d.zarr")
        optimum, wide = (
            dadvi.fit(model, data, family=family, tol=0.002, client="serial").unconstrained
            for family in ("mean_field", "full_rank")
        )

        def fit(batch: str, control: str, seed: int, tol: float, max_passes: float) -> tuple[dadvi.Posterior, float]:
            method = dadvi.ADVI(batch_rows=BATCHES[batch], control_variate=control)
            posterior = dadvi.fit(
                model, data, method=method, client="serial", tol=tol, max_passes=max_passes, seed=seed
            )
            error = (posterior.unconstrained.loc - optimum.loc) / wide.stddev
            return posterior, float(error.square().mean().sqrt())

        print(f"{'batch_rows':>10} {'control':>8} {'max_passes':>10} {'passes':>7}  error: median (least, largest)")
        for batch in BATCHES:
            for max_passes in PASSES:
                for control in ("none", "anchor"):
                    # A tolerance that is never met lets every fit use the passes it has.
                    fits = [fit(batch, control, seed, 1e-9, max_passes) for seed in seeds]
                    errors = [error for _, error in fits]
                    passes = np.mean([posterior.passes for posterior, _ in fits])
                    print(
                        f"{batch:>10} {control:>8} {max_passes:>10} {passes:>7.1f}  "
                        f"{np.median(errors):.4f} ({min(errors):.4f}, {max(errors):.4f})",
                        flush=True,
                    )
        print(f"{'batch_rows':>10} {'control':>8}  passes until certified within 0.1, by seed")
        for batch in BATCHES:
            for control in ("none", "anchor"):
                ends = [fit(batch, control, seed, 0.1, 100)[0] for seed in seeds]
                print(
                    f"{batch:>10} {control:>8}  "
                    + ", ".join(f"{end.passes:.1f}" if end.status == "converged" else end.status for end in ends),
                    flush=True,
                )


if __name__ == "__main__":
    main()
