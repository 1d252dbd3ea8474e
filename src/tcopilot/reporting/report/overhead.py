"""What the Copilot costs in a run's own timings (the paper's Figure 5), beside what it must cost at least."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import pandas as pd

TIMES = ["time/pilot_seconds", "time/copilot_seconds"]


class Cost(NamedTuple):
    """Time with the Copilot over time of the Pilot alone, and the floor of that ratio."""

    what: str  # `training`, or `decoding` with the benchmark
    pilot: float  # seconds of the Pilot alone: of all training steps, or of a decoded row
    both: float  # seconds with the Copilot
    ratio: float
    floor: float | None  # what arithmetic or reading weights demand, were there no other cost; None if unknown


def training_cost(metrics: pd.DataFrame, floor: float | None) -> Cost | None:
    """The whole training's cost from the last line of `metrics.csv` that has times; None without one."""
    timed = metrics.reindex(columns=TIMES).dropna()
    if timed.empty or not timed.iloc[-1].iloc[0]:
        return None
    pilot, copilot = map(float, timed.iloc[-1])
    return Cost("training", pilot, pilot + copilot, 1 + copilot / pilot, floor)


def lengths(rows: Sequence[Mapping[str, Any]], view: str) -> tuple[float, float]:
    """Return mean tokens of prompts, and of a view's targets."""
    return mean(row["source_tokens"] for row in rows), mean(len(row[view]) for row in rows)


def training_floor(parameters: Mapping[str, int], source: float, target: float, updates: int) -> float:
    """Return the ratio of multiplications: each weight meets each token of its model once in a pass.

    Args:
        parameters: counts of the Pilot's `encoder` (0 without one) and `decoder`, and of the `copilot`.
        source: mean tokens of a prompt.
        target: mean tokens of an answer; the Copilot works on these only.
        updates: of the Copilot in a round.

    >>> training_floor({"encoder": 0, "decoder": 100, "copilot": 50}, source=9, target=1, updates=1)
    1.05
    """
    read = target if parameters["encoder"] else source + target
    pilot = parameters["encoder"] * source + parameters["decoder"] * read
    return 1 + updates * parameters["copilot"] * target / pilot


def decoding_floor(parameters: Mapping[str, int], source: float, target: float) -> float:
    """Return the smaller one of two ratios: of multiplications, and of weights read when each step reads all.

    >>> decoding_floor({"encoder": 600, "decoder": 100, "copilot": 50}, source=1, target=4)
    1.2
    """
    read = 1 + parameters["copilot"] * target / (parameters["encoder"] + parameters["decoder"] * target)
    return min(read, training_floor(parameters, source, target, updates=1))


def decoding_costs(meta: Mapping[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Cost]:
    """Seconds per decoded row with and without the Copilot, of each benchmark that generates its answers."""
    found = []
    for name, benchmark in meta["benchmarks"].items():
        if took := benchmark["decoding"]:
            floor = decoding_floor(meta["parameters"], *lengths(rows[name], "emitted"))
            ratio = took["fused"] / took["pilot"]
            found.append(Cost(f"decoding {name}", took["pilot"], took["fused"], ratio, floor))
    return found
