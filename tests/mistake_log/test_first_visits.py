"""Which errors the log records: first visits only, or rows that the Pilot never trains on."""

from dataclasses import replace

import composed
import pytest
import torch
from processes import run_in_processes
from small_training import (
    FAMILIES,
    InOrder,
    random_batch,
    same,
    small_module,
    task_data,
    tiny_model,
    tiny_pilot,
    train_on,
    weights,
)

from tcopilot.app.checks.config import config_problems
from tcopilot.data import DataError, GeneratedTask, TCopilotDataModule
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.policies import Reservoir
from tcopilot.mistake_log.rounds import SeenRows
from tcopilot.mistake_log.storage import FrozenHeadStorage
from tcopilot.models.states import StatePooler, trace_pilot
from tcopilot.processes import rank


def held(log: MistakeLog) -> list[int]:
    """The rounds in which the records were logged, one for each."""
    return [logged.round for logged in log.rounds for _ in range(len(logged))]


def append_all(log, batches, micro_batch_size=None):
    """One round per batch."""
    model = tiny_model("t5")
    for batch in batches:
        for i, part in enumerate(batch.split(micro_batch_size or len(batch))):
            log.append(trace_pilot(model.pilot, part, StatePooler()), extend=i > 0)
    return log


# First visits -----------------------------------------------------------------------------------------------------


def test_a_round_without_first_visits_keeps_no_other_one_in_memory(tmp_path, monkeypatch):
    log, moved = MistakeLog(rows="first_visit", spill=str(tmp_path)), []
    move = log.spill.move
    monkeypatch.setattr(log.spill, "move", lambda tensors: moved.append(1) or move(tensors))
    ids = ([0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11])
    append_all(log, [replace(random_batch("t5", rows=4), ids_B=torch.tensor(some)) for some in ids])
    assert [logged.round for logged in log.rounds] == [0, 2, 3]
    assert len(moved) == 2


@pytest.mark.parametrize("micro_batch_size", [None, 1, 2])
def test_a_row_is_logged_on_its_first_visit_only_whatever_the_micro_batches(micro_batch_size):
    first, second = random_batch("t5", first_id=0), random_batch("t5", seed=1, first_id=2)  # ids 0-3 and 2-5
    log = append_all(MistakeLog(rows="first_visit"), [first, second, first, second], micro_batch_size)
    assert held(log) == [0] * 4 + [1] * 2
    assert log.seen_rounds == 4
    assert log.rounds[1].tensors["targets"][:, 0].tolist() == second.target_ids_BN[2:, 0].tolist()
    assert log.statistics()["repeated_share"] == 0


def test_a_head_only_copilot_learns_from_first_visits_unless_told_otherwise():
    assert composed.compose_config("copilot=head").mistake_log.log.rows == "first_visit"
    assert composed.compose_config().mistake_log.log.rows == "all"
    assert composed.compose_config("copilot=head", "mistake_log.log.rows=all").mistake_log.log.rows == "all"


def test_rounds_without_first_visits_do_not_count_for_a_reservoir():
    seen = []

    class Counted(Reservoir):
        def evict(self, rounds, seen_rounds, generator):
            seen.append(seen_rounds)
            return super().evict(rounds, seen_rounds, generator)

    logs = [MistakeLog(rows="first_visit", capacity_rounds=1, policy=Counted()) for _ in range(2)]
    first, second, third = (random_batch("t5", seed=seed) for seed in range(3))
    append_all(logs[0], [first, first, second, first])
    logs[1].load_state_dict(logs[0].state_dict())
    for log in logs:
        append_all(log, [second, third])
    assert seen == [2, 3, 3]


def test_a_row_twice_in_one_round_is_twice_on_its_first_visit():
    batch = random_batch("t5", rows=4)
    double = replace(batch, ids_B=torch.tensor([7, 8, 7, 9]))
    for size in (4, 2, 1):
        assert len(append_all(MistakeLog(rows="first_visit"), [double], size)) == 4


def test_visits_go_on_after_a_restart():
    batches = [random_batch("t5", first_id=0), random_batch("t5", seed=1, first_id=2)]
    before = append_all(MistakeLog(rows="first_visit"), batches[:1])
    after = MistakeLog(rows="first_visit")
    after.load_state_dict(before.state_dict())
    assert held(append_all(after, batches)) == held(append_all(before, batches)) == [0] * 4 + [2] * 2


def test_a_restored_log_is_drawn_from_before_any_row_is_new():
    pilot, batch = tiny_pilot("llama").requires_grad_(False), random_batch("llama")
    before, after = (MistakeLog(rows="first_visit", storage=FrozenHeadStorage()) for _ in range(2))
    before.append(trace_pilot(pilot, batch, StatePooler()))
    after.load_state_dict(before.state_dict())
    after.append(trace_pilot(pilot, batch, StatePooler()))
    assert all(map(torch.equal, after.sample(3), before.sample(3)))


def visits_job(folder):
    """Two processes that swap their rows in the second round."""
    rows = SeenRows(of_all_processes=True)
    parts = [[0, 1], [2, 3]]
    assert rows.new(parts[rank()], round=0) == [True, True]
    assert rows.new([*parts[1 - rank()], 4 + rank()], round=1) == [False, False, True]
    assert rows.ids == [0, 1, 2, 3, 4, 5]


def test_a_row_that_another_process_trained_on_is_no_first_visit(tmp_path):
    run_in_processes(visits_job, tmp_path)


@pytest.mark.slow
def test_a_run_of_two_passes_logs_one(tmp_path):
    given = [*composed.SMALL, "data.max_train_rows=32", "mistake_log.log.rows=first_visit", "fusion.weight=[0,1]"]
    folder = composed.train(tmp_path / "run", *given, "trainer.val_check_interval=4", "mistake_log.every_n_rounds=4")
    last = (folder / "metrics.csv").read_text().splitlines()
    columns = last[0].split(",")
    (records,) = {line.split(",")[columns.index("log/records")] for line in last[1:]} - {""}
    assert float(records) == 32


# Rows held out ----------------------------------------------------------------------------------------------------


def rows_of(data):
    """Ids of all rounds: trained on, and held out."""
    batches = list(data.train_dataloader())
    trained, held_out = (
        [i for batch in part for i in batch.ids_B.tolist()] for part in (batches, [b.held_out for b in batches])
    )
    return trained, held_out


def with_held_out(rounds=24, share=0.25, **settings):
    data = task_data("t5", rounds, **settings)
    data.held_out = share
    return data


def test_rows_held_out_are_never_trained_on_and_all_come_round():
    data = with_held_out()
    trained, held_out = rows_of(data)
    assert set(trained).isdisjoint(held_out)
    assert (len(set(trained)), len(set(held_out))) == (48, 16)
    assert len(trained) == len(held_out) == 24 * 8
    assert data.train_rows == 48
    assert rows_of(with_held_out()) == (trained, held_out)
    assert set(rows_of(with_held_out(seed=1))[1]) != set(held_out)


def test_the_order_goes_on_where_it_was():
    everything = [(b.ids_B.tolist(), b.held_out.ids_B.tolist()) for b in with_held_out().train_dataloader()]
    loader = with_held_out().train_dataloader()
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    again = with_held_out().train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert [(b.ids_B.tolist(), b.held_out.ids_B.tolist()) for b in again] == everything[7:]


def test_fewer_rows_held_out_than_a_batch_has_are_warned_of(caplog):
    with_held_out(share=0.125).train_dataloader()
    assert not caplog.text
    with_held_out(share=0.05).train_dataloader()
    assert "data.held_out=0.05 holds out 3 rows, fewer than a batch of 8" in caplog.text


def with_rows_held_out(batches, others):
    """Batches that bring others for the log."""
    return [replace(batch, held_out=other) for batch, other in zip(batches, others, strict=True)]


@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_log_holds_the_rows_held_out_as_the_pilot_would_answer_them(family, micro_batch_size):
    batch, other = (random_batch(family, seed=seed, first_id=10 * seed) for seed in (1, 2))
    model, log = tiny_model(family, dropout=0.5), MistakeLog(policy=InOrder())
    before = weights(model.pilot)
    train_on(small_module(model, 1, micro_batch_size=micro_batch_size), with_rows_held_out([batch], [other]), log)
    record, fresh = log.sample(4), tiny_model(family, dropout=0.5).eval()
    states = trace_pilot(fresh.pilot, other, StatePooler())
    mask = record.target_mask_BN
    torch.testing.assert_close(record.targets_BN[mask], other.target_ids_BN[other.target_mask_BN])
    torch.testing.assert_close(record.probs_BNV[mask], states.logits_BNV.softmax(-1)[other.target_mask_BN])
    assert model.pilot.training
    assert not same(weights(model.pilot), before)


def test_rows_held_out_leave_no_gradient_in_the_pilot():
    """The Pilot ends as one that was trained on the same rows with an ordinary log."""
    batches, others = ([random_batch("t5", seed=seed) for seed in range(first, first + 3)] for first in (0, 50))
    ends = []
    for given in (batches, with_rows_held_out(batches, others)):
        model = tiny_model("t5")
        train_on(small_module(model, 3), given, MistakeLog())
        ends.append(weights(model.pilot))
    assert same(*ends)


@pytest.mark.slow
def test_a_run_with_rows_held_out_ends_as_any_run(tmp_path):
    given = [*composed.SMALL, "data.held_out=0.5", "fusion.weight=1", "control=equal_parameters"]
    found = composed.results(composed.train(tmp_path / "run", *given))
    assert found["rounds"] == 4
    assert {row["weight"] for row in found["rows"]} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"held_out": 1.0}, "share of the train rows"),
        ({"held_out": True}, "share of the train rows"),
        ({"held_out": 0.1, "streaming": True}, "data.streaming=false"),
    ],
)
def test_shares_that_cannot_be_held_out_are_refused(changed, says):
    task = GeneratedTask(name="multiple_choice", kind="multiple_choice", train=8, validation=2, test=2)
    with pytest.raises(DataError, match=says):
        TCopilotDataModule({"multiple_choice": task}, rounds=1, **changed)


def test_first_visits_of_rows_held_out_are_refused():
    cfg = composed.compose_config("data.held_out=0.1", "mistake_log.log.rows=first_visit")
    assert "mistake_log.log.rows=all" in "\n".join(config_problems(cfg))
    with pytest.raises(ValueError, match="all, first_visit"):
        MistakeLog(rows="last_visit")
