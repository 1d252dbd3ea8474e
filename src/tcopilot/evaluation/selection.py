"""Which λ: by the likelihood of the rows to choose on or by their metric, and what stands where these are too few.

Two λ that change the answers of a tenth of the rows differ in accuracy with a standard error of √(0.1 / n): three
points for 100 rows, as much as a Copilot gains, and one for 1,000. The likelihood of the same rows tells them apart
long before that, since every target token counts and by how much.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy.stats import rankdata

from tcopilot.data.metrics import Metric
from tcopilot.evaluation.results import Selection, direction_and_unit

Scores = dict[Metric, list[Any]]
"""Metric to what each row gave: its score, or the answer itself for a metric of all rows together."""
Outcomes = dict[str, dict[float, Scores]]
"""Benchmark to λ to scores."""
Seen = Mapping[str, tuple[Outcomes, Mapping[float, float]]]
"""Split to the outcomes of some benchmarks, and to λ → their likelihood together."""

SELECT_BY = ("auto", "nll", "metric")
"""What decides on λ: the likelihood, the metric, or (`auto`) the one that the number of rows suits."""
ENOUGH = {"nll": 20, "metric": 50, "closed_form": 50}
"""Rows for a rule to choose λ on; the best of several on fewer is mostly luck."""
METRIC_ROWS = 1_000
"""Rows from which `auto` takes the metric."""


def rule_for(select_by: str, rows: int) -> str:
    """The rule that chooses λ on so many rows; `constant` chooses nothing.

    >>> [rule_for("auto", rows) for rows in (0, 19, 20, 999, 1000)]
    ['constant', 'constant', 'nll', 'nll', 'metric']
    >>> [rule_for("metric", rows) for rows in (0, 12)]  # who names a rule gets it
    ['constant', 'metric']
    """
    if select_by == "auto":
        select_by = "metric" if rows >= METRIC_ROWS else "nll"
        return select_by if rows >= ENOUGH[select_by] else "constant"
    return select_by if rows else "constant"


def enough(select_by: str, weights: Sequence[float] | None) -> int:
    """How many rows λ should be chosen on; without a list of λ the closed form chooses."""
    return ENOUGH[("nll" if select_by == "auto" else select_by) if weights else "closed_form"]


def settle(
    name: str,
    weights: Sequence[float] | None,
    rows: int,
    select_by: str,
    own: Mapping[str, float],
    constant: float,
) -> tuple[str, float | None]:
    """The rule for the λ of a benchmark or of `all`, and λ itself where nothing is left to choose.

    Args:
        name: the benchmark, or `all`.
        weights: the λ to choose from, a single one that is taken as it is, or none for the run's own; None stands for
            λ* in closed form.
        rows: to choose on.
        select_by: one of `SELECT_BY`.
        own: λ that an earlier run chose, kept where the rows are too few.
        constant: λ where the rows are too few and there is no earlier run.
    """
    if weights is not None and len(weights) == 1:
        return "given", float(weights[0])
    if own and (weights == [] or rows < enough(select_by, weights)):
        return "kept", own.get(name, own["all"])
    rule = rule_for(select_by, rows) if weights or not rows else "closed_form"
    if rule == "constant":
        return (rule, constant) if name == "all" else ("shared", None)
    return rule, None


def by_likelihood(likelihood: Mapping[float, float]) -> float:
    """The λ with the smallest NLL; ties go to the smaller λ."""
    return min(likelihood, key=lambda weight: (likelihood[weight], weight))


def by_metric(outcomes: Outcomes, likelihood: Mapping[float, float]) -> float:
    """The λ with the best mean over benchmarks of each one's first metric; ties go to the better likelihood, then to
    the smaller λ.

    Metrics of different units have no mean: then each λ's place among all of them counts.
    """
    merits, units = [], set()
    for by_weight in outcomes.values():
        metric = _first(by_weight)
        sign = 1 if metric.higher_is_better else -1
        merits.append([sign * metric.value(by_weight[weight][metric]) for weight in likelihood])
        units.add(metric.unit)
    if len(units) > 1:
        merits = [rankdata(values) for values in merits]
    means = (sum(of_weight) / len(merits) for of_weight in zip(*merits, strict=True))
    mean = dict(zip(likelihood, means, strict=True))
    return max(likelihood, key=lambda weight: (mean[weight], -likelihood[weight], -weight))


def selections(name: str, rule: str, weight: float, seen: Seen, chosen_on: str, reported: str) -> Iterator[Selection]:
    """What each rule chooses as λ of a benchmark or of `all`, and what this gives; `rule` is the one that decided.

    Rows to choose on that were not answered have no outcomes, and the metric chooses nothing on them. Rows that are
    reported may not have been answered at the λ of a rule that did not decide.
    """
    chosen = {}
    if chosen_on in seen:
        outcomes, likelihood = seen[chosen_on]
        chosen = {"nll": by_likelihood(likelihood)}
        chosen |= {"metric": by_metric(outcomes, likelihood)} if outcomes else {}
    for by, of_rule in (chosen | {rule: weight}).items():
        outcomes, likelihood = seen[reported]
        metric, value = _mean(outcomes, of_rule if of_rule in likelihood else weight)
        before = seen.get(chosen_on)
        yield Selection(
            by, name, of_rule, by == rule, None if metric is None else metric.name,
            validation=None if before is None else _mean(before[0], of_rule)[1],
            reported=value if of_rule in likelihood else None,
            validation_nll=None if before is None else before[1][of_rule], reported_nll=likelihood.get(of_rule),
            **({} if metric is None else direction_and_unit(metric)),
        )  # fmt: skip


def too_few(name: str, rule: str, weight: float, rows: str, wanted: int) -> str:
    """Say that λ was not chosen, or by luck; `rows` tells how many there are, `wanted` how many there should be."""
    then = {
        "kept": "the run's own is kept",
        "constant": f"λ = {weight:g} is a constant that no row was asked about",
        "shared": f"λ = {weight:g} is that of all",
    }.get(rule, "it may be luck")
    of = "" if name == "all" else f"{name}: "
    return f"{of}{rows} rows are too few to choose λ on, and {then}; {wanted} or more are advised"


def _first(by_weight: Mapping[float, Scores]) -> Metric:
    return next(iter(by_weight[0.0]))


def _mean(outcomes: Outcomes, weight: float) -> tuple[Metric, float] | tuple[None, None]:
    """The first metric of some benchmarks and its mean over them; None without answers, or where they differ."""
    metrics = {_first(by_weight) for by_weight in outcomes.values()}
    if len(metrics) != 1:
        return None, None
    (metric,) = metrics
    values = [metric.value(by_weight[weight][metric]) for by_weight in outcomes.values()]
    return metric, sum(values) / len(values)
