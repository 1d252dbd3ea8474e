"""Does f^C estimate ℓ on rows that neither model was trained on? Error ratio, λ*, cosine, sizes, fused likelihood.

A Copilot that has collapsed to 0, or has memorised its log, looks fine on its training loss, but not here.

Shapes: B batch, N target length, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tcopilot.data.batch import Batch
from tcopilot.functional import best_weight, token_errors
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.fusion import FusionRule, ProbabilityFusion
from tcopilot.models.states import PilotStates, StatePooler, trace_pilot

PERCENTILES = (10, 50, 90)


@torch.no_grad()
def correct_targets(
    model: TCopilotModel, batch: Batch, states: PilotStates | None = None
) -> tuple[Tensor, Tensor | None]:
    """Score given targets in one pass, with the feedback that the model's decoding uses; its λ is not used.

    Args:
        model: the fused model.
        batch: rows with their targets.
        states: result of the Pilot's pass over the batch, if known; the Pilot then does not run again.

    Returns:
        log p̂ [B, N, V] in float32 and f^C [B, N, V]; f^C is None without a Copilot.
    """
    if states is None:
        states = trace_pilot(model.pilot, batch, StatePooler() if model.copilot is None else model.copilot.pooler)
    read = states.source_BMP, states.source_mask_BM, states.states_BNP
    return model.correct_text(states.logits_BNV, states.targets_BN[:, :-1], *read)


class ErrorStatistics:
    """Sums over target tokens, from teacher-forced passes, of the quantities in Theorem 4.1.

    `weights` are the λ at which the fused likelihood is wanted.
    """

    def __init__(self, weights: Sequence[float], fusion: FusionRule | None = None) -> None:
        self.weights = list(weights)
        self._fusion = fusion or ProbabilityFusion()
        self._sums = torch.zeros(7 + 3 * len(self.weights), dtype=torch.float64)
        self._norms: list[tuple[Tensor, Tensor]] = []  # of each batch: ‖ℓ‖ and ‖f^C‖ [2, B, N], mask [B, N]

    @torch.no_grad()
    def observe(self, model: TCopilotModel, batch: Batch) -> None:
        """Add a batch by a teacher-forced pass of a fused model, with the feedback that its decoding uses."""
        self.update(*correct_targets(model, batch), batch.target_ids_BN, batch.target_mask_BN)

    @torch.no_grad()
    def update(
        self, log_probs_BNV: Tensor, corrections_BNV: Tensor | None, targets_BN: Tensor, mask_BN: Tensor
    ) -> None:
        """Add a batch; `corrections_BNV` None stands for a bare Pilot."""
        errors_BNV = token_errors(log_probs_BNV.exp(), targets_BN)
        index = targets_BN.unsqueeze(-1)
        no_correction = torch.zeros_like(errors_BNV) if corrections_BNV is None else corrections_BNV
        per_token = [
            torch.ones_like(mask_BN, dtype=torch.float64),
            errors_BNV.square().sum(-1),
            no_correction.square().sum(-1),
            (errors_BNV * no_correction).sum(-1),
            -log_probs_BNV.gather(-1, index).squeeze(-1),
        ]
        self._norms.append((torch.stack([v.float() for v in per_token[1:3]]).sqrt(), mask_BN))  # no sync now
        for weight in self.weights:
            fused_BNV = self._fusion.fuse(log_probs_BNV, corrections_BNV, weight)
            per_token.append(-fused_BNV.gather(-1, index).squeeze(-1))
        of_all = torch.stack([(value.double() * mask_BN).sum() for value in per_token])
        tokens_B = mask_BN.sum(1).double()
        rows_WB = torch.stack([(nll_BN.double() * mask_BN).sum(1) for nll_BN in per_token[5:]])
        of_rows = torch.stack([(tokens_B > 0).sum().double(), tokens_B.square().sum()])
        sums = torch.cat([of_all, of_rows, rows_WB.square().sum(1), rows_WB @ tokens_B])
        self._sums = self._sums.to(sums.device) + sums

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add up the sums of all ranks; a rank without rows must call this too."""
        self._sums = sum_over_ranks(self._sums)

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """The statistics of several benchmarks together."""
        parts = list(parts)
        total = cls(parts[0].weights, parts[0]._fusion)
        total._sums = sum(part._sums.cpu() for part in parts)
        total._norms = [norms for part in parts for norms in part._norms]
        return total

    def norms(self) -> dict[str, Tensor]:
        """‖ℓ‖ (`error_norm`) and ‖f^C‖ (`correction_norm`) of each target token that this rank saw, on the CPU."""
        seen = [norms_2BN[:, mask_BN].cpu() for norms_2BN, mask_BN in self._norms]
        error, correction = torch.cat(seen, dim=1) if seen else torch.zeros(2, 0)
        return {"error_norm": error, "correction_norm": correction}

    def nll(self) -> dict[float, float]:
        """Mean −log p̃_y per target token, in nats, for each λ."""
        means = self._sums[5 : 5 + len(self.weights)] / self._sums[0]
        return dict(zip(self.weights, means.tolist(), strict=True))

    def nll_intervals(self) -> dict[float, tuple[float, float]]:
        """95 % intervals of `nll`, by the normal approximation over rows, since a row's tokens are dependent."""
        count, tokens = len(self.weights), self._sums[0]
        mean, (rows, squares) = self._sums[5 : 5 + count] / tokens, self._sums[5 + count : 7 + count]
        of_rows, with_tokens = self._sums[7 + count :].split(count)
        residual = of_rows - 2 * mean * with_tokens + mean.square() * squares  # Σ over rows (NLL − mean · tokens)²
        half = 1.96 * (residual.clamp_min(0) * rows / (rows - 1).clamp_min(1)).sqrt() / tokens
        return dict(zip(self.weights, zip((mean - half).tolist(), (mean + half).tolist(), strict=True), strict=True))

    @property
    def tokens(self) -> int:
        """Target tokens seen, over all ranks after `reduce`."""
        return int(self._sums[0].item())

    @property
    def best_weight(self) -> float:
        """λ* in closed form (Theorem 4.1)."""
        tokens, _, correction, inner = self._sums[:4].tolist()
        return best_weight(inner / tokens, correction / tokens) if tokens else 0.0

    def summary(self) -> dict[str, float]:
        """Means per target token, over all ranks after `reduce`; quantiles are of this rank's target tokens.

        `error_energy` is E‖ℓ‖², `correction_energy` E‖f^C‖² and `error_ratio` E‖f^C−ℓ‖² / E‖ℓ‖²; below 1, f^C is
        closer to ℓ than 0 is. `fused_nll` is at the first λ, `error_norm_p10` to `_p90` are quantiles of ‖ℓ‖.
        """
        points = [percent / 100 for percent in PERCENTILES]
        quantiles = {
            f"{name}_p{percent}": value
            for name, norms in self.norms().items()
            if len(norms)
            for percent, value in zip(PERCENTILES, np.quantile(norms.numpy(), points).tolist(), strict=True)
        }
        tokens, energy, correction, inner, pilot_nll = self._sums[:5].tolist()
        norm = (energy * correction) ** 0.5
        return {
            "pilot_nll": pilot_nll / tokens,
            "fused_nll": self._sums[5].item() / tokens,
            "error_energy": energy / tokens,
            "correction_energy": correction / tokens,
            "error_ratio": (energy - 2 * inner + correction) / energy if energy else 1.0,
            "cosine": inner / norm if norm else 0.0,
            "best_weight": self.best_weight,
            **quantiles,
        }
