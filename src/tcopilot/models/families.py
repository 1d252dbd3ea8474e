"""What differs between model families, in one place: how a family's stock decoder becomes the body of a Copilot.

No layer of a family is rewritten. An encoder-decoder's cross-attention already reads any memory; a decoder-only layer
gets its self-attention wrapped by `LogAttention`, which runs the family's own. Which families this serves is decided
by a check (`family_check.py`), not here.
"""

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from tcopilot.models.caches import with_room
from tcopilot.models.log_attention import LogAttention
from tcopilot.models.quantization import plain_weights

# What modules are called, most frequent names first.
LAYERS = ("layers", "block", "h", "blocks")
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
INPUT_NORM = ("input_layernorm", "ln_1", "self_attn_layer_norm", "attention_layernorm", "operator_norm")
FINAL_NORM = ("norm", "final_layer_norm", "layer_norm", "ln_f", "final_layernorm", "norm_f")
SCALED_WHERE_TIED = ("umt5", "switch_transformers")
"""Relatives of T5 that scale the head's input where it shares the embedding; the others say so in their config."""
_decoder_classes: dict[str, type[nn.Module]] = {}


class UnsupportedFamilyError(ValueError):
    """The family's decoder cannot carry log attention, or a Copilot could not rely on what it computes."""


def learned_positions(model: PreTrainedModel) -> int | None:
    """The number of positions of a model that has a vector for each, such as GPT-2 and BART; None for other models."""
    tables = (name for name, part in model.named_modules() if isinstance(part, nn.Embedding))
    has_table = any(re.search("position|wpe$", name) for name in tables)
    return getattr(model.config, "max_position_embeddings", None) if has_table else None


def largest_position(body: PreTrainedModel) -> int | None:
    """The last position that a body can be given; None if it computes rotary embeddings of any."""
    longest = None if hasattr(body, "rotary_emb") else getattr(body.config, "max_position_embeddings", None)
    return None if longest is None else longest - 1


def has_encoder(model_type: str) -> bool:
    """Whether Pilots of a type are encoder-decoders, whose Copilots read the log by the stock cross-attention."""
    return model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES


def decoder_config(config: PreTrainedConfig, layers: int | None = None) -> PreTrainedConfig:
    """Return the config of the family's decoder alone, cut to its first `layers` layers."""
    body = copy.deepcopy(skeleton(config).get_decoder().config)
    body.model_type = config.model_type
    vars(body).pop("quantization_config", None)  # the Copilot's copies of a Pilot's layers are not quantised
    depth = decoder_depth(body)
    layers = depth if layers is None else layers
    if not 1 <= layers <= depth:
        raise ValueError(f"copilot layers={layers}: the {config.model_type} decoder has {depth}; choose 1 to {depth}")
    cut_depth(body, layers)
    if hasattr(body, "decoder_layerdrop"):
        body.decoder_layerdrop = 0.0
    return body


def cut_depth(config: PreTrainedConfig, layers: int) -> None:
    """Set the number of layers in place, and shorten the lists that have one value per layer."""
    for name, value in per_layer(config).items():
        setattr(config, name, list(value[:layers]))
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "decoder_layers"):
        if hasattr(config, name):
            setattr(config, name, layers)


def per_layer(config: PreTrainedConfig) -> dict[str, list[Any]]:
    """Return the lists of a config that have one value per layer."""
    return {
        name: value
        for name, value in vars(config).items()
        if ("layer" in name or "window" in name) and isinstance(value, list) and len(value) == decoder_depth(config)
    }


def set_dropout(config: PreTrainedConfig, rate: float) -> None:
    """Set the dropout of a decoder's config; a rotary family has it in its attention only."""
    for name in ("dropout_rate", "dropout", "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, rate)


def decoder_depth(config: PreTrainedConfig) -> int:
    """Number of decoder layers of a full or decoder-only config."""
    for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise UnsupportedFamilyError(f"{config.model_type}: the config does not say how many decoder layers there are")


def build_body(config: PreTrainedConfig) -> nn.Module:
    """Build the family's stock decoder, without its token embedding (the Copilot feeds embedded errors)."""
    if config.model_type not in _decoder_classes:  # only a whole model tells the class, and building it is slower
        _decoder_classes[config.model_type] = type(skeleton(config).get_decoder())
    body = _decoder_classes[config.model_type](copy.deepcopy(config))
    body.set_input_embeddings(None)
    return body


def load_decoder_weights(body: nn.Module, donor: PreTrainedModel) -> None:
    """Copy the donor's first decoder layers into `body`, wrapped or not; a donor with LoRA adapters is refused."""
    given = plain_weights(donor.get_decoder())
    attention, norm = "|".join(ATTENTION), input_norm(decoder_layers(body)[0])[0]
    origin = {}
    for name in body.state_dict():  # log attention holds the stock attention and a copy of the layer's input norm
        stock = re.sub(rf"\.({attention})\.attention\.", r".\1.", name)
        origin[name] = name if name in given else re.sub(rf"\.({attention})\.norm\.", f".{norm}.", stock)
    if missing := sorted(set(origin.values()) - set(given)):
        raise ValueError(
            f"the donor's decoder has no weights {missing[:3]} ({len(missing)} in all). Build the Copilot before "
            f"adapters are injected into the model that it starts from"
        )
    body.load_state_dict({name: given[source] for name, source in origin.items()})


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """The layers of a decoder."""
    return _named(LAYERS, decoder, "layers")[1]


def self_attention(layer: nn.Module) -> tuple[str, nn.Module]:
    """The self-attention of a decoder-only layer, and its name."""
    return _named(ATTENTION, layer, "attention")


def input_norm(layer: nn.Module) -> tuple[str, nn.Module | None]:
    """The norm between a decoder-only layer's input and its attention, and its name; None where there is none."""
    return _first_of(INPUT_NORM, layer)


def install_log_attention(body: nn.Module, layers: list[int]) -> None:
    """Replace the self-attention of decoder-only layers (0-based) by log attention (Eq. 5–6)."""
    for index in layers:
        layer = decoder_layers(body)[index]
        name, attention = self_attention(layer)
        setattr(layer, name, LogAttention(attention, copy.deepcopy(input_norm(layer)[1])))


def remove_positions(body: nn.Module) -> None:
    """Remove an encoder-decoder's learned positions; rotary ones can stay, being the identity at position 0."""
    for module in body.modules():
        if getattr(module, "has_relative_attention_bias", False):  # T5: block 0 owns the bias of all blocks
            module.has_relative_attention_bias = False
            del module.relative_attention_bias
    if hasattr(body, "embed_positions"):  # BART
        body.embed_positions = _NoPositions()


def run_body(
    body: nn.Module, inputs_BNC: Tensor, self_mask_B1NK: Tensor, positions_BN: Tensor,
    log_BSC: Tensor, log_mask_B1NS: Tensor, log_positions_BS: Tensor, cache: Cache | None,
) -> Tensor:  # fmt: skip
    """Run the stock decoder on embedded errors, with the log as the memory that it attends to.

    `log_BSC` and its positions are the rows that are new in this call; the additive `log_mask_B1NS` covers those in
    the cache too. Positions are rotary ones, which encoder-decoders ignore. Returns the last hidden state [B, N, C].
    """
    if isinstance(cache, EncoderDecoderCache):
        for layer in cache.is_updated:  # let the stock cross-attention append the new rows instead of reusing
            cache.is_updated[layer] = False
    # Some families do not broadcast a mask over the batch.
    given = {"inputs_embeds": inputs_BNC, "attention_mask": self_mask_B1NK.expand(len(inputs_BNC), -1, -1, -1)}
    if is_cross_attending(body):
        given |= {"encoder_hidden_states": log_BSC, "encoder_attention_mask": log_mask_B1NS}
        given |= {"position_ids": positions_BN} if hasattr(body, "rotary_emb") else {}
    else:
        places = {"position_ids": log_positions_BS, "position_embeddings": _rotary(body, log_BSC, log_positions_BS)}
        given |= {"position_ids": positions_BN, "log_BSC": log_BSC, "log_mask": log_mask_B1NS, "log_places": places}
    return body(**given, past_key_values=cache, use_cache=cache is not None).last_hidden_state


def _rotary(body: nn.Module, log_BSC: Tensor, log_positions_BS: Tensor) -> Any:
    """Return the rotary embeddings of the log's positions, by kind of layer where these differ (Gemma 3)."""
    if not hasattr(body, "rotary_emb"):
        return None
    if "layer_type" not in inspect.signature(body.rotary_emb.forward).parameters:
        return body.rotary_emb(log_BSC, position_ids=log_positions_BS)
    return {kind: body.rotary_emb(log_BSC, log_positions_BS, kind) for kind in dict.fromkeys(body.config.layer_types)}


def is_cross_attending(body: nn.Module) -> bool:
    """Whether the decoder reads its memory by cross-attention (T5, BART) rather than by `LogAttention`."""
    return has_encoder(body.config.model_type)


def new_cache(body: nn.Module) -> Cache:
    """An empty cache for `run_body`. Built without a config, so that sliding windows never truncate the log."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if is_cross_attending(body) else DynamicCache()
    return with_room(cache)


def memory_scale(donor: PreTrainedModel) -> float:
    """Root mean square of what a donor's cross-attention was trained to read: its encoder's output, behind a norm."""
    encoder = donor.get_encoder()
    norm = final_norm(encoder)
    if isinstance(norm, nn.Identity):
        norm = encoder.layers[-1].final_layer_norm
    squares = [parameter.detach().float().square() for parameter in norm.parameters()]  # w, and b if any
    return sum(squares).mean().sqrt().item()


def input_embeddings(model: PreTrainedModel) -> Tensor:
    """The matrix [V, width] of input embeddings as the model applies them, scale included (Gemma, BART)."""
    embed = model.get_input_embeddings()
    with torch.no_grad():
        return embed(torch.arange(embed.num_embeddings, device=embed.weight.device)).detach().clone()


def logits_from_head_input(
    model: PreTrainedModel, head_input_BNP: Tensor, tokens_U: Tensor | slice = slice(None)
) -> Tensor:
    """Logits [B, N, V] from the last of the decoder's hidden states, as the model's own forward pass computes them.

    A tied T5 scales the state down, BART adds a bias to the logits, Granite and Cohere scale them, Gemma2 caps them.
    With `tokens_U` only the logits [B, N, U] of these tokens are computed.
    """
    config, head = model.config, model.get_output_embeddings()
    if getattr(config, "scale_decoder_outputs", config.model_type in SCALED_WHERE_TIED and config.tie_word_embeddings):
        head_input_BNP = head_input_BNP * config.d_model**-0.5
    if isinstance(tokens_U, slice):
        logits_BNV = head(head_input_BNP)
    else:
        bias = getattr(head, "bias", None)
        logits_BNV = nn.functional.linear(
            head_input_BNP, head.weight[tokens_U], None if bias is None else bias[tokens_U]
        )
    if (bias_1V := getattr(model, "final_logits_bias", None)) is not None:
        logits_BNV = logits_BNV + bias_1V[:, tokens_U].to(logits_BNV.device)
    if (scale := getattr(config, "logits_scaling", None)) is not None:
        logits_BNV = logits_BNV / scale
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits_BNV = logits_BNV * scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits_BNV = torch.tanh(logits_BNV / cap) * cap
    return logits_BNV


def logit_lens(model: PreTrainedModel, layer_BNP: Tensor) -> Tensor:
    """Logits [B, N, V] of a layer's output, read as if it were the decoder's last: final norm, then head."""
    return logits_from_head_input(model, final_norm(model.get_decoder())(layer_BNP))


def final_norm(decoder: nn.Module) -> nn.Module:
    """The norm between a decoder's last layer and the head; BART, whose layers end in one, has none."""
    return _first_of(FINAL_NORM, decoder)[1] or nn.Identity()


@contextmanager
def layer_outputs(decoder: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collect what each layer of a decoder returns, before the final norm: one list per layer, one entry per call."""
    layers = decoder_layers(decoder)
    seen: list[list[Tensor]] = [[] for _ in layers]

    def keep(into: list[Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
        into.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for layer, outputs in zip(layers, seen, strict=True):
            hooks.callback(layer.register_forward_hook(partial(keep, outputs)).remove)
        yield seen


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The full model of a config on the meta device: classes and shapes, no memory."""
    config = copy.deepcopy(config)
    encoder_decoder = has_encoder(config.model_type)
    if encoder_decoder:
        config.is_encoder_decoder, config.is_decoder, config.use_cache = True, False, False
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def body_config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    """Rebuild a decoder's config from its saved dictionary."""
    values = {k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"}
    return AutoConfig.for_model(**values)


def _first_of(names: tuple[str, ...], module: nn.Module) -> tuple[str, nn.Module | None]:
    return next(((name, getattr(module, name)) for name in names if hasattr(module, name)), ("", None))


def _named(names: tuple[str, ...], module: nn.Module, what: str) -> tuple[str, Any]:
    name, found = _first_of(names, module)
    if found is None:
        raise UnsupportedFamilyError(f"{type(module).__name__} has no {what} by the name of {', '.join(names)}")
    return name, found


class _NoPositions(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())
