"""Selection of λ by the likelihood or the metric of the validation rows, and the fallback if these are too few.

If two λ give different answers on a tenth of the rows, their difference in accuracy has a standard error of
√(0.1 / n), which is three points for 100 rows, as much as a Copilot gains, and one point for 1,000. The
likelihood separates them on far fewer rows, because every target token contributes, and does so by degree.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy.stats import rankdata

from tcopilot.data.metrics import Metric
from tcopilot.evaluation.results import Selection, direction_and_unit

Scores = dict[Metric, list[Any]]
"""By metric, the score of each row, or the answer itself for a metric of all rows together."""
Outcomes = dict[str, dict[float, Scores]]
"""Scores by benchmark and λ."""
Seen = Mapping[str, tuple[Outcomes, Mapping[float, float]]]
"""By split, the outcomes of some benchmarks, and by λ the NLL of all of them together."""

SELECT_BY = ("auto", "nll", "metric")
"""What decides on λ: the likelihood, the metric, or (`auto`) one of the two by the number of rows."""
ENOUGH = {"nll": 20, "metric": 50, "closed_form": 50}
"""Number of rows that a rule needs; with fewer, the best of several λ is mostly chance."""
METRIC_ROWS = 1_000
"""Number of rows from which on `auto` uses the metric."""
ROUNDING = 1e-6
"""Difference of two NLL below which only rounding tells them apart, as where a new soft head corrects nothing."""


def rule_for(select_by: str, rows: int) -> str:
    """Return the rule that chooses λ for this number of rows; `constant` means that none does.

    >>> [rule_for("auto", rows) for rows in (0, 19, 20, 999, 1000)]
    ['constant', 'constant', 'nll', 'nll', 'metric']
    >>> [rule_for("metric", rows) for rows in (0, 12)]  # an explicit rule is used on any number of rows
    ['constant', 'metric']
    """
    if select_by == "auto":
        select_by = "metric" if rows >= METRIC_ROWS else "nll"
        return select_by if rows >= ENOUGH[select_by] else "constant"
    return select_by if rows else "constant"


def enough(select_by: str, weights: Sequence[float] | None) -> int:
    """Return the number of rows that λ should be chosen on; without a list of λ the closed form is used."""
    return ENOUGH[("nll" if select_by == "auto" else select_by) if weights else "closed_form"]


def settle(
    name: str, weights: Sequence[float] | None, rows: int, select_by: str, own: Mapping[str, float], constant: float
) -> tuple[str, float | None]:
    """Return the rule for the λ of a benchmark or of `all`, and λ itself if it need not be chosen on rows.

    Args:
        name: the benchmark, or `all`.
        weights: the λ to choose from; a single one is used as given, an empty list means the run's own λ, and None
            means λ* in closed form.
        rows: number of rows to choose on.
        select_by: one of `SELECT_BY`.
        own: λ that an earlier run chose, by benchmark or `all`; kept if there are too few rows.
        constant: λ if there are too few rows and no earlier run.
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
    """Return the λ with the smallest NLL; ties, up to `ROUNDING`, go to the smaller λ."""
    least = min(likelihood.values())
    return min(weight for weight, nll in likelihood.items() if not nll > least + ROUNDING)


def by_metric(outcomes: Outcomes, likelihood: Mapping[float, float]) -> float:
    """Return the λ with the best mean over benchmarks of their first metric; ties go to the better likelihood, then to
    the smaller λ.

    Metrics of different units cannot be averaged; in that case the ranks of the λ on each benchmark are averaged.
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
    best = max(mean.values())
    return by_likelihood({weight: nll for weight, nll in likelihood.items() if not mean[weight] < best})


def selections(name: str, rule: str, weight: float, seen: Seen, chosen_on: str, reported: str) -> Iterator[Selection]:
    """Yield the λ that each rule chooses for a benchmark or `all`, with its figures; `rule` is the one that decided.

    If the validation rows were not answered, the metric cannot choose. The reported rows may not have been answered at
    the λ of a rule that did not decide.
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
    """Say that there are too few rows to choose λ; `rows` says how many, `wanted` is the number that is advised."""
    then = {
        "kept": "the run's own is kept",
        "constant": f"λ = {weight:g} is a constant that was not chosen on any rows",
        "shared": f"λ = {weight:g} is the one of all benchmarks together",
    }.get(rule, "it may be luck")
    of = "" if name == "all" else f"{name}: "
    return f"{of}{rows} rows are too few to choose λ on, and {then}; {wanted} or more are advised"


def _first(by_weight: Mapping[float, Scores]) -> Metric:
    return next(iter(by_weight[0.0]))


def _mean(outcomes: Outcomes, weight: float) -> tuple[Metric, float] | tuple[None, None]:
    """Return the common first metric of some benchmarks and its mean; None without answers, or if metrics differ."""
    metrics = {_first(by_weight) for by_weight in outcomes.values()}
    if len(metrics) != 1:
        return None, None
    (metric,) = metrics
    values = [metric.value(by_weight[weight][metric]) for by_weight in outcomes.values()]
    return metric, sum(values) / len(values)
