"""Modes of answering rows: the decoding settings, and the base classes of all modes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tcopilot.data.batch import Batch, PromptTargetCollator
from tcopilot.data.benchmarks import Benchmark
from tcopilot.data.metrics import Answer, Metric
from tcopilot.evaluation.predictions import Prediction
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.settings import FLAG, list_of, one_of, whole

LIKELIHOOD, TARGETS = "likelihood", "targets"
"""Modes that score given texts by teacher forcing, and hence also work from a recording of a frozen Pilot."""
AT_ONCE = 2**28
"""Most values of log p̂ in one pass over given texts, i.e. 1 GB; several tensors of this size are held at once."""
Scored = tuple[Batch, Tensor, Tensor | None]
"""A batch, with log p̂ [B, N, V] and f^C [B, N, V] at its targets; f^C is None if there is no Copilot."""


@dataclass
class Decoding:
    """How answers are generated or scored; the configs in `configs/evaluation` explain these keys."""

    SETTINGS: ClassVar = {
        "num_beams": whole(),
        "max_new_tokens": whole().or_null(),
        "batch_size": whole(),
        "modes": list_of(("generation", "reranking", LIKELIHOOD, TARGETS)),
        "ranking": one_of(("beam", "exhaustive")),
        "ranking_beams": whole(),
        "decoding": one_of(("dynamic", "static")),
        "compile": FLAG,
    }

    num_beams: int = 1
    max_new_tokens: int | None = None
    batch_size: int = 64
    modes: Sequence[str] = ("generation",)
    ranking: str = "beam"
    ranking_beams: int = 100
    decoding: str = "dynamic"
    compile: bool = True


@dataclass
class Mode(ABC):
    """A way to answer rows.

    Attributes:
        suffix: distinguishes the prediction files of the mode.
        model: the fused model.
        tokenizer: the Pilot's.
        collate: makes batches of rows.
        benchmark: reads answers and judges them.
        decoding: how answers are generated or scored.
    """

    suffix: ClassVar[str] = ""

    model: TCopilotModel
    tokenizer: PreTrainedTokenizerBase
    collate: PromptTargetCollator
    benchmark: Benchmark
    decoding: Decoding

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of the mode; the first one decides on λ."""
        return self.benchmark.metrics

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain values of the settings that an answer depends on, besides model, row and benchmark."""

    @abstractmethod
    def rows_at_once(self, weights: int) -> int:
        """Return the number of rows in a batch at so many λ."""

    @abstractmethod
    def answer(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[Prediction]]:
        """Return one prediction per λ and row."""

    @abstractmethod
    def read(self, prediction: Prediction) -> Answer:
        """Return the answer in a stored prediction."""

    def judged(self, prediction: Prediction) -> Prediction:
        """Add scores to a stored prediction, one for each metric that is a mean over rows."""
        return prediction | {"scores": self.benchmark.judge(self.read(prediction))}


@dataclass
class TeacherForced(Mode):
    """A mode that scores given texts and does not generate answers.

    Attributes:
        score: scores a batch of rows, see `Evaluator.scored`.
    """

    settings: ClassVar[dict[str, Any]] = {}

    score: Callable[[Sequence[dict[str, Any]]], Scored]

    def rows_at_once(self, weights: int) -> int:
        """Return the number of rows in a batch, which all λ share."""
        return self.decoding.batch_size

    def judged(self, prediction: Prediction) -> Prediction:
        """Return the prediction unchanged, because its scores depend on no setting."""
        return prediction


def parts_to_score(model: TCopilotModel, rows: Sequence[dict[str, Any]], most: int) -> Iterator[list[dict[str, Any]]]:
    """Split rows, in order, into parts of at most `most` rows whose padded log p̂ stay within `AT_ONCE` values."""
    vocab_size, longest = model.pilot.get_output_embeddings().weight.shape[0], 0
    part: list[dict[str, Any]] = []
    for row in rows:
        longest = max(longest, len(row["target_ids"]))
        if part and (len(part) == most or (len(part) + 1) * longest * vocab_size > AT_ONCE):
            yield part
            part, longest = [], len(row["target_ids"])
        part.append(row)
    if part:
        yield part


def about(row: dict[str, Any]) -> Prediction:
    """Return the fields of a row that are copied to its prediction."""
    return {key: row[key] for key in ("id", "prompt", "target", "answer")}
