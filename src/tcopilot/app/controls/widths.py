"""How wide a Pilot must be to have a given number of parameters."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from tcopilot.models.families import skeleton

MODEL_WIDTHS = ("d_model", "hidden_size")
WIDTHS = (*MODEL_WIDTHS, "d_kv", "head_dim", "d_ff", "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim")
MOST_TIMES = 16  # as wide as the Pilot given


def widened(config: dict[str, Any], vocab_size: int, parameters: int) -> dict[str, Any]:
    """Scale all widths of a Pilot's config together, depth and heads staying, to come closest to a size.

    The model's width moves in steps of two per attention head, which heads and rotary embeddings divide by.

    Args:
        config: `pilot.config`, with `d_model` or `hidden_size`.
        vocab_size: V, which follows from the tokenizer.
        parameters: how many are wanted.

    Returns:
        The config with other widths.
    """
    width = next(config[name] for name in MODEL_WIDTHS if name in config)
    known = AutoConfig.for_model(**config)
    step = 2 * known.num_attention_heads
    candidates = (_scaled(config, wide / width) for wide in range(step, MOST_TIMES * width + 1, step))
    best, smallest = config, None
    for candidate in candidates:
        excess = _parameters(candidate, vocab_size) - parameters
        if smallest is None or abs(excess) < smallest:
            best, smallest = candidate, abs(excess)
        if excess > 0:
            break
    return best


def _scaled(config: dict[str, Any], factor: float) -> dict[str, Any]:
    return config | {name: max(2, 2 * round(factor * config[name] / 2)) for name in WIDTHS if name in config}


def _parameters(config: dict[str, Any], vocab_size: int) -> int:
    model = skeleton(AutoConfig.for_model(**config, vocab_size=vocab_size))
    return sum(parameter.numel() for parameter in model.parameters())
