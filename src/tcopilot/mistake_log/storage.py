"""How the Mistake Log stores p̂, from which ℓ follows with the target ids.

Shapes: B records, N target length, P Pilot width, V vocabulary, k kept entries.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tcopilot.models.error_input import CHUNK_ELEMENTS
from tcopilot.models.families import logits_from_head_input
from tcopilot.models.states import PilotStates
from tcopilot.settings import DTYPE, dtype_name, require, whole

SMALLEST_FLOAT16 = 2.0**-24  # above 0
LIKELIEST = 16  # tokens of p̂ named in a record; a loss compares those of a whole batch


class Storage(ABC):
    """What the log asks of a storage.

    Attributes:
        names: the names of the tensors that `pack` returns.
        serves_few_tokens: whether these are what `ComparedTokens` reads, so that p̂ need not be unpacked for it.
    """

    names: tuple[str, ...]
    serves_few_tokens: ClassVar[bool] = False

    @abstractmethod
    def describe(self, pilot: PreTrainedModel) -> str:
        """Say in a few words what is kept of p̂; raise ValueError if this Pilot's p̂ cannot be kept so."""

    @abstractmethod
    def pack(self, states: PilotStates, probs_BNV: Tensor) -> dict[str, Tensor]:
        """Turn p̂ (float32) or what it came from into the tensors to keep, each with leading dimensions [B, N]."""

    @abstractmethod
    def unpack(self, packed: dict[str, Tensor], targets_BN: Tensor, pilot: PreTrainedModel | None = None) -> Tensor:
        """Rebuild p̂ [B, N, V] in float32, where needed with the Pilot's frozen parts."""

    @abstractmethod
    def bytes_per_token(self, vocab_size: int, width: int, dtype: torch.dtype) -> int:
        """Bytes of one target token, for the estimate before training; `dtype` is what the Pilot computes in."""

    def statistics(self) -> dict[str, float]:
        """Figures for the log's dashboard; none if nothing is lost."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What `unpack` and `statistics` depend on besides what was packed, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore what `state_dict` returned."""


class DenseStorage(Storage):
    """All of p̂: exact in float32, for small vocabularies."""

    SETTINGS: ClassVar = {"dtype": DTYPE}
    names = ("probs",)

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = getattr(torch, dtype)

    def describe(self, pilot: PreTrainedModel) -> str:
        """All of p̂."""
        return f"p̂ ({dtype_name(self.dtype)})"

    def pack(self, states: PilotStates, probs_BNV: Tensor) -> dict[str, Tensor]:
        """Keep p̂ as it is."""
        of_target_BN1 = _of_target(probs_BNV, states.targets_BN, self.dtype)
        return {"probs": probs_BNV.to(self.dtype).scatter_(-1, states.targets_BN.unsqueeze(-1), of_target_BN1)}

    def unpack(self, packed: dict[str, Tensor], targets_BN: Tensor, pilot: PreTrainedModel | None = None) -> Tensor:
        """Give p̂ back."""
        return packed["probs"].float()

    def bytes_per_token(self, vocab_size: int, width: int, dtype: torch.dtype) -> int:
        """V entries."""
        return vocab_size * self.dtype.itemsize


class TopKStorage(Storage):
    """The k largest entries of p̂ and p̂ of the target, exactly; the remaining mass is spread over the rest.

    With r the mass outside the k largest and p_k the smallest kept entry, a row's squared error is at most r · p_k.
    The root mean square of this error over target tokens, relative to ‖ℓ‖, is measured on every append and reported as
    `truncation_error`.
    """

    SETTINGS: ClassVar = {"k": whole(mend="keep at least one entry of p̂; give a whole number"), "dtype": DTYPE}
    names = ("values", "indices", "target_prob")

    def __init__(self, k: int = 256, dtype: str = "float32") -> None:
        require(self.SETTINGS, {"k": k}, "mistake_log.log.storage")
        self.k, self.dtype = k, getattr(torch, dtype)
        self._vocab_size = 0
        self._lost = self._total = 0.0

    def describe(self, pilot: PreTrainedModel) -> str:
        """The largest entries of p̂."""
        return f"the {self.k} largest entries of p̂ ({dtype_name(self.dtype)})"

    def pack(self, states: PilotStates, probs_BNV: Tensor) -> dict[str, Tensor]:
        """Keep k values, their indices and p̂ of the target; measure what is lost."""
        targets_BN, mask_BN = states.targets_BN, states.target_mask_BN
        self._vocab_size = probs_BNV.shape[-1]
        values_BNk, indices_BNk = probs_BNV.topk(min(self.k, self._vocab_size), dim=-1)
        target_BN1 = probs_BNV.gather(-1, targets_BN.unsqueeze(-1))
        kept = values_BNk.to(self.dtype), indices_BNk.int(), _of_target(probs_BNV, targets_BN, self.dtype)
        packed = dict(zip(self.names, kept, strict=True))
        lost_BN = (self.unpack(packed, targets_BN) - probs_BNV).square().sum(-1)
        energy_BN = probs_BNV.square().sum(-1) - 2 * target_BN1.squeeze(-1) + 1
        self._lost += (lost_BN * mask_BN).sum().item()
        self._total += (energy_BN * mask_BN).sum().item()
        return packed

    def unpack(self, packed: dict[str, Tensor], targets_BN: Tensor, pilot: PreTrainedModel | None = None) -> Tensor:
        """Put the kept entries back and spread the remaining mass evenly over the others."""
        values_BNk, indices_BNk = packed["values"].float(), packed["indices"].long()
        target_BN1, targets_BN1 = packed["target_prob"].float(), targets_BN.unsqueeze(-1)
        outside_BN1 = (indices_BNk != targets_BN1).all(-1, keepdim=True)
        kept = values_BNk.shape[-1] + outside_BN1.float()
        mass_BN1 = values_BNk.sum(-1, keepdim=True) + target_BN1 * outside_BN1
        rest_BN1 = (1 - mass_BN1).clamp_min(0) / (self._vocab_size - kept).clamp_min(1)
        probs_BNV = rest_BN1.expand(*targets_BN.shape, self._vocab_size).clone()
        return probs_BNV.scatter_(-1, indices_BNk, values_BNk).scatter_(-1, targets_BN1, target_BN1)

    def bytes_per_token(self, vocab_size: int, width: int, dtype: torch.dtype) -> int:
        """Return the bytes of k values with their indices and p̂ of the target."""
        k = min(self.k, vocab_size)
        return k * (self.dtype.itemsize + 4) + self.dtype.itemsize

    def statistics(self) -> dict[str, float]:
        """`truncation_error`: root mean square of what was lost, relative to that of ℓ, over all appends so far."""
        return {"truncation_error": (self._lost / self._total) ** 0.5} if self._total else {}

    def state_dict(self) -> dict[str, Any]:
        """V, which packed tokens do not tell, and the sums behind `truncation_error`."""
        return {"vocab_size": self._vocab_size, "lost": self._lost, "total": self._total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore V and these sums."""
        self._vocab_size, self._lost, self._total = state["vocab_size"], state["lost"], state["total"]


class FrozenHeadStorage(Storage):
    """What the Pilot's head reads, from which the frozen head rebuilds p̂ when a record is drawn: P numbers, not V.

    Exact up to the rounding of one matrix product, for as long as the head does not change: with LoRA elsewhere or a
    frozen Pilot (but for a tied T5 in bf16-mixed: its scaling then rounds once more).
    """

    names = ("head_input",)

    def describe(self, pilot: PreTrainedModel) -> str:
        """Name the head's input; a trained head is refused, since it cannot rebuild the errors of earlier rounds."""
        if not is_frozen(pilot.get_output_embeddings()):
            raise ValueError(
                "log_storage=frozen_head keeps what the Pilot's head reads and rebuilds p̂ through the head, but this "
                "Pilot's head is trained, so that past errors could not be rebuilt. Freeze it "
                "(adapter@pilot.adapter=lora without the head among its targets, or pilot.frozen=true), or use "
                "log_storage@mistake_log.log.storage=topk"
            )
        return "the input of the frozen head"

    def pack(self, states: PilotStates, probs_BNV: Tensor) -> dict[str, Tensor]:
        """Keep the head's input in the type to which the head rounds it: autocast's, if on, else its weights'."""
        self.describe(states.pilot)  # raises where the head is trained
        weight = next(states.pilot.get_output_embeddings().parameters())
        kind = weight.device.type
        read = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return {"head_input": states.head_input_BNP.to(read)}

    def unpack(self, packed: dict[str, Tensor], targets_BN: Tensor, pilot: PreTrainedModel | None = None) -> Tensor:
        """Run the head a few rows at a time, so that logits and p̂ of all rows are never in memory together."""
        if pilot is None:
            raise ValueError(
                "a log with log_storage=frozen_head needs the Pilot to draw: append a round, or set `pilot`"
            )
        weight = next(pilot.get_output_embeddings().parameters())
        (rows, length), vocab_size = targets_BN.shape, weight.shape[0]
        probs_BNV = torch.empty(rows, length, vocab_size, device=targets_BN.device)
        step = max(1, CHUNK_ELEMENTS // max(1, length * vocab_size))
        for first in range(0, rows, step):
            piece = packed["head_input"][first : first + step].to(weight.device, weight.dtype)
            probs_BNV[first : first + step] = logits_from_head_input(pilot, piece).float().softmax(dim=-1)
        return probs_BNV

    def bytes_per_token(self, vocab_size: int, width: int, dtype: torch.dtype) -> int:
        """P numbers."""
        return width * dtype.itemsize


class LikelyTokensStorage(FrozenHeadStorage):
    """The same beside log Σ exp of the logits and the likeliest tokens, so that a loss may compare few tokens.

    A head-only Copilot then learns from p̂ of targets, likely and some random tokens, as in a fit to a recording
    (`ComparedTokens`), and p̂ is not formed over the vocabulary. Other Copilots read all of p̂, as from `frozen_head`.
    """

    names = ("head_input", "normaliser", "likeliest")
    serves_few_tokens = True

    def describe(self, pilot: PreTrainedModel) -> str:
        """Name the head's input and the likeliest tokens."""
        return f"{super().describe(pilot)}, the {LIKELIEST} likeliest tokens"

    def pack(self, states: PilotStates, probs_BNV: Tensor) -> dict[str, Tensor]:
        """Keep the head's input, the normaliser (float32) and the likeliest tokens."""
        return super().pack(states, probs_BNV) | tokens_to_keep(states.logits_BNV.float())

    def bytes_per_token(self, vocab_size: int, width: int, dtype: torch.dtype) -> int:
        """P numbers, a float and the ids of the likeliest tokens."""
        return super().bytes_per_token(vocab_size, width, dtype) + 4 + 4 * min(LIKELIEST, vocab_size)


def tokens_to_keep(logits_BNV: Tensor) -> dict[str, Tensor]:
    """What is kept beside the head's input for a loss that compares few tokens: `normaliser` and `likeliest`."""
    likeliest_BNk = logits_BNV.topk(min(LIKELIEST, logits_BNV.shape[-1]), dim=-1).indices
    return {"normaliser": logits_BNV.logsumexp(-1), "likeliest": likeliest_BNk.int()}


def _of_target(probs_BNV: Tensor, targets_BN: Tensor, dtype: torch.dtype) -> Tensor:
    """Return p̂ of the target [B, N, 1] in a type. Losses read its logarithm, so it must not be rounded to 0."""
    least = SMALLEST_FLOAT16 if dtype == torch.float16 else 0.0
    return probs_BNV.gather(-1, targets_BN.unsqueeze(-1)).clamp_min(least).to(dtype)


def is_frozen(module: nn.Module) -> bool:
    """Whether training leaves all of a module as it is, adapters in it included."""
    return not any(parameter.requires_grad for parameter in module.parameters())
