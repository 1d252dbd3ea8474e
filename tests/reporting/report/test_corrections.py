"""Shares, drift and mistakes of a trace written by hand."""

import pandas as pd
import pytest

from tcopilot.reporting.report.corrections import FEWEST, drift, frequent_mistakes, magnitudes, share


def position(token="a", said="a", after="a", shift=0.0, span=10.0, **feedback):
    """One target position."""
    return {
        "token": token, "before": [[said, 0.5]], "right": [said == token, after == token],
        "shift": shift, "range": span, "feedback": feedback,
    }  # fmt: skip


def test_the_share_is_the_mean_over_rows_of_the_mean_over_positions():
    rows = [{"gold": [position(shift=1.0), position(shift=3.0)]}, {"gold": [position(shift=6.0, span=12.0)]}]
    mean, (low, high) = share(rows)
    assert mean == pytest.approx((0.2 + 0.5) / 2)
    assert low == pytest.approx(0.2)
    assert high == pytest.approx(0.5)


def test_drift_has_means_and_intervals_for_each_feedback_and_leaves_rare_positions_out():
    row = {"gold": [position(observed=[1.0, 0.5], own=[2.0, -0.5]), position(observed=[3.0, 0.1], own=[0.0, 0.0])]}
    short = {"gold": [position(observed=[2.0, 0.5], own=[2.0, -0.5])]}
    found = list(drift([row] * (FEWEST - 1) + [short]).itertuples())
    assert [(p.feedback, p.position, p.tokens) for p in found] == [("observed", 1, FEWEST), ("own", 1, FEWEST)]
    observed = found[0]
    assert observed.norm == pytest.approx(1.1)
    assert observed.norm_half == pytest.approx(1.96 * 0.3 / FEWEST**0.5)  # sd of nine 1s and one 2
    assert (observed.cosine, observed.cosine_half) == (0.5, 0.0)
    assert len(drift([row] * FEWEST)) == 4


def test_mistakes_are_counted_by_benchmark_position_and_tokens():
    rows = {
        "x": [{"gold": [position("a"), position("b", said="c", after="b")]}] * 2
        + [{"gold": [position("a"), position("b", said="c", after="c")]}],
        "y": [{"gold": [position("b", said="c", after="d")]}],
    }
    assert frequent_mistakes(rows, 5) == [("x", 2, "b", "c", 3, 2), ("y", 1, "b", "c", 1, 0)]
    assert frequent_mistakes(rows, 1) == [("x", 2, "b", "c", 3, 2)]


def test_quantiles_are_those_of_all_values():
    found = magnitudes(pd.DataFrame({"domain": "a", "shift": range(101)})).set_index("share_of_tokens")["shift"]
    assert found[[0.1, 0.5]].tolist() == [10.0, 50.0]
