"""What decoding carries from step to step: keys and values, the Copilot's state, and both models' caches as one.

Shapes: B or R rows of the batch, H heads, K past targets, S cached columns or rows of the log, D head width, P Pilot
width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

LEAST_ROOM = 64  # columns


class RoomyLayer(DynamicLayer):
    """A dynamic layer with room for columns to come.

    The stock layer copies all keys and values at each step, and again when beams are reordered. This one keeps free
    columns behind them, so that a step writes its own column only; `keys` and `values` are views of what is filled.
    Columns repeated by `batch_repeat_interleave` are equal in all copies of a row, so `reorder_cache` then moves later
    columns only. This is right for beams, each of which continues another copy of the same row.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stores: tuple[Tensor, Tensor] | None = None
        self._equal = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append columns [R, H, N, D]; returns all of them, [R, H, S + N, D]."""
        if torch.is_grad_enabled():
            self._stores = None
            return super().update(key_states, value_states)  # what a backward pass reads must stay as it is
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen, columns = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if seen == 0:
            self._stores = None
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        if self._stores is None or self._stores[0].shape[-2] < columns:
            self._stores = _with_room(self.keys, columns), _with_room(self.values, columns)
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, seen:columns] = new
        self.keys, self.values = (store[:, :, :columns] for store in self._stores)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the surviving beams."""
        seen = self.get_seq_length()
        if seen and (len(beam_idx) != len(self.keys) or (self._stores is None and self._equal == 0)):
            self._stores, self._equal = None, 0
            super().reorder_cache(beam_idx)
        elif seen > self._equal:
            for held in (self.keys, self.values):
                moving = held[:, :, self._equal :]
                moving.copy_(moving.index_select(0, beam_idx.to(moving.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; what is held now is never reordered again."""
        super().batch_repeat_interleave(repeats)
        self._stores, self._equal = None, self.get_seq_length()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._stores, self._equal = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns; their room is free again."""
        super().crop(tokens_to_remove)
        self._equal = min(self._equal, self.get_seq_length())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._stores, self._equal = None, 0


def _with_room(held_RHSD: Tensor, columns: int) -> Tensor:
    rows, heads, seen, width = held_RHSD.shape
    store = held_RHSD.new_empty(rows, heads, columns + max(LEAST_ROOM, columns // 4), width)
    store[:, :, :seen] = held_RHSD
    let_go(held_RHSD)
    return store


def let_go(tensor: Tensor) -> None:
    """Before a tensor is dropped, tell CUDA to keep its memory until the work queued on this stream is done."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def with_room(cache: Cache) -> Cache:
    """Put `RoomyLayer` in place of the stock layers of an empty dynamic cache; sliding windows stay as they are."""
    if isinstance(cache, EncoderDecoderCache):
        with_room(cache.self_attention_cache)
        with_room(cache.cross_attention_cache)
    elif isinstance(cache, DynamicCache):
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = RoomyLayer
    return cache


@dataclass(kw_only=True)
class CopilotState:
    """What a Copilot carries from one decoding step to the next; the batch dimension comes first everywhere.

    Attributes:
        target_B1: how many targets come before the next one.
        pending_B1P: the newest h̄, which strict context has not read yet.
        feedback: `observed` or `own`, see `decoding.py`.
        feedback_BV: the last p̂ (observed feedback) or the last f^C (own feedback).
        history: h̄ and `feedback_BV` of each target since the last `crop`, the newest last; None where `crop` is
            not needed.
    """

    target_B1: Tensor
    pending_B1P: Tensor
    feedback: str = "observed"
    feedback_BV: Tensor | None = None
    history: list[tuple[Tensor, Tensor]] | None = None

    def rearrange(self, method: str, argument: Any, rows: Callable[[Tensor], Tensor]) -> None:
        """Rearrange the batch: tensors by `rows`, and caches by calling their method of the given name."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, rows(value))
        if self.history is not None:
            self.history = [(rows(states_B1P), rows(feedback_BV)) for states_B1P, feedback_BV in self.history]

    def keep(self, states_B1P: Tensor, feedback_BV: Tensor) -> None:
        """Keep what the next step needs of this one."""
        self.pending_B1P, self.feedback_BV = states_B1P, feedback_BV
        if self.history is not None:
            self.history.append((states_B1P, feedback_BV))

    def can_crop(self, targets: int) -> bool:
        """Whether the history reaches back that many targets."""
        return self.history is not None and targets < len(self.history)

    def crop(self, targets: int) -> None:
        """Go back to the state before the last `targets` targets."""
        self.history = [self.history[-1 - targets]]
        self.pending_B1P, self.feedback_BV = self.history[0]
        self.target_B1 = self.target_B1 - targets


@dataclass(kw_only=True)
class BodyState(CopilotState):
    """The state of a Copilot with decoder layers, which attend to past errors and to the log.

    Attributes:
        cache: keys and values of errors and log.
        log_mask_B11S: additive mask over the rows of the log, with room for rows to come.
        next_mask: mask value of rows to come: 0, or the least number for a Copilot that does not read h̄.
        position_B1: position of the next target.
    """

    cache: Cache
    log_mask_B11S: Tensor
    rows: int
    next_mask: float
    position_B1: Tensor

    def rearrange(self, method: str, argument: Any, rows: Callable[[Tensor], Tensor]) -> None:
        """Rearrange the batch, in the cache as well."""
        getattr(self.cache, method)(argument)
        super().rearrange(method, argument, rows)

    def crop(self, targets: int) -> None:
        """Go back to the state before the last `targets` targets, in the cache as well."""
        super().crop(targets)
        is_pair = isinstance(self.cache, EncoderDecoderCache)  # its own `crop` would leave the log uncropped
        for part in (self.cache.self_attention_cache, self.cache.cross_attention_cache) if is_pair else (self.cache,):
            part.crop(-targets)
        self.rows -= targets
        self.position_B1 = self.position_B1 - targets

    def grow(self) -> tuple[Tensor, Tensor]:
        """Add a row to the log; returns the next target's masks over errors [1, 1, 1, K] and log [B, 1, 1, S]."""
        self.rows += 1
        if self.rows > self.log_mask_B11S.shape[-1]:
            let_go(self.log_mask_B11S)
            self.log_mask_B11S = nn.functional.pad(self.log_mask_B11S, (0, LEAST_ROOM), value=self.next_mask)
        errors = self.cache.get_seq_length() + 1
        return self.log_mask_B11S.new_zeros(1, 1, 1, errors), self.log_mask_B11S[..., : self.rows]


class TCopilotCache(Cache):
    """The caches of both models under one name, so that beam search reorders them together.

    Attributes:
        pilot: the Pilot's cache.
        copilot: what the Copilot keeps; None before its first target.
        start: column of the first target; None before it is reached, and once the Pilot has read on alone (λ = 0).
        ids_BT: the tokens read so far, from which a decoder-only model forms X̃ in its next turn; None if unknown.
        records: whether the Copilot keeps what `crop` needs.
    """

    is_compileable = False
    is_croppable = False  # unless `activate_past_recording` comes first, `crop` loses the Copilot's state

    def __init__(self, pilot: Cache, ids_BT: Tensor | None = None) -> None:
        self.pilot = pilot
        self.copilot: CopilotState | None = None
        self.start: int | None = None
        self.ids_BT = ids_BT
        self.records = False

    @property
    def layers(self):
        """The Pilot's cache layers, which callers expect; of an encoder-decoder, those of its self-attention."""
        return getattr(self.pilot, "self_attention_cache", self.pilot).layers

    def __getattr__(self, name: str) -> Any:
        """Look up attributes that only the Pilot's kind of cache has, such as `cross_attention_cache`."""
        if name.startswith("__") or "pilot" not in vars(self):
            raise AttributeError(name)
        return getattr(self.pilot, name)

    def __iter__(self):
        """The Pilot's layers."""
        return iter(self.pilot)

    def read(self, ids_BN: Tensor | None, past: int) -> None:
        """Note the tokens that were read after the first `past` ones."""
        if past and self.ids_BT is not None and ids_BN is not None:
            ids_BN = torch.cat([self.ids_BT, ids_BN], dim=1)
        self.ids_BT = None if past and self.ids_BT is None else ids_BN

    def forget_copilot(self) -> None:
        """Drop the Copilot's part, which lacks the tokens that the Pilot has read alone."""
        self.copilot = self.start = None

    def reset(self) -> None:
        """Forget everything."""
        self.pilot.reset()
        self.copilot = self.start = self.ids_BT = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the surviving beams, in both models."""
        self._in_both("reorder_cache", beam_idx, lambda one: one.index_select(0, beam_idx.to(one.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, in both models."""
        self._in_both("batch_repeat_interleave", repeats, lambda one: one.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in both models."""
        self._in_both("batch_select_indices", indices, lambda one: one[indices])

    def activate_past_recording(self) -> None:
        """Record from now on the states that `crop` goes back to."""
        self.pilot.activate_past_recording()
        self.records = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens in both models; as in transformers, −1 removes one.

        If no earlier state of the Copilot was recorded, all of its state is dropped, and a decoder-only model builds a
        new one where the next target begins.
        """
        if self.copilot is not None and self.copilot.can_crop(-tokens_to_remove):
            self.copilot.crop(-tokens_to_remove)
        elif tokens_to_remove:
            self.forget_copilot()
        self.pilot.crop(tokens_to_remove)
        if self.ids_BT is not None:
            self.ids_BT = self.ids_BT[:, : self.get_seq_length()]

    def _in_both(self, method: str, argument: Any, rearrange: Callable[[Tensor], Tensor]) -> None:
        getattr(self.pilot, method)(argument)
        if self.copilot is not None:
            self.copilot.rearrange(method, argument, rearrange)
        if self.ids_BT is not None:
            self.ids_BT = rearrange(self.ids_BT)


def of_pilot(cache: Cache | None) -> Cache | None:
    """The Pilot's part of a fused model's cache; any other cache is the Pilot's as a whole."""
    return cache.pilot if isinstance(cache, TCopilotCache) else cache
