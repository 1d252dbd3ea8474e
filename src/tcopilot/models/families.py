"""What differs between model families, in one place: how a family's stock decoder becomes the body of a Copilot.

No layer of a family is rewritten. An encoder-decoder's cross-attention already reads any memory; a decoder-only layer
gets its self-attention wrapped by `LogAttention`, which uses the family's own projections and attention kernel.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from tcopilot.models.caches import with_room
from tcopilot.models.log_attention import LogAttention, additive, causal_mask

ENCODER_DECODERS = ("t5", "bart")
SUPPORTED = (*ENCODER_DECODERS, "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""Families that the tests run through training, cached decoding, saving and loading."""


class UnsupportedFamilyError(ValueError):
    """The family's decoder cannot carry log attention."""


def check_family(config: PreTrainedConfig) -> None:
    """Raise an `UnsupportedFamilyError` if the family's decoder cannot carry log attention; no weights are loaded.

    A family outside `SUPPORTED` passes if log attention fits a small random model of it.
    """
    if config.model_type in SUPPORTED:
        return
    try:
        if config.is_encoder_decoder:
            raise UnsupportedFamilyError("log attention fits the encoder-decoders " + " and ".join(ENCODER_DECODERS))
        _try_log_attention(config)
    except Exception as error:  # the family's own code may raise anything when it is run like this
        raise UnsupportedFamilyError(
            f"pilot model type {config.model_type!r} is not supported: a Copilot needs a decoder with separate q, k "
            f"and v projections and one rotary embedding, which hands unknown arguments on to its attention layers. "
            f"Tried on a small model of it: {' '.join(str(error).split())}. Supported: {', '.join(SUPPORTED)}, and "
            f"families built like them"
        ) from error


def _try_log_attention(config: PreTrainedConfig) -> None:
    """Compare log attention with the layers of a small random model of a decoder-only family.

    Where the log is a layer's own input, at the same positions and under the same mask, log attention is the stock
    self-attention. So both must agree to the bit; a norm, a gate or a rotation that only the stock layer has shows up.
    An error of any kind means that the small model cannot be built or a layer cannot take the log.
    """
    small, heads, tokens = decoder_config(config, min(decoder_depth(config), 8)), 4, 6
    grouped = getattr(config, "num_key_value_heads", None) != getattr(config, "num_attention_heads", None)
    sizes = {
        "hidden_size": 8 * heads, "intermediate_size": 32, "num_attention_heads": heads, "head_dim": 8,
        "num_key_value_heads": heads // 2 if grouped else heads, "vocab_size": 16, "pad_token_id": 0,
    }  # fmt: skip
    for name in sizes.keys() & vars(small).keys():
        setattr(small, name, sizes[name])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
        body = model.get_decoder()
        inputs_BNC, positions_BN = torch.randn(1, tokens, 8 * heads), torch.arange(tokens)[None]
        mask_B1NK = additive(causal_mask(tokens, inputs_BNC.device), inputs_BNC.dtype)
        options = {"attention_mask": mask_B1NK, "position_ids": positions_BN, "use_cache": False}
        for std in (0.3, 3.0):  # large values show what a family clips
            for parameter in body.parameters():
                parameter.normal_(std=std)
            for index, layer in enumerate(body.layers):
                stock, read = layer.self_attn, []
                hook = stock.register_forward_pre_hook(
                    lambda _, given, named, read=read: read.extend((*given, *named.values())), with_kwargs=True
                )
                expected_BNC = body(inputs_embeds=inputs_BNC, **options).last_hidden_state
                hook.remove()
                install_log_attention(body, [index])
                layer.self_attn.norm = None  # what is read here is behind the norm already
                found_BNC = run_body(
                    body, inputs_BNC, mask_B1NK, positions_BN, read[0], mask_B1NK, positions_BN, cache=None
                )
                layer.self_attn = stock
                if not torch.equal(found_BNC, expected_BNC):
                    raise UnsupportedFamilyError(f"log attention computes something else than {type(stock).__name__}")
        logits_BNV = model(inputs_embeds=inputs_BNC, **options).logits
        if not torch.allclose(logits_from_head_input(model, expected_BNC), logits_BNV, rtol=1e-4):
            raise UnsupportedFamilyError("its logits are not what its head makes of the decoder's last hidden state")


def decoder_config(config: PreTrainedConfig, layers: int | None = None) -> PreTrainedConfig:
    """Return the config of the family's decoder alone, cut to its first `layers` layers."""
    body = copy.deepcopy(skeleton(config).get_decoder().config)
    body.model_type = config.model_type
    depth = decoder_depth(body)
    layers = depth if layers is None else layers
    if not 1 <= layers <= depth:
        raise ValueError(f"copilot layers={layers}: the {config.model_type} decoder has {depth}; choose 1 to {depth}")
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "decoder_layers"):
        if hasattr(body, name):
            setattr(body, name, layers)
    if getattr(body, "layer_types", None):
        body.layer_types = list(body.layer_types[:layers])
    if hasattr(body, "decoder_layerdrop"):
        body.decoder_layerdrop = 0.0
    return body


def set_dropout(config: PreTrainedConfig, rate: float) -> None:
    """Set the dropout of a decoder's config; a rotary family has it in its attention only."""
    for name in ("dropout_rate", "dropout", "attention_dropout"):
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
    body = type(skeleton(config).get_decoder())(copy.deepcopy(config))
    body.embed_tokens = None
    return body


def load_decoder_weights(body: nn.Module, donor: PreTrainedModel) -> None:
    """Copy the donor's first decoder layers into `body`, wrapped or not; a donor with LoRA adapters is refused."""
    given = donor.get_decoder().state_dict()
    origin = {  # log attention holds the stock attention and a copy of the layer's input norm
        name: name.replace(".self_attn.norm.", ".input_layernorm.").replace(".self_attn.attention.", ".self_attn.")
        for name in body.state_dict()
    }
    if missing := sorted(set(origin.values()) - set(given)):
        raise ValueError(
            f"the donor's decoder has no weights {missing[:3]} ({len(missing)} in all). Build the Copilot before "
            f"adapters are injected into the model that it starts from"
        )
    body.load_state_dict({name: given[source] for name, source in origin.items()})


def install_log_attention(body: nn.Module, layers: list[int]) -> None:
    """Replace the self-attention of decoder-only layers (0-based) by log attention (Eq. 5–6)."""
    for index in layers:
        attention, norm = body.layers[index].self_attn, getattr(body.layers[index], "input_layernorm", None)
        if not all(hasattr(attention, name) for name in LogAttention.NEEDED):
            raise UnsupportedFamilyError(
                f"{type(attention).__name__} has no separate q_proj, k_proj, v_proj and o_proj, which log "
                f"attention needs"
            )
        body.layers[index].self_attn = LogAttention(attention, copy.deepcopy(norm))


def remove_positions(body: nn.Module) -> None:
    """Take the learned positions out of an encoder-decoder's decoder; at position 0 a rotation is the identity."""
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
    given = {"inputs_embeds": inputs_BNC, "attention_mask": self_mask_B1NK}
    if is_cross_attending(body):
        given |= {"encoder_hidden_states": log_BSC, "encoder_attention_mask": log_mask_B1NS}
    else:
        rotary = body.rotary_emb(log_BSC, position_ids=log_positions_BS)
        given |= {"position_ids": positions_BN, "log_BSC": log_BSC, "log_mask": log_mask_B1NS, "log_rotary": rotary}
    return body(**given, past_key_values=cache, use_cache=cache is not None).last_hidden_state


def is_cross_attending(body: nn.Module) -> bool:
    """Whether the decoder reads its memory by cross-attention (T5, BART) rather than by `LogAttention`."""
    return not hasattr(body, "rotary_emb")


def new_cache(body: nn.Module) -> Cache:
    """An empty cache for `run_body`. Built without a config, so that sliding windows never truncate the log."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if is_cross_attending(body) else DynamicCache()
    return with_room(cache)


def memory_scale(donor: PreTrainedModel) -> float:
    """Root mean square of what a donor's cross-attention was trained to read: its encoder's output, behind a norm."""
    encoder = donor.get_encoder()
    norm = encoder.layers[-1] if hasattr(encoder, "layers") else encoder
    squares = [
        parameter.detach().float().square() for parameter in norm.final_layer_norm.parameters()
    ]  # w, and b if any
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

    A tied T5 scales that output down, BART adds a bias to the logits, Granite scales them, Gemma2 caps them. With
    `tokens_U` only the logits [B, N, U] of these tokens are computed.
    """
    config, head = model.config, model.get_output_embeddings()
    if config.model_type == "t5" and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
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
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits_BNV = torch.tanh(logits_BNV / cap) * cap
    return logits_BNV


def logit_lens(model: PreTrainedModel, layer_BNP: Tensor) -> Tensor:
    """Logits [B, N, V] of a layer's output, read as if it were the decoder's last: final norm, then head."""
    return logits_from_head_input(model, final_norm(model.get_decoder())(layer_BNP))


def final_norm(decoder: nn.Module) -> nn.Module:
    """The norm between a decoder's last layer and the head; BART, whose layers end in one, has none."""
    return getattr(decoder, "norm", None) or getattr(decoder, "final_layer_norm", None) or nn.Identity()


@contextmanager
def layer_outputs(decoder: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Collect what each layer of a decoder returns, before the final norm: one list per layer, one entry per call."""
    layers = decoder.block if hasattr(decoder, "block") else decoder.layers
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
    encoder_decoder = config.model_type in ENCODER_DECODERS
    if encoder_decoder:
        config.is_encoder_decoder, config.is_decoder, config.use_cache = True, False, False
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def body_config_from_dict(values: dict[str, Any]) -> PreTrainedConfig:
    """Rebuild a decoder's config from its saved dictionary."""
    values = {k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"}
    return AutoConfig.for_model(**values)


class _NoPositions(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())
