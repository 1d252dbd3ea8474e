"""Pilots in 4 and 8 bits: what trains, what is exported, and that the model loaded is the one that was trained."""

import json

import pytest
import torch
from family_models import make_batch, perturb, prompts, tiny_pilot
from peft import PeftModel
from small_training import InOrder, learner, random_batch, small_module, train_on, weights
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

from tcopilot.app import build
from tcopilot.data.tokenizers import byte_tokenizer
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.adapters import Lora, merge_adapters
from tcopilot.models.modeling import fused_class
from tcopilot.models.pilot import ModelSource, ModelSourceError
from tcopilot.models.pilot_files import digest, load_unembedding
from tcopilot.models.quantization import QUANTIZATIONS, keep_as_loaded, packed_bytes, parameter_count, plain_weights
from tcopilot.models.states import StatePooler, trace_pilot
from tcopilot.run_directory import RunDirectory

pytest.importorskip("bitsandbytes")
TARGETS = {"t5": ["q", "v", "wo"], "llama": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders with a tiny Pilot and its tokenizer, by family."""
    folder = tmp_path_factory.mktemp("bases")
    for family in TARGETS:
        tiny_pilot(family, vocab_size=259, layers=2).save_pretrained(folder / family)
        byte_tokenizer().save_pretrained(folder / family)
    return folder


def source_of(bases, family="llama", bits="4bit", dtype="bfloat16"):
    return ModelSource(str(bases / family), dtype=dtype, quantization=bits)


def trained(source, rounds=2):
    """A fused model whose Pilot and Copilot have adapters, after a few rounds; and its weights before them."""
    tokenizer = source.tokenizer()
    family = "t5" if source.is_encoder_decoder else "llama"
    pilot = source.load(tokenizer)
    model = fused_class(source.is_encoder_decoder).from_pilot(
        pilot, layers=2, head="soft", train_error_input=False, dropout=0.0
    )
    for part in (pilot, model.copilot.body):
        Lora(r=2, alpha=4, dropout=0.0, targets=TARGETS[family])(part)
    before = weights(model)
    batches = [random_batch(family, seed=seed) for seed in range(rounds)]
    train_on(small_module(model, rounds, pilot=learner(lr=0.05)), batches, MistakeLog(policy=InOrder()))
    merge_adapters(model.copilot)
    return before, model.eval(), tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(("family", "bits"), [("llama", "4bit"), ("llama", "8bit"), ("t5", "4bit")])
def test_a_quantised_pilot_trains_by_its_adapters_and_comes_back_to_the_bit(family, bits, bases, tmp_path):
    source = source_of(bases, family, bits)
    before, model, tokenizer = trained(source)
    after = weights(model)
    moved = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert {name for name in moved if name.startswith("pilot.") and "lora_" not in name} == set()
    assert {name for name in after if "pilot." in name and "lora_B" in name} <= moved
    assert any(name.startswith("copilot.") for name in moved)

    build.export(model, tokenizer, tmp_path / "run" / "export")
    config, _ = build.read_export(RunDirectory(tmp_path / "run"))
    assert config.base["path"] == str(bases / family)
    loaded = build.load_export(RunDirectory(tmp_path / "run"), config)
    auto = AutoModelForSeq2SeqLM if source.is_encoder_decoder else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "run" / "export")
    tokens = prompts(model.pilot, padded=True)
    answers = model.generate(**tokens, max_new_tokens=6, do_sample=False)
    for other in (loaded, again):
        assert type(other) is type(model)
        assert torch.equal(other.generate(**tokens, max_new_tokens=6, do_sample=False), answers)
        theirs = weights(other)
        assert all(torch.equal(theirs[name], weight) for name, weight in weights(model).items())
    assert loaded.config.base == config.base
    loaded.weight = 0.0
    batch = make_batch(model.pilot)
    mine, own = (trace_pilot(pilot, batch, StatePooler()).logits_BNV for pilot in (model.pilot, loaded.pilot))
    assert torch.equal(mine, own)
    plain = loaded.generate(**tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(plain, model.pilot.generate(**tokens, max_new_tokens=6, do_sample=False))

    files = {path.name for path in (tmp_path / "run" / "export").iterdir()}
    assert {"model.safetensors", "adapter", "config.json"} <= files
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "export").glob("*.safetensors"))
    assert size < 1.1 * sum(p.nbytes for p in model.copilot.parameters()) + 10_000  # nothing of the base is in it


@torch.no_grad()
def test_peft_alone_loads_the_adapters_of_an_export_onto_the_base(bases, tmp_path):
    with torch.enable_grad():
        _, model, _ = trained(source_of(bases))
    model.save_pretrained(tmp_path)
    settings = model.pilot.config.quantization_config
    base = AutoModelForCausalLM.from_pretrained(bases / "llama", dtype=torch.bfloat16, quantization_config=settings)
    keep_as_loaded(base)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokens = prompts(model.pilot)
    assert torch.equal(adapted(**tokens).logits, model.pilot(**tokens).logits)


@torch.no_grad()
def test_a_pilot_alone_or_frozen_on_its_export_is_exported_too(bases, tmp_path):
    source = source_of(bases)
    pilot = source.load(source.tokenizer())
    Lora(r=2, alpha=4, targets=["q_proj"])(pilot)
    perturb_adapters(pilot)
    alone = fused_class(False)(build.TCopilotConfig(pilot.config), pilot).eval()
    build.export(alone, source.tokenizer(), tmp_path / "alone")
    tuned = ModelSource(str(tmp_path / "alone"), dtype="bfloat16")
    again = tuned.load(tuned.tokenizer())
    tokens = prompts(pilot)
    assert torch.equal(again(**tokens).logits, pilot.eval()(**tokens).logits)
    assert tuned.bits == "4bit"
    head = load_unembedding(tuned, tuned.tokenizer()).get_output_embeddings()
    assert torch.equal(head.weight, pilot.get_output_embeddings().weight)

    fused = fused_class(False).from_pilot(again, kind="head")
    perturb(fused.copilot)
    fused.save_pretrained(tmp_path / "both")
    both = fused_class(False).from_pretrained(tmp_path / "both")
    assert both.config.base["path"] == str(bases / "llama")
    assert torch.equal(both(**tokens, target_start=3).logits, fused(**tokens, target_start=3).logits)
    # A recording tells base, quantisation and adapters apart.
    found = [digest(s) for s in (source, tuned, source_of(bases, bits=None), source_of(bases, bits="8bit"))]
    assert len(set(found)) == 4
    assert digest(ModelSource(str(tmp_path / "both"), dtype="bfloat16")) == found[1]


@torch.no_grad()
def test_the_first_pass_changes_no_weights_of_a_pilot_in_4_bits(bases, monkeypatch):
    """On CPUs with AVX512-BF16, as here on any, bitsandbytes would pack them anew and round their scales."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    ours = source_of(bases).load(byte_tokenizer()).eval()
    theirs = AutoModelForCausalLM.from_pretrained(
        bases / "llama", dtype=torch.bfloat16, quantization_config=ours.config.quantization_config
    )
    assert theirs.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu
    fused = fused_class(False).from_pilot(theirs, kind="head").eval()  # a Pilot that somebody else has loaded
    for pilot in (ours, fused.pilot):
        before = {name: weight.clone() for name, weight in weights(pilot).items()}
        pilot(**prompts(pilot))
        after = weights(pilot)
        assert all(torch.equal(after[name], weight) for name, weight in before.items())


def perturb_adapters(pilot):
    with torch.no_grad():
        for name, parameter in pilot.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("bits", QUANTIZATIONS)
@torch.no_grad()
def test_a_copilot_starts_from_weights_that_are_numbers_again(bits, bases):
    full = source_of(bases, bits=None, dtype="float32").load(byte_tokenizer())
    quantised = source_of(bases, bits=bits, dtype="float32").load(byte_tokenizer())
    quantised(**prompts(full))  # a first pass moves the scales of 8 bits
    found, wanted = plain_weights(quantised), full.state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        most = {"4bit": 0.5, "8bit": 0.01}[bits] * weight.abs().max()
        assert (found[name].float() - weight).abs().max() <= (most if "_proj" in name else 0)
    model = fused_class(False).from_pilot(quantised, layers=2)
    assert all(p.is_floating_point() for p in model.copilot.parameters())
    body = model.copilot.body.layers[0].mlp.up_proj.weight
    assert torch.equal(body, found["model.layers.0.mlp.up_proj.weight"].float())
    counts = build.parameter_counts(model)
    assert counts["pilot"] == sum(p.numel() for p in full.parameters())
    # Cached decoding reads what a whole pass reads, and a Copilot that says nothing leaves the Pilot's tokens.
    tokens = prompts(full, padded=True)
    cached, whole = (
        model.generate(**tokens, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, whole)
    assert torch.equal(cached, quantised.generate(**tokens, max_new_tokens=6, do_sample=False))
    layer = quantised.model.layers[0].mlp.up_proj
    state = layer.weight.quant_state if bits == "4bit" else None
    held = layer.weight.nbytes + (4 * layer.out_features if state is None else bytes_of(state))
    assert held == packed_bytes(bits, layer.out_features, layer.in_features)
    assert parameter_count(layer.weight) == layer.out_features * layer.in_features


def bytes_of(state):
    return sum(t.nbytes for t in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code))


def test_settings_of_ones_own_survive_an_export(bases, tmp_path):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=["lm_head"])
    pilot = AutoModelForCausalLM.from_pretrained(bases / "llama", dtype=torch.float32, quantization_config=settings)
    model = fused_class(False).from_pilot(pilot, kind="head")
    perturb(model.copilot)
    model.save_pretrained(tmp_path)
    loaded = fused_class(False).from_pretrained(tmp_path)
    tokens = prompts(pilot)
    assert loaded.pilot.model.layers[0].mlp.up_proj.weight.quant_type == "fp4"
    assert torch.equal(loaded(**tokens, target_start=3).logits, model(**tokens, target_start=3).logits)


def test_a_base_that_is_gone_is_named(bases, tmp_path):
    source = source_of(bases)
    fused_class(False).from_pilot(source.load(source.tokenizer()), kind="head").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["base"]["path"] = str(tmp_path / "gone")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelSourceError, match=r"its base .*gone.*base\.path"):
        ModelSource(str(tmp_path), dtype="bfloat16").load(byte_tokenizer())
