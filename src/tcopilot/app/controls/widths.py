"""How wide a Pilot must be to have a given number of parameters."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from tcopilot.models.families import skeleton

MODEL_WIDTHS = ("d_model", "hidden_size")
WIDTHS = (*MODEL_WIDTHS, "d_kv", "head_dim", "d_ff", "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim")
MOST_TIMES = 16  # as wide as the Pilot given


def widened(config: dict[str, Any], vocab_size: int, parameters: int) -> dict[str, Any]:
    """Scale all widths of a Pilot's config by one factor, so that it comes closest to a number of parameters.

    Depth and number of heads stay. The model's width (`d_model` or `hidden_size`) moves in steps of two per attention
    head, which heads and rotary embeddings divide by.
    """
    width = next(config[name] for name in MODEL_WIDTHS if name in config)
    step = 2 * AutoConfig.for_model(**config).num_attention_heads
    by_distance = {}
    for wide in range(step, MOST_TIMES * width + 1, step):
        scaled = {name: max(2, 2 * round(wide / width * config[name] / 2)) for name in WIDTHS if name in config}
        model = skeleton(AutoConfig.for_model(**config | scaled, vocab_size=vocab_size))
        excess = sum(parameter.numel() for parameter in model.parameters()) - parameters
        by_distance.setdefault(abs(excess), config | scaled)
        if excess > 0:
            break
    return by_distance[min(by_distance)]
