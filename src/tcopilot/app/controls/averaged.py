"""Two Pilots as one model whose distribution is the mean of theirs.

Shapes: B batch, M source length, P Pilot width.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from tcopilot.models.families import decoder_depth


class AveragedPilots(nn.Module):
    """Stands in for the Pilot of a fused model without a Copilot, so that the mean is decoded like any Pilot.

    Its cache is one cache with the layers of both, one Pilot's after the other's: beams reorder them together. What
    its encoder returns is both outputs side by side, [B, M, 2P].

    Args:
        first: a trained Pilot; config and hidden states are its.
        second: another one of the same config.
    """

    def __init__(self, first: PreTrainedModel, second: PreTrainedModel) -> None:
        super().__init__()
        self.pilots = nn.ModuleList([first, second])
        self.config, self.generation_config = first.config, first.generation_config

    def forward(self, past_key_values: Cache | None = None, encoder_outputs: Any = None, **inputs: Any) -> Any:
        """Return the first Pilot's outputs with logits that are the logarithm of the mean probability."""
        caches = _parts(past_key_values, decoder_depth(self.config))
        if encoder_outputs is not None:
            encoded = [BaseModelOutput(part) for part in encoder_outputs[0].chunk(2, dim=-1)]
            sources = [{"encoder_outputs": part} for part in encoded]
        else:
            sources = [{}, {}]
        inputs["use_cache"] = past_key_values is not None
        first, second = (
            pilot(past_key_values=cache, **source, **inputs)
            for pilot, cache, source in zip(self.pilots, caches, sources, strict=True)
        )
        first.logits = torch.logaddexp(*(out.logits.float().log_softmax(-1) for out in (first, second))) - math.log(2)
        first.past_key_values, first.loss = past_key_values, None
        return first

    def get_encoder(self) -> _Encoders:
        """Both encoders as one."""
        return _Encoders([pilot.get_encoder() for pilot in self.pilots])

    def get_decoder(self) -> nn.Module:
        """The first Pilot's decoder."""
        return self.pilots[0].get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        """The first Pilot's input embeddings."""
        return self.pilots[0].get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The first Pilot's output embeddings."""
        return self.pilots[0].get_output_embeddings()


class _Encoders(nn.Module):
    def __init__(self, encoders: list[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        outputs: list[Tensor] = [encoder(*args, **kwargs)[0] for encoder in self.encoders]
        return BaseModelOutput(torch.cat(outputs, dim=-1))


def _parts(cache: Cache | None, depth: int) -> list[Cache | None]:
    """One cache for each of two Pilots, over the layers of a single one; a new one gets the second's layers here."""
    if cache is None:
        return [None, None]
    if isinstance(cache, EncoderDecoderCache):
        pairs = (_parts(part, depth) for part in (cache.self_attention_cache, cache.cross_attention_cache))
        return [EncoderDecoderCache(*pair) for pair in zip(*pairs, strict=True)]
    if len(cache.layers) < 2 * depth:
        made = cache.layers or [cache.layer_class_to_replicate() for _ in range(depth)]
        cache.layers = [*made, *copy.deepcopy(made)]
    parts = [DynamicCache(), DynamicCache()]
    for part, first in zip(parts, (0, depth), strict=True):
        part.layers = cache.layers[first : first + depth]
    return parts
