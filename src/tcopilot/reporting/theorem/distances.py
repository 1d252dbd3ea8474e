"""The sums over held-out target tokens that the theorem's figures follow from, and the figures themselves.

Shapes: B batch, N target length, R target tokens, V vocabulary, L weights of the curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcopilot.data.batch import Batch
from tcopilot.functional import fuse_probabilities, token_errors
from tcopilot.models.error_input import CHUNK_ELEMENTS
from tcopilot.reporting.theorem.parabola import (
    EntrySums,
    Floats,
    products,
    removed_on_other_half,
    row_intervals,
    served_entries,
)  # fmt: skip

WEIGHTS = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0)  # λ of the measured curve: those of configs/fusion/probability.yaml
WORST = 5  # entries that are named


class DistanceSums:
    """Sums over held-out target tokens from which D(λ) follows at every λ, and D itself at some.

    No token is kept: what remains of a batch are sums for each entry, by benchmark and position, and four for each
    example.

    Args:
        vocabulary: V.
    """

    def __init__(self, vocabulary: int) -> None:
        self.cells: dict[tuple[int, int], EntrySums] = {}  # by benchmark and power of two of the position
        self.halves = (EntrySums(vocabulary), EntrySums(vocabulary))  # of the rows with an even and an odd id
        self.direct_LV: Floats = np.zeros((len(WEIGHTS), vocabulary))
        self.fused_L: Floats = np.zeros(len(WEIGHTS))
        self.rows_B4: list[Floats] = []  # of each example Σℓ², Σℓf, Σf² and its target tokens

    @torch.no_grad()
    def update(self, batch: Batch, log_probs_BNV: Tensor, corrections_BNV: Tensor) -> None:
        """Add a batch."""
        sums_B4 = torch.zeros(len(batch), 4, dtype=torch.float64, device=log_probs_BNV.device)
        at_once = max(1, CHUNK_ELEMENTS // log_probs_BNV.shape[-1])
        for tokens_R2 in batch.target_mask_BN.nonzero().split(at_once):
            row_R, position_R = tokens_R2.unbind(1)
            targets_R = batch.target_ids_BN[row_R, position_R]
            log_probs_RV, corrections_RV = log_probs_BNV[row_R, position_R], corrections_BNV[row_R, position_R]
            self._measure(log_probs_RV, corrections_RV, targets_R)
            corrections_RV = corrections_RV.double()
            errors_RV = token_errors(log_probs_RV.double().exp(), targets_R)
            groups = [batch.benchmark_B[row_R], torch.frexp(position_R.double()).exponent, batch.ids_B[row_R] % 2]
            for group in (groups_R3 := torch.stack(groups, dim=1)).unique(dim=0):
                chosen_R = (groups_R3 == group).all(dim=1)
                benchmark, span, half = group.tolist()
                cell = self.cells.setdefault((benchmark, span), EntrySums(errors_RV.shape[1]))
                for sums in (cell, self.halves[half]):
                    sums.add(errors_RV[chosen_R], corrections_RV[chosen_R], targets_R[chosen_R])
            sums_R = [kind_RV.sum(1) for kind_RV in products(errors_RV, corrections_RV)]
            sums_R.append(torch.ones_like(row_R, dtype=torch.float64))
            sums_B4.index_add_(0, row_R, torch.stack(sums_R, dim=1))
        self.rows_B4.append(sums_B4.cpu().numpy())

    def _measure(self, log_probs_RV: Tensor, corrections_RV: Tensor, targets_R: Tensor) -> None:
        """Add the distances of p̂ + λ f^C, and of the p̃ that decoding uses, at every λ of the curve."""
        probs_RV, exact_RV = log_probs_RV.double().exp(), corrections_RV.double()
        for place, weight in enumerate(WEIGHTS):
            direct_RV = token_errors(probs_RV + weight * exact_RV, targets_R)
            fused_RV = fuse_probabilities(log_probs_RV, corrections_RV, weight).double().exp()
            self.direct_LV[place] += direct_RV.square().sum(0).cpu().numpy()
            self.fused_L[place] += token_errors(fused_RV, targets_R).square().sum().item()

    def parts(self, place: int, names: dict[int, str]) -> dict[str, EntrySums]:
        """Sums by benchmark (`place` 0) or by span of positions (1), under their names."""
        return {
            name: EntrySums.of([sums for cell, sums in self.cells.items() if cell[place] == part])
            for part, name in names.items()
        }

    def estimates(self, benchmarks: Sequence[str]) -> dict[str, Any]:
        """What `theorem.json` says of this Pilot and its Copilot; see docs/theorem.md."""
        sums = EntrySums.of(self.halves)
        total, rows_R4 = sums.total, np.concatenate(self.rows_B4)
        epsilon, sigma = total.split_copilot_error()
        held_out = {"removed_per_entry_held_out": removed_on_other_half(self.halves)}
        weight = total.best_weight
        predicted_LV = np.stack([sums.distances_V(weight) for weight in WEIGHTS])
        direct_LV = self.direct_LV / sums.tokens
        curve = np.stack([WEIGHTS, predicted_LV.sum(1), direct_LV.sum(1), self.fused_L / sums.tokens], axis=1)
        spans = {span: span_name(span) for span in sorted({span for _, span in self.cells})}
        return {
            "rows": len(rows_R4), "tokens": sums.tokens, "vocabulary": sums.sums_KV.shape[1],
            **total.figures(), "constant_error_sq": sums.constant_error,
            "epsilon_copilot_sq": epsilon, "sigma_copilot_sq": sigma,
            "removed": sums.removed(weight), "intervals": row_intervals(rows_R4),
            "curve": curve.tolist(), "curve_error": float(np.abs(curve[:, 1] - curve[:, 2]).max()),
            "entry_curve_error": float(np.abs(predicted_LV - direct_LV).max()),
            "entries": served_entries(sums, weight) | held_out,
            "by_benchmark": _parts(self.parts(0, dict(enumerate(benchmarks))), weight, total.error * sums.tokens),
            "by_position": _parts(self.parts(1, spans), weight, total.error * sums.tokens),
        }  # fmt: skip

    def worst_entries(self, weight: float) -> list[tuple[int, float]]:
        """The entries whose distance λ raises most, with the rise per target token."""
        sums = EntrySums.of(self.halves)
        added_V = sums.distances_V(weight) - sums.distances_V(0.0)
        return [(int(v), float(added_V[v])) for v in np.argsort(-added_V)[:WORST] if added_V[v] > 0]


def span_name(span: int) -> str:
    """Name the 1-based positions whose 0-based number has `span` binary digits.

    >>> [span_name(span) for span in range(4)]
    ['1', '2', '3–4', '5–8']
    """
    return str(span + 1) if span < 2 else f"{2 ** (span - 1) + 1}–{2**span}"


def _parts(parts: dict[str, EntrySums], weight: float, energy: float) -> dict[str, Any]:
    """The figures of parts of the tokens, at the λ of all; `energy` is the error energy of all."""
    return {
        name: sums.total.figures() | served_entries(sums, weight)
        | {"tokens": sums.tokens, "energy": sums.total.error * sums.tokens / energy if energy else 0.0}
        for name, sums in parts.items()
    }  # fmt: skip
