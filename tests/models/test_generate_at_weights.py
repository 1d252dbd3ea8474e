"""Decoding at several λ at once: the same tokens as one λ at a time, with one reading of each prompt."""

import pytest
import torch
from family_models import FAST, of_families

from tcopilot.models.fusion import LogitFusion, ProbabilityFusion
from tcopilot.models.modeling import fused_class

WEIGHTS = [0.0, 0.4, 1.0, 3.0]
DECODING = {"greedy": {}, "beams": {"num_beams": 3}, "several": {"num_beams": 3, "num_return_sequences": 2}}


@pytest.fixture
def fuse(tiny_pilot, randomise):
    def build(family, **options):
        pilot = tiny_pilot(family)
        model = fused_class(pilot.config.is_encoder_decoder).from_pilot(pilot, layers=2, **options).eval()
        randomise(model.copilot)
        return model

    return build


def rows_read(model, call):
    """Rows and tokens of each of the Pilot's decoder passes, and of its encoder's, while `call` runs."""
    seen = {"decoder": [], "encoder": []}
    parts = {"decoder": model.pilot.get_decoder()}
    if model.config.is_encoder_decoder:
        parts["encoder"] = model.get_encoder()
    hooks = [
        part.register_forward_hook(
            lambda _, args, kwargs, out, name=name: seen[name].append(tuple(out.last_hidden_state.shape[:2])),
            with_kwargs=True,
        )
        for name, part in parts.items()
    ]
    result = call()
    for hook in hooks:
        hook.remove()
    return result, seen


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("feedback", ["observed", "own"])
@pytest.mark.parametrize("family", ["t5", pytest.param("llama", marks=pytest.mark.slow)])
def test_every_weight_gets_the_tokens_it_has_alone(fuse, prompts, family, feedback, decoding):
    model = fuse(family, feedback=feedback)
    tokens, options = (
        prompts(model.pilot, padded=True),
        {"max_new_tokens": 6, "do_sample": False, **DECODING[decoding]},
    )
    together = model.generate_at_weights(WEIGHTS, **tokens, **options)
    texts = []
    for weight, sequences in zip(WEIGHTS, together, strict=True):
        model.weight = weight
        alone = model.generate(**tokens, **options)
        width = alone.shape[1]
        assert torch.equal(sequences[:, :width], alone)
        assert (sequences[:, width:] == model.config.pad_token_id).all()
        texts.append(alone.tolist())
    assert len({str(text) for text in texts}) > 1, "the weights must not all decode alike"


@pytest.mark.parametrize("family", [family for family in of_families() if family not in FAST])
def test_other_families_sweep_too(fuse, prompts, family):
    model = fuse(family)
    tokens, options = prompts(model.pilot, padded=True), {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    together = model.generate_at_weights([0.0, 1.0], **tokens, **options)
    assert torch.equal(together[0], model.pilot.generate(**tokens, **options)[:, : together[0].shape[1]])
    model.weight = 1.0
    alone = model.generate(**tokens, **options)
    assert torch.equal(together[1][:, : alone.shape[1]], alone)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_each_prompt_is_read_once_whatever_the_beams_and_weights(fuse, prompts, family, weight):
    model = fuse(family, weight=weight)
    tokens, options = prompts(model.pilot), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    calls = {
        3: lambda: model.generate(**tokens, **options, num_beams=3),
        6: lambda: model.generate_at_weights([0.0, 1.0], **tokens, **options, num_beams=3),
    }
    for repeats, call in calls.items():
        _, seen = rows_read(model, call)
        assert seen["decoder"][0][0] == 3, "the prompt pass holds one row per prompt"
        assert [rows for rows, _ in seen["decoder"][1:]] == [3 * repeats] * 3
        if family == "t5":
            assert seen["encoder"] == [(3, 7)]


def test_weights_that_are_equal_or_zero_decode_once_and_leave_the_model_as_it_was(fuse, prompts):
    model = fuse("llama", weight=0.7)
    tokens, options = prompts(model.pilot), {"max_new_tokens": 4, "do_sample": False}
    (zero,) = model.generate_at_weights([0.0], **tokens, **options)
    assert torch.equal(zero, model.pilot.generate(**tokens, **options))
    assert model.weight == 0.7


def test_a_bare_pilot_decodes_alike_at_every_weight(tiny_pilot, prompts):
    pilot = tiny_pilot("llama")
    cls = fused_class(False)
    model = cls(cls.config_class(pilot.config), pilot).eval()
    tokens = prompts(pilot)
    first, second = model.generate_at_weights([0.0, 1.0], **tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(first, second)


def test_rows_are_not_shared_without_a_cache(fuse, prompts):
    model = fuse("llama")
    tokens, options = prompts(model.pilot), {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    assert torch.equal(
        model.generate(**tokens, **options, use_cache=False), model.generate(**tokens, **options, use_cache=True)
    )


@pytest.mark.parametrize("fusion", [ProbabilityFusion(), LogitFusion()])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_corrections_are_returned_on_demand_and_fuse_to_the_logits(fuse, prompts, family, fusion):
    model = fuse(family, fusion=fusion, weight=0.8)
    tokens = prompts(model.pilot, padded=True)
    if family == "t5":
        tokens |= {"decoder_input_ids": torch.zeros(3, 1, dtype=torch.long)}
    with torch.no_grad():
        out = model(**tokens, output_corrections=True)
        fused = model.fuse(out.pilot_log_probs, out.corrections, 0.8)
        torch.testing.assert_close(out.logits[:, -1:], fused[:, -1:])
        model.weight = 0.0
        zero = model(**tokens, output_corrections=True)
    torch.testing.assert_close(zero.corrections, out.corrections)
    assert torch.equal(model.fuse(out.pilot_log_probs, out.corrections, 0), out.pilot_log_probs)
    torch.testing.assert_close(zero.logits[:, -1].log_softmax(-1), out.pilot_log_probs[:, -1])
    assert out.corrections.abs().max() > 0.01


def test_one_weight_per_row_fuses_each_row_by_its_own(fuse, prompts):
    model = fuse("llama")
    with torch.no_grad():
        out = model(**prompts(model.pilot), output_corrections=True)
        weights = torch.tensor([0.0, 0.5, 2.0])
        together = model.fuse(out.pilot_log_probs, out.corrections, weights)
        for row, weight in enumerate(weights.tolist()):
            alone = model.fuse(out.pilot_log_probs, out.corrections, weight)
            torch.testing.assert_close(together[row], alone[row])
