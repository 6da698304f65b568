"""Progress: what a row is told as, on which stream, and how often."""

import math
import sys

import pytest

from dadvi import progress
from dadvi.posterior import TraceRow
from dadvi.progress import Meter, make_reporter


def row(phase, seconds, rows_read, elbo, certificate=math.nan, num_rows=1_000):
    return TraceRow(phase, 1, rows_read / num_rows, rows_read, seconds, elbo, certificate=certificate)


def test_the_elbo_told_is_that_of_whole_epochs_as_soon_as_there_is_one():
    meter = Meter()
    assert "ELBO -70.0 (one minibatch)" in meter.describe(row("step", 1, 1_000, -70.0))
    assert "ELBO -50.0  " in meter.describe(row("epochs", 2, 2_000, -50.0))
    assert "ELBO -50.0  " in meter.describe(row("step", 3, 3_000, -90.0))
    assert "ELBO -40.0  " in meter.describe(row("certificate", 4, 4_000, -40.0, certificate=0.5))
    assert "ELBO -40.0  " in meter.describe(row("step", 5, 5_000, -95.0))


def test_rows_a_second_leave_the_start_up_out():
    meter = Meter()
    assert "100 rows/s" in meter.describe(row("step", 10, 1_000, -1.0))  # all that is known yet
    assert "2,000 rows/s" in meter.describe(row("step", 11, 3_000, -1.0))


def test_time_left_is_that_of_the_remaining_passes_at_the_present_rate():
    meter = Meter(max_passes=50)
    meter.describe(row("step", 10, 1_000, -1.0))
    # 10 passes of 50 are done; 40 000 rows are left at 100 rows/s.
    text = meter.describe(row("step", 100, 10_000, -1.0))
    assert "10.0/50 passes" in text
    assert "0:06:40 left at most" in text
    assert "0:00:00 left at most" in meter.describe(row("step", 600, 60_000, -1.0))  # a last epoch may exceed the limit


def test_no_time_left_is_made_up():
    text = Meter().describe(row("step", 10, 1_000, -1.0))
    assert text.startswith("1.0 passes  ")
    assert "left" not in text


def test_only_a_certificate_is_told_as_one():
    meter = Meter()
    assert "certificate" not in meter.describe(row("epochs", 1, 1_000, -1.0))
    told = meter.describe(row("certificate", 2, 2_000, -1.0, certificate=0.01234))
    assert told.endswith("certificate 0.0123 sd")
    assert meter.describe(row("certificate", 3, 3_000, -1.0)).endswith("certificate unknown")


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_at_once_then_every_few_seconds_and_for_every_certificate(capsys, clock):
    with make_reporter(True, 50) as report:
        for second in range(12):
            clock[0] = float(second)
            report(row("step", second + 1, 1_000 * (second + 1), -float(second)))
        report(row("certificate", 13, 13_000, -5.0, certificate=0.2))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" s ")[0].strip() for line in lines] == ["1.0", "6.0", "11.0", "13.0"]
    assert lines[1] == "    6.0 s  6.0/50 passes  ELBO -5.0 (one minibatch)  1,000 rows/s  0:00:44 left at most"


def test_lines_do_not_hide_rows_from_the_meter(capsys, clock):
    with make_reporter(True, None) as report:
        report(row("step", 1, 1_000, -9.0))
        report(row("epochs", 2, 2_000, -7.0))  # too soon for a line
        clock[0] = 6.0
        report(row("step", 7, 7_000, -99.0))
    assert "ELBO -7.0  " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("wanted", [None, False])
def test_a_stream_that_is_no_terminal_gets_nothing_unasked(capsys, wanted):
    with make_reporter(wanted, None) as report:
        report(row("certificate", 1, 1_000, -9.0, certificate=0.1))
    assert capsys.readouterr() == ("", "")


def test_colours_asked_for_do_not_make_a_file_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with make_reporter(True, None) as report:
        report(row("step", 1, 1_000, -9.0))
    assert capsys.readouterr().err == "    1.0 s  1.0 passes  ELBO -9.0 (one minibatch)  1,000 rows/s\n"


def test_a_dumb_terminal_gets_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with make_reporter(True, None) as report:
        report(row("step", 1, 1_000, -9.0))
    assert capsys.readouterr().err.count("\n") == 1


def test_callbacks_get_every_row_in_order():
    first, second = [], []
    rows = [row("step", 1, 1_000, -9.0), row("epochs", 2, 2_000, -8.0)]
    with make_reporter(False, None, [first.append, second.append]) as report:
        for each in rows:
            report(each)
    assert first == second == rows
