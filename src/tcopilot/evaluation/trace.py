"""Traces: the distributions of both models at every target position of evaluated rows, written for the report.

`eval.py trace=true` writes `<run dir>/trace/meta.json` and `<run dir>/trace/<benchmark>.jsonl.gz`, one line per row,
which holds p̂, f^C, p̃ and the prediction of each layer for every position.

Shapes: B batch, N target length, V vocabulary, C Copilot width, K candidates shown.
"""

import gzip
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tcopilot.data.answers import until_end
from tcopilot.data.batch import Batch
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.generation import Generation
from tcopilot.functional import token_errors
from tcopilot.models import families
from tcopilot.models.decoding import FEEDBACKS, correct_text
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.states import trace_pilot
from tcopilot.run_directory import RunDirectory, write_whole
from tcopilot.settings import FLAG, problems, whole

log = logging.getLogger(__name__)
VERSION = 2
CANDIDATES = 5  # number of likeliest tokens stored of each distribution
ROWS_AT_ONCE = 16  # small, because several [B, N, V] tensors are held at once
VISIBLE = str.maketrans({"▁": "␣", "Ġ": "␣", "Ċ": "↵", "ĉ": "⇥"})  # white space in SentencePiece and byte-level BPE
SETTINGS = {
    "trace": FLAG,
    "trace_rows": whole(mend="give a whole number of rows, at least 1, or null for all").or_null(),
}

Row = dict[str, Any]
Position = dict[str, Any]
"""The entry that `positions` makes for one target token; docs/report.md lists its keys."""


def write_trace(
    evaluator: Evaluator,
    split: str,
    run: RunDirectory,
    limit: int | None,
    trained: str | Path,
    weights: Mapping[str, float],
) -> None:
    """Trace rows of every benchmark at its λ in `weights`, and time decoding with and without the Copilot.

    At most `limit` rows of each benchmark are traced, spread evenly over the split; None traces all. Older traces in
    `run` are replaced. `trained` is the directory of the training run, whose curves the report shows.
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
    """Return a message for each reason why the trace that `cfg` asks for cannot be made of the run `trained`."""
    found = problems(SETTINGS, cfg)
    if cfg.trace is True and not trained.copilot.enabled:
        found.append("trace=true: this run has no Copilot (copilot=none), so there is nothing to compare")
    return found


def spread(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """Return at most `limit` rows, evenly spaced; all of them if `limit` is None.

    >>> spread([10, 11, 12, 13, 14, 15], 3)
    [10, 12, 14]
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def step_parameters(model: TCopilotModel) -> dict[str, int]:
    """Count the weights used to process a prompt token (`encoder`) and a target token (`decoder`, `copilot`).

    The Pilot's decoder includes its head; input embeddings are table look-ups and are not counted.
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
    """Write a token with visible white space; an id without text, padding of the vocabulary, as its number."""
    text = tokenizer.convert_ids_to_tokens(token)
    return f"#{token}" if text is None else text.translate(VISIBLE)


class _Tracer:
    """Trace the rows of one benchmark, along the right answer and along the decoded one."""

    def __init__(self, evaluator: Evaluator, benchmark: str) -> None:
        self._model, self._collate = evaluator.model, evaluator.collate
        self._text = partial(token_text, evaluator.tokenizer)
        mode = evaluator.modes(benchmark)[0]
        self._generation = mode if isinstance(mode, Generation) else None
        self._seconds, self._rows = {"pilot": 0.0, "fused": 0.0}, 0

    @property
    def timings(self) -> dict[str, float] | None:
        """Decoding time per row in seconds, of Pilot and fused model; None if answers are not generated."""
        if not self._rows:
            return None
        return {"rows_at_once": ROWS_AT_ONCE} | {name: total / self._rows for name, total in self._seconds.items()}

    def lines(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Trace the rows, sorted by length to save padding."""
        ordered = sorted(rows, key=lambda row: len(row["source_ids"]))
        if self._generation is not None:  # warm up, because the first call of a model is slower
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
        """Decode the rows with both models, timed, and return the tokens of each answer including its end token."""
        found = {}
        for name, weight in (("pilot", 0.0), ("fused", self._model.weight)):
            began = time.perf_counter()
            answers = self._generation.emit(rows, [weight])[weight]
            self._seconds[name] += time.perf_counter() - began
            found[name] = [ids[: len(until_end(ids, *self._generation.ends)) + 1] for ids in answers]
        self._rows += len(rows)
        return found


@dataclass
class TargetTrace:
    """The outputs of both models along given targets.

    Attributes:
        log_probs_BNV: log p̂.
        fused_BNV: log p̃ at the λ and the feedback of decoding.
        corrections: f^C [B, N, V] by feedback; the feedback used in decoding comes first.
        pilot_lens: for each Pilot layer, log-probability [B, N] and id [B, N] of the likeliest token.
        copilot_lens: for each Copilot layer, the largest entry of f^C [B, N] and its id [B, N].
    """

    log_probs_BNV: Tensor
    fused_BNV: Tensor
    corrections: dict[str, Tensor]
    pilot_lens: list[tuple[Tensor, Tensor]]
    copilot_lens: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def trace_targets(model: TCopilotModel, batch: Batch, others: Sequence[str] = ()) -> TargetTrace:
    """Run both models along the targets of a batch, at the model's own λ, fusion and feedback.

    The lens of a layer is what the model would predict if this layer were its last (logit lens). `others` are further
    kinds of feedback for which f^C is computed.
    """
    copilot, decoder = model.copilot, model.pilot.get_decoder()
    with families.layer_outputs(decoder) as pilot_layers:  # of whole texts, so a common prefix is not read apart
        states = trace_pilot(model.pilot, replace(batch, prefix=0), copilot.pooler)
    log_probs_BNV = torch.log_softmax(states.logits_BNV.float(), dim=-1)
    corrections: dict[str, Tensor] = {}
    copilot_layers: list[Tensor] = []
    for feedback in dict.fromkeys((model.config.feedback, *others)):
        with nullcontext([]) if copilot.body is None else families.layer_outputs(copilot.body) as layers:
            corrections[feedback], _ = correct_text(
                copilot, feedback, log_probs_BNV, states.targets_BN[:, :-1],
                states.source_BMP, states.source_mask_BM, states.states_BNP,
            )  # fmt: skip
        copilot_layers = copilot_layers or [torch.cat(calls, dim=1) for calls in layers]
    length = batch.target_ids_BN.shape[1]
    first = 0 if model.config.is_encoder_decoder else batch.source_ids_BM.shape[1] - 1
    used_BNV = next(iter(corrections.values()))
    copilot_lens = [used_BNV.max(-1)]  # a Copilot without layers has only its output
    if copilot.body is not None:
        norm = families.final_norm(copilot.body)
        copilot_lens = [
            copilot.gated(log_probs_BNV, copilot.correct(norm(layer_BNC), log_probs_BNV)).max(-1)
            for layer_BNC in copilot_layers
        ]
    return TargetTrace(
        log_probs_BNV,
        model.fuse(log_probs_BNV, used_BNV, model.weight),
        corrections,
        [_likeliest(families.logit_lens(model.pilot, calls[0][:, first : first + length])) for calls in pilot_layers],
        copilot_lens,
    )


def positions(trace: TargetTrace, batch: Batch, spell: Callable[[int], str]) -> list[list[Position]]:
    """Convert the trace of a batch to plain values: a `Position` for each target position of each row."""
    used_BNV, kept = next(iter(trace.corrections.values())), min(CANDIDATES, trace.log_probs_BNV.shape[-1])
    errors_BNV = token_errors(trace.log_probs_BNV.exp(), batch.target_ids_BN)
    before, after = trace.log_probs_BNV.topk(kept, -1), trace.fused_BNV.topk(kept, -1)
    strongest_BNK = used_BNV.abs().topk(kept, -1).indices
    moved_BNV = trace.fused_BNV - trace.log_probs_BNV
    target_BN1 = batch.target_ids_BN.unsqueeze(-1)
    tables = {
        "target": batch.target_ids_BN,
        "before": (before.indices, before.values.exp()),
        "correction": (strongest_BNK, used_BNV.gather(-1, strongest_BNK)),
        "after": (after.indices, after.values.exp()),
        "nll": torch.cat([-scores.gather(-1, target_BN1) for scores in (trace.log_probs_BNV, trace.fused_BNV)], -1),
        "right": torch.stack([best.indices[..., 0] == batch.target_ids_BN for best in (before, after)], -1),
        "error_norm": errors_BNV.norm(dim=-1),
        "shift": (0.5 * (trace.log_probs_BNV.exp() + trace.fused_BNV.exp()) * moved_BNV.abs()).sum(-1),
        "range": trace.log_probs_BNV.amax(-1) - trace.log_probs_BNV.amin(-1),
        **{  # the cosine is 0 where f^C is 0
            f"feedback {name}": torch.stack([f_BNV.norm(dim=-1), torch.cosine_similarity(f_BNV, errors_BNV, -1)], -1)
            for name, f_BNV in trace.corrections.items()
        },
        "pilot_lens": _stacked([(scores.exp(), ids) for scores, ids in trace.pilot_lens]),
        "copilot_lens": _stacked(trace.copilot_lens),
    }
    plain = {
        name: value.tolist() if isinstance(value, Tensor) else [part.tolist() for part in value]
        for name, value in tables.items()
    }

    def position(row: int, i: int) -> Position:
        found: Position = {"token": spell(plain["target"][row][i]), "feedback": {}}
        for name, value in list(plain.items())[1:]:
            if isinstance(tables[name], tuple):
                ids, values = (part[row][i] for part in value)
                found[name] = [[spell(token), _short(score)] for token, score in zip(ids, values, strict=True)]
            elif name.startswith("feedback "):
                found["feedback"][name.removeprefix("feedback ")] = _short(value[row][i])
            else:
                found[name] = _short(value[row][i])
        return found

    lengths = batch.target_mask_BN.sum(-1).tolist()
    return [[position(row, i) for i in range(length)] for row, length in enumerate(lengths)]


def _likeliest(logits_BNV: Tensor) -> tuple[Tensor, Tensor]:
    best = logits_BNV.float().max(-1)
    return best.values - logits_BNV.float().logsumexp(-1), best.indices


def _stacked(lens: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the ids and the values of all layers, each [B, N, layers]."""
    values, ids = zip(*lens, strict=True)
    return torch.stack(ids, -1), torch.stack(values, -1)


def _short(value: Any) -> Any:
    """Round numbers to six significant digits, which suffice for any plot, to keep the file small."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
