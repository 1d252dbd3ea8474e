"""The figures of the paper (arXiv 2505.16270), for comparison with ours in tables.

Figures are in percent and rounded to 0.1, as printed. The paper gives means of three runs without a deviation.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import pandas as pd

from tcopilot.data.metrics import RankingStep, impossible_steps

REASONING = ("commonsense", "arithmetic")  # suites that the paper averages
ROUNDING = 0.05  # largest rounding error of a published figure, in points


class Benchmark(NamedTuple):
    """One column of the paper's tables: `label` is its heading there, `rows` the size of the test set."""

    name: str
    label: str
    suite: str
    rows: int


@cache
def benchmarks() -> dict[str, Benchmark]:
    """Return the paper's benchmarks by our names, in the order of the paper's tables."""
    return {row[0]: Benchmark(*row) for row in _read("benchmarks").itertuples(index=False, name=None)}


def members(suite: str) -> list[str]:
    """Return the benchmarks of a suite.

    >>> members("arithmetic")
    ['aqua', 'gsm8k', 'mawps', 'svamp']
    """
    return [benchmark.name for benchmark in benchmarks().values() if benchmark.suite == suite]


def pilot_name(path: str | None) -> str | None:
    """Return the paper's name of a Pilot, or None if the paper has no such model.

    Only the last part of the path is compared, so that local copies of a checkpoint are recognised.

    >>> pilot_name("meta-llama/Llama-3.2-1B"), pilot_name("/models/FLAN-t5-small/"), pilot_name(None)
    ('LLaMA-3.2-1B', 'FLAN-T5-small', None)
    """
    row = _model(path)
    return None if row is None else row.pilot


def copilot_name(pilot_path: str | None, copilot_path: str | None, layers: float | None) -> str | None:
    """Return the paper's name of a Copilot, or None if the paper has no such Copilot.

    Without `copilot_path` the Copilot is a copy of the Pilot's decoder. `layers` is their number or share; the paper's
    Copilots have all layers of their checkpoint.

    >>> copilot_name("google/flan-t5-small", None, None), copilot_name("google/flan-t5-small", None, 0.5)
    ('T-Copilot-small', None)
    """
    row = _model(copilot_path or pilot_path)
    full = layers is None or (isinstance(layers, float) and layers == 1)
    return row.copilot or None if row is not None and (full or str(layers) == row.layers) else None


def figures(pilot: str | None, copilot: str | None = None) -> dict[tuple[str, str], float]:
    """Return the paper's figures for a Pilot alone or with a Copilot, both given by their names in the paper.

    Returns:
        Percent by benchmark and metric. Averages are listed as benchmarks `commonsense_avg` and `arithmetic_avg`.
        Empty if nothing was published.
    """
    found = {}
    for table, name in (("reasoning", copilot), ("recommendation", copilot and "T-Copilot")):
        rows = _read(table)
        for row in rows[(rows.pilot == pilot) & (rows.copilot == (name or ""))].to_dict("records"):
            benchmark = row.pop("benchmark", None)
            values = {key: value for key, value in row.items() if key not in ("pilot", "copilot")}
            found |= {(benchmark or key, key if benchmark else "accuracy"): value for key, value in values.items()}
    return found


def impossible_ndcg(found: Mapping[str, float]) -> list[RankingStep]:
    """Return the steps of a published NDCG that contradict the published hits by more than rounding errors.

    `found` holds figures in percent by metric: `hit@5`, `ndcg@5` and so on.
    """
    return impossible_steps(found, ROUNDING + 1e-9)


def _model(path: str | None) -> pd.Series | None:
    models, last = _read("models"), str(path or "").rstrip("/").rpartition("/")[2].casefold()
    found = models[models.checkpoint.str.casefold() == last]
    return None if found.empty else found.iloc[0]


@cache
def _read(name: str) -> pd.DataFrame:
    """Read a table of the package, in which # starts a comment and empty cells are empty texts."""
    with (files("tcopilot.reporting") / "paper_tables" / f"{name}.csv").open(encoding="utf-8") as file:
        options = {"keep_default_na": False, "dtype": {"layers": str}, "float_precision": "round_trip"}
        return pd.read_csv(file, comment="#", **options)
