"""Controls: two Pilots really averaged, budgets really equal, ablated Copilots really blind, all beside any run."""

import gc
import json
import signal
import weakref
from types import SimpleNamespace

import composed
import pytest
import torch
from omegaconf import OmegaConf
from small_training import random_batch, tiny_model, tiny_pilot
from transformers import AutoConfig

from tcopilot.app.checks.config import config_problems
from tcopilot.app.checks.controls import CONTROLS
from tcopilot.app.checks.models import model_problems
from tcopilot.app.checks.trial_build import trial_problems
from tcopilot.app.controls import training as controls
from tcopilot.app.controls.averaged import AveragedPilots
from tcopilot.app.controls.training import widened
from tcopilot.app.jobs import STOPPED
from tcopilot.models import families
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.copilot import READS
from tcopilot.models.modeling import fused_class
from tcopilot.models.pilot import ModelSource
from tcopilot.training.error_statistics import correct_targets
from tcopilot.training.module import TrainingDivergedError

SMALL = [*composed.SMALL, "fusion.weight=[0,1]"]
NAMES = {
    "equal_time": "Pilot, equal time",
    "equal_flops": "Pilot, equal FLOPs",
    "averaged": "two Pilots averaged",
    "equal_parameters": "Pilot, equal parameters",
    "calibrated": "Pilot, calibrated",
    "tuned": "Pilot, tuned",
    "output_head": "Pilot with its output head",
    "twice": "Pilot, twice the rounds",
}
AT = {"calibrated": 1.0}  # λ at which a control answers


# Two Pilots averaged ----------------------------------------------------------------------------------------------


def averaged(family: str):
    """A bare fused model of two different Pilots, and both of them."""
    pilots = [tiny_pilot(family, seed=seed).eval() for seed in (1, 2)]
    model = fused_class(family == "t5")(TCopilotConfig(pilots[0].config), AveragedPilots(*pilots))
    return model.eval(), pilots


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_mean_is_of_probabilities(family):
    model, pilots = averaged(family)
    batch = random_batch(family)
    mean, _ = correct_targets(model, batch)
    one, two = (correct_targets(fused_class(family == "t5")(TCopilotConfig(p.config), p), batch)[0] for p in pilots)
    torch.testing.assert_close(mean.exp(), (one.exp() + two.exp()) / 2)
    assert (one - two).abs().max() > 0.1


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_cached_decoding_of_the_mean_equals_decoding_without_a_cache(family, beams):
    model, pilots = averaged(family)
    batch = random_batch(family, rows=5)
    given = {
        "input_ids": batch.source_ids_BM, "attention_mask": batch.source_mask_BM.long(), "num_beams": beams,
        "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    cached, plain = (model.generate(**given, use_cache=use) for use in (True, False))
    assert cached.tolist() == plain.tolist()
    (through_evaluation,) = model.generate_at_weights([0.0], **given)
    assert through_evaluation.tolist() == cached.tolist()
    assert all(pilot.generate(**given).tolist() != cached.tolist() for pilot in pilots)


# A wider Pilot ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_t5", "tiny_llama"])
def test_a_wider_pilot_has_the_parameters_asked_for(name):
    config = OmegaConf.to_container(composed.compose_config(f"pilot={name}").pilot.config)
    sizes = {}
    for wanted in (200_000, 400_000, 800_000):
        wider = widened(config, 91, wanted)
        sizes[wanted] = sum(
            p.numel() for p in families.skeleton(AutoConfig.for_model(**wider, vocab_size=91)).parameters()
        )
        assert wider.keys() == config.keys()
        assert sizes[wanted] == pytest.approx(wanted, rel=0.1)
    assert len(set(sizes.values())) == 3


# Ablated Copilots -------------------------------------------------------------------------------------------------


def corrections(model, batch, **changed):
    """f^C of given inputs, some of them replaced."""
    states = {
        "errors": torch.randn(
            len(batch), 3, model.config.copilot["vocab_size"], generator=torch.Generator().manual_seed(1)
        ),
        "source": torch.randn(len(batch), 5, 16, generator=torch.Generator().manual_seed(2)),
        "states": torch.randn(len(batch), 4, 16, generator=torch.Generator().manual_seed(3)),
    } | changed
    mask = torch.ones(len(batch), 5, dtype=torch.bool)
    copilot = model.copilot
    hidden, _ = copilot(copilot.inputs(states["errors"]), states["source"], mask, states["states"])
    return hidden


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("hidden", READS)
def test_what_a_copilot_does_not_read_changes_nothing(family, hidden):
    model = tiny_model(family, head_std=0.5, reads=[name for name in READS if name != hidden]).eval()
    batch = random_batch(family)
    before = corrections(model, batch)
    for name, shape in (("errors", (3, 24)), ("source", (5, 16)), ("states", (4, 16))):
        other = torch.randn(len(batch), *shape, generator=torch.Generator().manual_seed(9))
        same = torch.equal(corrections(model, batch, **{name: other}), before)
        assert same == (name == hidden), name


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("hidden", READS)
def test_an_ablated_copilot_decodes_step_by_step_as_in_one_pass(family, hidden):
    model = tiny_model(family, head_std=0.5, weight=2.0, reads=[name for name in READS if name != hidden]).eval()
    batch = random_batch(family, rows=5)
    given = {
        "input_ids": batch.source_ids_BM, "attention_mask": batch.source_mask_BM.long(), "max_new_tokens": 8,
        "do_sample": False, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    cached, plain = (model.generate(**given, use_cache=use) for use in (True, False))
    assert cached.tolist() == plain.tolist()
    assert model.pilot.generate(**given).tolist() != cached.tolist()


def test_a_copilot_reads_something():
    with pytest.raises(ValueError, match=r"copilot\.reads"):
        tiny_model("t5", reads=[])
    with pytest.raises(ValueError, match="errors, source, states"):
        tiny_model("t5", reads=["errors", "prompt"])


# Beside a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """A run with all controls."""
    return composed.train(tmp_path_factory.mktemp("controlled"), *SMALL, f"control=[{','.join(NAMES)}]")


@pytest.mark.slow
def test_all_controls_stand_beside_the_gain_with_what_they_cost(controlled):
    folder = controlled
    found = composed.results(folder)
    by_name = {name: [c for c in found["controls"] if c["name"] == title] for name, title in NAMES.items()}
    for name, rows in by_name.items():
        assert {(row["benchmark"], row["metric"]) for row in rows} == {("word_problems", "accuracy"), ("all", "nll")}
        predictions = composed.predictions(folder / "control" / name, "test", AT.get(name, 0.0))
        assert rows[0]["value"] == sum(p["scores"]["accuracy"] for p in predictions) / len(predictions)
    for title in NAMES.values():  # the run's last sentences hold the fused model against each of them
        value = next(c["value"] for c in found["controls"] if c["name"] == title and c["metric"] == "accuracy")
        (said,) = [note for note in found["notes"] if f"against {title}: " in note]
        assert f": {100 * (found['gain'][0]['fused'] - value):+.2f} points [" in said
    cost = {name: rows[0] for name, rows in by_name.items()}
    params = found["params"]
    assert cost["averaged"]["rounds"] == 2 * cost["equal_parameters"]["rounds"] == 2 * found["rounds"]
    assert cost["averaged"]["parameters"] == 2 * params["pilot"]
    assert cost["equal_parameters"]["parameters"] == pytest.approx(params["pilot"] + params["copilot"], rel=0.1)
    assert cost["equal_flops"]["train_flops"] == pytest.approx(found["train_flops"], rel=0.25)
    assert cost["equal_flops"]["rounds"] > found["rounds"]
    assert found["train_flops"] > cost["averaged"]["train_flops"] / 2 > 0
    assert cost["twice"]["rounds"] == 2 * found["rounds"] == 2 * cost["output_head"]["rounds"]
    alone = cost["twice"]["train_flops"] / 2
    assert cost["tuned"]["train_flops"] == pytest.approx(len(controls.GRID) * alone, rel=0.1)  # each as long as one


@pytest.mark.slow
def test_the_flops_of_a_control_are_counted_in_ten_of_its_rounds_or_more(tmp_path, monkeypatch):
    counts = []

    class Counted(controls.FlopCount):
        def __init__(self, every):
            super().__init__(every)
            self.rounds = self.counted = 0
            counts.append(self)

        def on_train_batch_end(self, *given):
            self.rounds, self.counted = self.rounds + 1, self.counted + (self._counter is not None)
            super().on_train_batch_end(*given)

    monkeypatch.setattr(controls, "FlopCount", Counted)
    composed.train(tmp_path / "run", *SMALL, "control=[equal_flops]")
    trial, control = counts
    assert trial.counted == trial.rounds
    assert min(10, control.rounds) <= control.counted < 20


@pytest.mark.slow
def test_while_the_rounds_of_a_control_are_timed_nothing_is_counted(tmp_path, monkeypatch):
    timed, fit = [], controls.make_trainer

    def noted(cfg, callbacks, log, rounds):
        timed.append((rounds, bool(callbacks)))
        return fit(cfg, callbacks, log, rounds)

    monkeypatch.setattr(controls, "make_trainer", noted)
    composed.train(tmp_path / "run", *SMALL, "control=[equal_time]")
    _, (_, trial_counts), (_, control_counts) = timed
    assert (trial_counts, control_counts) == (False, True)


@pytest.mark.slow
def test_a_short_trial_is_timed_to_less_than_a_hundredth_of_a_second(tmp_path, monkeypatch):
    seconds = 0.001234
    monkeypatch.setattr(controls, "agree_on", lambda value: seconds if isinstance(value, float) else value)
    composed.train(tmp_path / "run", *SMALL, "control=[twice]")
    assert {one["train_seconds"] for one in composed.results(tmp_path / "run")["controls"]} == {seconds}


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_during_a_control_says_so_and_goes_on(tmp_path, monkeypatch, capsys):
    class Stopped(controls.FlopCount):
        def on_train_batch_start(self, *_):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(controls, "FlopCount", Stopped)
        with pytest.raises(SystemExit) as end:
            composed.train(tmp_path / "run", *SMALL, "control=[twice]")
    assert end.value.code == STOPPED
    assert f"go on with: python train.py resume={tmp_path}/run" in capsys.readouterr().err
    assert composed.results(composed.resume(tmp_path / "run"))["controls"]


@pytest.mark.parametrize(("processes", "last"), [(1, (12, 2, 4)), (8, (6, 2, 8))])  # batches divide among them
def test_the_tuned_pilot_is_the_best_of_its_grid_on_validation(processes, last, monkeypatch):
    trained, judged = [], iter([0.4, 0.2, 0.3, 0.9, 0.5])

    def train(joint, rounds, rate, batch_size):
        trained.append((rounds, rate, batch_size))
        return controls.Trained(SimpleNamespace(rate=rate), rounds, 2.0, 10.0)

    monkeypatch.setattr(controls, "train_pilot", train)
    monkeypatch.setattr(controls, "world_size", lambda: processes)
    monkeypatch.setattr(controls, "Evaluator", lambda *given: SimpleNamespace(likelihood=lambda split: next(judged)))
    cfg = OmegaConf.create({"pilot": {"frozen": False}, "data": {"batch_size": 8}})
    joint = SimpleNamespace(cfg=cfg, results=SimpleNamespace(rounds=6), prepared=SimpleNamespace(tokenizer=0, data=0))
    best = controls.tuned(joint)
    assert trained == [(6, 0.5, 8), (6, 1, 8), (6, 2, 8), (6, 4, 8), last]
    assert (best.model.rate, best.train_seconds, best.train_flops) == (1, 10.0, 50.0)


def tuned_with(monkeypatch, train, judged):
    judged = iter(judged)
    monkeypatch.setattr(controls, "train_pilot", train)
    monkeypatch.setattr(controls, "Evaluator", lambda *given: SimpleNamespace(likelihood=lambda split: next(judged)))
    cfg = OmegaConf.create({"pilot": {"frozen": False}, "data": {"batch_size": 8}})
    prepared = SimpleNamespace(tokenizer=0, data=0)
    return controls.tuned(SimpleNamespace(cfg=cfg, results=SimpleNamespace(rounds=6), prepared=prepared))


def test_while_pilots_are_tuned_no_more_than_the_best_is_kept(monkeypatch):
    models = []

    def train(joint, rounds, rate, batch_size):
        gc.collect()
        assert sum(model() is not None for model in models) <= 1
        model = torch.nn.Identity()
        model.rate = rate
        models.append(weakref.ref(model))
        return controls.Trained(model, rounds, 2.0, 10.0)

    assert tuned_with(monkeypatch, train, [0.4, 0.2, 0.3, 0.9, 0.5]).model.rate == 1


def test_a_rate_at_which_the_pilot_diverges_is_left_out_of_its_grid(monkeypatch, caplog):
    highest = 1.5

    def train(joint, rounds, rate, batch_size):
        if rate > highest:
            raise TrainingDivergedError("round 3: pilot loss nan")
        return controls.Trained(SimpleNamespace(rate=rate), rounds, 2.0, 10.0)

    best = tuned_with(monkeypatch, train, [0.2, 0.4])
    assert (best.model.rate, best.train_seconds, best.train_flops) == (0.5, 4.0, 20.0)
    assert "lr x 4, batches of 8 is left out: round 3" in caplog.text
    highest = 0.0
    with pytest.raises(TrainingDivergedError, match=r"every trial; lower pilot\.optimizer\.lr"):
        tuned_with(monkeypatch, train, [])


def test_the_output_head_is_trained_apart_from_the_embedding():
    model = tiny_model("t5").requires_grad_(False)
    pilot = model.pilot
    before = pilot.get_output_embeddings().weight.detach().clone()
    controls._free_output_head(model)
    head = pilot.get_output_embeddings().weight
    assert head.requires_grad
    assert not pilot.get_input_embeddings().weight.requires_grad
    assert torch.equal(head.detach(), before)
    assert head.data_ptr() != pilot.get_input_embeddings().weight.data_ptr()


class Rounds:
    """Data whose first rounds have short rows and later ones long rows."""

    rounds, held_out, lengths = 0, 0.1, [10, 20, *(40, 60) * 50]

    def train_dataloader(self):
        assert self.held_out == 0.0
        return [SimpleNamespace(padded_tokens=length) for length in self.lengths[: self.rounds]]


@pytest.mark.parametrize("paid", [1, 3, 30])
def test_a_trial_of_short_rows_does_not_give_a_control_more_flops_than_the_run_had(paid, monkeypatch):
    data, of_token = Rounds(), 7.0
    joint = SimpleNamespace(
        prepared=SimpleNamespace(data=data), trial_rounds=2,
        results=SimpleNamespace(train_flops=of_token * sum(data.lengths[:paid])),
    )  # fmt: skip

    def train(joint, rounds, **given):
        return controls.Trained(None, rounds, 2.0, of_token * sum(data.lengths[:rounds]))

    monkeypatch.setattr(controls, "train_pilot", train)
    rounds = controls.equal_flops(joint).rounds
    assert sum(data.lengths[:rounds]) == pytest.approx(sum(data.lengths[:paid]), rel=0.1, abs=data.lengths[paid])
    assert (data.rounds, data.held_out) == (0, 0.1)  # the run's own data are left alone


def test_the_checks_know_every_control_by_name():
    assert list(controls.TRAINED_BY) == list(CONTROLS)


@pytest.mark.slow
def test_the_second_pilot_is_another_one(controlled, tmp_path):
    folder, title = controlled, NAMES["averaged"]
    said = [c for c in composed.results(folder)["controls"] if (c["name"], c["metric"]) == (title, "nll")]
    (nll,) = [control["value"] for control in said]
    assert nll != composed.value(composed.results(folder), "test", "nll", 0.0, "all")
    again = composed.results(composed.evaluate(folder, tmp_path / "again"))
    assert again["controls"] == composed.results(folder)["controls"]  # a report of the evaluation shows them too
    rows = [f"data.benchmarks.word_problems.{split}" for split in ("train=200", "validation=20", "test=30")]
    other = composed.evaluate(folder, tmp_path / "other", "data=word_problems", *rows)
    assert composed.results(other)["controls"] == []


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["control=[equal_time,equal_rounds]"], ["equal_rounds", "null, equal_time, equal_flops"]),
        (["control=[averaged,averaged]"], ["averaged"]),
        (["control=[equal_flops]", "callbacks.flops=null"], ["callbacks.flops", "callbacks=default"]),
        (["control=tuned_for_fit"], ["control=tuned_for_fit", "pilot=frozen copilot=head"]),
        (
            ["pilot=frozen", "pilot.path=a", "copilot=lora", "control=tuned", "callbacks.flops=null"],
            ["control=tuned", "callbacks.flops", "callbacks=default"],
        ),
        (["control=equal_parameters", "pilot.path=some/model"], ["pilot.path=some/model", "equal_parameters"]),
        (["control=[averaged]", "copilot=none"], ["copilot=none", "control=null"]),
        (["copilot.reads=[]"], ["copilot.reads=[]", "errors, source, states"]),
        (["copilot.reads=[prompt]"], ["copilot.reads", "errors, source, states"]),
        (["copilot.dropout=1"], ["copilot.dropout=1", "[0, 1)"]),
    ],
)
def test_controls_and_ablations_that_cannot_work_are_refused(overrides, says):
    problems = "\n".join(config_problems(composed.compose_config(*overrides)))
    assert all(text in problems for text in says), problems


def test_controls_that_could_not_train_a_frozen_pilot_are_refused_before_its_weights_load():
    frozen = ["pilot=frozen", "pilot.path=a", "copilot=head", "paths.run_dir=x", "pilot.optimizer.betas=0.9"]
    gpt2 = ModelSource(config={"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 20})
    for control, refused in (("calibrated", []), ("tuned_for_fit", ["control=tuned_for_fit: ", "pilot.optimizer "])):
        cfg = composed.compose_config(*frozen, f"control={control}")
        problems = [*model_problems(cfg, gpt2, None), *trial_problems(cfg)]
        assert len(problems) == len(refused)
        assert all(text.startswith(start) for text, start in zip(problems, refused, strict=True))


@pytest.mark.slow
def test_dropout_of_the_copilot_is_the_copilots_alone(tmp_path):
    folder = composed.train(tmp_path / "run", *SMALL, "copilot.dropout=0.25")
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["copilot"]["body"]["dropout_rate"] == 0.25
    assert config["pilot"]["dropout_rate"] == 0.0
