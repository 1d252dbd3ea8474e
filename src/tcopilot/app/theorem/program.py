"""`tcopilot-theorem`: Theorem 4.1 on held-out data, for every vocabulary entry and over all.

The theorem: if the Copilot's error ε_C is below S = sqrt(ε_P² + σ_P²), every λ in (0, λ0) lowers the expected squared
distance to p. It is estimated on teacher-forced target tokens, with p the one-hot target (docs/theorem.md says what
that changes). `<run dir>/theorem.json` holds, summed over the vocabulary and per target token:

- `run`, `split`, `rows`, `tokens`, `vocabulary`, and the `verdict` in sentences;
- `pilot_error_sq` S² = E‖p − p̂‖², and `constant_error_sq`, the part that one constant for each entry would remove;
- `copilot_error_sq` E‖f^C − ℓ‖² = `epsilon_copilot_sq` ε_C² (a multiple of ℓ) + `sigma_copilot_sq` σ_C² (the rest);
- `lambda_star` λ*, `zero_crossing` 2B/C (≤ 0: f^C points away; null: f^C is 0), `lambda_0` λ0 (null: no promise), with
  95 % `intervals` by the bootstrap over examples, and `removed`, the share of S² that λ* removes;
- `curve`: [λ, predicted, direct, fused] distances: by the parabola, of p̂ + λ f^C computed directly, and of p̃ with its
  floor and renormalisation, as decoding has it; `curve_error` and `entry_curve_error` are the largest
  |direct − predicted|;
- `epsilon_pilot_sq` ε_P² and `sigma_pilot_sq` σ_P², null with one Pilot, and `pilots`, what they come from;
- `entries`: for which of them λ* is too large, see `parabola.served_entries`, with `removed_per_entry_held_out` and
  `worst`, the entries that lose most;
- `by_benchmark` and `by_position` (1-based, in the target): the same for parts of the tokens, at the λ* of all.

Shapes: B batch, N target length, R target tokens, V vocabulary, L weights of the curve.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcopilot.app import build
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.console import quiet_libraries
from tcopilot.app.theorem.parabola import EntrySums, Floats, removed_on_other_half, row_intervals, served_entries
from tcopilot.app.theorem.pilots import PilotSpread, TrainedRun, dropout_draws, refuse_other_kinds
from tcopilot.app.theorem.sheet import show, verdict
from tcopilot.data.batch import Batch
from tcopilot.data.benchmarks import DataError
from tcopilot.data.collate import PromptTargetCollator
from tcopilot.functional import fuse_probabilities, token_errors
from tcopilot.models.chunked import CHUNK_ELEMENTS
from tcopilot.models.fusion import ProbabilityFusion
from tcopilot.models.pilot import ModelSourceError
from tcopilot.training.error_statistics import correct_targets

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
            kinds = (errors_RV.square(), errors_RV * corrections_RV, corrections_RV.square())
            sums_R = [*(kind_RV.sum(1) for kind_RV in kinds), torch.ones_like(row_R, dtype=torch.float64)]
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
        """What `theorem.json` says of this Pilot and its Copilot; see the top of this file."""
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
            "pilot_error_sq": total.error, "constant_error_sq": sums.constant_error,
            "copilot_error_sq": total.copilot_error, "epsilon_copilot_sq": epsilon, "sigma_copilot_sq": sigma,
            "lambda_star": weight, "lambda_0": total.promised_weight, "zero_crossing": total.zero_crossing,
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


def measure(
    runs: Sequence[TrainedRun], split: str, passes: int = 0, seed: int = 0
) -> tuple[DistanceSums, PilotSpread | None]:
    """Score the rows of a split, teacher-forced, with the feedback that decoding uses.

    Args:
        runs: the run to estimate, then runs of other seeds, for ε_P² and σ_P² only.
        split: `validation` or `test`.
        passes: passes with dropout, instead of other seeds.
        seed: of the dropout.

    Returns:
        Sums of the first run; the spread of Pilots, or None if there is one Pilot only.

    Raises:
        ConfigError: if the Pilot has no dropout to pass through.
    """
    first = runs[0]
    torch.manual_seed(seed)
    batch_size = build.decoding(first.config.evaluation).batch_size
    collate = PromptTargetCollator(first.tokenizer.pad_token_id, first.tokenizer.padding_side)
    distances, spread = DistanceSums(first.model.pilot.get_input_embeddings().num_embeddings), None
    if passes or len(runs) > 1:
        kind, names = ("dropout", range(passes)) if passes else ("seeds", [run.folder for run in runs])
        spread = PilotSpread(kind, [str(name) for name in names])
    rows = first.rows(split)
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size]).to(first.model.device)
        scored = correct_targets(first.model, batch)
        distances.update(batch, *scored)
        if passes:
            spread.update(batch, dropout_draws(first.model, batch, passes))
            if spread.sigma_sq == 0:
                _refuse_dropout(first)
        elif spread:
            spread.update(batch, chain([scored], (correct_targets(run.model, batch) for run in runs[1:])))
    return distances, spread


def estimate(runs: Sequence[TrainedRun], split: str, passes: int = 0) -> dict[str, Any]:
    """Return what `theorem.json` holds; arguments and errors as those of `measure`."""
    first, (distances, spread) = runs[0], measure(runs, split, passes)
    found = {"version": 1, "run": str(first.folder), "split": split, "fusion": first.model.config.fusion["_target_"]}
    found["is_eq_8"] = isinstance(first.model.fusion, ProbabilityFusion)
    found |= distances.estimates(first.data.benchmark_names)
    pilots = spread.summary() if spread else None
    found |= {f"{name}_pilot_sq": pilots[f"{name}_sq"] if pilots else None for name in ("epsilon", "sigma")}
    found["pilots"] = pilots
    found["entries"]["worst"] = [
        {"id": entry, "token": str(first.tokenizer.convert_ids_to_tokens(entry)), "increase": increase}
        for entry, increase in distances.worst_entries(found["lambda_star"])
    ]
    return found | {"verdict": verdict(found)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tcopilot-theorem`.

    Returns:
        0, or 1 with a message on stderr if runs cannot be used or a file cannot be written.
    """
    parser = argparse.ArgumentParser("tcopilot-theorem", description="Theorem 4.1 on the held-out rows of a run.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, then those of other seeds")
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="rows to measure on")
    parser.add_argument("--dropout-passes", type=int, default=0, metavar="K", help="variance of one Pilot by dropout")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the figures here; - is stdout, and nothing else there"
    )
    asked = parser.parse_args(arguments)
    if asked.dropout_passes and (len(asked.runs) > 1 or asked.dropout_passes < 2):
        parser.error(f"--dropout-passes {asked.dropout_passes}: give 2 or more, with one run directory only")
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        runs = [TrainedRun.load(folder, device) for folder in asked.runs]
        refuse_other_kinds(runs, asked.split)
        found = estimate(runs, asked.split, asked.dropout_passes)
        text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        files = [asked.runs[0] / "theorem.json", *([Path(asked.json)] if asked.json not in (None, "-") else [])]
        for file in files:
            file.write_text(text, encoding="utf-8")
    except (ConfigError, DataError, ModelSourceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; choose a place that can be written", file=sys.stderr)
        return 1
    if asked.json == "-":
        print(text, end="")
    else:
        show(found)
        print(f"theorem: {files[0]}")
    return 0


def _parts(parts: dict[str, EntrySums], weight: float, energy: float) -> dict[str, Any]:
    """The figures of parts of the tokens at the λ of all."""
    return {
        name: {
            "tokens": sums.tokens,
            "energy": sums.total.error * sums.tokens / energy if energy else 0.0,
            "pilot_error_sq": sums.total.error,
            "lambda_star": sums.total.best_weight,
            "zero_crossing": sums.total.zero_crossing,
            **served_entries(sums, weight),
        }
        for name, sums in parts.items()
    }


def _refuse_dropout(run: TrainedRun) -> None:
    settings = run.export.pilot.to_dict().items()
    rates = ", ".join(f"{key}={value}" for key, value in settings if "drop" in key and value is not None)
    mend = "give runs of other seeds, or train with dropout (T5: pilot.config.dropout_rate=0.1)"
    raise ConfigError([f"--dropout-passes: the Pilot of {run.folder} has no dropout ({rates or 'no key'}); {mend}"])


if __name__ == "__main__":
    sys.exit(main())
