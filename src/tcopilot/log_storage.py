"""How the Mistake Log stores p̂, from which ℓ follows with the target ids.

Shapes: B records, N target length, V vocabulary, k kept entries.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class Storage(Protocol):
    """What the log asks of a storage."""

    names: tuple[str, ...]

    def pack(self, probs_BNV: Tensor, targets_BN: Tensor, mask_BN: Tensor) -> dict[str, Tensor]:
        """Turn float32 p̂ into the tensors to keep, each with leading dimensions [B, N]; the mask is for statistics."""

    def unpack(self, packed: dict[str, Tensor], targets_BN: Tensor) -> Tensor:
        """Rebuild p̂ [B, N, V] in float32."""

    def bytes_per_token(self, vocab_size: int) -> int:
        """Bytes of one target token, for the estimate before training."""

    def statistics(self) -> dict[str, float]:
        """Figures for the log's dashboard."""

    def state_dict(self) -> dict[str, Any]:
        """What `unpack` and `statistics` depend on besides what was packed: plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""


class DenseStorage:
    """All of p̂: exact in float32, for small vocabularies.

    Args:
        dtype: `float32` (exact), `float16` or `bfloat16`.
    """

    names = ("probs",)

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = getattr(torch, dtype)

    def pack(self, probs_BNV: Tensor, targets_BN: Tensor, mask_BN: Tensor) -> dict[str, Tensor]:
        """Keep p̂ as it is."""
        return {"probs": probs_BNV.to(self.dtype)}

    def unpack(self, packed: dict[str, Tensor], targets_BN: Tensor) -> Tensor:
        """Give p̂ back."""
        return packed["probs"].float()

    def bytes_per_token(self, vocab_size: int) -> int:
        """V entries."""
        return vocab_size * self.dtype.itemsize

    def statistics(self) -> dict[str, float]:
        """Nothing is lost."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a packed token says all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class TopKStorage:
    """The k largest entries of p̂ and p̂ of the target, exactly; the remaining mass is spread over the rest.

    With r the mass outside the k largest and p_k the smallest kept entry, a row's squared error is at most r · p_k.
    Its root mean square over target tokens, relative to ‖ℓ‖, is measured on every append and reported as
    `truncation_error`.

    Args:
        k: entries kept per target token.
        dtype: of the kept entries.
    """

    names = ("values", "indices", "target_prob")

    def __init__(self, k: int = 256, dtype: str = "float32") -> None:
        if k < 1:
            raise ValueError(f"mistake_log.log.storage.k={k}: keep at least one entry of p̂")
        self.k = k
        self.dtype = getattr(torch, dtype)
        self._vocab_size = 0
        self._lost = self._total = 0.0

    def pack(self, probs_BNV: Tensor, targets_BN: Tensor, mask_BN: Tensor) -> dict[str, Tensor]:
        """Keep k values, their indices and p̂ of the target; measure what is lost."""
        self._vocab_size = probs_BNV.shape[-1]
        values_BNk, indices_BNk = probs_BNV.topk(min(self.k, self._vocab_size), dim=-1)
        target_BN1 = probs_BNV.gather(-1, targets_BN.unsqueeze(-1))
        packed = {
            "values": values_BNk.to(self.dtype),
            "indices": indices_BNk.int(),
            "target_prob": target_BN1.to(self.dtype),
        }
        lost_BN = (self.unpack(packed, targets_BN) - probs_BNV).square().sum(-1)
        energy_BN = probs_BNV.square().sum(-1) - 2 * target_BN1.squeeze(-1) + 1
        self._lost += (lost_BN * mask_BN).sum().item()
        self._total += (energy_BN * mask_BN).sum().item()
        return packed

    def unpack(self, packed: dict[str, Tensor], targets_BN: Tensor) -> Tensor:
        """Put the kept entries back and spread the remaining mass evenly over the others."""
        values_BNk, indices_BNk = packed["values"].float(), packed["indices"].long()
        target_BN1, targets_BN1 = packed["target_prob"].float(), targets_BN.unsqueeze(-1)
        outside_BN1 = (indices_BNk != targets_BN1).all(-1, keepdim=True)
        kept = values_BNk.shape[-1] + outside_BN1.float()
        mass_BN1 = values_BNk.sum(-1, keepdim=True) + target_BN1 * outside_BN1
        rest_BN1 = (1 - mass_BN1).clamp_min(0) / (self._vocab_size - kept).clamp_min(1)
        probs_BNV = rest_BN1.expand(*targets_BN.shape, self._vocab_size).clone()
        return probs_BNV.scatter_(-1, indices_BNk, values_BNk).scatter_(-1, targets_BN1, target_BN1)

    def bytes_per_token(self, vocab_size: int) -> int:
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
        """Restore them."""
        self._vocab_size, self._lost, self._total = state["vocab_size"], state["lost"], state["total"]
