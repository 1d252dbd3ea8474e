"""One Pilot forward pass and the detached view of it that the Mistake Log keeps: X̃, h and p̂ at target positions.

Shapes: B batch, M source length, N target length, P Pilot width, V vocabulary.

h is defined on what transformers returns as hidden states, without the embedding layer: the outputs of decoder layers
1 … L, the last of them after the family's final norm (that is what the unembedding reads).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tcopilot.data.batch import Batch
from tcopilot.functional import LAYER_RANGES, POOLINGS, pool_states
from tcopilot.models.prefix import can_share, position_ids, run_after_prefix
from tcopilot.settings import one_of, require


@dataclass(frozen=True)
class StatePooler:
    """How h is pooled over the Pilot's decoder layers; a Copilot is bound to the pooling it was trained with."""

    pooling: str = "mean"
    layer_range: str = "all"

    def __post_init__(self) -> None:
        require({"pooling": one_of(POOLINGS), "layer_range": one_of(LAYER_RANGES)}, vars(self))

    keeps_source: ClassVar[bool] = True
    title: ClassVar[str] = "h̄"

    @torch.no_grad()
    def __call__(self, hidden_states: tuple[Tensor, ...], positions: slice = slice(None)) -> Tensor:
        """Pool `hidden_states` (L + 1 tensors, the embedding first) at `positions`; returns [B, N, P], detached."""
        return pool_states([h[:, positions].detach() for h in hidden_states[1:]], self.pooling, self.layer_range)


@dataclass(frozen=True)
class StackedStates:
    """The outputs of a few decoder layers side by side, for a Copilot that is only a head; X̃ is not kept.

    Attributes:
        depths: which layers, as shares of the decoder's depth.
    """

    depths: tuple[float, ...]
    keeps_source: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """What it takes, in words."""
        return f"states at depths {', '.join(f'{depth:g}' for depth in self.depths)}"

    @torch.no_grad()
    def __call__(self, hidden_states: tuple[Tensor, ...], positions: slice = slice(None)) -> Tensor:
        """Take the layers from `hidden_states` (L + 1, the embedding first); returns [B, N, D · P], detached.

        Two depths of a shallow Pilot may be the same layer.
        """
        depth = len(hidden_states) - 1
        layers = [max(1, round(share * depth)) for share in self.depths]
        return torch.cat([hidden_states[layer][:, positions].detach() for layer in layers], dim=-1)


@dataclass
class PilotStates:
    """What one Pilot forward pass leaves for the Mistake Log. Only `logits_BNV` carries a gradient (for the Pilot).

    Attributes:
        logits_BNV: the Pilot's logits for the target tokens.
        source_BMP: X̃, the encoder's output (encoder-decoder) or the embedded prompt (decoder-only); None where the
            Copilot does not read it, and then its mask and the prompt's ids are None as well.
        states_BNP: h̄, the pooled decoder states that predict the target tokens.
        ids_B: row ids in the training set.
        source_ids_BM: a decoder-only Pilot's prompt ids, whose embedding is X̃; None with an encoder.
        head_input_BNP: the input of the Pilot's head that gave the logits, detached.
        pilot: the Pilot itself, whose frozen parts can rebuild the logits and X̃ later.
    """

    logits_BNV: Tensor
    source_BMP: Tensor | None
    source_mask_BM: Tensor | None
    states_BNP: Tensor
    targets_BN: Tensor
    target_mask_BN: Tensor
    ids_B: Tensor
    benchmark_B: Tensor
    source_ids_BM: Tensor | None = None
    head_input_BNP: Tensor | None = None
    pilot: PreTrainedModel | None = None

    def rows(self, rows: slice | Tensor) -> Self:
        """Some of the rows: views for a slice, copies for a mask [B]."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)})


def trace_pilot(pilot: PreTrainedModel, batch: Batch, pooler: StatePooler | StackedStates) -> PilotStates:
    """Run the Pilot on a batch and keep X̃, h̄ and the logits of the target positions (Section 2.1)."""
    run = _run_encoder_decoder if pilot.config.is_encoder_decoder else _run_decoder_only
    logits_BNV, source_BMP, hidden_states, predicting = run(pilot, batch)
    states_BNP = pooler(hidden_states, predicting)
    source = (source_BMP.detach(), batch.source_mask_BM) if pooler.keeps_source else (None, None)
    has_ids = pooler.keeps_source and not pilot.config.is_encoder_decoder
    return PilotStates(
        logits_BNV, *source, states_BNP, batch.target_ids_BN, batch.target_mask_BN, batch.ids_B, batch.benchmark_B,
        source_ids_BM=batch.source_ids_BM if has_ids else None,
        head_input_BNP=hidden_states[-1][:, predicting].detach(),
        pilot=pilot,
    )  # fmt: skip


def _run_decoder_only(pilot, batch):
    """Logits of the targets, X̃, hidden states, and the positions among these that predict a target."""
    prompt, length = batch.source_ids_BM.shape[1], batch.target_ids_BN.shape[1]
    mask = torch.cat([batch.source_mask_BM, batch.target_mask_BN], dim=1)
    ids = torch.cat([batch.source_ids_BM, batch.target_ids_BN], dim=1)
    shared = batch.prefix if batch.prefix and can_share(pilot, prompt + length) else 0
    predicting = slice(prompt - 1 - shared, prompt - 1 - shared + length)
    kept = torch.arange(predicting.start, predicting.stop, device=mask.device)
    given = {"output_hidden_states": True, "logits_to_keep": kept}
    if shared:
        out, embedded = run_after_prefix(pilot, shared, ids, mask, **given)
    else:
        positions = position_ids(mask)
        out = pilot(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False, **given)
        embedded = out.hidden_states[0]
    return out.logits, embedded[:, :prompt], out.hidden_states, predicting


def _run_encoder_decoder(pilot, batch):
    start = batch.target_ids_BN.new_full((len(batch), 1), pilot.config.decoder_start_token_id)
    out = pilot(
        input_ids=batch.source_ids_BM,
        attention_mask=batch.source_mask_BM.long(),
        decoder_input_ids=torch.cat([start, batch.target_ids_BN[:, :-1]], dim=1),
        output_hidden_states=True,
        use_cache=False,
    )
    return out.logits, out.encoder_last_hidden_state, out.decoder_hidden_states, slice(None)
