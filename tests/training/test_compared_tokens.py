"""Joint training of a head-only Copilot compares few tokens of a large vocabulary, in place of all."""

import pytest
import torch
from family_models import perturb
from small_training import InOrder, random_batch, small_module, tiny_model, tiny_pilot, train_on

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.storage import FrozenHeadStorage, LikelyTokensStorage
from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.models.modeling import TCopilotForCausalLM, TCopilotForSeq2SeqLM
from tcopilot.models.states import trace_pilot
from tcopilot.training import compared_tokens
from tcopilot.training.compared_tokens import ComparedTokens, KeptTokens, compared_sum
from tcopilot.training.objectives import CrossEntropy, RootMeanSquaredError, objective_sum

VOCAB = 600
FAMILIES = ["t5", "llama"]


def model_of(family, **options):
    """A fused model whose Pilot learns but for its head, and a Copilot that is no longer a no-op."""
    pilot = tiny_pilot(family, vocab=VOCAB)
    pilot.get_input_embeddings().requires_grad_(False)  # tied
    pilot.get_output_embeddings().requires_grad_(False)
    torch.manual_seed(0)
    copilot = perturb(HeadCopilot.from_pilot(pilot, depths=[0.5, 1.0], hidden=16, **options), 0.1)
    kind = TCopilotForSeq2SeqLM if family == "t5" else TCopilotForCausalLM
    return kind.from_pilot(pilot, copilot)


def trained(family, storage, objective, rounds=3, **options):
    model = model_of(family, **options)
    batches = [random_batch(family, rows=5, seed=seed, vocab=VOCAB) for seed in range(rounds)]
    given = {"objective": objective, "steps_per_round": 2, "copilot_batch_size": 7}
    losses = train_on(small_module(model, rounds, **given), batches, MistakeLog(storage=storage))
    return model.copilot.state_dict(), losses


@pytest.mark.parametrize("objective", [CrossEntropy(), RootMeanSquaredError()])
@pytest.mark.parametrize(("family", "context"), [("t5", "inclusive"), ("llama", "strict")])
def test_a_copilot_learns_from_kept_tokens_what_it_learns_from_all_of_p_hat(family, context, objective):
    whole, _ = trained(family, FrozenHeadStorage(), objective, context=context)
    kept, _ = trained(family, LikelyTokensStorage(), objective, context=context)  # 600 tokens are compared whole
    new = model_of(family, context=context).copilot.state_dict()
    for name, weight in whole.items():
        torch.testing.assert_close(kept[name], weight, atol=2e-5, rtol=1e-4)
        assert not torch.equal(weight, new[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_p_hat_is_not_formed_over_a_large_vocabulary(family, monkeypatch):
    monkeypatch.setattr(compared_tokens, "SMALL_VOCABULARY", 0)
    seen, compare = [], ComparedTokens.compare
    monkeypatch.setattr(ComparedTokens, "compare", lambda *given: seen.append(compare(*given)) or seen[-1])
    monkeypatch.setattr(LikelyTokensStorage, "unpack", None)
    before = model_of(family).copilot.state_dict()
    after, _ = trained(family, LikelyTokensStorage(), CrossEntropy())
    assert len(seen) == 6
    assert all(probs.shape[-1] < VOCAB for _, probs, _ in seen)
    for corrections, probs, _ in seen:
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))
        torch.testing.assert_close(corrections.sum(-1), torch.zeros(len(probs)), atol=1e-5, rtol=0)
    assert all(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("objective", "within"), [(CrossEntropy(), 0.02), (RootMeanSquaredError(), 0.05)])
def test_the_loss_over_some_tokens_is_near_that_over_all(family, objective, within, monkeypatch):
    monkeypatch.setattr(compared_tokens, "SMALL_VOCABULARY", 0)
    model, log = model_of(family), MistakeLog(storage=LikelyTokensStorage(), policy=InOrder())
    log.append(trace_pilot(model.pilot, random_batch(family, rows=30, vocab=VOCAB), model.copilot.pooler))
    few, whole = log.sample_kept(30), log.sample(30)
    torch.manual_seed(0)
    sums = [compared_sum(objective, model.copilot, model.pilot, few)]
    inputs = few.states_BNP.new_empty(*few.targets_BN.shape, 0)
    hidden, _ = model.copilot(inputs, None, None, whole.states_BNP)
    sums.append(objective_sum(objective, model.copilot, whole, hidden))
    assert sums[0].item() == pytest.approx(sums[1].item(), rel=within)


def test_mixed_precision_rebuilds_p_hat_as_the_pilot_had_it():
    model, log = model_of("llama"), MistakeLog(storage=LikelyTokensStorage(), policy=InOrder())
    with torch.autocast("cpu", torch.bfloat16):
        states = trace_pilot(model.pilot, random_batch("llama", rows=6, vocab=VOCAB), model.copilot.pooler)
        log.append(states)
        record = log.sample_kept(6)
        head_input, normaliser, likeliest = (record.kept[name] for name in log.storage.names)
        kept = head_input, record.targets_BN, normaliser, likeliest
        kept = KeptTokens(*(tensor.flatten(0, 1)[record.tokens_R] for tensor in kept))
        hidden = torch.zeros(len(record.tokens_R), 16)
        _, probs, _ = ComparedTokens(model.copilot, model.pilot, kept, autocast=True).compare(hidden)
    expected = states.logits_BNV.float().softmax(-1)[states.target_mask_BN]
    torch.testing.assert_close(probs, expected, atol=1e-6, rtol=1e-5)


def test_a_copilot_with_layers_reads_all_of_p_hat():
    found = []
    for storage in (FrozenHeadStorage(), LikelyTokensStorage()):
        pilot = tiny_pilot("llama", vocab=VOCAB)
        pilot.get_output_embeddings().requires_grad_(False)
        model = tiny_model("llama", pilot=pilot, head_std=0.1)
        train_on(
            small_module(model, 2),
            [random_batch("llama", seed=s) for s in (0, 1)],
            MistakeLog(storage=storage),
        )
        found.append(model.copilot.state_dict())
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def test_a_log_names_the_likeliest_tokens_and_counts_their_bytes():
    model = model_of("llama")
    log = MistakeLog(storage=LikelyTokensStorage())
    said = "states at depths 0.5, 1 (float32), the input of the frozen head, the 16 likeliest tokens"
    assert log.describe(model.pilot, model.copilot.pooler) == said
    log.append(trace_pilot(model.pilot, random_batch("llama", vocab=VOCAB, targets=[3] * 4), model.copilot.pooler))
    packed = sum(log.rounds[0].tensors[name].nbytes for name in log.storage.names)
    assert packed == 12 * log.storage.bytes_per_token(VOCAB, 16, torch.float32)
    assert log.storage.bytes_per_token(VOCAB, 16, torch.float32) == 16 * 4 + 4 + 64
