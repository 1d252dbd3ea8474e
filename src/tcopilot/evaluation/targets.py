"""No answers, but the given targets, by teacher forcing: the third way to evaluate, and the cheapest.

Shapes: B batch, N target length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from tcopilot.data.metrics import NLL, Answer, Metric
from tcopilot.evaluation.modes import TeacherForced, about
from tcopilot.evaluation.predictions import Prediction

EXACT = Metric("exact")
"""Whether each target token is the likeliest after those before it, the end token included: then, and only then, does
greedy decoding give precisely the target."""


NOT_DECODED = "(another text, not decoded)"
"""What stands in tables for an answer that is only known to differ from the target."""


class Targets(TeacherForced):
    """Score each row's target: `exact`, and its mean `nll` per token."""

    suffix: ClassVar[str] = "-targets"
    metrics: ClassVar[tuple[Metric, ...]] = (EXACT, NLL)

    @torch.no_grad()
    def answer(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[Prediction]]:
        """Return one prediction per λ and row, with its scores."""
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
        """Only whether the answer would have been the target is known."""
        return Answer(prediction["prediction"], None, prediction["target"], prediction["scores"][EXACT.name] == 1.0)
