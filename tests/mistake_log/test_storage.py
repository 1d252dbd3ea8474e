"""What the Mistake Log loses by storing less of p̂, on logs filled by real rounds of training."""

from functools import cache, partial

import composed
import pytest
import torch
from family_models import EVERY_FAMILY
from small_training import (
    FAMILIES,
    VOCAB,
    InOrder,
    learner,
    random_batch,
    small_module,
    tiny_model,
    tiny_pilot,
    train_on,
)

from tcopilot.app import console
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.storage import DenseStorage, FrozenHeadStorage, TopKStorage
from tcopilot.models.adapters import Lora
from tcopilot.models.states import StackedStates, StatePooler, trace_pilot
from tcopilot.training.objectives import CrossEntropy, objective_sum


def filled(family, storage, rounds=3):
    """A log after a few rounds; p̂ does not depend on the storage, since the Pilot never sees the log."""
    log = MistakeLog(policy=InOrder(), storage=storage)
    batches = [random_batch(family, rows=4, seed=seed) for seed in range(rounds)]
    train_on(small_module(tiny_model(family), rounds, pilot=learner(lr=3e-2)), batches, log)
    return log


def target_rows(log):
    """p̂ and targets of all target tokens."""
    record = log.sample(len(log))
    return record.probs_BNV[record.target_mask_BN], record.targets_BN[record.target_mask_BN]


@cache
def exact_rows(family):
    """p̂ and targets of the rounds that `filled` trains on."""
    return target_rows(filled(family, DenseStorage()))


def energies(probs, targets):
    return (torch.nn.functional.one_hot(targets, probs.shape[-1]) - probs).square().sum(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_storage_in_float32_is_exact(family):
    batch = random_batch(family)
    log = MistakeLog(policy=InOrder(), storage=DenseStorage())
    train_on(small_module(tiny_model(family), 1), [batch], log)
    probs, _ = target_rows(log)
    logits = trace_pilot(tiny_pilot(family), batch, StatePooler()).logits_BNV
    assert torch.equal(probs, logits.softmax(-1)[batch.target_mask_BN])
    assert log.statistics().get("truncation_error", 0.0) == 0.0


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_dense_storage_in_half_precision_is_close_and_half_as_large(dtype, tolerance):
    exact, half = filled("t5", DenseStorage()), filled("t5", DenseStorage(dtype))
    probs, rounded = target_rows(exact)[0], target_rows(half)[0]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, probs, rtol=tolerance, atol=1e-6)
    sizes = [sum(logged.tensors["probs"].nbytes for logged in log.rounds) for log in (exact, half)]
    assert sizes[1] * 2 == sizes[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [1, 3, 8, VOCAB - 1])
def test_top_k_keeps_the_target_exactly_loses_at_most_its_bound_and_sums_to_one(family, k):
    probs, targets = exact_rows(family)
    kept, same_targets = target_rows(filled(family, TopKStorage(k)))
    assert torch.equal(targets, same_targets)

    top = probs.topk(k).values
    bound = (1 - top.sum(-1)).clamp_min(0) * top[:, -1]
    lost = (kept - probs).square().sum(-1)
    assert (lost <= bound + 1e-9).all()
    if k < 8:
        assert lost.max() > 1e-6  # the bound is put to the test
    index = targets[:, None]
    assert torch.equal(kept.gather(-1, index), probs.gather(-1, index))
    torch.testing.assert_close(kept.sum(-1), torch.ones(len(kept)), atol=1e-5, rtol=0)
    assert (kept >= 0).all()
    assert torch.equal(kept.topk(k).values[:, 0], top[:, 0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reported_truncation_error_is_that_of_the_target_tokens(family):
    probs, targets = exact_rows(family)
    log = filled(family, TopKStorage(2))
    kept, _ = target_rows(log)
    expected = ((kept - probs).square().sum() / energies(probs, targets).sum()).sqrt().item()
    assert expected > 1e-3
    assert log.statistics()["truncation_error"] == pytest.approx(expected, rel=1e-4)


def test_keeping_more_entries_loses_less():
    errors = [filled("t5", TopKStorage(k), rounds=1).statistics()["truncation_error"] for k in (1, 4, 12, VOCAB)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[2]


@pytest.mark.parametrize("k", [VOCAB, VOCAB + 100])
def test_keeping_all_entries_is_exact(k):
    log = filled("llama", TopKStorage(k))
    assert torch.equal(target_rows(log)[0], exact_rows("llama")[0])
    assert log.statistics()["truncation_error"] == 0


@pytest.mark.parametrize(
    "storage", [DenseStorage(), DenseStorage("bfloat16"), TopKStorage(5), TopKStorage(5, "float16")]
)
def test_the_bytes_estimated_for_a_token_are_the_bytes_it_takes(storage):
    log = filled("llama", storage, rounds=1)
    tensors = log.rounds[0].tensors
    stored = sum(tensors[name].nbytes for name in storage.names)
    assert stored == tensors["targets"].numel() * storage.bytes_per_token(VOCAB, 16, torch.float32)


@pytest.mark.slow
def test_top_k_stores_less_than_dense_and_the_copilot_still_learns_from_it():
    log = MistakeLog(storage=TopKStorage(4))
    batches = [random_batch("t5", seed=seed % 2) for seed in range(30)]
    losses = train_on(small_module(tiny_model("t5"), 30, pilot=None), batches, log)
    assert losses.copilot[-1] < 0.8 * losses.copilot[0]


@pytest.mark.parametrize("storage", [DenseStorage, partial(TopKStorage, 2)])
def test_a_mistake_beyond_float16_still_teaches(storage):
    model, batch = tiny_model("llama", kind="head", head="full", hidden=8), random_batch("llama", rows=1, targets=[1])
    states = trace_pilot(model.pilot, batch, model.copilot.pooler)
    states.logits_BNV = torch.zeros_like(states.logits_BNV).index_fill(-1, torch.tensor(5), 20.0)  # p̂_y is 2e-9
    gradients = []
    for dtype in ("float32", "float16"):
        log = MistakeLog(storage=storage(dtype=dtype))
        log.append(states)
        record, weight = log.sample(1), model.copilot.head.weight
        hidden, _ = model.copilot(torch.zeros(1, 1, 0), None, None, record.states_BNP)
        (gradient,) = torch.autograd.grad(objective_sum(CrossEntropy(), model.copilot, record, hidden), weight)
        gradients.append(gradient)
    assert gradients[0].norm() > 1
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-3)


def test_keeping_no_entry_is_refused():
    with pytest.raises(ValueError, match="k=0"):
        TopKStorage(0)


ENCODER_DECODERS = ("t5", "bart")
OTHERS = [family for family in EVERY_FAMILY if family not in ("llama", "t5")]
EACH_FAMILY = ["llama", "t5", *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)]
LORA_TARGETS = {"gpt2": ("lm_head",), "t5": ("q", "v", "wi", "wo"), "bart": ("q_proj", "v_proj", "fc1", "fc2")}


class TwoLogs(MistakeLog):
    """A log that hands all it is given to a second one too, so that both hold the same rounds."""

    def __init__(self, other, **options):
        super().__init__(policy=InOrder(), **options)
        self.other = other

    def append(self, states, extend=False):
        self.other.append(states, extend)
        super().append(states, extend)


def with_adapters(tiny_pilot, family, targets=None, **changes):
    """A fused model whose Pilot learns by adapters, and the kind of batches that it takes."""
    kind = "t5" if family in ENCODER_DECODERS else "llama"
    model = tiny_model(kind, pilot=tiny_pilot(family, **changes))
    lora = Lora(r=4, alpha=32, dropout=0.1)
    lora.targets = targets or LORA_TARGETS.get(family, lora.targets)
    lora(model.pilot)
    return kind, model


def trained_with(tiny_pilot, family, rounds=4, **options):
    """A dense log and one of head inputs, filled by the same rounds of LoRA, and the trained model."""
    kind, model = with_adapters(tiny_pilot, family)
    log = TwoLogs(MistakeLog(policy=InOrder(), storage=FrozenHeadStorage()))
    batches = [random_batch(kind, rows=4, seed=seed, vocab=56) for seed in range(rounds)]
    train_on(small_module(model, rounds, pilot=learner(lr=5e-2)), batches, log, **options)
    return log, log.other, model, batches


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_errors_rebuilt_through_the_frozen_head_are_those_of_the_rounds_they_come_from(tiny_pilot, family):
    dense, compact, model, batches = trained_with(tiny_pilot, family)
    expected, rebuilt = dense.sample(len(dense)), compact.sample(len(compact))
    mask = expected.target_mask_BN
    torch.testing.assert_close(rebuilt.probs_BNV[mask], expected.probs_BNV[mask], atol=1e-6, rtol=0)
    torch.testing.assert_close(rebuilt.errors_BNV[mask], expected.errors_BNV[mask], atol=1e-6, rtol=0)
    for name in ("source_BMP", "source_mask_BM", "states_BNP", "targets_BN", "target_mask_BN"):
        assert torch.equal(getattr(rebuilt, name), getattr(expected, name)), name
    now = trace_pilot(model.pilot.eval(), batches[0], StatePooler()).logits_BNV.softmax(-1)
    assert (now[batches[0].target_mask_BN] - target_rows(compact)[0][: batches[0].tokens]).abs().max() > 1e-2
    assert compact.statistics()["error_energy"] == dense.statistics()["error_energy"]


@pytest.mark.slow
def test_in_bf16_mixed_the_heads_input_is_kept_in_bfloat16_and_loses_nothing(tiny_pilot):
    dense, compact, _, _ = trained_with(tiny_pilot, "llama", precision="bf16-mixed")
    assert compact.rounds[0].tensors["head_input"].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        expected, rebuilt = target_rows(dense)[0], target_rows(compact)[0]
    torch.testing.assert_close(rebuilt, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", [*EACH_FAMILY, "gpt2"])
def test_with_a_frozen_embedding_a_record_keeps_prompt_ids_and_gives_the_same_source(tiny_pilot, family):
    kind, model = with_adapters(tiny_pilot, family)
    batch = random_batch(kind, rows=5, seed=1, vocab=56)
    states = trace_pilot(model.pilot, batch, StatePooler())
    log = MistakeLog(policy=InOrder())
    log.append(states)
    assert ("source_ids" in log.rounds[0].tensors) == (family not in (*ENCODER_DECODERS, "gpt2"))
    assert ("source" in log.rounds[0].tensors) == (family in (*ENCODER_DECODERS, "gpt2"))  # it adds positions
    record = log.sample(5)
    assert torch.equal(record.source_BMP[record.source_mask_BM], states.source_BMP[batch.source_mask_BM])
    assert not record.source_BMP[~record.source_mask_BM].any()


def test_a_log_says_what_it_keeps(tiny_pilot):
    _, adapted = with_adapters(tiny_pilot, "llama")
    compact = MistakeLog(storage=FrozenHeadStorage(), dtype="bfloat16")
    assert compact.describe(adapted.pilot) == "prompt ids, h̄ (bfloat16), the input of the frozen head"
    assert MistakeLog().describe(tiny_pilot("llama")) == "X̃ (float32), h̄ (float32), p̂ (float32)"
    of_head = MistakeLog().describe(tiny_pilot("llama"), StackedStates((0.8, 1.0)))
    assert of_head == "states at depths 0.8, 1 (float32), p̂ (float32)"
    topk = MistakeLog(storage=TopKStorage(9, "float16")).describe(tiny_pilot("t5"))
    assert topk == "X̃ (float32), h̄ (float32), the 9 largest entries of p̂ (float16)"


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_the_heads_input_of_a_head_that_is_trained_is_refused(family):
    log = MistakeLog(storage=FrozenHeadStorage())
    with pytest.raises(ValueError, match=r"head is trained.*adapter@pilot\.adapter=lora"):
        train_on(small_module(tiny_model(family), 1), [random_batch(family)], log)
    assert not len(log)


def test_a_head_with_an_adapter_counts_as_trained(tiny_pilot):
    _, model = with_adapters(tiny_pilot, "llama", targets=("q_proj", "lm_head"), tie_word_embeddings=False)
    with pytest.raises(ValueError, match="head is trained"):
        MistakeLog(storage=FrozenHeadStorage()).describe(model.pilot)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_pilot_needs_no_adapter(family):
    log = TwoLogs(MistakeLog(policy=InOrder(), storage=FrozenHeadStorage()))
    train_on(small_module(tiny_model(family), 2, pilot=None), [random_batch(family, seed=s) for s in range(2)], log)
    torch.testing.assert_close(target_rows(log.other)[0], target_rows(log)[0], atol=1e-6, rtol=0)


def test_an_embedding_that_thaws_while_the_log_holds_prompt_ids_is_refused(tiny_pilot):
    kind, model = with_adapters(tiny_pilot, "llama")
    log, batch = MistakeLog(), random_batch(kind)
    log.append(trace_pilot(model.pilot, batch, StatePooler()))
    model.pilot.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="start a new log"):
        log.append(trace_pilot(model.pilot, batch, StatePooler()))


def test_a_restored_log_of_head_inputs_asks_for_the_pilot_until_a_round_is_appended(tiny_pilot):
    _, compact, model, batches = trained_with(tiny_pilot, "llama")
    restored = MistakeLog(policy=InOrder(), storage=FrozenHeadStorage())
    restored.load_state_dict(compact.state_dict())
    with pytest.raises(ValueError, match="needs the Pilot"):
        restored.sample(3)
    restored.pilot = model.pilot
    assert all(torch.equal(old, new) for old, new in zip(compact.sample(9), restored.sample(9), strict=True))
    restored.pilot = None
    restored.append(trace_pilot(model.pilot, batches[0], StatePooler()))
    assert len(restored.sample(99).targets_BN) == 20


@pytest.mark.parametrize(
    ("width", "vocab", "least"), [(2048, 128_256, 50), (896, 151_936, 50), (3072, 128_256, 40), (2048, 151_936, 50)]
)
def test_head_inputs_of_large_vocabularies_are_many_times_smaller_than_p(width, vocab, least):
    sizes = [s.bytes_per_token(vocab, width, torch.bfloat16) for s in (DenseStorage("bfloat16"), FrozenHeadStorage())]
    assert sizes[0] / sizes[1] > least


def test_many_records_are_rebuilt_a_few_rows_at_a_time(tiny_pilot, monkeypatch):
    _, compact, _, _ = trained_with(tiny_pilot, "llama", rounds=2)
    whole = compact.sample(8)
    monkeypatch.setattr("tcopilot.mistake_log.storage.CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(compact.sample(8).probs_BNV, whole.probs_BNV, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_the_copilot_learns_the_same_from_rebuilt_errors_as_from_kept_ones(tiny_pilot):
    learned = []
    for storage in (DenseStorage(), FrozenHeadStorage()):
        kind, model = with_adapters(tiny_pilot, "qwen2")
        torch.manual_seed(5)  # dropout of the adapters
        batches = [random_batch(kind, rows=6, seed=seed, vocab=56) for seed in range(6)]
        log = MistakeLog(storage=storage, seed=1)
        learned.append(train_on(small_module(model, 6, copilot_batch_size=4), batches, log))
    assert learned[0].copilot == pytest.approx(learned[1].copilot, rel=1e-5)
    assert learned[0].copilot[-1] != learned[0].copilot[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "spill"),
    [
        ("frozen_head", True),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (("frozen_head", False), ("dense", True), ("dense", False))
        ),
    ],
)
def test_a_run_with_adapters_keeps_about_what_was_estimated(storage, spill, tmp_path, monkeypatch):
    logs, estimates = [], []
    append, estimate = MistakeLog.append, console.log_bytes
    monkeypatch.setattr(
        MistakeLog, "append", lambda log, *given, **more: (logs.append(log), append(log, *given, **more))
    )
    monkeypatch.setattr(console, "log_bytes", lambda *given: estimates.append(estimate(*given)) or estimates[-1])
    overrides = [f"mistake_log.log.spill={tmp_path / 'spill'}"] if spill else []
    composed.train(
        tmp_path / "run", *composed.SMALL, "pilot=tiny_llama", "adapter@pilot.adapter=lora", "fusion.weight=0",
        f"log_storage@mistake_log.log.storage={storage}", *overrides,
    )  # fmt: skip
    assert estimates[0] == pytest.approx(logs[-1].nbytes, rel=0.25)
    assert (tmp_path / "spill").exists() == spill
