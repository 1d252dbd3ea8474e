"""The twelve sets, from their real rows to a results file, with both Pilots of the tests."""

from pathlib import Path

import composed
import pytest

ROWS = composed.ROOT.parent / "shared" / "data"
REASONING = ("piqa", "winogrande", "hellaswag", "boolq", "siqa", "openbookqa", "aqua", "gsm8k", "mawps", "svamp")
OPEN = ("aqua", "gsm8k", "mawps", "svamp")  # answers that are no choice between given options
SMALL = [
    *("debug=limit", "data.max_train_rows=64", "data.max_eval_rows=6", "fusion.weight=[0,0.3,1]"),
    "fusion.select_by=metric",
    *("mistake_log.log.capacity_rounds=4", f"data.path={ROWS}"),
]  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ROWS.is_dir(), reason="no local copy of the benchmarks")]


def figures(folder: Path, benchmark: str) -> set[tuple[str, str, float]]:
    return {
        (r["split"], r["metric"], r["weight"]) for r in composed.results(folder)["rows"] if r["benchmark"] == benchmark
    }


MIXTURES = {"tiny_t5": ("commonsense", "arithmetic"), "tiny_llama": (f"[{','.join(REASONING)}]",)}


@pytest.fixture(scope="module", params=MIXTURES)
def reasoning(request, tmp_path_factory) -> dict[str, Path]:
    """Runs on all reasoning sets by the `data` that they were given: one on all together, or one on each mixture."""
    given = [*SMALL, f"pilot={request.param}", "evaluation.modes=[generation,likelihood]"]
    return {
        data: composed.train(tmp_path_factory.mktemp(request.param), *given, f"data={data}")
        for data in MIXTURES[request.param]
    }


@pytest.mark.parametrize("name", REASONING)
def test_a_reasoning_set_trains_and_is_scored_by_text_and_by_likelihood(name, reasoning):
    metrics = {"accuracy", "accuracy_lenient", "no_answer"}
    metrics |= set() if name in OPEN else {"accuracy_sum", "accuracy_mean"}
    (folder,) = [folder for folder in reasoning.values() if figures(folder, name)]
    assert figures(folder, name) == {
        (s, m, w) for s in ("validation", "test") for m in metrics for w in (0.0, 0.3, 1.0)
    }
    (gain, *_) = (gain for gain in composed.results(folder)["gain"] if gain["benchmark"] == name)
    assert gain["metric"] == "accuracy"


def test_a_mixture_reports_each_of_its_sets(reasoning):
    sets = {"commonsense": REASONING[:6], "arithmetic": REASONING[6:]}
    for data, folder in reasoning.items():
        reported = {gain["benchmark"] for gain in composed.results(folder)["gain"]}
        assert reported == set(sets.get(data, REASONING))


@pytest.mark.parametrize("ranking", ["beam", "exhaustive"])
@pytest.mark.parametrize("name", ["beauty", "lastfm"])
def test_a_recommendation_set_ranks_its_whole_catalogue(name, ranking, tmp_path):
    given = [f"data.benchmarks.{name}.history=3", "data.max_eval_rows=2", f"evaluation.ranking={ranking}"]
    folder = composed.train(tmp_path, *SMALL, "pilot=tiny_llama", f"data={name}", *given)
    metrics = {f"{kind}@{k}" for kind in ("hit", "ndcg") for k in (5, 10, 20, 100)}
    assert figures(folder, name) == {
        (s, m, w) for s in ("validation", "test") for m in metrics for w in (0.0, 0.3, 1.0)
    }
    assert not any("hit" in note and "must" in note for note in composed.results(folder)["notes"])
