"""Algorithm 2, one target after another: the Copilot's corrections along a text that is being written or scored.

Feedback is what stands in for the teacher's error ℓ_{<i} when the right answer is unknown: `observed` takes
onehot(emitted token) − p̂, `own` takes the Copilot's earlier outputs f^C_{<i} as the paper writes it.

Shapes: B batch, M source length, N targets, P Pilot width, V vocabulary.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from tcopilot.functional import token_errors
from tcopilot.models.base_copilot import BaseCopilot
from tcopilot.models.caches import CopilotState

FEEDBACKS = ("observed", "own")


class Beside:
    """Work that overlaps with later work, in a second stream on a GPU; on a CPU or in compiled code it runs at once.

    Nothing that the work reads may be changed or freed before `result` is called.
    """

    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(self, device: torch.device, work: Callable[[], Tensor]) -> None:
        self._stream = None
        if device.type != "cuda" or torch.compiler.is_compiling():
            self._found = work()
            return
        self._stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            self._found = work()

    def result(self) -> Tensor:
        """Return the work's result; all that is queued from now on waits for it."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._found.device)
            current.wait_stream(self._stream)
            self._found.record_stream(current)
        return self._found


def correct_text(
    copilot: BaseCopilot, feedback: str, log_probs_BNV: Tensor, tokens_BK: Tensor, source_BMP: Tensor,
    source_mask_BM: Tensor, states_BNP: Tensor, keep: bool = False, record: bool = False,
) -> tuple[Tensor, CopilotState | None]:  # fmt: skip
    """Correct N targets of which the first K = N − 1 tokens are known.

    With observed feedback this is one parallel pass, since the errors follow from p̂ and the tokens. With own feedback
    each correction is an input of the next, so the targets are visited in order.

    Returns:
        f^C [B, N, V], float32 and gated, and the state from which `correct_next` goes on (None unless `keep`). With
        `record`, this state can be cropped back to any of these targets.
    """
    if feedback == "observed" or not copilot.reads_errors:
        probs_BKV = log_probs_BNV[:, :-1].exp()
        errors_BKV = token_errors(probs_BKV, tokens_BK) if copilot.reads_errors else probs_BKV
        hidden, state = copilot(copilot.inputs(errors_BKV), source_BMP, source_mask_BM, states_BNP, keep)
        if state is not None:
            state.feedback, state.feedback_BV = feedback, log_probs_BNV[:, -1].exp()
            if record:
                probs_BNV = log_probs_BNV.exp()
                state.history = [(states_BNP[:, i : i + 1], probs_BNV[:, i]) for i in range(probs_BNV.shape[1])]
        return copilot.gated(log_probs_BNV, copilot.correct(hidden, log_probs_BNV)), state
    none_B0V = log_probs_BNV[:, :0]
    hidden, state = copilot(copilot.inputs(none_B0V), source_BMP, source_mask_BM, states_BNP[:, :1], keep=True)
    first_B1V = copilot.correct(hidden, log_probs_BNV[:, :1])
    state.feedback, state.feedback_BV = feedback, first_B1V[:, 0]
    state.history = [(state.pending_B1P, state.feedback_BV)] if record else None
    later_BKV = correct_more(copilot, log_probs_BNV[:, 1:], tokens_BK, states_BNP[:, 1:], state)
    return torch.cat([copilot.gated(log_probs_BNV[:, :1], first_B1V), later_BKV], dim=1), state if keep else None


def correct_next(
    copilot: BaseCopilot, log_probs_B1V: Tensor, token_B1: Tensor, states_B1P: Tensor, state: CopilotState
) -> Tensor:
    """Return f^C [B, 1, V] of the next target, after `token_B1` was emitted at the last one; the state moves on."""
    hidden_B1C = advance(copilot, token_B1, state.pending_B1P if copilot.is_strict else states_B1P, state)
    return conclude(copilot, hidden_B1C, log_probs_B1V, states_B1P, state)


def correct_more(
    copilot: BaseCopilot, log_probs_BKV: Tensor, tokens_BK: Tensor, states_BKP: Tensor, state: CopilotState
) -> Tensor:
    """Return f^C [B, K, V] of the next K targets, each after one more of the K tokens; the state moves on."""
    corrections = [log_probs_BKV[:, :0]]
    for at in (slice(i, i + 1) for i in range(tokens_BK.shape[1])):
        corrections.append(correct_next(copilot, log_probs_BKV[:, at], tokens_BK[:, at], states_BKP[:, at], state))
    return torch.cat(corrections, dim=1)


def advance(copilot: BaseCopilot, token_B1: Tensor, row_B1P: Tensor, state: CopilotState) -> Tensor:
    """Embed the last target's error and run the body, the part of a step before the head; returns [B, 1, C].

    In strict context nothing here depends on the Pilot's present step: the row that joins the log is the last h̄.
    """
    error_B1V = state.feedback_BV[:, None]
    if state.feedback == "observed" and copilot.reads_errors:
        error_B1V = token_errors(error_B1V, token_B1)
    return copilot.step(copilot.inputs(error_B1V)[:, 1:], row_B1P, state)


def conclude(
    copilot: BaseCopilot, hidden_B1C: Tensor, log_probs_B1V: Tensor, states_B1P: Tensor, state: CopilotState
) -> Tensor:
    """Run the head, once the Pilot's p̂ is there, and keep what the next step needs; feedback is never gated."""
    correction_B1V = copilot.correct(hidden_B1C, log_probs_B1V)
    state.keep(states_B1P, (log_probs_B1V.exp() if state.feedback == "observed" else correction_B1V)[:, 0])
    return copilot.gated(log_probs_B1V, correction_B1V, state.target_B1 - 1)
