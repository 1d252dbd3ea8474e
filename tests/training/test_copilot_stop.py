"""The Copilot's early stopping: when, exactly over resumes, and which Copilot is kept for the final Pilot."""

import csv
from itertools import pairwise

import composed
import pytest
from resumable_run import ROUNDS, Crash, Run, assert_equal, crash_after
from small_training import EachRound, same, weights

from tcopilot.training.callbacks import CopilotStop, copilot_stop
from tcopilot.training.checkpoints import checkpoints

VALIDATES = {"limit_val_batches": 1, "val_check_interval": 2}


@pytest.fixture
def told(monkeypatch):
    """Tells the callback its ratios: at each validation, and at the end those of the last and of the best Copilot."""

    def tell(ratios, end=(0.5, 0.9)):
        at_round = dict(zip(range(2, ROUNDS + 1, 2), ratios, strict=True))
        monkeypatch.setattr(copilot_stop, "_reported", lambda trainer: at_round[trainer.lightning_module.round])
        measured = iter(end)
        monkeypatch.setattr(copilot_stop, "_ratio", lambda trainer, module: next(measured))

    return tell


def run(folder, patience, callbacks=(), **options):
    """A run of ten rounds with a validation after every second one."""
    return Run("t5", folder, callbacks=[CopilotStop(patience), *callbacks], trainer=VALIDATES, **options)


def changes(states):
    """Whether the weights changed from each round to the next."""
    return [not same(before, after) for before, after in pairwise(states)]


@pytest.mark.slow
def test_the_copilot_stops_and_the_pilot_goes_on(tmp_path, told):
    told((0.9, 0.8, 0.81, 0.82, 0.83))
    pilots, copilots = [], []

    def note(trainer, module):
        pilots.append(weights(module.model.pilot))
        copilots.append(weights(module.model.copilot))

    one = run(tmp_path, 2, [EachRound(note)]).fit()
    assert all(changes(pilots))
    assert changes(copilots) == [True] * 7 + [False] * 2  # validations after 6 and 8 found nothing better
    assert one.log.seen_rounds == 8


@pytest.mark.slow
@pytest.mark.parametrize(("end", "kept"), [((0.9, 0.5), 4), ((0.5, 0.9), ROUNDS)])
def test_the_better_one_with_the_final_pilot_is_kept(tmp_path, told, end, kept):
    told((0.9, 0.7, 0.8, 0.8, 0.8), end)
    copilots = []
    one = run(tmp_path, 9, [EachRound(lambda trainer, module: copilots.append(weights(module.model.copilot)))]).fit()
    assert_equal(weights(one.model.copilot), copilots[kept - 1])


def test_both_are_judged_where_the_run_was_trained(tmp_path, told, monkeypatch):
    told((0.9, 0.7, 0.8, 0.8, 0.8))
    judge, one, moves = copilot_stop._ratio, run(tmp_path, 9), []
    monkeypatch.setattr(one.module, "to", moves.append)
    monkeypatch.setattr(one.module, "cpu", lambda: moves.append("left on the CPU"))
    monkeypatch.setattr(copilot_stop, "_ratio", lambda *given: (moves.append("judged"), judge(*given))[1])
    one.fit()
    device = one.trainer.strategy.root_device
    assert moves == [device, "left on the CPU", device, "judged", "judged"]


@pytest.mark.slow
@pytest.mark.parametrize("saved_after", [6, *(pytest.param(after, marks=pytest.mark.slow) for after in (4, 8))])
def test_a_resumed_run_stops_where_the_whole_one_does(tmp_path, told, saved_after):
    ratios = (0.9, 0.8, 0.85, 0.86, 0.87)
    told(ratios, (0.9, 0.5))
    whole = run(tmp_path / "whole", 2).fit()
    told(ratios, (0.9, 0.5))
    with pytest.raises(Crash):
        run(tmp_path / "broken", 2, [crash_after(saved_after + 1)], every=saved_after).fit()
    resumed = run(tmp_path / "broken", 2, seed=7).fit(checkpoints(tmp_path / "broken")[-1])
    assert resumed.module.copilot_stopped
    assert_equal(weights(whole.model), weights(resumed.model))
    assert_equal(whole.log.state_dict(), resumed.log.state_dict())


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_keeps_the_same_copilot(tmp_path, told):
    ratios = (0.9, 0.7, 0.8, 0.8, 0.8)
    told(ratios, (0.9, 0.5))
    one = run(tmp_path, 1).fit()
    told(ratios, (0.9, 0.5))
    again = run(tmp_path, 1, seed=7).fit(checkpoints(tmp_path)[-1])
    assert_equal(weights(one.model), weights(again.model))


def test_a_finished_run_is_judged_again_when_it_is_resumed(tmp_path):
    one = run(tmp_path, 9).fit()
    again = run(tmp_path, 9, seed=7).fit(checkpoints(tmp_path)[-1])
    assert_equal(weights(one.model), weights(again.model))


@pytest.mark.slow
def test_it_measures_what_validation_reports(tmp_path):
    measured = []
    ratio = copilot_stop._ratio

    class Measured(CopilotStop):
        def on_validation_end(self, trainer, pl_module):
            measured.append((ratio(trainer, pl_module), float(trainer.callback_metrics["val/error_ratio"])))

    Run("t5", tmp_path, callbacks=[Measured()], trainer=VALIDATES).fit()
    assert len(measured) == ROUNDS // 2
    for own, reported in measured:
        assert own == pytest.approx(reported, rel=1e-5)


@pytest.mark.slow
def test_in_a_whole_run(tmp_path):
    given = [
        *composed.SMALL,
        "callbacks=[default,copilot_stop]",
        "callbacks.copilot_stop.patience=1",
        "fusion.weight=[0,1]",
    ]
    found = composed.results(composed.train(tmp_path / "run", *given))
    assert found["rounds"] == 4


def test_no_patience_is_refused():
    with pytest.raises(ValueError, match="patience=0"):
        CopilotStop(patience=0)


@pytest.mark.slow
def test_two_processes_stop_their_copilot_together_and_train_on(tmp_path):
    given = [*composed.SMALL, "trainer=two_ranks", "trainer.val_check_interval=1", "callbacks=[default,copilot_stop]"]
    given += ["callbacks.copilot_stop.patience=1", "copilot.optimizer.lr=1e-30", "rounds=5", "data.held_out=0.2"]
    with composed.without_estimate():
        done = composed.forked("train.py", *given, "fusion.weight=[0,1]", f"paths.run_dir={tmp_path}", spare=True)
    assert done.returncode == 0, done.stderr
    assert composed.results(tmp_path)["rounds"] == 5
    with (tmp_path / "metrics.csv").open(newline="") as file:
        losses = {line["train/copilot_loss"] for line in csv.DictReader(file)} - {""}
    assert len(losses) == 2  # the ratio stays 1, so the second validation stops it; later lines repeat the value
