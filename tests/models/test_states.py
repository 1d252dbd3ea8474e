import pytest
import torch
from family_models import of_families

from tcopilot.models.states import StatePooler, position_ids, trace_pilot


def real_tokens(batch, row):
    """Prompt and target of one row without padding, each [1, length]."""
    source = batch.source_ids_BM[row][batch.source_mask_BM[row]]
    return source[None], batch.target_ids_BN[row][batch.target_mask_BN[row]][None]


def forward_alone(pilot, source, target, **options):
    """The model's own forward on one text; returns its outputs and the positions that predict the target."""
    if pilot.config.is_encoder_decoder:
        start = torch.tensor([[pilot.config.decoder_start_token_id]])
        shifted = torch.cat([start, target[:, :-1]], dim=1)
        return pilot(input_ids=source, decoder_input_ids=shifted, **options), slice(0, target.shape[1])
    first = source.shape[1] - 1
    return pilot(torch.cat([source, target], dim=1), **options), slice(first, first + target.shape[1])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", of_families())
def test_traced_logits_are_those_of_the_models_own_forward_on_the_text_alone(tiny_pilot, make_batch, family, padded):
    pilot = tiny_pilot(family)
    batch = make_batch(pilot, padded)
    states = trace_pilot(pilot, batch, StatePooler())
    assert states.logits_BNV.shape == (3, 5, 56)
    for row in range(3):
        source, target = real_tokens(batch, row)
        alone, predicting = forward_alone(pilot, source, target)
        traced = states.logits_BNV[row, : target.shape[1]]
        torch.testing.assert_close(traced, alone.logits[0, predicting], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", of_families())
def test_the_source_is_the_embedded_prompt_or_the_encoders_output(tiny_pilot, make_batch, family):
    pilot = tiny_pilot(family)
    batch = make_batch(pilot)
    states = trace_pilot(pilot, batch, StatePooler())
    for row in range(3):
        source, target = real_tokens(batch, row)
        alone, _ = forward_alone(pilot, source, target, output_hidden_states=True)
        if pilot.config.is_encoder_decoder:
            expected = alone.encoder_last_hidden_state[0]
        else:
            expected = alone.hidden_states[0][0, : source.shape[1]]
        traced = states.source_BMP[row][batch.source_mask_BM[row]]
        torch.testing.assert_close(traced, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", of_families())
@pytest.mark.parametrize(("pooling", "layer_range"), [("mean", "all"), ("max", "first_half"), ("sum", "second_half")])
def test_traced_states_pool_the_decoder_layers_that_predict_each_target(
    tiny_pilot, make_batch, family, pooling, layer_range
):
    pilot = tiny_pilot(family)
    batch = make_batch(pilot)
    states = trace_pilot(pilot, batch, StatePooler(pooling, layer_range))
    for row in range(3):
        source, target = real_tokens(batch, row)
        alone, predicting = forward_alone(pilot, source, target, output_hidden_states=True)
        hidden = alone.decoder_hidden_states if pilot.config.is_encoder_decoder else alone.hidden_states
        chosen = {"all": hidden[1:], "first_half": hidden[1:3], "second_half": hidden[3:]}[layer_range]
        stacked = torch.stack(chosen)[:, 0, predicting]
        expected = stacked.amax(0) if pooling == "max" else getattr(stacked, pooling)(0)
        torch.testing.assert_close(states.states_BNP[row, : target.shape[1]], expected, atol=1e-4, rtol=1e-4)


def test_the_last_pooled_layer_is_after_the_final_norm(tiny_pilot, make_batch):
    pilot = tiny_pilot("llama", layers=1)
    states = trace_pilot(pilot, make_batch(pilot), StatePooler())
    torch.testing.assert_close(pilot.lm_head(states.states_BNP), states.logits_BNV)


def test_h_of_an_encoder_decoder_pools_decoder_layers_not_encoder_layers(tiny_pilot, make_batch):
    pilot = tiny_pilot("t5", layers=4, num_layers=2)
    seen = []
    for block in pilot.decoder.block[:3]:
        block.register_forward_hook(lambda module, given, out: seen.append(out[0]))
    pilot.decoder.final_layer_norm.register_forward_hook(lambda module, given, out: seen.append(out))
    states = trace_pilot(pilot, make_batch(pilot), StatePooler())
    assert len(seen) == 4
    torch.testing.assert_close(states.states_BNP, torch.stack(seen).mean(0))


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_only_the_logits_carry_a_gradient(tiny_pilot, make_batch, family):
    pilot = tiny_pilot(family)
    states = trace_pilot(pilot, make_batch(pilot), StatePooler())
    assert states.logits_BNV.requires_grad
    assert not states.source_BMP.requires_grad
    assert not states.states_BNP.requires_grad


@pytest.mark.parametrize("family", of_families("llama", "gemma2", "t5", "bart"))
def test_what_stands_in_the_padding_changes_nothing(tiny_pilot, make_batch, family):
    pilot = tiny_pilot(family)
    batch = make_batch(pilot)
    states = trace_pilot(pilot, batch, StatePooler())
    batch.source_ids_BM[~batch.source_mask_BM] = 17
    batch.target_ids_BN[~batch.target_mask_BN] = 23
    other = trace_pilot(pilot, batch, StatePooler())
    mask = batch.target_mask_BN
    torch.testing.assert_close(other.logits_BNV[mask], states.logits_BNV[mask])
    torch.testing.assert_close(other.states_BNP[mask], states.states_BNP[mask])


def test_targets_masks_and_ids_are_passed_on(tiny_pilot, make_batch):
    pilot = tiny_pilot("llama")
    batch = make_batch(pilot)
    states = trace_pilot(pilot, batch, StatePooler())
    for name in ("targets_BN", "target_mask_BN", "source_mask_BM", "ids_B", "benchmark_B"):
        given = "target_ids_BN" if name == "targets_BN" else name
        assert torch.equal(getattr(states, name), getattr(batch, given)), name


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]]).bool()
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]


def test_an_unknown_pooling_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="pooling=median: use one of mean, max, sum"):
        StatePooler("median")
    with pytest.raises(ValueError, match="layer_range=odd: use one of all, first_half, second_half"):
        StatePooler("mean", "odd")
