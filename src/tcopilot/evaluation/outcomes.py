"""What became of a row: the answers of Pilot and fused model side by side, and which of the two was right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tcopilot.evaluation.generation import Generation
from tcopilot.evaluation.likelihood import Likelihood
from tcopilot.evaluation.predictions import Prediction
from tcopilot.evaluation.results import Results

OUTCOMES = ("fixed", "broken", "both right", "both wrong")


def read_predictions(results: Results, folder: Path, benchmark: str, weight: float) -> dict[int, Prediction]:
    """Row id to prediction on the reported split at one λ, of the mode that decided; empty if there is no file."""
    metric = next((gain.metric for gain in results.gain if gain.benchmark == benchmark), None)
    for suffix in (Generation.suffix, Likelihood.suffix):
        file = folder / f"{results.reported_on}-{benchmark}{suffix}-weight={weight:g}.jsonl"
        if file.exists():
            found = {line["id"]: line for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
            if metric is None or all(metric in prediction["scores"] for prediction in found.values()):
                return found
    return {}


def answer_text(prediction: Prediction) -> str:
    """What was said: a text, the likeliest option, or the best items."""
    said = prediction["prediction_sum" if "prediction_sum" in prediction else "prediction"]
    return said if isinstance(said, str) else ", ".join(map(str, said))


def outcome(pilot: Mapping[str, float], fused: Mapping[str, float]) -> str:
    """One of `OUTCOMES`, from the first score of each, which is the one that decides on λ."""
    before, after = next(iter(pilot.values())), next(iter(fused.values()))
    if before == after:
        return "both right" if before > 0 else "both wrong"
    return "fixed" if after > before else "broken"
