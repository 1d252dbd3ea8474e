"""Answers as the likeliest of the given options: the second way to evaluate.

Shapes: B batch, N target length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tcopilot.data.batch import Batch
from tcopilot.data.collate import PromptTargetCollator
from tcopilot.data.metrics import Metric
from tcopilot.evaluation.predictions import Prediction
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.training.error_statistics import correct_targets


@torch.no_grad()
def log_likelihoods(model: TCopilotModel, batch: Batch, weights: Sequence[float]) -> Tensor:
    """Return Σ log p̃ of the given targets, end token included.

    One pass serves all λ: neither p̂ nor f^C depends on it.

    Args:
        model: the fused model.
        batch: prompts and targets.
        weights: the λ.

    Returns:
        Sums over target tokens in nats, [λ, B], float64.
    """
    log_probs_BNV, corrections_BNV = correct_targets(model, batch)
    index_BN1 = batch.target_ids_BN.unsqueeze(-1)
    sums = []
    for weight in weights:
        of_targets_BN = model.fuse(log_probs_BNV, corrections_BNV, weight).gather(-1, index_BN1).squeeze(-1)
        sums.append((of_targets_BN.double() * batch.target_mask_BN).sum(-1))
    return torch.stack(sums)


class Likelihood:
    """Choose the option with the largest log-likelihood: of the whole text, and per token.

    The sum favours short options, the mean per token long ones; both are common, so both are reported, as
    `accuracy_sum` and `accuracy_mean`.

    Args:
        model: the fused model.
        collate: makes batches of rows.
        sequences: options scored at once.
    """

    suffix = "-likelihood"
    metrics = (Metric("accuracy_sum"), Metric("accuracy_mean"))

    def __init__(self, model: TCopilotModel, collate: PromptTargetCollator, sequences: int) -> None:
        self._model, self._collate, self._sequences = model, collate, sequences

    def rows_at_once(self, weights: int) -> int:
        """Rows of a batch; all λ share it."""
        return self._sequences

    def answer(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[Prediction]]:
        """Return one prediction per λ and row, with the log-likelihood of each option and the scores."""
        pairs = [row | {"target_ids": ids} for row in rows for ids in row["option_ids"]]
        parts = [pairs[first : first + self._sequences] for first in range(0, len(pairs), self._sequences)]
        found = [
            log_likelihoods(self._model, self._collate(part).to(self._model.device), weights).cpu() for part in parts
        ]
        return {
            weight: self._chosen(rows, sums)
            for weight, sums in zip(weights, torch.cat(found, 1).tolist(), strict=True)
        }

    def judged(self, prediction: Prediction) -> Prediction:
        """Return the prediction: its scores depend on no setting."""
        return prediction

    @staticmethod
    def _chosen(rows: Sequence[dict[str, Any]], sums: list[float]) -> list[Prediction]:
        remaining, predictions = iter(sums), []
        for row in rows:
            options = list(row["options"])
            totals = list(islice(remaining, len(options)))
            means = [total / len(ids) for total, ids in zip(totals, row["option_ids"], strict=True)]
            chosen = {name: values.index(max(values)) for name, values in (("sum", totals), ("mean", means))}
            gold = options.index(row["target"])
            predictions.append(
                {
                    **{key: row[key] for key in ("id", "prompt", "target", "answer")},
                    "log_likelihoods": totals,
                    **{f"prediction_{name}": options[place] for name, place in chosen.items()},
                    "scores": {f"accuracy_{name}": float(place == gold) for name, place in chosen.items()},
                }
            )
        return predictions
