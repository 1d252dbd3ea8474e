"""What a run shows: the same numbers on every logger, all of them in docs/metrics.md, on one wandb run per job."""

import csv
import importlib.util
import itertools
import json
import math
import re
import struct
import time
from pathlib import Path

import composed
import pandas as pd
import pytest
import small_training as training
import torch

from tcopilot.evaluation.outcomes import answers_table
from tcopilot.evaluation.results import Gain, Results, Row
from tcopilot.reporting.dashboards import SHOWN, side_by_side
from tcopilot.training.loggers import has_credentials
from tcopilot.training.module import TCopilotModule, TrainingDivergedError

wandb = pytest.importorskip("wandb")
wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")

PAGE = (composed.ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
GPU_ONLY = {"memory/gpu_peak_mib"}
SHORT = [*composed.SMALL, "fusion.weight=[0,1]", "logger=wandb"]
STOP = ["+callbacks.interrupt._target_=composed.InterruptAfter", "+callbacks.interrupt.rounds=2"]


@pytest.fixture(scope="module", autouse=True)
def _no_credentials(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "netrc"))
        yield
        wandb.teardown()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four rounds on all loggers that are installed, with everything that can be logged on a CPU."""
    loggers = "[tensorboard,wandb]" if importlib.util.find_spec("tensorboard") else "wandb"
    given = [f"logger={loggers}", "mistake_log.every_n_rounds=2", "log_storage@mistake_log.log.storage=topk"]
    return composed.train(tmp_path_factory.mktemp("run"), *SHORT[:-1], *given)


# Readers -------------------------------------------------------------------------------------------------------------


def documented(header: str) -> list[dict[str, str]]:
    """The rows of the page's table with that first column."""
    lines = PAGE[PAGE.index(f"\n| {header} |") + 1 :].split("\n\n")[0].splitlines()
    columns, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return [dict(zip(columns, row, strict=True)) for row in rows]


def pattern(name: str) -> re.Pattern:
    return re.compile(re.sub(r"<\w+>", "[^/]+", name.strip("`")))


def wandb_records(file: Path) -> list[wandb_internal_pb2.Record]:
    """The records of an offline run: after a header of 7 bytes, a LevelDB log, whose blocks are 32 KiB."""
    data, at, piece, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        piece += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return found


def wandb_parts(folder: Path, patience: float = 20) -> list[list[wandb_internal_pb2.Record]]:
    """What each offline run holds when its end is written, which a process of wandb's own does in its time."""
    deadline = time.monotonic() + patience
    while True:
        files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
        parts = [wandb_records(file) for file in files]
        ended = [any(record.WhichOneof("record_type") == "exit" for record in part) for part in parts]
        if (ended and all(ended)) or time.monotonic() > deadline:
            return parts
        time.sleep(0.2)


def wandb_lines(records) -> list[dict]:
    """The logged lines, each with the names of figures, histograms and tables."""
    lines = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            lines.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return lines


def csv_lines(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in line.items() if value} for line in csv.DictReader(file)]


def events(folder: Path):
    """What Tensorboard reads of a run; the test skips where it is not installed."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}
    ).Reload()


def names(logger: str, folder: Path) -> set[str]:
    if logger == "csv":
        return set().union(*csv_lines(folder))
    if logger == "tensorboard":
        tags = events(folder).Tags()
        return {*tags["scalars"], *tags["histograms"], *(t.removesuffix("/text_summary") for t in tags["tensors"])}
    (records,) = wandb_parts(folder)
    return {name for line in wandb_lines(records) for name in line if not name.startswith("_")}


# The page ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logger", ["csv", "tensorboard", "wandb"])
def test_every_logged_name_is_documented_and_every_documented_name_is_logged(logger, finished):
    here = [row["metric"] for row in documented("metric") if row["loggers"] == "all" or logger in row["loggers"]]
    logged = names(logger, finished)
    assert not [name for name in logged if not any(pattern(doc).fullmatch(name) for doc in here)]
    missing = {doc.strip("`") for doc in here if not any(map(pattern(doc).fullmatch, logged))}
    assert missing == (set() if torch.cuda.is_available() else GPU_ONLY)


def test_every_metric_has_a_reduction_and_a_source():
    rows = documented("metric")
    assert len(rows) == len({row["metric"] for row in rows})
    assert all(row["reduction"] and row["from"] and row["loggers"] for row in rows)


def test_every_panel_has_data(finished):
    logged = names("wandb", finished)
    rows = documented("section")
    assert {row["section"] for row in rows} == {"training", "log", "correction", "evaluation"}
    for row in rows:
        for metric in row["metrics"].split(", "):
            assert any(map(pattern(metric).fullmatch, logged)), f"{row['panel']}: {metric}"


# The numbers ---------------------------------------------------------------------------------------------------------

SOME = ["train/pilot_loss", "train/copilot_gradient_norm", "speed/target_tokens_per_second", "val/cosine", "lr/pilot"]


@pytest.mark.parametrize("name", [*SOME, "eval/word_problems/accuracy/gain_high"])
def test_all_loggers_hold_the_same_numbers_over_the_same_rounds(name, finished):
    table = [(line["round"], line["step"], line[name]) for line in csv_lines(finished) if name in line]
    (records,) = wandb_parts(finished)
    lines = [(line["round"], line[name]) for line in wandb_lines(records) if name in line]
    assert lines == [(round, value) for round, _, value in table]
    scalars = [(event.step, event.value) for event in events(finished).Scalars(name)]
    assert scalars == [(step, pytest.approx(value, rel=1e-6)) for _, step, value in table]
    assert len(table) == {"val": 2, "eval": 1}.get(name.split("/")[0], 4)


def test_speed_and_shares_agree_with_the_seconds(finished):
    lines = [line for line in csv_lines(finished) if "train/pilot_loss" in line]
    for before, line in itertools.pairwise(lines):
        pilot, copilot = (line[f"time/{n}_seconds"] - before[f"time/{n}_seconds"] for n in ("pilot", "copilot"))
        whole = pilot + copilot
        assert line["time/pilot_share"] == pytest.approx(pilot / whole, rel=1e-3)
        assert line["time/copilot_share"] == pytest.approx(copilot / whole, rel=1e-3)
        assert line["speed/target_tokens_per_second"] == pytest.approx(line["train/target_tokens"] / whole, rel=1e-3)
        assert line["speed/rows_per_second"] == pytest.approx(16 / whole, rel=1e-3)
        assert 0 <= line["data/padding_share"] < 0.5
        assert 50 < line["memory/rss_peak_mib"] < 100_000


def test_histograms_hold_every_target_token_of_validation(finished):
    log = events(finished)
    (records,) = wandb_parts(finished)
    for name in ("val/error_norm", "val/correction_norm"):
        first, last = log.Histograms(name)
        assert [first.step, last.step] == [1, 3]
        assert last.histogram_value.num == 32  # 16 rows, their answers and end tokens
        medians = [line[f"{name}_p50"] for line in csv_lines(finished) if f"{name}_p50" in line]
        assert last.histogram_value.min <= medians[1] <= last.histogram_value.max
    shown = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    counts = [
        sum(json.loads(item.value_json))
        for line in shown
        for item in line.item
        if list(item.nested_key) == ["val/error_norm", "values"]
    ]
    assert counts == [32, 32]


def test_the_curve_over_the_weight_is_the_one_of_the_results(finished):
    rows = composed.results(finished)["rows"]
    with (finished / "weights.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(r["benchmark"], r["split"], r["metric"], float(r["weight"]), float(r["value"])) for r in table] == [
        (r["benchmark"], r["split"], r["metric"], r["weight"], r["value"]) for r in rows
    ]
    curve = events(finished).Scalars("weights/all/test/nll")
    wanted = {r["weight"]: r["value"] for r in rows if (r["benchmark"], r["split"]) == ("all", "test")}
    assert {event.step / 1000: pytest.approx(event.value) for event in curve} == wanted
    (plot,) = (finished / "wandb").glob("offline-run-*/files/media/table/eval/curve/all/nll_table_*.json")
    points = json.loads(plot.read_text())["data"]
    assert {step: pytest.approx(y) for step, line, y in points if line == "test"} == wanted


def test_the_config_on_the_dashboard_is_plain_and_resolved(finished):
    (records,) = wandb_parts(finished)
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["mistake_log"]["every_n_rounds"] == 2
    assert config["paths"]["run_dir"] == str(finished)
    assert (run.run_group, run.job_type, run.project) == ("debug", "train", "transformer-copilot")


@pytest.mark.parametrize("family", training.FAMILIES)
def test_the_gradient_norm_is_that_before_clipping(family):
    def first_norms(clip):
        model = training.tiny_model(family, head_std=0.3, layers=2)
        torch.manual_seed(0)
        data = training.task_data(family, rounds=1)
        model = training.tiny_model(family, vocab=training.vocabulary_size(data), head_std=0.3)
        learners = {name: training.learner(clip=clip) for name in ("pilot", "copilot")}
        module = training.small_module(model, rounds=1, steps_per_round=2, **learners)
        found = {}
        see = training.EachRound(lambda trainer, _: found.update(trainer.callback_metrics))
        log = training.MistakeLog(policy=training.InOrder())
        training.train_on(module, [next(iter(data.train_dataloader()))], log, [see])
        return [float(found[f"train/{name}_gradient_norm"]) for name in ("pilot", "copilot")]

    free, clipped = first_norms(None), first_norms(1e-3)
    assert all(math.isfinite(norm) and norm > 1e-2 for norm in free)
    assert clipped[0] == pytest.approx(free[0], rel=1e-5)  # the Copilot's second update depends on clipping


# Generations ---------------------------------------------------------------------------------------------------------


def results_of(*benchmarks: str, weight: float = 1.0) -> Results:
    rows = [
        Row(b, s, "accuracy", w, 0.5, 4, (0, 1)) for b in benchmarks for s in ("validation", "test") for w in (0, 1)
    ]
    gain = [Gain(b, "accuracy", 0.5, 0.5, 0.0, (0, 0), 1, 1, 1.0) for b in benchmarks]
    return Results(
        seed=0, git="", config="", params={}, rounds=1, train_seconds=0.0, selected_weight=weight,
        selected_on="validation", reported_on="test", rows=rows, gain=gain,
    )  # fmt: skip


def write_predictions(folder: Path, benchmark: str, weight: float, scores: list[float], suffix: str = "") -> None:
    said = "prediction_sum" if suffix else "prediction"
    lines = [
        {"id": i, "prompt": f"p{i}", "target": f"t{i}", said: f"{weight:g}/{i}", "scores": {"accuracy": score, "x": 9}}
        for i, score in enumerate(scores)
    ]
    file = folder / f"test-{benchmark}{suffix}-weight={weight:g}.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")


@pytest.mark.parametrize("suffix", ["", "-likelihood"])
def test_answers_stand_side_by_side_with_the_changed_ones_first(suffix, tmp_path):
    write_predictions(tmp_path, "a", 0, [1, 0, 0, 1], suffix)
    write_predictions(tmp_path, "a", 1, [1, 0, 1, 0], suffix)
    found = side_by_side(results_of("a"), tmp_path)
    assert found == [
        ("a", 2, "p2", "t2", "0/2", "1/2", "fixed"),
        ("a", 3, "p3", "t3", "0/3", "1/3", "broken"),
        ("a", 0, "p0", "t0", "0/0", "1/0", "both right"),
        ("a", 1, "p1", "t1", "0/1", "1/1", "both wrong"),
    ]


def test_all_answers_stand_side_by_side_with_their_scores(tmp_path):
    for name, scores in (("a", [1, 0]), ("b", [0])):
        write_predictions(tmp_path, name, 0, scores)
        write_predictions(tmp_path, name, 1, [1 - score for score in scores])
    table = answers_table(results_of("a", "b"), tmp_path)
    assert table.columns.tolist() == [
        *("benchmark", "id", "prompt", "target", "pilot", "fused", "outcome"),
        *("pilot_accuracy", "pilot_x", "fused_accuracy", "fused_x"),
    ]
    assert table.drop(columns=["pilot_x", "fused_x"]).to_numpy().tolist() == [
        ["a", 0, "p0", "t0", "0/0", "1/0", "broken", 1, 0],
        ["a", 1, "p1", "t1", "0/1", "1/1", "fixed", 0, 1],
        ["b", 0, "p0", "t0", "0/0", "1/0", "fixed", 0, 1],
    ]
    assert answers_table(results_of("c"), tmp_path).empty


def test_benchmarks_share_the_table_and_leave_each_other_what_they_do_not_need(tmp_path):
    for name, rows in (("a", 5), ("b", 2 * SHOWN), ("c", 2 * SHOWN)):
        for weight in (0, 1):
            write_predictions(tmp_path, name, weight, [1.0] * rows)
    found = [row[0] for row in side_by_side(results_of("a", "b", "c"), tmp_path)]
    assert len(found) == SHOWN
    assert found.count("a") == 5
    assert abs(found.count("b") - found.count("c")) <= 1


def test_outcomes_share_the_table_too(tmp_path):
    many = SHOWN
    write_predictions(tmp_path, "a", 0, [0.0] * many + [1.0] * 3 + [0.0] * many)
    write_predictions(tmp_path, "a", 1, [1.0] * many + [0.0] * 3 + [0.0] * many)
    found = [row[-1] for row in side_by_side(results_of("a"), tmp_path)]
    assert len(found) == SHOWN
    assert found.count("broken") == 3
    assert abs(found.count("fixed") - found.count("both wrong")) <= 1


def test_a_run_shows_its_generations_on_every_logger(finished):
    with (finished / "generations.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    selected = composed.results(finished)["selected_weight"]
    said = {w: composed.predictions(finished, "test", w) for w in (0, selected)}
    assert sorted((int(r["id"]), r["prompt"], r["pilot"], r["fused"]) for r in table) == [
        (p["id"], p["prompt"], p["prediction"], f["prediction"]) for p, f in zip(said[0], said[selected], strict=True)
    ]
    answers = pd.read_parquet(finished / "predictions/answers.parquet")
    assert answers.fused.tolist() == [p["prediction"] for p in said[selected]]
    assert answers.pilot_accuracy.tolist() == [p["scores"]["accuracy"] for p in said[0]]
    assert pd.read_csv(finished / "predictions/answers.csv", keep_default_na=False).prompt.equals(answers.prompt)
    text = events(finished).Tensors("eval/generations/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.count("\n") == 1 + 16
    (file,) = (finished / "wandb").glob("offline-run-*/files/media/table/eval/generations_*.json")
    assert [row[1] for row in json.loads(file.read_text())["data"]] == [int(r["id"]) for r in table]


# wandb's runs --------------------------------------------------------------------------------------------------------


def exit_code(records) -> int:
    (code,) = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    return code


@pytest.mark.slow  # twice the start and the end of wandb; what is resumed without it is tested with checkpoints
def test_a_resumed_run_goes_on_with_its_id_and_drops_no_point(tmp_path):
    folder = tmp_path / "stopped"
    with pytest.raises(SystemExit):
        composed.train(folder, *SHORT, *STOP)
    assert wandb.run is None
    identity = json.loads((folder / "wandb.json").read_text())
    composed.run.train(composed.compose_config(f"resume={folder}", "trust=[composed]", "traceback=true"))
    assert json.loads((folder / "wandb.json").read_text()) == identity
    parts = wandb_parts(folder)
    assert [exit_code(part) for part in parts] == [0, 0]  # a clean stop is no failure
    runs = [r.run for part in parts for r in part if r.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {identity["id"]}
    assert {run.run_group for run in runs} == {"debug"}
    lines = [wandb_lines(part) for part in parts]
    rounds = [[line["round"] for line in part if "train/pilot_loss" in line] for part in lines]
    assert rounds == [[1, 2], [3, 4]]
    steps = [line["_step"] for part in lines for line in part]
    assert steps == sorted(set(steps))  # also over the parts, which `wandb sync` appends


@pytest.mark.slow
def test_a_failed_job_closes_its_run_as_failed_and_the_next_one_opens_its_own(tmp_path, monkeypatch, finished):
    loss = TCopilotModule._pilot_loss
    monkeypatch.setattr(
        TCopilotModule, "_pilot_loss", lambda self, s: loss(self, s) * (float("nan") if self.round == 2 else 1)
    )
    with pytest.raises(TrainingDivergedError):
        composed.train(tmp_path, *SHORT)
    assert wandb.run is None
    (records,) = wandb_parts(tmp_path)
    assert exit_code(records) == 1
    ids = [json.loads((folder / "wandb.json").read_text())["id"] for folder in (tmp_path, finished)]
    assert ids[0] != ids[1]


@pytest.mark.slow
def test_wandb_can_be_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    composed.train(tmp_path, *SHORT)
    assert not wandb_parts(tmp_path, patience=0)  # with its mode, wandb has started no process that could still write
    assert (tmp_path / "generations.csv").exists()


@pytest.mark.parametrize(
    ("variable", "entry", "found"),
    [
        (None, None, False),
        ("WANDB_API_KEY", None, True),
        ("WANDB_IDENTITY_TOKEN_FILE", None, True),
        (None, "machine api.wandb.ai login user password key", True),
        (None, "machine example.org login user password key", False),
        (None, "nonsense", False),
    ],
)
def test_credentials_are_found_where_wandb_looks_for_them(variable, entry, found, tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if variable:
        monkeypatch.setenv(variable, "x")
    if entry:
        (tmp_path / "netrc").write_text(entry)
        (tmp_path / "netrc").chmod(0o600)
    assert has_credentials() is found


@pytest.mark.slow
def test_another_server_needs_credentials_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password key")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    assert has_credentials()


@pytest.mark.slow
def test_the_jobs_of_a_sweep_are_runs_of_one_group(tmp_path):
    with composed.without_estimate():
        done = composed.forked("train.py", "-m", *SHORT, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads(file.read_text()) for file in tmp_path.glob("*/wandb.json"))
    assert one["id"] != two["id"]
    assert one["group"] == two["group"] == str(tmp_path)
