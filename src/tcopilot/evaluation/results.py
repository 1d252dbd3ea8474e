"""`results.json`: the results of a run, in the one format that tables, tests and dashboards read.

Values are in the unit of their metric, such as fractions for accuracy; only tables show percent and points. Every
figure carries the unit and direction of its metric, so that readers of the file need not know metrics by name.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Self, TypeVar, get_args, get_origin

import pandas as pd

from tcopilot.data.metrics import SHARE, Metric
from tcopilot.evaluation.significance import Comparison, Direction, Interval, direction
from tcopilot.run_directory import write_whole

VERSION = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One metric of the fused model on one split at one λ; `weight` 0 is the Pilot."""

    benchmark: str
    split: str
    metric: str
    weight: float
    value: float
    n: int
    ci95: Interval
    higher_is_better: bool = True
    unit: str = SHARE


@dataclass(frozen=True)
class Gain:
    """Comparison of the Pilot with Pilot + Copilot at the selected λ, paired over the rows of the reported split.

    `fixed` and `broken` count rows that improved and worsened; None for a metric that does not score single rows.
    """

    benchmark: str
    metric: str
    pilot: float
    fused: float
    difference: float
    ci95: Interval
    fixed: int | None
    broken: int | None
    p_value: float
    higher_is_better: bool = True
    unit: str = SHARE

    @classmethod
    def of(cls, benchmark: str, metric: Metric, comparison: Comparison) -> Self:
        """Make a gain from a comparison, the benchmark and the metric."""
        found = {k: v for k, v in comparison._asdict().items() if k in cls.__dataclass_fields__}
        return cls(benchmark, metric.name, **found, unit=metric.unit)

    @property
    def verdict(self) -> Direction:
        """Whether the fused model is better or worse than the Pilot, or not distinguishable from it."""
        return direction(self.difference, self.ci95, self.p_value, higher_is_better=self.higher_is_better)


@dataclass(frozen=True, kw_only=True)
class Control(Row):
    """A figure of another model on the same rows, such as the Pilot trained for the wall time of the joint run.

    The cost of training it is given by `rounds` (Pilot updates), `train_seconds` (wall time) and `train_flops`.
    `weight` is the λ at which it answers, which is above 0 if the control is itself a fused model.
    """

    weight: float = 0.0
    name: str
    rounds: int
    train_seconds: float
    train_flops: float | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Selection:
    """The λ that a rule chooses on validation rows, and the figures at this λ there and on the reported rows.

    Attributes:
        rule: `nll`, `metric`, `closed_form`, `kept` (the λ of an earlier run), `constant`, or `shared` (a benchmark
            with too few rows takes the λ of `all`).
        benchmark: The benchmark that the λ is for, or `all`.
        taken: Whether the λ of this rule was used.
        metric: First metric of the benchmark; for `all` the mean over benchmarks, or None if their metrics differ.
        validation: Value of the metric on the rows that λ is chosen on; None if there are none.
        reported, reported_nll: Figures on the reported rows; None if these were not answered at this λ.
    """

    rule: str
    benchmark: str
    weight: float
    taken: bool
    metric: str | None
    validation: float | None
    reported: float | None
    validation_nll: float | None
    reported_nll: float | None
    higher_is_better: bool = True
    unit: str = SHARE


def direction_and_unit(metric: Metric) -> dict[str, Any]:
    """Return the fields of a metric that rows, gains and controls store besides its name."""
    return {"higher_is_better": metric.higher_is_better, "unit": metric.unit}


@dataclass(kw_only=True)
class Results:
    """All figures of one run.

    Attributes:
        version: Version of this layout.
        config: Path of the resolved config, relative to the run directory.
        rounds: Pilot updates made.
        train_seconds: Seconds spent in training steps, for both models.
        train_flops: Floating-point operations of these steps; None if they were not counted.
        recording_flops: Those of them that recorded a frozen Pilot; None if none was recorded.
        selected_weight: The λ of `gain`; if each benchmark has its own, a mapping that also has the best for `all`.
        selected_on: Split on which λ was chosen, never the test split.
        reported_on: Split of `gain` and `controls`, and of every table.
        selection: The λ that each rule would choose, and its figures; empty if λ was given.
        best_weight: λ* in closed form on `selected_on`; None for a fusion rule without a closed form.
        notes: Remarks that a reader of the figures needs to know, one sentence each.
        data: Counts and lengths of the rows of each `<benchmark>/<split>`, as the data module's `summary` gives them.
    """

    version: int = VERSION
    seed: int
    git: str
    config: str
    params: dict[str, int]
    rounds: int
    train_seconds: float
    train_flops: float | None = None
    recording_flops: float | None = None
    selected_weight: float | dict[str, float]
    selected_on: str
    reported_on: str
    rows: list[Row]
    gain: list[Gain]
    controls: list[Control] = field(default_factory=list)
    selection: list[Selection] = field(default_factory=list)
    best_weight: float | None = None
    notes: list[str] = field(default_factory=list)
    data: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def benchmarks(self) -> list[str]:
        """List the benchmarks for which a gain was computed."""
        return list(dict.fromkeys(gain.benchmark for gain in self.gain))

    @property
    def choice(self) -> str:
        """How the λ of all benchmarks together came about, in words that follow it."""
        rule = next((one.rule for one in self.selection if one.taken and one.benchmark == "all"), None)
        told = {"constant": "taken as a constant", "kept": "kept from the training run"}
        return told.get(rule, f"chosen on {self.selected_on}")

    def weight_of(self, benchmark: str) -> float | None:
        """Return the λ selected for a benchmark, or None if none was."""
        selected = self.selected_weight
        return selected.get(benchmark) if isinstance(selected, Mapping) else selected

    def find(self, benchmark: str, metric: str, split: str, weight: float | None) -> Row | None:
        """Return the row of this benchmark, metric, split and λ, or None."""
        key = (benchmark, metric, split, weight)
        return next((row for row in self.rows if (row.benchmark, row.metric, row.split, row.weight) == key), None)

    def table(self) -> pd.DataFrame:
        """Return the rows as a table, with `ci95_low` and `ci95_high` in place of `ci95`."""
        table = pd.DataFrame(map(asdict, self.rows), columns=[f.name for f in fields(Row)])
        return table.join(pd.DataFrame(table.pop("ci95").tolist(), columns=["ci95_low", "ci95_high"]))

    def row_wise(self) -> dict[str, Gain]:
        """Return for each benchmark the first gain whose metric scores every row by itself."""
        return {gain.benchmark: gain for gain in reversed(self.gain) if gain.fixed is not None}

    def save(self, path: str | Path) -> None:
        """Write the file atomically, so that a reader sees either the old or the new one.

        Raises:
            TypeError: If a figure is not a plain Python value.
            ValueError: If a figure is nan or infinite, which JSON cannot hold.
        """
        text = json.dumps(asdict(self), indent=2, allow_nan=False, ensure_ascii=False)
        write_whole(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file written by `save`.

        Keys that this version does not know are ignored, so that other programs may add their own.

        Raises:
            ValueError: If the file is not JSON, has another version, or lacks a key; the message names file and key.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        version = data.get("version") if isinstance(data, dict) else None
        if version != VERSION:
            raise ValueError(f"{path}: 'version' is {version!r}, this code reads {VERSION}; evaluate the run anew")
        parts = {"rows": Row, "gain": Gain, "controls": Control, "selection": Selection}
        for name, kind in parts.items():
            if isinstance(data.get(name), list):
                data[name] = [_build(kind, item, f"{path}: {name}[{i}]") for i, item in enumerate(data[name])]
        return _build(cls, data, str(path))


def _build(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """Fill a dataclass from parsed JSON; `where` names the place in the error."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: expected an object, found {data!r}")
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in data]:
        raise ValueError(f"{where}: missing {', '.join(map(repr, missing))}")
    known = {f.name: data[f.name] for f in fields(kind) if f.name in data}
    if isinstance(known.get("ci95"), list):
        known["ci95"] = tuple(known["ci95"])
    types = {f.name: f.type for f in fields(kind)}
    if wrong := [
        f"{name!r} is {v!r}, not {_words(types[name])}" for name, v in known.items() if not _fits(v, types[name])
    ]:
        raise ValueError(f"{where}: {'; '.join(wrong)}")
    return kind(**known)


def _fits(value: Any, kind: Any) -> bool:
    """Tell whether a value from JSON has the type of a dataclass field; numbers must be finite."""
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool) and isfinite(value)
    parts = get_args(kind)
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(_fits(value, part) for part in parts)
    if not isinstance(value, get_origin(kind) or kind):
        return False
    if isinstance(value, tuple):
        return len(value) == len(parts) and all(map(_fits, value, parts))
    return not isinstance(value, Mapping) or all(_fits(one, parts[1]) for one in value.values())


def _words(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}
    if isinstance(kind, UnionType):
        return " or ".join(map(_words, get_args(kind)))
    return names.get(kind) or {tuple: "two numbers", dict: "an object of numbers"}.get(get_origin(kind), "a list")
