"""The fused model as a transformers model: Pilot + λ · Copilot behind `forward`, `generate` and `save_pretrained`.

Shapes: B batch, M source length, N targets, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, ModelOutput, Seq2SeqLMOutput

from tcopilot.models.cache_layers import with_room
from tcopilot.models.caches import CANNOT_UNDO, TCopilotCache, is_repeatable, of_pilot
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.copilot import Copilot, CopilotConfig
from tcopilot.models.decoding import Beside, advance, conclude, correct_text
from tcopilot.models.fusion import build_fusion
from tcopilot.models.gates import Gate
from tcopilot.models.states import position_ids as count_positions
from tcopilot.models.static_decoding import StaticDecoder, sample

IGNORED_LABEL = -100


@dataclass
class TCopilotCausalLMOutput(CausalLMOutputWithPast):
    """The usual output; with `output_corrections` also log p̂ and f^C [B, N, V] of the target positions, float32."""

    pilot_log_probs: Tensor | None = None
    corrections: Tensor | None = None


@dataclass
class TCopilotSeq2SeqLMOutput(Seq2SeqLMOutput):
    """The usual output; with `output_corrections` also log p̂ and f^C [B, N, V], float32."""

    pilot_log_probs: Tensor | None = None
    corrections: Tensor | None = None


class TCopilotModel(PreTrainedModel, GenerationMixin):
    """What causal and sequence-to-sequence fused models share. λ = 0 or no Copilot runs the Pilot alone."""

    config_class = TCopilotConfig
    base_model_prefix = "pilot"
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = []
    auto_class: Any

    def __init__(self, config: TCopilotConfig, pilot: PreTrainedModel | None = None, copilot: Copilot | None = None):
        super().__init__(config)
        self.pilot = self.auto_class.from_config(copy.deepcopy(config.pilot)) if pilot is None else pilot
        if copilot is None and config.copilot is not None:
            copilot = Copilot(CopilotConfig(**config.copilot))
        self.copilot = copilot
        self._fuse = build_fusion(config.fusion)
        self.static_decoder: StaticDecoder | None = None
        if getattr(self.pilot, "generation_config", None) is not None:
            self.generation_config = copy.deepcopy(self.pilot.generation_config)
        self.post_init()

    @classmethod
    def from_pilot(
        cls,
        pilot: PreTrainedModel,
        copilot: Copilot | None = None,
        *,
        fusion: str = "probability",
        weight: float = 1.0,
        feedback: str = "observed",
        **copilot_options: Any,
    ) -> "TCopilotModel":
        """Fuse a loaded Pilot with a Copilot, or with a new one built from its decoder (a no-op until trained).

        Args:
            pilot: the Pilot; it is used as it is, not copied.
            copilot: a Copilot for it; None builds one by `Copilot.from_pilot(pilot, **copilot_options)`.
            fusion: `probability` or `logits`.
            weight: λ.
            feedback: `observed` or `own`.
            **copilot_options: `layers`, `head`, `context`, … of `Copilot.from_pilot`.
        """
        if copilot is None:
            copilot = Copilot.from_pilot(pilot, **copilot_options)
        config = TCopilotConfig(pilot.config, copilot.config, fusion=fusion, weight=weight, feedback=feedback)
        return cls(config, pilot, copilot)

    def attach(self, copilot: Copilot) -> None:
        """Put a Copilot on the Pilot at hand, in place of one that may be there.

        Raises:
            ValueError: if it was built for another vocabulary or another Pilot width.
        """
        vocab, width = self.pilot.get_input_embeddings().num_embeddings, self.pilot.config.hidden_size
        if (copilot.config.vocab_size, copilot.config.pilot_width) != (vocab, width):
            raise ValueError(
                f"this Copilot reads a Pilot of width {copilot.config.pilot_width} with {copilot.config.vocab_size} "
                f"tokens; the Pilot at hand has width {width} and {vocab} tokens"
            )
        self.copilot = copilot
        self.config.copilot = copilot.config.to_dict()

    def detach_copilot(self) -> Copilot | None:
        """Take the Copilot off and return it; what remains is the Pilot."""
        copilot, self.copilot, self.config.copilot = self.copilot, None, None
        return copilot

    @property
    def weight(self) -> float:
        """λ of Eq. 8. Setting it changes the next forward pass; 0 is the Pilot, exactly."""
        return self.config.weight

    @weight.setter
    def weight(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"weight={value}: λ must be 0 (the Pilot) or positive")
        self.config.weight = float(value)

    def set_gate(self, gate: Gate | None) -> None:
        """Let λ vary: corrections are scaled by a gate from now on (`tcopilot.models.gates`), or no longer."""
        self.copilot.set_gate(gate)
        self.config.copilot = self.copilot.config.to_dict()
        self.static_decoder = None  # its compiled step knows the gate of before

    def set_fusion(self, name: str) -> None:
        """Change the fusion space: `probability` or `logits`."""
        self._fuse = build_fusion(name)
        self.config.fusion = name

    def get_input_embeddings(self):
        """The Pilot's input embeddings."""
        return self.pilot.get_input_embeddings()

    def get_output_embeddings(self):
        """The Pilot's output embeddings."""
        return self.pilot.get_output_embeddings()

    def _init_weights(self, module) -> None:
        """Leave weights as Pilot and Copilot initialise themselves."""

    def fuse(self, log_probs_BNV: Tensor, corrections_BNV: Tensor | None, weight: float | Tensor) -> Tensor:
        """Return log p̃ (Eq. 8 or its logit form) at one λ, or at one λ per row.

        Args:
            log_probs_BNV: log p̂, float32.
            corrections_BNV: f^C; None where there is no Copilot.
            weight: λ, or λ [B].

        Returns:
            log p̃ [B, N, V]; where λ is 0, log p̂ itself.
        """
        if corrections_BNV is None or (not isinstance(weight, Tensor) and weight == 0):
            return log_probs_BNV
        if isinstance(weight, Tensor):
            weight = weight.to(log_probs_BNV.device).view(-1, 1, 1)
            return torch.where(weight == 0, log_probs_BNV, self._fuse(log_probs_BNV, corrections_BNV, weight))
        return self._fuse(log_probs_BNV, corrections_BNV, weight)

    def generate_at_weights(
        self, weights: Sequence[float], input_ids: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> list[Any]:
        """Decode every prompt at several λ at once; Pilot and Copilot read each prompt once, not once for each λ.

        Args:
            weights: the λ; 0 gives the Pilot's own tokens.
            input_ids: prompts [B, M].
            attention_mask: [B, M].
            **kwargs: arguments of `generate`; those with tensors are for one λ and serve all.

        Returns:
            For each λ what `generate` returns at it, of one length for all; of an output class only sequences and
            scores.
        """
        count = len(weights)
        if self.copilot is None or len(set(weights)) == 1:
            before, self.weight = self.weight, weights[0]
            try:
                return [self.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)] * count
            finally:
                self.weight = before
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

        def parts(rows: Tensor | None) -> list[Tensor | None]:
            split = None if rows is None else rows.unflatten(0, (len(input_ids), count, -1)).unbind(1)
            return [None] * count if split is None else [part.flatten(0, 1) for part in split]

        if isinstance(found, Tensor):
            return parts(found)
        pairs = zip(parts(found.sequences), parts(getattr(found, "sequences_scores", None)), strict=True)
        return [ModelOutput(sequences=tokens, sequences_scores=scores) for tokens, scores in pairs]

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Decode from the fused distribution; arguments as in transformers. Prompts must be left-padded."""
        kwargs["copies"] = kwargs.get("copies", 1) * self._expansion(kwargs)
        return super().generate(inputs, **kwargs)

    def _is_pilot_only(self, weights_B: Tensor | None = None) -> bool:
        return self.copilot is None or (weights_B is None and self.weight == 0)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        implementation = generation_config.cache_implementation
        if implementation == "static" and generation_config.num_beams > 1:
            raise ValueError(
                f"cache_implementation='static' decodes greedily or by sampling, not with num_beams="
                f"{generation_config.num_beams}; leave it out, or use num_beams=1"
            )
        if model_kwargs.get("past_key_values") is None and implementation in (None, "dynamic", "static"):
            if generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = self._new_pilot_cache(implementation == "static")
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        alone = self._is_pilot_only(model_kwargs.get("weights_B"))
        if cache is not None and not alone and not isinstance(cache, TCopilotCache):
            model_kwargs["past_key_values"] = TCopilotCache(cache)

    def _new_pilot_cache(self, keep_all: bool) -> Cache:
        """An empty cache that grows; a sliding window drops what it has passed, unless all is to be kept."""
        if self.config.is_encoder_decoder:
            # Sized by use: for T5, transformers would count the encoder's layers, too few for a deeper decoder.
            return with_room(EncoderDecoderCache(DynamicCache(), DynamicCache()))
        return with_room(DynamicCache() if keep_all else DynamicCache(config=self.config))

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        given = (input_ids, logits_processor, stopping_criteria, generation_config)
        if generation_config.cache_implementation != "static" or not generation_config.use_cache:
            return super()._sample(*given, **kwargs)
        if any(kwargs.pop(name, None) for name in ("synced_gpus", "streamer")):
            raise ValueError("cache_implementation='static' takes no streamer and no synced_gpus; leave it out")
        return sample(self, *given, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        if not self._is_pilot_only(kwargs.get("weights_B")):
            raise ValueError(CANNOT_UNDO)
        return super()._assisted_decoding(*args, **kwargs)

    def _expansion(self, kwargs: dict[str, Any]) -> int:
        """How often transformers is about to repeat each row for beams or samples."""
        config = kwargs.get("generation_config") or self.generation_config
        return max(
            kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")
        )

    def _fused_logits(self, pilot_BNV, log_probs_BNV, corrections_BNV, weights_B: Tensor | None) -> Tensor:
        """What generation reads: log p̃; the Pilot's own logits where λ is 0, since log p̂ may round two into a tie."""
        if weights_B is None and self.weight == 0:
            return pilot_BNV.float()
        if weights_B is None:
            return self.fuse(log_probs_BNV, corrections_BNV, self.weight)
        fused_BNV = self.fuse(log_probs_BNV, corrections_BNV, weights_B)
        return torch.where(weights_B.to(fused_BNV.device).view(-1, 1, 1) == 0, pilot_BNV.float(), fused_BNV)

    def _pooled(self, out: ModelOutput, positions: slice = slice(None)) -> Tensor | None:
        """h̄ of the targets; None without a Copilot to read it."""
        hidden_states = out.decoder_hidden_states if self.config.is_encoder_decoder else out.hidden_states
        return None if self.copilot is None else self.copilot.pooler(hidden_states, positions)

    def _correct_text(self, logits_BNV, tokens_BK, source, source_mask, states, cache: TCopilotCache | None):
        """Return log p̂ and f^C of a text, and leave the Copilot's state in the cache."""
        log_probs_BNV = torch.log_softmax(logits_BNV.float(), dim=-1)
        if self.copilot is None:
            return log_probs_BNV, None
        corrections_BNV, state = correct_text(
            self.copilot, self.config.feedback, log_probs_BNV, tokens_BK, source, source_mask, states,
            keep=cache is not None,
        )  # fmt: skip
        if cache is not None:
            cache.copilot = state
        return log_probs_BNV, corrections_BNV

    def next_logits(self, given: dict[str, Any], token_B1: Tensor, cache: Cache, weights_B: Tensor) -> Tensor:
        """Logits [B, 1, V] of the next target, as `forward` returns them after a filled cache.

        Args:
            given: arguments of the Pilot but for its cache.
            token_B1: the newest token.
            cache: of both models, or of the Pilot where it is alone.
            weights_B: λ of each row.
        """
        fused = isinstance(cache, TCopilotCache)

        def run_pilot():
            options = {"past_key_values": of_pilot(cache), "use_cache": True, "output_hidden_states": fused}
            return self.pilot(**given, **options)

        if not fused:
            return run_pilot().logits.float()
        out, *parts = self._next(run_pilot, token_B1, cache)
        return self._fused_logits(out.logits, *parts, weights_B)

    def _next(self, run_pilot: Callable[[], ModelOutput], token_B1: Tensor, cache: TCopilotCache):
        """Run both models for the next target.

        In strict context the Copilot's body needs nothing of the Pilot's present step, so it runs beside it: on a
        stream of its own on a GPU, before it elsewhere. In inclusive context it reads h̄ of this step and comes after.

        Returns:
            The Pilot's output, log p̂ and f^C.
        """
        if token_B1.shape[1] != 1:
            raise ValueError(
                f"{token_B1.shape[1]} tokens after a filled cache: a fused model takes them one at a time; "
                f"pass the whole text without a cache, or use generate"
            )
        if self.copilot is None:
            out = run_pilot()
            return out, torch.log_softmax(out.logits.float(), dim=-1), None
        copilot, feedback, state = self.copilot, self.config.feedback, cache.copilot
        if copilot.is_strict:
            body = Beside(token_B1.device, lambda: advance(copilot, feedback, token_B1, state.pending_B1P, state))
            out = run_pilot()
            hidden_B1C, states_B1P = body.result(), self._pooled(out)
        else:
            out = run_pilot()
            states_B1P = self._pooled(out)
            hidden_B1C = advance(copilot, feedback, token_B1, states_B1P, state)
        log_probs_B1V = torch.log_softmax(out.logits.float(), dim=-1)
        return out, log_probs_B1V, conclude(copilot, feedback, hidden_B1C, log_probs_B1V, states_B1P, state)


class TCopilotForCausalLM(TCopilotModel):
    """A decoder-only Pilot with its Copilot."""

    auto_class = AutoModelForCausalLM

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        target_start: int | None = None,
        logits_to_keep: int = 0,
        weights_B: Tensor | None = None,
        copies: int = 1,
        output_corrections: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return fused logits; positions before the first target carry the Pilot's logits.

        Prompts are left-padded, targets right-padded, so that all rows share `target_start`.

        Args:
            input_ids: [B, M + K] prompt and known targets, or [B, 1] after a filled cache.
            attention_mask: [B, M + K] over everything seen; None means no padding.
            position_ids: positions of `input_ids`; counted from the mask when None.
            past_key_values: a `TCopilotCache` (or, at λ = 0, any cache).
            labels: [B, M + K]; −100 is left out of the loss. Also tells where the target starts.
            use_cache: keep a cache and return it.
            target_start: M, the column of the first target. Default: from `labels`, else the whole input is prompt.
            logits_to_keep: return only the last that many positions; 0 returns all.
            weights_B: λ of each row, in place of the model's one.
            copies: consecutive rows that are equal while a cache is being filled; only one of each is computed.
            output_corrections: also return log p̂ and f^C; the Copilot then runs at λ = 0 too.
            **kwargs: further arguments of the Pilot.

        Raises:
            ValueError: if rows start their targets at different columns, or several tokens follow a filled cache.
        """
        if past_key_values is None and use_cache and not self._is_pilot_only(weights_B):
            past_key_values = TCopilotCache(with_room(DynamicCache()))
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past or not is_repeatable(past_key_values):
            copies = 1
        if copies > 1:
            input_ids, attention_mask, position_ids = _first_of(copies, input_ids, attention_mask, position_ids)
        if self._is_pilot_only(weights_B) and not output_corrections:
            out = self.pilot(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels,
                past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs,
            )  # fmt: skip
            (out.logits,) = _repeat(copies, out.logits, cache=past_key_values)
            return out
        length = input_ids.shape[1]
        start = length if past else self._target_start(target_start, labels, length)
        corrected = length - start + 1
        wanted = length if logits_to_keep == 0 else logits_to_keep
        if position_ids is None and attention_mask is not None:
            position_ids = count_positions(attention_mask)[:, past:]
        kwargs.pop("output_hidden_states", None)

        def run_pilot():
            return self.pilot(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache,
                past_key_values=of_pilot(past_key_values),
                output_hidden_states=True, logits_to_keep=max(wanted, corrected), **kwargs,
            )  # fmt: skip

        if past:
            out, *parts = self._next(run_pilot, input_ids, past_key_values)
        else:
            out = run_pilot()
            mask_BM = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            states_BNP = self._pooled(out, slice(length - corrected, length))
            parts = self._correct_text(
                out.logits[:, -corrected:], input_ids[:, start:], out.hidden_states[0][:, :start],
                mask_BM[:, :start].bool(), states_BNP, past_key_values,
            )  # fmt: skip
        logits, log_probs_BNV, corrections_BNV = _repeat(copies, out.logits, *parts, cache=past_key_values)
        fused_BNV = self._fused_logits(logits[:, -corrected:], log_probs_BNV, corrections_BNV, weights_B)
        if logits.shape[1] > corrected:
            fused_BNV = torch.cat([logits[:, :-corrected].float(), fused_BNV], dim=1)
        logits, loss = fused_BNV, None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1 - logits.shape[1] :].flatten(), ignore_index=IGNORED_LABEL
            )
        extra = {"pilot_log_probs": log_probs_BNV, "corrections": corrections_BNV} if output_corrections else {}
        return TCopilotCausalLMOutput(loss=loss, logits=logits[:, -wanted:], past_key_values=past_key_values, **extra)

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Decode from the fused distribution; arguments as in transformers. Prompts must be left-padded."""
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None and not self._is_pilot_only(kwargs.get("weights_B")):
            kwargs.setdefault("target_start", prompt.shape[1])
        return super().generate(inputs, **kwargs)

    @staticmethod
    def _target_start(target_start: int | None, labels: Tensor | None, length: int) -> int:
        if target_start is None and labels is None:
            return length
        if target_start is None:
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


class TCopilotForSeq2SeqLM(TCopilotModel):
    """An encoder-decoder Pilot with its Copilot."""

    auto_class = AutoModelForSeq2SeqLM

    def get_encoder(self):
        """The Pilot's encoder, which `generate` runs once per prompt."""
        return self.pilot.get_encoder()

    def get_decoder(self):
        """The Pilot's decoder."""
        return self.pilot.get_decoder()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        weights_B: Tensor | None = None,
        copies: int = 1,
        output_corrections: bool = False,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Return fused logits [B, N, V] for every decoder position.

        Args:
            input_ids: [B, M] prompts (or None with `encoder_outputs`).
            attention_mask: [B, M].
            decoder_input_ids: [B, N], start token first; from `labels` when None.
            decoder_attention_mask: [B, N]; targets are right-padded, so it changes nothing that is read.
            encoder_outputs: outputs of `get_encoder()`.
            past_key_values: a `TCopilotCache` (or, at λ = 0, any cache).
            labels: [B, N]; −100 is left out of the loss.
            use_cache: keep a cache and return it.
            weights_B: λ of each row, in place of the model's one.
            copies: consecutive rows that are equal while a cache is being filled; only one of each is computed.
            output_corrections: also return log p̂ and f^C; the Copilot then runs at λ = 0 too.
            **kwargs: further arguments of the Pilot.
        """
        if decoder_input_ids is None and labels is not None:
            padded = labels.masked_fill(labels == IGNORED_LABEL, self.config.pad_token_id)
            start = padded.new_full((len(padded), 1), self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([start, padded[:, :-1]], dim=1)
        if past_key_values is None and use_cache and not self._is_pilot_only(weights_B):
            past_key_values = TCopilotCache(with_room(EncoderDecoderCache(DynamicCache(), DynamicCache())))
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past or not is_repeatable(past_key_values):
            copies = 1
        if copies > 1:
            input_ids, attention_mask, decoder_input_ids, decoder_attention_mask = _first_of(
                copies, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask
            )
            if encoder_outputs is not None:
                encoder_outputs = BaseModelOutput(last_hidden_state=encoder_outputs[0][::copies])
        shared = {
            "input_ids": input_ids, "attention_mask": attention_mask, "encoder_outputs": encoder_outputs,
            "decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask,
            "use_cache": use_cache,
        }  # fmt: skip
        if self._is_pilot_only(weights_B) and not output_corrections:
            out = self.pilot(**shared, past_key_values=past_key_values, labels=labels, **kwargs)
            (out.logits,) = _repeat(copies, out.logits, cache=past_key_values)
            return out
        kwargs.pop("output_hidden_states", None)

        def run_pilot():
            return self.pilot(
                **shared, past_key_values=of_pilot(past_key_values), output_hidden_states=True, **kwargs
            )  # fmt: skip

        if past:
            out, *parts = self._next(run_pilot, decoder_input_ids, past_key_values)
        else:
            out = run_pilot()
            source = out.encoder_last_hidden_state
            mask_BM = source.new_ones(source.shape[:2]) if attention_mask is None else attention_mask
            parts = self._correct_text(
                out.logits, decoder_input_ids[:, 1:], source, mask_BM.bool(), self._pooled(out), past_key_values
            )
        pilot_BNV, log_probs_BNV, corrections_BNV = _repeat(copies, out.logits, *parts, cache=past_key_values)
        logits = self._fused_logits(pilot_BNV, log_probs_BNV, corrections_BNV, weights_B)
        loss = None
        if labels is not None:
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL
            )
        extra = {"pilot_log_probs": log_probs_BNV, "corrections": corrections_BNV} if output_corrections else {}
        return TCopilotSeq2SeqLMOutput(
            loss=loss, logits=logits, past_key_values=past_key_values,
            encoder_last_hidden_state=out.encoder_last_hidden_state, **extra,
        )  # fmt: skip


def _first_of(copies: int, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor[::copies] for tensor in tensors]


def _repeat(copies: int, *tensors: Tensor | None, cache: Cache | None) -> list[Tensor | None]:
    """Undo `_first_of`, in the cache too."""
    if copies == 1:
        return list(tensors)
    cache.batch_repeat_interleave(copies)
    return [None if tensor is None else tensor.repeat_interleave(copies, dim=0) for tensor in tensors]


def fused_class(is_encoder_decoder: bool) -> type[TCopilotModel]:
    """The fused class for a Pilot of that architecture."""
    return TCopilotForSeq2SeqLM if is_encoder_decoder else TCopilotForCausalLM


AutoConfig.register("t_copilot", TCopilotConfig)
AutoModelForCausalLM.register(TCopilotConfig, TCopilotForCausalLM)
AutoModelForSeq2SeqLM.register(TCopilotConfig, TCopilotForSeq2SeqLM)
