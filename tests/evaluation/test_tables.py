"""`tcopilot-table` on run directories with known figures."""

import csv
import io
import json
import math
from pathlib import Path

import pytest
import yaml

from tcopilot.evaluation import published
from tcopilot.evaluation.results import Gain, Results, Row
from tcopilot.evaluation.tables import Seen, find_runs, group_runs, main, sheets, summarise

REASONING = ("piqa", "winogrande", "hellaswag", "boolq", "siqa", "openbookqa")
ARITHMETIC = ("aqua", "gsm8k", "mawps", "svamp")
CUTS = (5, 10, 20, 100)


def config_of(seed: int, folder: Path, **changes) -> dict:
    """A resolved config; changes are dotted keys with __ for the dot."""
    config = {
        "name": "demo",
        "seed": seed,
        "resume": None,
        "rounds": 500,
        "pilot": {"path": None, "config": {"model_type": "t5"}, "adapter": None},
        "copilot": {"enabled": True, "path": None, "layers": None},
        "data": {"rounds": 500, "seed": seed, "benchmarks": {"gsm8k": {"name": "gsm8k", "seed": seed}}},
        "mistake_log": {"log": {"capacity_rounds": 128, "policy": {"_target_": "tcopilot.sampling.Fifo"}}},
        "fusion": {"weight": [0, 0.5]},
        "evaluation": {"report_on": "test"},
        "callbacks": {"checkpoint": {"folder": f"{folder}/checkpoints"}},
        "paths": {"run_dir": str(folder)},
    }
    for key, value in changes.items():
        *above, last = key.split("__")
        node = config
        for name in above:
            node = node[name]
        node[last] = value
    return config


def write_run(folder: Path, figures: dict, seed: int = 0, p: float = 0.001, n: int = 100, **changes) -> Path:
    """Write a run whose test rows have these (Pilot, fused) fractions by (benchmark, metric); λ is 0.5."""
    rows, gain = [], []
    for (benchmark, metric), (pilot, fused) in figures.items():
        for split, shift in (("validation", 0.25), ("test", 0.0)):  # a table that reads the wrong split is far off
            for weight, value in ((0.0, pilot), (0.3, 0.99), (0.5, fused)):
                rows.append(Row(benchmark, split, metric, weight, value + shift, n, (0.0, 1.0)))
        step = fused - pilot
        gain.append(Gain(benchmark, metric, pilot, fused, step, (step - 0.01, step + 0.01), 9, 1, p))
    results = Results(
        seed=seed, git="abc", config="config.yaml", params={}, rounds=500, train_seconds=60.0,
        selected_weight=0.5, selected_on="validation", rows=rows, gain=gain,
    )  # fmt: skip
    results.save(folder / "results.json")
    (folder / "config.yaml").write_text(yaml.safe_dump(config_of(seed, folder, **changes)))
    return folder


@pytest.fixture
def three_seeds(tmp_path) -> Path:
    """Gains of 2, 4 and 3 points; the second seed alone is not distinguishable."""
    for seed, (pilot, fused, p) in enumerate([(0.40, 0.42, 0.01), (0.42, 0.46, 0.2), (0.44, 0.47, 0.01)]):
        write_run(tmp_path / str(seed), {("gsm8k", "accuracy"): (pilot, fused)}, seed, p, n=1319)
    return tmp_path


def groups_of(*folders: Path, metric: str | None = None):
    return group_runs(find_runs(folders).runs, metric)


def published_run(folder: Path, benchmarks=REASONING + ARITHMETIC, shift: float = 0.0, **changes) -> Path:
    """A run of LLaMA-3.2-1B with its own decoder as Copilot that reaches the paper's figures plus `shift` points."""
    alone, fused = published.figures("LLaMA-3.2-1B"), published.figures("LLaMA-3.2-1B", "T-Copilot-1B")
    figures = {
        (name, "accuracy"): ((alone[name, "accuracy"] + shift) / 100, (fused[name, "accuracy"] + shift) / 100)
        for name in benchmarks
    }
    return write_run(folder, figures, pilot__path="meta-llama/Llama-3.2-1B", **changes)


def test_runs_that_differ_in_seed_are_one_group_with_mean_and_deviation(three_seeds):
    (group,) = groups_of(three_seeds)
    line = group.line("gsm8k", "accuracy")
    assert line.seeds == [0, 1, 2]
    assert line.weights == [0.5] * 3
    assert line.n == "1319"
    assert line.pilot == pytest.approx((42.0, 2.0))
    assert line.fused == pytest.approx((45.0, math.sqrt(7)))  # 42, 46, 47
    assert line.gain == pytest.approx((3.0, 1.0))
    assert line.relative == pytest.approx(100 * 3 / 42)
    assert line.p_value == pytest.approx(1 - math.sqrt(27 / 29))  # t = 3 / (1 / √3), 2 degrees of freedom


def test_several_seeds_are_judged_over_seeds_and_counted_alone(three_seeds):
    line = groups_of(three_seeds)[0].line("gsm8k", "accuracy")
    assert line.verdict == "better over 3 seeds; each alone: 2 better, 1 not distinguishable"


def test_opposite_gains_are_not_distinguishable():
    seen = [Seen(0, 50, 40.0, 44.0, 0.5, 0.01, "better"), Seen(1, 50, 44.0, 43.0, 0.5, 0.01, "worse")]
    line = summarise("gsm8k", "accuracy", seen)
    assert line.gain == pytest.approx((1.5, 5 / math.sqrt(2)))
    assert line.p_value == pytest.approx(1 - 2 / math.pi * math.atan(0.6))  # t = 0.6, 1 degree of freedom
    assert line.verdict == "not distinguishable over 2 seeds; each alone: 1 better, 1 worse"


def test_a_falling_loss_is_better():
    seen = [Seen(seed, 50, 2.0 + seed, 1.8 + seed + 0.001 * seed, 0.5) for seed in range(3)]
    assert summarise("all", "nll", seen).verdict == "better over 3 seeds"
    assert summarise("gsm8k", "accuracy", seen).verdict == "worse over 3 seeds"
    assert summarise("gsm8k", "no_answer", seen).verdict == "better over 3 seeds"


def test_equal_gains_leave_nothing_to_test():
    seen = [Seen(seed, 50, 40.0 + seed, 41.0 + seed, 0.5) for seed in range(3)]
    line = summarise("gsm8k", "accuracy", seen)
    assert line.p_value is None
    assert line.verdict == "the same gain in all 3 seeds, nothing to test"


@pytest.mark.parametrize(("p", "verdict"), [(0.2, "not distinguishable at n = 254"), (0.003, "better at n = 254")])
def test_one_seed_keeps_its_own_paired_verdict_and_has_no_spread(tmp_path, p, verdict):
    (group,) = groups_of(write_run(tmp_path, {("aqua", "accuracy"): (0.25, 0.28)}, p=p, n=254))
    line = group.line("aqua", "accuracy")
    assert (line.verdict, line.p_value, line.gain.sd) == (verdict, p, None)
    (sheet, _) = sheets([group])
    assert "1 seed: no spread" in sheet.notes[0]
    assert "28.0" in sheet.rows[0]


def test_run_without_a_copilot_shows_the_pilot_alone(tmp_path):
    (group,) = groups_of(write_run(tmp_path, {("gsm8k", "accuracy"): (0.25, 0.28)}, copilot__enabled=False))
    line = group.line("gsm8k", "accuracy")
    assert (line.pilot.mean, line.fused, line.gain) == (25.0, None, None)
    assert "alone" in group.label


def test_every_seed_below_the_run_may_follow_it_or_be_fixed(tmp_path):
    figures = {("gsm8k", "accuracy"): (0.4, 0.5)}
    for seed in (0, 1):
        write_run(tmp_path / f"follows{seed}", figures, seed)
        write_run(tmp_path / f"fixed{seed}", figures, seed, data__seed=0)
        write_run(tmp_path / f"crossed{seed}", figures, seed, data__seed=1, rounds=600)
        write_run(tmp_path / f"again{seed}", figures, seed, data__seed=0, rounds=600)
    fixed = groups_of(tmp_path / "fixed0", tmp_path / "fixed1")
    assert [len(group.runs) for group in fixed] == [2]
    follows = groups_of(tmp_path / "follows0", tmp_path / "follows1")
    assert [len(group.runs) for group in follows] == [2]
    crossed = groups_of(*(tmp_path / f"{name}{seed}" for name in ("crossed", "again") for seed in (0, 1)))
    assert [[run.folder.name for run in group.runs] for group in crossed] == [
        ["crossed0", "crossed1"],
        ["again0", "again1"],
    ]
    assert crossed[0].label.endswith("data.seed=1")


def test_the_same_seed_twice_counts_once_and_is_named(tmp_path):
    first = write_run(tmp_path / "a", {("gsm8k", "accuracy"): (0.40, 0.45)}, name="first")
    second = write_run(tmp_path / "b", {("gsm8k", "accuracy"): (0.10, 0.15)}, name="second")
    (group,) = groups_of(tmp_path)
    assert group.line("gsm8k", "accuracy").pilot.mean == pytest.approx(40.0)
    assert group.notes == [f"seed 0 is there twice: {first} counts, {second} does not"]


def test_a_sweep_is_labelled_by_the_keys_that_differ(tmp_path):
    figures = {("gsm8k", "accuracy"): (0.4, 0.5)}
    prioritised = {"_target_": "tcopilot.sampling.Prioritised", "power": 2}
    for seed in (0, 1):
        write_run(tmp_path / f"fifo{seed}", figures, seed)
        write_run(tmp_path / f"other{seed}", figures, seed, mistake_log__log__policy=prioritised, fusion__weight=0.3)
    groups = groups_of(tmp_path)
    assert [len(group.runs) for group in groups] == [2, 2]
    start = "t5 with random weights + Copilot: "
    assert groups[0].label == start + "fusion.weight=[0,0.5], mistake_log=fifo"
    assert groups[1].label == start + "fusion.weight=0.3, mistake_log=prioritised"


def test_a_key_that_only_repeats_another_is_not_in_the_label(tmp_path):
    figures = {("gsm8k", "accuracy"): (0.4, 0.5)}
    write_run(tmp_path / "a", figures)
    write_run(tmp_path / "b", figures, rounds=900, data__rounds=900)
    assert [group.label.partition(": ")[2] for group in groups_of(tmp_path)] == ["rounds=500", "rounds=900"]


def test_models_and_benchmarks_tell_groups_apart_without_keys(tmp_path):
    write_run(tmp_path / "a", {("gsm8k", "accuracy"): (0.4, 0.5)}, pilot__path="google/flan-t5-small")
    svamp = {"pilot__path": "google/flan-t5-small", "data__benchmarks": {"svamp": {"name": "svamp"}}}
    write_run(tmp_path / "b", {("svamp", "accuracy"): (0.4, 0.5)}, **svamp)
    labels = [group.label for group in groups_of(tmp_path)]
    assert labels == [f"FLAN-T5-small + T-Copilot-small on {name}" for name in ("gsm8k", "svamp")]


def test_averages_are_those_of_each_seed(tmp_path):
    for seed, shift in enumerate((0.0, 0.02)):
        figures = {(name, "accuracy"): (0.1 * i + shift, 0.1 * i + 2 * shift) for i, name in enumerate(ARITHMETIC)}
        write_run(tmp_path / str(seed), figures, seed)
    (group,) = groups_of(tmp_path)
    average = group.line("arithmetic_avg", "accuracy")
    assert average.pilot == pytest.approx((16.0, math.sqrt(2)))  # 15 and 17
    assert average.gain == pytest.approx((1.0, math.sqrt(2)))  # 0 and 2
    assert group.missing == {}


def test_an_average_without_all_members_is_not_printed_but_the_missing_are(tmp_path):
    present = ("piqa", "winogrande", "siqa", "openbookqa")
    (group,) = groups_of(published_run(tmp_path, present))
    assert group.line("commonsense_avg", "accuracy") is None
    assert group.missing == {"commonsense_avg accuracy": ["hellaswag", "boolq"]}
    paper = sheets([group])[1]
    assert paper.rows[0][paper.head.index("avg")] == "–"
    assert any("missing: hellaswag, boolq" in note for note in paper.notes)


def test_an_average_names_what_a_seed_lacks(tmp_path):
    write_run(tmp_path / "0", {(name, "accuracy"): (0.4, 0.5) for name in ARITHMETIC[:3]}, 0)
    write_run(tmp_path / "1", {(name, "accuracy"): (0.4, 0.5) for name in ARITHMETIC[1:]}, 1)
    (group,) = groups_of(tmp_path)
    assert group.missing == {"arithmetic_avg accuracy": ["aqua", "svamp"]}
    assert [group.line(name, "accuracy").seeds for name in ("aqua", "gsm8k", "svamp")] == [[0], [0, 1], [1]]


def test_published_figures_stand_beside_ours_in_the_papers_columns(tmp_path):
    (group,) = groups_of(published_run(tmp_path, shift=1.0))
    assert group.label == "LLaMA-3.2-1B + T-Copilot-1B"
    paper = sheets([group])[1]
    assert " ".join(paper.head) == " PIQA WinoG HellaS BoolQ SIQA OBQA avg AQuA GSM8K MAWPS SVAMP avg"
    by_name = [(row[0].strip(), row[1:]) for row in paper.rows if row]
    assert [name for name, _ in by_name][1:3] == ["published", "ours minus it"]
    assert " ".join(by_name[1][1]) == "77.5 71.1 61.8 63.9 71.9 66.8 68.8 25.6 27.3 77.1 47.3 44.3"
    assert " ".join(by_name[4][1]) == "80.2 73.7 63.3 65.5 74.9 68.9 71.1 28.3 32.2 81.5 51.6 48.4"
    assert by_name[0][1][8] == "28.3"  # GSM8K: 27.3 + 1
    assert by_name[2][1] == ["+1.0"] * 12
    assert "metric: accuracy" in paper.notes[0]


def test_rows_of_another_test_set_are_noted(tmp_path):
    (group,) = groups_of(published_run(tmp_path / "a", ("aqua",), n=254))
    assert group.notes == []
    (group,) = groups_of(published_run(tmp_path / "b", ("aqua",), n=16))
    assert group.notes == ["aqua: n = 16, the published test set has 254 rows"]


def test_tiny_models_have_a_dash_beside_them(tmp_path):
    (group,) = groups_of(write_run(tmp_path, {("gsm8k", "accuracy"): (0.4, 0.5)}))
    gains, paper = sheets([group])
    assert [gains.rows[0][i] for i, head in enumerate(gains.head) if head == "published"] == ["–", "–"]
    assert paper.rows[1] == ["  published", *["–"] * 5]  # four benchmarks and their average


@pytest.mark.parametrize(
    ("changes", "copilot"),
    [
        ({"pilot__path": "/models/llama-3.2-3b/"}, "T-Copilot-3B"),
        ({"pilot__path": "/models/Llama-3.2-3B", "copilot__path": "meta-llama/Llama-3.2-1B"}, "T-Copilot-1B"),
        ({"pilot__path": "Llama-3.2-3B", "copilot__layers": 28}, "T-Copilot-3B"),
        ({"pilot__path": "Llama-3.2-3B", "copilot__layers": 1.0}, "T-Copilot-3B"),
        ({"pilot__path": "Llama-3.2-3B", "copilot__layers": 1}, None),
        ({"pilot__path": "Llama-3.2-3B", "copilot__layers": 0.5}, None),
        ({"pilot__path": "Llama-3.2-3B", "copilot__path": "runs/mine/export"}, None),
    ],
)
def test_the_published_copilot_has_its_checkpoint_and_full_depth(tmp_path, changes, copilot):
    (group,) = groups_of(write_run(tmp_path, {("gsm8k", "accuracy"): (0.5, 0.6)}, **changes))
    line = group.line("gsm8k", "accuracy")
    assert group.copilot == (copilot or "Copilot")
    assert line.published_pilot == 55.3
    assert line.published_fused == {"T-Copilot-3B": 63.1, "T-Copilot-1B": 58.2, None: None}[copilot]


@pytest.mark.parametrize("path", ["meta-llama/Llama-3.2-1B-Instruct", "llama", "", None])
def test_other_models_have_no_published_name(path):
    assert published.pilot_name(path) is None


def test_lenient_accuracy_is_what_the_paper_compares_with(tmp_path):
    figures = {("gsm8k", "accuracy"): (0.20, 0.25), ("gsm8k", "accuracy_lenient"): (0.28, 0.33)}
    write_run(tmp_path, figures, pilot__path="Llama-3.2-1B")
    (group,) = groups_of(tmp_path)
    assert group.line("gsm8k", "accuracy").published_pilot is None
    assert group.line("gsm8k", "accuracy_lenient").beyond("pilot") == pytest.approx(28.0 - 27.3)
    gains, paper = sheets([group])
    assert "published accuracy stands beside our accuracy_lenient" in gains.notes[0]
    assert "metric: accuracy_lenient" in paper.notes[0]
    (strict,) = groups_of(tmp_path, metric="accuracy")
    assert [line.metric for line in strict.lines] == ["accuracy"]
    assert strict.line("gsm8k", "accuracy").beyond("pilot") == pytest.approx(20.0 - 27.3)


def test_lenient_accuracy_of_one_benchmark_only_is_not_mixed_into_the_comparison(tmp_path):
    figures = {("gsm8k", "accuracy"): (0.2, 0.3), ("svamp", "accuracy"): (0.4, 0.5)}
    figures["gsm8k", "accuracy_lenient"] = (0.3, 0.4)
    (group,) = groups_of(write_run(tmp_path, figures, pilot__path="Llama-3.2-1B"))
    compared = [(line.benchmark, line.metric) for line in group.lines if line.published_pilot]
    assert compared == [("gsm8k", "accuracy"), ("svamp", "accuracy")]


def test_likelihood_scores_have_no_published_figure(tmp_path):
    write_run(tmp_path, {("piqa", "accuracy_sum"): (0.7, 0.8)}, pilot__path="Llama-3.2-1B")
    (group,) = groups_of(tmp_path, metric="accuracy_sum")
    assert group.line("piqa", "accuracy_sum").published_pilot is None
    assert group.line("piqa", "accuracy_sum").fused.mean == pytest.approx(80.0)


def test_nats_are_shown_on_demand_in_their_own_unit(tmp_path):
    write_run(tmp_path, {("gsm8k", "accuracy"): (0.4, 0.5), ("all", "nll"): (1.25, 1.125)})
    assert [line.benchmark for line in groups_of(tmp_path)[0].lines] == ["gsm8k"]
    (group,) = groups_of(tmp_path, metric="nll")
    (line,) = group.lines
    assert (line.benchmark, line.unit, line.pilot.mean, line.gain.mean) == ("all", "", 1.25, -0.125)
    assert "1.2500" in sheets([group])[0].rows[0]


def recommendation_run(folder: Path, pilot: str) -> Path:
    figures = {(f"{kind}@{k}"): 0.01 * i for i, (kind, k) in enumerate((m, k) for k in CUTS for m in ("ndcg", "hit"))}
    rows = {("beauty", metric): (value, value + 0.01) for metric, value in figures.items()}
    return write_run(folder, rows, n=22363, pilot__path=pilot)


def test_impossible_ndcg_of_t5_small_on_beauty_is_said(tmp_path):
    (group,) = groups_of(recommendation_run(tmp_path, "google-t5/t5-small"))
    assert group.line("beauty", "hit@20").beyond("pilot") == pytest.approx(5.0 - 5.4)
    assert group.line("beauty", "ndcg@20").beyond("pilot") is None
    note = "published NDCG here is arithmetically impossible: T5-small on beauty, ndcg@20 - ndcg@10 = 2.1"
    assert any(note in line and "0.57 to 0.70" in line for line in group.notes)
    assert any(note.startswith("the size of the Copilot") for note in group.notes)
    paper = sheets([group])[-1]
    assert (paper.title, paper.head[1:4], paper.head[-1]) == ("Beauty", ["hit@5", "hit@10", "hit@20"], "ndcg@100")
    published_row = dict(zip(paper.head, paper.rows[1], strict=True))
    assert (published_row["hit@20"], published_row["ndcg@20"], published_row["ndcg@5"]) == ("5.4", "3.5†", "1.0")
    assert any(note in line for line in paper.notes)


def test_possible_ndcg_is_compared(tmp_path):
    (group,) = groups_of(recommendation_run(tmp_path, "Llama-3.2-1B"))
    assert group.line("beauty", "ndcg@20").beyond("pilot") == pytest.approx(4.0 - 5.1)
    assert not [note for note in group.notes if "impossible: LLaMA-3.2-1B on" in note]


def test_only_the_llama_pilots_on_beauty_have_a_possible_ndcg():
    possible = set()
    for pilot in ("T5-small", "T5-base", "LLaMA-3.2-1B", "LLaMA-3.2-3B", "LLaMA-3.1-8B"):
        for copilot in (None, "T-Copilot-1B"):
            found = published.figures(pilot, copilot)
            for name in ("beauty", "lastfm"):
                row = {
                    metric: value
                    for (benchmark, metric), value in found.items()
                    if benchmark == name and "@" in metric
                }
                if row and not published.impossible_ndcg(row):
                    possible.add((pilot, copilot, name))
    assert possible == {(pilot, None, "beauty") for pilot in ("LLaMA-3.2-1B", "LLaMA-3.2-3B", "LLaMA-3.1-8B")}


def test_the_bound_allows_what_real_ranks_give():
    ranks = [1, 3, 5, 6, 10, 11, 19, 20, 42, 100, 101, 5000]
    found = {f"hit@{k}": round(100 * sum(r <= k for r in ranks) / len(ranks), 1) for k in CUTS}
    for k in CUTS:
        found[f"ndcg@{k}"] = round(100 * sum(1 / math.log2(r + 1) for r in ranks if r <= k) / len(ranks), 1)
    assert published.impossible_ndcg(found) == []
    found["ndcg@5"] = found["hit@5"] + 0.3
    assert "ndcg@5" in [step.metric for step in published.impossible_ndcg(found)]


@pytest.mark.parametrize(("ndcg", "wrong"), [(10.1, False), (10.2, True), (3.8, False), (3.7, True)])
def test_the_bound_allows_for_rounding_and_no_more(ndcg, wrong):
    # hit@5 = 10 ± 0.05 allows 9.95 / log2(6) = 3.849 to 10.05 / log2(2) = 10.05, and the NDCG is rounded by 0.05 too
    assert bool(published.impossible_ndcg({"hit@5": 10.0, "ndcg@5": ndcg})) == wrong


def test_published_averages_are_those_of_their_members():
    row = published.figures("Qwen2.5-7B", "T-Copilot-3B")
    for suite, names in (("commonsense", REASONING), ("arithmetic", ARITHMETIC)):
        assert published.members(suite) == list(names)
        mean = sum(row[name, "accuracy"] for name in names) / len(names)
        assert row[f"{suite}_avg", "accuracy"] == pytest.approx(mean, abs=0.06)


def test_markdown_csv_and_json_hold_the_same_figures(three_seeds, capsys):
    paths = {kind: three_seeds / f"table.{kind}" for kind in ("markdown", "csv", "json")}
    arguments = [part for kind, path in paths.items() for part in (f"--{kind}", str(path))]
    assert main([str(three_seeds), *arguments]) == 0
    assert "42.0 ± 2.0" in capsys.readouterr().out
    (record,) = json.loads(paths["json"].read_text())["groups"][0]["lines"]
    (line,) = csv.DictReader(io.StringIO(paths["csv"].read_text()))
    assert float(line["pilot_mean"]) == record["pilot_mean"] == pytest.approx(42.0)
    assert float(line["gain_sd"]) == record["gain_sd"] == pytest.approx(1.0)
    assert (line["seeds"], record["seeds"]) == ("0 1 2", [0, 1, 2])
    assert (line["published_pilot"], record["published_pilot"]) == ("", None)
    table = [row for row in paths["markdown"].read_text().splitlines() if row.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[:3]]
    assert len({len(row) for row in cells}) == 1
    shown = dict(zip(cells[0], cells[2], strict=True))
    assert (shown["Pilot"], shown["Pilot + Copilot"], shown["gain"]) == ("42.0 ± 2.0", "45.0 ± 2.6", "+3.0 ± 1.0")


@pytest.mark.parametrize("kind", ["markdown", "csv", "json"])
def test_a_dash_leaves_stdout_to_the_file(three_seeds, capsys, kind):
    (three_seeds / "stopped").mkdir()
    (three_seeds / "stopped" / "config.yaml").write_text("seed: 9\n")
    assert main([str(three_seeds), f"--{kind}", "-"]) == 0
    shown = capsys.readouterr()
    assert main([str(three_seeds), f"--{kind}", str(three_seeds / "file")]) == 0
    assert shown.out == (three_seeds / "file").read_text()
    assert shown.err == f"unfinished: {three_seeds / 'stopped'}\n"


def test_runs_are_found_below_but_not_inside_what_a_run_writes(three_seeds):
    run = three_seeds / "0"
    for name in ("control", "export", "checkpoints", ".hidden"):
        write_run(run / name, {("gsm8k", "accuracy"): (0.9, 0.9)}, 7)
    write_run(run / "eval", {("gsm8k", "accuracy"): (0.3, 0.4)}, 3)
    found = find_runs([three_seeds, run])  # named twice, read once
    assert [r.folder.relative_to(three_seeds).as_posix() for r in found.runs] == ["0", "0/eval", "1", "2"]
    assert find_runs([run / "control"]).runs[0].results.seed == 7  # asked for by name


def test_unfinished_and_unreadable_runs_are_listed(three_seeds, capsys):
    (three_seeds / "stopped").mkdir()
    (three_seeds / "stopped" / "config.yaml").write_text("seed: 9\n")
    broken = write_run(three_seeds / "broken", {("gsm8k", "accuracy"): (0.4, 0.5)}, 8)
    (broken / "results.json").write_text("{")
    bare = write_run(three_seeds / "bare", {("gsm8k", "accuracy"): (0.4, 0.5)}, 8)
    (bare / "config.yaml").unlink()
    garbled = write_run(three_seeds / "garbled", {("gsm8k", "accuracy"): (0.4, 0.5)}, 8)
    (garbled / "config.yaml").write_text("a: [1")
    assert main([str(three_seeds), "--json", str(three_seeds / "table.json")]) == 0
    out = capsys.readouterr().out
    assert f"unfinished: {three_seeds / 'stopped'}\n" in out
    assert f"unreadable: {broken}: results.json: not JSON" in out
    assert f"unreadable: {bare}: no config.yaml beside results.json" in out
    assert f"unreadable: {garbled}: " in out
    data = json.loads((three_seeds / "table.json").read_text())
    assert data["unfinished"] == [str(three_seeds / "stopped")]
    assert len(data["unreadable"]) == 3
    assert data["groups"][0]["runs"] == [str(three_seeds / name) for name in "012"]


def spoil(folder: Path, **changes) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_figures_that_are_none_are_refused(tmp_path):
    row = {"benchmark": "b", "split": "test", "metric": "accuracy", "weight": 0, "n": 1, "ci95": [0, 1]}
    run = spoil(write_run(tmp_path / "a", {("gsm8k", "accuracy"): (0.4, 0.5)}), rows=[row | {"value": "0.5"}])
    assert find_runs([run]).unreadable == [(run, "results.json: rows[0]: 'value' is '0.5', not a number")]
    run = spoil(write_run(tmp_path / "b", {("gsm8k", "accuracy"): (0.4, 0.5)}), rows=[])
    assert "'rows' is empty" in find_runs([run]).unreadable[0][1]


def test_figures_on_the_rows_that_chose_the_weight_are_noted(tmp_path):
    run = write_run(tmp_path, {("gsm8k", "accuracy"): (0.4, 0.5)}, evaluation__report_on="validation")
    (group,) = groups_of(run)
    assert group.line("gsm8k", "accuracy").pilot.mean == pytest.approx(65.0)
    assert group.notes == ["λ was chosen on the very rows reported (validation): the gain is optimistic"]


def test_errors_name_the_thing_and_the_mend(tmp_path, three_seeds, capsys):
    def refused(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        return shown.err

    assert "nowhere: no such folder; give run directories" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert f"no finished run at or below {tmp_path / 'empty'}" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "config.yaml").write_text("seed: 0\n")
    assert f"unfinished: {tmp_path / 'empty'}" in refused(tmp_path / "empty")
    assert "--metric f1: no run" in (message := refused(three_seeds, "--metric", "f1"))
    assert "there are accuracy" in message


def test_a_file_that_cannot_be_written_is_named(three_seeds, capsys):
    path = three_seeds / "no" / "table.csv"
    assert main([str(three_seeds), "--csv", str(path)]) == 1
    assert capsys.readouterr().err == f"error: --csv {path}: cannot be written, No such file or directory\n"


def test_stdout_holds_one_file_only(three_seeds, capsys):
    with pytest.raises(SystemExit):
        main([str(three_seeds), "--csv", "-", "--json", "-"])
    assert "only one of" in capsys.readouterr().err
