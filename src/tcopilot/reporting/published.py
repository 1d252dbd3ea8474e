"""The figures of the paper (arXiv 2505.16270), so that tables can put them beside ours.

Figures are in percent, as printed, and rounded to 0.1. The paper gives means of three runs without a spread.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from math import log2
from typing import NamedTuple

REASONING = ("commonsense", "arithmetic")  # suites that the paper averages
ROUNDING = 0.05  # points by which a published figure may be off


class Benchmark(NamedTuple):
    """One column of the paper: `label` is its head there, `rows` the size of its test set."""

    name: str
    label: str
    suite: str
    rows: int


class Impossible(NamedTuple):
    """A published step from NDCG@K to a larger K that the published hits rule out, all in points."""

    metric: str
    before: str | None
    step: float
    low: float
    high: float

    def __str__(self) -> str:
        name = f"{self.metric} - {self.before}" if self.before else self.metric
        return f"{name} = {self.step:.1f}, the published hits allow {self.low:.2f} to {self.high:.2f}"


@cache
def benchmarks() -> dict[str, Benchmark]:
    """Return the paper's benchmarks by our name of them, in the order of its tables."""
    rows = (Benchmark(row["benchmark"], row["label"], row["suite"], int(row["rows"])) for row in _read("benchmarks"))
    return {row.name: row for row in rows}


def members(suite: str) -> list[str]:
    """Return the benchmarks of a suite.

    >>> members("arithmetic")
    ['aqua', 'gsm8k', 'mawps', 'svamp']
    """
    return [benchmark.name for benchmark in benchmarks().values() if benchmark.suite == suite]


def pilot_name(path: str | None) -> str | None:
    """Return the paper's name of a Pilot, or None if the paper has no such model.

    Only the last part of the path counts, so that a local copy of a checkpoint is known too.

    >>> pilot_name("meta-llama/Llama-3.2-1B"), pilot_name("/models/FLAN-t5-small/"), pilot_name(None)
    ('LLaMA-3.2-1B', 'FLAN-T5-small', None)
    """
    row = _model(path)
    return row["pilot"] if row else None


def copilot_name(pilot_path: str | None, copilot_path: str | None, layers: float | None) -> str | None:
    """Return the paper's name of a Copilot, or None if the paper has none like it.

    Args:
        pilot_path: Checkpoint of the Pilot, whose decoder is copied if the Copilot has no path.
        copilot_path: Checkpoint that the Copilot starts from.
        layers: Its depth, a number or a share; the paper's Copilots are as deep as their checkpoint.

    >>> copilot_name("google/flan-t5-small", None, None), copilot_name("google/flan-t5-small", None, 0.5)
    ('T-Copilot-small', None)
    """
    row = _model(copilot_path or pilot_path)
    full = layers is None or (isinstance(layers, float) and layers == 1) or (row and str(layers) == row["layers"])
    return (row["copilot"] or None) if row and full else None


def figures(pilot: str | None, copilot: str | None = None) -> dict[tuple[str, str], float]:
    """Return what the paper prints for a Pilot alone, or with a Copilot.

    Args:
        pilot: The paper's name of the Pilot.
        copilot: The paper's name of the Copilot; None is the Pilot alone.

    Returns:
        Percent by benchmark and metric. The averages are there as benchmarks `commonsense_avg` and `arithmetic_avg`.
        Empty if nothing was published.
    """
    if pilot is None:
        return {}
    found = {}
    for row in _read("reasoning"):
        if (row.pop("pilot"), row.pop("copilot")) == (pilot, copilot or ""):
            found |= {(benchmark, "accuracy"): float(value) for benchmark, value in row.items()}
    for row in _read("recommendation"):
        benchmark = row.pop("benchmark")
        if (row.pop("pilot"), row.pop("copilot")) == (pilot, "T-Copilot" if copilot else ""):
            found |= {(benchmark, metric): float(value) for metric, value in row.items()}
    return found


def impossible_ndcg(found: Mapping[str, float], rounding: float = ROUNDING) -> list[Impossible]:
    """Return the steps of a published NDCG that contradict the hits published beside it.

    With one right item for each user, a hit that is new between K1 and K2 lies on a rank from K1 + 1 to K2 and adds
    1 / log2(rank + 1). So ΔHit / log2(K2 + 1) ≤ ΔNDCG ≤ ΔHit / log2(K1 + 2), and the same holds from K1 = 0.

    Args:
        found: Figures of one row in points, by metric: `hit@5`, `ndcg@5` and so on.
        rounding: Points by which every figure may be off.

    Example:
        >>> [str(step) for step in impossible_ndcg({"hit@10": 2.9, "hit@20": 5.4, "ndcg@10": 1.4, "ndcg@20": 3.5})]
        ['ndcg@20 - ndcg@10 = 2.1, the published hits allow 0.57 to 0.70']
    """
    cuts = sorted(int(name[5:]) for name in found if re.fullmatch(r"ndcg@\d+", name) and f"hit@{name[5:]}" in found)
    steps = []
    for first, last in zip([0, *cuts], cuts, strict=False):
        hit = found[f"hit@{last}"] - found.get(f"hit@{first}", 0.0)
        step = found[f"ndcg@{last}"] - found.get(f"ndcg@{first}", 0.0)
        slack = rounding * (2 if first else 1) + 1e-9
        low, high = hit / log2(last + 1), hit / log2(first + 2)
        if not low - slack / log2(last + 1) - slack <= step <= high + slack / log2(first + 2) + slack:
            steps.append(Impossible(f"ndcg@{last}", f"ndcg@{first}" if first else None, step, low, high))
    return steps


def _model(path: str | None) -> dict[str, str] | None:
    last = (path or "").rstrip("/").rpartition("/")[2].casefold()
    return next((row for row in _read("models") if row["checkpoint"].casefold() == last), None)


def _read(name: str) -> Iterator[dict[str, str]]:
    """Rows of a file of the package; lines with # are remarks."""
    text = (files("tcopilot.reporting") / "paper_tables" / f"{name}.csv").read_text(encoding="utf-8")
    return csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
