"""Costs from timings, and floors that follow from counts of weights."""

import pandas as pd
import pytest

from tcopilot.reporting.report.overhead import Cost, decoding_costs, decoding_floor, training_cost, training_floor

DECODER = {"encoder": 0, "decoder": 100, "copilot": 100}
ENCODER = {"encoder": 100, "decoder": 100, "copilot": 100}


def test_training_cost_is_read_from_the_last_timed_line():
    lines = [{"time/pilot_seconds": 1.0, "time/copilot_seconds": 9.0}, {"round": 1.0}]
    lines.insert(1, {"time/pilot_seconds": 4.0, "time/copilot_seconds": 2.0})
    assert training_cost(pd.DataFrame(lines), 1.2) == Cost("training", 4.0, 6.0, 1.5, 1.2)
    assert training_cost(pd.DataFrame([{"round": 1.0}]), 1.2) is None


def test_a_copilot_as_large_as_its_pilot_doubles_what_targets_cost_and_nothing_else():
    assert training_floor(DECODER, source=0, target=5, updates=1) == 2
    assert training_floor(DECODER, source=5, target=5, updates=1) == 1.5
    assert training_floor(ENCODER, source=5, target=5, updates=4) == 3


def test_a_step_of_decoding_reads_all_weights_and_an_encoder_is_read_once():
    assert decoding_floor(DECODER, source=0, target=7) == 2
    assert decoding_floor(ENCODER, source=1, target=1) == 1.5
    assert decoding_floor(ENCODER, source=1000, target=1) == pytest.approx(1 + 100 / 100_100)


def test_decoding_costs_leave_out_benchmarks_that_only_rank():
    timed = {"rows_at_once": 16, "pilot": 2.0, "fused": 3.0}
    meta = {"parameters": DECODER, "benchmarks": {"a": {"decoding": timed}, "b": {"decoding": None}}}
    rows = {"a": [{"source_tokens": 3, "emitted": [0]}], "b": []}
    assert decoding_costs(meta, rows) == [Cost("decoding a", 2.0, 3.0, 1.5, 1.25)]
