"""Estimates of ε_P² and σ_P², which need several draws of a Pilot: runs with other seeds, or passes with dropout.

Shapes: B batch, N target length, R target tokens, V vocabulary, D draws.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tcopilot.data.batch import Batch
from tcopilot.functional import token_errors
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.reporting.theorem.parabola import Parabola, products
from tcopilot.training.error_statistics import correct_targets

Scored = tuple[Tensor, Tensor]  # log p̂ [B, N, V] and f^C [B, N, V]


class PilotSpread:
    """Bias and variance of p̂ over draws of a Pilot, on the same target tokens.

    With p̂ of a token as the random variable, S² = E(p − p̂)² = (p − E p̂)² + Var p̂ = ε_P² + σ_P². The variance estimate
    is unbiased (divided by draws − 1) and ε_P² is S² minus it, so neither depends on the number of draws.
    """

    def __init__(self, kind: Literal["seeds", "dropout"], names: Sequence[str]) -> None:
        self.kind, self.names = kind, list(names)
        self._sums_D3 = torch.zeros(len(self.names), 3, dtype=torch.float64)  # for each draw: Σℓ², Σℓf, Σf²
        self._variance, self._tokens = 0.0, 0

    @torch.no_grad()
    def update(self, batch: Batch, draws: Iterable[Scored]) -> None:
        """Add a batch that every draw has scored, in order; only one draw is held in memory at a time."""
        mask_BN = batch.target_mask_BN
        targets_R, mean_RV, squares = batch.target_ids_BN[mask_BN], 0.0, 0.0
        for place, (log_probs_BNV, corrections_BNV) in enumerate(draws):
            probs_RV, corrections_RV = log_probs_BNV[mask_BN].double().exp(), corrections_BNV[mask_BN].double()
            errors_RV = token_errors(probs_RV, targets_R)
            sums = [kind_RV.sum() for kind_RV in products(errors_RV, corrections_RV)]
            self._sums_D3[place] += torch.stack(sums).cpu()
            away_RV = probs_RV - mean_RV  # by Welford's method equal draws have a variance of exactly 0
            mean_RV = mean_RV + away_RV / (place + 1)
            squares += (away_RV * (probs_RV - mean_RV)).sum().item()
        self._variance += squares / (len(self.names) - 1)
        self._tokens += len(targets_R)

    @property
    def sigma_sq(self) -> float:
        """σ_P², summed over the vocabulary, per target token."""
        return self._variance / self._tokens

    def summary(self) -> dict[str, Any]:
        """Return ε_P², σ_P² and their sum S², and the parabola of each draw."""
        parabolas = [Parabola(*(row / self._tokens).tolist()) for row in self._sums_D3]
        error = sum(parabola.error for parabola in parabolas) / len(parabolas)
        each = [{"name": name} | one.figures() for name, one in zip(self.names, parabolas, strict=True)]
        figures = {"pilot_error_sq": error, "epsilon_sq": error - self.sigma_sq, "sigma_sq": self.sigma_sq}
        return {"kind": self.kind, **figures, "draws": each}


def dropout_draws(model: TCopilotModel, batch: Batch, passes: int) -> Iterator[Scored]:
    """Score a batch with dropout active in the Pilot only; the Copilot reads the states of each pass."""
    model.pilot.train()
    try:
        for _ in range(passes):
            yield correct_targets(model, batch)
    finally:
        model.pilot.eval()
