"""The Mistake Log, filled by real rounds of training."""

import gc
import io
import random
import sys
import time

import pytest
import torch
from small_training import (
    FAMILIES,
    VOCAB,
    EachRound,
    InOrder,
    learner,
    of_records,
    random_batch,
    small_module,
    tiny_model,
    tiny_pilot,
    train_on,
)

from tcopilot.mistake_log import log as log_module
from tcopilot.mistake_log import spill as log_spill
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.policies import Balanced, Fifo, Latest, Prioritised, Reservoir
from tcopilot.mistake_log.recording import RecordingError
from tcopilot.mistake_log.rounds import LoggedRecords
from tcopilot.mistake_log.storage import DenseStorage, TopKStorage
from tcopilot.models.states import PilotStates, StatePooler, trace_pilot
from tcopilot.training.checkpoints import pack

WIDTH = 16


POLICIES = (Latest, Fifo, Reservoir, Prioritised, Balanced)
STORAGES = {"dense": DenseStorage, "topk": lambda: TopKStorage(k=4)}
SHOWN = [(Reservoir, "dense"), (Balanced, "topk")]


def slow(*values):
    """Parameters for the slow suite."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


@pytest.fixture
def few_objects():
    """Make `gc.collect` fast: what is there already is left out, and stays so."""
    gc.freeze()


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
        for value in vars(states).values():
            if isinstance(value, torch.Tensor):
                value.zero_()
    assert before.probs_BNV.any()
    assert all(torch.equal(old, new) for old, new in zip(before, all_records(log), strict=True))


def test_nothing_in_the_log_carries_a_gradient():
    log, _ = filled("t5", [random_batch("t5")])
    tensors = [*log.rounds[0].tensors.values(), *all_records(log)]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_appending_piece_by_piece_gives_the_same_log(monkeypatch):
    states = trace_pilot(tiny_pilot("llama"), random_batch("llama", rows=7), StatePooler())
    logs = []
    for rows in (64, 3, 1):
        logs.append(MistakeLog(policy=InOrder()))
        monkeypatch.setattr(log_module, "ROWS_AT_ONCE", rows)
        logs[-1].append(states)
    for log in logs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(all_records(logs[0]), all_records(log), strict=True))
        assert torch.equal(of_records(log, "energy"), of_records(logs[0], "energy"))


def test_the_log_never_holds_more_rounds_than_its_capacity():
    sizes = []
    log = MistakeLog(capacity_rounds=3)
    watch = EachRound(lambda trainer, module: sizes.append(len(log.rounds)))
    batches = [random_batch("llama", rows=2, seed=seed) for seed in range(7)]
    train_on(small_module(tiny_model("llama"), 7), batches, log, [watch])
    assert sizes == [1, 2, 3, 3, 3, 3, 3]
    assert [logged.round for logged in log.rounds] == [4, 5, 6]
    assert len(log) == 6


@pytest.mark.slow
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
    kept = [tensor for logged in log.rounds for tensor in logged.tensors.values()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) == expected


def test_records_in_half_precision_are_close_to_those_in_full():
    batch = random_batch("llama")
    full, _ = filled("llama", [batch])
    half, _ = filled("llama", [batch], MistakeLog(dtype="bfloat16", policy=InOrder()))
    record = all_records(half)
    assert record.states_BNP.dtype == torch.bfloat16
    torch.testing.assert_close(record.states_BNP.float(), all_records(full).states_BNP, atol=1e-2, rtol=1e-2)
    assert torch.equal(record.probs_BNV, all_records(full).probs_BNV)


OTHERS = [(p, kind) for kind in STORAGES for p in POLICIES if (p, kind) not in SHOWN]


@pytest.mark.parametrize(("policy", "storage"), [*SHOWN, *slow(*OTHERS)])
def test_a_log_restored_from_a_file_draws_and_forgets_as_the_old_one_would(policy, storage):
    def new():
        return MistakeLog(capacity_rounds=3, policy=policy(), storage=STORAGES[storage](), seed=5)

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


def test_a_policy_that_draws_what_is_not_there_is_named():
    class Beyond(Fifo):
        def draw(self, log, records, generator):
            return torch.full((records,), len(log))

    with pytest.raises(ValueError, match=r"Beyond\.draw returned 8, which is no record of the 8 held; return 0 to 7"):
        filled("llama", [random_batch("llama", rows=8)], MistakeLog(policy=Beyond()))


@pytest.mark.parametrize("capacity", [0, -3])
def test_a_log_without_room_for_a_round_is_refused(capacity):
    with pytest.raises(ValueError, match=f"capacity_rounds={capacity}"):
        MistakeLog(capacity_rounds=capacity)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_byte_limit_that_is_not_positive_is_refused(limit):
    with pytest.raises(ValueError, match=f"max_bytes={limit}"):
        MistakeLog(max_bytes=limit)


def test_states_beyond_float16_are_refused_unless_the_pilot_has_diverged():
    model, batch = tiny_model("llama"), random_batch("llama")
    states = trace_pilot(model.pilot, batch, StatePooler())
    states.states_BNP[0, 0, 0] = 1e5
    MistakeLog(dtype="bfloat16").append(states)
    with pytest.raises(RecordingError, match=r"mistake_log\.log\.dtype=float16: .*dtype=bfloat16 or float32"):
        MistakeLog(dtype="float16").append(states)
    states.logits_BNV = torch.full_like(states.logits_BNV, torch.nan)  # which training reports
    MistakeLog(dtype="float16").append(states)


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
def test_the_reported_error_energy_is_the_mean_over_target_tokens_as_that_of_validation_is(family):
    batch = random_batch(family, rows=3, seed=4, targets=[1, 7, 3])
    log, _ = filled(family, [batch])
    expected, tokens = [], torch.tensor([])
    for row in range(3):
        _, _, probs, targets = alone(family, tiny_pilot(family), batch, row)
        of_tokens = (torch.nn.functional.one_hot(targets, VOCAB) - probs).square().sum(-1)
        expected.append(of_tokens.mean().item())
        tokens = torch.cat([tokens, of_tokens])
    assert of_records(log, "energy").tolist() == pytest.approx(expected, abs=1e-5)
    assert log.statistics()["error_energy"] == pytest.approx(tokens.mean().item(), abs=1e-5)
    assert sum(expected) / 3 != pytest.approx(tokens.mean().item(), abs=1e-5)


@pytest.mark.slow
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


def made_up(rows=4, source=8, target=4, width=8, vocab=16, seed=0):
    """States that no Pilot made, for tests of size and time."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, target, dtype=torch.bool)
    return PilotStates(
        torch.randn(rows, target, vocab, generator=generator),
        torch.randn(rows, source, width, generator=generator),
        torch.ones(rows, source, dtype=torch.bool),
        torch.randn(rows, target, width, generator=generator),
        torch.randint(vocab, (rows, target), generator=generator),
        mask,
        torch.arange(rows) + rows * seed,
        torch.arange(rows) % 3,
    )


def equal(left, right):
    """Whether two drawn batches are equal to the bit."""
    return all(torch.equal(one, two) for one, two in zip(left, right, strict=True))


# Many rounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Fifo, Prioritised, Balanced])
def test_rounds_that_come_and_go_are_counted_as_in_a_plain_list(policy):
    numbers, log, plain = random.Random(1), MistakeLog(10**6, policy=policy()), []
    for step in range(400):
        if len(plain) > 3 and numbers.random() < (0.3 if step < 200 else 0.7):
            index = numbers.randrange(-len(plain), len(plain))
            assert log.held.pop(index) is plain.pop(index)
            continue
        log.append(made_up(rows=numbers.randint(1, 4), seed=step % 5))
        plain.append(log.rounds[-1])
    held = list(log.rounds)
    assert [logged.round for logged in held] == [logged.round for logged in plain]
    assert len(log) == sum(map(len, plain))
    assert log.nbytes == sum(logged.nbytes for logged in plain)
    everything = [(logged, row) for logged in plain for row in range(len(logged))]
    assert [log.held.find(index) for index in range(len(log))] == everything
    fresh = LoggedRecords(log.policy.weights)
    for logged in plain:
        fresh.append(logged)
    assert (len(fresh), fresh.nbytes) == (len(log), log.nbytes)
    assert sorted(fresh.groups) == sorted(log.held.groups)
    for group in fresh.groups:
        weights = torch.cat([log.policy.weights(r).get(group, torch.zeros(len(r)).long()) for r in plain])
        step = max(1, int(weights.sum()) // 50)
        for number in range(0, int(weights.sum()), step):
            assert log.held.pick(group, number) == int((weights.cumsum(0) <= number).sum())


def test_a_round_that_is_not_there_is_an_index_error():
    with pytest.raises(IndexError):
        MistakeLog().rounds[0]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Balanced, *slow(*POLICIES[:-1])])
def test_a_round_takes_no_longer_with_a_hundred_times_as_many_rounds_held(policy):
    states, logs = made_up(), {}
    for rounds in (50, 5_000):
        log = logs[rounds] = MistakeLog(capacity_rounds=rounds, policy=policy())
        log.append(states)
        one = log.rounds[0]
        state = {**log.state_dict(), "seen_rounds": rounds}
        state["rounds"] = [{**state["rounds"][0], "round": i} for i in range(rounds)]
        log.load_state_dict(state)
        assert len(log.rounds) == rounds
        assert one.nbytes * rounds == log.nbytes

    def seconds(log):
        began = time.perf_counter()
        log.append(states)
        log.sample(4)
        between = time.perf_counter()
        log.statistics()
        return between - began + (time.perf_counter() - between) / 50  # as often as `mistake_log.every_n_rounds` says

    gc.disable()  # its pauses belong to all objects of the test run
    try:
        took = {rounds: [] for rounds in logs}
        for _ in range(40):
            for rounds, log in logs.items():
                took[rounds].append(seconds(log))
    finally:
        gc.enable()
    assert min(took[5_000]) < 2.5 * min(took[50])  # a walk over the rounds takes 20 times as long


# Bytes --------------------------------------------------------------------------------------------------------------


def storage_bytes():
    """Bytes of all distinct storages of the tensors that the garbage collector knows."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = max(storage.nbytes(), storages.get(storage.data_ptr(), 0))
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("storage", [DenseStorage, lambda: TopKStorage(4)], ids=["dense", "topk"])
@pytest.mark.parametrize("policy", [Fifo, Reservoir])
def test_the_byte_limit_holds_for_all_storages_that_the_log_keeps_alive(policy, storage, micro_batches, few_objects):
    limit = 200_000
    log = MistakeLog(capacity_rounds=10**6, max_bytes=limit, policy=policy(), storage=storage())
    used = []  # what was there before is not counted
    for seed in range(25):
        for part in range(micro_batches):
            wide = made_up(rows=6, source=30, target=20, width=32, vocab=64, seed=seed * 3 + part)
            log.append(wide.rows(slice(part, part + 4)), extend=part > 0)  # views into larger tensors
            log.sample(3)
            del wide
        used.append(storage_bytes())
        assert used[-1] == log.nbytes
    assert max(used) <= limit
    assert max(used) > limit - 2 * log.rounds[0].nbytes
    assert log.seen_rounds == 25 > len(log.rounds)


# Spilling -----------------------------------------------------------------------------------------------------------


def bin_files(folder):
    return sorted(folder.rglob("*.bin"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Reservoir, Balanced, *slow(Latest, Fifo, Prioritised)])
def test_a_spilled_log_draws_what_one_in_memory_draws(policy, tmp_path):
    batches = [random_batch("llama", seed=s, rows=6, benchmarks=[0, 1, 1, 1, 2, 0]) for s in range(8)]
    logs = []
    for spill in (None, str(tmp_path / "new" / "folder")):
        drawn = []
        log = MistakeLog(capacity_rounds=4, policy=policy(), seed=3, spill=spill)
        watch = EachRound(lambda trainer, module, log=log, drawn=drawn: drawn.append(log.sample(9)))
        train_on(small_module(tiny_model("llama"), len(batches), micro_batch_size=4), batches, log, [watch])
        logs.append((log, drawn))
    (memory, expected), (spilled, found) = logs
    assert len(expected) == len(found) == 8
    assert all(equal(left, right) for left, right in zip(expected, found, strict=True))
    assert memory.statistics() == spilled.statistics()
    assert [logged.round for logged in memory.rounds] == [logged.round for logged in spilled.rounds]
    assert bin_files(tmp_path)


@pytest.mark.slow
def test_all_rounds_but_the_newest_lie_in_files_that_go_with_them(tmp_path, monkeypatch, few_objects):
    monkeypatch.setattr(log_spill, "FILE_BYTES", 1)  # one file for each round
    log = MistakeLog(capacity_rounds=3, spill=str(tmp_path))
    sizes = []
    for seed in range(6):
        log.append(made_up(seed=seed))
        gc.collect()
        sizes.append(len(bin_files(tmp_path)))
    assert sizes == [0, 1, 2, 2, 2, 2]
    assert sum(path.stat().st_size for path in bin_files(tmp_path)) < 1.2 * log.nbytes
    log.max_bytes = 1
    log.append(made_up())
    gc.collect()
    assert not bin_files(tmp_path)
    log.append(made_up())
    assert len(log.rounds) == 1
    del log
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_rounds_that_a_reservoir_does_not_admit_write_nothing(tmp_path, monkeypatch):
    log = MistakeLog(capacity_rounds=2, policy=Reservoir(), spill=str(tmp_path))
    for seed in range(3):
        log.append(made_up(seed=seed))
    monkeypatch.setattr(log.policy, "evict", lambda rounds, seen, generator: rounds - 1)  # the newest always leaves
    log.append(made_up())
    moved = []
    monkeypatch.setattr(log.spill, "move", lambda tensors: moved.append(tensors) or tensors)
    for seed in range(5):
        log.append(made_up(seed=seed))
    assert not moved
    assert len(log.rounds) == 2


def test_small_rounds_share_a_file(tmp_path):
    log = MistakeLog(capacity_rounds=200, spill=str(tmp_path))
    for seed in range(200):
        log.append(made_up(seed=seed))
    assert len(bin_files(tmp_path)) == 1
    order = [log.rounds[i].tensors["targets"].tolist() for i in range(200)]
    assert order == [made_up(seed=seed).targets_BN.tolist() for seed in range(200)]


@pytest.mark.slow
@pytest.mark.parametrize("spills", [(True, False), (False, True), (True, True)])
def test_the_state_of_a_spilled_log_needs_no_other_file(spills, tmp_path, few_objects):
    def new(spill):
        return MistakeLog(3, policy=Reservoir(), seed=2, spill=str(tmp_path) if spill else None, dtype="bfloat16")

    old = new(spills[0])
    for seed in range(5):
        old.append(made_up(seed=seed))
    state = old.state_dict()
    packed = pack(state)[1].values()
    mine = {t.data_ptr() for logged in state["rounds"] for t in logged["tensors"].values()}
    assert mine <= {t.data_ptr() for t in packed}  # a checkpoint is written from the files, not from copies
    file = io.BytesIO()
    torch.save(state, file)
    assert len(file.getvalue()) < 3 * old.nbytes + 40_000
    file.seek(0)
    restored = new(spills[1])
    restored.load_state_dict(torch.load(file, weights_only=True))
    del state, packed
    for seed in range(4):
        assert equal(old.sample(7), restored.sample(7))
        old.append(made_up(seed=seed))
        restored.append(made_up(seed=seed))
    expected = old.sample(7)
    again = new(False)
    again.load_state_dict(restored.state_dict())
    state = restored.state_dict()
    del old, restored
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert equal(again.sample(99), (after := new(False)).load_state_dict(state) or after.sample(99))
    assert len(expected.targets_BN) == 7


def test_a_restored_log_owns_what_it_holds():
    log = MistakeLog(policy=InOrder())
    log.append(made_up())
    state = log.state_dict()
    restored = MistakeLog(policy=InOrder())
    restored.load_state_dict(state)
    for tensor in state["rounds"][0]["tensors"].values():
        tensor.zero_()
    assert restored.sample(4).probs_BNV.any()
    assert restored.statistics()["error_energy"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_spilled_log_takes_hardly_any_memory(tmp_path):
    def own_memory():  # kB
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    states = made_up(rows=8, source=8, target=64, width=8, vocab=4096)  # 8.4 MB a round
    log = MistakeLog(spill=str(tmp_path))
    log.append(states)
    log.sample(2)
    before = own_memory()
    for _ in range(20):
        log.append(states)
        log.sample(2)
    assert log.nbytes > 160e6
    assert own_memory() - before < 60_000


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_lost(tmp_path):
    (tmp_path / "file").write_text("")
    log = MistakeLog(spill=str(tmp_path / "file"), policy=InOrder())
    log.append(made_up())
    with pytest.raises(OSError, match="file"):
        log.append(made_up(seed=1))
    assert len(log.rounds) == 1
    assert torch.equal(log.sample(4).targets_BN, made_up().targets_BN)
