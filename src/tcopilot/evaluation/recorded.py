"""Evaluation by likelihood alone, from a recording: neither answers nor the Pilot's layers are needed.

It tells Copilots apart in seconds, as a sweep over them asks for; `eval.py` then answers the rows with the one chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tcopilot.data.metrics import NLL
from tcopilot.evaluation.evaluate import Evaluation
from tcopilot.evaluation.results import Gain, Row, direction_and_unit
from tcopilot.evaluation.selection import by_likelihood
from tcopilot.evaluation.significance import compare, interval_of
from tcopilot.mistake_log.recording import Recording, row_key
from tcopilot.models.families import logits_from_head_input
from tcopilot.models.fused_model import TCopilotModel

TOKENS_AT_ONCE = 256  # whose distributions are in memory together

Rows = Sequence[Mapping[str, Any]]


def evaluate_recorded(
    model: TCopilotModel, recording: Recording, rows: Mapping[str, Mapping[str, Rows]], weights: Sequence[float]
) -> Evaluation:
    """Score the recorded targets at every λ, and choose λ by the likelihood of the first split.

    Figures are means over rows of each row's mean over its target tokens, so that rows can be compared in pairs.

    Args:
        model: the fused model, of whose Pilot the head alone takes part.
        recording: with all of the rows.
        rows: split to benchmark to prepared rows; λ is chosen on the first split, and the last one is reported.
        weights: λ to choose from; 0 is always tried, and a single one is taken as it is.
    """
    found, largest = Evaluation(), model.fusion.largest_weight(model.copilot.head.is_difference)
    tried = sorted({0.0, *(float(weight) for weight in weights if weight <= largest or len(weights) == 1)})
    chosen_on, reported = next(iter(rows)), list(rows)[-1]
    values: dict[str, dict[str, Tensor]] = {}
    for split, parts in rows.items():
        sums = {name: _row_sums(model, recording, part, tried) for name, part in parts.items()}
        values[split] = {name: of_name[:, :-1] / of_name[:, -1:] for name, of_name in sums.items()}
        for place, weight in enumerate(tried):
            for name, means in values[split].items():
                found.rows.append(_row(name, split, weight, means[:, place].tolist()))
        if split == chosen_on:
            total = dict(zip(tried, torch.cat(list(sums.values()))[:, :-1].sum(0).tolist(), strict=True))
            found.selected_weight = float(weights[0]) if len(weights) == 1 else by_likelihood(total)
    best = tried.index(found.selected_weight)
    for name, means in values[reported].items():
        comparison = compare(means[:, 0].tolist(), means[:, best].tolist(), lower_is_better=True)
        found.gain.append(Gain.of(name, NLL, comparison))
        found.verdicts.append(f"{name}, {NLL.name}: {comparison.verdict}")
    model.weight = found.selected_weight
    return found


@torch.no_grad()
def _row_sums(model: TCopilotModel, recording: Recording, rows: Rows, weights: Sequence[float]) -> Tensor:
    """Of each row, Σ −log p̃_y at every λ, and its number of target tokens: [R, W + 1], float64."""
    copilot, device, sums = model.copilot.eval(), model.pilot.get_output_embeddings().weight.device, []
    for row in rows:
        record = recording.record_of(row_key(row), copilot.config.depths)
        record = {name: value.to(device) for name, value in record.items()}
        states_1NQ = record["states"].float()[None]
        hidden_1NC, _ = copilot(states_1NQ.new_empty(1, states_1NQ.shape[1], 0), None, None, states_1NQ)
        of_row = torch.zeros(len(weights) + 1, dtype=torch.float64)
        for first in range(0, states_1NQ.shape[1], TOKENS_AT_ONCE):
            part = slice(first, first + TOKENS_AT_ONCE)
            logits_NV = logits_from_head_input(model.pilot, record["head_input"][part]).float()
            log_probs_1NV = (logits_NV - record["normaliser"][part, None])[None]
            corrections_1NV = copilot.correct(hidden_1NC[:, part], log_probs_1NV)
            index_1N1 = record["targets"][part][None, :, None]
            for place, weight in enumerate(weights):
                fused_1NV = model.fuse(log_probs_1NV, corrections_1NV, weight)
                of_row[place] -= fused_1NV.gather(-1, index_1N1).double().sum().cpu()
        of_row[-1] = states_1NQ.shape[1]
        sums.append(of_row)
    return torch.stack(sums)


def _row(name: str, split: str, weight: float, values: list[float]) -> Row:
    mean = sum(values) / len(values)
    return Row(name, split, NLL.name, weight, mean, len(values), interval_of(NLL, values), **direction_and_unit(NLL))
