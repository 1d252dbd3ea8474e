"""What a run says while rows are answered or recorded."""

import logging

from tcopilot.evaluation import progress as shown
from tcopilot.evaluation.progress import progress


def test_a_log_file_gets_a_line_from_time_to_time(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr(shown.time, "monotonic", lambda: next(clock))
    with progress("Recording", 40) as done:
        for _ in range(5):
            done(8)
    assert caplog.messages == ["Recording: 24 of 40 rows, 0.3 rows/s"]


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any output for a terminal
    monkeypatch.setattr(shown, "SECONDS_BETWEEN_LINES", 0)
    with progress("Recording", 2) as done:
        done(2)
    assert not caplog.messages
