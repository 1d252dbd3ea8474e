"""A target text as both models see it, position by position: p̂, f^C, p̃, and what each layer would have predicted.

Shapes: B batch, N target length, V vocabulary, C Copilot width, K candidates shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcopilot.data.batch import Batch
from tcopilot.functional import token_errors
from tcopilot.models import families
from tcopilot.models.decoding import correct_text
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.states import trace_pilot

CANDIDATES = 5

Position = dict[str, Any]
"""What `positions` says of one target token; docs/report.md names its keys."""


@dataclass
class TargetTrace:
    """Both models along given targets.

    Attributes:
        log_probs_BNV: log p̂.
        fused_BNV: log p̃ at the λ and the feedback of decoding.
        corrections: f^C [B, N, V] by feedback; that of decoding comes first.
        pilot_lens: for each Pilot layer log-probabilities [B, N] and ids [B, N] of the likeliest token.
        copilot_lens: for each Copilot layer the largest entry of f^C [B, N] and its ids [B, N].
    """

    log_probs_BNV: Tensor
    fused_BNV: Tensor
    corrections: dict[str, Tensor]
    pilot_lens: list[tuple[Tensor, Tensor]]
    copilot_lens: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def trace_targets(model: TCopilotModel, batch: Batch, others: Sequence[str] = ()) -> TargetTrace:
    """Run both models along the targets of a batch, at the model's own λ, fusion and feedback.

    A layer's lens is what the model would have predicted if the layer had been its last (logit lens). `others` are
    further kinds of feedback under which f^C is wanted.
    """
    copilot, decoder = model.copilot, model.pilot.get_decoder()
    with families.layer_outputs(decoder) as pilot_layers:
        states = trace_pilot(model.pilot, batch, copilot.pooler)
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
    copilot_lens = [used_BNV.max(-1)]  # all there is of a Copilot without layers
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
    """Lay out the trace of a batch as plain values: a `Position` for each target position of each row."""
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
        **{  # the cosine is 0 where f^C is
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
    """Ids and values of all layers, [B, N, layers] each."""
    values, ids = zip(*lens, strict=True)
    return torch.stack(ids, -1), torch.stack(values, -1)


def _short(value: Any) -> Any:
    """Six significant digits are more than any plot shows."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
