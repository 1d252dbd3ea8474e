"""`tcopilot-table` on run directories with known figures: what is summarised, and the command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from written_runs import ARITHMETIC, CUTS, REASONING, published_run, summaries_of, write_run

from tcopilot.evaluation.results import Control, Results
from tcopilot.reporting import published
from tcopilot.reporting.finished_runs import find_runs
from tcopilot.reporting.seed_groups import group_runs
from tcopilot.reporting.summaries import Seen, join_benchmarks, line_over_seeds, summarise
from tcopilot.reporting.tables import lay_out, main


def test_runs_that_differ_in_seed_are_one_group_with_mean_and_deviation(three_seeds):
    (summary,) = summaries_of(three_seeds)
    line = summary.line("gsm8k", "accuracy")
    assert line.seeds == [0, 1, 2]
    assert line.weights == [0.5] * 3
    assert line.n == "1319"
    assert line.pilot == pytest.approx((42.0, 2.0))
    assert line.fused == pytest.approx((45.0, math.sqrt(7)))  # 42, 46, 47
    assert line.gain == pytest.approx((3.0, 1.0))
    assert line.relative == pytest.approx(100 * 3 / 42)
    assert line.p_value == pytest.approx(1 - math.sqrt(27 / 29))  # t = 3 / (1 / √3), 2 degrees of freedom


def test_controls_are_noted_beneath_with_what_the_fused_model_differs_by(three_seeds, capsys):
    for seed, value in enumerate((0.44, 0.46, 0.49)):
        path = three_seeds / str(seed) / "results.json"
        results = Results.load(path)
        figure = ("gsm8k", "test", "accuracy", value, 1319, (0.4, 0.5))
        control = Control(*figure, name="Pilot, equal time", rounds=900, train_seconds=61.2)
        results.controls = [control, replace(control, benchmark="all", metric="nll", value=0.1)]
        results.save(path)
    (summary,) = summaries_of(three_seeds)
    (note,) = [note for note in summary.notes if "equal time" in note]
    assert note == "Pilot, equal time: gsm8k accuracy 46.3 ± 2.5 %, fused − control -1.3 ± 1.2, 3 seeds"
    assert main([str(three_seeds)]) == 0
    assert note in capsys.readouterr().out


def test_several_seeds_are_judged_over_seeds_and_counted_alone(three_seeds):
    line = summaries_of(three_seeds)[0].line("gsm8k", "accuracy")
    assert line.verdict == "better over 3 seeds; each alone: 2 better, 1 not distinguishable"


def test_opposite_gains_are_not_distinguishable():
    seen = [Seen(0, 50, 40.0, 44.0, 0.5, 0.01, "better"), Seen(1, 50, 44.0, 43.0, 0.5, 0.01, "worse")]
    line = line_over_seeds("gsm8k", "accuracy", seen)
    assert line.gain == pytest.approx((1.5, 5 / math.sqrt(2)))
    assert line.p_value == pytest.approx(1 - 2 / math.pi * math.atan(0.6))  # t = 0.6, 1 degree of freedom
    assert line.verdict == "not distinguishable over 2 seeds; each alone: 1 better, 1 worse"


def test_a_falling_loss_is_better():
    seen = [Seen(seed, 50, 2.0 + seed, 1.8 + seed + 0.001 * seed, 0.5) for seed in range(3)]
    falling = [one._replace(higher_is_better=False) for one in seen]
    assert line_over_seeds("all", "nll", falling).verdict == "better over 3 seeds"
    assert line_over_seeds("gsm8k", "accuracy", seen).verdict == "worse over 3 seeds"
    assert line_over_seeds("gsm8k", "no_answer", falling).verdict == "better over 3 seeds"


def test_equal_gains_leave_nothing_to_test():
    seen = [Seen(seed, 50, 40.0 + seed, 41.0 + seed, 0.5) for seed in range(3)]
    line = line_over_seeds("gsm8k", "accuracy", seen)
    assert line.p_value is None
    assert line.verdict == "the same gain in all 3 seeds, nothing to test"


@pytest.mark.parametrize(("p", "verdict"), [(0.2, "not distinguishable at n = 254"), (0.003, "better at n = 254")])
def test_one_seed_keeps_its_own_paired_verdict_and_has_no_spread(tmp_path, p, verdict):
    (summary,) = summaries_of(write_run(tmp_path, {("aqua", "accuracy"): (0.25, 0.28)}, p=p, n=254))
    line = summary.line("aqua", "accuracy")
    assert (line.verdict, line.p_value, line.gain.sd) == (verdict, p, None)
    (sheet, _) = lay_out([summary])
    assert "1 seed: no spread" in sheet.notes[0]
    assert "28.0" in sheet.rows[0]


def test_run_without_a_copilot_shows_the_pilot_alone(tmp_path):
    (summary,) = summaries_of(write_run(tmp_path, {("gsm8k", "accuracy"): (0.25, 0.28)}, copilot__enabled=False))
    line = summary.line("gsm8k", "accuracy")
    assert (line.pilot.mean, line.fused, line.gain) == (25.0, None, None)
    assert "alone" in summary.group.label


def test_averages_are_those_of_each_seed(tmp_path):
    for seed, shift in enumerate((0.0, 0.02)):
        figures = {(name, "accuracy"): (0.1 * i + shift, 0.1 * i + 2 * shift) for i, name in enumerate(ARITHMETIC)}
        write_run(tmp_path / str(seed), figures, seed)
    (summary,) = summaries_of(tmp_path)
    average = summary.line("arithmetic_avg", "accuracy")
    assert average.pilot == pytest.approx((16.0, math.sqrt(2)))  # 15 and 17
    assert average.gain == pytest.approx((1.0, math.sqrt(2)))  # 0 and 2
    assert summary.missing == {}


def test_an_average_names_what_a_seed_lacks(tmp_path):
    write_run(tmp_path / "0", {(name, "accuracy"): (0.4, 0.5) for name in ARITHMETIC[:3]}, 0)
    write_run(tmp_path / "1", {(name, "accuracy"): (0.4, 0.5) for name in ARITHMETIC[1:]}, 1)
    (summary,) = summaries_of(tmp_path)
    assert summary.missing == {"arithmetic_avg accuracy": ["aqua", "svamp"]}
    assert [summary.line(name, "accuracy").seeds for name in ("aqua", "gsm8k", "svamp")] == [[0], [0, 1], [1]]


def test_one_run_for_each_benchmark_gives_one_table(tmp_path, capsys):
    for name, gain in (("piqa", 0.1), ("gsm8k", 0.2)):
        for seed in (0, 1):
            figures = {(name, "accuracy"): (0.5, 0.5 + gain)}
            write_run(tmp_path / f"{name}{seed}", figures, seed, data__benchmarks={name: {"name": name, "seed": seed}})
    write_run(tmp_path / "other", {("piqa", "accuracy"): (0.5, 0.9)}, fusion__weight=[0, 2])
    whole, other = join_benchmarks([summarise(group) for group in group_runs(find_runs([tmp_path]).runs)])
    assert [(line.benchmark, line.gain.mean) for line in whole.lines] == [
        ("piqa", pytest.approx(10)), ("gsm8k", pytest.approx(20)),
    ]  # fmt: skip
    assert whole.group.label.endswith("one run for each benchmark")
    assert not any(line.benchmark.endswith("_avg") for line in whole.lines)
    assert [line.gain.mean for line in other.lines] == [pytest.approx(40)]
    assert main([str(tmp_path), "--csv", "-"]) == 0
    assert capsys.readouterr().out.count("one run for each benchmark") == 2


def test_a_joined_table_counts_all_runs_and_says_which_lines_have_one_seed(tmp_path, capsys):
    for name, seeds in (("gsm8k", (0,)), ("piqa", (0, 1))):
        for seed in seeds:
            data = {name: {"name": name, "seed": seed}}
            write_run(tmp_path / f"{name}{seed}", {(name, "accuracy"): (0.5, 0.6)}, seed, data__benchmarks=data)
    figures, data = {("svamp", "accuracy"): (0.5, 0.6)}, {"svamp": {"name": "svamp", "seed": 0}}
    write_run(tmp_path / "validated", figures, data__benchmarks=data, evaluation__report_on="validation")
    assert main([str(tmp_path), "--json", "-"]) == 0
    joined, other = json.loads(capsys.readouterr().out)["groups"]
    assert {Path(run).name for run in joined["runs"]} == {"gsm8k0", "piqa0", "piqa1"}
    assert {line["split"] for line in joined["lines"]} == {"test"}
    assert [(line["benchmark"], line["split"]) for line in other["lines"]] == [("svamp", "validation")]
    assert main([str(tmp_path), "--markdown", "-"]) == 0
    assert "p of a paired t test over seeds, or p paired over the test rows; 1 seed" in capsys.readouterr().out


def test_rows_of_another_test_set_are_noted(tmp_path):
    (summary,) = summaries_of(published_run(tmp_path / "a", ("aqua",), n=254))
    assert summary.notes == []
    (summary,) = summaries_of(published_run(tmp_path / "b", ("aqua",), n=16))
    assert summary.notes == ["aqua: n = 16, the published test set has 254 rows"]


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
    (summary,) = summaries_of(write_run(tmp_path, {("gsm8k", "accuracy"): (0.5, 0.6)}, **changes))
    line = summary.line("gsm8k", "accuracy")
    assert summary.group.copilot == (copilot or "Copilot")
    assert line.published_pilot == 55.3
    assert line.published_fused == {"T-Copilot-3B": 63.1, "T-Copilot-1B": 58.2, None: None}[copilot]


def test_lenient_accuracy_is_what_the_paper_compares_with(tmp_path):
    figures = {("gsm8k", "accuracy"): (0.20, 0.25), ("gsm8k", "accuracy_lenient"): (0.28, 0.33)}
    write_run(tmp_path, figures, pilot__path="Llama-3.2-1B")
    (summary,) = summaries_of(tmp_path)
    assert summary.line("gsm8k", "accuracy").published_pilot is None
    assert summary.line("gsm8k", "accuracy_lenient").beyond("pilot") == pytest.approx(28.0 - 27.3)
    gains, paper = lay_out([summary])
    assert "published accuracy stands beside our accuracy_lenient" in gains.notes[0]
    assert "metric: accuracy_lenient" in paper.notes[0]
    (strict,) = summaries_of(tmp_path, metric="accuracy")
    assert [line.metric for line in strict.lines] == ["accuracy"]
    assert strict.line("gsm8k", "accuracy").beyond("pilot") == pytest.approx(20.0 - 27.3)


def test_lenient_accuracy_of_one_benchmark_only_is_not_mixed_into_the_comparison(tmp_path):
    figures = {("gsm8k", "accuracy"): (0.2, 0.3), ("svamp", "accuracy"): (0.4, 0.5)}
    figures["gsm8k", "accuracy_lenient"] = (0.3, 0.4)
    (summary,) = summaries_of(write_run(tmp_path, figures, pilot__path="Llama-3.2-1B"))
    compared = [(line.benchmark, line.metric) for line in summary.lines if line.published_pilot]
    assert compared == [("gsm8k", "accuracy"), ("svamp", "accuracy")]


def test_a_metric_that_decides_stands_beside_the_accuracy(tmp_path):
    figures = {("mine", "mcc"): (0.1, 0.3), ("mine", "accuracy"): (0.2, 0.3), ("mine", "macro_f1"): (0.3, 0.3)}
    (summary,) = summaries_of(write_run(tmp_path, figures))
    assert [line.metric for line in summary.lines] == ["mcc", "accuracy"]


def test_likelihood_scores_have_no_published_figure(tmp_path):
    write_run(tmp_path, {("piqa", "accuracy_sum"): (0.7, 0.8)}, pilot__path="Llama-3.2-1B")
    (summary,) = summaries_of(tmp_path, metric="accuracy_sum")
    assert summary.line("piqa", "accuracy_sum").published_pilot is None
    assert summary.line("piqa", "accuracy_sum").fused.mean == pytest.approx(80.0)


def test_nats_are_shown_on_demand_in_their_own_unit(tmp_path):
    write_run(tmp_path, {("gsm8k", "accuracy"): (0.4, 0.5), ("all", "nll"): (1.25, 1.125)})
    assert [line.benchmark for line in summaries_of(tmp_path)[0].lines] == ["gsm8k"]
    (summary,) = summaries_of(tmp_path, metric="nll")
    (line,) = summary.lines
    assert (line.benchmark, line.unit, line.pilot.mean, line.gain.mean) == ("all", "nats", 1.25, -0.125)
    assert "1.2500" in lay_out([summary])[0].rows[0]


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
    assert "ndcg@5" in [step.metrics[0] for step in published.impossible_ndcg(found)]


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


def test_unfinished_and_unreadable_runs_are_listed(three_seeds, capsys):
    (three_seeds / "stopped").mkdir()
    (three_seeds / "stopped" / "config.yaml").write_text("seed: 9\n")
    broken = write_run(three_seeds / "broken", {("gsm8k", "accuracy"): (0.4, 0.5)}, 8)
    (broken / "results.json").write_text("{")
    bare = write_run(three_seeds / "bare", {("gsm8k", "accuracy"): (0.4, 0.5)}, 8)
    (bare / "config.yaml").unlink()
    garbled = write_run(three_seeds / "garbled", {("gsm8k", "accuracy"): (0.4, 0.5)}, 8)
    (garbled / "config.yaml").write_text("a: [1")
    older = write_run(three_seeds / "older", {("gsm8k", "accuracy"): (0.4, 0.5)}, 8, version="0.1.0")
    assert main([str(three_seeds), "--json", str(three_seeds / "table.json")]) == 0
    out = capsys.readouterr().out
    assert f"unfinished: {three_seeds / 'stopped'}\n" in out
    assert f"unreadable: {broken}: results.json: not JSON" in out
    assert f"unreadable: {bare}: no config.yaml beside results.json" in out
    assert f"unreadable: {garbled}: " in out
    assert f"unreadable: {older}: this run was made by version 0.1.0" in out
    data = json.loads((three_seeds / "table.json").read_text())
    assert data["unfinished"] == [str(three_seeds / "stopped")]
    assert len(data["unreadable"]) == 4
    assert data["groups"][0]["runs"] == [str(three_seeds / name) for name in "012"]


def test_figures_on_the_rows_that_chose_the_weight_are_noted(tmp_path):
    run = write_run(tmp_path, {("gsm8k", "accuracy"): (0.4, 0.5)}, evaluation__report_on="validation")
    (summary,) = summaries_of(run)
    assert summary.line("gsm8k", "accuracy").pilot.mean == pytest.approx(65.0)
    assert summary.notes == ["λ was chosen on the same rows that are reported (validation): the gain is optimistic"]


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
