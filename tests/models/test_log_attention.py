import math

import pytest
import torch
from family_models import DECODER_ONLY, of_families

from tcopilot import Copilot
from tcopilot.models.log_attention import additive, causal_mask, log_mask, log_positions
from tcopilot.models.states import StatePooler, trace_pilot

SOURCE_MASK = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()


def test_a_strict_query_reads_null_row_prompt_and_earlier_states():
    assert log_mask(SOURCE_MASK, 3, "strict").int().tolist() == [
        [[1, 0, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1, 0]],
        [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0]],
    ]


def test_an_inclusive_query_reads_its_own_state_too():
    assert log_mask(SOURCE_MASK, 2, "inclusive").int().tolist() == [
        [[1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1]],
        [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
    ]


def test_a_row_without_a_prompt_still_reads_the_null_row():
    assert log_mask(torch.tensor([[False]]), 1, "strict").int().tolist() == [[[1, 0, 0]]]


def test_rows_of_the_log_stand_where_the_pilot_stood():
    log, targets = log_positions(SOURCE_MASK, 3)
    assert log.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 0, 1, 2, 2, 3, 4]]
    assert targets.tolist() == [[1, 2, 3], [2, 3, 4]]


def test_an_error_is_read_by_its_successors_only():
    assert causal_mask(3, torch.device("cpu")).int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additive_masks_are_zero_where_visible_and_the_lowest_number_elsewhere(dtype):
    mask = additive(torch.tensor([[[True, False]]]), dtype)
    assert mask.shape == (1, 1, 1, 2)
    assert mask.dtype == dtype
    assert mask.flatten().tolist() == [0.0, torch.finfo(dtype).min]


@pytest.fixture
def case(tiny_pilot, randomise):
    """A Copilot of three layers over a Pilot of another width, with a log of 3 rows, 4 prompt tokens, 5 targets."""

    def build(family, pilot_width=24, **options):
        pilot = tiny_pilot(family, width=pilot_width)
        copilot = Copilot.from_pilot(pilot, layers=3, donor=tiny_pilot(family, seed=1), **options).eval()
        generator = torch.Generator().manual_seed(2)
        mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
        log = {
            "inputs_BNC": torch.randn(3, 5, 32, generator=generator),
            "source_BMP": torch.randn(3, 4, pilot_width, generator=generator),
            "source_mask_BM": mask,
            "states_BNP": torch.randn(3, 5, pilot_width, generator=generator),
        }
        return randomise(copilot), log

    return build


def run(copilot, log, **changes):
    with torch.no_grad():
        return copilot(**log | changes)[0]


def changed_targets(before, after):
    """Which of the five targets moved, in any row."""
    return ((before - after).abs().amax(dim=(0, 2)) > 1e-4).tolist()


def perturbed(tensor, *where):
    tensor = tensor.clone()
    tensor[where] += 1.0 + torch.arange(tensor.shape[-1]) % 3
    return tensor


@pytest.mark.parametrize("context", ["strict", "inclusive"])
@pytest.mark.parametrize("family", of_families())
def test_a_state_changes_only_the_corrections_that_may_read_it(case, family, context):
    copilot, log = case(family, context=context)
    before = run(copilot, log)
    for position in range(5):
        states = perturbed(log["states_BNP"], slice(None), position)
        first = position + 1 if context == "strict" else position
        moved = changed_targets(before, run(copilot, log, states_BNP=states))
        assert moved == [target >= first for target in range(5)], position


@pytest.mark.parametrize("pattern", [1, 2, 3, 4])
@pytest.mark.parametrize("positions", ["pilot", "none"])
@pytest.mark.parametrize("family", of_families())
def test_an_input_changes_only_its_own_and_later_corrections(case, family, positions, pattern):
    copilot, log = case(family, positions=positions, pattern=pattern)
    inputs = perturbed(log["inputs_BNC"], slice(None), 2)
    moved = changed_targets(run(copilot, log), run(copilot, log, inputs_BNC=inputs))
    reads_the_past = family in ("t5", "bart") or pattern != 2  # pattern 2 leaves no self-attention over errors
    assert moved == [False, False, True, reads_the_past, reads_the_past]


@pytest.mark.parametrize("family", of_families())
def test_an_error_changes_only_later_corrections(case, family):
    copilot, log = case(family)
    errors = torch.randn(3, 4, 56, generator=torch.Generator().manual_seed(5))
    before = run(copilot, log, inputs_BNC=copilot.inputs(errors).detach())
    after = run(copilot, log, inputs_BNC=copilot.inputs(perturbed(errors, slice(None), 1)).detach())
    assert changed_targets(before, after) == [False, False, True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("family", of_families())
def test_the_prompt_reaches_every_target_and_its_padding_none(case, family):
    copilot, log = case(family)
    before = run(copilot, log)
    padding = log["source_BMP"].masked_fill(~log["source_mask_BM"][..., None], 3.0)
    assert torch.equal(run(copilot, log, source_BMP=padding), before)
    assert (
        changed_targets(before, run(copilot, log, source_BMP=perturbed(log["source_BMP"], slice(None), 3)))
        == [True] * 5
    )


@pytest.mark.parametrize("family", of_families())
def test_a_padded_row_equals_the_row_alone(case, family):
    copilot, log = case(family)
    together = run(copilot, log)
    alone = {name: tensor[:1, 2:] if "source" in name else tensor[:1] for name, tensor in log.items()}
    torch.testing.assert_close(run(copilot, alone), together[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", of_families())
def test_the_first_target_of_a_strict_copilot_reads_the_prompt_alone(case, family):
    copilot, log = case(family)
    before = run(copilot, log)[:, :1]
    others = {"states_BNP": torch.randn(3, 5, 24), "inputs_BNC": torch.randn(3, 5, 32)}
    others["inputs_BNC"][:, 0] = log["inputs_BNC"][:, 0]
    torch.testing.assert_close(run(copilot, log, **others)[:, :1], before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", of_families("llama", "gemma2", "qwen3"))
def test_positions_of_the_pilot_matter_and_none_forgets_them(case, family):
    """Reversing the prompt rows changes the log's order; without positions attention cannot see it."""
    for positions in ("pilot", "none"):
        copilot, log = case(family, positions=positions)
        one = {name: tensor[2:] for name, tensor in log.items()}
        before = run(copilot, one)
        after = run(copilot, one, source_BMP=one["source_BMP"].flip(1))
        assert torch.allclose(before, after, atol=1e-4) == (positions == "none")


@pytest.mark.parametrize(
    "family", of_families("t5", "bart", "llama", "mistral", "qwen2", "qwen3", "gemma")
)  # gemma2 has no sdpa
def test_eager_and_sdpa_attention_agree(case, family):
    copilot, log = case(family)
    assert copilot.body.config._attn_implementation == "sdpa"
    before = run(copilot, log)
    copilot.body.set_attn_implementation("eager")
    torch.testing.assert_close(run(copilot, log), before, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", of_families(*DECODER_ONLY))
def test_rows_of_the_log_are_read_at_the_scale_that_the_projections_were_trained_on(tiny_pilot, family):
    """Norms as in SmolLM2, about 0.25: rows of unit scale would make keys and values four times too large."""
    pilot = tiny_pilot(family)
    decoder = pilot.get_decoder()
    with torch.no_grad():
        for layer in decoder.layers:
            layer.input_layernorm.weight.mul_(0.1).add_(0.15 - float(family.startswith("gemma")))
        copilot = Copilot.from_pilot(pilot, pattern=2).eval()
        rows, at = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)), torch.arange(6)[None]
        rotary = decoder.rotary_emb(rows, position_ids=at)
        mask = additive(causal_mask(6, rows.device), rows.dtype)
        for layer, own in zip(decoder.layers, copilot.body.layers, strict=True):
            inputs = layer.input_layernorm(5 * rows)
            expected, _ = layer.self_attn(inputs, position_embeddings=rotary, attention_mask=mask)
            unit = copilot.source_in(5 * rows)
            given = {"position_embeddings": rotary, "attention_mask": None}
            log = {"log_BSC": unit, "log_mask": mask, "log_places": {"position_embeddings": rotary}}
            found, _ = own.self_attn(inputs, **given, **log)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_pilot_of_another_width_is_read_at_unit_scale_too(tiny_pilot):
    copilot = Copilot.from_pilot(tiny_pilot("llama", width=64), layers=2, donor=tiny_pilot("llama"))
    rows = 7 * torch.randn(1, 100, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for read in (copilot.source_in, copilot.states_in):
            assert 0.85 < read(rows).square().mean().sqrt() < 1.15


@pytest.mark.parametrize("family", of_families("t5", "bart"))
def test_cross_attention_reads_the_encoders_output_at_the_scale_it_has_in_the_pilot(tiny_pilot, make_batch, family):
    pilot = tiny_pilot(family)
    norm = pilot.get_encoder().final_layer_norm if family == "t5" else pilot.get_encoder().layers[-1].final_layer_norm
    with torch.no_grad():
        norm.weight.fill_(0.2)
        if family == "bart":
            norm.bias.zero_()
        states = trace_pilot(pilot, make_batch(pilot), StatePooler())
        copilot = Copilot.from_pilot(pilot, layers=2)
        torch.testing.assert_close(copilot.source_in(states.source_BMP), states.source_BMP, atol=1e-4, rtol=1e-3)
        scale = copilot.states_in(states.states_BNP).square().mean(-1).sqrt()
    torch.testing.assert_close(scale, torch.full_like(scale, 0.2), atol=1e-3, rtol=0)


# An independent Copilot of the llama family: weights from the state dict, one position and one head at a time.


def rms(vector, weight, eps=1e-6):
    return weight * vector / torch.sqrt(vector.square().mean(-1, keepdim=True) + eps)


def rotate(vector, position, theta=10000.0):
    half = vector.shape[-1] // 2
    angles = position * theta ** (-torch.arange(half) / half)
    first, second = vector[:half], vector[half:]
    return torch.cat([
        first * angles.cos() - second * angles.sin(),
        second * angles.cos() + first * angles.sin(),
    ])  # fmt: skip


def attend(weights, prefix, query, query_at, memory, heads=4, groups=2, width=8):
    """One query over (row, position) pairs."""
    out = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        shared = slice(head // groups * width, (head // groups + 1) * width)
        q = rotate((weights[f"{prefix}.q_proj.weight"] @ query)[own], query_at)
        keys = [rotate((weights[f"{prefix}.k_proj.weight"] @ row)[shared], at) for row, at in memory]
        values = [(weights[f"{prefix}.v_proj.weight"] @ row)[shared] for row, at in memory]
        share = torch.stack([q @ key / math.sqrt(width) for key in keys]).softmax(0)
        out.append(sum(part * value for part, value in zip(share, values, strict=True)))
    return weights[f"{prefix}.o_proj.weight"] @ torch.cat(out)


def copilot_by_hand(copilot, inputs, source, states, inclusive, log_layers=(1,)):
    """The hidden states [N, C] of one unpadded row."""
    weights = copilot.state_dict()
    log = [(weights["null"], 0)]
    for name, rows, first in (("source_in", source, 0), ("states_in", states, len(source) - 1)):
        normed = rms(rows, weights[f"{name}.norm.weight"]) @ weights[f"{name}.project.weight"].T
        log += [(row, first + i) for i, row in enumerate(normed)]
    hidden = list(inputs)
    for layer in range(3):
        prefix = f"body.layers.{layer}"
        normed = [rms(h, weights[f"{prefix}.input_layernorm.weight"]) for h in hidden]
        for i in range(len(hidden)):
            place = len(source) - 1 + i
            if layer in log_layers:
                norm = weights[f"{prefix}.self_attn.norm.weight"]
                memory = [(norm * row, at) for row, at in log[: 1 + len(source) + i + int(inclusive)]]
                hidden[i] = hidden[i] + attend(weights, f"{prefix}.self_attn.attention", normed[i], place, memory)
            else:
                past = [(normed[j], len(source) - 1 + j) for j in range(i + 1)]
                hidden[i] = hidden[i] + attend(weights, f"{prefix}.self_attn", normed[i], place, past)
            x = rms(hidden[i], weights[f"{prefix}.post_attention_layernorm.weight"])
            gate, up, down = (weights[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
            hidden[i] = hidden[i] + down @ (torch.nn.functional.silu(gate @ x) * (up @ x))
    return torch.stack([rms(h, weights["body.norm.weight"]) for h in hidden])


@pytest.mark.parametrize(("pattern", "log_layers"), [(1, (1,)), (2, (0, 1, 2))])
@pytest.mark.parametrize("context", ["strict", "inclusive"])
def test_log_attention_equals_a_loop_over_positions(case, context, pattern, log_layers):
    copilot, log = case("llama", context=context, pattern=pattern, positions="pilot")
    together = run(copilot, log)
    for row in range(3):
        source = log["source_BMP"][row][log["source_mask_BM"][row]]
        by_hand = copilot_by_hand(
            copilot, log["inputs_BNC"][row], source, log["states_BNP"][row], context == "inclusive", log_layers
        )
        torch.testing.assert_close(together[row], by_hand, atol=2e-5, rtol=1e-4)
