"""A Copilot that is only a head: the Pilot's own late states at the very target → an estimate of its error there.

Beyond the paper, whose Copilot is a decoder. It reads neither X̃ nor past errors, so a record of the Mistake Log is a
few states and p̂ of each target token, and a Copilot is fitted in seconds (docs/algorithm.md).

Shapes: B batch, N target length, D layers read, P Pilot width, Q = D · P, C hidden width,
V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from tcopilot.models.base_copilot import BaseConfig, LayerlessCopilot
from tcopilot.models.heads import SOFT_HEADS
from tcopilot.models.log_attention import CONTEXTS
from tcopilot.models.states import StackedStates
from tcopilot.processes import undivided
from tcopilot.settings import Rule, is_list, is_number, one_of, whole


def _are_depths(value: Any) -> bool:
    return is_list(value) and len(value) > 0 and all(is_number(share) and 0 < share <= 1 for share in value)


@dataclass(kw_only=True)
class HeadCopilotConfig(BaseConfig):
    """Defines a head-only Copilot.

    Attributes:
        depths: the Pilot's decoder layers whose outputs it reads, as shares of the decoder's depth.
        hidden: width of its hidden layer; None leaves it out, so that U reads the states themselves.
        head: what reads the hidden layer, see `SOFT_HEADS`.
        context: `inclusive` (target i reads h_i, which predicts it) or `strict` (h_{i−1}).
    """

    kind: ClassVar[str] = "head"
    SETTINGS: ClassVar = {
        "depths": Rule(_are_depths, "give shares of the Pilot's depth in (0, 1], such as [0.8, 0.9, 1.0]"),
        "hidden": whole().or_null(),
        "head": one_of(SOFT_HEADS),
        "context": one_of(CONTEXTS),
    }

    depths: list[float] = field(default_factory=lambda: [0.8, 0.9, 1.0])
    hidden: int | None = 512
    head: str = "soft"
    context: str = "inclusive"


class HeadCopilot(LayerlessCopilot):
    """f^C = softmax(log p̂ + U · MLP(h)) − p̂, with h from a few late layers of the Pilot, each brought to RMS 1."""

    config_class = HeadCopilotConfig
    fits_recordings = True

    def __init__(self, config: HeadCopilotConfig) -> None:
        super().__init__(config)
        self.pooler = StackedStates(tuple(config.depths))
        width = len(config.depths) * config.pilot_width
        self.hidden = nn.Linear(width, config.hidden) if config.hidden else None
        self.head = SOFT_HEADS[config.head](config.hidden or width, config.vocab_size, config.pilot_width)

    def bind(self, pilot: PreTrainedModel) -> None:
        """Use this Pilot's unembedding, which is neither copied nor trained or saved with the Copilot."""
        self.__dict__["_pilot"] = pilot  # so that `nn.Module` does not register it as a part

    def shift(self, hidden_BNC: Tensor, tokens_U: Tensor) -> Tensor:
        """What its correction adds to log p̂ of some tokens before the softmax, [B, N, U]; see `SoftHead.shift`."""
        return self.head.shift(hidden_BNC, self.unembedding_VC, tokens_U)

    @property
    def unembedding_VC(self) -> Tensor | None:
        """The Pilot's unembedding [V, P] as it is now; None for a head that has a map of its own."""
        return undivided(self._pilot.get_output_embeddings().weight.detach()) if self.head.reads_unembedding else None

    def _read(self, states_BNQ: Tensor) -> Tensor:
        """Bring each layer's state to RMS 1, since residual streams grow with depth, and run the hidden layer."""
        layers = states_BNQ.to(next(self.head.parameters()).dtype).unflatten(-1, (-1, self.config.pilot_width))
        scaled = nn.functional.rms_norm(layers, (self.config.pilot_width,), eps=1e-6).flatten(-2)
        return scaled if self.hidden is None else nn.functional.gelu(self.hidden(scaled))
