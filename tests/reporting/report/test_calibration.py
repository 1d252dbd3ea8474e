"""Reliability bins and calibration error against values worked out by hand."""

import numpy as np
import pytest

from tcopilot.reporting.report.calibration import calibration_error, reliability


def test_bins_hold_their_upper_edge_and_skip_what_is_empty():
    bins = reliability([0.1, 0.1000001, 1.0, 0.0], [True, False, True, False], 10)
    assert [(b.low, b.high, b.tokens) for b in bins] == [(0.0, 0.1, 2), (0.1, 0.2, 1), (0.9, 1.0, 1)]
    assert [b.accuracy for b in bins] == [0.5, 0.0, 1.0]
    assert bins[0].confidence == pytest.approx(0.05)
    assert all(low <= b.accuracy <= high for b in bins for low, high in [b.ci95])


def test_a_calibrated_model_has_almost_no_error_and_a_sure_one_much():
    draw = np.random.default_rng(0)
    sure = draw.uniform(0.2, 1.0, 20_000)
    right = draw.uniform(size=sure.size) < sure
    assert calibration_error(reliability(sure, right)) < 0.015
    assert calibration_error(reliability(np.full(sure.size, 0.99), right)) == pytest.approx(0.39, abs=0.02)


def test_every_token_is_in_one_bin():
    sure = np.linspace(0, 1, 1001)
    assert sum(b.tokens for b in reliability(sure, sure > 0.5, 7)) == sure.size
