"""Pilot and Copilot as one model: λ, the fusion rule, and the parts of a forward pass that all architectures share.

Shapes: B batch, M source length, N targets, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import ModelOutput

from tcopilot.models.base_copilot import BaseCopilot
from tcopilot.models.caches import TCopilotCache, of_pilot, with_room
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.decoding import Beside, advance, conclude, correct_more, correct_text
from tcopilot.models.fusion import FusionRule, build_fusion, check_weight
from tcopilot.models.gates import Gate
from tcopilot.models.kinds import empty_copilot, new_copilot
from tcopilot.models.pretrained import FusedPreTrainedModel, check_pilot, follow_attention
from tcopilot.models.quantised_export import base_of
from tcopilot.models.quantization import is_quantised, keep_as_loaded
from tcopilot.models.target_start import IGNORED_LABEL


class TCopilotModel(FusedPreTrainedModel):
    """What causal and sequence-to-sequence fused models share. λ = 0 or no Copilot runs the Pilot alone."""

    auto_class: Any

    def __init__(
        self, config: TCopilotConfig, pilot: PreTrainedModel | None = None, copilot: BaseCopilot | None = None
    ):
        super().__init__(config)
        check_pilot(config, pilot)
        needed = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
        if self.auto_class.__name__ != needed:
            kind = "an encoder-decoder" if config.is_encoder_decoder else "decoder-only"
            raise ValueError(f"this Pilot ({config.pilot.model_type}) is {kind}; load the model with {needed}")
        self.pilot = self.auto_class.from_config(copy.deepcopy(config.pilot)) if pilot is None else pilot
        if is_quantised(self.pilot):
            config.base = base_of(self.pilot)
            keep_as_loaded(self.pilot)
        if copilot is None and config.copilot is not None:
            copilot = empty_copilot(config.copilot)
        self.copilot = copilot
        if copilot is not None:
            copilot.bind(self.pilot)
            follow_attention(copilot, self.pilot)
        self.fusion = build_fusion(config.fusion)
        self.static_decoder = None  # kept by `static_decoding.sample` from one call to the next
        if getattr(self.pilot, "generation_config", None) is not None:
            self.generation_config = copy.deepcopy(self.pilot.generation_config)
        self.post_init()

    @classmethod
    def from_pilot(
        cls, pilot: PreTrainedModel, copilot: BaseCopilot | None = None, *, fusion: FusionRule | None = None,
        weight: float = 1.0, feedback: str = "observed", **copilot_options: Any,
    ) -> "TCopilotModel":  # fmt: skip
        """Fuse a loaded Pilot, which is not copied, with a Copilot, by Eq. 8 unless another rule is given.

        None builds a Copilot by `new_copilot(pilot, **copilot_options)`, which is a no-op until trained. As after
        `from_pretrained`, the model is in evaluation mode.
        """
        check_pilot(pilot.config, pilot)
        if copilot is None:
            copilot = new_copilot(pilot, **copilot_options)
        config = TCopilotConfig(pilot.config, copilot.config, fusion=fusion, weight=weight, feedback=feedback)
        return cls(config, pilot, copilot).eval()

    def replace_pilot(self, pilot: PreTrainedModel) -> None:
        """Put a Pilot of the same config in the place of the one at hand."""
        self.pilot = pilot
        if self.copilot is not None:
            self.copilot.bind(pilot)

    def attach(self, copilot: BaseCopilot) -> None:
        """Attach a Copilot that was built for this Pilot's width and vocabulary, in place of the one at hand."""
        vocab, width = self.pilot.get_input_embeddings().num_embeddings, self.pilot.config.hidden_size
        if (copilot.config.vocab_size, copilot.config.pilot_width) != (vocab, width):
            raise ValueError(
                f"this Copilot reads a Pilot of width {copilot.config.pilot_width} with {copilot.config.vocab_size} "
                f"tokens; the Pilot at hand has width {width} and {vocab} tokens"
            )
        copilot.bind(self.pilot)
        follow_attention(copilot, self.pilot)
        self.copilot = copilot
        self.config.copilot = copilot.config.to_dict()

    def detach_copilot(self) -> BaseCopilot | None:
        """Take the Copilot off and return it; what remains is the Pilot."""
        copilot, self.copilot, self.config.copilot = self.copilot, None, None
        return copilot

    @property
    def weight(self) -> float:
        """λ of Eq. 8. Setting it changes the next forward pass; 0 is the Pilot, exactly."""
        return self.config.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self.config.weight = check_weight(value)

    def set_gate(self, gate: Gate | None) -> None:
        """Scale corrections by a gate from now on; None takes the gate away."""
        self.copilot.set_gate(gate)
        self.config.copilot = self.copilot.config.to_dict()
        self.static_decoder = None  # its step was compiled with the previous gate

    def set_fusion(self, rule: FusionRule) -> None:
        """Change the fusion rule."""
        self.fusion, self.config.fusion = rule, rule.settings()
        self.static_decoder = None  # its step was compiled with the previous rule

    def fuse(self, log_probs_BNV: Tensor, corrections_BNV: Tensor | None, weight: float | Tensor) -> Tensor:
        """Return log p̃ at one λ or at one per row [B]; where λ or all of f^C is 0, it is log p̂ to the bit."""
        return self.fusion.fuse(log_probs_BNV, corrections_BNV, weight)

    def next_logits(self, given: dict[str, Any], token_B1: Tensor, cache: Cache, weights_B: Tensor) -> Tensor:
        """Logits [B, 1, V] of the target after `token_B1`; `given` are the Pilot's arguments but for the cache."""
        fused = isinstance(cache, TCopilotCache)
        given = given | {"past_key_values": of_pilot(cache), "use_cache": True, "output_hidden_states": fused}
        if not fused:
            return self.pilot(**given).logits.float()
        out, *parts = self._next(lambda: self.pilot(**given), token_B1, cache)
        return self._fused_logits(out.logits, *parts, weights_B)

    def _is_pilot_only(self, weights_B: Tensor | None = None) -> bool:
        return self.copilot is None or (weights_B is None and self.weight == 0)

    def _new_pilot_cache(self, keep_all: bool = True) -> Cache:
        """An empty cache that grows; a sliding window drops what it has passed, unless all is to be kept."""
        if self.config.is_encoder_decoder:
            # Sized by use: for T5, transformers would count the encoder's layers, too few for a deeper decoder.
            return with_room(EncoderDecoderCache(DynamicCache(), DynamicCache()))
        return with_room(DynamicCache() if keep_all else DynamicCache(config=self.config))

    def _open_cache(
        self, cache: Cache | None, use_cache: bool | None, alone: bool, copies: int
    ) -> tuple[Cache | None, int, int]:
        """Make a cache if one is asked for, unless the Pilot is `alone` and makes its own.

        Returns the cache (of both models unless the Pilot is alone), the number of tokens in it, and how many equal
        rows to compute once.
        """
        if cache is None and use_cache and not alone:
            cache = self._new_pilot_cache()
        past = 0 if cache is None else int(cache.get_seq_length())  # a static cache counts on its device
        if cache is not None and not alone and not isinstance(cache, TCopilotCache):
            cache = TCopilotCache(cache)
        can_repeat_rows = isinstance(of_pilot(cache), DynamicCache | EncoderDecoderCache)  # a static cache cannot
        return cache, past, copies if can_repeat_rows and not past else 1

    def _only_pilot_read(self, out: ModelOutput, cache: Cache | None, ids_BN: Tensor | None, past: int) -> None:
        """Return a cache of both models in the output, after the Pilot has read the last tokens alone."""
        if isinstance(cache, TCopilotCache):
            cache.read(ids_BN, past)
            cache.forget_copilot()
            out.past_key_values = cache

    def _asked(self, hidden_states: Any, attentions: bool | None) -> dict[str, Any]:
        """Which states of the Pilot this call or the config asks for: all, or those of some layers."""
        asked = {"output_hidden_states": hidden_states, "output_attentions": attentions}
        asked = {name: getattr(self.config, name, None) if given is None else given for name, given in asked.items()}
        return {name: given for name, given in asked.items() if given is not None and given is not False}

    def _pooled(self, out: ModelOutput, positions: slice = slice(None)) -> Tensor | None:
        """h̄ of the targets; None without a Copilot to read it."""
        hidden_states = out.decoder_hidden_states if self.config.is_encoder_decoder else out.hidden_states
        return None if self.copilot is None else self.copilot.pooler(hidden_states, positions)

    def correct_text(
        self, logits_BNV: Tensor, tokens_BK: Tensor, source_BMP: Tensor | None, source_mask_BM: Tensor | None,
        states_BNP: Tensor | None, cache: TCopilotCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return log p̂ [B, N, V] in float32 and f^C (None without a Copilot); the cache keeps the Copilot's state."""
        log_probs_BNV = torch.log_softmax(logits_BNV.float(), dim=-1)
        if self.copilot is None:
            return log_probs_BNV, None
        text = (log_probs_BNV, tokens_BK, source_BMP, source_mask_BM, states_BNP)
        keep = {"keep": cache is not None, "record": cache is not None and cache.records}
        corrections_BNV, state = correct_text(self.copilot, self.config.feedback, *text, **keep)
        if cache is not None:
            cache.copilot = state
        return log_probs_BNV, corrections_BNV

    def _next(self, run_pilot: Callable[[], ModelOutput], tokens_BK: Tensor, cache: TCopilotCache):
        """Run both models for the targets after K more tokens; returns the Pilot's output, log p̂ and f^C.

        In strict context the Copilot's body needs nothing of the Pilot's present step, so after one token it runs
        beside the Pilot: on a stream of its own on a GPU, before the Pilot elsewhere. In inclusive context it reads h̄
        of this step and runs after the Pilot.
        """
        if self.copilot is None:
            out = run_pilot()
            return out, torch.log_softmax(out.logits.float(), dim=-1), None
        copilot, state = self.copilot, cache.copilot
        is_beside = copilot.is_strict and tokens_BK.shape[1] == 1
        if is_beside:
            body = Beside(tokens_BK.device, lambda: advance(copilot, tokens_BK, state.pending_B1P, state))
        out = run_pilot()
        states_BKP, log_probs_BKV = self._pooled(out), torch.log_softmax(out.logits.float(), dim=-1)
        if is_beside:
            return out, log_probs_BKV, conclude(copilot, body.result(), log_probs_BKV, states_BKP, state)
        return out, log_probs_BKV, correct_more(copilot, log_probs_BKV, tokens_BK, states_BKP, state)

    def _fused_logits(self, pilot_BNV, log_probs_BNV, corrections_BNV, weights_B: Tensor | None) -> Tensor:
        """Return log p̃; the Pilot's logits where λ or f^C is 0, since log p̂ may round two logits to a tie."""
        weight = self.weight if weights_B is None else weights_B
        return self.fusion.fuse(log_probs_BNV, corrections_BNV, weight, pilot_BNV.float())


def beside_logits(out: ModelOutput, asked: dict[str, Any]) -> dict[str, Any]:
    """The Pilot's hidden states and attentions in its output, as far as they are asked for."""
    kinds = tuple(name.removeprefix("output_") for name in asked)
    found = {name: value for name, value in out.items() if kinds and name.endswith(kinds)}
    if (layers := asked.get("output_hidden_states", True)) is not True:
        layers = [layers] if isinstance(layers, int) else layers
        for name in [name for name in found if name.endswith("hidden_states")]:
            chosen = {layer % len(found[name]) for layer in layers}
            found[name] = tuple(state if layer in chosen else None for layer, state in enumerate(found[name]))
    return found


def cross_entropy(logits_BNV: Tensor, labels_BN: Tensor, items: Tensor | int | None = None) -> Tensor:
    """The mean over labels, or their sum divided by `items`, for a batch that is accumulated over several passes."""
    options = {"ignore_index": IGNORED_LABEL, "reduction": "mean" if items is None else "sum"}
    loss = torch.nn.functional.cross_entropy(logits_BNV.flatten(0, 1), labels_BN.flatten(), **options)
    return loss if items is None else loss / torch.as_tensor(items, device=loss.device)


def first_of(copies: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """One of each group of equal rows."""
    return [tensor if tensor is None or copies == 1 else tensor[::copies] for tensor in tensors]


def repeat(copies: int, *tensors: Tensor | None, cache: Cache | None) -> list[Tensor | None]:
    """Undo `first_of`, in the cache too."""
    if copies == 1:
        return list(tensors)
    cache.batch_repeat_interleave(copies)
    return [None if tensor is None else tensor.repeat_interleave(copies, dim=0) for tensor in tensors]


def not_read(tokens: int) -> ValueError:
    """The error for a cache whose tokens the Copilot has not read."""
    return ValueError(
        f"the Copilot has not read the {tokens} tokens of this cache: the Pilot read them alone, at λ = 0, or some "
        f"were cropped; read the text anew, or give generate all of it"
    )
