import pytest
import torch
from family_models import of_families
from transformers import AutoConfig, GPT2Config, LlamaConfig
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention

from tcopilot import Copilot
from tcopilot.models import family_check
from tcopilot.models.families import UnsupportedFamilyError
from tcopilot.models.family_check import check_family, failed_check
from tcopilot.models.tiny_model import DEEPEST, DEPTH, tiny_config


@pytest.fixture
def fresh_verdicts(monkeypatch):
    """Nothing is known of any family."""
    monkeypatch.setattr(family_check, "_found", {})


def of_type(model_type, **sizes):
    return AutoConfig.for_model(model_type, **sizes)


@pytest.mark.parametrize("family", of_families())
def test_the_families_of_all_other_tests_pass(tiny_pilot, family):
    check_family(tiny_pilot(family).config)


@pytest.mark.parametrize("family", ["gemma3_text", "cohere2", "gpt2", "marian"])
def test_families_with_ways_of_their_own_pass(family):
    """By turns: kinds of layers, layers without positions, learned positions behind the embedding, scaled inputs."""
    check_family(of_type(family))


@pytest.mark.parametrize(
    ("family", "why"),
    [
        (
            "stablelm",
            "log attention on a layer's own input differs from the family's own attention .*unknown arguments",
        ),
        ("mamba", "continuing from a cache of keys and values differs from reading the whole text at once"),
        ("bert", "no tiny model of it can be built .*BertModel has no layers"),
    ],
)
def test_a_family_is_refused_with_the_check_that_failed(family, why):
    with pytest.raises(UnsupportedFamilyError, match=f"model type '{family}' is not supported: {why}"):
        check_family(of_type(family))


def test_an_opt_with_embeddings_narrower_than_its_layers_is_refused_by_itself():
    check_family(of_type("opt"))
    for decoder in (True, False):
        with pytest.raises(UnsupportedFamilyError, match=r"'opt' is not supported: .*states have different widths"):
            check_family(of_type("opt", hidden_size=1024, word_embed_proj_dim=512), decoder=decoder)


def test_a_pilot_whose_layers_no_copilot_takes_needs_no_log_attention():
    check_family(of_type("stablelm"), decoder=False)
    with pytest.raises(UnsupportedFamilyError, match="'mamba' is not supported: continuing from a cache"):
        check_family(of_type("mamba"), decoder=False)


def test_a_copilot_of_a_pilot_that_fails_is_refused(tiny_pilot, fresh_verdicts, monkeypatch):
    pilot = tiny_pilot("llama")
    monkeypatch.setattr(family_check, "PILOT_CHECKS", {"it has no luck": lambda trial: 1 / 0})
    with pytest.raises(UnsupportedFamilyError, match=r"'llama' is not supported: it has no luck \(division by zero\)"):
        Copilot.from_pilot(pilot)


def test_attention_that_leaves_something_out_is_noticed(fresh_verdicts, monkeypatch):
    """Something that a family does to its keys where log attention cannot see it."""
    stock = LlamaAttention.forward

    def other(self, hidden_states, *args, past_key_values=None, **kwargs):
        scale = 1.0 if past_key_values is None or isinstance(past_key_values, Cache) else 1.01
        return stock(self, scale * hidden_states, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", other)
    assert failed_check(LlamaConfig()).startswith(
        "log attention on a layer's own input differs from the family's own attention (they differ by up to"
    )


def test_a_check_changes_neither_the_config_nor_a_runs_random_numbers(fresh_verdicts):
    config = GPT2Config()
    before, state = config.to_dict(), torch.get_rng_state()
    check_family(config)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_verdict_is_found_once_for_all_sizes_and_again_where_a_switch_differs(fresh_verdicts, monkeypatch):
    tried = []
    monkeypatch.setattr(family_check, "PILOT_CHECKS", {"it is tried": lambda trial: tried.append(trial.config)})
    for changes in ({}, {"hidden_size": 8192, "intermediate_size": 1 << 14}, {"attention_bias": True}):
        check_family(LlamaConfig(**changes))
    assert [config.attention_bias for config in tried] == [False, True]


def test_a_tiny_config_keeps_every_kind_of_layer():
    assert tiny_config(LlamaConfig()).num_hidden_layers == DEPTH
    kinds = tiny_config(of_type("gemma3_text")).layer_types
    assert len(kinds) == DEEPEST
    assert set(kinds) == {"sliding_attention", "full_attention"}
