"""λ beyond a constant: p̃_i = p̂_i + λ g_i f^C_i, where g_i depends on the target's position or on the token.

A gate is fitted on validation rows, after training, so that λ = 1 gives the smallest expected squared error
E‖p − p̂ − g f^C‖² that a gate of its kind can give (Theorem 4.1, beyond one λ). Gates are not in the paper.

Shapes: B batch, N targets, V vocabulary, T target tokens of a data set, F features.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tcopilot.functional import best_weight, token_errors

EDGES = (1, 2, 4, 8, 16, 32, 64)
"""First positions of all buckets but the first, which holds position 0 alone."""
LEAST_TOKENS = 30
"""A bucket with fewer validation tokens uses the g fitted to all tokens."""
DIGITS = 4
"""Fitted values are rounded, so that an evaluation that is started again finds the same gate and keeps its answers."""
LARGEST = 2.0
"""g of a token lies between 0 and this; a gate that learned nothing gives 1."""
PENALTY = 1e-4
"""Weight of the squared coefficients beside the relative squared error."""


@dataclass
class Observations:
    """What a gate is fitted on: ⟨ℓ, f^C⟩, ‖f^C‖², position from 0, and `TokenGate`'s features of each target token."""

    inner_T: Tensor
    energy_T: Tensor
    positions_T: Tensor
    features_TF: Tensor

    @classmethod
    def of(cls, log_probs_BNV: Tensor, corrections_BNV: Tensor, targets_BN: Tensor, mask_BN: Tensor) -> Self:
        """Observe a batch of targets, teacher-forced, by f^C without a gate; padding is left out."""
        errors_BNV = token_errors(log_probs_BNV.exp(), targets_BN)
        positions_BN = torch.arange(targets_BN.shape[1], device=targets_BN.device).expand_as(targets_BN)
        inner_BN, energy_BN = (errors_BNV * corrections_BNV).sum(-1), corrections_BNV.square().sum(-1)
        parts = (
            inner_BN.double(),
            energy_BN.double(),
            positions_BN,
            _features(log_probs_BNV, corrections_BNV).double(),
        )
        return cls(*(part[mask_BN].cpu() for part in parts))

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """Join the observations of many batches."""
        return cls(*(torch.cat(columns) for columns in zip(*(vars(one).values() for one in parts), strict=True)))


class Gate(ABC):
    """How strongly each correction counts. A gate is a dataclass whose fields are its fitted values."""

    per: ClassVar[str]

    @abstractmethod
    def __call__(self, log_probs_BNV: Tensor, corrections_BNV: Tensor, positions_BN: Tensor) -> Tensor:
        """Return g [B, N, 1], float32, from log p̂, f^C and the targets' positions, counted from 0."""

    @classmethod
    @abstractmethod
    def fit(cls, seen: Observations) -> Self:
        """Choose the gate with the least squared error on what was seen."""

    def settings(self) -> dict[str, Any]:
        """What `build_gate` builds this gate from, in plain values for `config.json`."""
        return {"per": self.per, **asdict(self)}


@dataclass(frozen=True)
class PositionGate(Gate):
    """One g for each bucket of positions 0, 1, 2–3, 4–7, …: λ* of that bucket's tokens, in closed form."""

    per = "position"
    values: list[float]

    def __call__(self, log_probs_BNV, corrections_BNV, positions_BN) -> Tensor:
        """Return g [B, N, 1]."""
        gate_BN = torch.full_like(positions_BN, self.values[0], dtype=torch.float32)
        for edge, value in zip(EDGES, self.values[1:], strict=True):  # numbers, so that no tensor is copied to the GPU
            gate_BN = torch.where(positions_BN >= edge, value, gate_BN)
        return gate_BN.unsqueeze(-1)

    @classmethod
    def fit(cls, seen: Observations) -> Self:
        """Take λ* of each bucket."""
        buckets, values = _buckets(seen.positions_T), []
        for bucket in range(len(EDGES) + 1):
            chosen = buckets == bucket
            if chosen.sum() < LEAST_TOKENS:
                chosen = torch.ones_like(chosen)
            values.append(best_weight(seen.inner_T[chosen].mean().item(), seen.energy_T[chosen].mean().item()))
        return cls([round(value, DIGITS) for value in values])


@dataclass(frozen=True)
class TokenGate(Gate):
    """g = 2 σ(c · x), x = (1, max p̂, entropy of p̂, ‖f^C‖): trust a correction by what both models show."""

    per = "token"
    coefficients: list[float]

    def __call__(self, log_probs_BNV, corrections_BNV, positions_BN) -> Tensor:
        """Return g [B, N, 1]."""
        features = _features(log_probs_BNV, corrections_BNV).unbind(-1)
        score_BN = sum(c * feature_BN for c, feature_BN in zip(self.coefficients, features, strict=True))
        return LARGEST * torch.sigmoid(score_BN).unsqueeze(-1)

    @classmethod
    def fit(cls, seen: Observations) -> Self:
        """Find the coefficients by L-BFGS, from 0, where g = 1 everywhere."""
        coefficients_F = torch.zeros(seen.features_TF.shape[1], dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([coefficients_F], max_iter=100, line_search_fn="strong_wolfe")
        scale = seen.energy_T.sum().clamp_min(torch.finfo(torch.float64).tiny)

        def loss() -> Tensor:
            search.zero_grad()
            gate_T = LARGEST * torch.sigmoid(seen.features_TF @ coefficients_F)
            error = (gate_T.square() * seen.energy_T - 2 * gate_T * seen.inner_T).sum() / scale
            total = error + PENALTY * coefficients_F.square().sum()
            total.backward()
            return total

        with torch.enable_grad():
            search.step(loss)
        return cls([round(value, DIGITS) for value in coefficients_F.tolist()])


GATES: dict[str, type[Gate]] = {gate.per: gate for gate in (PositionGate, TokenGate)}


def build_gate(settings: Mapping[str, Any] | None) -> Gate | None:
    """Build a gate from its settings; None stands for no gate."""
    if settings is None:
        return None
    values = dict(settings)
    if (kind := values.pop("per", None)) not in GATES:
        raise ValueError(f"gate per {kind!r} is not one of {', '.join(GATES)}")
    return GATES[kind](**values)


def _buckets(positions: Tensor) -> Tensor:
    """Number of the bucket of each position.

    >>> _buckets(torch.tensor([0, 1, 2, 3, 4, 7, 8, 200])).tolist()
    [0, 1, 2, 2, 3, 3, 4, 7]
    """
    return torch.bucketize(positions, torch.tensor(EDGES, device=positions.device), right=True)


def _features(log_probs_BNV: Tensor, corrections_BNV: Tensor) -> Tensor:
    """Return (1, max p̂, entropy of p̂ in nats, ‖f^C‖) of each target, [B, N, F]."""
    probs_BNV = log_probs_BNV.exp()
    entropy_BN = -torch.xlogy(probs_BNV, probs_BNV).sum(-1)
    norm_BN = corrections_BNV.square().sum(-1).sqrt()
    return torch.stack([torch.ones_like(entropy_BN), probs_BNV.amax(-1), entropy_BN, norm_BN], dim=-1)
