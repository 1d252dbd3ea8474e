"""Answers as generated text, decoded by the fused model or chosen by it among the Pilot's beams."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tcopilot.data.answers import until_end
from tcopilot.data.metrics import Answer
from tcopilot.evaluation.likelihood import log_likelihoods
from tcopilot.evaluation.modes import Mode, Scored, about
from tcopilot.evaluation.predictions import Prediction
from tcopilot.models.pilot import end_ids


@dataclass
class Generation(Mode):
    """Decode at most `max_new_tokens` tokens for each prompt at every λ, and judge the texts."""

    max_new_tokens: int

    def __post_init__(self) -> None:
        self.ends = end_ids(self.tokenizer, self.model)

    @property
    def settings(self) -> dict[str, Any]:
        """Number of beams, limit on new tokens and end tokens, on which the answers depend."""
        return {"beams": self.decoding.num_beams, "max_new_tokens": self.max_new_tokens, "ends": self.ends}

    def rows_at_once(self, weights: int) -> int:
        """Return the number of prompts in a batch, each of which is decoded at so many λ."""
        return max(1, self.decoding.batch_size // weights)

    def answer(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[Prediction]]:
        """Return one prediction per λ and row, with the text, the extracted answer and the scores."""

        def prediction(row: dict[str, Any], tokens: list[int]) -> Prediction:
            text = self.tokenizer.decode(until_end(tokens, *self.ends), skip_special_tokens=True)
            return self.judged(about(row) | {"prediction": text})

        found = self.emit(rows, weights)
        return {weight: list(map(prediction, rows, answers)) for weight, answers in found.items()}

    def emit(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[list[int]]]:
        """Return the tokens of each answer, for each λ and row; tokens behind an end token are padding."""
        return dict(zip(weights, self.decode(rows, weights), strict=True))

    @torch.no_grad()
    def decode(
        self, rows: Sequence[dict[str, Any]], weights: Sequence[float], **options: Any
    ) -> list[list[list[int]]]:
        """Decode at each λ; further options are passed to `generate`."""
        batch = self.collate(rows).to(self.model.device)
        start = 1 if self.model.config.is_encoder_decoder else batch.source_ids_BM.shape[1]
        found = self.model.generate_at_weights(
            weights, batch.source_ids_BM, batch.source_mask_BM.long(), batch.prefix, do_sample=False,
            num_beams=self.decoding.num_beams, max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.ends,
            cache_implementation=self.decoding.decoding, disable_compile=not self.decoding.compile, **options,
        )  # fmt: skip
        return [tokens[:, start:].tolist() for tokens in found]

    def read(self, prediction: Prediction) -> Answer:
        """Extract the answer from a stored text."""
        return self.benchmark.read(prediction["prediction"], prediction["answer"])

    def judged(self, prediction: Prediction) -> Prediction:
        """Add the extracted answer and the scores to a prediction."""
        answer = self.read(prediction)
        return prediction | {"extracted": answer.extracted, "scores": self.benchmark.judge(answer)}


@dataclass
class Reranking(Generation):
    """Decode beams with the Pilot alone, and answer with the beam of the largest Σ log p̃, including the end token.

    This tests how well the Copilot judges whole answers. All λ choose among the same beams, so at λ = 0 the answer is
    the Pilot's likeliest beam. `Evaluator.scored` scores the beams.
    """

    suffix: ClassVar[str] = "-reranking"

    score: Callable[[Sequence[dict[str, Any]]], Scored]

    def rows_at_once(self, weights: int) -> int:
        """Return the number of prompts in a batch, which all λ share."""
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
        """Cut an answer behind its end token; an answer without one, cut off by the limit, is returned as it is."""
        end = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens) - 1)
        return tokens[: end + 1]
