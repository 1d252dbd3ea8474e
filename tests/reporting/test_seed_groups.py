"""Finding, grouping and labelling run directories."""

import json
from pathlib import Path

import pytest
from written_runs import write_run

from tcopilot.reporting import published
from tcopilot.reporting.finished_runs import find_runs
from tcopilot.reporting.seed_groups import group_runs


def groups_of(*folders: Path):
    return group_runs(find_runs(folders).runs)


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


def test_seeds_fitted_to_the_recording_of_the_first_are_one_group_with_it(tmp_path):
    figures = {("gsm8k", "accuracy"): (0.4, 0.5)}
    first = write_run(tmp_path / "a", figures, mistake_log__from=None)
    for seed in (1, 2):
        write_run(tmp_path / f"b{seed}", figures, seed, mistake_log__from=str(first))
    assert [len(group.runs) for group in groups_of(tmp_path)] == [3]


def test_the_same_seed_twice_counts_once_and_is_named(tmp_path):
    first = write_run(tmp_path / "a", {("gsm8k", "accuracy"): (0.40, 0.45)}, name="first")
    second = write_run(tmp_path / "b", {("gsm8k", "accuracy"): (0.10, 0.15)}, name="second")
    (group,) = groups_of(tmp_path)
    assert [run.folder for run in group.runs] == [first]
    assert group.notes == [f"seed 0 was found twice: {first} counts, {second} does not"]


def test_a_sweep_is_labelled_by_the_keys_that_differ(tmp_path):
    figures = {("gsm8k", "accuracy"): (0.4, 0.5)}
    prioritised = {"_target_": "tcopilot.mistake_log.policies.Prioritised", "power": 2}
    for seed in (0, 1):
        write_run(tmp_path / f"fifo{seed}", figures, seed)
        write_run(tmp_path / f"other{seed}", figures, seed, mistake_log__log__policy=prioritised, fusion__weight=0.3)
    groups = groups_of(tmp_path)
    assert [len(group.runs) for group in groups] == [2, 2]
    start = "t5 with random weights + Copilot: "
    assert groups[0].label == start + "fusion.weight=[0,0.5], mistake_log=fifo"
    assert groups[1].label == start + "fusion.weight=0.3, mistake_log=prioritised"


def test_a_label_is_one_line(tmp_path):
    for prompt in ("{question}", "{question}\nAnswer:"):
        figures = {("gsm8k", "accuracy"): (0.4, 0.5)}
        write_run(tmp_path / str(len(prompt)), figures, data__benchmarks__gsm8k__prompt=prompt)
    labels = sorted(group.label.rpartition("prompt=")[2] for group in groups_of(tmp_path))
    assert labels == ["{question}", "{question}\\nAnswer:"]


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


@pytest.mark.parametrize("path", ["meta-llama/Llama-3.2-1B-Instruct", "llama", "", None])
def test_other_models_have_no_published_name(path):
    assert published.pilot_name(path) is None


def test_runs_are_found_below_but_not_inside_what_a_run_writes(three_seeds):
    run = three_seeds / "0"
    for name in ("control", "export", "checkpoints", ".hidden"):
        write_run(run / name, {("gsm8k", "accuracy"): (0.9, 0.9)}, 7)
    write_run(run / "eval", {("gsm8k", "accuracy"): (0.3, 0.4)}, 3)
    found = find_runs([three_seeds, run])  # named twice, read once
    assert [r.folder.relative_to(three_seeds).as_posix() for r in found.runs] == ["0", "0/eval", "1", "2"]
    assert find_runs([run / "control"]).runs[0].results.seed == 7  # asked for by name


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


def test_a_frozen_pilot_is_no_published_one(tmp_path):
    (group,) = groups_of(write_run(tmp_path, {("gsm8k", "accuracy"): (0.4, 0.5)}, pilot__frozen=True))
    assert ["the published Pilots were fine-tuned jointly" in note for note in group.notes] == [True]


@pytest.mark.parametrize(("layers", "copilot"), [(8, "T-Copilot-small"), (6, "Copilot")])
def test_flan_t5_small_has_eight_decoder_layers(tmp_path, layers, copilot):
    changes = {"pilot__path": "google/flan-t5-small", "copilot__layers": layers}
    (group,) = groups_of(write_run(tmp_path, {("gsm8k", "accuracy"): (0.4, 0.5)}, **changes))
    assert group.copilot == copilot
