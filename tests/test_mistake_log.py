"""The Mistake Log, filled by real rounds of training."""

import io

import pytest
import torch
from training import (
    FAMILIES,
    VOCAB,
    EachRound,
    InOrder,
    learner,
    random_batch,
    small_module,
    tiny_model,
    tiny_pilot,
    train_on,
)

from tcopilot.log_storage import DenseStorage, TopKStorage
from tcopilot.mistake_log import MistakeLog
from tcopilot.sampling import Balanced, Fifo, Latest, Prioritised, Reservoir
from tcopilot.states import StatePooler, trace_pilot

WIDTH = 16
POLICIES = (Latest, Fifo, Reservoir, Prioritised, Balanced)


def filled(family, batches, log=None, **options):
    """A log after a round of training on each batch, and the trained model."""
    log = MistakeLog(policy=InOrder()) if log is None else log
    model = tiny_model(family)
    train_on(small_module(model, len(batches), **options), batches, log)
    return log, model


def alone(family, pilot, batch, row):
    """X̃, h̄ and p̂ of one row without any padding, from the model's plain forward pass."""
    source = batch.source_ids_BM[row, batch.source_mask_BM[row]][None]
    target = batch.target_ids_BN[row, batch.target_mask_BN[row]][None]
    pilot.eval()
    with torch.no_grad():
        if family == "t5":
            inputs = torch.cat([torch.zeros(1, 1, dtype=torch.long), target[:, :-1]], dim=1)
            out = pilot(input_ids=source, decoder_input_ids=inputs, output_hidden_states=True)
            states, logits, read = out.decoder_hidden_states, out.logits, out.encoder_last_hidden_state
            here = slice(None)
        else:
            out = pilot(input_ids=torch.cat([source, target], dim=1), output_hidden_states=True)
            states, logits, read = out.hidden_states, out.logits, pilot.get_input_embeddings()(source)
            here = slice(source.shape[1] - 1, -1)
    return read[0], torch.stack(states[1:])[:, 0, here].mean(0), logits[0, here].softmax(-1), target[0]


def all_records(log):
    return log.sample(len(log))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_is_what_the_pilot_thought_of_the_row_before_its_update(family):
    batch = random_batch(family, rows=5, seed=3)
    log, model = filled(family, [batch], pilot=learner(lr=0.1))
    record = all_records(log)
    before = tiny_pilot(family)
    for row in range(5):
        source, states, probs, targets = alone(family, before, batch, row)
        m, n = len(source), len(targets)
        assert record.source_mask_BM[row].tolist() == [True] * m + [False] * (record.source_mask_BM.shape[1] - m)
        assert record.target_mask_BN[row].tolist() == [True] * n + [False] * (record.target_mask_BN.shape[1] - n)
        assert torch.equal(record.targets_BN[row, :n], targets)
        torch.testing.assert_close(record.source_BMP[row, :m], source, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(record.states_BNP[row, :n], states, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(record.probs_BNV[row, :n], probs, atol=1e-5, rtol=1e-4)
        error = torch.nn.functional.one_hot(targets, VOCAB) - probs
        torch.testing.assert_close(record.errors_BNV[row, :n], error, atol=1e-5, rtol=1e-4)
        assert not record.source_BMP[row, m:].any()
        assert not record.states_BNP[row, n:].any()
        updated = alone(family, model.pilot, batch, row)[2]
        assert (updated - record.probs_BNV[row, :n]).abs().max() > 1e-3  # the update would have shown


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_does_not_depend_on_the_rows_that_it_was_logged_with(family):
    batch = random_batch(family, rows=4, seed=8)
    together, _ = filled(family, [batch])
    for row, part in enumerate(batch.split(1)):
        single, _ = filled(family, [part])
        lone, among = all_records(single), all_records(together)
        m, n = lone.source_BMP.shape[1], lone.states_BNP.shape[1]
        assert lone.target_mask_BN.all()
        assert int(among.target_mask_BN[row].sum()) == n
        torch.testing.assert_close(among.source_BMP[row, :m], lone.source_BMP[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(among.states_BNP[row, :n], lone.states_BNP[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(among.probs_BNV[row, :n], lone.probs_BNV[0], atol=1e-5, rtol=1e-4)


def test_a_drawn_batch_is_only_as_long_as_its_longest_record():
    batch = random_batch("llama", rows=3, seed=1, targets=[1, 2, 9])
    log = MistakeLog()
    filled("llama", [batch], log)
    lengths = set()
    for _ in range(20):
        record = log.sample(1)
        assert record.target_mask_BN.all()
        assert record.source_mask_BM.all()
        assert record.probs_BNV.shape[1] == record.states_BNP.shape[1] == record.target_mask_BN.shape[1]
        lengths.add(record.target_mask_BN.shape[1])
    assert lengths == {1, 2, 9}


@pytest.mark.parametrize("family", FAMILIES)
def test_later_training_and_changes_of_the_appended_tensors_leave_the_log_alone(family):
    batches = [random_batch(family, seed=seed) for seed in range(4)]
    kept = {}

    def remember(trainer, module):
        if module.round == 0:
            kept.update({name: tensor.clone() for name, tensor in module.mistake_log.rounds[0].tensors.items()})

    log = MistakeLog()
    train_on(small_module(tiny_model(family), 4), batches, log, [EachRound(remember)])
    assert kept
    assert all(torch.equal(kept[name], tensor) for name, tensor in log.rounds[0].tensors.items())

    log = MistakeLog(policy=InOrder())
    states = trace_pilot(tiny_pilot(family), batches[0], StatePooler())
    log.append(states)
    before = all_records(log)
    with torch.no_grad():
        for tensor in vars(states).values():
            tensor.zero_()
    assert before.probs_BNV.any()
    assert all(torch.equal(old, new) for old, new in zip(before, all_records(log), strict=True))


def test_nothing_in_the_log_carries_a_gradient():
    log, _ = filled("t5", [random_batch("t5")])
    tensors = [*log.rounds[0].tensors.values(), log.rounds[0].energy_B, *all_records(log)]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_appending_piece_by_piece_gives_the_same_log():
    states = trace_pilot(tiny_pilot("llama"), random_batch("llama", rows=7), StatePooler())
    logs = []
    for rows in (64, 3, 1):
        logs.append(MistakeLog(policy=InOrder()))
        logs[-1].append(states, rows_per_piece=rows)
    for log in logs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(all_records(logs[0]), all_records(log), strict=True))
        assert torch.equal(log.concatenated("energy"), logs[0].concatenated("energy"))


def test_the_log_never_holds_more_rounds_than_its_capacity():
    sizes = []
    log = MistakeLog(capacity_rounds=3)
    watch = EachRound(lambda trainer, module: sizes.append(len(log.rounds)))
    batches = [random_batch("llama", rows=2, seed=seed) for seed in range(7)]
    train_on(small_module(tiny_model("llama"), 7), batches, log, [watch])
    assert sizes == [1, 2, 3, 3, 3, 3, 3]
    assert [logged.round for logged in log.rounds] == [4, 5, 6]
    assert len(log) == 6


def test_the_log_never_holds_more_bytes_than_its_limit():
    batches = [random_batch("llama", rows=2, seed=seed) for seed in range(8)]
    unlimited, _ = filled("llama", batches)
    limit = unlimited.nbytes // 3
    sizes = []
    log = MistakeLog(max_bytes=limit)
    watch = EachRound(lambda trainer, module: sizes.append((log.nbytes, len(log.rounds))))
    train_on(small_module(tiny_model("llama"), 8), batches, log, [watch])
    assert all(size <= limit for size, _ in sizes)
    assert 1 < sizes[-1][1] < 8
    oldest = log.rounds[0].round
    assert log.nbytes + unlimited.rounds[oldest - 1].nbytes > limit  # no more left than had to


def test_a_round_larger_than_the_byte_limit_is_held_alone():
    log, _ = filled("llama", [random_batch("llama", seed=seed) for seed in range(3)], MistakeLog(max_bytes=1))
    assert [logged.round for logged in log.rounds] == [2]


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_reported_bytes_are_the_bytes_in_memory(dtype, size):
    batches = [random_batch("llama", rows=3, seed=1), random_batch("llama", rows=5, seed=2)]
    log, _ = filled("llama", batches, MistakeLog(dtype=dtype, policy=InOrder()))
    expected = 0
    for batch in batches:
        (b, m), n = batch.source_ids_BM.shape, batch.target_ids_BN.shape[1]
        expected += b * m * (WIDTH * size + 1)  # X̃ and its mask
        expected += b * n * (WIDTH * size + 8 + 1 + VOCAB * 4)  # h̄, targets, their mask, p̂
        expected += b * (8 + 4 + 1)  # benchmark, energy, repeated
    assert log.nbytes == log.statistics()["bytes"] == expected
    kept = [t for logged in log.rounds for t in (*logged.tensors.values(), logged.energy_B, logged.repeated_B)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == expected


def test_records_in_half_precision_are_close_to_those_in_full():
    batch = random_batch("llama")
    full, _ = filled("llama", [batch])
    half, _ = filled("llama", [batch], MistakeLog(dtype="bfloat16", policy=InOrder()))
    record = all_records(half)
    assert record.states_BNP.dtype == torch.bfloat16
    torch.testing.assert_close(record.states_BNP.float(), all_records(full).states_BNP, atol=1e-2, rtol=1e-2)
    assert torch.equal(record.probs_BNV, all_records(full).probs_BNV)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("storage", [DenseStorage, lambda: TopKStorage(k=4)], ids=["dense", "topk"])
def test_a_log_restored_from_a_file_draws_and_forgets_as_the_old_one_would(policy, storage):
    def new():
        return MistakeLog(capacity_rounds=3, policy=policy(), storage=storage(), seed=5)

    batches = [random_batch("llama", seed=s, benchmarks=[0, 1, 1, 1]) for s in range(5)]
    old, _ = filled("llama", batches, new())
    file = io.BytesIO()
    torch.save(old.state_dict(), file)
    file.seek(0)
    restored = new()
    restored.load_state_dict(torch.load(file, weights_only=True))

    assert restored.statistics() == old.statistics()
    states = trace_pilot(tiny_pilot("llama"), batches[0], StatePooler())
    for _ in range(4):
        for _ in range(3):
            drawn = zip(old.sample(6), restored.sample(6), strict=True)
            assert all(torch.equal(left, right) for left, right in drawn)
        old.append(states)
        restored.append(states)
        assert [logged.round for logged in old.rounds] == [logged.round for logged in restored.rounds]
        assert restored.statistics() == old.statistics()


def test_logs_of_different_seeds_draw_differently():
    batches = [random_batch("llama", seed=s, rows=8) for s in range(3)]
    drawn = [filled("llama", batches, MistakeLog(seed=seed))[0].sample(12).targets_BN.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_drawing_from_an_empty_log_says_that_it_is_empty():
    with pytest.raises(ValueError, match="empty: append a round"):
        MistakeLog().sample(4)


@pytest.mark.parametrize("capacity", [0, -3])
def test_a_log_without_room_for_a_round_is_refused(capacity):
    with pytest.raises(ValueError, match=f"capacity_rounds={capacity}"):
        MistakeLog(capacity_rounds=capacity)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_byte_limit_that_is_not_positive_is_refused(limit):
    with pytest.raises(ValueError, match=f"max_bytes={limit}"):
        MistakeLog(max_bytes=limit)


def test_the_reported_age_is_the_mean_number_of_rounds_since_a_record_was_logged():
    rows = (2, 5, 3, 1)
    log, _ = filled("llama", [random_batch("llama", rows=n, seed=s) for s, n in enumerate(rows)])
    assert log.statistics()["age_rounds"] == pytest.approx((2 * 3 + 5 * 2 + 3 * 1 + 1 * 0) / 11)
    log.capacity_rounds = 2
    log.append(trace_pilot(tiny_pilot("llama"), random_batch("llama", rows=4), StatePooler()))
    assert log.statistics()["age_rounds"] == pytest.approx((1 * 1 + 4 * 0) / 5)
    assert log.statistics()["records"] == 5
    assert log.statistics()["rounds"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reported_error_energy_is_the_mean_over_records_of_their_mean_squared_error(family):
    batch = random_batch(family, rows=3, seed=4, targets=[1, 7, 3])
    log, _ = filled(family, [batch])
    expected = []
    for row in range(3):
        _, _, probs, targets = alone(family, tiny_pilot(family), batch, row)
        expected.append((torch.nn.functional.one_hot(targets, VOCAB) - probs).square().sum(-1).mean().item())
    assert log.concatenated("energy").tolist() == pytest.approx(expected, abs=1e-5)
    assert log.statistics()["error_energy"] == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_the_repeated_share_counts_records_of_rows_that_had_been_logged_before():
    batches = [random_batch("llama", seed=s) for s in range(3)]
    once, _ = filled("llama", batches)
    twice, _ = filled("llama", [*batches, *batches, batches[0]])
    newest, _ = filled("llama", [*batches, *batches], MistakeLog(capacity_rounds=3))
    assert once.statistics()["repeated_share"] == 0
    assert twice.statistics()["repeated_share"] == pytest.approx(4 / 7)
    assert newest.statistics()["repeated_share"] == 1  # also where the first copy has left the log


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_of_a_round_are_one_logged_round_with_the_same_records(family):
    batch = random_batch(family, rows=6, seed=2)
    whole, _ = filled(family, [batch])
    parts, _ = filled(family, [batch], micro_batch_size=2)
    assert len(whole.rounds) == len(parts.rounds) == 1
    assert whole.seen_rounds == parts.seen_rounds == 1
    for left, right in zip(all_records(whole), all_records(parts), strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


def test_a_round_that_the_policy_did_not_admit_takes_no_further_micro_batch(monkeypatch):
    batches = (random_batch("t5", rows=2, seed=seed) for seed in range(3))
    states = [trace_pilot(tiny_pilot("t5"), batch, StatePooler()) for batch in batches]
    log = MistakeLog(1)
    log.append(states[0])
    monkeypatch.setattr(log.policy, "evict", lambda rounds, seen, generator: rounds - 1)  # the newest always leaves
    log.append(states[1])
    log.append(states[2], extend=True)
    assert len(log) == 2
    assert log.rounds[0].round == 0
    assert log.seen_rounds == 2
