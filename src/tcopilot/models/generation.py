"""`generate` of a fused model: transformers' decoding with the caches of both models, at one λ or at several at once.

Shapes: B batch, M source length.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import LogitNormalization, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutput, ModelOutput

from tcopilot.models.caches import TCopilotCache
from tcopilot.models.static_decoding import sample

OURS = ("copies", "weights_B", "target_start", "prefix")
"""Arguments of the forward pass that a draft model does not know."""


class FusedGenerationMixin(GenerationMixin):
    """Decoding for a `TCopilotModel`: greedy, sampling and beams, with dynamic or static caches."""

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Decode from the fused distribution; arguments as in transformers. Prompts must be left-padded.

        All given tokens are the prompt, and a cache in `past_key_values` may hold a part of them. Only if the cache
        ends within an answer and a single token follows it does decoding continue that answer.
        """
        config = generation_config or self.generation_config
        repeats = max(  # how often transformers is about to repeat each row, for beams or samples
            kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")
        )
        kwargs["copies"] = kwargs.get("copies", 1) * repeats
        if not self._is_pilot_only(kwargs.get("weights_B")):
            self._tell_start(inputs, kwargs)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def _tell_start(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Add to the arguments where a decoder-only model's target begins, and to a Pilot's cache the tokens in it."""
        if self.config.is_encoder_decoder:
            known_BN = kwargs.get("decoder_input_ids")
            if known_BN is not None and kwargs.get("past_key_values") is not None:
                kwargs.setdefault("decoder_attention_mask", torch.ones_like(known_BN))  # else all is read again
            return
        cache, ids_BM = kwargs.get("past_key_values"), inputs if inputs is not None else kwargs.get("input_ids")
        start, past = _prompt_columns(inputs, kwargs), 0 if cache is None else int(cache.get_seq_length())
        if isinstance(cache, TCopilotCache):
            if cache.start is not None and cache.start < past == start - 1:
                start = cache.start
        elif past and ids_BM is not None and past < ids_BM.shape[1]:  # the Pilot has read it alone
            kwargs["past_key_values"] = TCopilotCache(cache, ids_BM[:, :past])
        kwargs.setdefault("target_start", start)

    def generate_at_weights(
        self, weights: Sequence[float], input_ids: Tensor, attention_mask: Tensor, prefix: int = 0, **kwargs: Any
    ) -> list[Any]:
        """Decode prompts [B, M] at several λ at once; both models read each prompt once, not once for each λ.

        `prefix` is the number of tokens with which all prompts begin alike; they are read once for the whole batch.
        Further arguments are those of `generate`. Returns for each λ what `generate` returns, at one length for all;
        an output class holds sequences and scores only. The checkpoint's `generation_config.json` has no effect, so
        that evaluation depends on the settings given here alone.
        """
        before = self.weight, self.generation_config
        special = {f"{name}_token_id": getattr(before[1], f"{name}_token_id") for name in ("pad", "bos", "eos")}
        kwargs |= {"prefix": prefix} if prefix else {}
        special["decoder_start_token_id"] = self.config.decoder_start_token_id  # as targets began in training
        self.generation_config = GenerationConfig(**special)
        try:
            return self._at_weights(weights, input_ids, attention_mask, **kwargs)
        finally:
            self.weight, self.generation_config = before

    def _at_weights(self, weights: Sequence[float], input_ids: Tensor, attention_mask: Tensor, **kwargs) -> list[Any]:
        count = len(weights)
        if self.copilot is None or len(set(weights)) == 1:
            self.weight = weights[0]
            return [self.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)] * count
        if self.config.is_encoder_decoder:
            encoded_BMP = self.get_encoder()(input_ids, attention_mask=attention_mask).last_hidden_state
            kwargs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded_BMP.repeat_interleave(count, dim=0))
        found = self.generate(
            input_ids=input_ids.repeat_interleave(count, dim=0),
            attention_mask=attention_mask.repeat_interleave(count, dim=0),
            weights_B=torch.tensor(weights, device=input_ids.device).repeat(len(input_ids)),
            copies=count,
            **kwargs,
        )

        def by_weight(rows: Tensor | None) -> list[Tensor | None]:
            if rows is None:
                return [None] * count
            return [part.flatten(0, 1) for part in rows.unflatten(0, (len(input_ids), count, -1)).unbind(1)]

        if isinstance(found, Tensor):
            return by_weight(found)
        pairs = zip(by_weight(found.sequences), by_weight(getattr(found, "sequences_scores", None)), strict=True)
        return [ModelOutput(sequences=tokens, sequences_scores=scores) for tokens, scores in pairs]

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        """Let processors read log-probabilities at λ = 0 too, where the model returns the Pilot's logits.

        Some, such as `repetition_penalty`, treat logits differently, so λ = 0 would differ from a zero f^C.
        """
        found = super()._get_logits_processor(generation_config, *args, **kwargs)
        for processor in found:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = self._unguided(processor, kwargs.get("model_kwargs") or {})
        if not found or generation_config.num_beams not in (None, 1):  # beam search normalises by itself
            return found
        return LogitsProcessorList([LogitNormalization(), *found])

    def _unguided(
        self, processor: UnbatchedClassifierFreeGuidanceLogitsProcessor, model_kwargs: dict[str, Any]
    ) -> Any:
        """Return the model that `guidance_scale` runs on the unconditional prompt, told where that prompt ends."""
        ids_BM = processor.unconditional_context["input_ids"]  # by default the prompt's last token
        start = {"target_start": 1 if ids_BM is None else ids_BM.shape[1]}
        return partial(
            self, weights_B=model_kwargs.get("weights_B"), **({} if self.config.is_encoder_decoder else start)
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        implementation = generation_config.cache_implementation
        if implementation == "static" and generation_config.num_beams > 1:
            raise ValueError(
                f"cache_implementation='static' decodes greedily or by sampling, not with num_beams="
                f"{generation_config.num_beams}; leave it out, or use num_beams=1"
            )
        if generation_config.prefill_chunk_size is not None and self.config.is_encoder_decoder:
            raise ValueError(
                f"prefill_chunk_size={generation_config.prefill_chunk_size} reads a prompt in parts, and an encoder "
                f"reads it whole; leave it out"
            )
        if model_kwargs.get("past_key_values") is None and implementation in (None, "dynamic", "static"):
            if generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = self._new_pilot_cache(keep_all=implementation == "static")
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        alone = self._is_pilot_only(model_kwargs.get("weights_B"))
        if cache is not None and not alone and not isinstance(cache, TCopilotCache):
            model_kwargs["past_key_values"] = cache = TCopilotCache(cache)
        if generation_config.is_assistant and cache is not None:
            cache.activate_past_recording()

    def create_masks_for_generate(self, config, **kwargs: Any) -> Any:
        """Masks over a static cache by the live Pilot's config; the copy in ours names no attention kernel."""
        make = getattr(self.pilot, "create_masks_for_generate", create_masks_for_generate)
        return make(config=self.pilot.config, **kwargs)

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        given = (input_ids, logits_processor, stopping_criteria, generation_config)
        if generation_config.cache_implementation != "static" or not generation_config.use_cache:
            return super()._sample(*given, **kwargs)
        if any(kwargs.pop(name, None) for name in ("synced_gpus", "streamer")):
            raise ValueError("cache_implementation='static' takes no streamer and no synced_gpus; leave it out")
        return sample(self, *given, **kwargs)

    def _assisted_decoding(self, input_ids, *args, **kwargs):
        """Refuse drafts after a filled cache, whose unread tokens transformers would skip."""
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        if past and input_ids.shape[1] - past > 1:
            raise ValueError(
                f"drafts cannot go on from a cache of {past} tokens while {input_ids.shape[1] - past} are to be read, "
                f"since transformers would skip all but the last; leave past_key_values out, or draft no tokens"
            )
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, at λ = 0 too: `model.pilot` has the method for the Pilot alone."""
        raise ValueError(
            "continuous batching packs tokens of many requests into one row, and a Copilot needs a row for each; use "
            "generate with a batch of prompts, or generate_batch of model.pilot without a Copilot"
        )

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        model_kwargs = {name: value for name, value in model_kwargs.items() if name not in OURS}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)


def _prompt_columns(inputs: Tensor | None, kwargs: dict[str, Any]) -> int:
    """Number of columns of the whole prompt; the mask tells it where only the tokens after a cache are given."""
    given = [inputs, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))]
    return max((tensor.shape[1] for tensor in given if tensor is not None), default=1)
