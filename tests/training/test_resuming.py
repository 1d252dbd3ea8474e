"""A resumed run is the uninterrupted one, and a checkpoint holds what it needs for that."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from resumable_run import ROUNDS, VALIDATED, Crash, Run, assert_equal, assert_same_end, crash_after, finished, names
from small_training import EachRound, learner, task_data, tiny_model, tiny_pilot, vocabulary_size, weights
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, get_scheduler

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.policies import Prioritised, Reservoir
from tcopilot.mistake_log.storage import TopKStorage
from tcopilot.models.adapters import Lora
from tcopilot.training import checkpoints as checkpoints_module
from tcopilot.training.callbacks import RngState, Throughput
from tcopilot.training.checkpoints import SafeCheckpointIO, checkpoints, newest_good

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
