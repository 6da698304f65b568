"""Where time goes: laps, and what a pass's profile makes of its workers' laps."""

import pytest

from dadvi import stopwatch
from dadvi.stopwatch import Profile, Stopwatch


def test_laps_add_up_by_phase(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 16.5, 18.5])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    watch.lap("read")
    watch.lap("forward")
    watch.lap("read")
    assert watch.seconds == {"read": 4.5, "forward": 2.0}
    watch.lap("read", decode=0.25)
    assert watch.seconds == {"read": 6.0, "decode": 0.5, "forward": 2.0}


def test_a_profile_is_a_mean_over_workers_and_adds_up_to_the_time_of_the_pass():
    workers = {"a": {"read": 1.0, "forward": 2.0}, "b": {"read": 3.0, "backward": 4.0}}
    profile = Profile.of(workers, elapsed=9.0, reduce=0.5)
    assert profile == Profile(read=2.0, forward=1.0, backward=2.0, wait=2.0, transfer=2.0, reduce=0.5)
    whole = profile + profile
    assert whole.read == 4.0
    assert sum(vars(profile).values()) == pytest.approx(9.0 + 0.5)
