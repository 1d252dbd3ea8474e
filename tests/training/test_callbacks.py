"""Checkpoints and resuming, a clean stop, the log's reports, and the alarms."""

import csv
import multiprocessing
import os
import random
import signal
import time
import warnings
from functools import partial

import composed
import numpy as np
import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
from lightning.pytorch.loggers import CSVLogger
from resumable_run import ROUNDS, Crash, Run, assert_equal, assert_same_end, crash_after, finished
from small_training import (
    FAMILIES,
    EachRound,
    learner,
    random_batch,
    small_module,
    task_data,
    tiny_model,
    tiny_pilot,
    train_on,
    trainer_for,
    vocabulary_size,
    weights,
)
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, get_scheduler

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.policies import Prioritised, Reservoir
from tcopilot.mistake_log.storage import TopKStorage
from tcopilot.models.adapters import Lora
from tcopilot.training import checkpoints as checkpoints_module
from tcopilot.training.callbacks import CopilotAlarms, RngState, Throughput, graceful_stop
from tcopilot.training.callbacks import alarms as alarms_module
from tcopilot.training.checkpoints import SafeCheckpointIO, checkpoints, newest_good
from tcopilot.training.module import TrainingDivergedError

# Resuming ----------------------------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "saved_after"),  # 5 is in the middle of a pass, 8 at its end
    [("t5", 5), ("llama", 8), pytest.param("t5", 8, marks=SLOW), pytest.param("llama", 5, marks=SLOW)],
)
def test_a_crashed_run_resumes_from_its_checkpoint_to_the_bit(family, saved_after, tmp_path):
    whole = finished(family)
    with pytest.raises(Crash):
        Run(family, tmp_path / "cut", every=saved_after, callbacks=[crash_after(saved_after + 1)]).fit()
    resumed = Run(family, tmp_path / "cut", seed=99).fit(tmp_path / "cut" / f"round={saved_after}")
    assert_same_end(whole, resumed, saved_after)


@pytest.mark.parametrize(
    "options",
    [
        {"own_feedback": 0.5, "micro_batch_size": 3},
        *(pytest.param(one, marks=SLOW) for one in ({"own_feedback": 0.5}, {"micro_batch_size": 3}, {"pilot": None})),
    ],
    ids=str,
)
def test_resuming_is_exact_with_every_kind_of_round(options, tmp_path):
    whole = Run("t5", tmp_path / "whole", every=4, keep=9, **options).fit()
    resumed = Run("t5", tmp_path / "more", seed=99, **options).fit(tmp_path / "whole" / "round=4")
    assert_same_end(whole, resumed, 4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Prioritised, pytest.param(Reservoir, marks=SLOW)])
def test_resuming_is_exact_with_a_truncated_log_under_every_policy(policy, tmp_path):
    def log():
        return MistakeLog(capacity_rounds=3, policy=policy(), storage=TopKStorage(4), dtype="bfloat16")

    whole = Run("llama", tmp_path / "whole", every=6, log=log()).fit()
    resumed = Run("llama", tmp_path / "more", seed=99, log=log()).fit(tmp_path / "whole" / "round=6")
    assert_same_end(whole, resumed, 6)


VALIDATED = {"trainer": {"limit_val_batches": 1, "val_check_interval": 4}}


@pytest.mark.slow
@pytest.mark.parametrize("saved_after", [pytest.param(3, marks=SLOW), 4])
def test_validation_between_rounds_does_not_change_what_a_resumed_run_does(saved_after, tmp_path):
    whole = finished("t5", **VALIDATED)
    resumed = Run("t5", tmp_path, seed=99, **VALIDATED).fit(whole.folder / f"round={saved_after}")
    assert_same_end(whole, resumed, saved_after)


def test_validation_does_not_change_training():
    plain, validated = finished("t5"), finished("t5", **VALIDATED)
    assert plain.losses.pilot == validated.losses.pilot
    assert plain.losses.copilot == validated.losses.copilot


def test_a_callback_of_the_users_keeps_what_it_learnt_from_the_validation_of_the_last_round_saved(tmp_path):
    def until_four_validations_bring_nothing():
        waits = {"patience": 4, "min_delta": 10.0, "check_on_train_epoch_end": False}
        return [EarlyStopping("val/pilot_nll", **waits)]

    options = {"trainer": {"limit_val_batches": 1, "val_check_interval": 1}}
    cut = tmp_path / "cut"
    whole = Run("llama", cut, every=3, callbacks=until_four_validations_bring_nothing(), **options).fit()
    resumed = Run("llama", cut, seed=99, callbacks=until_four_validations_bring_nothing(), **options)
    assert resumed.fit(cut / "round=3").module.round == whole.module.round == 5


@pytest.mark.slow
def test_a_run_can_be_resumed_more_than_once(tmp_path):
    whole = finished("llama")
    with pytest.raises(Crash):
        Run("llama", tmp_path / "cut", every=3, callbacks=[crash_after(5)]).fit()
    with pytest.raises(Crash):
        Run("llama", tmp_path / "cut", seed=7, every=3, callbacks=[crash_after(8)]).fit(tmp_path / "cut/round=3")
    resumed = Run("llama", tmp_path / "cut", seed=8).fit(tmp_path / "cut/round=6")
    assert_same_end(whole, resumed, 6)


def test_without_the_random_state_a_resumed_run_with_dropout_would_differ(tmp_path):
    whole = finished("t5")
    resumed = Run("t5", tmp_path, seed=99)
    resumed.trainer.callbacks[:] = [c for c in resumed.trainer.callbacks if not isinstance(c, RngState)]
    resumed.fit(whole.folder / "round=5")
    assert resumed.losses.pilot != whole.losses.pilot[5:]


@pytest.mark.slow
def test_all_three_random_states_go_on_where_they_were(tmp_path):
    def draw(into):
        return EachRound(lambda *args: into.append((random.random(), np.random.rand(), np.random.randn())))

    straight, again = [], []
    Run("llama", tmp_path / "whole", every=5, callbacks=[draw(straight)]).fit()
    Run("llama", tmp_path / "more", seed=99, callbacks=[draw(again)]).fit(tmp_path / "whole" / "round=5")
    assert len(again) == 5
    assert again == straight[5:]


def test_seconds_go_on_counting_after_a_resume(tmp_path):
    whole = finished("llama")
    saved = SafeCheckpointIO().load_checkpoint(whole.folder / "round=5")["seconds"]
    resumed = Run("llama", tmp_path).fit(whole.folder / "round=5")
    for name in ("pilot", "copilot"):
        assert 0 < saved[name] < resumed.module.seconds[name]
        assert saved[name] < whole.module.seconds[name]


def test_a_run_goes_on_at_the_rates_of_its_new_config(tmp_path):
    whole = finished("llama")
    rates = []
    note = EachRound(lambda trainer, module: rates.append([o.param_groups[0]["lr"] for o in trainer.optimizers]))
    schedule = partial(get_scheduler, name="constant")
    slow = {"pilot": learner(1e-5, schedule=schedule), "copilot": learner(2e-5, schedule=schedule)}
    Run("llama", tmp_path, callbacks=[note], **slow).fit(whole.folder / "round=5")
    assert rates == [[1e-5, 2e-5]] * 5


@pytest.mark.slow
def test_a_run_that_logs_no_lines_trains(tmp_path):
    run = Run("llama", tmp_path, callbacks=[Throughput()], trainer={"log_every_n_steps": 0}).fit()
    assert run.module.round == ROUNDS


# Checkpoint files ----------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_checkpoints_are_named_by_round_and_only_the_newest_stay(tmp_path):
    Run("llama", tmp_path / "two", every=3, keep=2).idle().fit()
    assert names(tmp_path / "two") == ["round=10", "round=9"]
    assert [path.name for path in checkpoints(tmp_path / "two")] == ["round=9", "round=10"]
    Run("llama", tmp_path / "one", every=1, keep=1).idle().fit()
    assert names(tmp_path / "one") == ["round=10"]
    Run("llama", tmp_path / "all", every=4, keep=99).idle().fit()
    assert names(tmp_path / "all") == ["round=10", "round=4", "round=8"]
    Run("llama", tmp_path / "end", every=None).idle().fit()
    assert names(tmp_path / "end") == ["round=10"]


def test_a_finished_run_that_is_resumed_trains_no_further(tmp_path):
    whole = finished("llama")
    resumed = Run("llama", tmp_path, seed=99).fit(whole.folder / "round=10")
    assert resumed.losses.pilot == []
    assert_equal(weights(whole.model), weights(resumed.model))


@pytest.mark.slow
def test_a_crash_while_saving_leaves_the_checkpoint_before_it_intact(tmp_path, monkeypatch):
    sealed = checkpoints_module._sealed

    def cut_off(body):
        if body["round"] == 6:
            raise Crash
        return sealed(body)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints_module, "_sealed", cut_off)
        with pytest.raises(Crash):
            Run("llama", tmp_path / "cut", every=3).fit()
    assert names(tmp_path / "cut") == [".round=6.tmp", "round=3"]
    resumed = Run("llama", tmp_path / "cut", seed=99, every=3).fit(newest_good(tmp_path / "cut", 1))
    assert names(tmp_path / "cut") == ["round=10", "round=9"]
    assert_same_end(finished("llama"), resumed, 3)


@pytest.mark.slow
def test_a_checkpoint_loads_as_tensors_and_plain_values_only(tmp_path):
    run = Run("t5", tmp_path, own_feedback=0.5, log=MistakeLog(storage=TopKStorage(3))).fit()
    state = SafeCheckpointIO().load_checkpoint(tmp_path / "round=10")
    assert state["state_dict"].keys() == run.module.state_dict().keys()
    assert {name.split("{")[0] for name in state["callbacks"]} == {"MistakeLogCallback", "RngState"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("llama", "lora"),
        pytest.param("llama", "frozen", marks=SLOW),
        pytest.param("t5", "lora", marks=SLOW),
        pytest.param("t5", "frozen", marks=SLOW),
    ],
)
def test_frozen_pretrained_weights_are_left_out_of_the_file_and_found_again(family, how, tmp_path):
    vocab = vocabulary_size(task_data(family, 1))
    tiny_pilot(family, vocab=vocab).save_pretrained(tmp_path / "hub")
    targets = ("q", "v") if family == "t5" else ("q_proj", "v_proj")

    def model(seed):
        auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
        pilot = auto.from_pretrained(tmp_path / "hub", dtype=torch.float32)
        torch.manual_seed(seed)
        fused = tiny_model(family, pilot=pilot)
        if how == "lora":
            Lora(r=2, targets=targets)(pilot)
        return fused

    options = {"pilot": None} if how == "frozen" else {}
    whole = Run(family, tmp_path / "whole", every=5, model=model(0), **options).fit()
    saved = SafeCheckpointIO().load_checkpoint(tmp_path / "whole" / "round=5")["state_dict"]
    pilot = [name for name in saved if name.startswith("model.pilot.")]
    assert all("lora_" in name for name in pilot)
    assert bool(pilot) == (how == "lora")
    trainable = {f"model.{name}" for name, p in whole.model.named_parameters() if p.requires_grad}
    assert trainable <= saved.keys()
    resumed = Run(family, tmp_path / "more", seed=99, model=model(99), **options)
    resumed.fit(tmp_path / "whole" / "round=5")
    assert_same_end(whole, resumed, 5)


@pytest.mark.slow
def test_frozen_weights_that_were_never_pretrained_stay_in_the_file(tmp_path):
    whole = Run("llama", tmp_path, every=5, pilot=None).fit()
    saved = SafeCheckpointIO().load_checkpoint(tmp_path / "round=5")["state_dict"]
    assert whole.module.state_dict().keys() == saved.keys()


# Clean stop ----------------------------------------------------------------------------------------------------------


class Signal(Callback):
    """Sends a signal to this process in the middle of a round, as somebody who presses Ctrl-C does."""

    def __init__(self, after: int, number: int = signal.SIGINT, times: int = 1) -> None:
        self.after, self.number, self.times = after, number, times

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if pl_module.round == self.after and optimizer is trainer.optimizers[0]:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


PRESSED = {("t5", "SIGTERM"), ("llama", "SIGINT")}  # in the fast suite


@pytest.fixture
def handlers():
    """The signal handlers before the test; put back after it, whatever the test does."""
    before = {number: signal.getsignal(number) for number in graceful_stop.SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "number"),
    [
        pytest.param(family, number, marks=[] if (family, number.name) in PRESSED else SLOW)
        for family in FAMILIES
        for number in graceful_stop.SIGNALS
    ],
)
def test_a_stopped_run_finishes_its_round_saves_and_resumes_as_if_never_stopped(family, number, tmp_path, handlers):
    stopped = Run(family, tmp_path / "cut", callbacks=[Signal(3, number)]).fit()
    assert stopped.module.round == len(stopped.losses.pilot) == 4
    assert names(tmp_path / "cut") == ["round=4"]
    assert {number: signal.getsignal(number) for number in handlers} == handlers

    whole = finished(family)
    assert stopped.losses.pilot == whole.losses.pilot[:4]
    resumed = Run(family, tmp_path / "cut", seed=99).fit(tmp_path / "cut" / "round=4")
    assert_same_end(whole, resumed, 4)


@pytest.mark.slow
@pytest.mark.parametrize("stopped_in", [3, pytest.param(4, marks=SLOW)])
def test_a_run_stopped_where_validation_is_due_resumes_as_if_never_stopped(stopped_in, tmp_path, handlers):
    validated = []
    after = LambdaCallback(on_validation_end=lambda trainer, module: validated.append(module.round))
    Run("t5", tmp_path, callbacks=[Signal(stopped_in), after], **VALIDATED).fit()
    assert validated == [4]  # none because of the stop
    resumed = Run("t5", tmp_path, seed=99, **VALIDATED).fit(checkpoints(tmp_path)[-1])
    assert_same_end(finished("t5", **VALIDATED), resumed, stopped_in + 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", graceful_stop.SIGNALS)
def test_a_signal_to_all_processes_of_a_run_does_not_end_those_that_load_data(number, tmp_path):
    def send(trainer, module):
        if module.round == 3:
            (loader,) = multiprocessing.active_children()
            os.kill(loader.pid, number)
            time.sleep(0.2)

    run = Run("llama", tmp_path, callbacks=[EachRound(send)])
    run.data.num_workers = 1
    assert run.fit().losses.pilot == finished("llama").losses.pilot


@pytest.mark.slow
def test_a_resumed_run_can_be_stopped_again(tmp_path, handlers):
    Run("llama", tmp_path, callbacks=[Signal(2)]).fit()
    Run("llama", tmp_path, seed=5, callbacks=[Signal(6)]).fit(tmp_path / "round=3")
    assert names(tmp_path) == ["round=3", "round=7"]
    resumed = Run("llama", tmp_path, seed=6).fit(tmp_path / "round=7")
    assert_same_end(finished("llama"), resumed, 7)


def test_a_second_interrupt_stops_at_once(tmp_path, handlers):
    run = Run("llama", tmp_path, callbacks=[Signal(3, times=2)])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run.fit()
    assert len(run.losses.pilot) == 3


def test_once_training_has_ended_ctrl_c_is_an_ordinary_ctrl_c_again(tmp_path, handlers):
    class AfterTraining(Callback):
        handler = None

        def on_train_end(self, trainer, pl_module):  # before Lightning puts all handlers back
            self.handler = signal.getsignal(signal.SIGINT)

    after = AfterTraining()
    Run("llama", tmp_path, callbacks=[after]).idle().fit()
    assert after.handler is handlers[signal.SIGINT]


def test_a_run_that_fails_gives_the_signals_back(tmp_path, handlers):
    with pytest.raises(Crash):
        Run("llama", tmp_path, callbacks=[crash_after(3)]).fit()
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@pytest.mark.slow
def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path, handlers):
    def poison(trainer, module):
        if module.round == 6:
            with torch.no_grad():
                next(module.model.pilot.parameters())[:] = float("inf")

    with pytest.raises(TrainingDivergedError, match="round 8"):
        Run("llama", tmp_path, every=3, callbacks=[EachRound(poison)]).fit()
    state = SafeCheckpointIO().load_checkpoint(checkpoints(tmp_path)[-1])["state_dict"]
    assert checkpoints(tmp_path)[-1].name == "round=6"
    assert all(tensor.isfinite().all() for tensor in state.values())


# Reports of the log --------------------------------------------------------------------------------------------------


def test_the_logs_statistics_are_reported_while_training():
    log = MistakeLog(capacity_rounds=3, storage=TopKStorage(4))
    seen = []

    def read(trainer, module):
        reported = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("log/")}
        seen.append((reported, {f"log/{name}": value for name, value in log.statistics().items()}))

    train_on(
        small_module(tiny_model("llama"), 5), [random_batch("llama", seed=s) for s in range(5)], log, [EachRound(read)]
    )
    assert len(seen) == 5
    for reported, expected in seen:
        assert reported == pytest.approx(expected, rel=1e-6)
        assert "log/truncation_error" in reported


@pytest.mark.slow
def test_each_validation_writes_the_logs_energy_beside_its_own(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    options = {"limit_val_batches": 1, "val_check_interval": 5, "logger": logger, "log_every_n_steps": 1}
    run = Run("llama", tmp_path / "files", trainer=options).fit()
    logger.finalize("success")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    ratios = [float(row["log/energy_ratio_to_validation"]) for row in rows if row["log/energy_ratio_to_validation"]]
    held_out = [float(row["val/error_energy"]) for row in rows if row["val/error_energy"]]
    assert len(ratios) == len(held_out) == 2
    assert ratios[-1] == pytest.approx(run.log.statistics()["error_energy"] / held_out[-1], rel=1e-4)


# Alarms --------------------------------------------------------------------------------------------------------------

ALARMS = {
    "collapsed": "outputs about 0",
    "harmful": "error ratio on validation is above 1",
    "in-sample": "far below validation's",
    "stale": "rounds old on average",
    "outgrown": "passes past the records",
    "no gain": "is not below the Pilot's",
}


QUICK = {"copilot_batch_size": 8, "steps_per_round": 1}  # where the Copilot need not learn anything


def alarms(rounds=24, rows=400, capacity=16, head_std=0.0, **options):
    """Which alarms a run rings, as often as it rings them, and the round of the first."""
    data = task_data("llama", rounds, batch_size=16, rows=rows)
    model = tiny_model("llama", vocab=vocabulary_size(data), width=32, head_std=head_std)
    module = small_module(model, rounds, **{"copilot_batch_size": 64, "steps_per_round": 2, **options})
    trainer = trainer_for(
        [CopilotAlarms()], MistakeLog(capacity_rounds=capacity), limit_val_batches=2, val_check_interval=rounds // 8
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=data)
    texts = [str(warning.message) for warning in caught]
    counts = {cause: sum(mark in text for text in texts) for cause, mark in ALARMS.items()}
    return {cause: count for cause, count in counts.items() if count}


@SLOW
def test_a_healthy_run_rings_no_alarm():
    assert alarms(rounds=40, rows=2000, pilot=None, copilot=learner(lr=1e-2)) == {}


@pytest.mark.slow
def test_a_copilot_that_stays_at_zero_rings_once():
    assert alarms(rounds=8, pilot=None, copilot=learner(lr=0.0), **QUICK) == {"collapsed": 1}


@pytest.mark.slow
def test_a_copilot_whose_corrections_hurt_rings_once():
    assert alarms(rounds=8, pilot=None, copilot=learner(lr=0.0), head_std=1.0, **QUICK) == {"harmful": 1}


@pytest.mark.slow
def test_a_copilot_that_gains_no_likelihood_in_the_end_rings_once(monkeypatch):
    settings = {"rounds": 8, "pilot": None, "copilot": learner(lr=0.0), "head_std": 1.0, **QUICK}
    assert alarms(**settings) == {"harmful": 1}  # which says so already
    monkeypatch.setattr(alarms_module, "NO_GAIN", set())
    assert alarms(**settings) == {"harmful": 1, "no gain": 1}


@pytest.mark.slow
def test_a_log_that_the_pilot_has_trained_a_pass_past_rings_once():
    settings = {"rounds": 8, "rows": 32, "capacity": 8, "copilot": learner(lr=1e-2), **QUICK}  # a pass is 2 rounds
    assert alarms(**settings, pilot=learner(lr=1e-4))["outgrown"] == 1
    assert "outgrown" not in alarms(**settings, pilot=None)  # a frozen one stays what it was
    assert "outgrown" not in alarms(**settings | {"rows": 400}, pilot=learner(lr=1e-4))


@pytest.mark.slow
def test_how_far_the_pilot_is_past_its_records_is_logged_where_it_learns(tmp_path):
    small = [*composed.SMALL, "rounds=8", "data.benchmarks.word_problems.train=16", "data.batch_size=4"]  # 4 a pass
    small += ["fusion.weight=0", "mistake_log.every_n_rounds=8", "trainer.log_every_n_steps=8"]
    path = composed.train(tmp_path, *small) / "metrics.csv"
    with path.open() as file:
        (line,) = [line for line in csv.DictReader(file) if line.get("log/age_rounds")]
    assert float(line["log/passes_behind"]) == pytest.approx(float(line["log/age_rounds"]) / 4)


@SLOW
def test_a_log_of_rows_that_the_pilot_has_memorised_rings_once():
    found = alarms(rounds=64, rows=16, pilot=learner(lr=2e-2), capacity=4)
    assert found["in-sample"] == 1
    assert "stale" not in found


@SLOW
def test_a_log_of_old_rounds_rings_once(monkeypatch):
    monkeypatch.setattr(alarms_module, "STALE_ROUNDS", 4)
    settings = {"rounds": 24, "rows": 400, "pilot": None, "copilot": learner(lr=1e-2)}
    assert alarms(**settings, capacity=24) == {"stale": 1}
    assert alarms(**settings, capacity=5) == {}


@pytest.mark.slow
def test_nothing_rings_in_the_first_half_of_a_run():
    data = task_data("llama", 16)
    module = small_module(tiny_model("llama", vocab=vocabulary_size(data)), 16, copilot=learner(lr=0.0))
    alarm, when = CopilotAlarms(), []
    watch = EachRound(lambda trainer, module: when.append(set(alarm.raised)))
    options = {"limit_val_batches": 1, "val_check_interval": 2}
    with pytest.warns(UserWarning, match="outputs about 0"):
        trainer_for([alarm, watch], MistakeLog(), **options).fit(module, datamodule=data)
    assert when[:8] == [set()] * 8
    assert when[-1] == {"collapsed"}


def test_a_bare_pilot_rings_no_alarm():
    data = task_data("llama", 4)
    module = small_module(tiny_model("llama", copilot=False, vocab=vocabulary_size(data)), 4, copilot=None)
    alarm = CopilotAlarms()
    trainer_for([alarm], limit_val_batches=1, val_check_interval=1).fit(module, datamodule=data)
    assert alarm.raised == set()
