"""Fit a calibrated Pilot: one teacher-forced pass over the rows that λ is chosen on, then L-BFGS."""

from __future__ import annotations

import torch

from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.models.calibration import Observed
from tcopilot.processes import gather


def calibrate(evaluator: Evaluator, split: str = "validation") -> None:
    """Fit temperature and biases of the evaluator's model, whose Copilot is a `Calibration`, on a split.

    Tokens that train targets use get a bias. Every process observes its share of the rows, and all fit the same.

    Raises:
        DataError: if a benchmark has no rows there.
    """
    model, data = evaluator.model, evaluator.data
    tokens_A, seen = torch.tensor(data.target_tokens()), []
    for name in data.benchmark_names:
        for batch, log_probs_BNV, _ in evaluator.scored_batches(split, name):
            seen.append(Observed.of(log_probs_BNV, batch.target_ids_BN, batch.target_mask_BN, tokens_A))
    model.copilot.fit(Observed.joined(gather(seen)))
