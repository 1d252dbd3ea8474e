"""The log's reports while training, and the alarms that follow from them."""

import csv
import warnings

import composed
import pytest
from lightning.pytorch.loggers import CSVLogger
from resumable_run import Run
from small_training import (
    EachRound,
    learner,
    random_batch,
    small_module,
    task_data,
    tiny_model,
    train_on,
    trainer_for,
    vocabulary_size,
)

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.storage import TopKStorage
from tcopilot.training.callbacks import CopilotAlarms
from tcopilot.training.callbacks import alarms as alarms_module

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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_log_of_rows_that_the_pilot_has_memorised_rings_once():
    found = alarms(rounds=64, rows=16, pilot=learner(lr=2e-2), capacity=4)
    assert found["in-sample"] == 1
    assert "stale" not in found


@pytest.mark.slow
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
