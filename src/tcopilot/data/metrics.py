"""Metrics: what a benchmark measures, which direction is better, and how a figure is printed.

A benchmark lists its metrics (`Benchmark.metrics`); λ is chosen by the first. To add your own, subclass `Metric` or
`CorpusMetric` and name the class in the benchmark's YAML: ``metric: {_target_: my_metrics.EditDistance}``.
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
    """A model's answer to a row, in the form that metrics score."""

    text: str
    """The generated text, or the first item of a ranking."""
    extracted: str | None
    """The answer that the benchmark extracts from the text; None if there is none."""
    gold: str
    correct: bool
    correct_leniently: bool = False
    """Whether the answer is right under the benchmark's lenient reading, if it has one."""
    rank: int | None = None
    """Rank of the gold item, from 1; 0 or None if it was not found or nothing was ranked."""


@dataclass(frozen=True)
class Metric:
    """A metric that scores each row and averages the scores; this one is 1 for a right answer and 0 for a wrong one.

    Attributes:
        name: Its name in the results.
        higher_is_better: Which direction is an improvement: when λ is chosen, and in every comparison and verdict.
        unit: ``share``, or a short text printed behind the number, such as ``nats``; may be empty.
        compared: Whether the gain of the fused model in this metric is tested; if not, it is only reported.
    """

    name: str
    higher_is_better: bool = True
    unit: str = SHARE
    compared: bool = True

    def score(self, answer: Answer) -> Any:
        """Return the score of one row, a finite number."""
        return float(answer.correct)

    def value(self, scores: Sequence[Any]) -> float:
        """Aggregate what ``score`` returned for each row into one figure."""
        return sum(scores) / len(scores)


@dataclass(frozen=True)
class CorpusMetric(Metric, ABC):
    """A metric of all rows together that is not a mean of scores per row, such as macro-F1.

    Its confidence intervals come from resampling rows, so ``value`` is called a thousand times for each interval.
    """

    def score(self, answer: Answer) -> Answer:
        """Return the answer unchanged, for ``value`` to aggregate."""
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
    """The mean over classes, regardless of their size, of the F1 of each; the classes are the distinct gold answers.

    A wrong answer that is not one of the classes, or is missing, counts only as a miss of the gold class.

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


def class_called(name: str) -> str | None:
    """Return the path of the metric class whose usual name this is, if it is not `Metric` itself.

    >>> class_called("macro_f1"), class_called("accuracy")
    ('tcopilot.data.metrics.MacroF1', None)
    """
    kinds = list(Metric.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((f"{kind.__module__}.{kind.__qualname__}" for kind in kinds if vars(kind).get("name") == name), None)


NLL = Metric("nll", higher_is_better=False, unit="nats")
"""Negative log-likelihood per target token, reported over all benchmarks together."""


def scale(unit: str) -> float:
    """Return the factor by which values are multiplied for printing: 100 for shares, else 1."""
    return 100.0 if unit == SHARE else 1.0


def printed_unit(unit: str) -> str:
    """Return the unit to print behind a value: ``%`` for shares, else the unit itself."""
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
    """Write the difference of two values of a metric, with its interval if given, and its unit if ``named``.

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
    """The rise of hit and NDCG from one cutoff to the next, and the range of NDCG's rise that hit permits."""

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
    """Return the steps between cutoffs whose hit and NDCG cannot stem from one ranking with one relevant item per row.

    Between neighbouring cutoffs k1 < k2 every further hit adds 1/log2(rank + 1) with k1 < rank ≤ k2, hence
    ΔHit/log2(k2 + 1) ≤ ΔNDCG ≤ ΔHit/log2(k1 + 2). For the first cutoff k1 is 0. Figures that violate these bounds
    come from different rankings, or from a metric that is computed wrongly.

    Args:
        figures: Means over the same rows, as shares or all in per cent. Only cutoffs with both ``hit@K`` and
            ``ndcg@K`` count.
        tolerance: Rounding error of each figure in its own unit, such as half a unit of the last digit.
    """
    cutoffs = sorted(int(name[4:]) for name in figures if name[:4] == "hit@" and f"ndcg@{name[4:]}" in figures)
    points = [(0, 0.0, 0.0), *((k, figures[f"hit@{k}"], figures[f"ndcg@{k}"]) for k in cutoffs)]
    steps = []
    for (k1, hit1, ndcg1), (k2, hit2, ndcg2) in pairwise(points):
        off = tolerance if k1 == 0 else 2 * tolerance  # the figures at 0 are exact
        hits, gain = hit2 - hit1, ndcg2 - ndcg1
        low, high = hits / log2(k2 + 1), hits / log2(k1 + 2)
        possible = low - off - off / log2(k2 + 1) <= gain <= high + off + off / log2(k1 + 2)
        if hits < -off or not possible:
            steps.append(RankingStep(k1, k2, hits, gain, low, high))
    return steps


def consistency_problems(figures: Mapping[str, float], tolerance: float = 1e-9) -> list[str]:
    """Say which figures cannot stem from one ranking; see `impossible_steps`.

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
