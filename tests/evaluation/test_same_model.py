"""Evaluation answers with the very model that was trained: same weights, same types, same settings of generation."""

import json

import pytest
import torch
from family_models import EVERY_FAMILY, make_batch, perturb, prompts, tiny_pilot
from small_training import tiny_model
from transformers import AutoTokenizer

from tcopilot.app import build
from tcopilot.data import GeneratedTask, TCopilotDataModule
from tcopilot.data.tokenizers import byte_tokenizer, word_tokenizer
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.models.adapters import Lora, merge_adapters
from tcopilot.models.fusion import LogitFusion, ProbabilityFusion
from tcopilot.models.modeling import fused_class
from tcopilot.models.pilot import ModelSource
from tcopilot.models.transfer import transfer_copilot
from tcopilot.run_directory import RunDirectory
from tcopilot.training.error_statistics import correct_targets

FAST = ("t5", "bart", "llama")


@pytest.mark.slow
@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in EVERY_FAMILY])
def test_an_export_of_a_bfloat16_run_scores_as_the_model_that_was_trained_to_the_bit(family, tmp_path):
    tokenizer, checkpoint = byte_tokenizer(), tiny_pilot(family, vocab_size=259)
    if family == "bart":
        checkpoint.final_logits_bias.normal_()  # a buffer that is stored, unlike rotary frequencies
    for written in (checkpoint, tokenizer):
        written.save_pretrained(tmp_path / "pilot")
    source = ModelSource(str(tmp_path / "pilot"), dtype="bfloat16")
    pilot = source.load(source.tokenizer())
    model = fused_class(source.is_encoder_decoder).from_pilot(pilot, layers=2)
    perturb(model.copilot)
    linear = {n.rpartition(".")[2] for n, part in pilot.named_modules() if isinstance(part, torch.nn.Linear)}
    for part in (pilot, model.copilot.body):
        Lora(r=4, targets=tuple(linear - {"lm_head"}))(part)
        perturb(torch.nn.ParameterList(p for p in part.parameters() if p.requires_grad))
    merge_adapters(model.eval())

    build.export(model, tokenizer, tmp_path / "run" / "export")
    config, _ = build.read_export(RunDirectory(tmp_path / "run"))
    ours = build.load_export(RunDirectory(tmp_path / "run"), config).eval()
    theirs = fused_class(source.is_encoder_decoder).from_pretrained(tmp_path / "run" / "export").eval()
    batch = make_batch(checkpoint)
    for loaded in (ours, theirs):
        for trained, evaluated in zip(correct_targets(model, batch), correct_targets(loaded, batch), strict=True):
            assert torch.equal(trained, evaluated)
    assert {p.dtype for p in ours.pilot.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in ours.copilot.parameters()} == {torch.float32}


def test_the_pilot_of_another_run_keeps_its_type_under_a_transferred_copilot(tmp_path):
    tokenizer, checkpoint = byte_tokenizer(), tiny_pilot("llama", vocab_size=259)
    for written in (checkpoint, tokenizer):
        written.save_pretrained(tmp_path / "pilot")
    runs = {}
    for dtype in ("bfloat16", "float32"):
        source = ModelSource(str(tmp_path / "pilot"), dtype=dtype)
        runs[dtype] = fused_class(False).from_pilot(source.load(tokenizer), layers=2)
        build.export(runs[dtype], tokenizer, tmp_path / dtype)
    for dtype, other in (("bfloat16", "float32"), ("float32", "bfloat16")):
        fused = transfer_copilot(ModelSource(str(tmp_path / dtype)), runs[other], tokenizer)
        assert {str(p.dtype) for p in fused.pilot.parameters()} == {f"torch.{dtype}"}
        assert {p.dtype for p in fused.copilot.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_bfloat16_pilot_built_from_a_config_keeps_the_type_of_its_computed_buffers(family):
    config = tiny_pilot(family).config.to_diff_dict() | {"model_type": family}
    narrow, wide = (ModelSource(config=config, dtype=dtype) for dtype in ("bfloat16", "float32"))
    tokenizer = narrow.tokenizer()
    pilots = []
    for source in (narrow, wide):
        torch.manual_seed(0)
        pilots.append(source.load(tokenizer))
    assert {p.dtype for p in pilots[0].parameters()} == {torch.bfloat16}
    for half, full in zip(pilots[0].buffers(), pilots[1].buffers(), strict=True):
        assert torch.equal(half, full)
        assert half.dtype == full.dtype


# Generation settings ----------------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "top_k": 0}
PROCESSORS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": SAMPLED,
    "min_length": {"min_length": 12},
    "min_new_tokens": {"min_new_tokens": 5},
    "temperature": SAMPLED | {"temperature": 0.3},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": SAMPLED | {"top_p": 0.6},
    "top_h": SAMPLED | {"top_h": 0.4},
    "min_p": SAMPLED | {"min_p": 0.05},
    "typical_p": SAMPLED | {"typical_p": 0.5},
    "epsilon_cutoff": SAMPLED | {"epsilon_cutoff": 0.02},
    "eta_cutoff": SAMPLED | {"eta_cutoff": 0.02},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "repetition_penalty with beams": {"repetition_penalty": 1.3, "num_beams": 3},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "sequence_bias": {"sequence_bias": [[[7], 3.0], [[5, 6], -2.0]]},
    "bad_words_ids": {"bad_words_ids": [[token] for token in range(40)]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch, ids: [9, 17, 33]},
    "forced_bos_token_id": {"forced_bos_token_id": 11},
    "forced_eos_token_id": {"forced_eos_token_id": 1},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.4)},
    "suppress_tokens": {"suppress_tokens": [7, 8, 9]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [7, 8, 9]},
    "renormalize_logits": {"repetition_penalty": 1.3, "renormalize_logits": True},
    "static": {"cache_implementation": "static", "disable_compile": True, "repetition_penalty": 1.3},
}


@pytest.fixture(scope="module", params=["t5", pytest.param("llama", marks=pytest.mark.slow)])
def silent(request):
    """A model whose Copilot says 0, with the logits of a real one: far from 0 in the mean."""
    pilot = tiny_pilot(request.param, layers=2)
    pilot.get_output_embeddings().weight.data.mul_(6)
    return fused_class(request.param == "t5").from_pilot(pilot, layers=2).eval()


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_copilot_that_says_nothing_changes_no_answer_under_any_processor(silent, name):
    tokens = prompts(silent.pilot, padded=True)
    said = []
    for weight in (0.0, 1.0):
        silent.weight = weight
        torch.manual_seed(0)
        said.append(silent.generate(**tokens, max_new_tokens=6, **PROCESSORS[name]).tolist())
    assert said[0] == said[1]
    if not PROCESSORS[name].get("do_sample"):
        together = silent.generate_at_weights((0.0, 0.5, 1.0), *tokens.values(), max_new_tokens=6, **PROCESSORS[name])
        assert [t.tolist() for t in together] == [said[0]] * 3


@pytest.mark.parametrize("rule", [ProbabilityFusion(), LogitFusion()])
def test_where_nothing_is_corrected_the_fused_distribution_is_the_pilots_to_the_bit(rule):
    log_probs = torch.tensor([[[0.0, -1.0, -200.0]], [[0.0, -1.0, -200.0]]]).log_softmax(-1)
    corrections = torch.tensor([[[0.0, 0.0, 0.0]], [[0.1, -0.1, 0.0]]])
    fused = rule.fuse(log_probs, corrections, 2.0)
    assert torch.equal(fused[0], log_probs[0])
    assert not torch.equal(fused[1], log_probs[1])
    assert torch.equal(rule.fuse(log_probs, corrections, torch.tensor([2.0, 0.0])), log_probs)


def generated_rows() -> TCopilotDataModule:
    task = GeneratedTask(name="a", kind="word_problems", train=8, validation=6, test=8, max_new_tokens=6)
    return TCopilotDataModule({"a": task}, rounds=1)


def judge_of(model, folder, tokenizer) -> Evaluator:
    """An evaluator over a few generated rows."""
    data = generated_rows()
    data.prepare(tokenizer, "right" if model.config.is_encoder_decoder else "left")
    return Evaluator(model, tokenizer, data, folder)


def said(folder, weight: float) -> list[str]:
    lines = (folder / f"test-a-weight={weight:g}.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_generation_settings_of_the_checkpoint_change_no_answer_and_are_named(family, tmp_path):
    found, tokenizer = {}, word_tokenizer(generated_rows().vocabulary)
    for name in ("plain", "penalised"):
        model = tiny_model(family, vocab=len(tokenizer), seed=2)  # a new Copilot, which says 0
        if name == "penalised":
            model.generation_config.update(repetition_penalty=1.3, forced_eos_token_id=1, num_beams=2)
        notes = judge_of(model, tmp_path / name, tokenizer).run([1.0]).verdicts
        found[name] = said(tmp_path / name, 0.0)
        assert said(tmp_path / name, 1.0) == found[name]
        assert any("repetition_penalty=1.3" in note for note in notes) == (name == "penalised")
        assert (model.generation_config.num_beams or 1) == 1 + (name == "penalised")
    assert found["plain"] == found["penalised"]


# Tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizer_of_an_export_pads_where_the_pilot_was_trained(side, tmp_path):
    family = "t5" if side == "right" else "llama"
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = side
    model = tiny_model(family, vocab=len(tokenizer), head_std=0.3, seed=3).eval()
    build.export(model, tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.padding_side == side

    def answers(prompts: list[str]) -> list[str]:
        given = loaded(prompts, return_tensors="pt", padding=True)
        tokens = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        return loaded.batch_decode(tokens[:, -4:])

    texts = ["two and two", "up", "a longer prompt than the others"]
    assert answers(texts) == [answer for text in texts for answer in answers([text])]


def test_every_end_token_of_config_and_tokenizer_ends_an_answer(tmp_path):
    tokenizer, pilot = byte_tokenizer(), tiny_pilot("llama", vocab_size=259)
    pilot.config.eos_token_id = 7
    pilot.generation_config.eos_token_id = [7, 9]
    pilot.save_pretrained(tmp_path / "pilot")
    tokenizer.save_pretrained(tmp_path / "pilot")
    source = ModelSource(str(tmp_path / "pilot"))
    model = fused_class(False).from_pilot(source.load(source.tokenizer()), layers=2)
    assert model.generation_config.eos_token_id == [1, 7, 9]
    build.export(model, tokenizer, tmp_path / "run" / "export")
    config, tokenizer = build.read_export(RunDirectory(tmp_path / "run"))
    loaded = build.load_export(RunDirectory(tmp_path / "run"), config)
    assert loaded.generation_config.eos_token_id == [1, 7, 9]
    judge = judge_of(loaded, tmp_path / "predictions", tokenizer)
    mode = judge.modes("a")[0]
    assert mode.ends == [1, 7, 9]
    monkey = loaded.generate_at_weights
    loaded.generate_at_weights = lambda *_, **__: [torch.tensor([[0, 40, 9, 41, 1]])]
    row = judge.data.evaluation_rows("test", "a")[0] | {"source_ids": [5]}
    assert mode.answer([row], [1.0])[1.0][0]["prediction"] == tokenizer.decode([40])
    loaded.generate_at_weights = monkey
    names = ", ".join(tokenizer.convert_ids_to_tokens([1, 7, 9]))
    assert f"answers end at any of {names}" in judge.run([1.0]).verdicts
