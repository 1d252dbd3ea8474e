"""Pilots whose linear layers are kept in 4 or 8 bits by bitsandbytes, as in QLoRA (arXiv 2305.14314).

Embeddings, output head and norms are not quantised, so a Copilot reads them as before; only layers that it is
initialised from have to be dequantised. bitsandbytes is imported where it is needed, since its import takes a second.
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.quantizers import AutoQuantizationConfig

QUANTIZATIONS = ("4bit", "8bit")
"""Values of `pilot.quantization`: NF4 with quantised constants, and LLM.int8()."""
PACKED = ("Params4bit", "Int8Params")
BLOCK, NESTED_BLOCK = 64, 256
"""Block sizes in 4 bits: how many weights share a scale, and how many scales share a second one."""


def loading_options(bits: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that make it quantise layers as they are read, on the CPU."""
    return {} if bits is None else options_of(settings_of(bits, dtype))


def options_of(settings: BitsAndBytesConfig | dict[str, Any]) -> dict[str, Any]:
    """The same arguments for settings in transformers' own form."""
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.nn.modules"):
        logging.getLogger(name).setLevel(logging.ERROR)  # else each layer logs its type conversions in each pass
    settings = AutoQuantizationConfig.from_dict(settings) if isinstance(settings, dict) else settings
    return {"quantization_config": settings, "device_map": {"": "cpu"}}


def settings_of(bits: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Transformers' settings for one of `QUANTIZATIONS`; `dtype` is what layers compute in."""
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def is_quantised(model: nn.Module) -> bool:
    """Whether a model was quantised when it was loaded."""
    return getattr(model, "hf_quantizer", None) is not None


def quantised_settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The settings that a quantised model's config holds, as plain values; None for any other."""
    found = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def bits_of(config: PreTrainedConfig) -> str | None:
    """Which of `QUANTIZATIONS` the config of a loaded or stored model names; None if it names neither."""
    settings = quantised_settings(config) or {}
    return next((bits for bits in QUANTIZATIONS if settings.get(f"load_in_{bits}")), None)


def plain_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module with its quantised weights dequantised, so that they can be copied into a plain module."""
    weights = module.state_dict()
    for name, part in module.named_modules():
        if is_packed(part):
            from bitsandbytes import functional

            own = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{name}.")}
            if (scales := own.get(f"{name}.SCB")) is not None:
                weight = functional.int8_vectorwise_dequant(part.weight.data, scales)
            else:
                weight = functional.dequantize_4bit(part.weight.data, part.weight.quant_state)
            weights |= {f"{name}.weight": weight}
            weights |= {key: value for key, value in own.items() if key == f"{name}.bias"}
    return weights


def is_packed(part: nn.Module) -> bool:
    """Whether a layer's weight is one of bitsandbytes'."""
    return type(getattr(part, "weight", None)).__name__ in PACKED


def keep_as_loaded(model: nn.Module) -> None:
    """Keep bitsandbytes from changing what quantised layers hold when they are first used.

    In 8 bits, a forward pass detaches the scales from the weights, which could not be moved after it. On some CPUs
    (AVX512-BF16), a pass in evaluation mode repacks 4-bit weights and rounds their scales, which changes the Pilot.
    """
    for part in model.modules():
        if is_packed(part) and hasattr(part, "state"):
            part.register_forward_hook(_put_scales_back)
        elif is_packed(part):
            part.support_avx512bf16_for_cpu = False


def _put_scales_back(layer: nn.Module, given: Any, output: Tensor) -> None:
    layer.weight.SCB = layer.state.SCB


def parameter_count(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for; 4-bit weights are packed two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def packed_bytes(bits: str, outputs: int, inputs: int) -> int:
    """Bytes of a quantised weight of some rows and columns, its scales and tables included."""
    weights = outputs * inputs
    if bits == "8bit":
        return weights + 4 * outputs  # a float32 for each row
    scales = math.ceil(weights / BLOCK)
    tables = 4 * (16 + 256 + 1)
    return math.ceil(weights / 2) + scales + 4 * math.ceil(scales / NESTED_BLOCK) + tables


def device_problem(bits: str, device: str) -> str | None:
    """Try to train through a quantised layer on a kind of device; returns why bitsandbytes cannot, or None."""
    from bitsandbytes import nn as layers

    try:
        layer = layers.Linear4bit(64, 64, quant_type="nf4") if bits == "4bit" else None
        layer = layer or layers.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0)
        inputs = torch.ones(2, 64, device=device, requires_grad=True)
        layer.requires_grad_(False).to(device)(inputs).sum().backward()
        return None if inputs.grad.isfinite().all() else "its gradients are not finite"
    except Exception as error:  # whatever a missing kernel raises
        return " ".join(str(error).split()) or type(error).__name__
