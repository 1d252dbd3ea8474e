import pytest
import torch
from family_models import DECODER_ONLY, EVERY_FAMILY, of_families
from transformers import PreTrainedConfig

from tcopilot import Copilot
from tcopilot.models import families
from tcopilot.models.adapters import Lora
from tcopilot.models.families import UnsupportedFamilyError
from tcopilot.models.log_attention import LogAttention
from tcopilot.models.states import StatePooler, trace_pilot


@pytest.mark.parametrize("family", of_families())
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_decoder_config_builds_a_decoder_of_the_wanted_depth(tiny_pilot, family, layers):
    config = families.decoder_config(tiny_pilot(family).config, layers)
    body = families.build_body(config)
    assert len(body.block if family == "t5" else body.layers) == layers
    assert families.decoder_depth(config) == layers
    assert body.embed_tokens is None


@pytest.mark.parametrize("family", of_families())
def test_the_decoder_config_is_a_copy(tiny_pilot, family):
    pilot = tiny_pilot(family)
    before = pilot.config.to_dict()
    families.decoder_config(pilot.config, 2)
    assert pilot.config.to_dict() == before
    assert pilot.config._attn_implementation is not None


@pytest.mark.parametrize("family", of_families())
def test_depth_counts_decoder_layers_only(tiny_pilot, family):
    assert families.decoder_depth(tiny_pilot(family, layers=4).config) == 4


@pytest.mark.parametrize("layers", [0, 5])
@pytest.mark.parametrize("family", of_families("llama", "t5", "bart"))
def test_a_depth_that_the_decoder_does_not_have_is_refused(tiny_pilot, family, layers):
    with pytest.raises(ValueError, match=rf"copilot layers={layers}: the {family} decoder has 4; choose 1 to 4"):
        families.decoder_config(tiny_pilot(family).config, layers)


@pytest.mark.parametrize("family", of_families())
def test_a_decoder_config_survives_its_dictionary(tiny_pilot, family):
    config = families.decoder_config(tiny_pilot(family).config, 2)
    values = {**config.to_dict(), "model_type": config.model_type}
    rebuilt = families.build_body(families.body_config_from_dict(values))
    shapes = {name: tensor.shape for name, tensor in families.build_body(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == shapes


@pytest.mark.parametrize("family", of_families())
def test_the_body_takes_the_first_layers_of_the_donor(tiny_pilot, family):
    donor = tiny_pilot(family)
    body = families.build_body(families.decoder_config(donor.config, 2))
    families.load_decoder_weights(body, donor)
    given = donor.get_decoder().state_dict()
    assert len(body.state_dict()) > 10
    for name, value in body.state_dict().items():
        assert torch.equal(value, given[name]), name


def test_a_donor_with_adapters_is_refused(tiny_pilot):
    donor = tiny_pilot("llama")
    Lora(r=2, alpha=4)(donor)
    with pytest.raises(ValueError, match="Build the Copilot before adapters are injected"):
        Copilot.from_pilot(donor, layers=2)


@pytest.mark.parametrize("family", of_families(*DECODER_ONLY))
def test_log_attention_replaces_the_chosen_layers_and_keeps_their_weights(tiny_pilot, family):
    body = tiny_pilot(family).get_decoder()
    stock = [layer.self_attn for layer in body.layers]
    families.install_log_attention(body, [1, 3])
    assert [isinstance(layer.self_attn, LogAttention) for layer in body.layers] == [False, True, False, True]
    assert body.layers[1].self_attn.attention is stock[1]


@pytest.mark.parametrize("family", of_families())
def test_input_embeddings_are_what_the_first_layer_reads(tiny_pilot, family):
    pilot = tiny_pilot(family, **({"scale_embedding": True} if family == "bart" else {}))
    matrix = families.input_embeddings(pilot)
    ids = torch.tensor([[5, 9, 3]])
    seen = []
    decoder = pilot.get_decoder()
    decoder.embed_tokens.register_forward_hook(lambda module, given, out: seen.append(out))
    pilot(input_ids=ids, **({"decoder_input_ids": ids} if pilot.config.is_encoder_decoder else {}))
    torch.testing.assert_close(matrix[ids], seen[0])
    assert not matrix.requires_grad


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_the_embedding_scale_of_gemma_is_included(tiny_pilot, family):
    pilot = tiny_pilot(family)
    torch.testing.assert_close(families.input_embeddings(pilot), pilot.get_input_embeddings().weight.data * 32**0.5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_without_positions_an_encoder_decoder_cannot_tell_the_order_of_its_past(tiny_pilot, family):
    body = tiny_pilot(family).get_decoder()
    inputs, log = torch.randn(1, 4, 32), torch.randn(1, 3, 32)
    swapped = inputs[:, [1, 0, 2, 3]]

    def last(rows):
        none = torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, dtype=torch.long)
        log_part = log, torch.zeros(1, 1, 4, 3), torch.zeros(1, 3, dtype=torch.long)
        return families.run_body(body, rows, *none, *log_part, None)[:, -1]

    body.embed_tokens = None
    with torch.no_grad():
        assert not torch.allclose(last(inputs), last(swapped), atol=1e-3)
        families.remove_positions(body)
        torch.testing.assert_close(last(inputs), last(swapped), atol=1e-5, rtol=1e-4)


def test_a_config_without_a_depth_is_refused():
    config = PreTrainedConfig()
    config.model_type = "odd"
    with pytest.raises(UnsupportedFamilyError, match="odd: the config does not say how many decoder layers"):
        families.decoder_depth(config)


HEADS = {family: (family, {}) for family in EVERY_FAMILY} | {
    "t5 untied": ("t5", {"tie_word_embeddings": False}),
    "t5 with dropout": ("t5", {"dropout_rate": 0.3}),
    "bart with dropout": ("bart", {"dropout": 0.3}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "gemma2 with a tight cap": ("gemma2", {"final_logit_softcapping": 0.5}),
    "gemma2 without a cap": ("gemma2", {"final_logit_softcapping": None}),
}


@pytest.mark.parametrize("case", HEADS)
def test_logits_from_the_heads_input_are_those_of_the_models_own_forward(tiny_pilot, make_batch, case):
    family, changes = HEADS[case]
    pilot = tiny_pilot(family, **changes).train()
    if family == "bart":
        pilot.final_logits_bias.normal_()
    states = trace_pilot(pilot, make_batch(pilot), StatePooler())
    logits = families.logits_from_head_input(pilot, states.head_input_BNP)
    torch.testing.assert_close(logits, states.logits_BNV, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", of_families("t5", "bart", "gemma2"))
def test_the_plain_head_alone_would_not_give_the_logits_of_every_family(tiny_pilot, make_batch, family):
    pilot = tiny_pilot(family, **({"final_logit_softcapping": 0.5} if family == "gemma2" else {}))
    if family == "bart":
        pilot.final_logits_bias.normal_()
    states = trace_pilot(pilot, make_batch(pilot), StatePooler())
    plain = pilot.get_output_embeddings()(states.head_input_BNP)
    assert (plain - states.logits_BNV).abs().max() > 0.1
