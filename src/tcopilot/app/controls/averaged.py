"""Two Pilots as one model, whose distribution is the mean of the two.

Shapes: B batch, M source length, P Pilot width.
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from tcopilot.models.families import decoder_depth


class AveragedPilots(nn.Module):
    """Stands in for the Pilot of a fused model without a Copilot, so that the mean is decoded as any Pilot is.

    Its cache holds the layers of the first Pilot and then those of the second, so that beam search reorders both. Its
    encoder returns both Pilots' outputs side by side, [B, M, 2P].

    Args:
        first: a trained Pilot, which also gives config and hidden states.
        second: another one of the same config.
    """

    def __init__(self, first: PreTrainedModel, second: PreTrainedModel) -> None:
        super().__init__()
        self.pilots = nn.ModuleList([first, second])
        self.config, self.generation_config = first.config, first.generation_config
        self.get_decoder = first.get_decoder
        self.get_input_embeddings, self.get_output_embeddings = first.get_input_embeddings, first.get_output_embeddings

    def forward(self, past_key_values: Cache | None = None, encoder_outputs: Any = None, **inputs: Any) -> Any:
        """Return the first Pilot's outputs, with the logarithm of the mean probability as logits."""
        sources: list[dict[str, Any]] = [{}, {}]
        if encoder_outputs is not None:
            sources = [{"encoder_outputs": BaseModelOutput(part)} for part in encoder_outputs[0].chunk(2, dim=-1)]
        inputs["use_cache"] = past_key_values is not None
        caches = _split(past_key_values, decoder_depth(self.config))
        first, second = (
            pilot(past_key_values=cache, **source, **inputs)
            for pilot, cache, source in zip(self.pilots, caches, sources, strict=True)
        )
        first.logits = torch.logaddexp(*(out.logits.float().log_softmax(-1) for out in (first, second))) - math.log(2)
        first.past_key_values, first.loss = past_key_values, None
        return first

    def get_encoder(self) -> nn.Module:
        """Both encoders as one."""
        return _Encoders([pilot.get_encoder() for pilot in self.pilots])


class _Encoders(nn.Module):
    def __init__(self, encoders: list[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        return BaseModelOutput(torch.cat([encoder(*args, **kwargs)[0] for encoder in self.encoders], dim=-1))


def _split(cache: Cache | None, depth: int) -> list[Cache | None]:
    """Split one cache into a cache for each Pilot; a new cache gets the second Pilot's layers here."""
    if cache is None:
        return [None, None]
    if isinstance(cache, EncoderDecoderCache):
        pairs = (_split(part, depth) for part in (cache.self_attention_cache, cache.cross_attention_cache))
        return [EncoderDecoderCache(*pair) for pair in zip(*pairs, strict=True)]
    if len(cache.layers) < 2 * depth:
        made = cache.layers or [cache.layer_class_to_replicate() for _ in range(depth)]
        cache.layers = [*made, *copy.deepcopy(made)]
    parts = [DynamicCache(), DynamicCache()]
    for part, first in zip(parts, (0, depth), strict=True):
        part.layers = cache.layers[first : first + depth]
    return parts
