"""What a run leaves behind: its files, its results, its predictions, its export and what it printed."""

import csv
import json
import math

import composed
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tcopilot.app import build
from tcopilot.data.generated_tasks import GeneratedTask
from tcopilot.evaluation.results import Results


def exported(run) -> tuple:
    """Model and tokenizer of an export, as any user of transformers loads them."""
    auto = AutoModelForSeq2SeqLM if run.family == "t5" else AutoModelForCausalLM
    folder = run.folder / "export"
    return auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def answers(model, tokenizer, prompts: list[str], seq2seq: bool) -> list[str]:
    """Greedy answers, one prompt at a time: no batch, no padding, none of the evaluation's code."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=1,
        )
        found.append(tokenizer.decode(tokens[0] if seq2seq else tokens[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def test_a_run_directory_is_complete(finished):
    files = ("config.yaml", "results.json", "metrics.csv", "export/config.json", "export/model.safetensors")
    for name in (*files, "export/README.md"):
        assert (finished.folder / name).is_file(), name
    saved = {path.name for path in (finished.folder / "checkpoints").iterdir()}
    assert saved == {"round=50", "round=80"}
    names = {path.name for path in (finished.folder / "predictions").glob("*.jsonl")}
    assert names == {
        f"{split}-{finished.task}-weight={w}.jsonl" for split in ("validation", "test") for w in ("0", "0.5", "1", "2")
    }


def test_the_saved_config_is_resolved_and_holds_what_was_asked_for(finished):
    text = (finished.folder / "config.yaml").read_text()
    assert "${" not in text.replace("${paths.run_dir}", "")
    assert str(finished.folder) not in text  # so that the folder can be moved
    cfg = build.read_config(finished.folder / "config.yaml", "run")
    assert (cfg.rounds, cfg.data.rounds, cfg.data.batch_size) == (80, 80, 32)
    assert cfg.paths.run_dir == str(finished.folder)


def test_results_keep_to_their_contract(finished):
    found = composed.results(finished.folder)
    kinds = {
        "version": int,
        "seed": int,
        "git": str,
        "config": str,
        "params": dict,
        "rounds": int,
        "train_seconds": float,
        "selected_weight": float,
        "selected_on": str,
        "reported_on": str,
        "rows": list,
        "gain": list,
    }
    assert {key: type(found[key]) for key in kinds} == kinds
    assert (found["version"], found["seed"], found["rounds"], found["selected_on"]) == (2, 1, 80, "validation")
    assert (finished.folder / found["config"]).is_file()
    assert found["train_seconds"] > 0
    assert set(found["params"]) >= {"pilot", "copilot", "pilot_trainable", "copilot_trainable"}
    assert all(type(count) is int and count > 0 for count in found["params"].values())
    parts = {f"{row['benchmark']}/{row['split']}": row["n"] for row in found["rows"] if row["benchmark"] != "all"}
    assert {part: found["data"][part]["rows"] for part in parts} == parts
    assert not any(found["data"][part][odd] for part in parts for odd in ("cut_targets", "trained_on", "unreachable"))
    kinds = {"benchmark": str, "split": str, "metric": str, "weight": float, "value": float, "n": int, "ci95": list}
    for row in found["rows"]:
        assert {key: type(row[key]) for key in kinds} == kinds
        low, high = row["ci95"]
        assert low <= row["value"] <= high
    (gain,) = found["gain"]
    kinds = {
        "benchmark": str,
        "metric": str,
        "pilot": float,
        "fused": float,
        "difference": float,
        "ci95": list,
        "fixed": int,
        "broken": int,
        "p_value": float,
    }
    assert {key: type(gain[key]) for key in kinds} == kinds
    assert Results.load(finished.folder / "results.json").selected_weight == found["selected_weight"]


def test_every_split_and_weight_is_scored_once(finished):
    rows = composed.results(finished.folder)["rows"]
    found = [(row["benchmark"], row["split"], row["metric"], row["weight"]) for row in rows]
    expected = [
        (name, split, metric, w)
        for name, metric in ((finished.task, "accuracy"), ("all", "nll"))
        for split in ("validation", "test")
        for w in (0.0, 0.5, 1.0, 2.0)
    ]
    assert sorted(found) == sorted(expected)


def test_the_run_learnt_something_for_the_other_tests_to_judge(finished):
    found = composed.results(finished.folder)
    values = [
        composed.value(found, split, "accuracy", w, finished.task) for split in ("validation", "test") for w in (0, 1)
    ]
    assert all(0 < value < 1 for value in values)


def test_metrics_follow_every_loss_and_the_log(finished):
    with (finished.folder / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    for name in ("train/pilot_loss", "train/copilot_loss", "val/pilot_nll", "val/error_ratio", "log/records", "round"):
        values = [float(line[name]) for line in lines if line[name]]
        assert values, name
        assert all(map(math.isfinite, values))
    losses = [float(line["train/pilot_loss"]) for line in lines if line["train/pilot_loss"]]
    assert losses[-1] < losses[0]


def test_predictions_hold_what_was_asked_said_and_judged(finished):
    task = GeneratedTask(name=finished.task, kind=finished.task)
    found = composed.results(finished.folder)
    for split in ("validation", "test"):
        for w in (0.0, 0.5, 1.0, 2.0):
            rows = composed.predictions(finished.folder, split, w, finished.task)
            assert len(rows) == 60
            for row in rows:
                assert set(row) == {"id", "prompt", "target", "answer", "prediction", "extracted", "scores"}
                assert row["scores"] == {"accuracy": float(task.correct(row["prediction"], row["answer"]))}
            share = sum(row["scores"]["accuracy"] for row in rows) / 60
            assert composed.value(found, split, "accuracy", w, finished.task) == pytest.approx(share)


def test_the_gain_can_be_recomputed_from_the_predictions(finished):
    found = composed.results(finished.folder)
    (gain,) = found["gain"]
    pilot, fused = (
        [row["scores"]["accuracy"] for row in composed.predictions(finished.folder, "test", w, finished.task)]
        for w in (0.0, found["selected_weight"])
    )
    assert gain["pilot"] == pytest.approx(sum(pilot) / 60)
    assert gain["fused"] == pytest.approx(sum(fused) / 60)
    assert gain["difference"] == pytest.approx((sum(fused) - sum(pilot)) / 60)
    assert gain["fixed"] == sum(after and not before for before, after in zip(pilot, fused, strict=True))
    assert gain["broken"] == sum(before and not after for before, after in zip(pilot, fused, strict=True))


def test_a_weight_of_zero_is_the_pilot_alone(finished):
    model, tokenizer = exported(finished)
    rows = composed.predictions(finished.folder, "test", 0.0, finished.task)
    said = answers(model.pilot, tokenizer, [row["prompt"] for row in rows], finished.family == "t5")
    assert said == [row["prediction"] for row in rows]


def test_the_export_gives_the_fused_answers_that_were_reported(finished):
    model, tokenizer = exported(finished)
    different = 0
    for w in (1.0, 2.0):
        model.weight = w
        rows = composed.predictions(finished.folder, "test", w, finished.task)
        said = answers(model, tokenizer, [row["prompt"] for row in rows], finished.family == "t5")
        assert said == [row["prediction"] for row in rows]
        alone = composed.predictions(finished.folder, "test", 0.0, finished.task)
        different += sum(a["prediction"] != b["prediction"] for a, b in zip(rows, alone, strict=True))
    assert different > 0  # the Copilot has a say


def test_the_export_is_read_by_those_who_may_read_its_folder(finished):
    export = finished.folder / "export"
    assert (export / "model.safetensors").stat().st_mode & 0o777 == export.stat().st_mode & 0o666


def test_the_export_carries_the_selected_weight(finished):
    config = json.loads((finished.folder / "export" / "config.json").read_text())
    assert config["weight"] == composed.results(finished.folder)["selected_weight"]


def test_a_run_ends_with_its_tables_and_the_path_of_its_results(finished):
    lines = finished.printed.strip().splitlines()
    assert lines[-1] == f"results: {finished.folder / 'results.json'}"
    for part in ("Metrics over λ", "How λ was chosen", "Gain of the Copilot", "(selected)", finished.task):
        assert part in finished.printed
