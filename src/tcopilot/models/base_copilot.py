"""What every Copilot is to the rest of the package: inputs → hidden states → corrections, at once or step by step.

Three kinds stand behind this interface: the paper's decoder (`copilot.py`), a head on the Pilot's own late states
(`head_copilot.py`) and a calibration of the Pilot (`calibration.py`). Nothing but `models/kinds.py` knows which
there are.

Shapes: B batch, M source length, N target length, K past targets, P width of the states read, C Copilot width,
V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tcopilot.models.caches import CopilotState
from tcopilot.models.gates import Gate, build_gate
from tcopilot.settings import Rule, require

FORMAT = 2
"""Format of exported Copilot weights. Since 2, each log attention layer has its own norm weight for the log."""


@dataclass(kw_only=True)
class BaseConfig:
    """What defines a Copilot's architecture, of any kind; saved beside its weights.

    Attributes:
        pilot_width: P, width of the Pilot that it reads.
        vocab_size: V.
        gate: settings of the gate that scales its corrections in decoding and scoring; None without a gate.
        format: format of its weights, see `FORMAT`.
    """

    kind: ClassVar[str]
    context: ClassVar[str]
    SETTINGS: ClassVar[dict[str, Rule]] = {}

    pilot_width: int
    vocab_size: int
    gate: dict[str, Any] | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        require(self.SETTINGS, vars(self), "copilot")
        build_gate(self.gate)

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary for `config.json`."""
        return {"kind": self.kind, **asdict(self)}


class BaseCopilot(nn.Module, ABC):
    """Estimates ℓ from the Pilot's states and outputs. A new one outputs 0, so the fused model equals the Pilot.

    Attributes:
        pooler: which of the Pilot's states it reads, see `models/states.py`.
        head: from hidden states to corrections.
        body: the decoder layers that run before the head; None for a Copilot without any.
        reads_errors: whether it reads ℓ_{<i}, so that its own outputs may be fed back in decoding.
        fits_recordings: whether it reads nothing but the Pilot's states at target positions, so that it can be fitted
            from a recording (`mistake_log/recording.py`), without the Pilot's layers.
        learns: whether it is trained on the Mistake Log; if not, it is fitted on validation rows after training.
    """

    config_class: ClassVar[type[BaseConfig]]
    config: BaseConfig
    pooler: Callable[..., Tensor]
    head: nn.Module
    body: nn.Module | None
    reads_errors: bool
    fits_recordings: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    SETTINGS: ClassVar[dict[str, Rule]] = {}
    """Rules for the arguments of `from_pilot` that are not fields of its config."""

    def __init__(self, config: BaseConfig) -> None:
        super().__init__()
        self.config, self.gate = config, build_gate(config.gate)

    @property
    def is_strict(self) -> bool:
        """Whether target i reads h_{<i} only, so that its body needs nothing of the Pilot's step i."""
        return self.config.context == "strict"

    def bind(self, pilot: PreTrainedModel) -> None:
        """Remember the Pilot that it corrects, so that it can read the Pilot's frozen parts without copying them."""

    @abstractmethod
    def inputs(self, past_errors_BKV: Tensor) -> Tensor:
        """Embed past errors: the inputs [B, K + 1, C] of targets 0 … K."""

    def taught_inputs(self, probs_BNV: Tensor, targets_BN: Tensor) -> Tensor:
        """Return the inputs [B, N, C] of all N targets from the Pilot's p̂: `inputs` of ℓ_{<i}, without ℓ in memory.

        This default serves a Copilot that reads no errors.
        """
        return self.inputs(probs_BNV[:, :-1])

    @abstractmethod
    def forward(
        self, inputs_BNC: Tensor, source_BMP: Tensor | None, source_mask_BM: Tensor | None, states_BNP: Tensor,
        keep: bool = False,
    ) -> tuple[Tensor, CopilotState | None]:  # fmt: skip
        """Run all N targets at once; returns hidden states for `correct`, and the state for `step` (if `keep`)."""

    @abstractmethod
    def step(self, inputs_B1C: Tensor, row_B1P: Tensor, state: CopilotState) -> Tensor:
        """Run one more target; returns hidden states for `correct`, and moves the state on.

        `row_B1P` holds the states of the previous target in strict context, of this target in inclusive context.
        """

    def correct(self, hidden_BNC: Tensor, log_probs_BNV: Tensor) -> Tensor:
        """Return the corrections f^C [B, N, V], float32, for the Pilot's log p̂ at the same positions."""
        return self.head(hidden_BNC, log_probs_BNV, self.unembedding_VC)

    def set_gate(self, gate: Gate | None) -> None:
        """Scale corrections by a gate from now on; None takes it away."""
        self.gate, self.config.gate = gate, None if gate is None else gate.settings()

    def gated(self, log_probs_BNV: Tensor, corrections_BNV: Tensor, positions_BN: Tensor | None = None) -> Tensor:
        """Return g f^C, or f^C without a gate. Positions are counted from 0; None means 0 … N − 1."""
        if self.gate is None:
            return corrections_BNV
        if positions_BN is None:
            positions_BN = torch.arange(corrections_BNV.shape[1], device=corrections_BNV.device)[None]
        return self.gate(log_probs_BNV, corrections_BNV, positions_BN) * corrections_BNV

    @property
    @abstractmethod
    def unembedding_VC(self) -> Tensor | None:
        """The frozen matrix that the head reads, stored once; None for a head that reads none."""


class LayerlessCopilot(BaseCopilot):
    """A Copilot that corrects each target by what the Pilot did there (or, in strict context, just before)."""

    body = None
    reads_errors = False

    @classmethod
    def from_pilot(cls, pilot: PreTrainedModel, **options: Any) -> Self:
        """Build one for a Pilot; options are fields of its config."""
        vocab = pilot.get_output_embeddings().weight.shape[0]
        copilot = cls(cls.config_class(pilot_width=pilot.config.hidden_size, vocab_size=vocab, **options))
        copilot.bind(pilot)
        return copilot

    @abstractmethod
    def _read(self, states_BNP: Tensor) -> Tensor:
        """Hidden states [B, N, C] of targets from the Pilot's states there."""

    def inputs(self, past_errors_BKV: Tensor) -> Tensor:
        """Return empty inputs [B, K + 1, 0], since no errors are read."""
        batch, past = past_errors_BKV.shape[:2]
        return past_errors_BKV.new_empty(batch, past + 1, 0)

    def forward(
        self, inputs_BNC: Tensor, source_BMP: Tensor | None, source_mask_BM: Tensor | None, states_BNP: Tensor,
        keep: bool = False,
    ) -> tuple[Tensor, CopilotState | None]:  # fmt: skip
        """Read all targets at once, from `states_BNP` alone."""
        read_BNP = states_BNP
        if self.is_strict:  # target 0 has no state before it
            read_BNP = torch.cat([torch.zeros_like(states_BNP[:, :1]), states_BNP[:, :-1]], dim=1)
        hidden_BNC = self._read(read_BNP)
        if not keep:
            return hidden_BNC, None
        target_B1 = torch.full_like(states_BNP[:, :1, 0], states_BNP.shape[1], dtype=torch.long)
        return hidden_BNC, CopilotState(target_B1=target_B1, pending_B1P=states_BNP[:, -1:])

    def step(self, inputs_B1C: Tensor, row_B1P: Tensor, state: CopilotState) -> Tensor:
        """Read one more target."""
        state.target_B1 += 1
        return self._read(row_B1P)
