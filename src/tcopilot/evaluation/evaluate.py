"""Evaluation: generate answers at each λ, judge them, choose λ on validation, compare with the Pilot on test.

Shapes: B batch, M source length, N target length, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tcopilot.data.batch import Batch
from tcopilot.data.collate import PromptTargetCollator
from tcopilot.data.module import TCopilotDataModule
from tcopilot.diagnostics import ErrorStatistics
from tcopilot.evaluation.results import Gain, Row
from tcopilot.evaluation.significance import compare, wilson_interval
from tcopilot.modeling import TCopilotModel

log = logging.getLogger(__name__)


@dataclass
class Decoding:
    """How answers are decoded.

    Attributes:
        num_beams: 1 is greedy; the paper uses 4.
        max_new_tokens: longest answer; None takes each benchmark's own, or what its training targets need.
        batch_size: prompts decoded at once.
    """

    num_beams: int = 1
    max_new_tokens: int | None = None
    batch_size: int = 64


@dataclass
class Evaluation:
    """What an evaluation found, in the terms of `results.json`."""

    rows: list[Row] = field(default_factory=list)
    gain: list[Gain] = field(default_factory=list)
    selected_weight: float = 0.0
    best_weight: float = 0.0
    verdicts: list[str] = field(default_factory=list)


class Evaluator:
    """Runs a fused model over the rows of a data module.

    Args:
        model: the fused model; its λ is changed while it runs and left at the selected one.
        tokenizer: the Pilot's.
        data: prepared rows.
        folder: where predictions go, one JSON line per row as soon as it is decoded.
        decoding: how answers are decoded.
    """

    def __init__(
        self,
        model: TCopilotModel,
        tokenizer: PreTrainedTokenizerBase,
        data: TCopilotDataModule,
        folder: str | Path,
        decoding: Decoding | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.data = data
        self.folder = Path(folder)
        self.decoding = Decoding() if decoding is None else decoding
        side = "right" if model.config.is_encoder_decoder else "left"
        self._collate = PromptTargetCollator(tokenizer.pad_token_id, side)

    def run(self, weights: Sequence[float] | None, splits: Sequence[str] = ("validation", "test")) -> Evaluation:
        """Evaluate at every λ, choose λ on validation, and compare with the Pilot on test.

        Args:
            weights: the λ to choose from; 0 is always evaluated. A single one is taken as it is. None takes λ* in
                closed form on validation.
            splits: `validation` to choose on, then the split to report.
        """
        if self.model.copilot is None:
            weights = [0.0]
        found = Evaluation()
        chosen_on, reported = splits
        given = [] if weights is None else [float(weight) for weight in weights]
        statistics = self._statistics(chosen_on, sorted({0.0, *given}))
        found.best_weight = statistics.best_weight
        if weights is None:
            given = [round(found.best_weight, 3)]
            statistics = self._statistics(chosen_on, sorted({0.0, *given}))
        candidates = sorted({0.0, *given})
        for split in dict.fromkeys((chosen_on, reported)):
            outcomes = {weight: self._split(found, split, weight) for weight in candidates}
            observed = statistics if split == chosen_on else self._statistics(split, candidates)
            likelihood, intervals = observed.nll(), observed.nll_intervals()
            rows = [row for name in self.data.benchmark_names for row in self._rows(split, name)]
            tokens = sum(len(row["target_ids"]) for row in rows)
            found.rows += [Row("all", split, "nll", w, nll, tokens, intervals[w]) for w, nll in likelihood.items()]
            if split == chosen_on:
                found.selected_weight = given[0] if len(given) == 1 else _select(outcomes, likelihood)
        for name in self.data.benchmark_names:
            comparison = compare(outcomes[0.0][name], outcomes[found.selected_weight][name])
            found.gain.append(Gain.of(name, self.data.benchmarks[name].metric, comparison))
            found.verdicts.append(f"{name}: {comparison.verdict}")
        if len(given) > 1 and found.selected_weight == max(given):
            found.verdicts.append(f"λ = {max(given):g} is the largest one tried: a larger one may be better still")
        self.model.weight = found.selected_weight
        return found

    @torch.no_grad()
    def predict(self, split: str, benchmark: str, weight: float) -> list[bool]:
        """Decode every row at one λ; returns whether each answer is right, in the rows' order.

        Predictions are appended to `<folder>/<split>-<benchmark>-weight=<λ>.jsonl` batch by batch, so that whatever
        is done stays, should the run be stopped.
        """
        rows = self._rows(split, benchmark)
        task = self.data.benchmarks[benchmark]
        self.model.weight = weight
        right: dict[int, bool] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{split}-{benchmark}-weight={weight:g}.jsonl"
        with (
            path.open("w", encoding="utf-8") as file,
            _progress(f"{split} {benchmark} λ={weight:g}", len(rows)) as bar,
        ):
            for batch, members in self._batches(rows):
                texts = self._generate(batch, self._longest_answer(benchmark))
                for row, text in zip(members, texts, strict=True):
                    right[row["id"]] = task.correct(text, row["answer"])
                    prediction = {"prediction": text, "extracted": task.extract(text), "correct": right[row["id"]]}
                    shown = {key: row[key] for key in ("id", "prompt", "target", "answer")}
                    file.write(json.dumps({**shown, **prediction}, ensure_ascii=False) + "\n")
                file.flush()
                bar(len(members), sum(right.values()) / len(right))
        return [right[row["id"]] for row in rows]

    @torch.no_grad()
    def _statistics(self, split: str, weights: Sequence[float]) -> ErrorStatistics:
        """Teacher-forced pass over a split: fused likelihood at every λ at once, and λ* in closed form."""
        statistics = ErrorStatistics(weights, self.model.config.fusion)
        for name in self.data.benchmark_names:
            for batch, _ in self._batches(self._rows(split, name)):
                statistics.observe(self.model, batch)
        return statistics

    def _split(self, found: Evaluation, split: str, weight: float) -> dict[str, list[bool]]:
        outcomes = {name: self.predict(split, name, weight) for name in self.data.benchmark_names}
        for name, right in outcomes.items():
            metric, n = self.data.benchmarks[name].metric, len(right)
            interval = wilson_interval(sum(right), n)
            found.rows.append(Row(name, split, metric, weight, sum(right) / n, n, interval))
        return outcomes

    def _longest_answer(self, benchmark: str) -> int:
        """Tokens to wait for: as configured, else the longest training target with a little room."""
        limit = self.decoding.max_new_tokens or self.data.benchmarks[benchmark].max_new_tokens
        if limit is not None:
            return limit
        longest = self.data.summary()
        return 2 + int(longest.get(f"{benchmark}/train", longest[f"{benchmark}/validation"])["target_max"])

    def _rows(self, split: str, benchmark: str) -> list[dict[str, Any]]:
        return self.data.evaluation_rows(split, benchmark)

    def _batches(self, rows: list[dict[str, Any]]) -> Iterator[tuple[Batch, list[dict[str, Any]]]]:
        """Batches of rows of similar length: less padding, same answers."""
        ordered = sorted(rows, key=lambda row: len(row["source_ids"]))
        for first in range(0, len(ordered), self.decoding.batch_size):
            members = ordered[first : first + self.decoding.batch_size]
            yield self._collate(members).to(self.model.device), members

    def _generate(self, batch: Batch, max_new_tokens: int) -> list[str]:
        tokens = self.model.generate(
            input_ids=batch.source_ids_BM,
            attention_mask=batch.source_mask_BM.long(),
            max_new_tokens=max_new_tokens,
            num_beams=self.decoding.num_beams,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        answer: Tensor = tokens if self.model.config.is_encoder_decoder else tokens[:, batch.source_ids_BM.shape[1] :]
        return self.tokenizer.batch_decode(answer, skip_special_tokens=True)


def _select(outcomes: dict[float, dict[str, list[bool]]], likelihood: dict[float, float]) -> float:
    """The λ with the best mean accuracy over benchmarks; ties go to the better likelihood, then to the smaller λ."""

    def merit(weight: float) -> tuple[float, float, float]:
        shares = [sum(right) / len(right) for right in outcomes[weight].values()]
        return sum(shares) / len(shares), -likelihood[weight], -weight

    return max(outcomes, key=merit)


class _progress:
    """A bar with examples per second and running accuracy; silent where the output is no terminal."""

    def __init__(self, title: str, total: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
        )
        self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._bar.disable = not self._bar.console.is_terminal
        self._task = self._bar.add_task(title, total=total, speed="")

    def __enter__(self):
        self._bar.start()
        return self._advance

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _advance(self, rows: int, accuracy: float) -> None:
        speed = self._bar.tasks[0].speed or 0.0
        self._bar.update(self._task, advance=rows, speed=f"{speed:.0f}/s, {100 * accuracy:.1f} % right")
