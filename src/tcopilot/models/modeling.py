"""The fused model for both architectures as transformers knows models: `forward`, and the Auto classes.

Shapes: B batch, M source length, N targets, K known targets, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from tcopilot.models.caches import of_pilot
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.fused_model import IGNORED_LABEL, TCopilotModel
from tcopilot.models.generation import FusedGenerationMixin
from tcopilot.models.prefix import can_share, run_after_prefix
from tcopilot.models.prefix import position_ids as count_positions

TEXT = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"}  # what a prefix changes


@dataclass
class TCopilotCausalLMOutput(CausalLMOutputWithPast):
    """The usual output; with `output_corrections` also log p̂ and f^C [B, N, V] of the target positions, float32."""

    pilot_log_probs: Tensor | None = None
    corrections: Tensor | None = None


@dataclass
class TCopilotSeq2SeqLMOutput(Seq2SeqLMOutput):
    """As `TCopilotCausalLMOutput`."""

    pilot_log_probs: Tensor | None = None
    corrections: Tensor | None = None


class TCopilotForCausalLM(TCopilotModel, FusedGenerationMixin):
    """A decoder-only Pilot with its Copilot."""

    auto_class = AutoModelForCausalLM

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, target_start: int | None = None, logits_to_keep: int = 0,
        weights_B: Tensor | None = None, copies: int = 1, prefix: int = 0, output_corrections: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Return fused logits; positions before the first target carry the Pilot's logits.

        Prompts are left-padded, targets right-padded, so that all rows share `target_start`.

        Args:
            input_ids: [B, M + K] prompt and known targets, or [B, 1] after a filled cache.
            attention_mask: [B, M + K] over everything seen; None means no padding.
            position_ids: counted from the mask when None.
            past_key_values: a `TCopilotCache` (or, at λ = 0, any cache).
            use_cache: keep a cache and return it.
            labels: [B, M + K]; −100 is left out of the loss. Also tells where the target starts.
            target_start: M, the column of the first target. Default: from `labels`, else the whole input is prompt.
            logits_to_keep: return only the last that many positions; 0 returns all.
            weights_B: λ of each row, in place of the model's one.
            copies: consecutive rows that are equal while a cache is being filled; only one of each is computed.
            prefix: tokens with which all prompts begin alike; they are read once, where all logits asked for are of
                later positions (`logits_to_keep`).
            output_corrections: also return log p̂ and f^C; the Copilot then runs at λ = 0 too.
            **kwargs: further arguments of the Pilot.
        """
        cache, past, copies = self._open_cache(past_key_values, use_cache, weights_B, copies)
        input_ids, attention_mask, position_ids = _first_of(copies, input_ids, attention_mask, position_ids)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache, **kwargs}
        prefix = 0 if past else prefix
        if self._is_pilot_only(weights_B) and not output_corrections:
            given |= {"past_key_values": cache, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
            out, _ = self._read(prefix, given) if labels is None else (self.pilot(**given, labels=labels), None)
            (out.logits,) = _repeat(copies, out.logits, cache=cache)
            return out
        length = input_ids.shape[1]
        start = length if past else _target_start(target_start, labels, length)
        corrected = length - start + 1
        wanted = length if logits_to_keep == 0 else logits_to_keep
        if position_ids is None and attention_mask is not None:
            position_ids = count_positions(attention_mask)[:, past:]
        given |= {
            "past_key_values": of_pilot(cache), "position_ids": position_ids,
            "logits_to_keep": max(wanted, corrected), "output_hidden_states": True,
        }  # fmt: skip
        if past:
            out, *parts = self._next(lambda: self.pilot(**given), input_ids, cache)
        else:
            out, embedded_BTP = self._read(prefix, given)
            mask_BM = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            states_BNP = self._pooled(out, slice(-corrected, None))
            source = (embedded_BTP[:, :start], mask_BM[:, :start].bool())
            parts = self._correct_text(out.logits[:, -corrected:], input_ids[:, start:], *source, states_BNP, cache)
        logits, log_probs_BNV, corrections_BNV = _repeat(copies, out.logits, *parts, cache=cache)
        fused_BNV = self._fused_logits(logits[:, -corrected:], log_probs_BNV, corrections_BNV, weights_B)
        if logits.shape[1] > corrected:
            fused_BNV = torch.cat([logits[:, :-corrected].float(), fused_BNV], dim=1)
        loss = None
        if labels is not None:
            loss = _cross_entropy(fused_BNV[:, :-1], labels[:, 1 - fused_BNV.shape[1] :])
        extra = {"pilot_log_probs": log_probs_BNV, "corrections": corrections_BNV} if output_corrections else {}
        return TCopilotCausalLMOutput(loss=loss, logits=fused_BNV[:, -wanted:], past_key_values=cache, **extra)

    def _read(self, prefix: int, given: dict[str, Any]) -> tuple[CausalLMOutputWithPast, Tensor | None]:
        """Run the Pilot on texts, their common prefix once where that can be done; also returns the embedded texts."""
        ids, mask, cache = given["input_ids"], given["attention_mask"], given["past_key_values"]
        length = ids.shape[1]
        if prefix and 0 < given["logits_to_keep"] <= length - prefix and can_share(self.pilot, length, cache):
            rest = {name: value for name, value in given.items() if name not in TEXT}
            return run_after_prefix(
                self.pilot, prefix, ids, torch.ones_like(ids) if mask is None else mask, cache, **rest
            )
        out = self.pilot(**given)
        return out, out.hidden_states and out.hidden_states[0]

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Decode from the fused distribution; arguments as in transformers. Prompts must be left-padded."""
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None and not self._is_pilot_only(kwargs.get("weights_B")):
            kwargs.setdefault("target_start", prompt.shape[1])
        return super().generate(inputs, **kwargs)


class TCopilotForSeq2SeqLM(TCopilotModel, FusedGenerationMixin):
    """An encoder-decoder Pilot with its Copilot."""

    auto_class = AutoModelForSeq2SeqLM

    def get_encoder(self):
        """The Pilot's encoder, which `generate` runs once per prompt."""
        return self.pilot.get_encoder()

    def get_decoder(self):
        """The Pilot's decoder."""
        return self.pilot.get_decoder()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None, past_key_values: Cache | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, weights_B: Tensor | None = None, copies: int = 1,
        output_corrections: bool = False, **kwargs: Any,
    ) -> Seq2SeqLMOutput:  # fmt: skip
        """Return fused logits [B, N, V] for every decoder position; arguments as in `TCopilotForCausalLM.forward`.

        Prompts are [B, M], and `encoder_outputs` of `get_encoder()` may stand for them. `decoder_input_ids` [B, N]
        begin with the start token; they are made from `labels` [B, N] when None. Targets are right-padded, so
        `decoder_attention_mask` changes nothing that is read.
        """
        if decoder_input_ids is None and labels is not None:
            padded = labels.masked_fill(labels == IGNORED_LABEL, self.config.pad_token_id)
            start = padded.new_full((len(padded), 1), self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([start, padded[:, :-1]], dim=1)
        cache, past, copies = self._open_cache(past_key_values, use_cache, weights_B, copies)
        input_ids, attention_mask, decoder_input_ids, decoder_attention_mask = _first_of(
            copies, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask
        )
        if copies > 1 and encoder_outputs is not None:
            encoder_outputs = BaseModelOutput(last_hidden_state=encoder_outputs[0][::copies])
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "encoder_outputs": encoder_outputs,
            "decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask,
            "use_cache": use_cache, **kwargs,
        }  # fmt: skip
        if self._is_pilot_only(weights_B) and not output_corrections:
            out = self.pilot(**given, past_key_values=cache, labels=labels)
            (out.logits,) = _repeat(copies, out.logits, cache=cache)
            return out
        given |= {"past_key_values": of_pilot(cache), "output_hidden_states": True}
        if past:
            out, *parts = self._next(lambda: self.pilot(**given), decoder_input_ids, cache)
        else:
            out = self.pilot(**given)
            source = out.encoder_last_hidden_state
            mask_BM = source.new_ones(source.shape[:2]) if attention_mask is None else attention_mask
            read = (decoder_input_ids[:, 1:], source, mask_BM.bool(), self._pooled(out))
            parts = self._correct_text(out.logits, *read, cache)
        pilot_BNV, log_probs_BNV, corrections_BNV = _repeat(copies, out.logits, *parts, cache=cache)
        fused_BNV = self._fused_logits(pilot_BNV, log_probs_BNV, corrections_BNV, weights_B)
        extra = {"pilot_log_probs": log_probs_BNV, "corrections": corrections_BNV} if output_corrections else {}
        return TCopilotSeq2SeqLMOutput(
            loss=None if labels is None else _cross_entropy(fused_BNV, labels), logits=fused_BNV,
            past_key_values=cache, encoder_last_hidden_state=out.encoder_last_hidden_state, **extra,
        )  # fmt: skip


def fused_class(is_encoder_decoder: bool) -> type[TCopilotForCausalLM | TCopilotForSeq2SeqLM]:
    """The fused class for a Pilot of that architecture."""
    return TCopilotForSeq2SeqLM if is_encoder_decoder else TCopilotForCausalLM


def _target_start(target_start: int | None, labels: Tensor | None, length: int) -> int:
    """The column of the first target; if nothing tells where it is, the whole text is prompt."""
    if target_start is None:
        if labels is None:
            return length
        starts = (labels != IGNORED_LABEL).int().argmax(dim=1).unique()
        if len(starts) > 1:
            raise ValueError(
                f"targets start at columns {starts.tolist()}: a fused model needs one column for the whole batch; "
                f"left-pad the prompts"
            )
        target_start = int(starts[0])
    if not 1 <= target_start <= length:
        raise ValueError(
            f"target_start={target_start} with {length} tokens: a prompt of at least one token comes before the "
            f"target; set the labels of the prompt to {IGNORED_LABEL}"
        )
    return target_start


def _cross_entropy(logits_BNV: Tensor, labels_BN: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits_BNV.flatten(0, 1), labels_BN.flatten(), ignore_index=IGNORED_LABEL)


def _first_of(copies: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """One of each group of equal rows."""
    return [tensor if tensor is None or copies == 1 else tensor[::copies] for tensor in tensors]


def _repeat(copies: int, *tensors: Tensor | None, cache: Cache | None) -> list[Tensor | None]:
    """Undo `_first_of`, in the cache too."""
    if copies == 1:
        return list(tensors)
    cache.batch_repeat_interleave(copies)
    return [None if tensor is None else tensor.repeat_interleave(copies, dim=0) for tensor in tensors]


AutoConfig.register("t_copilot", TCopilotConfig)
AutoModelForCausalLM.register(TCopilotConfig, TCopilotForCausalLM)
AutoModelForSeq2SeqLM.register(TCopilotConfig, TCopilotForSeq2SeqLM)
