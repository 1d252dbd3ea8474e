"""Decoding with static caches: the tokens of dynamic ones, from one step of fixed shapes that compiles whole."""

import composed
import pytest
import torch
from family_models import EVERY_FAMILY, of_families
from peft import LoraConfig, inject_adapter_in_model
from transformers import CompileConfig

from tcopilot.app.checks.config import config_problems
from tcopilot.models.modeling import fused_class

STATIC = {"cache_implementation": "static", "disable_compile": True}
COMPILED = {
    "cache_implementation": "static",
    "compile_config": CompileConfig(backend="aot_eager", fullgraph=True, dynamic=False, mode=None),
}
VARIANTS = [  # context, feedback, head, pattern, positions
    ("strict", "observed", "linear", 1, "none"),
    ("strict", "own", "soft", 2, "pilot"),
    ("inclusive", "observed", "soft", 2, "none"),
    ("inclusive", "own", "linear", 1, "pilot"),
]


@pytest.fixture
def fuse(tiny_pilot, randomise):
    """A fused model in float64, where no tie turns on rounding; gemma2's eager attention needs float32."""

    def build(family, *, pilot=None, **options):
        pilot = tiny_pilot(family) if pilot is None else pilot
        model = fused_class(pilot.config.is_encoder_decoder).from_pilot(pilot, layers=3, **options).eval()
        randomise(model.copilot)
        return model if family == "gemma2" else model.double()

    return build


def decode(model, tokens, length=7, **options):
    torch.manual_seed(5)
    return model.generate(**tokens, max_new_tokens=length, **{"do_sample": False} | options)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant)))
@pytest.mark.parametrize("family", of_families())
def test_static_caches_give_the_tokens_of_dynamic_ones(fuse, prompts, family, variant):
    context, feedback, head, pattern, positions = variant
    options = {"context": context, "feedback": feedback, "head": head, "pattern": pattern, "positions": positions}
    model = fuse(family, **options)
    tokens = prompts(model.pilot, padded=positions == "none")
    for sampling in ({}, {"do_sample": True, "top_k": 20, "temperature": 0.8}):
        expected = decode(model, tokens, **sampling)
        assert torch.equal(decode(model, tokens, **sampling, **STATIC), expected)
    model.weight = 0.0
    assert torch.equal(decode(model, tokens, **STATIC), decode(model.pilot, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_step_compiles_as_one_graph_and_gives_the_same_tokens(fuse, prompts, family):
    model = fuse(family)
    tokens = prompts(model.pilot, padded=True)
    assert torch.equal(decode(model, tokens, **COMPILED), decode(model, tokens))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_one_compilation_serves_every_weight_and_texts_of_similar_length(fuse, prompts, family):
    model = fuse(family)
    tokens = prompts(model.pilot, padded=True)
    decode(model, tokens, **COMPILED)
    decoder = model.static_decoder
    start = 2 if family == "llama" else 0
    shorter = {name: tensor[:, start : start + 5] for name, tensor in tokens.items()}
    with torch.compiler.set_stance("fail_on_recompile"):
        for weight in (0.3, 2.0):
            model.weight = weight
            for given, length in ((tokens, 7), (shorter, 5)):
                assert torch.equal(decode(model, given, length, **COMPILED), decode(model, given, length))
    assert model.static_decoder is decoder
    with torch._dynamo.config.patch(recompile_limit=1):  # which counts for each decoder alone
        assert torch.equal(decode(model, tokens, 70, **COMPILED), decode(model, tokens, 70))
    assert model.static_decoder is not decoder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_inductor_gives_the_same_tokens(fuse, prompts, family):
    model = fuse(family)
    tokens = prompts(model.pilot, padded=True)
    assert torch.equal(decode(model, tokens, cache_implementation="static"), decode(model, tokens))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_cuda_graphs_give_the_same_tokens(fuse, prompts, family):
    model = fuse(family).cuda()
    tokens = {name: tensor.cuda() for name, tensor in prompts(model.pilot, padded=True).items()}
    for length in (10, 6):
        expected = decode(model, tokens, length)
        assert torch.equal(decode(model, tokens, length, cache_implementation="static"), expected)


@pytest.mark.parametrize("family", of_families("t5", "llama", "mistral", "bart"))
def test_several_weights_decode_at_once(fuse, prompts, family):
    model = fuse(family)
    tokens, weights = prompts(model.pilot, padded=True), [0.0, 0.4, 1.0]
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate_at_weights(weights, **tokens, **options)
    found = model.generate_at_weights(weights, **tokens, **options, **STATIC)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("patience", [pytest.param(1, marks=pytest.mark.slow), 3, 50])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_rows_end_at_their_own_step_however_seldom_one_looks(fuse, prompts, monkeypatch, family, patience):
    model = fuse(family)
    tokens = prompts(model.pilot, padded=True)
    start = 1 if family == "t5" else 7
    free = decode(model, tokens, length=12, eos_token_id=[-1])[:, start:]  # no token ends a row
    options = {"eos_token_id": [int(free[0, 2]), int(free[1, 5]), int(free[2, 4])], "pad_token_id": 0}
    expected = decode(model, tokens, 12, **options)
    assert expected.shape[1] <= start + 6
    monkeypatch.setattr("tcopilot.models.static_decoding._patience", lambda _: patience)
    assert torch.equal(decode(model, tokens, 12, **options, **STATIC), expected)


@pytest.mark.parametrize("family", ["mistral", *of_families("gemma2", "qwen3")])
def test_a_sliding_window_shorter_than_the_text_is_kept(fuse, tiny_pilot, prompts, family):
    sliding = {"sliding_window": 4}
    if family == "qwen3":
        sliding |= {"use_sliding_window": True, "max_window_layers": 1}
    model = fuse(family, pilot=tiny_pilot(family, **sliding))
    tokens = prompts(model.pilot, padded=True)
    expected = decode(model, tokens)
    assert torch.equal(decode(model, tokens, **STATIC), expected)
    assert not torch.equal(expected, decode(fuse(family), tokens)), "the window must matter"


def test_a_copilot_that_is_not_shown_the_states_stays_blind_to_them(fuse, prompts):
    model = fuse("llama", reads=["errors", "source"])
    tokens = prompts(model.pilot, padded=True)
    assert torch.equal(decode(model, tokens, **STATIC), decode(model, tokens))


def test_adapters_may_be_in_place(fuse, prompts):
    model = fuse("llama")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False), model.pilot)
    model.double()
    tokens = prompts(model.pilot, padded=True)
    assert torch.equal(decode(model, tokens, **STATIC), decode(model, tokens))


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_scores_and_logits_are_returned_as_without(fuse, prompts, family):
    model = fuse(family)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, found = (decode(model, prompts(model.pilot), **options, **more) for more in ({}, STATIC))
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)


def test_keys_and_values_stay_where_they_are_while_and_after_decoding(fuse, prompts):
    model = fuse("llama")
    tokens = prompts(model.pilot)
    places = []
    for _ in range(2):
        decode(model, tokens, 10, **STATIC)
        cache = model.static_decoder.cache
        layers = [*cache.pilot.layers, *cache.copilot.cache.layers]
        places.append([layer.keys.data_ptr() for layer in layers])
        assert [layer.keys.shape[2] for layer in cache.pilot.layers] == [17] * 4
    assert places[0] == places[1]


def test_beams_are_refused(fuse, prompts):
    model = fuse("llama")
    with pytest.raises(ValueError, match="decodes greedily or by sampling, not with num_beams=4"):
        decode(model, prompts(model.pilot), num_beams=4, cache_implementation="static")


def test_a_config_with_static_beams_or_an_unknown_way_is_refused():
    assert not config_problems(composed.compose_config("evaluation.decoding=static"))
    (problem,) = config_problems(composed.compose_config("evaluation.decoding=static", "evaluation=beam4"))
    assert "evaluation.num_beams=4" in problem
    assert "evaluation.decoding=dynamic" in problem
    (problem,) = config_problems(composed.compose_config("evaluation.decoding=graph"))
    assert "evaluation.decoding" in problem
