"""Ranking metrics of one relevant item among many, and what their figures cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log2


def hit_at_k(ranks: Sequence[int | None], k: int) -> list[float]:
    """Return for each row whether the relevant item is among the first ``k``: 1 or 0.

    Args:
        ranks: Place of the relevant item, from 1; 0 or None if it was not found.
        k: The cutoff.

    >>> hit_at_k([1, 10, 11, 0, None], 10)
    [1.0, 1.0, 0.0, 0.0, 0.0]
    """
    return [float(bool(rank) and rank <= k) for rank in ranks]


def ndcg_at_k(ranks: Sequence[int | None], k: int) -> list[float]:
    """Return for each row the normalised discounted cumulative gain, 1/log2(rank + 1) within the first ``k``.

    Args:
        ranks: Place of the relevant item, from 1; 0 or None if it was not found.
        k: The cutoff.

    >>> ndcg_at_k([1, 3, 10, 11, 0, None], 10)
    [1.0, 0.5, 0.2890648263178879, 0.0, 0.0, 0.0]
    """
    return [1 / log2(rank + 1) if rank and rank <= k else 0.0 for rank in ranks]


def consistency_problems(figures: Mapping[str, float], tolerance: float = 1e-9) -> list[str]:
    """Say which figures cannot belong together, with one relevant item a row; empty if all can.

    Between neighbouring cutoffs k1 < k2 every further hit adds 1/log2(rank + 1) with k1 < rank ≤ k2, hence
    ΔHit/log2(k2 + 1) ≤ ΔNDCG ≤ ΔHit/log2(k1 + 2). The first cutoff counts from 0. Figures that break this come from
    different rankings, or from a metric that is computed wrongly.

    Args:
        figures: ``hit@K`` and ``ndcg@K``, means over the same rows, as shares or all in per cent; others are ignored,
            and so is a cutoff that has only one of the two.
        tolerance: How far each figure may be off, such as half a unit of its last digit, in the figures' unit.

    >>> consistency_problems({"hit@5": 0.3, "ndcg@5": 0.2, "hit@10": 0.4, "ndcg@10": 0.23})
    []
    >>> consistency_problems({"hit@1": 0.3, "ndcg@1": 0.2})
    ['from 0 to 1: hit rises by 0.3, so ndcg must rise by 0.3 to 0.3; it rises by 0.2']
    """
    cutoffs = sorted(
        int(name.removeprefix("hit@")) for name in figures if name.startswith("hit@") and f"ndcg@{name[4:]}" in figures
    )
    points = [(0, 0.0, 0.0), *((k, figures[f"hit@{k}"], figures[f"ndcg@{k}"]) for k in cutoffs)]
    problems = []
    for (k1, hit1, ndcg1), (k2, hit2, ndcg2) in pairwise(points):
        off = tolerance if k1 == 0 else 2 * tolerance  # nothing is off at 0
        hits, gain = hit2 - hit1, ndcg2 - ndcg1
        low, high = hits / log2(k2 + 1), hits / log2(k1 + 2)
        if hits < -off:
            problems.append(f"from {k1} to {k2}: hit falls by {-hits:.4g}, and it can only rise")
        elif not low - off - off / log2(k2 + 1) <= gain <= high + off + off / log2(k1 + 2):
            problems.append(
                f"from {k1} to {k2}: hit rises by {hits:.4g}, so ndcg must rise by {low:.4g} to {high:.4g}; "
                f"it rises by {gain:.4g}"
            )
    return problems
