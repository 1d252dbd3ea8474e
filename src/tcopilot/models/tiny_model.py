"""A tiny random model of any family, on which the family is tried before weights load.

Shapes: B batch, T tokens, C width.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from tcopilot.models import families
from tcopilot.models.log_attention import additive, causal_mask

DEPTH, DEEPEST = 4, 6
"""Layers of the tiny model, and the most of them where the config lists a kind for each layer."""
SIZES = {
    "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 48, "intermediate_size": 32,
    "max_position_embeddings": 64, "d_kv": 16, "d_ff": 32, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "ffn_dim": 32, "ffn_hidden_size": 32,
    "word_embed_proj_dim": 64, "rotary_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32,
    "v_head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16,
    "linear_num_heads": 4, "linear_head_dim": 16, "mamba_chunk_size": 16,
}  # fmt: skip
"""Sizes of the tiny model, by the names that configs give them."""
LIMITS = {
    "num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
"""Upper limits of other sizes of the tiny model."""
GIVEN_BY_TOKENIZER = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
"""Tokens that a config may lack before its tokenizer is known; they do not tell families apart."""


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of the same family with all its switches, and sizes for a model of a few thousand weights."""
    tiny = copy.deepcopy(config)
    depth = families.decoder_depth(tiny)
    families.cut_depth(tiny, min(depth, DEEPEST) if families.per_layer(tiny) else DEPTH)
    tiny.architectures = tiny.dtype = None  # they describe the checkpoint, not the family
    tiny.name_or_path = ""
    limits = dict(LIMITS)
    if getattr(config, "num_key_value_heads", None) == getattr(config, "num_attention_heads", None):
        limits["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in SIZES.keys() | limits.keys():
        value = getattr(tiny, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            with suppress(AttributeError):  # raised for a size that is computed from others
                setattr(tiny, name, SIZES[name] if name in SIZES else min(value, limits[name]))
    if getattr(config, "word_embed_proj_dim", None) not in (None, getattr(config, "hidden_size", None)):  # OPT-350m
        tiny.word_embed_proj_dim //= 2
    pad = getattr(config, "pad_token_id", None)
    for name in {*GIVEN_BY_TOKENIZER, *vars(tiny)}:
        value = getattr(tiny, name, None)
        if name == "pad_token_id" or (name.endswith("_token_id") and value == pad is not None):
            setattr(tiny, name, 0)
        elif name == "decoder_start_token_id":
            setattr(tiny, name, 0 if value is None else 2)
        elif name in GIVEN_BY_TOKENIZER or (name.endswith("_token_id") and value is not None):
            setattr(tiny, name, 1)
        if "dropout" in name and isinstance(value, float):
            setattr(tiny, name, 0.0)
    return tiny


@dataclass
class TinyModel:
    """A tiny random model of a family, in evaluation and float32, and inputs for it."""

    config: PreTrainedConfig
    attention: str | None = None  # None is what the family runs with by default

    @cached_property
    def model(self) -> PreTrainedModel:
        """The full model: the Pilot."""
        auto = AutoModelForSeq2SeqLM if families.has_encoder(self.config.model_type) else AutoModelForCausalLM
        model = auto.from_config(self.config, dtype=torch.float32, attn_implementation=self.attention).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:  # some families store sinusoids as weights and recompute them on loading
                parameter.normal_(std=0.3)
        return model

    @property
    def decoder(self) -> nn.Module:
        """Its stock decoder."""
        return self.model.get_decoder()

    @cached_property
    def ids_BT(self) -> Tensor:
        """Two texts of seven tokens."""
        return torch.randint(3, 48, (2, 7))

    @cached_property
    def inputs_BTC(self) -> Tensor:
        """The texts embedded."""
        return families.input_embeddings(self.model)[self.ids_BT]

    @property
    def positions_BT(self) -> Tensor:
        """Their positions."""
        return torch.arange(self.ids_BT.shape[1]).expand_as(self.ids_BT)

    @property
    def mask_B1TT(self) -> Tensor:
        """The additive causal mask of the texts."""
        mask_1TT = causal_mask(self.ids_BT.shape[1], self.ids_BT.device)
        return additive(mask_1TT.expand(len(self.ids_BT), -1, -1), torch.float32)

    @cached_property
    def memory(self) -> dict[str, Tensor]:
        """What the decoder reads beside its inputs: nothing, or the output of its encoder."""
        if not families.has_encoder(self.config.model_type):
            return {}
        return {"encoder_hidden_states": self.model.get_encoder()(input_ids=self.ids_BT).last_hidden_state}

    def decode(self, **inputs: Any) -> Tensor:
        """The stock decoder's last hidden state, under its own masks."""
        return self.decoder(**inputs, **self.memory, use_cache=False).last_hidden_state

    @cached_property
    def body(self) -> nn.Module:
        """The body of a Copilot that starts from the model, as a saved config gives it; without log attention."""
        config = families.decoder_config(self.model.config)
        values = {**config.to_dict(), "model_type": config.model_type}
        body = families.build_body(families.body_config_from_dict(values)).eval()
        body.set_attn_implementation(self.model.config._attn_implementation)
        families.load_decoder_weights(body, self.model)
        return body

    @contextmanager
    def reading(self, layers: Iterable[int]) -> Iterator[nn.Module]:
        """The body while these layers read a log, whose rows have already passed a layer's input norm."""
        stock = {}
        for index in () if self.memory else layers:
            layer = families.decoder_layers(self.body)[index]
            stock[index] = families.self_attention(layer)
            families.install_log_attention(self.body, [index])
            families.self_attention(layer)[1].norm = None
        yield self.body
        for index, (name, attention) in stock.items():
            setattr(families.decoder_layers(self.body)[index], name, attention)

    @property
    def every_second(self) -> Iterable[int]:
        """Layers that read the log in the paper's first pattern."""
        return range(1, len(families.decoder_layers(self.decoder)), 2)

    def run(
        self, body: nn.Module, log_BTC: Tensor, inputs_BTC: Tensor | None = None, open_B1TT: Tensor | None = None
    ) -> Tensor:
        """The body's last hidden state on the texts, reading a log of as many rows, by default under a causal mask."""
        inputs_BTC = self.inputs_BTC if inputs_BTC is None else inputs_BTC
        log = (log_BTC, self.mask_B1TT if open_B1TT is None else open_B1TT, self.positions_BT)
        return families.run_body(body, inputs_BTC, self.mask_B1TT, self.positions_BT, *log, cache=None)
