"""Several Pilots of one kind, from other seeds or from dropout: ε_P² and σ_P², which one Pilot cannot tell apart.

Shapes: B batch, N target length, R target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tcopilot.app import build
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.theorem.parabola import Parabola
from tcopilot.data.batch import Batch
from tcopilot.data.module import TCopilotDataModule
from tcopilot.functional import token_errors
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.training.error_statistics import correct_targets

Scored = tuple[Tensor, Tensor]  # log p̂ [B, N, V] and f^C [B, N, V]


class PilotSpread:
    """Bias and variance of p̂ over draws of a Pilot, on the same target tokens.

    With p̂ of a token as the random variable, S² = E(p − p̂)² = (p − E p̂)² + Var p̂ = ε_P² + σ_P². The variance is the
    unbiased one (divided by draws − 1) and ε_P² is S² minus it, so neither depends on the number of draws.

    Args:
        kind: `seeds` or `dropout`.
        names: of the draws.
    """

    def __init__(self, kind: str, names: Sequence[str]) -> None:
        self.kind, self.names = kind, list(names)
        self._sums_D3 = torch.zeros(len(self.names), 3, dtype=torch.float64)  # Σℓ², Σℓf, Σf² of each draw
        self._variance, self._tokens = 0.0, 0

    @torch.no_grad()
    def update(self, batch: Batch, draws: Iterable[Scored]) -> None:
        """Add a batch, scored by every draw in order; one draw is held at a time."""
        mask_BN = batch.target_mask_BN
        targets_R, mean_RV, squares = batch.target_ids_BN[mask_BN], 0.0, 0.0
        for place, (log_probs_BNV, corrections_BNV) in enumerate(draws):
            probs_RV, corrections_RV = log_probs_BNV[mask_BN].double().exp(), corrections_BNV[mask_BN].double()
            errors_RV = token_errors(probs_RV, targets_R)
            kinds = (errors_RV.square(), errors_RV * corrections_RV, corrections_RV.square())
            self._sums_D3[place] += torch.stack([kind.sum() for kind in kinds]).cpu()
            away_RV = probs_RV - mean_RV  # Welford: equal draws have a variance of exactly 0
            mean_RV = mean_RV + away_RV / (place + 1)
            squares += (away_RV * (probs_RV - mean_RV)).sum().item()
        self._variance += squares / (len(self.names) - 1)
        self._tokens += len(targets_R)

    @property
    def sigma_sq(self) -> float:
        """σ_P², summed over the vocabulary, per target token."""
        return self._variance / self._tokens

    def summary(self) -> dict[str, Any]:
        """ε_P², σ_P² and their sum S², and the parabola of each draw."""
        parabolas = [Parabola(*(row / self._tokens).tolist()) for row in self._sums_D3]
        error = sum(parabola.error for parabola in parabolas) / len(parabolas)
        each = [
            {"name": name, "pilot_error_sq": one.error, "copilot_error_sq": one.copilot_error}
            | {"lambda_star": one.best_weight, "lambda_0": one.promised_weight, "zero_crossing": one.zero_crossing}
            for name, one in zip(self.names, parabolas, strict=True)
        ]
        figures = {"pilot_error_sq": error, "epsilon_sq": error - self.sigma_sq, "sigma_sq": self.sigma_sq}
        return {"kind": self.kind, **figures, "draws": each}


def dropout_draws(model: TCopilotModel, batch: Batch, passes: int) -> Iterator[Scored]:
    """Score a batch with the Pilot's dropout on; the Copilot, without dropout, reads each pass's states."""
    model.pilot.train()
    try:
        for _ in range(passes):
            yield correct_targets(model, batch)
    finally:
        model.pilot.eval()


@dataclass
class TrainedRun:
    """A finished run with its export and its data."""

    folder: Path
    config: DictConfig
    export: TCopilotConfig
    tokenizer: PreTrainedTokenizerBase
    data: TCopilotDataModule
    model: TCopilotModel

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> TrainedRun:
        """Read a run, ready to score its data.

        Raises:
            ConfigError: if it is no finished run or has no Copilot, or with what is wrong with its data.
            ModelSourceError: if its export cannot be read.
        """
        for needed in ("config.yaml", "export/config.json"):
            if not (folder / needed).exists():
                raise ConfigError([f"{folder}: no {needed} there; give the directory of a finished training run"])
        config = build.read_config(folder / "config.yaml", str(folder))
        export, tokenizer = build.read_export(folder)
        if export.copilot is None:
            raise ConfigError([f"{folder}: this run has no Copilot (copilot=none); the theorem is about one"])
        data = build.prepare_data(config, tokenizer, export.pilot)
        model = build.load_export(folder, export).to(device).eval()
        return cls(folder, config, export, tokenizer, data, model)

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Rows of all benchmarks, in batches of similar length when cut in order.

        Raises:
            DataError: if a benchmark has none.
        """
        by_name = (self.data.evaluation_rows(split, name) for name in self.data.benchmark_names)
        return [row for rows in by_name for row in sorted(rows, key=lambda row: len(row["source_ids"]))]


def refuse_other_kinds(runs: Sequence[TrainedRun], split: str) -> None:
    """Refuse runs whose Pilots cannot be compared token by token.

    Raises:
        ConfigError: with every run that is not like the first.
    """
    first, *others = runs
    problems = []
    for run in others:
        if run.folder.resolve() == first.folder.resolve():
            problems.append(f"{run.folder}: given twice; give runs of other seeds")
        elif run.export.pilot.model_type != first.export.pilot.model_type:
            kinds = f"{run.export.pilot.model_type} Pilot, {first.folder} a {first.export.pilot.model_type} one"
            problems.append(f"{run.folder}: has a {kinds}; give runs that differ in their seed only")
        elif run.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            problems.append(f"{run.folder}: another vocabulary than {first.folder} has; give runs of one tokenizer")
        elif _asked(run, split) != _asked(first, split):
            mend = "train all seeds with data.seed=0, generated tasks also with data.benchmarks.<name>.seed=0"
            problems.append(f"{run.folder}: its {split} rows are not those of {first.folder}; {mend}")
    if problems:
        raise ConfigError(problems)


def _asked(run: TrainedRun, split: str) -> list[tuple[Any, ...]]:
    return [(row["benchmark"], row["id"], row["source_ids"], row["target_ids"]) for row in run.rows(split)]
