"""Averages equal their definitions, forget the start, and never alias the parameters."""

import math

import pytest
import torch

from dadvi.errors import InputError
from dadvi.optim import AVERAGING, NoAveraging, PolynomialAveraging, TailAveraging, make_averaging


def iterates(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64)


def run(averaging, xs, epoch_lengths=()):
    """Feed the iterates through one tensor changed in place, as an optimiser does."""
    x = torch.full_like(xs[0], 1e6)  # the start is no iterate: an average that holds it is far off
    state = averaging.init({"x": x})
    ends = {sum(epoch_lengths[: i + 1]) for i in range(len(epoch_lengths))}
    for t, row in enumerate(xs, start=1):
        x.copy_(row)
        state = averaging.update(state, {"x": x})
        if t in ends:
            state = averaging.end_epoch(state)
    x.fill_(1e6)
    return state


@pytest.mark.parametrize("eta", [0, 1, 8, 2.5])
@pytest.mark.parametrize("count", [1, 2, 50])
def test_polynomial_average_is_its_weighted_mean(eta, count):
    xs = iterates(count)
    averaging = PolynomialAveraging(eta)
    # Unrolling the recursion: x_s has the weight Γ(s + η)/Γ(s), normalised.
    weights = torch.tensor([math.exp(math.lgamma(s + eta) - math.lgamma(s)) for s in range(1, count + 1)])
    expected = (weights.double()[:, None] * xs).sum(0) / weights.double().sum()
    assert torch.allclose(averaging.value(run(averaging, xs))["x"], expected, rtol=1e-6, atol=1e-7)


def test_polynomial_average_with_eta_zero_is_the_plain_mean():
    xs = iterates(37)
    averaging = PolynomialAveraging(0)
    assert torch.allclose(averaging.value(run(averaging, xs))["x"], xs.mean(0), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("epochs", range(1, 40))
def test_tail_is_the_mean_over_its_window_and_nothing_else(epochs):
    lengths = [1 + (7 * e) % 4 for e in range(epochs)]  # ragged epochs
    unfinished = 2
    xs = iterates(sum(lengths) + unfinished)
    averaging = TailAveraging()
    state = run(averaging, xs, lengths)
    first, last = averaging.window(state)

    assert last == epochs
    if epochs > 1:
        assert 1 / 2 <= (last - first + 1) / epochs < 3 / 4
    expected = xs[sum(lengths[: first - 1]) : sum(lengths)].mean(0)
    assert torch.allclose(averaging.value(state)["x"], expected, rtol=1e-12, atol=1e-13)


def test_tail_before_the_first_epoch_ends_is_the_mean_so_far():
    xs = iterates(5)
    averaging = TailAveraging()
    state = run(averaging, xs)
    assert averaging.window(state) == (1, 0)
    assert torch.allclose(averaging.value(state)["x"], xs.mean(0), rtol=1e-13, atol=1e-14)


def test_no_averaging_is_the_last_iterate():
    xs = iterates(5)
    averaging = NoAveraging()
    assert torch.equal(averaging.value(run(averaging, xs, [2, 2]))["x"], xs[-1])


@pytest.mark.parametrize("name", AVERAGING)
def test_value_before_any_step_is_the_start(name):
    averaging = make_averaging(name)
    start = {"loc": iterates(1)[0], "log_scale": iterates(2)[1]}
    value = averaging.value(averaging.init(start))
    assert all(torch.equal(value[key], start[key]) for key in start)


@pytest.mark.parametrize("name", AVERAGING)
def test_update_is_pure_and_a_kept_state_continues_with_the_same_bits(name):
    averaging = make_averaging(name)
    xs = iterates(24)
    kept = run(averaging, xs[:10], [3, 3, 3])
    before = averaging.value(kept)["x"].clone()

    def go_on(state):
        for t, row in enumerate(xs[10:]):
            state = averaging.update(state, {"x": row})
            if t % 3 == 1:
                state = averaging.end_epoch(state)
        return averaging.value(state)["x"]

    first = go_on(kept)
    assert torch.equal(averaging.value(kept)["x"], before)
    assert torch.equal(go_on(kept), first)
    assert not torch.equal(first, before)


@pytest.mark.parametrize("name", AVERAGING)
def test_state_is_tensors_and_ints_in_a_fixed_structure(name):
    averaging = make_averaging(name)

    def structure(part):
        if isinstance(part, tuple):
            return [structure(p) for p in part]
        if isinstance(part, dict):
            return {key: structure(p) for key, p in part.items()}
        assert isinstance(part, (int, torch.Tensor))
        return type(part)

    fresh = averaging.init({"x": iterates(1)[0]})
    assert structure(run(averaging, iterates(20), [5, 5, 5])) == structure(fresh)


def test_make_averaging_passes_a_rule_through_and_refuses_what_it_does_not_know():
    rule = PolynomialAveraging(3)
    assert make_averaging(rule) is rule
    with pytest.raises(InputError, match=r"averaging is 'mean'; known are 'polynomial', 'tail', 'none'"):
        make_averaging("mean")
    with pytest.raises(InputError, match=r"eta is -1; it must be 0"):
        PolynomialAveraging(-1)
