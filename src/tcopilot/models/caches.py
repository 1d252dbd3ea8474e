"""What a fused model carries from one decoding step to the next: the caches of both models as one."""

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from tcopilot.models.copilot import CopilotState

CANNOT_UNDO = "a fused model cannot undo decoding steps; use greedy, sampling or beam search"


class TCopilotCache(Cache):
    """The caches of both models under one name, so that beam search reorders them together."""

    is_compileable = False
    is_croppable = False

    def __init__(self, pilot: Cache) -> None:
        self.pilot = pilot
        self.copilot: CopilotState | None = None

    @property
    def layers(self):
        """The Pilot's cache layers: whoever asks for lengths or masks means the Pilot."""
        return self.pilot.layers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the Pilot has seen."""
        return self.pilot.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Mask sizes of the Pilot's cache."""
        return self.pilot.get_mask_sizes(query_length, layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the surviving beams, in both models."""
        self.pilot.reorder_cache(beam_idx)
        if self.copilot is not None:
            self.copilot.cache.reorder_cache(beam_idx)
            self.copilot.apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, in both models."""
        self.pilot.batch_repeat_interleave(repeats)
        if self.copilot is not None:
            self.copilot.cache.batch_repeat_interleave(repeats)
            self.copilot.apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in both models."""
        self.pilot.batch_select_indices(indices)
        if self.copilot is not None:
            self.copilot.cache.batch_select_indices(indices)
            self.copilot.apply(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: assisted and prompt-lookup decoding would need to undo Copilot steps."""
        raise ValueError(CANNOT_UNDO)


def is_repeatable(cache: Cache | None) -> bool:
    """Whether rows of a cache can be repeated after it was filled; static caches have their rows from the start."""
    return isinstance(of_pilot(cache), DynamicCache | EncoderDecoderCache)


def of_pilot(cache: Cache | None) -> Cache | None:
    """The Pilot's part of a cache, which may be the whole of it."""
    return cache.pilot if isinstance(cache, TCopilotCache) else cache
