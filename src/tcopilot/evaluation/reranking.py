"""The fused model chooses among the Pilot's own beams, which tells what a Copilot knows of whole answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tcopilot.evaluation.generation import Generation
from tcopilot.evaluation.likelihood import log_likelihoods
from tcopilot.evaluation.modes import Scored


@dataclass
class Reranking(Generation):
    """Decode beams from the Pilot alone, and answer with the one of the largest Σ log p̃, the end token included.

    All λ choose among the same beams, so at λ = 0 the answer is the Pilot's likeliest beam.

    Attributes:
        score: some rows, see `Evaluator.scored`.
    """

    suffix: ClassVar[str] = "-reranking"

    score: Callable[[Sequence[dict[str, Any]]], Scored]

    def rows_at_once(self, weights: int) -> int:
        """Prompts of a batch; all λ share it."""
        return max(1, self.decoding.batch_size // self.decoding.num_beams)

    @torch.no_grad()
    def emit(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[list[int]]]:
        """Return the tokens of each answer, for each λ and row."""
        beams = self.decoding.num_beams
        (decoded,) = self.decode(rows, [0.0], num_return_sequences=beams)
        answers = [self._with_end(tokens) for tokens in decoded]
        pairs = [{**rows[place // beams], "target_ids": answer} for place, answer in enumerate(answers)]
        sums = log_likelihoods(self.model, self.score(pairs), weights).view(len(weights), len(rows), beams)
        chosen = sums.argmax(-1).tolist()
        return {
            weight: [answers[row * beams + beam] for row, beam in enumerate(of_weight)]
            for weight, of_weight in zip(weights, chosen, strict=True)
        }

    def _with_end(self, tokens: list[int]) -> list[int]:
        """An answer up to its end token, which one that was cut off lacks."""
        end = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens) - 1)
        return tokens[: end + 1]
