"""Families beyond those of the other tests: what the check says of all of transformers, and fused models of some."""

import runpy

import composed
import pytest
import torch
import transformers
from family_models import perturb
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tcopilot.models.families import has_encoder
from tcopilot.models.modeling import fused_class
from tcopilot.models.tiny_model import tiny_config

SCRIPT = runpy.run_path(str(composed.ROOT / "scripts" / "families.py"))
PROMISED = (
    "cohere", "cohere2", "deepseek_v3", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite", "ministral",
    "mixtral", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen3_moe", "smollm3", "starcoder2",
    "blenderbot", "longt5", "m2m_100", "marian", "mbart", "mt5", "pegasus", "umt5",
)  # fmt: skip
OWN_FAULT = {"5.17.0": {"umt5"}}.get(transformers.__version__, set())  # decodes otherwise with a cache, by itself
FAST = ("gemma3_text", "phi3", "marian")
GREEDY = {"do_sample": False, "max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}


@pytest.mark.slow
@pytest.mark.timeout(1200, method="thread")
def test_the_page_of_families_says_what_the_check_finds():
    found = SCRIPT["verdicts"]()
    supported = {name for name, why in found.items() if why is None}
    assert supported >= set(PROMISED) - OWN_FAULT
    assert len(supported) >= 30
    assert all(len(why) < 300 for why in found.values() if why is not None)
    written = SCRIPT["PAGE"].read_text(encoding="utf-8").partition(SCRIPT["MARK"])[2]
    if written.startswith(f"With transformers {transformers.__version__}:"):
        lists, _, refused = written.partition("## Refused")
        assert {name for name in found if f"`{name}`" in lists} == supported
        assert {name for name in found if f"| `{name}` |" in refused} == found.keys() - supported


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in PROMISED
        if name not in OWN_FAULT
    ],
)
def test_a_fused_model_decodes_as_it_should_and_comes_back_from_disk(family, tmp_path):
    config, encoder = tiny_config(SCRIPT["family_config"](family)), has_encoder(family)
    auto = AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM
    torch.manual_seed(0)
    pilot = auto.from_config(config).eval()
    perturb(nn.ParameterList(weight for weight in pilot.parameters() if weight.requires_grad), 0.1)
    model = fused_class(encoder).from_pilot(pilot, layers=2).eval()
    ids, mask = torch.randint(3, 48, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, slice(5, 7) if encoder else slice(0, 3)] = 0
    prompts = {"input_ids": ids * mask, "attention_mask": mask}

    def decode(one, **options):
        return one.generate(**prompts, **GREEDY | options)

    alone = decode(pilot)
    assert torch.equal(decode(model).sequences, alone.sequences)  # a new Copilot corrects nothing
    perturb(model.copilot, 0.3)
    fused = decode(model)
    assert not torch.equal(torch.stack(fused.logits), torch.stack(alone.logits)[: len(fused.logits)])
    for options in ({}, {"num_beams": 3}):
        cached, uncached = (decode(model, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached.sequences, uncached.sequences), options
    model.save_pretrained(tmp_path)
    again = decode(auto.from_pretrained(tmp_path).eval())
    assert torch.equal(torch.stack(again.logits), torch.stack(fused.logits))
    model.weight = 0.0
    assert torch.equal(decode(model).sequences, alone.sequences)
