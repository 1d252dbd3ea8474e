"""Each figure against its closed form or an independent recomputation."""

import math

import numpy as np
import pytest

from tcopilot.evaluation.significance import (
    Comparison,
    compare,
    direction,
    mcnemar,
    over_seeds,
    paired_bootstrap,
    wilson_interval,
)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (3, 17), (127, 254), (2000, 2000)])
def test_wilson_is_its_formula(correct, n):
    z, p = 1.959963984540054, correct / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson_interval(correct, n) == pytest.approx((centre - half, centre + half), abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(correct, n):
    with pytest.raises(ValueError):  # noqa: PT011 - scipy's words, not ours
        wilson_interval(correct, n)


@pytest.mark.parametrize(("fixed", "broken"), [(0, 1), (5, 0), (8, 1), (12, 30), (7, 7)])
def test_mcnemar_is_the_doubled_binomial_tail(fixed, broken):
    n = fixed + broken
    tail = sum(math.comb(n, k) for k in range(min(fixed, broken) + 1)) / 2**n
    assert mcnemar(fixed, broken) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(fixed, broken) == mcnemar(broken, fixed)


def test_mcnemar_without_discordant_pairs_is_one_and_refuses_negative_counts():
    assert mcnemar(0, 0) == 1.0
    with pytest.raises(ValueError, match="negative"):
        mcnemar(-1, 3)


def test_bootstrap_covers_the_true_difference():
    """200 data sets at 95 %: 190 hits expected, sd 3.1, so 178 is four sd away; the seed is fixed besides."""
    rng = np.random.default_rng(1)
    p_fixed, p_broken, n = 0.12, 0.07, 400
    hits = 0
    for seed in range(200):
        before = rng.random(n) < 0.5
        flip = rng.random(n)
        after = np.where(before, flip >= 2 * p_broken, flip < 2 * p_fixed)
        low, high = paired_bootstrap(before, after, resamples=1000, seed=seed)
        hits += low <= p_fixed - p_broken <= high
    assert 178 <= hits <= 199


def test_multinomial_shortcut_agrees_with_resampling_rows():
    rng = np.random.default_rng(2)
    before, after = rng.random(300) < 0.4, rng.random(300) < 0.5
    difference = after.astype(float) - before
    means = difference[rng.integers(300, size=(10_000, 300))].mean(axis=1)
    expected = np.quantile(means, [0.025, 0.975])
    assert paired_bootstrap(before, after) == pytest.approx(tuple(expected), abs=0.01)


def test_bootstrap_of_graded_values_has_the_width_of_the_normal_interval(monkeypatch):
    rng = np.random.default_rng(3)
    before = rng.normal(size=500)
    after = before + rng.normal(0.1, 0.3, size=500)
    error = np.std(after - before, ddof=1) / math.sqrt(500)
    mean = np.mean(after - before)
    expected = (mean - 1.96 * error, mean + 1.96 * error)
    assert paired_bootstrap(before, after) == pytest.approx(expected, abs=0.15 * error)
    monkeypatch.setattr("tcopilot.evaluation.significance.BATCH_VALUES", 500 * 300)  # 33 full batches and a rest
    assert paired_bootstrap(before, after) == pytest.approx(expected, abs=0.15 * error)


def test_bootstrap_is_reproducible_and_narrows_with_the_level():
    before, after = [0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 0, 0]
    assert paired_bootstrap(before, after, seed=7) == paired_bootstrap(before, after, seed=7)
    wide, narrow = paired_bootstrap(before, after), paired_bootstrap(before, after, level=0.5)
    assert wide[0] < narrow[0] <= narrow[1] < wide[1]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [([], [], "no rows"), ([1], [1, 0], "shapes"), ([[1]], [[1]], "shapes"), ([0.5], [math.nan], "finite")],
)
def test_unpaired_rows_are_refused(before, after, message):
    for function in (paired_bootstrap, compare):
        with pytest.raises(ValueError, match=message):
            function(before, after)


def test_compare_counts_fixed_and_broken_rows():
    before = [False] * 60 + [True] * 40
    after = [True] * 30 + [False] * 30 + [True] * 35 + [False] * 5
    result = compare(before, after)
    assert (result.pilot, result.fused, result.fixed, result.broken, result.n) == (0.4, 0.65, 30, 5, 100)
    assert result.difference == pytest.approx(0.25)
    assert result.p_value == mcnemar(30, 5)
    assert result.ci95[0] < 0.25 < result.ci95[1]
    assert result.verdict.startswith("fused is better (p = ")
    assert compare(after, before).verdict.startswith("fused is worse (p = ")


def test_compare_of_graded_values_enumerates_all_signs():
    """Five rows, 32 sign patterns: the p-value counted by hand in a loop."""
    before, after = [0.0] * 5, [0.1, 0.4, 0.3, -0.2, 0.6]
    sums = [sum(v * (1 if bits >> i & 1 else -1) for i, v in enumerate(after)) for bits in range(32)]
    expected = 2 * sum(s >= sum(after) - 1e-9 for s in sums) / 32
    assert compare(before, after).p_value == pytest.approx(expected)


def test_graded_and_right_wrong_rows_share_one_test():
    """Halving 0/1 scores leaves the ternary path, not the question."""
    before, after = np.array([0] * 9 + [1] * 3), np.array([1] * 8 + [0] * 2 + [1] * 2)
    assert compare(before / 2, after / 2).p_value == pytest.approx(compare(before, after).p_value)


def test_falling_nats_are_an_improvement():
    before = np.linspace(1, 3, 50)
    result = compare(before, before - 0.3, higher_is_better=False)
    assert (result.fixed, result.broken) == (50, 0)
    assert result.verdict == "fused is better (p = 0.0002, n = 50)"
    assert compare(before, before - 0.3).verdict.startswith("fused is worse")


def test_one_changed_row_proves_nothing():
    assert compare([0.5, 0.25], [0.5, 0.75]).p_value == 1.0
    assert compare([0.5], [0.75]).verdict == "not distinguishable at n = 1"


@pytest.mark.parametrize(
    ("ci95", "p_value", "expected"),
    [
        ((0.01, 0.03), 0.01, "better"),
        ((0.01, 0.03), 0.05, "not distinguishable"),
        ((0.0, 0.03), 0.01, "not distinguishable"),
    ],
)
def test_a_verdict_needs_both_test_and_interval(ci95, p_value, expected):
    assert direction(0.02, ci95, p_value) == expected


def test_verdict_reads_as_a_sentence():
    assert Comparison(0.5, 0.53, 0.03, (0.01, 0.05), 90, 30, 0.003, 2000).verdict == (
        "fused is better (p = 0.003, n = 2000)"
    )
    assert Comparison(0.5, 0.51, 0.01, (-0.02, 0.04), 9, 6, 0.61, 254).verdict == "not distinguishable at n = 254"


def test_over_seeds_uses_the_sample_deviation():
    assert over_seeds([2.0, 4.0, 9.0]) == pytest.approx((5.0, math.sqrt((9 + 1 + 16) / 2)))
    assert over_seeds([0.25]) == (0.25, 0.0)
    with pytest.raises(ValueError, match="no seed"):
        over_seeds([])
