"""Confidence intervals of scores, and significance tests of gains.

Pilot and Pilot + Copilot answer the same rows, so every comparison is paired: rows on which both agree carry no
information about the difference. All values are in the unit of the metric (a fraction for accuracy), not in percent.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from tcopilot.data.metrics import CorpusMetric, Metric

Interval = tuple[float, float]
Direction = Literal["better", "worse", "not distinguishable"]

ALPHA = 0.05  # two-sided, the level that belongs to the 95 % intervals
RESAMPLES = 10_000  # samples of a bootstrap over rows or groups
CORPUS_RESAMPLES = 1000  # samples for metrics that must be recomputed from all rows each time
MOST_EXACT = 50_000  # sum of whole-number differences up to which the sign-flip test is exact
BATCH_VALUES = 10_000_000  # float64 values drawn at once when resampling: 80 MB, whatever the number of rows


def wilson_interval(correct: int, n: int) -> Interval:
    """Bound the true rate behind `correct` hits in `n` independent rows.

    Wilson's interval is used because the normal approximation collapses to zero width at 0 % and 100 % and leaves
    [0, 1] near them, which is where small models score.

    >>> low, high = wilson_interval(8, 10)
    >>> print(f"{low:.4f} {high:.4f}")
    0.4902 0.9433

    Raises:
        ValueError: If `n` is not positive or `correct` lies outside [0, n].
    """
    if n < 1:
        raise ValueError(f"an interval needs at least one row, got n = {n}")
    low, high = stats.binomtest(correct, n).proportion_ci(method="wilson")
    return float(low), float(high)


def token_share_interval(hits: Sequence[int], tokens: Sequence[int]) -> Interval:
    """Bound a share of tokens, given hits and tokens of each row, by Wilson's interval at an effective sample size.

    Tokens of a row are correlated. The effective sample size is the one at which the binomial variance equals the
    variance over rows; if no token or every token is a hit, it is the number of rows.

    >>> low, high = token_share_interval([5] * 8 + [0] * 2, [5] * 10)  # as 8 of 10 rows
    >>> print(f"{low:.4f} {high:.4f}")
    0.4902 0.9433
    """
    hits_R, tokens_R = np.asarray(hits, dtype=float), np.asarray(tokens, dtype=float)
    n = tokens_R.sum()
    share, effective = hits_R.sum() / n, len(tokens_R)
    if 0 < share < 1 and len(tokens_R) > 1:
        spread = np.square(hits_R - share * tokens_R).sum()
        effective = min(n, n**2 * share * (1 - share) / spread) if spread else n
    squared = stats.norm.ppf(0.975) ** 2
    middle = share + squared / (2 * effective)
    half = np.sqrt(squared * (share * (1 - share) + squared / (4 * effective)) / effective)
    low, high = ((middle + sign * half) / (1 + squared / effective) for sign in (-1, 1))
    return max(0.0, float(min(low, share))), min(1.0, float(max(high, share)))  # rounding must not exclude the share


def mean_interval(values: Sequence[float]) -> Interval:
    """Bound the mean of one score per row, by Wilson's interval for scores of 0 or 1 and by the bootstrap otherwise.

    >>> mean_interval([1.0] * 8 + [0.0] * 2) == wilson_interval(8, 10)
    True
    >>> mean_interval([0.5, 0.5])
    (0.5, 0.5)
    """
    if all(value in (0, 1) for value in values):
        return wilson_interval(int(sum(values)), len(values))
    return paired_bootstrap([0.0] * len(values), values)


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Bound the mean of `after - before` by the percentile bootstrap over rows.

    If every difference is -1, 0 or 1, their counts are drawn from a multinomial distribution, which is equivalent to
    drawing rows but costs the same for any number of rows.

    >>> paired_bootstrap([0, 0, 1, 1], [0, 0, 1, 1])
    (0.0, 0.0)
    >>> paired_bootstrap([1.5, 2.5], [1.75, 2.75])
    (0.25, 0.25)

    Raises:
        ValueError: If the sequences are empty, differ in length or hold a value that is not finite.
    """
    difference = np.subtract(*_paired(after, before))
    n, rng = len(difference), np.random.default_rng(seed)
    if _is_ternary(difference):
        shares = [np.mean(difference == step) for step in (-1, 0, 1)]
        means = rng.multinomial(n, shares, size=resamples) @ (-1, 0, 1) / n
    else:
        size = max(1, BATCH_VALUES // n)
        batches = [min(size, resamples - start) for start in range(0, resamples, size)]
        means = np.concatenate([rng.choice(difference, (batch, n)).mean(axis=1) for batch in batches])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(fixed: int, broken: int) -> float:
    """Return the two-sided p-value of McNemar's exact test that rows are fixed as often as broken.

    Under the null hypothesis each row on which the models disagree is fixed or broken with probability ½. The exact
    binomial form is used, because a Copilot often changes fewer than 25 answers, too few for the chi-square form.

    >>> mcnemar(0, 0)
    1.0
    >>> round(mcnemar(8, 1), 6)
    0.039062

    Raises:
        ValueError: If a count is negative.
    """
    if min(fixed, broken) < 0:
        raise ValueError(f"counts of rows cannot be negative, got fixed = {fixed}, broken = {broken}")
    return float(stats.binomtest(fixed, fixed + broken).pvalue) if fixed + broken else 1.0


def direction(difference: float, ci95: Interval, p_value: float, *, higher_is_better: bool = True) -> Direction:
    """Judge a paired difference; it counts as significant only if both test and interval say so.

    The bootstrap is too optimistic if few rows changed, and a p-value alone says nothing about the size of the effect.

    >>> direction(0.02, (0.01, 0.03), 0.001), direction(0.02, (0.01, 0.03), 0.001, higher_is_better=False)
    ('better', 'worse')
    >>> direction(0.02, (0.00, 0.04), 0.04)
    'not distinguishable'
    """
    low, high = ci95
    if p_value >= ALPHA or low <= 0 <= high:
        return "not distinguishable"
    return "better" if (difference > 0) == higher_is_better else "worse"


class Comparison(NamedTuple):
    """Paired comparison of two models; `fixed` and `broken` are None for a metric that does not score single rows."""

    pilot: float
    fused: float
    difference: float
    ci95: Interval
    fixed: int | None
    broken: int | None
    p_value: float
    n: int
    higher_is_better: bool = True

    @property
    def direction(self) -> Direction:
        """Whether the fused model is better or worse, see `direction`."""
        return direction(self.difference, self.ci95, self.p_value, higher_is_better=self.higher_is_better)

    @property
    def verdict(self) -> str:
        """The comparison as one sentence, fit for a log line."""
        if self.direction == "not distinguishable":
            return f"not distinguishable at n = {self.n}"
        return f"fused is {self.direction} (p {p_text(self.p_value, '= ')}, n = {self.n})"


def p_text(p_value: float, equals: str = "") -> str:
    """Write a p-value for a table; a value that underflows is not shown as zero.

    >>> p_text(0.0312), p_text(0.0)
    ('0.031', '< 1e-300')
    """
    return f"{equals}{p_value:.2g}" if p_value >= 1e-300 else "< 1e-300"


def compare(
    before: Sequence[float],
    after: Sequence[float],
    *,
    higher_is_better: bool = True,
    groups: Sequence[Hashable] | None = None,
) -> Comparison:
    """Compare the Pilot (`before`) with Pilot + Copilot (`after`) on the same rows.

    The p-value is from the sign-flip test of the mean: if the Copilot had no effect, each row's difference would have
    either sign with equal probability. For right/wrong answers this is McNemar's test, in closed form; for graded
    values (NDCG, nats) all signs are enumerated up to 13 changed rows and sampled beyond, with p of at least 2e-4.

    `higher_is_better` says whether a larger value is an improvement, and thus which rows count as fixed. Values with
    equal `groups` are not independent, such as the values of one row under several seeds; they are resampled, and
    exchanged between the two models, together.

    >>> result = compare([0, 0, 1, 0], [1, 1, 0, 0])
    >>> result.difference, result.fixed, result.broken, result.p_value, result.verdict
    (0.25, 2, 1, 1.0, 'not distinguishable at n = 4')
    >>> compare([False] * 10, [True] * 10).verdict
    'fused is better (p = 0.002, n = 10)'
    >>> compare([False] * 10, [True] * 10, groups=[0, 1] * 5).verdict  # two rows under five seeds
    'not distinguishable at n = 10'

    Raises:
        ValueError: If the sequences are empty, differ in length or hold a value that is not finite.
    """
    pilot, fused = _paired(before, after)
    difference = fused - pilot
    rose, fell = int((difference > 0).sum()), int((difference < 0).sum())
    fixed, broken = (rose, fell) if higher_is_better else (fell, rose)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups or ()))}
    if groups and len(numbers) < len(groups):
        place = [numbers[group] for group in groups]
        sums = np.bincount(place, weights=difference)
        ci95, p_value = _group_bootstrap(sums, np.bincount(place)), _sign_flip(sums)
    else:
        ci95 = paired_bootstrap(before, after)
        p_value = mcnemar(fixed, broken) if _is_ternary(difference) else _sign_flip(difference)
    return Comparison(
        pilot=float(pilot.mean()),
        fused=float(fused.mean()),
        difference=float(difference.mean()),
        ci95=ci95,
        fixed=fixed,
        broken=broken,
        p_value=p_value,
        n=len(difference),
        higher_is_better=higher_is_better,
    )


def compare_corpus(
    value: Callable[[Sequence[Any]], float],
    before: Sequence[Any],
    after: Sequence[Any],
    *,
    higher_is_better: bool = True,
) -> Comparison:
    """Compare two models by a metric of all rows together, such as macro-F1.

    `value` computes the metric from the answers to all rows. The interval comes from resampling rows, the p-value from
    exchanging the two models' answers on random rows. Both use 1,000 samples, so the p-value is at least 0.001.

    >>> share = lambda answers: sum(answers) / len(answers)
    >>> result = compare_corpus(share, [0] * 20, [1] * 20)
    >>> result.difference, result.ci95, result.p_value < 0.01, result.fixed
    (1.0, (1.0, 1.0), True, None)

    Raises:
        ValueError: If a figure is not finite.
    """
    n, rng, pilot, fused = len(before), np.random.default_rng(0), value(before), value(after)
    pairs = list(zip(before, after, strict=True))

    def step(some: Sequence[tuple[Any, Any]]) -> float:
        first, second = zip(*some, strict=True)
        return value(second) - value(first)

    exchanged = [
        step([pair[::-1] if swap else pair for pair, swap in zip(pairs, rng.random(n) < 0.5, strict=True)])
        for _ in range(CORPUS_RESAMPLES)
    ]
    extreme = np.abs(exchanged) >= abs(fused - pilot) * (1 - 1e-9)  # tolerate rounding, so that ties count as extreme
    return Comparison(
        pilot=pilot,
        fused=fused,
        difference=fused - pilot,
        ci95=corpus_bootstrap(step, pairs),
        fixed=None,
        broken=None,
        p_value=(1 + int(extreme.sum())) / (1 + CORPUS_RESAMPLES),
        n=n,
        higher_is_better=higher_is_better,
    )


def corpus_bootstrap(value: Callable[[Sequence[Any]], float], rows: Sequence[Any]) -> Interval:
    """Bound a metric of all rows together, which `value` computes from `rows`, by resampling these.

    Raises:
        ValueError: If a figure is not finite.
    """
    samples = np.random.default_rng(0).integers(len(rows), size=(CORPUS_RESAMPLES, len(rows)))
    figures = np.array([value([rows[place] for place in places]) for places in samples])
    if not np.isfinite(figures).all():
        name = getattr(value, "__qualname__", "a metric of all rows together")
        raise ValueError(f"{name} must be a finite number for every sample of the rows, and was not for one of them")
    low, high = np.quantile(figures, [0.025, 0.975])
    return float(low), float(high)


def compare_by(metric: Metric, before: Sequence[Any], after: Sequence[Any]) -> Comparison:
    """Compare Pilot (`before`) and fused model (`after`) by the metric's scores of each row."""
    if isinstance(metric, CorpusMetric):
        return compare_corpus(metric.value, before, after, higher_is_better=metric.higher_is_better)
    return compare(before, after, higher_is_better=metric.higher_is_better)


def interval_of(metric: Metric, scores: Sequence[Any]) -> Interval:
    """Bound a metric's value, given its scores of each row."""
    return corpus_bootstrap(metric.value, scores) if isinstance(metric, CorpusMetric) else mean_interval(scores)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1) of one figure over the seeds of an experiment.

    For a single seed the deviation is unknown; 0.0 is returned so that tables contain no nan.

    >>> over_seeds([1.0, 2.0, 3.0]), over_seeds([0.5])
    ((2.0, 1.0), (0.5, 0.0))

    Raises:
        ValueError: If there is no value.
    """
    if len(values) == 0:
        raise ValueError("no seed to average over")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"paired rows need two vectors of one length, got shapes {first.shape} and {second.shape}")
    if first.size == 0:
        raise ValueError("there are no rows to compare")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("paired rows must be finite: nan or inf in a score")
    return first, second


def _is_ternary(difference: np.ndarray) -> bool:
    return bool(np.isin(difference, (-1, 0, 1)).all())


def _group_bootstrap(sums: np.ndarray, sizes: np.ndarray) -> Interval:
    """Bound Σ sums / Σ sizes by resampling groups; the counts of equal groups are drawn from a multinomial."""
    kinds, counts = np.unique(np.stack([sums, sizes]), axis=1, return_counts=True)
    rng, size, means = np.random.default_rng(0), max(1, BATCH_VALUES // len(counts)), []
    for start in range(0, RESAMPLES, size):
        drawn = rng.multinomial(len(sums), counts / len(sums), size=min(size, RESAMPLES - start))
        means.append((drawn @ kinds[0]) / (drawn @ kinds[1]))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def _sign_flip(difference: np.ndarray) -> float:
    """Return the two-sided p-value of the mean difference under random signs of the rows that changed.

    It is exact for whole numbers: under random signs the sum of m rows that changed by k is k (2 Bin(m, ½) − m).
    """
    changed = difference[difference != 0]
    if (changed == np.round(changed)).all() and np.abs(changed).sum() <= MOST_EXACT:
        chances = np.ones(1)
        for step, rows in zip(*np.unique(np.abs(changed).astype(int), return_counts=True), strict=True):
            of_step = np.zeros(2 * step * rows + 1)
            of_step[:: 2 * step] = stats.binom.pmf(np.arange(rows + 1), rows, 0.5)
            chances = np.convolve(chances, of_step)
        total = np.abs(np.arange(len(chances)) - len(chances) // 2)
        return float(min(1.0, chances[total >= abs(changed.sum())].sum()))
    if len(changed) < 2:
        return 1.0  # a single changed row cannot be significant, and scipy refuses to test it
    test = stats.permutation_test(
        (changed,),
        lambda values, axis: values.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        batch=max(1, BATCH_VALUES // len(changed)),
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)
