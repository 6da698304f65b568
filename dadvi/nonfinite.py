"""A second look at a sum that is not finite: which row at which draw made it so.

Passes return sums, which do not tell. When a run ends because of one, the chunks are halved until one is left, which
costs two passes at most, and its rows are looked at one by one.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from dadvi.executors import Executor
from dadvi.passes import Gradient

SHOWN = 8
"""Elements of a latent that are told."""


def first_nonfinite(executor: Executor, eta: Tensor, chunks: Iterable[int] | None = None) -> str:
    """Return in words where log-likelihood or gradient is not finite; nothing where they are.

    Parameters
    ----------
    eta
        Points (K, D), the draws.
    chunks
        Those to look at; None for all.

    """
    manifest = executor.data.manifest
    suspects = list(range(manifest.num_chunks)) if chunks is None else sorted(int(chunk) for chunk in chunks)

    def bad_draws(among: list[int]) -> list[int]:
        sums = executor.run(Gradient(eta.numpy()), among, label="second look")
        finite = np.isfinite(sums.log_lik) & np.isfinite(sums.grad).all(1)
        return [int(draw) for draw in (~finite).nonzero()[0]]

    draws = bad_draws(suspects)
    if not draws:
        return ""
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        found = bad_draws(half)
        suspects = half if found else suspects[len(half) :]
        draws = found or draws
    (chunk,), model = suspects, executor.model
    latents, _ = model.model.space.constrain(eta)
    with torch.no_grad():
        values = model.log_lik_rows(latents, executor.data.read(chunk, model.fields))  # (K, rows)
    bad = (~values.isfinite()).nonzero()
    where = f"shard {manifest.shard(chunk)}, chunk {chunk}"
    if len(bad):
        draw, row = (int(index) for index in bad[bad[:, 1].argmin()])
        what = f"the log-likelihood of row {manifest.rows(chunk)[0] + row} ({where}) is {float(values[draw, row])}"
    else:
        draw, what = draws[0], f"the gradient of the log-likelihood in {where} is not finite"
    there = {name: [float(f"{z:.6g}") for z in each[draw].flatten()[:SHOWN].tolist()] for name, each in latents.items()}
    return f"{what} at draw {draw}, where latents are {there}"
