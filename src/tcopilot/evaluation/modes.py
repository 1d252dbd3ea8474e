"""How rows are answered: the settings of decoding, and what generation, likelihood and ranking have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from tcopilot.data.metrics import Answer, Metric
from tcopilot.evaluation.predictions import Prediction
from tcopilot.settings import FLAG, list_of, one_of, whole

MODES = ("generation", "likelihood")
DECODINGS = ("dynamic", "static")
RANKINGS = ("beam", "exhaustive")


@dataclass
class Decoding:
    """How answers are generated or scored.

    Attributes:
        num_beams: 1 is greedy; the paper uses 4.
        max_new_tokens: longest answer; None takes each benchmark's own, or what its training targets need.
        batch_size: sequences (prompts times λ, or options) in one pass.
        modes: `generation`, `likelihood` or both. The first decides on λ. Benchmarks without options have no
            likelihood mode, and those that rank a catalogue only rank.
        ranking: `beam` searches a catalogue with `ranking_beams`; `exhaustive` scores every item.
        ranking_beams: at least the largest cutoff of the ranking metrics.
        decoding: `dynamic`, or `static` for caches of fixed size (greedy only).
        compile: whether a static step is compiled, on a GPU into CUDA graphs.
    """

    SETTINGS: ClassVar = {
        "num_beams": whole(),
        "max_new_tokens": whole().or_null(),
        "batch_size": whole(),
        "modes": list_of(MODES),
        "ranking": one_of(RANKINGS),
        "ranking_beams": whole(),
        "decoding": one_of(DECODINGS),
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


class Mode(Protocol):
    """A way to answer rows.

    Attributes:
        suffix: what its prediction files are told apart by.
        metrics: what is measured, the deciding one first.
    """

    suffix: str
    metrics: tuple[Metric, ...]

    def rows_at_once(self, weights: int) -> int:
        """Rows of a batch at that many λ."""

    def answer(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[Prediction]]:
        """Return one prediction per λ and row."""

    def judged(self, prediction: Prediction) -> Prediction:
        """Return a stored prediction with its scores, one for each metric that is a mean over rows."""

    def read(self, prediction: Prediction) -> Answer:
        """Return the answer in a stored prediction; only where a metric is of all rows together."""
