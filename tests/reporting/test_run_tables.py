"""The tables that a run prints, from its results."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from written_results import equal_time_control, some_results

from tcopilot.evaluation.results import Control, Results, Row, Selection
from tcopilot.reporting.run_tables import gain_table, weight_table


@pytest.fixture
def results() -> Results:
    return some_results()


@pytest.fixture
def control() -> Control:
    return equal_time_control()


def text(table) -> str:
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(table)
    return console.export_text()


def line(table, *words: str) -> str:
    """Return the only printed line that holds all the words."""
    (found,) = (line for line in text(table).splitlines() if all(word in line for word in words))
    return found


def test_gain_table_shows_percent_points_and_verdict(results):
    shown = line(gain_table(results), "accuracy")
    for cell in ("41.25 %", "43.75 %", "+2.50 [+1.01, +3.99]", "60 / 27", "0.00052", "1319", " 0.5 ", " better"):
        assert cell in shown
    assert "500 rounds, 62 s; λ chosen on validation" in text(gain_table(results))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("nll", "λ chosen on validation"),
        ("constant", "λ taken as a constant"),
        ("kept", "λ kept from the training run"),
    ],
)
def test_tables_say_that_a_weight_was_chosen_only_where_it_was(results, rule, said):
    taken = Selection(rule, "all", 0.5, True, None, None, None, None, None)
    results = replace(results, selection=[taken, Selection("metric", "all", 0.3, False, None, None, None, None, None)])
    for table in (gain_table(results), weight_table(results)):
        assert said in text(table)


def test_rows_that_were_trained_on_are_named_beneath_the_gain(results):
    assert "trained on" not in text(gain_table(results))
    parts = {"gsm8k/test": {"rows": 1319, "trained_on": 20}, "gsm8k/validation": {"rows": 500, "trained_on": 3}}
    results.data = parts
    assert "gsm8k: 20 of 1319 rows ask what was trained on" in text(gain_table(results))


def test_the_number_of_rows_is_that_of_the_reported_split_also_where_the_weight_was_chosen(results):
    results.rows = [replace(row, n=77) if row.split == "validation" else row for row in results.rows]
    assert " 1319 " in line(gain_table(results), "accuracy")
    results.reported_on = "validation"
    assert " 77 " in line(gain_table(results), "accuracy")


def test_nats_are_plain_numbers_and_lower_is_better(results):
    shown = line(gain_table(results), "nll")
    for cell in ("1.2346", "1.1111", "-0.1235 [-0.2000, -0.0500]", " better"):
        assert cell in shown
    assert "%" not in shown


def test_controls_stand_beneath_with_their_cost(results, control):
    results.controls.append(control)
    table = gain_table(results)
    shown = line(table, "Pilot, equal time")
    for cell in ("41.25 %", "44.25 %", "+3.00", "812", "61", "1319"):
        assert cell in shown
    assert text(table).index("nll") < text(table).index("seconds") < text(table).index("Pilot, equal time")


def test_what_was_spent_stands_beside_what_it_brought(results, control):
    results.train_flops, results.controls = 9.12e11, [replace(control, train_flops=3.4567e14)]
    table = gain_table(results)
    assert "500 rounds, 62 s, 0.912 TFLOPs; λ chosen on validation" in text(table)
    assert column_of(table, " 346 ") == column_of(table, "TFLOPs │")


def test_tables_survive_missing_rows(results, control):
    results.rows, results.selected_weight, results.controls = [], {}, [control]
    assert "43.75 %" in line(gain_table(results), "43.75")
    assert "44.25 %" in line(gain_table(results), "equal time")
    assert "λ" in text(weight_table(results))


def test_weight_table_is_the_curve_with_the_selected_weight_marked(results):
    table = weight_table(results)
    for split, metric, cell in (
        ("validation", "acc", "45.34 %"),
        ("test", "acc", "43.75 %"),
        ("test", "nll", "1.1111"),
    ):
        assert cell in line(table, split, metric, cell)
    assert column_of(table, "45.34 %") == column_of(table, "λ = 0.5") == column_of(table, "(selected)")
    assert column_of(table, "40.12 %") == column_of(table, "λ = 0 ") != column_of(table, "(selected)")


def column_of(table, cell: str) -> int:
    """In which column a text stands, by the borders before it."""
    found = next(row for row in text(table).splitlines() if cell in row)
    return found[: found.index(cell)].replace("┃", "│").count("│")


def test_weight_table_marks_each_benchmark(results):
    results.rows.append(Row("svamp", "validation", "accuracy", 0.3, 0.77, 100, (0.7, 0.8)))
    results.selected_weight = {"gsm8k": 0.5, "svamp": 0.3}
    table = weight_table(results)
    assert column_of(table, "(svamp)") == column_of(table, "77.00 %") == column_of(table, "λ = 0.3")
    assert column_of(table, "(gsm8k)") == column_of(table, "45.34 %") == column_of(table, "λ = 0.5")


def test_a_weight_table_of_many_weights_keeps_names_and_figures_whole(results):
    weights = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0)
    nll = [Row("all", "test", "nll", w, 0.5029, 9000, (0.4, 0.6), False, "nats") for w in weights]
    results.rows = [Row("word_problems", "test", "accuracy", w, 0.8685, 2000, (0.8, 0.9)) for w in weights] + nll
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(weight_table(results))
    printed = console.export_text()
    assert "word_problems" in printed
    assert printed.count("86.85 %") == printed.count("0.5029") == len(weights)
    assert "nll, nats" in printed
