"""Metrics: what a benchmark measures, which direction is better, and how a figure is printed.

A benchmark owns its metrics (`Benchmark.metrics`); λ is chosen by the first. A metric of one's own is a subclass of
`Metric` or `CorpusMetric` that the benchmark's YAML names: ``metric: {_target_: my_metrics.EditDistance}``.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from typing import Any, NamedTuple

SHARE = "share"
"""The unit of metrics from 0 to 1, which are printed in per cent and whose differences are percentage points."""


class Answer(NamedTuple):
    """What a model answered to a row, as metrics see it."""

    text: str
    """The text that was generated; of a ranking, its first item."""
    extracted: str | None
    """The answer that the benchmark reads in the text, None if it finds none."""
    gold: str
    correct: bool
    correct_leniently: bool = False
    """Whether the benchmark's lenient reading of the text is right, where it has one."""
    rank: int | None = None
    """Place of the gold item in a ranking, from 1; 0 or None if it was not found, or if nothing was ranked."""


@dataclass(frozen=True)
class Metric:
    """A metric that scores each row and averages the scores; this one is 1 for a right answer and 0 for a wrong one.

    Attributes:
        name: Its name in the results.
        higher_is_better: Which direction is an improvement: when λ is chosen, and in every comparison and verdict.
        unit: ``share``, or a short text printed behind the number, such as ``nats``; may be empty.
        compared: Whether the fused model's gain in it is tested; if not, it is reported only.
    """

    name: str
    higher_is_better: bool = True
    unit: str = SHARE
    compared: bool = True

    def score(self, answer: Answer) -> Any:
        """Return the score of one row, a finite number."""
        return float(answer.correct)

    def value(self, scores: Sequence[Any]) -> float:
        """Return the figure of all rows from what ``score`` returned for each."""
        return sum(scores) / len(scores)


@dataclass(frozen=True)
class CorpusMetric(Metric, ABC):
    """A metric of all rows together, which is no mean of their scores.

    Its intervals come from resampling rows, so ``value`` is computed a thousand times for each of them.
    """

    def score(self, answer: Answer) -> Answer:
        """Hand the answer on to ``value``."""
        return answer

    @abstractmethod
    def value(self, scores: Sequence[Answer]) -> float:
        """Return the figure of these rows' answers, a finite number."""


@dataclass(frozen=True)
class LenientAccuracy(Metric):
    """The share of rows that are right under the benchmark's lenient reading."""

    name: str = "accuracy_lenient"

    def score(self, answer: Answer) -> float:
        """Return 1 or 0."""
        return float(answer.correct_leniently)


@dataclass(frozen=True)
class NoAnswer(Metric):
    """The share of rows without an answer in the form that was asked for."""

    name: str = "no_answer"
    higher_is_better: bool = False
    compared: bool = False

    def score(self, answer: Answer) -> float:
        """Return 1 where nothing was extracted."""
        return float(answer.extracted is None)


@dataclass(frozen=True)
class MacroF1(CorpusMetric):
    """The F1 of each gold answer as a class, averaged over the classes whatever their size.

    A wrong answer that is no class, or none at all, counts as a miss of the gold class only.

    >>> answers = [Answer("", found, gold, found == gold) for found, gold in ("aa", "aa", "ba", "bb", ("?", "b"))]
    >>> round(MacroF1().value(answers), 4)  # a: 2 hits, 1 miss, F1 4/5; b: 1 hit, 1 miss, 1 false alarm, F1 1/2
    0.65
    """

    name: str = "macro_f1"

    def value(self, scores: Sequence[Answer]) -> float:
        """Return the mean over the classes of 2·hits / (rows of the class + answers that name it)."""
        golds = Counter(answer.gold for answer in scores)
        named = Counter(answer.gold if answer.correct else answer.extracted for answer in scores)
        hits = Counter(answer.gold for answer in scores if answer.correct)
        return sum(2 * hits[gold] / (count + named[gold]) for gold, count in golds.items()) / len(golds)


@dataclass(frozen=True)
class Hit(Metric):
    """The share of rows whose relevant item is among the first ``k`` of a ranking."""

    k: int = 10

    def score(self, answer: Answer) -> float:
        """Return 1 or 0."""
        return float(0 < (answer.rank or 0) <= self.k)


@dataclass(frozen=True)
class NDCG(Metric):
    """The normalised discounted cumulative gain within the first ``k`` of a ranking, with one relevant item a row."""

    k: int = 10

    def score(self, answer: Answer) -> float:
        """Return 1/log2(rank + 1), or 0 beyond ``k``."""
        return 1 / log2(answer.rank + 1) if 0 < (answer.rank or 0) <= self.k else 0.0


NLL = Metric("nll", higher_is_better=False, unit="nats")
"""Negative log-likelihood per target token, which is reported of all benchmarks together."""


def scale(unit: str) -> float:
    """Return what values are multiplied by in print: 100 for shares, else 1."""
    return 100.0 if unit == SHARE else 1.0


def printed_unit(unit: str) -> str:
    """Return what stands behind a printed value: ``%`` for shares, else the unit itself."""
    return "%" if unit == SHARE else unit


def digits_of(unit: str) -> int:
    """Return the number of decimals of a printed value: 2 for shares, which are in per cent, else 4."""
    return 2 if unit == SHARE else 4


def show(value: float, unit: str, digits: int | None = None) -> str:
    """Write a metric's value with its unit.

    >>> show(0.6125, "share"), show(1.5, "nats"), show(3, "", digits=1)
    ('61.25 %', '1.5000 nats', '3.0')
    """
    digits = digits_of(unit) if digits is None else digits
    return f"{scale(unit) * value:.{digits}f} {printed_unit(unit)}".rstrip()


def show_difference(
    value: float,
    unit: str,
    interval: tuple[float, float] | None = None,
    digits: int | None = None,
    named: bool = False,
) -> str:
    """Write a difference between two values of a metric, if given with its interval and if ``named`` with its unit.

    >>> show_difference(0.025, "share"), show_difference(-0.1, "nats", (-0.2, 0.0), digits=2)
    ('+2.50', '-0.10 [-0.20, +0.00]')
    >>> show_difference(0.025, "share", (0.01, 0.04), named=True)
    '+2.50 points [+1.00, +4.00]'
    """
    digits = digits_of(unit) if digits is None else digits
    first, *ends = (f"{scale(unit) * one:+.{digits}f}" for one in (value, *(interval or ())))
    unit = ("points" if unit == SHARE else unit) if named else ""
    return " ".join(part for part in (first, unit, f"[{', '.join(ends)}]" if ends else "") if part)


class RankingStep(NamedTuple):
    """From one cutoff to the next larger one: how much hit and NDCG rise, and the range that hit leaves to NDCG."""

    first: int  # 0 where there is no smaller cutoff
    last: int
    hit: float
    ndcg: float
    low: float
    high: float

    @property
    def metrics(self) -> list[str]:
        """The NDCG at both cutoffs, the larger one first."""
        return [f"ndcg@{cutoff}" for cutoff in (self.last, self.first) if cutoff]


def impossible_steps(figures: Mapping[str, float], tolerance: float = 1e-9) -> list[RankingStep]:
    """Return the steps between cutoffs whose figures cannot belong together, with one relevant item a row.

    Between neighbouring cutoffs k1 < k2 every further hit adds 1/log2(rank + 1) with k1 < rank ≤ k2, hence
    ΔHit/log2(k2 + 1) ≤ ΔNDCG ≤ ΔHit/log2(k1 + 2). The first cutoff counts from 0. Figures that break this come from
    different rankings, or from a metric that is computed wrongly.

    Args:
        figures: Means over the same rows, as shares or all in per cent. Only cutoffs with both ``hit@K`` and
            ``ndcg@K`` count.
        tolerance: How far each figure may be off, such as half a unit of its last digit, in the figures' unit.
    """
    cutoffs = sorted(int(name[4:]) for name in figures if name[:4] == "hit@" and f"ndcg@{name[4:]}" in figures)
    points = [(0, 0.0, 0.0), *((k, figures[f"hit@{k}"], figures[f"ndcg@{k}"]) for k in cutoffs)]
    steps = []
    for (k1, hit1, ndcg1), (k2, hit2, ndcg2) in pairwise(points):
        off = tolerance if k1 == 0 else 2 * tolerance  # nothing is off at 0
        hits, gain = hit2 - hit1, ndcg2 - ndcg1
        low, high = hits / log2(k2 + 1), hits / log2(k1 + 2)
        possible = low - off - off / log2(k2 + 1) <= gain <= high + off + off / log2(k1 + 2)
        if hits < -off or not possible:
            steps.append(RankingStep(k1, k2, hits, gain, low, high))
    return steps


def consistency_problems(figures: Mapping[str, float], tolerance: float = 1e-9) -> list[str]:
    """Say which figures cannot belong together; see `impossible_steps`.

    >>> consistency_problems({"hit@5": 0.3, "ndcg@5": 0.2, "hit@10": 0.4, "ndcg@10": 0.23})
    []
    >>> consistency_problems({"hit@1": 0.3, "ndcg@1": 0.2})
    ['from 0 to 1: hit rises by 0.3, so ndcg must rise by 0.3 to 0.3; it rises by 0.2']
    """
    problems = []
    for step in impossible_steps(figures, tolerance):
        said = f"hit falls by {-step.hit:.4g}, and it can only rise"
        if step.hit >= 0:
            must = f"{step.low:.4g} to {step.high:.4g}; it rises by {step.ndcg:.4g}"
            said = f"hit rises by {step.hit:.4g}, so ndcg must rise by {must}"
        problems.append(f"from {step.first} to {step.last}: {said}")
    return problems
