"""What the Mistake Log loses by storing less of p̂, on logs filled by real rounds of training."""

import pytest
import torch
from training import FAMILIES, VOCAB, InOrder, learner, random_batch, small_module, tiny_model, tiny_pilot, train_on

from tcopilot.log_storage import DenseStorage, TopKStorage
from tcopilot.mistake_log import MistakeLog
from tcopilot.states import StatePooler, trace_pilot


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
    probs, targets = target_rows(filled(family, DenseStorage()))
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
    probs, targets = target_rows(filled(family, DenseStorage()))
    log = filled(family, TopKStorage(2))
    kept, _ = target_rows(log)
    expected = ((kept - probs).square().sum() / energies(probs, targets).sum()).sqrt().item()
    assert expected > 1e-3
    assert log.statistics()["truncation_error"] == pytest.approx(expected, rel=1e-4)


def test_keeping_more_entries_loses_less():
    errors = [filled("t5", TopKStorage(k)).statistics()["truncation_error"] for k in (1, 4, 12, VOCAB)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[2]


@pytest.mark.parametrize("k", [VOCAB, VOCAB + 100])
def test_keeping_all_entries_is_exact(k):
    log = filled("llama", TopKStorage(k))
    assert torch.equal(target_rows(log)[0], target_rows(filled("llama", DenseStorage()))[0])
    assert log.statistics()["truncation_error"] == 0


@pytest.mark.parametrize(
    "storage", [DenseStorage(), DenseStorage("bfloat16"), TopKStorage(5), TopKStorage(5, "float16")]
)
def test_the_bytes_estimated_for_a_token_are_the_bytes_it_takes(storage):
    log = filled("llama", storage, rounds=1)
    tensors = log.rounds[0].tensors
    stored = sum(tensors[name].nbytes for name in storage.names)
    assert stored == tensors["targets"].numel() * storage.bytes_per_token(VOCAB)


def test_top_k_stores_less_than_dense_and_the_copilot_still_learns_from_it():
    log = MistakeLog(storage=TopKStorage(4))
    batches = [random_batch("t5", seed=seed % 2) for seed in range(30)]
    losses = train_on(small_module(tiny_model("t5"), 30, pilot=None), batches, log)
    assert losses.copilot[-1] < 0.8 * losses.copilot[0]


def test_keeping_no_entry_is_refused():
    with pytest.raises(ValueError, match="k=0"):
        TopKStorage(0)
