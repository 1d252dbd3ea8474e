"""Stand-ins for quantised layers in the estimate of memory, since bitsandbytes computes on real numbers only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from tcopilot.models.families import skeleton
from tcopilot.models.quantization import is_packed, packed_bytes, settings_of


def pack_layers(pilot: nn.Module, config: PreTrainedConfig, bits: str, dtype: torch.dtype) -> None:
    """Put stand-ins where transformers would quantise a Pilot of this config, beneath adapters too."""
    plain = skeleton(config)
    AutoHfQuantizer.from_config(settings_of(bits, dtype), pre_quantized=False).preprocess_model(plain, device_map=None)
    names = {name for name, part in plain.named_modules() if is_packed(part)}
    for name, part in list(pilot.named_modules()):
        if name.removesuffix(".base_layer") in names and isinstance(part, nn.Linear):
            pilot.set_submodule(name, _PackedLinear(part, bits, dtype))


class _PackedLinear(nn.Module):
    """Holds as many bytes as a quantised layer does, and takes as many while it computes."""

    def __init__(self, layer: nn.Linear, bits: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self.keeps_inputs = (layer.out_features, layer.in_features), dtype, bits == "8bit"
        self.weight = nn.Parameter(torch.empty(packed_bytes(bits, *self.shape), dtype=torch.uint8), False)
        self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        product = _Product.apply(inputs, self.shape, self.dtype, self.keeps_inputs)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """A product with a matrix that is unpacked for the time of it, in both passes."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, shape: tuple[int, int], dtype: torch.dtype, keeps_inputs: bool) -> Tensor:
        ctx.save_for_backward(*([inputs] if keeps_inputs else []))
        ctx.unpack = lambda like: torch.empty(shape, dtype=dtype, device=like.device).to(like.dtype)
        return nn.functional.linear(inputs, ctx.unpack(inputs))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ ctx.unpack(gradient), None, None, None
