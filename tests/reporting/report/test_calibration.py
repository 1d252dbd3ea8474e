"""Reliability bins and calibration error against values worked out by hand."""

import numpy as np
import pytest

from tcopilot.evaluation.significance import token_share_interval, wilson_interval
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


def test_tokens_of_a_row_count_as_one_where_they_are_right_or_wrong_together():
    right = np.random.default_rng(0).random(200) < 0.7
    (alone,) = reliability([0.95] * 200, right)
    (together,) = reliability([0.95] * 1000, np.repeat(right, 5), rows=np.repeat(np.arange(200), 5))
    assert alone.ci95 == pytest.approx(wilson_interval(int(right.sum()), 200))
    assert together.ci95 == pytest.approx(alone.ci95)
    (mixed,) = reliability([0.95] * 1000, np.repeat(right, 5), rows=np.tile(np.arange(200), 5))
    assert mixed.ci95[1] - mixed.ci95[0] < 0.6 * (alone.ci95[1] - alone.ci95[0])


def test_the_interval_covers_the_share_as_often_as_it_says():
    draw, covered = np.random.default_rng(1), 0
    for _ in range(400):
        rate_R = draw.beta(4, 1, 60)  # mean 0.8; rows differ
        tokens_R = draw.integers(1, 9, 60)
        low, high = token_share_interval(draw.binomial(tokens_R, rate_R), tokens_R)
        covered += low <= 0.8 <= high
    assert 0.91 < covered / 400 < 0.99
    for hits, share in ((0, 0.0), (3, 1.0)):
        for rows in range(1, 200):
            low, high = token_share_interval([hits] * rows, [3] * rows)
            assert 0 <= low <= share <= high <= 1
    assert token_share_interval([4], [8])[1] - token_share_interval([4], [8])[0] > 0.7  # one row says little
