"""LoRA on Pilot and Copilot: what trains, and what is left after merging."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from small_training import (
    FAMILIES,
    InOrder,
    learner,
    random_batch,
    small_module,
    tiny_model,
    tiny_pilot,
    train_on,
    weights,
)  # fmt: skip
from torch import nn

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.adapters import Lora, merge_adapters
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.modeling import fused_class

TARGETS = {"t5": ("q", "k", "v", "wi", "wo"), "llama": ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")}


def adapted(family, dropout=0.05, train_error_input=False, **options):
    """A fused model whose Pilot and Copilot carry adapters."""
    model = tiny_model(family, head_std=0.1, train_error_input=train_error_input, **options)
    lora = Lora(r=4, alpha=8, dropout=dropout, targets=TARGETS[family])
    lora(model.pilot)
    lora(model.copilot.body)
    return model


def trained(family, rounds=3, **options):
    model = adapted(family, **options)
    before = weights(model)
    batches = [random_batch(family, seed=seed) for seed in range(rounds)]
    train_on(
        small_module(model, rounds, pilot=learner(lr=0.05), steps_per_round=2), batches, MistakeLog(policy=InOrder())
    )
    return before, model


def logits(family, model, batch):
    """The fused model's own forward pass, in eval mode."""
    model.eval()
    with torch.no_grad():
        if family == "t5":
            labels = batch.target_ids_BN
            return model(batch.source_ids_BM, batch.source_mask_BM.long(), labels=labels).logits
        ids = torch.cat([batch.source_ids_BM, batch.target_ids_BN], dim=1)
        mask = torch.cat([batch.source_mask_BM, batch.target_mask_BN], dim=1).long()
        return model(ids, mask, target_start=batch.source_ids_BM.shape[1]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_say_nothing_at_first_also_when_a_fused_model_is_made_of_what_they_adapt(family):
    pilot = tiny_pilot(family)
    Lora(r=4, alpha=8, targets=TARGETS[family])(pilot)
    fused_class(family == "t5")(TCopilotConfig(pilot.config), pilot)
    starts = [weight for name, weight in pilot.named_parameters() if "lora_B" in name]
    assert starts
    assert not any(weight.any() for weight in starts)


def has_adapters(model):
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_and_the_copilots_own_parts_train(family):
    before, model = trained(family)
    after = weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    own = ("copilot.start", "copilot.null", "copilot.source_in", "copilot.states_in", "copilot.head")
    assert {name for name in moved if "lora_" not in name and not name.startswith(own)} == set()
    adapters = {name for name in before if "lora_" in name}
    assert {name for name in adapters if name.startswith("pilot.")} <= moved
    assert any(name.startswith("copilot.body") for name in adapters & moved)
    assert {name for name in before if name.startswith(("copilot.head", "copilot.start"))} <= moved
    assert any(name.startswith("pilot.") for name in before if name not in moved)  # the frozen base is there


@pytest.mark.parametrize(("family", "stacks"), [("t5", 2), ("llama", 1)])
@pytest.mark.parametrize(("top", "kept"), [(1.0, [0, 1, 2, 3]), (0.5, [2, 3]), (0.1, [3])])
def test_adapters_of_the_last_layers_leave_the_others_alone(family, stacks, top, kept):
    pilot = tiny_pilot(family, layers=4)
    Lora(r=4, alpha=8, targets=TARGETS[family][:1], top=top)(pilot)
    found = [name.split(".") for name, part in pilot.named_modules() if isinstance(part, BaseTunerLayer)]
    numbers = {int(next(part for part in name if part.isdigit())) for name in found}
    per_layer = {"t5": 3, "llama": 1}[family]  # T5's decoder layers attend twice
    assert numbers == {*kept}
    assert len(found) == per_layer * len(kept)
    assert stacks == len({name[0] for name in found})


@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_nothing(family):
    batch = random_batch(family, seed=3)
    plain = tiny_model(family, head_std=0.1, train_error_input=False)
    assert torch.equal(logits(family, adapted(family), batch), logits(family, plain, batch))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"head": "soft"}, {"layers": 2, "pattern": 2}], ids=str)
def test_merged_adapters_give_the_same_outputs_from_a_plain_model(family, options):
    _, model = trained(family, **options)
    batch = random_batch(family, seed=9)
    before = logits(family, model, batch)
    assert has_adapters(model)
    merge_adapters(model)
    assert not has_adapters(model)
    torch.testing.assert_close(logits(family, model, batch), before, atol=1e-4, rtol=1e-4)
    fresh = tiny_model(family, train_error_input=False, **options)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in fresh.named_parameters()]
    assert not torch.allclose(before, logits(family, fresh, batch), atol=1e-3)


def test_a_merged_model_is_saved_and_loaded_as_a_plain_one(tmp_path):
    _, model = trained("llama")
    merge_adapters(model)
    batch = random_batch("llama", seed=9)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits("llama", loaded, batch), logits("llama", model, batch), atol=1e-6, rtol=0)


def test_merging_a_model_without_adapters_changes_nothing():
    model = tiny_model("llama")
    before = weights(model)
    merge_adapters(model)
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_that_the_model_does_not_have_are_refused_with_those_it_has(family):
    wrong = TARGETS["llama" if family == "t5" else "t5"]
    with pytest.raises(ValueError, match=r"targets=\[.*no linear layer is called") as caught:
        Lora(targets=wrong)(tiny_pilot(family))
    there = str(caught.value).partition("there are ")[2].split(", ")
    assert set(TARGETS[family]) <= set(there)


def test_one_misspelt_target_among_right_ones_is_refused_by_name():
    with pytest.raises(ValueError, match="no linear layer is called qproj;"):
        Lora(targets=("qproj", "k_proj"))(tiny_pilot("llama"))


def test_every_module_named_as_a_target_gets_an_adapter_and_no_other():
    pilot = tiny_pilot("llama")
    Lora(r=2, targets=("q_proj", "down_proj"))(pilot)
    named = {name.rsplit(".", 1)[-1] for name, module in pilot.named_modules() if isinstance(module, BaseTunerLayer)}
    count = sum(isinstance(module, BaseTunerLayer) for module in pilot.modules())
    assert named == {"q_proj", "down_proj"}
    assert count == 2 * 2
    assert all(p.requires_grad == ("lora_" in name) for name, p in pilot.named_parameters())


def test_the_rank_and_scale_are_those_asked_for():
    pilot = tiny_pilot("llama")
    base = pilot.model.layers[0].self_attn.q_proj.weight.detach().clone()
    Lora(r=2, alpha=6, targets=("q_proj",))(pilot)
    layer = pilot.model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.shape[0] == up.shape[1] == 2
    nn.init.normal_(up)
    expected = base + 3.0 * (up @ down).detach()
    merge_adapters(pilot)
    torch.testing.assert_close(pilot.model.layers[0].self_attn.q_proj.weight.detach(), expected)
