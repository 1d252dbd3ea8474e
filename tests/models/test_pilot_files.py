"""A Pilot by its files: a hash of its content, and its head without its layers."""

import shutil

import pytest
import torch
from family_models import of_families, perturb, tiny_pilot

from tcopilot.app import build
from tcopilot.data.tokenizers import byte_tokenizer
from tcopilot.models.families import logits_from_head_input
from tcopilot.models.modeling import TCopilotForCausalLM, fused_class
from tcopilot.models.pilot import ModelSource
from tcopilot.models.pilot_files import digest, load_unembedding
from tcopilot.run_directory import RunDirectory


def saved(pilot, folder, **options):
    pilot.save_pretrained(folder, **options)
    return ModelSource(str(folder))


@pytest.mark.parametrize("family", of_families())
def test_the_head_alone_gives_the_pilots_logits(family, tmp_path):
    pilot = tiny_pilot(family)
    source = saved(pilot, tmp_path)
    alone = load_unembedding(source, byte_tokenizer())
    head = alone.get_output_embeddings().weight
    assert torch.equal(head, pilot.get_output_embeddings().weight)
    others = [weight for weight in alone.parameters() if weight is not head]
    assert others
    assert all(weight.is_meta for weight in others)
    fused_class(pilot.config.is_encoder_decoder).from_pilot(alone, kind="head")  # which must leave the weights alone
    states = torch.randn(2, 3, pilot.config.hidden_size)
    torch.testing.assert_close(logits_from_head_input(alone, states), logits_from_head_input(pilot, states))


def test_an_export_holds_the_weights_of_now_alone(tmp_path):
    source = saved(tiny_pilot(), tmp_path / "pilot", max_shard_size="10KB")
    run, stored = RunDirectory(tmp_path / "run"), []
    for load in (load_unembedding, ModelSource.load, load_unembedding):
        model = TCopilotForCausalLM.from_pilot(load(source, byte_tokenizer()), kind="head", hidden=8)
        perturb(model.copilot, seed=len(stored))
        build.export(model, byte_tokenizer(), run.export)
        stored.append({file.name for file in run.export.glob("*.safetensors*")})
        if load is ModelSource.load:
            loaded = build.load_export(run, build.read_export(run)[0])
            assert torch.equal(loaded.copilot.hidden.weight, model.copilot.hidden.weight)
    assert stored == [{"copilot.safetensors"}, {"model.safetensors"}, {"copilot.safetensors"}]
    with pytest.raises(OSError, match=r"is a Copilot alone, .*resume=<run> evaluation\.modes=\[generation\]"):
        TCopilotForCausalLM.from_pretrained(run.export)


def test_a_head_is_found_in_an_export_of_ours_and_in_a_model_of_several_files(tmp_path):
    pilot = tiny_pilot()
    TCopilotForCausalLM.from_pilot(pilot, kind="head").save_pretrained(tmp_path / "export")
    sources = [ModelSource(str(tmp_path / "export")), saved(pilot, tmp_path / "parts", max_shard_size="10KB")]
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    for source in sources:
        head = load_unembedding(source, byte_tokenizer()).get_output_embeddings().weight
        assert torch.equal(head, pilot.get_output_embeddings().weight)


def test_the_hash_follows_the_content_not_the_place(tmp_path):
    pilot = tiny_pilot()
    known = digest(saved(pilot, tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert digest(ModelSource(str(tmp_path / "b"))) == known
    assert digest(saved(pilot, tmp_path / "c", max_shard_size="10KB")) == known
    assert digest(ModelSource(str(tmp_path / "a"), dtype="bfloat16")) != known
    with torch.no_grad():
        pilot.get_input_embeddings().weight[3:5] = pilot.get_input_embeddings().weight[
            [4, 3]
        ]  # two rows change places
    assert digest(saved(pilot, tmp_path / "d")) != known


def test_the_pilot_of_an_export_keeps_its_hash_when_its_copilot_is_trained(tmp_path):
    model = TCopilotForCausalLM.from_pilot(tiny_pilot(), kind="head")
    before = digest(saved(model, tmp_path / "a"))
    perturb(model.copilot)
    assert digest(saved(model, tmp_path / "b")) == before
    perturb(model.pilot)
    assert digest(saved(model, tmp_path / "c")) != before
