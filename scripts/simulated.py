"""A pass whose chunks take a time that is given, on no processor.

In a module of its own: of what a script defines, Dask would send the code with every task.
"""

import time
from dataclasses import dataclass

import numpy as np

from dadvi.likelihood import BoundModel
from dadvi.passes import Gradient, GradientSums, Pass, Summation
from dadvi.stopwatch import Stopwatch
from dadvi.types import Batch

SHARD_SECONDS = 1.0


@dataclass(frozen=True)
class Simulated(Gradient):
    """Sleeps, and returns sums of the size that a gradient's have."""

    def over(self, model: BoundModel, watch: Stopwatch) -> Summation[GradientSums]:
        """Return a summation that sleeps."""
        return Pass.over(self, model, watch)

    def on_chunk(self, model: BoundModel, batch: Batch) -> GradientSums:  # noqa: ARG002
        """Return sums of the right size."""
        time.sleep(SHARD_SECONDS)
        return GradientSums(np.ones(len(self.points)), np.ones(self.points.shape))
