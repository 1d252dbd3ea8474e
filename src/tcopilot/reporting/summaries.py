"""Summaries of groups of runs: mean ± sd over seeds, tests, and the paper's figures for comparison.

Shares are in percent and their differences in points, as in the paper; other metrics keep their own unit.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import NamedTuple

from scipy import stats

from tcopilot.data.metrics import printed_unit, scale
from tcopilot.evaluation.significance import ALPHA, over_seeds
from tcopilot.reporting import published
from tcopilot.reporting.seed_groups import Group

NONE, IMPOSSIBLE = "–", "†"
ACCURACIES = ("accuracy", "accuracy_lenient")  # the paper's accuracy may correspond to either


class Spread(NamedTuple):
    """Mean over seeds, and sample standard deviation where there is more than one seed."""

    mean: float
    sd: float | None


class Seen(NamedTuple):
    """One metric in one run, in the printed unit; without a Copilot the fields from `fused` to `verdict` are None."""

    seed: int
    n: int | None
    pilot: float
    fused: float | None = None
    weight: float | None = None
    p_value: float | None = None
    verdict: str | None = None
    unit: str = "%"
    higher_is_better: bool = True


@dataclass
class Line:
    """One metric of one benchmark over the seeds of an experiment."""

    benchmark: str  # or `commonsense_avg` and `arithmetic_avg`
    metric: str
    unit: str  # printed unit of every figure here: `%` for shares, `nats`, …
    n: str  # number of rows, as text because it may differ between seeds; empty for an average
    seeds: list[int]
    weights: list[float]  # the λ selected, one for each seed
    pilot: Spread  # λ = 0
    fused: Spread | None  # at the selected λ
    gain: Spread | None
    relative: float | None  # the gain in percent of the Pilot's mean
    p_value: float | None  # from the run's own paired test over rows, or from a paired t test over seeds
    verdict: str  # the outcome of that test in words
    published_pilot: float | None = None
    published_fused: float | None = None
    impossible: set[str] = field(default_factory=set)  # sides whose published NDCG contradicts the published hits

    def beyond(self, side: str) -> float | None:
        """Return our mean minus the published figure in points; None if that is missing or impossible."""
        ours, theirs = getattr(self, side), getattr(self, f"published_{side}")
        return None if ours is None or theirs is None or side in self.impossible else ours.mean - theirs


@dataclass
class Summary:
    """Results of a group of runs beside the paper's."""

    group: Group
    published_metric: str  # our metric that is compared with the paper's accuracies
    notes: list[str]
    lines: list[Line] = field(default_factory=list)  # in the paper's order; averages follow their suite
    missing: dict[str, list[str]] = field(default_factory=dict)  # by average: the benchmarks that it lacks

    @property
    def split(self) -> str:
        """The split that the figures are from."""
        return self.group.runs[0].results.reported_on

    def line(self, benchmark: str, metric: str) -> Line | None:
        """Return the line of a metric, or None."""
        return next((line for line in self.lines if (line.benchmark, line.metric) == (benchmark, metric)), None)


def summarise(group: Group, metric: str | None = None) -> Summary:
    """Summarise a group over its seeds, beside the paper's figures.

    If no metric is given, the one that decides is shown with accuracy and, if available, its lenient variant; without
    these, hits and NDCG; else all.
    """
    seen, known = _observations(group), published.benchmarks()
    shown: dict[str, list[str]] = {}
    for name in sorted(dict.fromkeys(benchmark for benchmark, _ in seen if metric or benchmark != "all"), key=_place):
        metrics = [m for benchmark, m in seen if benchmark == name]
        ranked = sorted((m for m in metrics if rank(m)[0]), key=rank)
        usual = [m for m in metrics if m in (metrics[0], *ACCURACIES)]
        usual = usual if set(usual) & set(ACCURACIES) else ranked or metrics
        if chosen := usual if metric is None else [m for m in metrics if m == metric]:
            shown[name] = chosen
    strict, lenient = ({name for name, metrics in shown.items() if kind in metrics} for kind in ACCURACIES)
    compared = "accuracy_lenient" if lenient and strict <= lenient else metric or "accuracy"
    summary = Summary(group, compared, list(group.notes))
    for suite, names in groupby(shown, lambda name: known[name].suite if name in known else None):
        here = [(name, m) for name in names for m in shown[name]]
        summary.lines += [line_over_seeds(name, m, list(seen[name, m].values())) for name, m in here]
        for m in dict.fromkeys(m for _, m in here) if suite in published.REASONING else ():
            _average(summary, suite, m, seen)
    _publish(summary)
    summary.notes += _controls(summary)
    return summary


def join_benchmarks(summaries: Sequence[Summary]) -> list[Summary]:
    """Join groups that differ only in their data, such as one run for each benchmark, into one summary.

    Averages over a suite are left out, because its benchmarks come from separately trained models.
    """
    joined: dict[tuple[str, str, str], list[list[Summary]]] = {}
    for summary in summaries:
        settings = summary.group.config.items()
        kept = sorted((k, str(v)) for k, v in settings if k.split(".")[0] not in ("data", "evaluation"))
        names = {line.benchmark for line in summary.lines}
        parts = joined.setdefault((summary.group.models, summary.split, str(kept)), [])
        free = (part for part in parts if names.isdisjoint(line.benchmark for s in part for line in s.lines))
        if (part := next(free, None)) is None:
            parts.append(part := [])
        part.append(summary)
    made = []
    for part in (part for parts in joined.values() for part in parts):
        whole = part[0]
        if len(part) > 1:
            label = f"{whole.group.models}, one run for each benchmark"
            runs = [run for s in part for run in s.group.runs]
            group = replace(whole.group, runs=runs, keys="", label=label)
            lines = [line for s in part for line in s.lines if not line.benchmark.endswith("_avg")]
            notes = list(dict.fromkeys(note for s in part for note in s.notes))
            lines.sort(key=lambda line: _place(line.benchmark))
            whole = Summary(group, whole.published_metric, notes, lines)
        made.append(whole)
    return made


def line_over_seeds(benchmark: str, metric: str, seen: Sequence[Seen]) -> Line:
    """Summarise the figures of one metric over seeds in one line.

    A single seed keeps its paired test over rows. Several seeds are compared by a paired t test over seeds, and the
    verdict also counts the verdicts of the single seeds.
    """
    both = [one for one in seen if one.fused is not None]
    gains = [one.fused - one.pilot for one in both]
    gain, base = _spread(gains), _spread([one.pilot for one in both])
    sizes = {one.n for one in seen if one.n is not None}
    p_value, verdict = _judge(both, gains)
    return Line(
        benchmark, metric, unit=seen[0].unit,
        n="–".join(str(size) for size in sorted({min(sizes), max(sizes)})) if sizes else "",
        seeds=[one.seed for one in seen], weights=[one.weight for one in both if one.weight is not None],
        pilot=_spread([one.pilot for one in seen]), fused=_spread([one.fused for one in both]), gain=gain,
        relative=100 * gain.mean / base.mean if base and base.mean else None, p_value=p_value, verdict=verdict,
    )  # fmt: skip


def _place(benchmark: str) -> int:
    """Return the position of a benchmark in the paper's order; benchmarks that are not in the paper come last."""
    order = list(published.benchmarks())
    return order.index(benchmark) if benchmark in order else len(order)


def _observations(group: Group) -> dict[tuple[str, str], dict[int, Seen]]:
    """Collect the metrics of every benchmark on the reported split, by seed."""
    seen: dict[tuple[str, str], dict[int, Seen]] = {}
    for run in group.runs:
        results, split = run.results, run.results.reported_on
        tests = {(gain.benchmark, gain.metric): gain for gain in results.gain}
        for row in results.rows:
            if (row.split, row.weight) != (split, 0):
                continue
            key, factor, weight = (row.benchmark, row.metric), scale(row.unit), results.weight_of(row.benchmark)
            kind = {"unit": printed_unit(row.unit), "higher_is_better": row.higher_is_better}
            one = Seen(results.seed, row.n, factor * row.value, **kind)
            if group.copilot and (fused := results.find(*key, split, weight)):
                one = one._replace(fused=factor * fused.value, weight=weight)
                if test := tests.get(key):
                    one = one._replace(p_value=test.p_value, verdict=test.verdict)
            seen.setdefault(key, {})[results.seed] = one
    return seen


def _average(summary: Summary, suite: str, metric: str, seen: dict[tuple[str, str], dict[int, Seen]]) -> None:
    """Add the average over a suite for the seeds that have all its benchmarks, or note which ones are missing."""
    members = {name: seen.get((name, metric), {}) for name in published.members(suite)}
    everyone = [run.results.seed for run in summary.group.runs]
    averages = []
    for seed in everyone:
        row = [have[seed] for have in members.values() if seed in have]
        if len(row) == len(members):
            pilot, fused, weights = ([getattr(one, name) for one in row] for name in ("pilot", "fused", "weight"))
            mean = None if None in fused else sum(fused) / len(row)
            weight = weights[0] if len(set(weights)) == 1 else None
            average = row[0]._replace(n=None, pilot=sum(pilot) / len(row), fused=mean, weight=weight)
            averages.append(average._replace(p_value=None, verdict=None))
    if averages:
        summary.lines.append(line_over_seeds(f"{suite}_avg", metric, averages))
    else:
        absent = [name for name, have in members.items() if not have.keys() >= set(everyone)]
        summary.missing[f"{suite}_avg {metric}"] = absent


def _controls(summary: Summary) -> list[str]:
    """Give each control's value of the metrics shown, and the difference of the fused model to it."""
    found: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
    for run in summary.group.runs:
        for control in run.results.controls:
            weight = run.results.weight_of(control.benchmark)
            fused = run.results.find(control.benchmark, control.metric, run.results.reported_on, weight)
            if fused is not None and summary.line(control.benchmark, control.metric):
                pair = (control.value, fused.value - control.value)
                found.setdefault((control.name, control.benchmark, control.metric, control.unit), []).append(pair)
    notes = []
    for (name, benchmark, metric, of_values), pairs in found.items():
        unit = printed_unit(of_values)
        value, step = (_spread([scale(of_values) * one for one in column]) for column in zip(*pairs, strict=True))
        shown = f"{figure(value, unit)} {unit}".rstrip() + f", fused − control {figure(step, unit, '+')}"
        notes.append(f"{name}: {benchmark} {metric} {shown}, {len(pairs)} seed{'s' if len(pairs) > 1 else ''}")
    return notes


def _publish(summary: Summary) -> None:
    """Add the paper's figures to ours, and note where they are not comparable."""
    pilot, copilot = summary.group.pilot, summary.group.copilot
    alone, fused = published.figures(pilot), published.figures(pilot, copilot) if copilot else {}
    for line in summary.lines:
        theirs = line.metric
        if theirs in ACCURACIES:
            theirs = "accuracy" if theirs == summary.published_metric else None
        line.published_pilot = alone.get((line.benchmark, theirs))
        line.published_fused = fused.get((line.benchmark, theirs))
        known = published.benchmarks().get(line.benchmark)
        if known and line.published_pilot is not None and line.n != str(known.rows):
            summary.notes.append(f"{line.benchmark}: n = {line.n}, the published test set has {known.rows} rows")
    if any("@" in line.metric and line.published_fused is not None for line in summary.lines):
        summary.notes.append("the size of the Copilot in the published recommendation tables is not known to us")
    for side, models, figures in (("pilot", pilot, alone), ("fused", f"{pilot} + Copilot", fused)):
        for name in dict.fromkeys(line.benchmark for line in summary.lines):
            for step in published.impossible_ndcg({m: value for (b, m), value in figures.items() if b == name}):
                for line in filter(None, (summary.line(name, metric) for metric in step.metrics)):
                    line.impossible.add(side)
                    summary.notes.append(
                        f"{IMPOSSIBLE} published NDCG here is arithmetically impossible: {models} on {name}, "
                        f"{' - '.join(step.metrics)} = {step.ndcg:.1f}, "
                        f"the published hits allow {step.low:.2f} to {step.high:.2f}"
                    )
    summary.notes = list(dict.fromkeys(summary.notes))


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    mean, sd = over_seeds(values)
    return Spread(mean, sd if len(values) > 1 else None)


def _judge(both: Sequence[Seen], gains: Sequence[float]) -> tuple[float | None, str]:
    """Return p and the verdict on a gain; see `line_over_seeds`."""
    if not both:
        return None, "no figure with a Copilot"
    if len(both) == 1:
        one = both[0]
        if one.verdict is None:
            return None, "1 seed: no spread" if one.n is None else "1 seed: no spread, and no paired test in the run"
        return one.p_value, f"{one.verdict} at n = {one.n}"
    alone = Counter(one.verdict for one in both)
    each = ", ".join(f"{alone[name]} {name}" for name in ("better", "worse", "not distinguishable") if alone[name])
    each = f"; each alone: {each}" if each else ""
    if max(gains) - min(gains) < 1e-9:
        return None, f"the same gain in all {len(both)} seeds, nothing to test{each}"
    p_value = float(stats.ttest_1samp(gains, 0.0).pvalue)
    better = (over_seeds(gains)[0] > 0) == both[0].higher_is_better
    verdict = "not distinguishable" if p_value >= ALPHA else "better" if better else "worse"
    return p_value, f"{verdict} over {len(both)} seeds{each}"


def rank(metric: str) -> tuple[str, int]:
    """Return a sort key that orders hits before NDCG and both by K; other metrics come first, with an empty name.

    >>> rank("ndcg@10"), rank("accuracy")
    (('ndcg', 10), ('', 0))
    """
    found = re.fullmatch(r"(hit|ndcg)@(\d+)", metric)
    return (found[1], int(found[2])) if found else ("", 0)


def figure(spread: Spread | None, unit: str, sign: str = "") -> str:
    """Write a mean and standard deviation, with one decimal for percent, else four; `sign` is `+` for differences."""
    if spread is None:
        return NONE
    digits = 1 if unit == "%" else 4
    return f"{spread.mean:{sign}.{digits}f}" + ("" if spread.sd is None else f" ± {spread.sd:.{digits}f}")
