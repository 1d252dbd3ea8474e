"""A frozen Pilot end to end: recorded once, fitted from many times, without its layers, refused where it differs."""

import json
import re
import shutil
from types import SimpleNamespace

import composed
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from tcopilot.app import console
from tcopilot.app.checks.controls import CONTROLS
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.checks.recordings import option_problems
from tcopilot.app.controls.training import GRID
from tcopilot.mistake_log.recording import Recording, row_key
from tcopilot.models.pilot import ModelSource, ModelSourceError

SMALL = [*composed.SMALL, "fusion.weight=[0,1]"]


@pytest.fixture(scope="module")
def pilot(tmp_path_factory):
    """The export of a T5 that has seen a few rows."""
    folder = tmp_path_factory.mktemp("pilot")
    return composed.train(folder, *SMALL, "copilot=none") / "export"


def frozen(pilot, *more):
    return ["experiment=frozen", *SMALL, f"pilot.path={pilot}", "copilot.passes=3", *more]


@pytest.fixture(scope="module")
def first(pilot, tmp_path_factory):
    return composed.train(tmp_path_factory.mktemp("first"), *frozen(pilot))


def test_a_frozen_pilot_is_recorded_and_a_copilot_fitted_to_the_recording(pilot, first):
    found = composed.results(first)
    assert found["params"]["pilot_trainable"] == 0
    assert found["params"]["copilot_trainable"] > 0
    assert found["rounds"] > 0
    assert found["train_seconds"] > 0
    assert found["train_flops"] > 0
    assert any("were recorded in" in note for note in found["notes"])
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(path) for path in (pilot, first / "export"))
    for name, weight in before.pilot.state_dict().items():
        assert torch.equal(after.pilot.state_dict()[name], weight), name
    assert composed.value(found, "test", "nll", 0.0, "all") != composed.value(found, "test", "nll", 1.0, "all")
    assert "val/fused_nll" in (first / "metrics.csv").read_text()


@pytest.mark.slow
def test_further_copilots_are_fitted_without_the_pilots_layers(pilot, first, tmp_path, monkeypatch):
    loaded = []
    load = ModelSource.load

    def watched(source, tokenizer):
        loaded.append(len(fits))
        return load(source, tokenizer)

    fits = []
    record_of = Recording.record_of
    monkeypatch.setattr(Recording, "record_of", lambda *given: fits.append(1) or record_of(*given))
    monkeypatch.setattr(ModelSource, "load", watched)
    folder = composed.train(tmp_path, *frozen(pilot, f"mistake_log.from={first}", "copilot.hidden=16", "seed=1"))
    assert loaded == [len(fits)]  # once, to answer the test rows, when all records had been read
    assert not (folder / "recording").exists()
    assert (
        composed.results(folder)["params"]["copilot_trainable"]
        < composed.results(first)["params"]["copilot_trainable"]
    )


def test_the_fit_from_a_recording_equals_the_one_that_recorded(pilot, first, tmp_path):
    again = composed.train(tmp_path / "again", *frozen(pilot, f"mistake_log.from={first}/recording"))
    further = composed.train(tmp_path / "further", *frozen(pilot, f"mistake_log.from={again}"))  # a run that has none
    runs = (first, again, further)
    weights, *others = [AutoModelForSeq2SeqLM.from_pretrained(run / "export").copilot.state_dict() for run in runs]
    for other in others:
        for name, weight in weights.items():
            assert torch.equal(other[name], weight), name


@pytest.mark.slow
def test_a_recording_of_other_rows_or_another_pilot_is_refused_before_weights_load(
    pilot, first, tmp_path, monkeypatch
):
    monkeypatch.setattr(ModelSource, "load", lambda *given: pytest.fail("the Pilot was loaded"))
    alike = r"data, template, shots .*, and so must data.max_train_rows=256 and data.max_eval_rows=16, unless all"
    which = r"\(\d+ train, \d+ validation\)"
    with pytest.raises(ConfigError, match=rf"mistake_log.from=.*rows are not in it {which}; {alike}"):
        composed.train(tmp_path / "a", *frozen(pilot, f"mistake_log.from={first}", "data.split_seed=1"))
    other = frozen(pilot, f"mistake_log.from={first}", "pilot.dtype=bfloat16")
    with pytest.raises(ConfigError, match=r"mistake_log.from=.*recorded with another Pilot"):
        composed.train(tmp_path / "b", *other)
    with pytest.raises(ConfigError, match=r"mistake_log.from=.*cannot be read.*give the folder `recording`"):
        composed.train(tmp_path / "c", *frozen(pilot, f"mistake_log.from={tmp_path}"))
    with pytest.raises(ConfigError, match=r"depths .* not of \[0.3\]"):
        composed.train(tmp_path / "d", *frozen(pilot, f"mistake_log.from={first}", "copilot.depths=[0.3]"))


@pytest.mark.slow
def test_a_recording_that_was_stopped_goes_on(pilot, tmp_path, monkeypatch):
    add, recorded = Recording.add, []

    def stop_at_the_second(recording, rows, *given, **options):
        if recorded:
            raise KeyboardInterrupt
        recorded.extend(map(row_key, rows))
        add(recording, rows, *given, **options)

    monkeypatch.setattr(Recording, "add", stop_at_the_second)
    with pytest.raises(SystemExit):
        composed.train(tmp_path, *frozen(pilot))
    later = []

    def watched(recording, rows, *given, **options):
        later.extend(map(row_key, rows))
        add(recording, rows, *given, **options)

    monkeypatch.setattr(Recording, "add", watched)
    composed.resume(tmp_path)
    assert recorded
    assert later
    assert not {*recorded} & {*later}  # nothing twice
    assert composed.results(tmp_path)["rounds"] > 0


@pytest.mark.slow
def test_the_flops_of_a_fit_that_ends_early_are_counted(pilot, first, tmp_path, monkeypatch):
    monkeypatch.setattr(Recording, "cost_of", lambda *given: (0.0, 0.0))
    given = ["copilot.passes=40", "copilot.patience=1", "copilot.optimizer.lr=1e-12", "copilot.batch_size=200"]
    found = composed.results(composed.train(tmp_path, *frozen(pilot, f"mistake_log.from={first}", *given)))
    assert found["rounds"] < 20  # of 40, of which the middle one would be counted
    assert found["train_flops"] > 0


@pytest.mark.slow
def test_settings_of_rounds_are_named_as_unused(pilot, first, tmp_path, monkeypatch, capsys):
    given = ["rounds=7", "copilot.steps_per_round=2", "copilot.passes=2", "copilot.hidden=8", "pilot.clip=3"]
    given += ["data.group_by_length=false"]  # fits always do
    given += ["data.num_workers=2"]
    monkeypatch.setattr(console, "given_overrides", lambda: given)
    composed.train(tmp_path, *frozen(pilot, f"mistake_log.from={first}", *given, "control=calibrated"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not used here" in line]
    assert "rounds=7, copilot.steps_per_round=2, pilot.clip=3, data.group_by_length=false, data.num_workers=2" in line
    assert "passes" not in line
    assert "hidden" not in line


@pytest.mark.slow
def test_settings_of_a_log_that_fills_up_are_named_as_unused(pilot, first, tmp_path, monkeypatch, capsys):
    idle = ["mistake_log=reservoir", "mistake_log.log.rows=all", "mistake_log.log.dtype=bfloat16", "data.batch_size=3"]
    monkeypatch.setattr(console, "given_overrides", lambda: [*idle, "copilot.batch_size=50"])
    given = frozen(pilot, *idle, "copilot.batch_size=50", "evaluation=targets", "copilot.passes=1")
    composed.train(tmp_path / "a", *given, f"mistake_log.from={first}")
    composed.train(tmp_path / "b", *given)  # records, in that type
    shown = [line for line in capsys.readouterr().out.splitlines() if "not used here" in line]
    assert [line.split("│")[2].strip() for line in shown] == [
        ", ".join(idle), ", ".join(one for one in idle if "dtype" not in one),
    ]  # fmt: skip


@pytest.mark.slow
def test_without_answers_a_copilot_is_fitted_and_judged_in_seconds_and_answers_later(
    pilot, first, tmp_path, monkeypatch
):
    load = ModelSource.load
    monkeypatch.setattr(ModelSource, "load", lambda *given: pytest.fail("the Pilot was loaded"))
    given = frozen(pilot, f"mistake_log.from={first}", "evaluation=targets", "control=calibrated")
    folder = composed.train(tmp_path / "fit", *given)
    assert not list((folder / "export").glob("model*.safetensors"))
    found, answered = composed.results(folder), composed.results(first)
    assert [(gain["metric"], gain["benchmark"]) for gain in found["gain"]] == [
        ("exact", "word_problems"), ("nll", "word_problems"),
    ]  # fmt: skip
    assert {control["metric"] for control in found["controls"]} == {"exact", "nll"}
    assert any("exact, against Pilot, calibrated" in note for note in found["notes"])
    of_validation = 16 / 216 * found["recording_flops"]  # the rows have about the same length
    assert found["controls"][0]["train_flops"] == pytest.approx(of_validation, rel=0.3)  # and p̂ from the last state
    for weight in (0.0, 1.0):  # all targets have two tokens, so the mean over rows is that over tokens
        ours = composed.value(found, "test", "nll", weight)
        assert ours == pytest.approx(composed.value(answered, "test", "nll", weight, "all"), rel=1e-4)
    monkeypatch.setattr(ModelSource, "load", load)
    later = composed.results(composed.evaluate(folder, tmp_path / "eval", "fusion.weight=[0,1]"))
    assert [(one["benchmark"], one["metric"]) for one in later["controls"]] == [("all", "nll")]  # none has answered
    for weight in (0.0, 1.0):
        figures = [composed.value(one, "test", "accuracy", weight) for one in (later, answered)]
        assert figures[0] == figures[1] == composed.value(found, "test", "exact", weight)
    passed = composed.results(
        composed.evaluate(folder, tmp_path / "pass", "fusion.weight=[0,1]", "evaluation=targets")
    )
    for metric in ("exact", "nll"):  # by a pass of the Pilot
        figures = [composed.value(one, "test", metric, 1.0) for one in (passed, found)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4)


@pytest.mark.slow
def test_a_copilot_alone_is_put_on_its_own_pilot_only_unless_told_otherwise(pilot, first, tmp_path):
    own = shutil.copytree(pilot, tmp_path / "pilot")
    given = frozen(own, f"mistake_log.from={first}", "evaluation=targets", "copilot.passes=1")
    fitted = composed.train(tmp_path / "fit", *given)
    elsewhere = own.rename(tmp_path / "elsewhere")
    again = ["evaluation=targets", "fusion.weight=[0,1]", f"pilot.path={elsewhere}"]
    moved = composed.evaluate(fitted, tmp_path / "moved", *again)
    for weight in (0.0, 1.0):
        figures = [composed.value(composed.results(run), "test", "nll", weight, "all") for run in (moved, fitted)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    shutil.copytree(first / "export", own)  # another export of the same Pilot
    composed.evaluate(fitted, tmp_path / "same")
    weights = load_file(own / "model.safetensors")
    weights["pilot.shared.weight"] += 1
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelSourceError, match=r"weights are not those .* pilot\.path=.*copilot\.path=.*/export$"):
        composed.evaluate(fitted, tmp_path / "other")


@pytest.mark.slow
def test_a_run_is_evaluated_anew_by_reranking_the_pilots_beams(first, tmp_path):
    folder = composed.evaluate(first, tmp_path, "evaluation=reranking", "fusion.weight=[0,1]")
    found = composed.results(folder)
    for weight in (0.0, 1.0):
        file = folder / "predictions" / f"test-word_problems-reranking-weight={weight:g}.jsonl"
        said = [json.loads(line)["scores"]["accuracy"] for line in file.read_text().splitlines()]
        assert composed.value(found, "test", "accuracy", weight) == pytest.approx(sum(said) / len(said))
    assert (folder / "predictions" / "answers.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_a_trained_head_goes_on_with_the_states_that_it_was_trained_on(pilot, alone, tmp_path):
    given = frozen(pilot, "evaluation=targets", "copilot.passes=1", "copilot.hidden=8")
    before = composed.train(tmp_path / "before", *given, "copilot.depths=[0.5,1.0]")
    given = [*given, f"mistake_log.from={before}"]
    if alone:
        before = composed.train(tmp_path / "alone", *given, "copilot.depths=[0.5,1.0]")
        assert (before / "export" / "copilot.safetensors").exists()
    after = composed.train(tmp_path / "on", *given, f"copilot.path={before}/export", "copilot.optimizer.lr=1e-20")
    for weight in (0.0, 1.0):  # the same head, fitted by next to nothing
        figures = [composed.value(composed.results(run), "test", "nll", weight, "all") for run in (before, after)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    assert figures[0] != pytest.approx(composed.value(composed.results(before), "test", "nll", 0.0, "all"), rel=1e-6)


def multiple_choice(folder, pilot, *more):
    """A few rows with options, for a frozen Pilot."""
    rows = [{"q": f"what is {n}", "o": [f"{n}", f"{n + 1}", "no"], "a": n % 3} for n in range(40)]
    for split, part in (("train", rows[:24]), ("validation", rows[24:32]), ("test", rows[32:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    about = "{_target_: tcopilot.data.Cloze, name: mine, question_column: q, option_columns: [o], label_column: a, "
    about += "label: zero_based, source: here}"
    given = ["experiment=frozen", "data=jsonl", f"data.path={folder}", "~data.benchmarks.jsonl", "debug=limit"]
    return [*given, f"+data.benchmarks.mine={about}", f"pilot.path={pilot}", "copilot.passes=2", *more]


@pytest.mark.slow
def test_options_are_chosen_from_a_recording_as_by_the_pilot(pilot, tmp_path, capsys):
    choice = ["fusion.weight=[0,0.5,1]", "fusion.select_by=metric"]
    given = multiple_choice(tmp_path, pilot, "evaluation=likelihood", *choice)
    folder = composed.train(tmp_path / "run", *given)
    assert re.search(r"to be recorded *│ (\d+) of \1 rows, options", capsys.readouterr().out)
    found = composed.results(folder)
    again = composed.results(composed.evaluate(folder, tmp_path / "eval", "fusion.weight=[0,1]"))
    for weight in (0.0, 1.0):
        for metric in ("accuracy_sum", "accuracy_mean"):
            figures = [composed.value(one, "test", metric, weight, "mine") for one in (found, again)]
            assert figures[0] == figures[1]
        name = f"predictions/test-mine-likelihood-weight={weight:g}.jsonl"
        said = [(run / name).read_text().splitlines() for run in (folder, tmp_path / "eval")]
        for recorded, passed in zip(*said, strict=True):
            pair = [json.loads(line)["log_likelihoods"] for line in (recorded, passed)]
            assert pair[0] == pytest.approx(pair[1], rel=1e-4)


@pytest.mark.slow
def test_options_are_recorded_where_they_are_scored_by_the_recording(pilot, tmp_path):
    closed = ["evaluation=likelihood", "fusion.weight=auto", "fusion.select_by=nll"]  # scores those of validation
    found = composed.results(composed.train(tmp_path / "auto", *multiple_choice(tmp_path, pilot, *closed)))
    assert composed.value(found, "validation", "accuracy_sum", 0.0, "mine") >= 0
    first = composed.train(tmp_path / "answers", *multiple_choice(tmp_path, pilot, "fusion.weight=[0,1]"))
    both = ["evaluation.modes=[generation,likelihood]", f"mistake_log.from={first}", "fusion.weight=[0,1]"]
    found = composed.results(composed.train(tmp_path / "both", *multiple_choice(tmp_path, pilot, *both)))
    assert composed.value(found, "test", "accuracy_sum", 0.0, "mine") >= 0  # by a pass


@pytest.mark.slow
def test_rows_without_options_need_none(pilot, first, tmp_path):
    given = frozen(pilot, f"mistake_log.from={first}", "evaluation.modes=[likelihood,targets]", "copilot.passes=1")
    found = composed.results(composed.train(tmp_path, *given))
    assert {row["metric"] for row in found["rows"]} == {"exact", "nll"}


@pytest.mark.slow
def test_a_catalogue_is_ranked_by_the_pilot_itself(tmp_path):
    users = [{"user": user, "items": [1 + (user + step) % 20 for step in range(6)]} for user in range(1, 31)]
    (tmp_path / "interactions.jsonl").write_text("".join(json.dumps(user) + "\n" for user in users))
    given = ["pilot=tiny_llama", "data=lastfm", f"data.path={tmp_path}", "debug=limit", "fusion.weight=[0,1]"]
    given += ["data.benchmarks.lastfm.items=20", "data.benchmarks.lastfm.cutoffs=[5,10]", "data.max_eval_rows=8"]
    given += ["evaluation.ranking_beams=10", "data.benchmarks.lastfm.history=3"]
    before = composed.train(tmp_path / "pilot", *given, "copilot=none", "evaluation=targets", "rounds=1")
    given = ["experiment=frozen", *given[1:], f"pilot.path={before}/export", "copilot.passes=1"]
    first = composed.train(tmp_path / "first", *given, "evaluation=targets")
    folder = composed.train(tmp_path / "run", *given, "evaluation=likelihood", f"mistake_log.from={first}")
    assert "ndcg@10" in {gain["metric"] for gain in composed.results(folder)["gain"]}


@pytest.mark.slow
def test_the_controls_of_a_frozen_pilot_train_it_with_lora(pilot, first, tmp_path):
    given = frozen(pilot, f"mistake_log.from={first}", "copilot.passes=1")
    names = ("equal_time", "equal_flops", "tuned", "tuned_for_fit")
    found = composed.results(composed.train(tmp_path, *given, f"control=[{','.join(names)}]"))
    before, flops = composed.value(found, "test", "nll", 0.0, "all"), {}
    for name in names:
        (nll,) = [one for one in found["controls"] if (one["name"], one["metric"]) == (CONTROLS[name], "nll")]
        assert nll["rounds"] > 0
        assert nll["value"] != before
        flops[name] = nll["train_flops"]
    assert 0 < found["recording_flops"] < found["train_flops"]
    fit = found["train_flops"] - found["recording_flops"]
    assert flops["tuned_for_fit"] == pytest.approx(len(GRID) * fit, rel=0.25)  # all its trials
    assert flops["tuned"] == pytest.approx(len(GRID) * found["train_flops"], rel=0.25)
    after = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "export").pilot.state_dict()
    for name, weight in AutoModelForSeq2SeqLM.from_pretrained(pilot).pilot.state_dict().items():
        assert torch.equal(after[name], weight), name  # the run's own Pilot is left alone


def test_what_a_recording_cannot_serve_is_refused(pilot, tmp_path):
    wrong = {
        "use pilot=frozen copilot=head, or leave it out": [*SMALL, "mistake_log.from=runs/a"],
        "use data.held_out=0": frozen(pilot, "data.held_out=0.1"),
        "use data.streaming=false": frozen(pilot, "data.streaming=true"),
    }
    for mend, overrides in wrong.items():
        with pytest.raises(ConfigError, match=mend):
            composed.train(tmp_path, *overrides)


@pytest.mark.slow
def test_two_processes_record_and_fit_as_one(pilot, first, tmp_path):
    given = [*frozen(pilot), "trainer=two_ranks", f"paths.run_dir={tmp_path}", *composed.QUIET]
    with composed.without_estimate():
        done = composed.forked("train.py", *given, spare=True)
    assert done.returncode == 0, done.stderr
    found, alone = composed.results(tmp_path), composed.results(first)
    for weight in (0.0, 1.0):
        figures = [composed.value(one, "validation", "nll", weight, "all") for one in (found, alone)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-3)
    ranks = {file.stem.rpartition("-")[2] for file in (tmp_path / "recording").glob("*.safetensors")}
    assert ranks == {"0", "1"}


@pytest.mark.slow
def test_wrong_options_are_recorded_and_learned_from(pilot, tmp_path):
    closed = ["evaluation=likelihood", "copilot.passes=6", "copilot.optimizer.lr=3e-3"]
    plain = composed.train(tmp_path / "plain", *multiple_choice(tmp_path, pilot, *closed))
    own = composed.train(tmp_path / "own", *multiple_choice(tmp_path, pilot, *closed, "copilot.wrong_options=true"))
    assert "val/fused_choice_nll" in (own / "metrics.csv").read_text()
    found = [composed.results(run) for run in (plain, own)]
    assert found[1]["recording_flops"] > 1.5 * found[0]["recording_flops"]  # of the options of both splits as well
    again = multiple_choice(tmp_path, pilot, *closed, "copilot.wrong_options=true", f"mistake_log.from={own}")
    refitted = composed.results(composed.train(tmp_path / "again", *again))
    for row, other in zip(found[1]["rows"], refitted["rows"], strict=True):
        assert row["value"] == pytest.approx(other["value"], rel=1e-6)
    lacking = multiple_choice(tmp_path, pilot, *closed, "copilot.wrong_options=true", f"mistake_log.from={plain}")
    with pytest.raises(ConfigError, match=r"are not in it \(\d+ options\); it was recorded without copilot.w"):
        composed.train(tmp_path / "lacking", *lacking)


def test_wrong_options_need_options_and_a_likelihood(pilot, tmp_path):
    with pytest.raises(ConfigError, match=r"copilot.wrong_options=true: the rows of word_problems have no options"):
        composed.train(tmp_path, *frozen(pilot, "copilot.wrong_options=true"))
    with pytest.raises(ConfigError, match=r"which RootMeanSquaredError does not train; use objective=ce"):
        composed.train(tmp_path, *frozen(pilot, "copilot.wrong_options=true", "objective=rmse"))


@pytest.mark.slow
def test_two_processes_learn_from_wrong_options_as_one(pilot, tmp_path):
    given = multiple_choice(
        tmp_path, pilot, "evaluation=likelihood", "copilot.wrong_options=true", "copilot.batch_size=6"
    )
    alone = composed.results(composed.train(tmp_path / "one", *given))
    with composed.without_estimate():
        job = [*given, "trainer=two_ranks", f"paths.run_dir={tmp_path / 'two'}", *composed.QUIET]
        done = composed.forked("train.py", *job, spare=True)
    assert done.returncode == 0, done.stderr
    for row, other in zip(alone["rows"], composed.results(tmp_path / "two")["rows"], strict=True):
        assert row["value"] == pytest.approx(other["value"], rel=1e-3), row


def test_a_target_that_is_none_of_its_options_as_tokens_is_refused():
    row = {"benchmark": 0, "target_ids": [6, 1], "option_ids": [[6, 1], [7, 1]]}
    ended = row | {"target_ids": [6, 2, 1]}  # by an end token that the template spells out and options lack
    rows = {"train": [row, ended, row | {"option_ids": None}], "validation": [ended]}
    data = SimpleNamespace(benchmark_names=["mine"], has_options=lambda name: True, rows_of=rows.get)
    cfg = composed.compose_config("experiment=frozen", "pilot.path=x", "copilot.wrong_options=true")
    (problem,) = option_problems(cfg, data)
    assert "the target of 2 of 4 rows is not one of its options, token for token; let data.benchmarks.mine" in problem
    rows |= {"train": [row], "validation": [row]}
    assert list(option_problems(cfg, data)) == []
