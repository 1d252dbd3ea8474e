import math
import random

import pytest

from tcopilot.data.metrics import NDCG, Answer, Hit, consistency_problems

CUTOFFS = (5, 10, 20, 100)


def hit_at_k(ranks: list[int | None], k: int) -> list[float]:
    return [Hit("hit", k=k).score(Answer("", None, "", False, rank=rank)) for rank in ranks]


def ndcg_at_k(ranks: list[int | None], k: int) -> list[float]:
    return [NDCG("ndcg", k=k).score(Answer("", None, "", False, rank=rank)) for rank in ranks]


def figures(ranks: list[int]) -> dict[str, float]:
    metrics = {"hit": hit_at_k, "ndcg": ndcg_at_k}
    return {f"{name}@{k}": sum(f(ranks, k)) / len(ranks) for name, f in metrics.items() for k in CUTOFFS}


def published(hits: list[float], gains: list[float]) -> dict[str, float]:
    named = zip(CUTOFFS, hits, gains, strict=True)
    return {key: value for k, hit, gain in named for key, value in ((f"hit@{k}", hit), (f"ndcg@{k}", gain))}


def test_hit_and_ndcg_of_single_ranks():
    assert hit_at_k([1, 10, 11, 0, None], 10) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert ndcg_at_k([1, 3, 10, 11, 0, None], 10) == [1.0, 0.5, 0.2890648263178879, 0.0, 0.0, 0.0]


def test_a_perfect_ranker_has_1_everywhere():
    assert set(figures([1] * 7).values()) == {1.0}


def test_what_is_not_found_has_0_everywhere():
    assert set(figures([0, 101]).values()) == {0.0}
    assert hit_at_k([None], 5) == ndcg_at_k([None], 5) == [0.0]


@pytest.mark.slow
def test_a_random_ranker_has_the_closed_form():
    items, users, draw = 400, 50_000, random.Random(0)
    found = figures([draw.randint(1, items) for _ in range(users)])
    for k in CUTOFFS:
        gains = [1 / math.log2(rank + 1) for rank in range(1, k + 1)]
        for name, values in (("hit", [1.0] * k), ("ndcg", gains)):
            mean = sum(values) / items
            sd = math.sqrt((sum(value**2 for value in values) / items - mean**2) / users)
            assert abs(found[f"{name}@{k}"] - mean) < 4 * sd, (name, k)


def test_a_popularity_ranker_has_the_figures_worked_out_by_hand():
    # Items a, b, c, d were taken 4, 3, 2 and 1 times; the gold items have these places once the seen ones are out.
    popularity = ["a", "b", "c", "d"]
    users = [({"a"}, "b"), ({"b", "d"}, "c"), (set(), "c"), ({"a"}, "d")]
    ranks = [[item for item in popularity if item not in seen].index(gold) + 1 for seen, gold in users]
    assert ranks == [1, 2, 3, 3]
    assert hit_at_k(ranks, 1) == [1, 0, 0, 0]
    assert hit_at_k(ranks, 2) == [1, 1, 0, 0]
    assert sum(ndcg_at_k(ranks, 2)) / 4 == pytest.approx((1 + 0.63093) / 4, abs=1e-5)
    assert sum(ndcg_at_k(ranks, 5)) / 4 == pytest.approx((1 + 0.63093 + 0.5 + 0.5) / 4, abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_figures_of_any_ranking_belong_together(seed):
    draw = random.Random(seed)
    assert consistency_problems(figures([draw.randint(0, 10 ** draw.randint(1, 3)) for _ in range(50)])) == []


def test_the_papers_t5_small_on_beauty_is_caught():
    (problem,) = consistency_problems({"hit@10": 2.9, "ndcg@10": 1.4, "hit@20": 5.4, "ndcg@20": 3.5}, tolerance=0.05)
    assert "from 10 to 20: hit rises by 2.5" in problem
    assert "0.6974" in problem
    assert "rises by 2.1" in problem


def test_the_papers_llama_on_beauty_passes_once_rounding_is_allowed_for():
    row = published([5.2, 7.4, 10.0, 18.8], [3.8, 4.4, 5.1, 6.7])
    assert consistency_problems(row, tolerance=0.05) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ndcg@5": 0.31}, "from 0 to 5"),  # above hit
        ({"ndcg@5": 0.11}, "from 0 to 5"),  # below hit/log2(6)
        ({"hit@10": 0.29}, "from 5 to 10: hit falls"),
        ({"ndcg@10": 0.19}, "from 5 to 10"),
    ],
)
def test_each_bound_is_checked(changes, expected):
    good = {"hit@5": 0.3, "ndcg@5": 0.2, "hit@10": 0.4, "ndcg@10": 0.23}
    assert consistency_problems(good) == []
    assert any(problem.startswith(expected) for problem in consistency_problems(good | changes))


def test_other_figures_and_half_pairs_are_ignored():
    assert consistency_problems({"accuracy": 3.0, "hit@5": 0.3, "ndcg@10": 0.9}) == []
