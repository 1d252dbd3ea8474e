"""A common beginning that is read once gives what reading it in every row gives."""

import warnings
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from family_models import VOCAB, perturb, tiny_pilot
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from tcopilot import TCopilotForCausalLM
from tcopilot.data.batch import LEAST_PREFIX, Batch, PromptTargetCollator
from tcopilot.models.prefix import can_share, run_after_prefix
from tcopilot.models.states import StackedStates, StatePooler, trace_pilot

SHARED = LEAST_PREFIX + 3
FAMILIES = ("llama", "qwen3", "mistral", "gemma2")


def batch_with_prefix(lengths=(5, 1, 9), seed=0) -> Batch:
    """Prompts that begin alike and go on for that many tokens."""
    generator = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    prefix = some(SHARED)
    rows = [
        {
            "source_ids": [*prefix, 3 + place, *some(length - 1)],
            "target_ids": [*some(place), 1],
            "id": place,
            "benchmark": 0,
        }
        for place, length in enumerate(lengths)
    ]
    return PromptTargetCollator(0, "left")(rows)


def fused(family="llama", weight=0.7, **options) -> TCopilotForCausalLM:
    model = TCopilotForCausalLM.from_pilot(tiny_pilot(family), layers=2, weight=weight, **options).eval()
    perturb(model.copilot)
    return model


class Counted:
    """Counts the tokens that a Pilot reads."""

    def __init__(self, pilot):
        self.tokens = 0
        pilot.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, given):
        self.tokens += given["input_ids"].numel()


def test_the_collator_finds_what_prompts_share_and_only_where_it_pays():
    assert batch_with_prefix().prefix == SHARED
    rows = [{"source_ids": [5] * 40 + [place], "target_ids": [1], "id": 0, "benchmark": 0} for place in (6, 7)]
    assert PromptTargetCollator(0, "left")(rows).prefix == 40
    assert PromptTargetCollator(0, "right")(rows).prefix == 0
    assert PromptTargetCollator(0, "left")(rows[:1]).prefix == 0
    short = [row | {"source_ids": row["source_ids"][-LEAST_PREFIX:]} for row in rows]
    assert PromptTargetCollator(0, "left")(short).prefix == 0


def test_parts_of_a_batch_keep_the_prefix_on_any_device():
    batch = batch_with_prefix()
    assert [part.prefix for part in batch.split(2)] == [SHARED, SHARED]
    assert batch.to("cpu").prefix == SHARED


@pytest.mark.parametrize("pooler", [StatePooler(), StackedStates((0.5, 1.0))])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_states_and_source_are_those_of_a_whole_pass_and_the_prefix_is_read_once(family, pooler):
    pilot, batch = tiny_pilot(family), batch_with_prefix()
    whole = trace_pilot(pilot, replace(batch, prefix=0), pooler)
    counted = Counted(pilot)
    shared = trace_pilot(pilot, batch, pooler)
    assert counted.tokens == SHARED + 3 * (9 + batch.target_ids_BN.shape[1])
    mask_BN1 = batch.target_mask_BN.unsqueeze(-1)
    for name in ("logits_BNV", "states_BNP", "head_input_BNP"):
        torch.testing.assert_close(
            getattr(shared, name) * mask_BN1, getattr(whole, name) * mask_BN1, atol=1e-4, rtol=1e-4
        )
    if pooler.keeps_source:
        real = batch.source_mask_BM
        torch.testing.assert_close(shared.source_BMP[real], whole.source_BMP[real])
        assert shared.source_ids_BM is batch.source_ids_BM


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_flow_through_the_prefix(family, adapter):
    pilot, batch, gradients = tiny_pilot(family), batch_with_prefix(), []
    if adapter:
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"]), pilot)
        perturb(pilot, 0.1)
    for prefix in (0, SHARED):
        model = deepcopy(pilot)
        states = trace_pilot(model, replace(batch, prefix=prefix), StatePooler())
        log_probs_BNV = states.logits_BNV.log_softmax(-1)[batch.target_mask_BN]
        log_probs_BNV.gather(-1, batch.target_ids_BN[batch.target_mask_BN, None]).sum().backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("lora_A" in name for name in gradients[0]) == adapter
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole, atol=1e-4 * whole.abs().max().item(), rtol=1e-3)


def test_a_text_as_long_as_a_sliding_window_is_read_whole():
    pilot, batch = tiny_pilot("mistral", sliding_window=SHARED + 5), batch_with_prefix()
    whole = trace_pilot(pilot, replace(batch, prefix=0), StatePooler())
    shared = trace_pilot(pilot, batch, StatePooler())
    assert torch.equal(shared.logits_BNV, whole.logits_BNV)
    assert can_share(pilot, SHARED + 4)
    assert not can_share(pilot, SHARED + 5)


@pytest.mark.parametrize("config", [
    AutoConfig.for_model("mpt", d_model=32, n_heads=2, n_layers=2, vocab_size=VOCAB),  # distances in columns
    AutoConfig.for_model(
        "gpt_neo", hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=SHARED, vocab_size=VOCAB, max_position_embeddings=128,
    ),
], ids=["mpt", "gpt_neo"])  # fmt: skip
def test_where_padding_amid_a_text_counts_texts_are_read_whole(config):
    torch.manual_seed(0)
    pilot, batch = AutoModelForCausalLM.from_config(config).eval(), batch_with_prefix()
    with torch.no_grad():
        shared, whole = (
            trace_pilot(pilot, one, StackedStates((0.5, 1.0))) for one in (batch, replace(batch, prefix=0))
        )
    torch.testing.assert_close(shared.states_BNP[batch.target_mask_BN], whole.states_BNP[batch.target_mask_BN])
    assert not can_share(pilot, SHARED + 20)


def test_a_compiled_pilot_reads_texts_whole():
    pilot = tiny_pilot()
    assert can_share(pilot, 10)
    pilot.forward = torch.compile(pilot.forward, backend="eager")
    assert not can_share(pilot, 10)


def test_recomputed_activations_leave_no_keys_and_values_to_share():
    pilot = tiny_pilot().train()
    with warnings.catch_warnings(action="error"):  # transformers deprecates its own way to ask
        assert can_share(pilot, 10)
    pilot.gradient_checkpointing_enable({"use_reentrant": False})
    assert not can_share(pilot, 10)
    assert can_share(pilot.eval(), 10)


def test_a_cache_is_left_as_a_single_pass_leaves_it():
    pilot, batch = tiny_pilot(), batch_with_prefix()
    whole, shared = DynamicCache(), DynamicCache()
    mask, ids = batch.source_mask_BM.long(), batch.source_ids_BM
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        pilot(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=whole, use_cache=True)
        run_after_prefix(pilot, SHARED, ids, mask, shared, logits_to_keep=1)
    real_BHM = batch.source_mask_BM[:, None].expand(-1, whole.layers[0].keys.shape[1], -1)
    for one, other in zip(whole.layers, shared.layers, strict=True):
        torch.testing.assert_close(other.keys[real_BHM], one.keys[real_BHM], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(other.values[real_BHM], one.values[real_BHM], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}]
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_decoding_emits_the_same_tokens_at_every_weight_and_reads_the_prefix_once(family, options):
    model, batch = fused(family), batch_with_prefix()
    given = ([0.0, 0.5, 1.0], batch.source_ids_BM, batch.source_mask_BM.long())
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1} | options
    whole = model.generate_at_weights(*given, **options)
    counted = Counted(model.pilot)
    model.generate_at_weights(*given, batch.prefix, **options | {"max_new_tokens": 1})
    assert counted.tokens == SHARED + 3 * 9
    shared = model.generate_at_weights(*given, batch.prefix, **options)
    assert [tokens.tolist() for tokens in shared] == [tokens.tolist() for tokens in whole]
    assert len({str(tokens.tolist()) for tokens in whole}) > 1


def test_a_pilot_alone_decodes_the_same_tokens():
    model, batch = fused(weight=0.0), batch_with_prefix()
    given = {"input_ids": batch.source_ids_BM, "attention_mask": batch.source_mask_BM.long(), "max_new_tokens": 8}
    counted = Counted(model.pilot)
    shared = model.generate(**given, prefix=batch.prefix, do_sample=False)
    assert counted.tokens < batch.source_ids_BM.numel()
    assert torch.equal(shared, model.generate(**given, do_sample=False))


def test_all_logits_are_given_where_all_are_asked_for():
    model, batch = fused(), batch_with_prefix()
    given = {"input_ids": batch.source_ids_BM, "attention_mask": batch.source_mask_BM.long()}
    with torch.no_grad():
        assert torch.equal(model(**given, prefix=SHARED).logits, model(**given).logits)
