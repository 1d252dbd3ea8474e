"""What the corrections of a trace look like: their size beside the Pilot's logits, their drift, the mistakes met.

All functions read target positions along right answers, as `views.positions` lays them out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tcopilot.evaluation.significance import Interval, mean_interval
from tcopilot.reporting import published

FEWEST = 10  # tokens at a position, below which its mean is not shown

Row = dict[str, Any]


class Drift(NamedTuple):
    """Means over the tokens at one target position under one kind of feedback; `half` widths are of 95 % intervals."""

    feedback: str
    position: int
    tokens: int
    norm: float
    norm_half: float
    cosine: float
    cosine_half: float


class Mistake(NamedTuple):
    """The Pilot said `said` in place of `token` at a position (from 1) `count` times; p̃ mended `mended` of them."""

    benchmark: str
    position: int
    token: str
    said: str
    count: int
    mended: int


def share(rows: Sequence[Row]) -> tuple[float, Interval]:
    """Return the correction's mean share of the Pilot's logit range, with its 95 % interval over rows.

    A position's share is its logit shift over max − min of the Pilot's logits; tokens of one row hang together, so
    the interval resamples rows.
    """
    per_row = [float(np.mean([p["shift"] / p["range"] for p in row["gold"]])) for row in rows]
    return float(np.mean(per_row)), mean_interval(per_row)


def domain(benchmark: str) -> str:
    """The paper's suite of a benchmark, or its own name.

    >>> domain("gsm8k"), domain("word_problems")
    ('arithmetic', 'word_problems')
    """
    known = published.benchmarks().get(benchmark)
    return known.suite if known else benchmark


def quantiles(values: Sequence[float], points: Sequence[float]) -> list[float]:
    """Return the values below which such shares of all values lie."""
    return [float(value) for value in np.quantile(np.asarray(values, dtype=float), points)]


def drift(rows: Iterable[Row]) -> list[Drift]:
    """Mean ‖f^C‖ and cosine with ℓ at each target position, under each kind of feedback.

    Positions that fewer than `FEWEST` rows reach are left out.
    """
    seen: dict[tuple[str, int], list[Sequence[float]]] = {}
    for row in rows:
        for place, position in enumerate(row["gold"], start=1):
            for feedback, pair in position["feedback"].items():
                seen.setdefault((feedback, place), []).append(pair)
    found = []
    for (feedback, place), pairs in sorted(seen.items()):
        if len(pairs) >= FEWEST:
            (norm, cosine), halves = np.mean(pairs, axis=0), 1.96 * np.std(pairs, axis=0) / len(pairs) ** 0.5
            found.append(
                Drift(feedback, place, len(pairs), float(norm), float(halves[0]), float(cosine), float(halves[1]))
            )
    return found


def frequent_mistakes(rows: Mapping[str, Sequence[Row]], most: int) -> list[Mistake]:
    """The Pilot's most frequent wrong tokens along right answers, and how many of each the correction mends."""
    counts: Counter[tuple[str, int, str, str]] = Counter()
    mended: Counter[tuple[str, int, str, str]] = Counter()
    for benchmark, some in rows.items():
        for row in some:
            for place, position in enumerate(row["gold"], start=1):
                before, after = position["right"]
                if not before:
                    key = (benchmark, place, position["token"], position["before"][0][0])
                    counts[key] += 1
                    mended[key] += after
    return [Mistake(*key, count, mended[key]) for key, count in counts.most_common(most)]
