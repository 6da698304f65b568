"""R-hat and MCSE against their formulas and against processes whose answers are known."""

import math

import numpy as np
import pytest
from scipy.signal import lfilter

from dadvi.errors import InputError
from dadvi.optim import mcse, settled, split_rhat


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def ar1(rho, epochs, chains):
    """Return chains (epochs, chains) of x_t = ρ x_{t-1} + e_t, e_t ~ N(0, 1), after a burn-in."""
    return lfilter([1.0], [1.0, -rho], noise(epochs + 500, chains), axis=0)[500:]


def test_split_rhat_by_hand():
    # Halves (1, 3) and (2, 8): means 2 and 5, variances 2 and 18, so W = 10, B/n = 4.5 and R-hat² = 0.5 + 0.45.
    x = np.array([1.0, 3.0, 2.0, 8.0])[:, None]
    assert split_rhat(x) == pytest.approx([math.sqrt(0.95)], rel=1e-14)
    # An odd length drops the oldest epoch.
    assert split_rhat(np.vstack([[[100.0]], x])) == pytest.approx([math.sqrt(0.95)], rel=1e-12)


def test_split_rhat_equals_the_direct_formula_for_each_parameter():
    x = ar1(0.7, 30, 5)
    for p in range(5):
        a, b = x[:15, p], x[15:, p]
        W = (a.var(ddof=1) + b.var(ddof=1)) / 2
        B = 15 * np.var([a.mean(), b.mean()], ddof=1)
        assert split_rhat(x)[p] == pytest.approx(math.sqrt((14 / 15 * W + B / 15) / W), rel=1e-12)


def test_split_rhat_is_one_for_white_noise_and_large_for_drift():
    x = noise(2000, 50)
    assert np.abs(split_rhat(x) - 1).max() < 0.01
    drift = np.linspace(0, 4, 2000)[:, None]  # 4 sds over the window
    assert split_rhat(x + drift).min() > 1.1
    # A line alone: variances n²/12 within, and n²/2 between the halves, so R-hat² → 1 + (1/2)/(1/12) = 7.
    assert split_rhat(drift) == pytest.approx([math.sqrt(7)], rel=1e-2)


def test_split_rhat_ignores_location_and_scale():
    x = noise(20, 3)
    assert split_rhat(5 + 1e-3 * x) == pytest.approx(split_rhat(x), rel=1e-9)


def test_constant_parameters_are_settled_and_steps_are_not():
    constant = np.tile(noise(1, 200), (14, 1))  # the computed mean of 7 equal numbers is often not that number
    assert (constant[:7].mean(axis=0) != constant[0]).any()
    assert split_rhat(constant) == pytest.approx(np.ones(200), rel=1e-15)
    assert (mcse(constant) == 0).all()
    step = np.repeat([0.0, 1.0], 4)[:, None]
    assert split_rhat(step).tolist() == [math.inf]


def test_mcse_by_hand():
    # E = 9 has three batches of three, with means 0, 3 and 6: variance 9, so MCSE = √(9/3).
    x = np.array([-1, 0, 1, 1, 3, 5, 6, 6, 6], dtype=np.float64)[:, None]
    assert mcse(x) == pytest.approx([math.sqrt(3)], rel=1e-14)
    # E = 11 also: the two oldest are dropped.
    assert mcse(np.vstack([[[50.0], [-70.0]], x])) == pytest.approx([math.sqrt(3)], rel=1e-12)


def test_mcse_of_white_noise_is_its_sd_over_root_epochs():
    E, chains = 400, 2000
    estimates = E * mcse(noise(E, chains)) ** 2  # unbiased for 1; variance 2/(a − 1) with a = 20 batches
    assert abs(estimates.mean() - 1) < 4 * math.sqrt(2 / 19 / chains)


def test_mcse_of_ar1_allows_for_its_correlation():
    # Var of a mean of b terms of AR(1): its long-run variance 1/(1 − ρ)², less the known edge term of order 1/b.
    rho, E, chains = 0.6, 2500, 1000
    b = 50
    long_run = 1 / (1 - rho) ** 2
    edge = 2 * rho * (1 - rho**b) / (b * (1 - rho) ** 2 * (1 - rho**2))
    estimates = E * mcse(ar1(rho, E, chains)) ** 2
    standard_error = estimates.std(ddof=1) / math.sqrt(chains)
    assert abs(estimates.mean() - (long_run - edge)) < 4 * standard_error + 0.005 * long_run
    naive = 1 / (1 - rho**2)
    assert estimates.mean() > 3 * naive


def test_settled_looks_at_the_last_half_only():
    x = 0.01 * noise(200, 4)
    x[:100] += np.linspace(50, 0, 100)[:, None]  # the way from the start
    found = settled(x, tol=0.1)
    assert found.settled
    assert found.epochs == 100
    assert found.rhat == np.sqrt(np.mean(split_rhat(x[100:]) ** 2))
    assert found.mcse == mcse(x[100:]).max()
    assert not settled(x[:100], tol=0.1).settled


def test_one_parameter_that_drifts_or_is_noisy_is_enough_to_go_on():
    x = 0.1 * noise(200, 4)
    assert settled(x, tol=0.1).settled
    assert not settled(x, tol=0.001).settled  # MCSE 0.01
    x[:, 2] += np.linspace(0, 5, 200)
    found = settled(x, tol=10.0)
    assert not found.settled
    assert found.rhat > 1.1


def test_a_creeping_end_below_the_tolerance_is_settled():
    x = np.exp(-0.1 * np.arange(200.0))[:, None]  # no noise: R-hat alone would never let it end
    assert split_rhat(x[100:])[0] > 1.1
    assert settled(x, tol=0.1).settled
    assert not settled(x, tol=1e-4).settled


def test_never_settled_on_too_little_or_on_what_is_not_finite():
    x = np.zeros((40, 2))
    assert settled(x[:8], tol=0.1).settled
    assert not settled(x[:7], tol=0.1).settled
    assert not settled(x[:0], tol=0.1).settled
    assert not settled(x, tol=0.1, min_epochs=41).settled
    x[3, 1] = np.nan
    assert not settled(x, tol=0.1).settled


@pytest.mark.parametrize("function", [split_rhat, mcse])
def test_shapes_without_a_variance_are_refused(function):
    with pytest.raises(InputError, match=r"shape \(3, 2\); needed is \(epochs, parameters\) with at least 4 epochs"):
        function(np.zeros((3, 2)))
    with pytest.raises(InputError, match=r"shape \(10,\)"):
        function(np.zeros(10))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tol": 0.0}, "tol is 0.0; it must be above 0"),
        ({"tol": 0.1, "rhat_max": 1.0}, "rhat_max is 1.0; it must be above 1"),
        ({"tol": 0.1, "min_epochs": 7}, "min_epochs is 7; the last half of fewer than 8"),
    ],
)
def test_limits_that_cannot_be_met_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        settled(np.zeros((40, 2)), **settings)
