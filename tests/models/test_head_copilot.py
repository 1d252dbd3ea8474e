"""A Copilot that is only a head: what it reads, that it decodes as any other, and what its records keep."""

import copy

import pytest
import torch
from family_models import FAST, make_batch, of_families
from safetensors import safe_open
from small_training import learner, random_batch, small_module, task_data, train_on, vocabulary_size
from small_training import tiny_pilot as random_pilot
from torch.nn.functional import gelu
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tcopilot import TCopilotForSeq2SeqLM
from tcopilot.functional import token_errors
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.kinds import new_copilot
from tcopilot.models.modeling import fused_class
from tcopilot.models.states import trace_pilot
from tcopilot.training.error_statistics import ErrorStatistics, correct_targets
from tcopilot.training.objectives import CrossEntropy

DECODING = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True}}
HEADS = ("soft", "full", "low_rank")
DEPTHS = [0.5, 1.0]


@pytest.fixture
def fuse(tiny_pilot, randomise):
    """A tiny Pilot with a head-only Copilot whose corrections change what is decoded."""

    def build(family="llama", fresh=False, **options):
        pilot = tiny_pilot(family)
        options = {"kind": "head", "depths": DEPTHS, "hidden": 24, **options}
        model = fused_class(pilot.config.is_encoder_decoder).from_pilot(pilot, **options).eval()
        return model if fresh else (randomise(model.copilot), model)[1]

    return build


def decode(model, tokens, **options):
    torch.manual_seed(0)
    return model.generate(**tokens, **{"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **options})


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAST)
def test_a_new_one_is_the_pilot(fuse, prompts, family, head):
    model = fuse(family, fresh=True, head=head)
    batch = make_batch(model.pilot)
    _, corrections_BNV = correct_targets(model, batch)
    assert corrections_BNV.abs().max() < 1e-6
    tokens = prompts(model.pilot, padded=True)
    assert torch.equal(decode(model, tokens), model.pilot.generate(**tokens, max_new_tokens=10, do_sample=False))


@pytest.mark.parametrize(("context", "hidden"), [("inclusive", 24), ("inclusive", None), ("strict", 24)])
@pytest.mark.parametrize("family", FAST)
def test_it_reads_the_late_states_of_its_own_target(fuse, family, context, hidden):
    model = fuse(family, context=context, hidden=hidden)
    batch, copilot = make_batch(model.pilot), model.copilot
    log_probs_BNV, corrections_BNV = correct_targets(model, batch)
    states = trace_pilot(model.pilot, batch, copilot.pooler)
    width = model.pilot.config.hidden_size
    h_BNQ = states.states_BNP
    assert h_BNQ.shape[-1] == 2 * width
    torch.testing.assert_close(h_BNQ[..., width:], states.head_input_BNP)  # depth 1 is what the Pilot's head reads
    if context == "strict":
        h_BNQ = torch.cat([torch.zeros_like(h_BNQ[:, :1]), h_BNQ[:, :-1]], dim=1)
    layers = h_BNQ.split(width, dim=-1)
    scaled = torch.cat([one / (one.square().mean(-1, keepdim=True) + 1e-6).sqrt() for one in layers], dim=-1)
    z = scaled if hidden is None else gelu(scaled @ copilot.hidden.weight.T + copilot.hidden.bias)
    shift = z @ copilot.head.map.weight.T @ model.pilot.get_output_embeddings().weight.T
    expected = torch.softmax(log_probs_BNV + shift, dim=-1) - log_probs_BNV.exp()
    torch.testing.assert_close(corrections_BNV, expected)


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("context", ["inclusive", "strict"])
@pytest.mark.parametrize("family", of_families("llama", "t5", "qwen3", "bart"))
def test_cached_decoding_is_uncached(fuse, prompts, family, context, decoding):
    model = fuse(family, context=context).double()
    tokens = prompts(model.pilot, padded=True)
    found = decode(model, tokens, **DECODING[decoding])
    assert torch.equal(found, decode(model, tokens, use_cache=False, **DECODING[decoding]))
    model.weight = 0.0
    alone = decode(model, tokens, **DECODING[decoding])
    torch.manual_seed(0)
    options = {"max_new_tokens": 10, "do_sample": False, **DECODING[decoding]}
    assert torch.equal(alone, model.pilot.generate(**tokens, **options))
    if decoding == "greedy":
        assert not torch.equal(found, alone)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAST)
def test_static_decoding_is_dynamic(fuse, prompts, family, head):
    model = fuse(family, head=head).double()
    tokens = prompts(model.pilot, padded=True)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(decode(model, tokens, **static), decode(model, tokens))


def test_feedback_changes_nothing_for_a_copilot_that_reads_no_errors(fuse, prompts):
    model = fuse()
    batch, tokens = make_batch(model.pilot), prompts(model.pilot, padded=True)
    observed = correct_targets(model, batch)[1], decode(model, tokens)
    model.config.feedback = "own"
    own = correct_targets(model, batch)[1], decode(model, tokens)
    assert all(torch.equal(*pair) for pair in zip(observed, own, strict=True))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAST)
def test_an_export_is_loaded_by_the_auto_classes_and_holds_the_unembedding_once(fuse, prompts, tmp_path, family, head):
    model = fuse(family, head=head)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        kept = {name: file.get_slice(name).get_shape() for name in file.keys() if name.startswith("copilot.")}  # noqa: SIM118
    trained = {f"copilot.{name}": list(one.shape) for name, one in model.copilot.named_parameters()}
    assert kept == trained
    auto = AutoModelForSeq2SeqLM if isinstance(model, TCopilotForSeq2SeqLM) else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path)
    tokens = prompts(model.pilot, padded=True)
    assert torch.equal(decode(again, tokens), decode(model, tokens))


def test_a_copy_of_the_model_reads_its_own_pilot(fuse, prompts):
    model = fuse()
    other, tokens = copy.deepcopy(model), prompts(model.pilot)
    assert other.copilot.unembedding_VC.data_ptr() == other.pilot.get_output_embeddings().weight.data_ptr()
    before = decode(model, tokens)
    with torch.no_grad():
        other.pilot.get_output_embeddings().weight.zero_()
    assert torch.equal(decode(model, tokens), before)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"depths": []}, "copilot.depths=.*shares of the Pilot's depth"),
        ({"depths": [1.2]}, "copilot.depths=.*shares of the Pilot's depth"),
        ({"hidden": 0}, "copilot.hidden=0"),
        ({"head": "linear"}, "copilot.head=linear: use one of soft, full, low_rank"),
        ({"kind": "none"}, "copilot.kind=none: use one of decoder, head"),
    ],
)
def test_settings_that_make_no_copilot_are_refused(tiny_pilot, option, said):
    with pytest.raises(ValueError, match=said):
        new_copilot(tiny_pilot(), **{"kind": "head", **option})


@pytest.mark.parametrize("family", FAST)
def test_a_record_keeps_no_source_and_gives_the_errors_back(fuse, family):
    model = fuse(family)
    log, batch = MistakeLog(), make_batch(model.pilot)
    with torch.no_grad():
        states = trace_pilot(model.pilot, batch, model.copilot.pooler)
        log.append(states)
    assert not any(name.startswith("source") for name in log.rounds[0].tensors)
    record = log.sample(8)
    assert record.source_BMP is None
    errors_BNV = token_errors(states.logits_BNV.softmax(-1), states.targets_BN)
    lengths = batch.target_mask_BN.sum(-1)
    for drawn, mask_N in zip(record.errors_BNV, record.target_mask_BN, strict=True):
        near = [
            torch.allclose(drawn[mask_N], errors_BNV[row, : lengths[row]])
            for row in range(3)
            if lengths[row] == mask_N.sum()
        ]
        assert any(near)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAST)
def test_joint_training_lowers_the_errors_of_a_frozen_pilot(family):
    data = task_data(family, 60)
    pilot = random_pilot(family, vocab=vocabulary_size(data))
    model = fused_class(family == "t5").from_pilot(pilot, kind="head", hidden=32)
    rows = random_batch(family, rows=16, vocab=vocabulary_size(data))
    module = small_module(model, 60, pilot=None, copilot=learner(3e-3), objective=CrossEntropy(), steps_per_round=2)
    train_on(module, [rows] * 60, MistakeLog())
    statistics = ErrorStatistics([1.0])
    statistics.observe(model.eval(), rows)
    found = statistics.summary()
    assert found["fused_nll"] < 0.8 * found["pilot_nll"]
    assert found["error_ratio"] < 1
