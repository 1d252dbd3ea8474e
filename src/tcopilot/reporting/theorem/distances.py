"""Sums over held-out target tokens, and the figures of Theorem 4.1 that are computed from them.

Shapes: B batch, N target length, R target tokens, V vocabulary, L weights of the curve.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcopilot.data.batch import Batch
from tcopilot.functional import fuse_probabilities, token_errors
from tcopilot.models.error_input import CHUNK_ELEMENTS
from tcopilot.reporting.theorem import parabola
from tcopilot.reporting.theorem.parabola import EntrySums, Floats

WEIGHTS = (0.0, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0)  # λ of the measured curve, as in configs/fusion/probability.yaml
WORST = 5  # number of entries named in the verdict


class DistanceSums:
    """Sums over held-out target tokens that determine D(λ) at every λ, and D itself, measured at some λ.

    Tokens are not stored: a batch contributes sums for each vocabulary entry, by benchmark and position, and four sums
    for each example.
    """

    def __init__(self, vocabulary: int) -> None:
        self.cells: dict[tuple[int, int], EntrySums] = {}  # by benchmark and the position's power of two
        self.halves = (EntrySums(vocabulary), EntrySums(vocabulary))  # halves of each benchmark's rows
        self._random, self._second_of_pair = np.random.default_rng(0), {}
        self.direct_LV: Floats = np.zeros((len(WEIGHTS), vocabulary))
        self.fused_L: Floats = np.zeros(len(WEIGHTS))
        self.rows_B4: list[Floats] = []  # for each example: Σℓ², Σℓf, Σf², number of target tokens

    @torch.no_grad()
    def update(self, batch: Batch, log_probs_BNV: Tensor, corrections_BNV: Tensor) -> None:
        """Add the target tokens of a batch to the sums."""
        sums_B4 = torch.zeros(len(batch), 4, dtype=torch.float64, device=log_probs_BNV.device)
        half_B = torch.tensor(
            [self._half_of(name) for name in batch.benchmark_B.tolist()], device=log_probs_BNV.device
        )
        at_once = max(1, CHUNK_ELEMENTS // log_probs_BNV.shape[-1])
        for tokens_R2 in batch.target_mask_BN.nonzero().split(at_once):
            row_R, position_R = tokens_R2.unbind(1)
            targets_R = batch.target_ids_BN[row_R, position_R]
            log_probs_RV, corrections_RV = log_probs_BNV[row_R, position_R], corrections_BNV[row_R, position_R]
            probs_RV, exact_RV = log_probs_RV.double().exp(), corrections_RV.double()
            for place, weight in enumerate(WEIGHTS):  # p̂ + λ f^C, and the p̃ that decoding uses
                direct_RV = token_errors(probs_RV + weight * exact_RV, targets_R)
                fused_RV = fuse_probabilities(log_probs_RV, corrections_RV, weight).double().exp()
                self.direct_LV[place] += direct_RV.square().sum(0).cpu().numpy()
                self.fused_L[place] += token_errors(fused_RV, targets_R).square().sum().item()
            errors_RV = token_errors(probs_RV, targets_R)
            groups = [batch.benchmark_B[row_R], torch.frexp(position_R.double()).exponent, half_B[row_R]]
            for group in (groups_R3 := torch.stack(groups, dim=1)).unique(dim=0):
                chosen_R = (groups_R3 == group).all(dim=1)
                benchmark, span, half = group.tolist()
                cell = self.cells.setdefault((benchmark, span), EntrySums(errors_RV.shape[1]))
                for sums in (cell, self.halves[half]):
                    sums.add(errors_RV[chosen_R], exact_RV[chosen_R], targets_R[chosen_R])
            sums_R = [kind_RV.sum(1) for kind_RV in parabola.products(errors_RV, exact_RV)]
            sums_R.append(torch.ones_like(row_R, dtype=torch.float64))
            sums_B4.index_add_(0, row_R, torch.stack(sums_R, dim=1))
        self.rows_B4.append(sums_B4.cpu().numpy())

    def _half_of(self, benchmark: int) -> int:
        """Assign a row to a half at random. Of two successive rows, which are similarly long, each half gets one."""
        if benchmark not in self._second_of_pair:
            self._second_of_pair[benchmark] = int(self._random.integers(2))
            return 1 - self._second_of_pair[benchmark]
        return self._second_of_pair.pop(benchmark)

    def estimates(self, benchmarks: Sequence[str]) -> dict[str, Any]:
        """Return the figures of this Pilot and Copilot for `theorem.json`; see docs/theorem.md."""
        sums = EntrySums.of(self.halves)
        total, rows_R4 = sums.total, np.concatenate(self.rows_B4)
        epsilon, sigma = total.split_copilot_error()
        weight, energy = total.best_weight, total.error * sums.tokens
        pairs = (self.halves, self.halves[::-1])  # λ_v is chosen on one half, measured on the other
        removed = sum(there.removed(here.best_weights_V()) * there.sums_KV[2].sum() for here, there in pairs)
        held_out = {"removed_per_entry_held_out": float(removed / energy) if energy else 0.0}
        predicted_LV = np.stack([sums.distances_V(weight) for weight in WEIGHTS])
        direct_LV = self.direct_LV / sums.tokens
        curve = np.stack([WEIGHTS, predicted_LV.sum(1), direct_LV.sum(1), self.fused_L / sums.tokens], axis=1)

        def by(place: int, names: dict[int, str]) -> dict[str, Any]:
            """Return figures for parts of the tokens, by benchmark (0) or span of positions (1), at the common λ."""
            found = {}
            for part, name in names.items():
                some = EntrySums.of([cell_sums for cell, cell_sums in self.cells.items() if cell[place] == part])
                share = some.total.error * some.tokens / energy if energy else 0.0
                shown = {"tokens": some.tokens, "energy": share}
                found[name] = some.total.figures() | parabola.served_entries(some, weight) | shown
            return found

        return {
            "rows": len(rows_R4), "tokens": sums.tokens, "vocabulary": sums.sums_KV.shape[1],
            **total.figures(), "constant_error_sq": float(np.square(sums.sums_KV[1] / sums.tokens).sum()),
            "epsilon_copilot_sq": epsilon, "sigma_copilot_sq": sigma,
            "removed": sums.removed(weight), "intervals": parabola.row_intervals(rows_R4),
            "curve": curve.tolist(), "curve_error": float(np.abs(curve[:, 1] - curve[:, 2]).max()),
            "entry_curve_error": float(np.abs(predicted_LV - direct_LV).max()),
            "entries": parabola.served_entries(sums, weight) | held_out,
            "by_benchmark": by(0, dict(enumerate(benchmarks))),
            "by_position": by(1, {span: span_name(span) for span in sorted({span for _, span in self.cells})}),
        }  # fmt: skip

    def worst_entries(self, weight: float) -> list[tuple[int, float]]:
        """Return the entries whose distance λ increases most, with the increase per target token."""
        sums = EntrySums.of(self.halves)
        added_V = sums.distances_V(weight) - sums.distances_V(0.0)
        return [(int(v), float(added_V[v])) for v in np.argsort(-added_V)[:WORST] if added_V[v] > 0]


def span_name(span: int) -> str:
    """Name the 1-based positions whose 0-based number has `span` binary digits.

    >>> [span_name(span) for span in range(4)]
    ['1', '2', '3–4', '5–8']
    """
    return str(span + 1) if span < 2 else f"{2 ** (span - 1) + 1}–{2**span}"
