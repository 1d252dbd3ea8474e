"""Calibration of a model's confidence: reliability over bins, and the expected calibration error."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tcopilot.evaluation.significance import Interval, token_share_interval


class Bin(NamedTuple):
    """Tokens with a confidence in (low, high]; `accuracy` is the share of right ones, `ci95` its interval."""

    low: float
    high: float
    tokens: int
    confidence: float
    accuracy: float
    ci95: Interval


def reliability(
    confidence: Sequence[float], right: Sequence[bool], bins: int = 10, rows: Sequence[int] | None = None
) -> list[Bin]:
    """Sort tokens by confidence, the largest probability, into bins of equal width; empty bins are left out.

    `rows` gives the row of each token, because intervals treat tokens of a row as correlated; without it they are
    independent.

    >>> [(b.low, b.tokens, b.accuracy) for b in reliability([0.2, 0.9, 0.8, 1.0], [False, True, False, True], 2)]
    [(0.0, 1, 0.0), (0.5, 3, 0.6666666666666666)]
    """
    sure, correct = np.asarray(confidence, dtype=float), np.asarray(right, dtype=bool)
    of_row = np.arange(len(sure)) if rows is None else np.asarray(rows)
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for index in np.unique(place).tolist():
        inside = place == index
        _, row, tokens = np.unique(of_row[inside], return_inverse=True, return_counts=True)
        interval = token_share_interval(np.bincount(row, weights=correct[inside]), tokens)
        means = (float(sure[inside].mean()), float(correct[inside].mean()))
        found.append(Bin(index / bins, (index + 1) / bins, int(inside.sum()), *means, interval))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """Return the expected calibration error Σ_b n_b/n · |accuracy_b − confidence_b|.

    The bins here include their upper edge. torchmetrics gives another value, because it puts tokens of confidence 1,
    of which a trained model has many, into a separate bin.

    >>> calibration_error([Bin(0.5, 1.0, 4, 0.9, 0.5, (0, 1)), Bin(0.0, 0.5, 4, 0.3, 0.3, (0, 1))])
    0.2
    """
    return sum(b.tokens * abs(b.accuracy - b.confidence) for b in bins) / sum(b.tokens for b in bins)
