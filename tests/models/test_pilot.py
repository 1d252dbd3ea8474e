"""Where Pilots come from: a config, a folder, the Hub; and which tokenizer reads for them."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from tcopilot.data.tokenizers import byte_tokenizer, word_tokenizer
from tcopilot.models.pilot import ModelSource, ModelSourceError

WORDS = ["how", "many", "eggs", "?", "7"]
CONFIGS = {
    "t5": {"model_type": "t5", "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1},
    "llama": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
    },
}  # fmt: skip
CLASSES = {"t5": T5ForConditionalGeneration, "llama": LlamaForCausalLM}


def source(family: str = "llama", **changes) -> ModelSource:
    return ModelSource(config=CONFIGS[family] | changes)


def saved(folder, family="llama", dtype=torch.float32, **tokens) -> str:
    """A model in a folder, with a byte tokenizer."""
    kind = LlamaConfig if family == "llama" else T5Config
    values = {key: value for key, value in CONFIGS[family].items() if key != "model_type"}
    CLASSES[family](kind(**values, vocab_size=259)).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if tokens:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | tokens))
    return str(folder)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_pilot_from_a_config_fits_the_words_of_its_data(family):
    pilot = source(family)
    tokenizer = pilot.tokenizer(WORDS)
    model = pilot.load(tokenizer)
    assert isinstance(model, CLASSES[family])
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == len(WORDS) + 3
    assert tokenizer.decode(tokenizer("how many eggs ?").input_ids) == "how many eggs ?"


@pytest.mark.parametrize("family", CONFIGS)
def test_a_pilot_from_a_config_reads_any_text_by_bytes(family):
    pilot = source(family)
    tokenizer = pilot.tokenizer()
    model = pilot.load(tokenizer)
    ids = tokenizer("Füñf €?", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "Füñf €?"
    assert ids.max() < model.get_input_embeddings().num_embeddings == 259


@pytest.mark.parametrize("family", CONFIGS)
def test_generation_pads_and_ends_with_the_tokenizers_own_tokens(family):
    pilot = source(family)
    tokenizer = pilot.tokenizer(WORDS)
    model = pilot.load(tokenizer)
    for settings in (model.config, model.generation_config):
        assert (settings.pad_token_id, settings.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    if family == "t5":
        assert model.config.decoder_start_token_id == tokenizer.pad_token_id


def test_prompts_are_padded_where_the_family_needs_it():
    assert (source("t5").source_side, source("llama").source_side) == ("right", "left")
    assert (source("t5").is_encoder_decoder, source("llama").is_encoder_decoder) == (True, False)
    for family in CONFIGS:
        assert source(family).tokenizer(WORDS).padding_side == source(family).source_side


def test_random_weights_follow_the_seed():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        pilot = source()
        return pilot.load(pilot.tokenizer(WORDS)).get_input_embeddings().weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_folder_is_read_with_its_weights_and_its_tokenizer(family, tmp_path):
    pilot = ModelSource(saved(tmp_path, family))
    tokenizer = pilot.tokenizer(WORDS)  # the closed vocabulary is for Pilots without a tokenizer
    model = pilot.load(tokenizer)
    assert len(tokenizer) == 259
    before = CLASSES[family].from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_weights_are_float32_whatever_the_checkpoint_is_in(tmp_path):
    path = saved(tmp_path, dtype=torch.bfloat16)
    for asked, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        pilot = ModelSource(path, dtype=asked)
        assert {weight.dtype for weight in pilot.load(pilot.tokenizer()).parameters()} == {dtype}
    pilot = ModelSource(config=CONFIGS["llama"], dtype="bfloat16")
    assert pilot.load(pilot.tokenizer()).dtype == torch.bfloat16


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path):
    tokenizer = ModelSource(saved(tmp_path, pad_token=None)).tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_the_config_is_known_before_any_weights_are(tmp_path):
    pilot = ModelSource(saved(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    assert pilot.model_config.hidden_size == 16
    with pytest.raises(ModelSourceError, match=r"pilot\.path=.*AutoModelForCausalLM cannot read it"):
        pilot.load(pilot.tokenizer())


@pytest.mark.parametrize("path", ["no/such-model", "/no/such/folder"])
@pytest.mark.parametrize("key", ["pilot", "copilot"])
def test_what_cannot_be_read_is_named_with_its_key(path, key):
    for read in (lambda s: s.model_config, lambda s: s.tokenizer()):
        with pytest.raises(ModelSourceError) as refused:
            read(ModelSource(path, key=key))
        assert f"{key}.path={path}" in str(refused.value)
        assert "folder with config.json, weights and tokenizer" in str(refused.value)
        assert "\n" not in str(refused.value)


def test_code_from_the_hub_is_never_run(tmp_path):
    """A repository that brings code of its own is refused instead."""
    saved(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelSourceError, match=r"pilot\.path"):
        _ = ModelSource(str(tmp_path)).model_config
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "pilot.path is not set"),
        ({"model_type": "gtp"}, "gtp"),
        ({"hidden_size": 8}, "model_type"),
        (CONFIGS["llama"] | {"hidden_size": 15}, "15"),
        (CONFIGS["llama"] | {"hidden_size": "wide"}, "expected int"),
    ],
)
def test_a_config_that_is_no_model_is_refused_in_one_line(config, said):
    with pytest.raises(ModelSourceError) as refused:
        _ = ModelSource(config=config).model_config
    assert said in str(refused.value)
    assert str(refused.value).startswith(("pilot.config=", "pilot.path"))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_word_pilots_of_one_task_share_a_vocabulary_with_their_export(tmp_path):
    pilot = source()
    tokenizer = pilot.tokenizer(WORDS)
    pilot.load(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = ModelSource(str(tmp_path))
    assert again.model_config.vocab_size == pilot.model_config.vocab_size
    assert again.tokenizer().get_vocab() == word_tokenizer(WORDS).get_vocab()
