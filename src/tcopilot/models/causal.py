"""The fused model of a decoder-only Pilot: one forward pass over prompt and target, or over what follows a cache.

Shapes: B batch, M source length, T columns of the text, N targets, K known targets, P Pilot width, V vocabulary.
"""

from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from tcopilot.models.caches import TCopilotCache, of_pilot
from tcopilot.models.family_check import embeds_positions
from tcopilot.models.fused_model import TCopilotModel, beside_logits, cross_entropy, first_of, not_read, repeat
from tcopilot.models.generation import FusedGenerationMixin
from tcopilot.models.prefix import can_share, run_after_prefix
from tcopilot.models.prefix import position_ids as count_positions
from tcopilot.models.target_start import IGNORED_LABEL, TargetColumns, find_starts

TEXT = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"}  # changed by a shared prefix


@dataclass
class TCopilotCausalLMOutput(CausalLMOutputWithPast):
    """The usual output; with `output_corrections` also log p̂ and f^C [B, N, V] of the target positions, float32."""

    pilot_log_probs: Tensor | None = None
    corrections: Tensor | None = None


class TCopilotForCausalLM(TCopilotModel, FusedGenerationMixin):
    """A decoder-only Pilot with its Copilot."""

    auto_class = AutoModelForCausalLM

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        target_start: int | Tensor | None = None, assistant_masks: Tensor | None = None,
        output_hidden_states: Any = None, output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None, weights_B: Tensor | None = None, copies: int = 1,
        prefix: int = 0, output_corrections: bool = False, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Return fused logits; positions before the one that predicts a row's first target carry the Pilot's.

        Where the target begins is told by `target_start`, else by `assistant_masks`, else by `labels`. Where nothing
        tells it, the whole text counts as target, and a warning says so. Rows may begin at different columns unless a
        cache is kept.

        Args:
            input_ids: [B, M + K] prompt and known targets, or the tokens that come after a filled cache.
            attention_mask: [B, M + K] over everything seen; None means no padding.
            position_ids: counted from the mask when None.
            past_key_values: a `TCopilotCache`, or any cache if it is empty or λ = 0. After a filled one, tokens
                continue its target, unless `target_start` lies beyond its tokens: all before that is then the prompt.
            inputs_embeds: in place of `input_ids`; the targets' tokens are then taken from `labels`.
            labels: [B, M + K]; −100 is left out of the loss.
            use_cache: keep a cache and return it.
            logits_to_keep: return only the last that many positions, or those of these indices; 0 returns all.
            target_start: M, the column of the first target in the whole text, or one for each row [B]. With a
                cache, a column beyond the text means that the prompt is not complete yet.
            assistant_masks: [B, M + K], 1 where a token is the assistant's, as chat templates return it.
            output_hidden_states: also return the Pilot's hidden states, of all layers or of those with these indices.
            output_attentions: also return the Pilot's attentions.
            num_items_in_batch: divisor of the summed losses; None divides by the number of labels in this batch.
            weights_B: λ of each row, in place of the model's one.
            copies: consecutive rows that are equal while a cache is being filled; only one of each is computed.
            prefix: number of tokens with which all prompts begin alike; they are read once if `logits_to_keep` asks
                for later positions only.
            output_corrections: also return log p̂ and f^C; the Copilot then runs at λ = 0 too.
            **kwargs: further arguments of the Pilot, and `shift_labels`: labels already moved to the positions that
                predict them; used in place of `labels`.
        """
        if target_start is not None and not isinstance(target_start, Tensor):
            target_start = index(target_start)  # an integer of numpy's, too
        shift_labels = kwargs.pop("shift_labels", None)  # as a parameter, `Trainer` would expect it in every batch
        if shift_labels is not None:
            labels = torch.nn.functional.pad(shift_labels, (1, 0), value=IGNORED_LABEL)[:, :-1]
        asked = self._asked(output_hidden_states, output_attentions)
        copies, prefix = (1, 0) if asked else (copies, prefix)
        alone = self._is_pilot_only(weights_B) and not output_corrections
        cache, past, copies = self._open_cache(past_key_values, use_cache, alone, copies)
        input_ids, attention_mask, position_ids, inputs_embeds = first_of(
            copies, input_ids, attention_mask, position_ids, inputs_embeds
        )
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache, **asked, **kwargs}
        given |= {} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        given |= {"past_key_values": of_pilot(cache), "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        prefix, columns = 0 if past else prefix, (inputs_embeds if input_ids is None else input_ids).shape[1]
        length = past + columns
        told = target_start if isinstance(target_start, int) else None
        begun = bool(past) and not alone and cache.start is not None
        goes_on = begun and (target_start is None or told == cache.start)
        is_prompt = cache is not None and told is not None and told > length
        if not alone and position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            given["position_ids"] = count_positions(attention_mask)[:, past:]
        if alone or is_prompt:
            losses = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            losses = {name: value for name, value in losses.items() if value is not None}
            out = self._read(prefix, given)[0] if labels is None else self.pilot(**given, **losses)
            self._only_pilot_read(out, cache, input_ids, past)
            (out.logits,) = repeat(copies, out.logits, cache=cache)
            return out
        if goes_on:
            text = TargetColumns(past + 1, length)
        else:
            _check_rows(attention_mask, position_ids, labels)
            if past and target_start is None and labels is None and assistant_masks is None:
                raise not_read(past)
            text = TargetColumns(
                find_starts(length, target_start, assistant_masks, labels, attention_mask, past), length
            )
            _check_start(text, cache, past)
        chosen = isinstance(logits_to_keep, Tensor)
        wanted = columns if chosen or logits_to_keep == 0 else logits_to_keep
        given |= {"logits_to_keep": max(wanted, text.count), "output_hidden_states": True}
        tokens = input_ids if inputs_embeds is None else _tokens(inputs_embeds, labels, text, length)
        if goes_on:
            out, *parts = self._next(lambda: self.pilot(**given), tokens, cache)
        else:
            out, *parts = self._begin(text, past, prefix, given, tokens, cache)
        if cache is not None:
            cache.read(input_ids, past)
            cache.start = cache.start if goes_on else text.first
        logits, log_probs_BNV, corrections_BNV = repeat(copies, out.logits, *parts, cache=cache)
        pilot_BNV = logits[:, -text.count :]
        fused_BNV = self._fused_logits(text.targets(pilot_BNV), log_probs_BNV, corrections_BNV, weights_B)
        fused_BNV = text.in_place(fused_BNV, pilot_BNV)
        if logits.shape[1] > text.count:
            fused_BNV = torch.cat([logits[:, : -text.count].float(), fused_BNV], dim=1)
        loss = None if labels is None else _loss(fused_BNV, labels, shift_labels, num_items_in_batch)
        extra = {}
        if output_corrections:
            extra["pilot_log_probs"] = text.in_place(log_probs_BNV, pilot_BNV.float().log_softmax(-1))
            extra["corrections"] = text.in_place(corrections_BNV, torch.zeros_like(fused_BNV[:, :1]))
        return TCopilotCausalLMOutput(
            loss=loss, logits=fused_BNV[:, logits_to_keep if chosen else slice(-wanted, None)], past_key_values=cache,
            **beside_logits(out, asked), **extra,
        )  # fmt: skip

    def _begin(
        self, text: TargetColumns, past: int, prefix: int, given: dict[str, Any], tokens: Tensor,
        cache: TCopilotCache | None,
    ) -> tuple[CausalLMOutputWithPast, Tensor, Tensor | None]:  # fmt: skip
        """Run both models on a text in which a target begins, or on the part of it that follows a cache."""
        out, embedded_BTP = self._read(prefix, given)
        mask_BT = given["attention_mask"]
        if past:
            before_BTP = self._embedded(cache.ids_BT, None if mask_BT is None else mask_BT[:, :past]).to(embedded_BTP)
            embedded_BTP = torch.cat([before_BTP, embedded_BTP], dim=1)
        mask_BT = torch.ones_like(embedded_BTP[..., 0]) if mask_BT is None else mask_BT
        read_BNV, known_BK = out.logits[:, -text.count :], tokens[:, text.first - past :]
        states_BNP = self._pooled(out, slice(-text.count, None))
        source = (text.prompts(embedded_BTP), text.prompt_mask(mask_BT))
        known = (text.targets(known_BK), *source, text.targets(states_BNP))
        return out, *self.correct_text(text.targets(read_BNV), *known, cache)

    def _embedded(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """What the Pilot's first layer reads of a text. Where that includes positions, the Pilot reads it again."""
        if not embeds_positions(self.pilot.config):
            return self.get_input_embeddings()(ids_BT)
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        given = {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": count_positions(mask_BT)}
        return self.pilot(**given, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states[0]

    def _read(self, prefix: int, given: dict[str, Any]) -> tuple[CausalLMOutputWithPast, Tensor | None]:
        """Run the Pilot on texts, reading a common prefix once where possible; also returns the embedded texts."""
        ids, mask, cache = given["input_ids"], given["attention_mask"], given["past_key_values"]
        is_behind = prefix and 0 < given["logits_to_keep"] <= ids.shape[1] - prefix
        if is_behind and can_share(self.pilot, ids.shape[1], cache):
            rest = {name: value for name, value in given.items() if name not in TEXT}
            mask = torch.ones_like(ids) if mask is None else mask
            return run_after_prefix(self.pilot, prefix, ids, mask, cache, **rest)
        out = self.pilot(**given)
        return out, out.hidden_states and out.hidden_states[0]


def _loss(fused_BNV: Tensor, labels_BT: Tensor, shift_labels_BT: Tensor | None, items: Tensor | int | None) -> Tensor:
    """The cross-entropy of the last columns' logits with the tokens that follow them."""
    next_BT = shift_labels_BT
    if next_BT is None:
        fused_BNV, next_BT = fused_BNV[:, :-1], labels_BT[:, 1:]
    return cross_entropy(fused_BNV, next_BT[:, next_BT.shape[1] - fused_BNV.shape[1] :], items)


def _tokens(embeds_BNP: Tensor, labels_BN: Tensor | None, text: TargetColumns, length: int) -> Tensor:
    """Take the tokens of embedded targets from the labels; the prompt's tokens are not needed."""
    if labels_BN is not None:
        known_BK = text.targets(labels_BN[:, labels_BN.shape[1] - (length - text.first) :] != IGNORED_LABEL)
        if (known_BK.diff(dim=1) & known_BK[:, 1:]).any():
            raise ValueError(
                f"labels hold {IGNORED_LABEL} between targets, and inputs_embeds does not tell these tokens, which a "
                f"Copilot reads; give input_ids"
            )
        return labels_BN.clamp_min(0)
    if text.first < length:
        raise ValueError(
            f"inputs_embeds does not tell the tokens of a target that begins at column {text.first}; give labels, or "
            f"the prompt alone, with target_start={length}"
        )
    return embeds_BNP.new_zeros(embeds_BNP.shape[:2], dtype=torch.long)


def _check_rows(mask: Tensor | None, positions_BT: Tensor | None, labels_BT: Tensor | None) -> None:
    """Refuse rows that pack several texts, since a Copilot would read one text as the prompt of another."""
    is_packed = mask is not None and mask.dim() != 2
    if labels_BT is not None and positions_BT is not None and not is_packed:
        begins_anew = positions_BT.diff(dim=-1) < 0
        if mask is not None and mask.shape[1] == positions_BT.shape[-1]:
            begins_anew = begins_anew & mask[:, :-1].bool()  # padding may have any position
        is_packed = bool(begins_anew.any())
    if is_packed:
        raise ValueError(
            "rows hold several texts (a mask has more than two dimensions, or positions begin anew in a row): a fused "
            "model reads one text a row; use a collator that pads"
        )


def _check_start(text: TargetColumns, cache: TCopilotCache | None, past: int) -> None:
    """Refuse target starts that do not fit a cache."""
    if cache is None:
        return
    if text.first < text.last:
        raise ValueError(
            f"targets start at columns {text.first} to {text.last}: with a cache, a fused model needs one column for "
            f"the whole batch; left-pad the prompts and give target_start"
        )
    if past and (cache.ids_BT is None or (cache.start is None and text.first <= past)):
        raise not_read(past)
    if past and text.first <= past:
        raise ValueError(
            f"target_start={text.first}: the cache holds {past} tokens already, with a target from column "
            f"{cache.start} on; continue that target, or give a target_start above {past}"
        )
