"""Outcomes of rows: the answers of Pilot and fused model side by side, and which of the two was right."""

from pathlib import Path
from typing import NamedTuple

import pandas as pd

from tcopilot.evaluation.generation import Generation, Reranking
from tcopilot.evaluation.likelihood import Likelihood, Targets
from tcopilot.evaluation.predictions import Prediction, PredictionFiles
from tcopilot.evaluation.results import Gain, Results

OUTCOMES = ("fixed", "broken", "both right", "both wrong")


def read_predictions(results: Results, folder: Path, benchmark: str, weight: float) -> dict[int, Prediction]:
    """Return predictions of the deciding mode on the reported split at one λ, by row id; empty if there is no file."""
    gain = results.row_wise().get(benchmark)
    for suffix in (mode.suffix for mode in (Generation, Reranking, Likelihood, Targets)):
        found = PredictionFiles(folder, f"{results.reported_on}-{benchmark}{suffix}", [weight]).done()[weight]
        if found and (gain is None or all(gain.metric in prediction["scores"] for prediction in found.values())):
            return found
    return {}


class Answers(NamedTuple):
    """The answers of Pilot and fused model to one row, as texts."""

    benchmark: str
    id: int
    prompt: str
    target: str
    pilot: str
    fused: str
    outcome: str


def answers_of_both(results: Results, folder: Path, benchmark: str) -> list[Answers]:
    """Return the rows of the reported split that both models answered; the fused model uses the selected λ."""
    gain = results.row_wise().get(benchmark)
    pilot, fused = _predictions_of_both(results, folder, benchmark)
    return [
        Answers(
            benchmark, number, said["prompt"], said["target"], answer_text(said), answer_text(fused[number]),
            outcome(said, fused[number], gain),
        )
        for number, said in pilot.items()
        if number in fused
    ]  # fmt: skip


def answers_table(results: Results, folder: Path) -> pd.DataFrame:
    """Return both models' answers to all reported rows, with their scores in columns `pilot_<metric>` and so on."""
    rows = []
    for benchmark in results.benchmarks:
        both = dict(zip(("pilot", "fused"), _predictions_of_both(results, folder, benchmark), strict=True))
        for answers in answers_of_both(results, folder, benchmark):
            scores = {who: found[answers.id]["scores"] for who, found in both.items()}
            rows.append(
                answers._asdict() | {f"{who}_{name}": score for who in both for name, score in scores[who].items()}
            )
    return pd.DataFrame(rows)


def _predictions_of_both(results: Results, folder: Path, benchmark: str) -> list[dict[int, Prediction]]:
    weights = (0.0, results.weight_of(benchmark) or 0.0)
    return [read_predictions(results, folder, benchmark, weight) for weight in weights]


def answer_text(prediction: Prediction) -> str:
    """Return the answer as text: the generated one, the likeliest option, or the best items."""
    said = prediction["prediction_sum" if "prediction_sum" in prediction else "prediction"]
    return said if isinstance(said, str) else ", ".join(map(str, said))


def outcome(pilot: Prediction, fused: Prediction, gain: Gain | None = None) -> str:
    """Classify a row as one of `OUTCOMES` by the scores of both models' predictions.

    `gain` names the metric to compare by, see `Results.row_wise`; by default the first score, and higher is better.
    """
    metric = gain.metric if gain else next(iter(pilot["scores"]))
    higher_is_better = gain is None or gain.higher_is_better
    before, after = pilot["scores"][metric], fused["scores"][metric]
    if before == after:
        return "both right" if (before > 0) == higher_is_better else "both wrong"
    return "fixed" if (after > before) == higher_is_better else "broken"
