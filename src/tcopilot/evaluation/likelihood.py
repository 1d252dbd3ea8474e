"""Modes that score given texts by teacher forcing and generate nothing: the likeliest option is the answer, or only
the targets are scored, which is the cheapest evaluation.

Shapes: B batch, N target length, V vocabulary.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from tcopilot.data.metrics import NLL, Answer, Metric
from tcopilot.data.prepare import option_rows
from tcopilot.evaluation.modes import Scored, TeacherForced, about, parts_to_score
from tcopilot.evaluation.predictions import Prediction
from tcopilot.models.fused_model import TCopilotModel

EXACT = Metric("exact")
"""Whether every target token, including the end token, is the likeliest one given the tokens before it, i.e. whether
greedy decoding would give exactly the target."""
NOT_DECODED = "(another text, not decoded)"
"""The text shown for an answer of which only is known that it differs from the target."""


def log_likelihoods(model: TCopilotModel, scored: Scored, weights: Sequence[float]) -> Tensor:
    """Return Σ log p̃ of a batch's targets, including the end token, at each λ: [λ, B] in nats, float64.

    One forward pass serves all λ, because neither p̂ nor f^C depends on λ.
    """
    batch, log_probs_BNV, corrections_BNV = scored
    index_BN1 = batch.target_ids_BN.unsqueeze(-1)
    sums = []
    for weight in weights:
        of_targets_BN = model.fuse(log_probs_BNV, corrections_BNV, weight).gather(-1, index_BN1).squeeze(-1)
        sums.append((of_targets_BN.double() * batch.target_mask_BN).sum(-1))
    return torch.stack(sums)


class Likelihood(TeacherForced):
    """Choose the option with the largest log-likelihood, by the sum over its tokens and by the mean per token.

    The sum favours short options and the mean long ones; both are in common use, so both are reported, as
    `accuracy_sum` and `accuracy_mean`.
    """

    suffix = "-likelihood"
    metrics = (Metric("accuracy_sum"), Metric("accuracy_mean"))

    @torch.no_grad()
    def answer(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[Prediction]]:
        """Return one prediction per λ and row, with the log-likelihood of each option and the scores."""
        pairs = [pair for row in rows for pair in option_rows(row)]
        parts = parts_to_score(self.model, pairs, self.decoding.batch_size)
        found = [log_likelihoods(self.model, self.score(part), weights).cpu() for part in parts]
        return {
            weight: self._chosen(rows, sums)
            for weight, sums in zip(weights, torch.cat(found, 1).tolist(), strict=True)
        }

    def read(self, prediction: Prediction) -> Answer:
        """Return the option with the largest sum as the answer."""
        option, target = prediction["prediction_sum"], prediction["target"]
        return Answer(option, option, target, option == target)

    @staticmethod
    def _chosen(rows: Sequence[dict[str, Any]], sums: list[float]) -> list[Prediction]:
        remaining, predictions = iter(sums), []
        for row in rows:
            options = list(row["options"])
            totals = list(islice(remaining, len(options)))
            means = [total / len(ids) for total, ids in zip(totals, row["option_ids"], strict=True)]
            chosen = {name: options[values.index(max(values))] for name, values in (("sum", totals), ("mean", means))}
            predictions.append(
                about(row)
                | {"log_likelihoods": totals}
                | {f"prediction_{name}": option for name, option in chosen.items()}
                | {"scores": {f"accuracy_{name}": float(option == row["target"]) for name, option in chosen.items()}}
            )
        return predictions


class Targets(TeacherForced):
    """Score each row's target by `exact` and by its mean `nll` per token."""

    suffix: ClassVar[str] = "-targets"
    metrics: ClassVar[tuple[Metric, ...]] = (EXACT, NLL)

    @torch.no_grad()
    def answer(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[Prediction]]:
        """Return one prediction per λ and row, with its scores."""
        parts = [self._scored(part, weights) for part in parts_to_score(self.model, rows, len(rows))]
        return {weight: [one for part in parts for one in part[weight]] for weight in weights}

    def _scored(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[Prediction]]:
        batch, log_probs_BNV, corrections_BNV = self.score(rows)
        mask_BN, index_BN1 = batch.target_mask_BN, batch.target_ids_BN.unsqueeze(-1)
        found = {}
        for weight in weights:
            fused_BNV = self.model.fuse(log_probs_BNV, corrections_BNV, weight)
            exact_B = ((fused_BNV.argmax(-1) == batch.target_ids_BN) | ~mask_BN).all(-1).float()
            nll_BN = -fused_BNV.gather(-1, index_BN1).squeeze(-1).double() * mask_BN
            nll_B = nll_BN.sum(-1) / mask_BN.sum(-1).clamp_min(1)
            scores = zip(exact_B.tolist(), nll_B.tolist(), strict=True)
            found[weight] = [
                about(row)
                | {"prediction": row["target"] if exact else NOT_DECODED, "scores": {EXACT.name: exact, NLL.name: nll}}
                for row, (exact, nll) in zip(rows, scores, strict=True)
            ]
        return found

    def read(self, prediction: Prediction) -> Answer:
        """Return an answer that is right if `exact` is 1; its text is known only in that case."""
        return Answer(prediction["prediction"], None, prediction["target"], prediction["scores"][EXACT.name] == 1.0)
