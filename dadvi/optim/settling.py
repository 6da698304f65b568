"""Have the iterates settled? R-hat and the Monte Carlo standard error of the means of whole epochs.

Under a constant step size the iterates of a stochastic optimiser end as a Markov chain that wanders about the
optimum. Dhaka et al. (2020), "Robust, Accurate Stochastic Optimization for Variational Inference", therefore ask of
them what one asks of MCMC: R-hat, whether they still drift, and the MCSE of their average, whether it is known well
enough (also Welandawe et al. 2022, and the package viabel). A history here is x (E, P): row e holds the mean of the
P variational parameters over epoch e, which takes out the swing within an epoch. Parameters are whitened, so x and
the MCSE are in posterior sds.

To have settled is not to have converged: that is said of the certificate only.
"""

import math
from dataclasses import dataclass

import numpy as np

from dadvi.errors import InputError
from dadvi.types import FloatArray

_FEWEST_EPOCHS = 4
"""Two halves, or two batches, of two epochs each: with fewer there is no variance to estimate."""


@dataclass(frozen=True, slots=True)
class Settling:
    """What the recent history of the iterates says."""

    epochs: int  # length of the window looked at, the last half of the history
    rhat: float  # RMS of split R-hat over the parameters; inf when it cannot be told yet
    mcse: float  # largest MCSE of the window's mean, in posterior sds; inf when it cannot be told yet
    settled: bool  # both are within their limits


def split_rhat(x: FloatArray) -> FloatArray:
    """Return the split R-hat (P,) of one chain x (E, P), its two halves taken as two chains.

    Gelman et al. (2013), Bayesian Data Analysis, section 11.4; splitting as in Vehtari et al. (2021), eqs. 1
    to 4, without ranks. With halves of n epochs, their means x̄_j and variances s_j²:

        W = mean_j s_j²,    B/n = var_j x̄_j,    R-hat = √( ((n − 1)/n · W + B/n) / W )

    About 1 for a stationary chain, larger the more it drifts. An odd E drops the oldest epoch. A constant parameter
    has R-hat 1; one that is constant in each half but not overall, inf.
    """
    x = _history(x)
    n = len(x) // 2
    halves = x[len(x) - 2 * n :].reshape(2, n, -1)  # (2, n, P)
    W = halves.var(axis=1, ddof=1).mean(axis=0)  # (P,)
    B_over_n = halves.mean(axis=1).var(axis=0, ddof=1)  # (P,)
    ratio = np.divide(B_over_n, W, out=np.where(B_over_n > 0, np.inf, 1 / n), where=W > 0)
    rhat: FloatArray = np.sqrt((n - 1) / n + ratio)
    return rhat


def mcse(x: FloatArray) -> FloatArray:
    """Return the Monte Carlo standard error (P,) of the mean over epochs of x (E, P), by batch means.

    Flegal and Jones (2010), "Batch means and spectral variance estimators in Markov chain Monte Carlo", with their
    batch size b = ⌊√E⌋ and a = ⌊E/b⌋ batches; the E − ab oldest epochs are dropped. With batch means ȳ_k and their
    mean ȳ:

        MCSE² = σ̂²/(ab),    σ̂² = b/(a − 1) Σ_k (ȳ_k − ȳ)²

    It allows for correlation over up to b epochs; for longer it is too small, but then R-hat is large.
    """
    x = _history(x)
    b = math.isqrt(len(x))
    a = len(x) // b
    batches = x[len(x) - a * b :].reshape(a, b, -1).mean(axis=1)  # (a, P)
    error: FloatArray = np.sqrt(batches.var(axis=0, ddof=1) / a)
    return error


def settled(history: FloatArray, tol: float, rhat_max: float = 1.1, min_epochs: int = 8) -> Settling:
    """Judge the last half of a history (E, P): settled if R-hat is up to `rhat_max`, every MCSE up to `tol`.

    R-hat is the RMS over parameters: of many parameters, the largest is large by chance alone.

    A parameter that stayed within tol/100 over the whole window counts as constant: an optimiser without noise
    creeps towards its limit for ever, which R-hat, blind to size, calls a drift. Fewer than `min_epochs`, or any
    value that is not finite, is never settled.
    """
    if not tol > 0:
        raise InputError(f"tol is {tol}; it must be above 0, in posterior sds, such as 0.1")
    if not rhat_max > 1:
        raise InputError(
            f"rhat_max is {rhat_max}; it must be above 1, the value of iterates that do not drift, such as 1.1"
        )
    if min_epochs < 2 * _FEWEST_EPOCHS:
        raise InputError(
            f"min_epochs is {min_epochs}; the last half of fewer than {2 * _FEWEST_EPOCHS} has no halves to compare"
        )
    window = history[len(history) // 2 :]
    if len(history) < min_epochs or not np.isfinite(history).all():
        return Settling(len(window), math.inf, math.inf, settled=False)
    still = np.ptp(window, axis=0) <= tol / 100  # (P,)
    rhat = float(np.sqrt(np.mean(np.square(np.where(still, 1.0, split_rhat(window))))))
    error = float(mcse(window).max())
    return Settling(len(window), rhat, error, settled=rhat <= rhat_max and error <= tol)


def _history(x: FloatArray) -> FloatArray:
    """Check the shape; measure from the first epoch, so that a constant parameter is 0 and not rounding errors."""
    if x.ndim != 2 or len(x) < _FEWEST_EPOCHS:
        raise InputError(
            f"the history has shape {x.shape}; needed is (epochs, parameters) with at least {_FEWEST_EPOCHS} epochs"
        )
    moved: FloatArray = x - x[0]
    return moved
