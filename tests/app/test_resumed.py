"""What goes on: a finished run with more rounds, an older config with keys added later, and a pair from its export."""

import csv

import composed
import pytest
from safetensors.torch import load_file

from tcopilot.app import run
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.checks.resumed import take_overrides
from tcopilot.run_directory import flatten
from tcopilot.training.module import TCopilotModule, TrainingDivergedError

CONSTANT = ["scheduler@pilot.scheduler=constant", "scheduler@copilot.scheduler=constant", "fusion.weight=[0,1]"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four rounds."""
    return composed.train(tmp_path_factory.mktemp("run") / "four", *composed.SMALL, *CONSTANT)


@pytest.fixture
def resume(monkeypatch):
    """Resume a run with overrides, as the command line does."""

    def go_on(folder, *given, estimate=False):
        monkeypatch.setattr(run, "given_overrides", lambda: [f"resume={folder}", *given])
        monkeypatch.setattr(run, "budget", lambda *_: None)
        run.train(composed.compose_config(f"resume={folder}", "traceback=true", *given))

    return go_on


def weights(folder):
    return load_file(folder / "export" / "model.safetensors")


@pytest.mark.slow
def test_a_finished_run_with_more_rounds_ends_where_a_run_of_as_many_does(finished, resume, tmp_path, caplog):
    whole = composed.train(tmp_path / "six", *composed.SMALL, *CONSTANT, "rounds=6")
    (tmp_path / "more").symlink_to(finished)
    resume(finished)
    resume(finished, "rounds=3")
    for rounds in (4, 3):
        assert f"all {rounds} rounds are done; rounds=<more> goes on with it" in caplog.text
    resume(finished, "rounds=6")
    assert composed.results(finished)["rounds"] == 6
    more, straight = weights(finished), weights(whole)
    assert more.keys() == straight.keys()
    assert all(more[name].equal(straight[name]) for name in straight)


@pytest.mark.slow
def test_more_rounds_are_not_held_against_controls_of_fewer(resume, tmp_path):
    folder = composed.train(tmp_path / "run", *composed.SMALL, *CONSTANT, "control=[twice]")
    controls = composed.results(folder)["controls"]
    resume(folder)
    assert composed.results(folder)["controls"] == controls
    resume(folder, "rounds=6")
    assert {control["rounds"] for control in composed.results(folder)["controls"]} == {12}


def test_a_run_goes_on_with_what_no_checkpoint_depends_on():
    before, cfg = composed.compose_config("rounds=10"), composed.compose_config(
        "rounds=20", "pilot.optimizer.lr=0.5", "copilot.layers=1", "evaluation=beam4", "copilot.positions=pilot"
    )  # fmt: skip
    before = composed.OmegaConf.create(composed.OmegaConf.to_container(before.copy(), resolve=False))
    before.data.rounds = 10  # resolved, as a run saves it
    del before.copilot["positions"]  # as of a version that had no such key
    given = ["rounds=20", "pilot.optimizer.lr=0.5", "copilot.layers=1", "evaluation=beam4", "copilot.positions=pilot"]
    assert take_overrides(before, cfg, [*given, "debug=limit"]) == ["copilot.layers=1", "debug=limit"]
    assert (before.rounds, before.data.rounds, before.pilot.optimizer.lr) == (20, 20, 0.5)
    assert (before.copilot.layers, before.evaluation.num_beams, before.copilot.positions) == (None, 4, "pilot")


@pytest.mark.slow
def test_a_diverged_run_goes_on_at_a_lower_rate_as_its_message_says(resume, tmp_path, monkeypatch):
    loss, folder = TCopilotModule._pilot_loss, tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(
            TCopilotModule, "_pilot_loss", lambda self, s: loss(self, s) * (float("nan") if self.round == 2 else 1)
        )
        with pytest.raises(TrainingDivergedError, match=r"pilot\.optimizer\.lr=<lower>\. Last good .*round=2"):
            composed.train(folder, *composed.SMALL, *CONSTANT, "callbacks.checkpoint.every_n_rounds=1")
    resume(folder, "pilot.optimizer.lr=1e-5", "pilot.scheduler.num_warmup_steps=0")
    assert composed.results(folder)["rounds"] == 4
    with (folder / "metrics.csv").open(newline="") as file:
        rates = [float(line["lr/pilot"]) for line in csv.DictReader(file) if line["lr/pilot"]]
    assert rates[2:] == pytest.approx([1e-5, 1e-5])
    assert rates[0] != pytest.approx(1e-5)


@pytest.mark.slow
def test_a_config_without_a_key_is_mended_as_the_message_says(finished, resume, tmp_path):
    path = finished / "config.yaml"
    text = path.read_text()
    config = composed.OmegaConf.create(text)
    del config.evaluation["ranking_beams"]
    composed.OmegaConf.save(config, path)
    try:
        with pytest.raises(ConfigError, match=r"give evaluation\.ranking_beams=<value>"):
            composed.evaluate(finished, tmp_path / "refused")
        with pytest.raises(ConfigError, match=r"give evaluation\.ranking_beams=<value>"):
            resume(finished)
        composed.evaluate(finished, tmp_path / "evaluated", "evaluation.ranking_beams=7")
        assert composed.OmegaConf.load(tmp_path / "evaluated" / "config.yaml").evaluation.ranking_beams == 7
        resume(finished, "evaluation.ranking_beams=7")
    finally:
        path.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("estimate", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_pair_goes_on_from_its_export(finished, estimate, tmp_path):
    export = finished / "export"
    still = ["rounds=1", "pilot.optimizer.lr=1e-20", "copilot.optimizer.lr=1e-20", "fusion.weight=[0,1]"]
    both = composed.train(
        tmp_path / "both", *composed.SMALL, f"pilot.path={export}", f"copilot.path={export}", *still, estimate=estimate
    )
    before, after = weights(finished), weights(both)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_the_copilot_of_an_export_is_refused_on_a_pilot_that_it_cannot_read(finished, tmp_path):
    with pytest.raises(ConfigError, match="its trained Copilot reads a Pilot of width 64"):
        composed.train(tmp_path / "no", *composed.SMALL, f"copilot.path={finished}/export", "pilot.config.d_model=32")


def test_the_copilot_of_an_export_is_refused_as_one_of_another_kind(finished, tmp_path):
    given = ["pilot=frozen", "copilot=head", f"pilot.path={finished}/export", f"copilot.path={finished}/export"]
    with pytest.raises(
        ConfigError, match=r"copilot.path=.*is of kind decoder, but copilot.kind=head; choose copilot="
    ):
        composed.train(tmp_path / "no", *composed.SMALL, *given)


def going_on(*given, run=()):
    """A run's config of its own, and what resuming it with overrides takes and leaves out."""
    saved = composed.OmegaConf.to_container(composed.compose_config(*run, "paths.run_dir=/runs/a"), resolve=True)
    before, kept = composed.OmegaConf.create(saved), composed.OmegaConf.create(saved)
    return before, kept, take_overrides(before, composed.compose_config(*given), given)


def differences(one, other):
    one, other = (flatten(composed.OmegaConf.to_container(config)) for config in (one, other))
    return {key: other.get(key) for key in {**one, **other} if one.get(key) != other.get(key)}


@pytest.mark.slow
def test_a_groups_file_keeps_what_the_run_has_set_beside_it():
    own = ["evaluation.max_new_tokens=32", "evaluation.batch_size=16", "pilot.optimizer.lr=0.5"]
    own += ["pilot.scheduler.num_warmup_steps=7", "callbacks.checkpoint.every_n_rounds=9"]
    given = ["objective=mse", "scheduler@pilot.scheduler=constant", "callbacks=copilot_stop"]
    before, kept, left_out = going_on(*given, run=own)
    assert left_out == []
    changed = differences(kept, before)
    assert changed.pop("objective").endswith("MeanSquaredError")
    assert changed.pop("pilot.scheduler") == "transformers.get_scheduler"
    assert all(key.startswith(("callbacks.copilot_stop", "pilot.scheduler.")) for key in changed)
    assert (before.pilot.scheduler.num_warmup_steps, before.callbacks.checkpoint.every_n_rounds) == (7, 9)
    before, kept, _ = going_on("evaluation=beam4")
    assert differences(kept, before) == {"evaluation.num_beams": 4}


def test_a_groups_file_that_would_change_several_settings_is_refused_with_their_names():
    own = ["evaluation.max_new_tokens=32", "evaluation.batch_size=16"]
    with pytest.raises(ConfigError) as refused:
        going_on("evaluation=beam4", run=own)
    said = str(refused.value)
    assert "evaluation=beam4 on resuming would change several settings" in said
    assert "evaluation.batch_size from 16 to 128, evaluation.max_new_tokens from 32 to null" in said
    assert "evaluation.num_beams from 1 to 4" in said
    given = ["evaluation=beam4", *own]
    before, kept, left_out = going_on(*given, run=own)
    assert (left_out, differences(kept, before)) == ([], {"evaluation.num_beams": 4})


def test_a_groups_file_that_checkpoints_depend_on_is_left_out():
    before, kept, left_out = going_on("copilot=half", run=["copilot.clip=3"])
    assert (left_out, before) == (["copilot=half"], kept)
