"""The fused model of an encoder-decoder Pilot: every decoder position is a target.

Shapes: B batch, M source length, N targets, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import can_return_tuple

from tcopilot.models.caches import of_pilot
from tcopilot.models.fused_model import TCopilotModel, beside_logits, cross_entropy, first_of, not_read, repeat
from tcopilot.models.generation import FusedGenerationMixin
from tcopilot.models.target_start import IGNORED_LABEL


@dataclass
class TCopilotSeq2SeqLMOutput(Seq2SeqLMOutput):
    """The usual output; with `output_corrections` also log p̂ and f^C [B, N, V], float32."""

    pilot_log_probs: Tensor | None = None
    corrections: Tensor | None = None


class TCopilotForSeq2SeqLM(TCopilotModel, FusedGenerationMixin):
    """An encoder-decoder Pilot with its Copilot."""

    auto_class = AutoModelForSeq2SeqLM

    def get_encoder(self):
        """The Pilot's encoder, which `generate` runs once per prompt."""
        return self.pilot.get_encoder()

    def get_decoder(self):
        """The Pilot's decoder."""
        return self.pilot.get_decoder()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None, decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None, past_key_values: Cache | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: Any = None,
        output_attentions: bool | None = None, num_items_in_batch: Tensor | int | None = None,
        weights_B: Tensor | None = None, copies: int = 1, output_corrections: bool = False, **kwargs: Any,
    ) -> Seq2SeqLMOutput:  # fmt: skip
        """Return fused logits [B, N, V] for every decoder position; arguments as in `TCopilotForCausalLM.forward`.

        Prompts are [B, M], and `encoder_outputs` of `get_encoder()` may stand for them. `decoder_input_ids` [B, N]
        begin with the start token; they are made from `labels` [B, N] when None. Targets are right-padded, so
        `decoder_attention_mask` changes no logits of real tokens.
        """
        if decoder_input_ids is None and labels is not None:
            padded = labels.masked_fill(labels == IGNORED_LABEL, self.config.pad_token_id)
            start = padded.new_full((len(padded), 1), self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([start, padded[:, :-1]], dim=1)
        asked = self._asked(output_hidden_states, output_attentions)
        copies = 1 if asked else copies
        alone = self._is_pilot_only(weights_B) and not output_corrections
        if decoder_input_ids is None and not alone:
            raise ValueError("a Copilot reads the tokens of the target; give decoder_input_ids or labels")
        cache, past, copies = self._open_cache(past_key_values, use_cache, alone, copies)
        input_ids, attention_mask, decoder_input_ids, decoder_attention_mask = first_of(
            copies, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask
        )
        if copies > 1 and encoder_outputs is not None:
            encoder_outputs = BaseModelOutput(last_hidden_state=encoder_outputs[0][::copies])
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "encoder_outputs": encoder_outputs,
            "decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask,
            "use_cache": use_cache, "past_key_values": of_pilot(cache), **asked, **kwargs,
        }  # fmt: skip
        if alone:
            out = self.pilot(**given, labels=labels)
            if labels is not None and num_items_in_batch is not None:  # Pilots of this kind ignore it
                out.loss = cross_entropy(out.logits, labels, num_items_in_batch)
            self._only_pilot_read(out, cache, decoder_input_ids, past)
            (out.logits,) = repeat(copies, out.logits, cache=cache)
            return out
        given["output_hidden_states"] = True
        if past:
            if cache.start is None:
                raise not_read(past)
            out, *parts = self._next(lambda: self.pilot(**given), decoder_input_ids, cache)
        else:
            out = self.pilot(**given)
            source = out.encoder_last_hidden_state
            mask_BM = source.new_ones(source.shape[:2]) if attention_mask is None else attention_mask
            read = (decoder_input_ids[:, 1:], source, mask_BM.bool(), self._pooled(out))
            parts = self.correct_text(out.logits, *read, cache)
        if cache is not None:
            cache.read(decoder_input_ids, past)
            cache.start = 0
        pilot_BNV, log_probs_BNV, corrections_BNV = repeat(copies, out.logits, *parts, cache=cache)
        fused_BNV = self._fused_logits(pilot_BNV, log_probs_BNV, corrections_BNV, weights_B)
        extra = {"pilot_log_probs": log_probs_BNV, "corrections": corrections_BNV} if output_corrections else {}
        return TCopilotSeq2SeqLMOutput(
            loss=None if labels is None else cross_entropy(fused_BNV, labels, num_items_in_batch), logits=fused_BNV,
            past_key_values=cache, encoder_last_hidden_state=out.encoder_last_hidden_state,
            **beside_logits(out, asked), **extra,
        )  # fmt: skip
