"""Statistics of the corrections in a trace: their size relative to the Pilot's logits, their drift over positions, and
the mistakes that they mend. All functions read positions along right answers, see `tcopilot.evaluation.trace`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tcopilot.evaluation.significance import Interval, mean_interval
from tcopilot.reporting import published

FEWEST = 10  # a position with fewer tokens is not shown
SHARES = [place / 20 for place in range(1, 20)]  # shares of tokens, for quantiles

Row = dict[str, Any]


def share(rows: Sequence[Row]) -> tuple[float, Interval]:
    """Return the correction's mean share of the Pilot's logit range, with its 95 % interval over rows.

    The share at a position is the logit shift divided by max − min of the Pilot's logits. The interval resamples rows,
    because tokens of one row are correlated.
    """
    per_row = [float(np.mean([p["shift"] / p["range"] for p in row["gold"]])) for row in rows]
    return float(np.mean(per_row)), mean_interval(per_row)


def domain(benchmark: str) -> str:
    """Return the suite of a benchmark in the paper, or the benchmark's own name.

    >>> domain("gsm8k"), domain("word_problems")
    ('arithmetic', 'word_problems')
    """
    return known.suite if (known := published.benchmarks().get(benchmark)) else benchmark


def magnitudes(shifts: pd.DataFrame) -> pd.DataFrame:
    """Return quantiles of the shift by domain: `share_of_tokens`, in steps of 5 %, have a shift below `shift`."""
    points = shifts.groupby("domain", sort=False)["shift"].quantile(SHARES)
    return points.rename_axis(["domain", "share_of_tokens"]).reset_index()


def drift(rows: Iterable[Row]) -> pd.DataFrame:
    """Average ‖f^C‖ and its cosine with ℓ at each target position, for each kind of feedback.

    Returns:
        For each feedback and position `tokens`, `norm` and `cosine`, with the half widths of their 95 % intervals in
        `norm_half` and `cosine_half`. Positions that fewer than `FEWEST` rows reach are left out.
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
    """Count the Pilot's most frequent wrong tokens along right answers, and how many of each the correction mends.

    Returns:
        `benchmark`, `position` (from 1), the right `token`, the token that the Pilot `said`, how often (`count`), and
        for how many of these p̃ has the right token (`mended`).
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
