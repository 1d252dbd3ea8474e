"""What the corrections of a trace look like: their size beside the Pilot's logits, their drift, the mistakes met.

All functions read target positions along right answers, as `tcopilot.evaluation.trace.positions` lays them out.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tcopilot.evaluation.significance import Interval, mean_interval
from tcopilot.reporting import published

FEWEST = 10  # tokens at a position, below which its mean is not shown
SHARES = [place / 20 for place in range(1, 20)]  # of tokens

Row = dict[str, Any]


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
    return known.suite if (known := published.benchmarks().get(benchmark)) else benchmark


def magnitudes(shifts: pd.DataFrame) -> pd.DataFrame:
    """Return `domain`, `share_of_tokens` and the `shift` below which such a share lies, in steps of 5 %."""
    points = shifts.groupby("domain", sort=False)["shift"].quantile(SHARES)
    return points.rename_axis(["domain", "share_of_tokens"]).reset_index()


def drift(rows: Iterable[Row]) -> pd.DataFrame:
    """Mean ‖f^C‖ and cosine with ℓ at each target position, under each kind of feedback.

    Returns:
        For each feedback and position its `tokens`, `norm` and `cosine`, and `norm_half` and `cosine_half`, the half
        widths of 95 % intervals. Positions that fewer than `FEWEST` rows reach are left out.
    """
    columns = ["feedback", "position", "norm", "cosine"]
    seen = [
        (feedback, place, *pair)
        for row in rows
        for place, position in enumerate(row["gold"], start=1)
        for feedback, pair in position["feedback"].items()
    ]
    groups = pd.DataFrame(seen, columns=columns).groupby(columns[:2])
    tokens = groups.size().rename("tokens")
    halves = 1.96 * groups.std(ddof=0).div(tokens**0.5, axis=0)
    found = groups.mean().join(halves, rsuffix="_half").join(tokens)
    return found[found.tokens >= FEWEST].reset_index()


def frequent_mistakes(rows: Mapping[str, Sequence[Row]], most: int) -> list[Any]:
    """The Pilot's most frequent wrong tokens along right answers, and how many of each the correction mends.

    Returns:
        `benchmark`, `position` (from 1), the right `token`, the one that the Pilot `said`, how often (`count`), and
        how many of these p̃ has `mended`.
    """
    columns = ["benchmark", "position", "token", "said", "mended"]
    wrong = [
        (benchmark, place, position["token"], position["before"][0][0], position["right"][1])
        for benchmark, some in rows.items()
        for row in some
        for place, position in enumerate(row["gold"], start=1)
        if not position["right"][0]
    ]
    groups = pd.DataFrame(wrong, columns=columns).groupby(columns[:-1], sort=False)["mended"]
    counts = groups.agg(count="size", mended="sum").sort_values("count", ascending=False, kind="stable")
    return list(counts.head(most).reset_index().itertuples(index=False, name="Mistake"))
