"""Results as a run writes them, with made-up figures."""

from tcopilot.data.metrics import NLL
from tcopilot.evaluation.results import Control, Gain, Results, Row, direction_and_unit


def some_results() -> Results:
    """Results of one benchmark at two λ, with a gain in accuracy and in likelihood."""

    def row(metric: str, split: str, weight: float, value: float) -> Row:
        described = direction_and_unit(NLL) if metric == "nll" else {}
        return Row("gsm8k", split, metric, weight, value, 1319, (value - 0.02, value + 0.02), **described)

    return Results(
        seed=3,
        git="abc-dirty",
        config="config.yaml",
        params={"pilot": 100, "copilot": 20, "pilot_trainable": 100, "copilot_trainable": 20},
        rounds=500,
        train_seconds=61.7,
        selected_weight=0.5,
        selected_on="validation",
        reported_on="test",
        rows=[
            row("accuracy", "validation", 0.0, 0.4012),
            row("accuracy", "validation", 0.5, 0.4534),
            row("accuracy", "test", 0.0, 0.4125),
            row("accuracy", "test", 0.5, 0.4375),
            row("nll", "test", 0.0, 1.23456),
            row("nll", "test", 0.5, 1.11111),
        ],
        gain=[
            Gain("gsm8k", "accuracy", 0.4125, 0.4375, 0.025, (0.0101, 0.0399), 60, 27, 0.00052),
            Gain("gsm8k", "nll", 1.23456, 1.11111, -0.12345, (-0.2, -0.05), 900, 419, 0.0002, False, "nats"),
        ],
        notes=["λ was swept on 500 rows."],
    )


def equal_time_control() -> Control:
    """A control of theirs."""
    figure = ("gsm8k", "test", "accuracy", 0.4425, 1319, (0.41, 0.47))
    return Control(*figure, name="Pilot, equal time", rounds=812, train_seconds=61.2)
