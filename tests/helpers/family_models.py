"""Tiny Pilots of every family, with prompts and batches for them."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from tcopilot.data.batch import Batch

EVERY_FAMILY = ("t5", "bart", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""Those that run through every test; `test_family_check.py` has all others."""
FAST = ("t5", "llama")  # one family of each architecture


def of_families(*families: str) -> list:
    """Parameters for tests of several families: those in `FAST` in the fast suite, the others in the slow one."""
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in families or EVERY_FAMILY]


VOCAB = 56
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
DECODER_ONLY = EVERY_FAMILY[2:]
_built: dict[str, tuple[nn.Module, torch.Tensor]] = {}


def built_once(key: str, build: Callable[[], nn.Module]) -> nn.Module:
    """A copy of a model that the first call builds, at half the cost; random numbers go on as if it had been built."""
    if key not in _built:
        _built[key] = build(), torch.get_rng_state()
    model, state = _built[key]
    torch.set_rng_state(state)
    return deepcopy(model)


def tiny_pilot(
    family: str = "llama", *, width: int = 32, layers: int = 4, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A Pilot built from a config, perturbed so that its outputs depend on everything."""

    def build() -> PreTrainedModel:
        torch.manual_seed(seed)
        auto = AutoModelForSeq2SeqLM if family in ("t5", "bart") else AutoModelForCausalLM
        pilot = auto.from_config(_config(family, width, layers, changes))
        return perturb(pilot, 0.15, seed).eval()

    return built_once(f"{family} {width} {layers} {seed} {changes}", build)


def _config(family: str, width: int, layers: int, changes: dict[str, Any]) -> PreTrainedConfig:
    if family == "t5":
        shape = {"d_model": width, "d_kv": 8, "num_heads": 4, "d_ff": 64}
        depth = {"num_layers": layers, "num_decoder_layers": layers}
        return T5Config(**_TOKENS | shape | depth | {"decoder_start_token_id": 0} | changes)
    if family == "bart":
        shape = {"d_model": width, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128}
        depth = {"encoder_layers": 2, "decoder_layers": layers}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        rest = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
        return BartConfig(**_TOKENS | shape | depth | heads | rest | changes)
    shape = {"hidden_size": width, "intermediate_size": 64, "head_dim": 8, "max_position_embeddings": 128}
    depth = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model(family, **_TOKENS | shape | depth | changes)


def perturb(module: nn.Module, scale: float = 0.2, seed: int = 1) -> nn.Module:
    """Move every parameter; a Copilot's corrections are then not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def prompts(pilot: PreTrainedModel, padded: bool = False) -> dict[str, torch.Tensor]:
    """Three prompts of 7 tokens, or of 5, 3 and 7 tokens padded on the family's side."""
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded and pilot.config.is_encoder_decoder:
        mask[0, 5:] = mask[1, 3:] = 0
    elif padded:
        mask[0, :2] = mask[1, :4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def make_batch(pilot: PreTrainedModel, padded: bool = True) -> Batch:
    """The three prompts with targets of 5, 3 and 4 tokens, right-padded."""
    tokens = prompts(pilot, padded)
    targets = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(4))
    lengths = torch.tensor([5, 3, 4])
    mask = torch.arange(5) < lengths[:, None]
    source = (tokens["input_ids"], tokens["attention_mask"].bool())
    return Batch(*source, targets * mask, mask, torch.arange(3), torch.zeros(3, dtype=torch.long))
