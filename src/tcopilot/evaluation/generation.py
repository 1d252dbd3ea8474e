"""Answers as generated text: the first way to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tcopilot.data.answers import until_end
from tcopilot.data.benchmarks import Benchmark
from tcopilot.data.collate import PromptTargetCollator
from tcopilot.data.metrics import Answer
from tcopilot.evaluation.predictions import Prediction
from tcopilot.models.fused_model import TCopilotModel


class Generation:
    """Decode each prompt at every λ and judge the texts.

    Args:
        model: the fused model.
        tokenizer: the Pilot's.
        collate: makes batches of rows.
        benchmark: reads answers out of texts.
        num_beams: 1 is greedy.
        max_new_tokens: longest answer, in tokens.
        sequences: prompts times λ decoded at once.
        decoding: `dynamic` or `static` caches.
        compiled: whether a static step is compiled.
    """

    suffix = ""

    def __init__(
        self,
        model: TCopilotModel,
        tokenizer: PreTrainedTokenizerBase,
        collate: PromptTargetCollator,
        benchmark: Benchmark,
        num_beams: int,
        max_new_tokens: int,
        sequences: int,
        decoding: str = "dynamic",
        compiled: bool = True,
    ) -> None:
        self._model, self._tokenizer, self._collate, self._benchmark = model, tokenizer, collate, benchmark
        self._sequences = sequences
        self._options = {
            "num_beams": num_beams,
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "cache_implementation": decoding,
            "disable_compile": not compiled,
        }
        self.metrics = benchmark.metrics

    def rows_at_once(self, weights: int) -> int:
        """Prompts of a batch at that many λ."""
        return max(1, self._sequences // weights)

    def answer(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[Prediction]]:
        """Return one prediction per λ and row, with the text, what was read out of it, and its scores."""
        return {
            weight: [self._prediction(row, tokens) for row, tokens in zip(rows, answers, strict=True)]
            for weight, answers in self.emit(rows, weights).items()
        }

    @torch.no_grad()
    def emit(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[list[int]]]:
        """Return the tokens of each answer, for each λ and row; what follows an end token is padding."""
        batch = self._collate(rows).to(self._model.device)
        start = 1 if self._model.config.is_encoder_decoder else batch.source_ids_BM.shape[1]
        found = self._model.generate_at_weights(
            weights, batch.source_ids_BM, batch.source_mask_BM.long(), **self._options
        )
        return {weight: tokens[:, start:].tolist() for weight, tokens in zip(weights, found, strict=True)}

    def read(self, prediction: Prediction) -> Answer:
        """Read the answer in a predicted text."""
        return self._benchmark.read(prediction["prediction"], prediction["answer"])

    def judged(self, prediction: Prediction) -> Prediction:
        """Return a prediction with what is read in its text, and its scores."""
        answer = self.read(prediction)
        return prediction | {"extracted": answer.extracted, "scores": self._benchmark.judge(answer)}

    def _prediction(self, row: dict[str, Any], tokens: list[int]) -> Prediction:
        text = self._tokenizer.decode(until_end(tokens, self._tokenizer.eos_token_id), skip_special_tokens=True)
        return self.judged({**{key: row[key] for key in ("id", "prompt", "target", "answer")}, "prediction": text})
