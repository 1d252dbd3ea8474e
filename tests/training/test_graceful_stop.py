"""A run told to stop finishes its round, saves its state, and gives the signals back."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import LambdaCallback
from resumable_run import VALIDATED, Crash, Run, assert_same_end, crash_after, finished, names
from small_training import FAMILIES, EachRound

from tcopilot.processes import STOP_SIGNALS
from tcopilot.training.checkpoints import SafeCheckpointIO, checkpoints
from tcopilot.training.module import TrainingDivergedError


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
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "number"),
    [
        pytest.param(family, number, marks=[] if (family, number.name) in PRESSED else pytest.mark.slow)
        for family in FAMILIES
        for number in STOP_SIGNALS
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
@pytest.mark.parametrize("stopped_in", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_stopped_where_validation_is_due_resumes_as_if_never_stopped(stopped_in, tmp_path, handlers):
    validated = []
    after = LambdaCallback(on_validation_end=lambda trainer, module: validated.append(module.round))
    Run("t5", tmp_path, callbacks=[Signal(stopped_in), after], **VALIDATED).fit()
    assert validated == [4]  # none because of the stop
    resumed = Run("t5", tmp_path, seed=99, **VALIDATED).fit(checkpoints(tmp_path)[-1])
    assert_same_end(finished("t5", **VALIDATED), resumed, stopped_in + 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
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
