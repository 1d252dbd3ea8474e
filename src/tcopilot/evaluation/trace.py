"""Traces: what both models saw at every target position of evaluated rows, written once for the report to read.

`eval.py trace=true` writes `<run dir>/trace/meta.json` and `<run dir>/trace/<benchmark>.jsonl.gz`, a line per row.
"""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from tcopilot.data.answers import until_end
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.generation import Generation
from tcopilot.evaluation.trace_views import Position, positions, trace_targets
from tcopilot.models.decoding import FEEDBACKS
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.run_directory import RunDirectory, write_whole

log = logging.getLogger(__name__)
VERSION = 2
ROWS_AT_ONCE = 16  # several [B, N, V] are held at once
VISIBLE = str.maketrans({"▁": "␣", "Ġ": "␣", "Ċ": "↵", "ĉ": "⇥"})  # white space in SentencePiece and byte-level BPE

Row = dict[str, Any]


def write_trace(
    evaluator: Evaluator,
    split: str,
    run: RunDirectory,
    limit: int | None,
    trained: str | Path,
    weights: Mapping[str, float],
) -> None:
    """Trace rows of every benchmark at its λ of `weights`, and time decoding with and without the Copilot.

    At most `limit` rows of each benchmark are traced, spread evenly over the split; None traces all. Older traces in
    `run` are replaced. The report finds the curves of training in the directory `trained`.
    """
    model = evaluator.model
    run.trace.mkdir(parents=True, exist_ok=True)
    for old in run.trace.glob(run.trace_rows("*").name):
        old.unlink()
    meta: dict[str, Any] = {
        "version": VERSION, "correction_unit": model.fusion.correction_unit, "feedback": model.config.feedback,
        "split": split, "limit": limit, "vocabulary": model.pilot.get_input_embeddings().num_embeddings,
        "device": model.device.type, "trained": str(Path(trained).resolve()),
        "parameters": step_parameters(model), "benchmarks": {},
    }  # fmt: skip
    before = model.weight
    for name in evaluator.data.benchmark_names:
        rows = evaluator.data.evaluation_rows(split, name)
        some, tracer, model.weight = spread(rows, limit), _Tracer(evaluator, name), weights[name]
        log.info("trace of %s: %d of %d rows", name, len(some), len(rows))
        with gzip.open(run.trace_rows(name), "wt", encoding="utf-8") as file:
            for line in tracer.lines(some):
                file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
        found = {"weight": weights[name], "rows": len(rows), "traced": len(some), "decoding": tracer.timings}
        meta["benchmarks"][name] = found
    model.weight = before
    write_whole(run.trace_meta, json.dumps(meta, indent=2, ensure_ascii=False) + "\n")


def trace_problems(cfg: DictConfig, trained: DictConfig) -> list[str]:
    """What keeps a trace of the run that was `trained` from being written as `eval.yaml` asks, one message each."""
    problems = []
    if not isinstance(cfg.trace, bool):
        problems.append(f"trace={cfg.trace}: give true or false")
    elif cfg.trace and not trained.copilot.enabled:
        problems.append("trace=true: this run has no Copilot (copilot=none), so there is nothing to compare")
    rows = cfg.trace_rows
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        problems.append(f"trace_rows={rows}: give a whole number of rows, at least 1, or null for all")
    return problems


def spread(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """So many rows, evenly spaced; all of them if there are no more.

    >>> spread([10, 11, 12, 13, 14, 15], 3)
    [10, 12, 14]
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def step_parameters(model: TCopilotModel) -> dict[str, int]:
    """Count the weights that a prompt (`encoder`) and a target token (`decoder`, `copilot`) go through.

    The Pilot's decoder counts with its head; an input embedding is looked up and does not count.
    """
    pilot, embedding = model.pilot, model.pilot.get_input_embeddings().weight

    def count(*parts: nn.Module) -> int:
        return sum(p.numel() for p in {id(p): p for part in parts for p in part.parameters()}.values())

    encoder = pilot.get_encoder() if model.config.is_encoder_decoder else None
    return {
        "encoder": 0 if encoder is None else count(encoder) - embedding.numel(),
        "decoder": count(pilot.get_decoder()) - embedding.numel() + pilot.get_output_embeddings().weight.numel(),
        "copilot": count(model.copilot),
    }


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Spell a token with its white space made visible; a padding row of the vocabulary has only its number."""
    text = tokenizer.convert_ids_to_tokens(token)
    return f"#{token}" if text is None else text.translate(VISIBLE)


class _Tracer:
    """Traces the rows of one benchmark: along the right answer, and along the answer that was decoded."""

    def __init__(self, evaluator: Evaluator, benchmark: str) -> None:
        self._model, self._collate = evaluator.model, evaluator.collate
        self._text = partial(token_text, evaluator.tokenizer)
        mode = evaluator.modes(benchmark)[0]
        self._generation = mode if isinstance(mode, Generation) else None
        self._seconds, self._rows = {"pilot": 0.0, "fused": 0.0}, 0

    @property
    def timings(self) -> dict[str, float] | None:
        """Seconds of decoding a row, of Pilot and fused model; None where answers are not generated."""
        if not self._rows:
            return None
        return {"rows_at_once": ROWS_AT_ONCE} | {name: total / self._rows for name, total in self._seconds.items()}

    def lines(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Trace the rows, those of similar length together."""
        ordered = sorted(rows, key=lambda row: len(row["source_ids"]))
        if self._generation is not None:  # the first call of a model is slower than all others
            self._emit(ordered[:ROWS_AT_ONCE])
            self._seconds, self._rows = {"pilot": 0.0, "fused": 0.0}, 0
        for first in range(0, len(ordered), ROWS_AT_ONCE):
            members = ordered[first : first + ROWS_AT_ONCE]
            lines = [{"id": row["id"], "source_tokens": len(row["source_ids"])} for row in members]
            for line, gold in zip(lines, self._along(members, FEEDBACKS), strict=True):
                line["gold"] = gold
            if self._generation is not None:
                emitted = self._emit(members)
                said = [row | {"target_ids": ids} for row, ids in zip(members, emitted["fused"], strict=True)]
                for line, ids, view in zip(lines, emitted["pilot"], self._along(said), strict=True):
                    line["emitted"], line["pilot_emitted"] = view, [self._text(token) for token in ids]
            yield from lines

    def _along(self, rows: Sequence[Row], others: Sequence[str] = ()) -> list[list[Position]]:
        batch = self._collate(rows).to(self._model.device)
        return positions(trace_targets(self._model, batch, others), batch, self._text)

    def _emit(self, rows: Sequence[Row]) -> dict[str, list[list[int]]]:
        """Tokens of each answer up to its end token, that included."""
        found = {}
        for name, weight in (("pilot", 0.0), ("fused", self._model.weight)):
            began = time.perf_counter()
            answers = self._generation.emit(rows, [weight])[weight]
            self._seconds[name] += time.perf_counter() - began
            found[name] = [ids[: len(until_end(ids, *self._generation.ends)) + 1] for ids in answers]
        self._rows += len(rows)
        return found
