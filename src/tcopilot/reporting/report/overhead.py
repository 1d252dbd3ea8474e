"""The Copilot's cost in time, as measured in a run (the paper's Figure 5), beside a lower bound on this cost."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import pandas as pd

TIMES = ["time/pilot_seconds", "time/copilot_seconds"]


class Cost(NamedTuple):
    """Time with the Copilot relative to the Pilot alone, and `floor`, the lower bound of this ratio."""

    what: str  # `training`, or `decoding` with the benchmark
    pilot: float  # seconds of the Pilot alone: for all training steps, or per decoded row
    both: float  # seconds with the Copilot
    ratio: float
    floor: float | None  # the ratio if only arithmetic or reading weights took time; None if unknown


def training_cost(metrics: pd.DataFrame, floor: float | None) -> Cost | None:
    """Return the cost of the whole training, from the last line of `metrics.csv` with times; None if there is none."""
    timed = metrics.reindex(columns=TIMES).dropna()
    if timed.empty or not timed.iloc[-1].iloc[0]:
        return None
    pilot, copilot = map(float, timed.iloc[-1])
    return Cost("training", pilot, pilot + copilot, 1 + copilot / pilot, floor)


def lengths(rows: Sequence[Mapping[str, Any]], view: str) -> tuple[float, float]:
    """Return the mean number of tokens of prompts, and of a view's targets."""
    return mean(row["source_tokens"] for row in rows), mean(len(row[view]) for row in rows)


def training_floor(parameters: Mapping[str, int], source: float, target: float, updates: int) -> float:
    """Return the ratio of multiplications, as in one pass each weight is multiplied once for each token of its model.

    Args:
        parameters: counts of the Pilot's `encoder` (0 without one) and `decoder`, and of the `copilot`.
        source: mean tokens of a prompt.
        target: mean tokens of an answer; the Copilot processes only these.
        updates: the Copilot's updates in a round.

    >>> training_floor({"encoder": 0, "decoder": 100, "copilot": 50}, source=9, target=1, updates=1)
    1.05
    """
    read = target if parameters["encoder"] else source + target
    pilot = parameters["encoder"] * source + parameters["decoder"] * read
    return 1 + updates * parameters["copilot"] * target / pilot


def decoding_floor(parameters: Mapping[str, int], source: float, target: float) -> float:
    """Return the smaller of two ratios: of multiplications, and of weights read if each step reads all weights.

    >>> decoding_floor({"encoder": 600, "decoder": 100, "copilot": 50}, source=1, target=4)
    1.2
    """
    read = 1 + parameters["copilot"] * target / (parameters["encoder"] + parameters["decoder"] * target)
    return min(read, training_floor(parameters, source, target, updates=1))


def decoding_costs(meta: Mapping[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Cost]:
    """Return the cost per decoded row with and without the Copilot, for each benchmark with generated answers."""
    found = []
    for name, benchmark in meta["benchmarks"].items():
        if took := benchmark["decoding"]:
            floor = decoding_floor(meta["parameters"], *lengths(rows[name], "emitted"))
            ratio = took["fused"] / took["pilot"]
            found.append(Cost(f"decoding {name}", took["pilot"], took["fused"], ratio, floor))
    return found
