"""The Mistake Log (Section 2.2): what the Pilot saw, how it saw it and where it went wrong, round after round.

A round's records are stored together on the CPU and leave together, so every policy is bounded in rounds, and in bytes
where a limit is given. Sampling draws single records.

Shapes: B records, M source length, N target length, P Pilot width, V vocabulary.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tcopilot.functional import token_errors
from tcopilot.log_storage import DenseStorage, Storage
from tcopilot.sampling import Fifo, SamplingPolicy
from tcopilot.states import PilotStates


class MistakeRecord(NamedTuple):
    """Records drawn from the log, padded to one shape, on the training device."""

    source_BMP: Tensor
    source_mask_BM: Tensor
    states_BNP: Tensor
    probs_BNV: Tensor
    targets_BN: Tensor
    target_mask_BN: Tensor

    @property
    def errors_BNV(self) -> Tensor:
        """ℓ = onehot(y) − p̂ (Eq. 4)."""
        return token_errors(self.probs_BNV, self.targets_BN)


@dataclass
class LoggedRound:
    """The records of one append: tensors with the record as first dimension, and what policies and statistics read."""

    tensors: dict[str, Tensor]
    round: int
    energy_B: Tensor  # mean ‖ℓ‖² over the target tokens of each record
    repeated_B: Tensor  # True where the row had been logged before

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), self.energy_B, self.repeated_B))

    def __len__(self) -> int:
        return len(self.energy_B)


class MistakeLog:
    """A bounded log of the Pilot's mistakes.

    Args:
        capacity_rounds: most rounds held (the paper: 128).
        max_bytes: most bytes held; None for no limit. One round always stays.
        policy: which round leaves when the log is full, and how records are drawn.
        storage: how p̂ is stored.
        dtype: type of X̃ and h̄ in the log.
        seed: of the draws.

    Raises:
        ValueError: if the capacity is below one round or the byte limit is not positive.
    """

    def __init__(
        self,
        capacity_rounds: int = 128,
        max_bytes: int | None = None,
        policy: SamplingPolicy | None = None,
        storage: Storage | None = None,
        dtype: torch.dtype | str = torch.float32,
        seed: int = 0,
    ) -> None:
        if capacity_rounds < 1:
            raise ValueError(
                f"mistake_log.log.capacity_rounds={capacity_rounds}: the log must hold at least one round"
            )
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(
                f"mistake_log.log.max_bytes={max_bytes}: give a positive number of bytes, or null for no limit"
            )
        self.capacity_rounds = capacity_rounds
        self.max_bytes = max_bytes
        self.policy = Fifo() if policy is None else policy
        self.storage = DenseStorage() if storage is None else storage
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.rounds: deque[LoggedRound] = deque()
        self.seen_rounds = 0
        self._seen_ids: set[int] = set()
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Number of records held."""
        return sum(len(logged) for logged in self.rounds)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(logged.nbytes for logged in self.rounds)

    @torch.no_grad()
    def append(self, states: PilotStates, extend: bool = False, rows_per_piece: int = 64) -> None:
        """Log one round, detached, before the Pilot's update (Algorithm 1).

        Args:
            states: the Pilot's trace; nothing in it is kept alive or changed.
            extend: the records belong to the round appended last, of which this is a further micro-batch.
            rows_per_piece: rows whose p̂ is formed at once, which bounds the temporary memory.
        """
        if extend and self.rounds[-1].round != self.seen_rounds - 1:
            return  # the policy did not admit this round
        logged = self._logged(states, self.seen_rounds - int(extend), rows_per_piece)
        if extend:
            logged = _joined(self.rounds.pop(), logged)
        self.rounds.append(logged)
        self.seen_rounds = logged.round + 1
        while len(self.rounds) > self.capacity_rounds or self._over_bytes():
            del self.rounds[self.policy.evict(len(self.rounds), self.seen_rounds, self._generator)]

    def _logged(self, states: PilotStates, round: int, rows_per_piece: int) -> LoggedRound:
        packed, energies = [], []
        for first in range(0, len(states.targets_BN), rows_per_piece):
            rows = slice(first, first + rows_per_piece)
            probs_BNV = torch.softmax(states.logits_BNV[rows].float(), dim=-1)
            targets_BN, mask_BN = states.targets_BN[rows], states.target_mask_BN[rows]
            energies.append(_mean_energy(probs_BNV, targets_BN, mask_BN).cpu())
            kept = self.storage.pack(probs_BNV, targets_BN, mask_BN)
            packed.append({name: _to_cpu(tensor) for name, tensor in kept.items()})
        tensors = {
            "source": _to_cpu(states.source_BMP, self.dtype),
            "source_mask": _to_cpu(states.source_mask_BM),
            "states": _to_cpu(states.states_BNP, self.dtype),
            "targets": _to_cpu(states.targets_BN),
            "target_mask": _to_cpu(states.target_mask_BN),
            "benchmark": _to_cpu(states.benchmark_B),
        }
        tensors |= {name: torch.cat([piece[name] for piece in packed]) for name in packed[0]}
        ids = states.ids_B.tolist()
        repeated_B = torch.tensor([i in self._seen_ids for i in ids])
        self._seen_ids.update(ids)
        return LoggedRound(tensors, round, torch.cat(energies), repeated_B)

    def sample(self, records: int, device: torch.device | str = "cpu") -> MistakeRecord:
        """Draw records by the policy and pad them to one shape.

        Args:
            records: how many. Fewer come back only if the policy draws without replacement from a smaller log.
            device: where they go.

        Raises:
            ValueError: if the log is empty.
        """
        if not self.rounds:
            raise ValueError("the Mistake Log is empty: append a round before drawing from it")
        drawn = [self._row(index) for index in self.policy.draw(self, records, self._generator).tolist()]
        source, source_mask, states, targets, target_mask = (
            pad_sequence([row[name] for row in drawn], batch_first=True)
            for name in ("source", "source_mask", "states", "targets", "target_mask")
        )
        packed = {
            name: pad_sequence([row[name] for row in drawn], batch_first=True).to(device, non_blocking=True)
            for name in self.storage.names
        }
        targets = targets.to(device, non_blocking=True)
        return MistakeRecord(
            source.to(device, non_blocking=True),
            source_mask.to(device, non_blocking=True),
            states.to(device, non_blocking=True),
            self.storage.unpack(packed, targets),
            targets,
            target_mask.to(device, non_blocking=True),
        )

    def concatenated(self, name: str) -> Tensor:
        """One value per record held, in log order: `energy`, `repeated` or `benchmark`."""
        if name == "benchmark":
            return torch.cat([logged.tensors["benchmark"] for logged in self.rounds])
        return torch.cat([getattr(logged, f"{name}_B") for logged in self.rounds])

    def statistics(self) -> dict[str, float]:
        """Size, bytes, age and composition of the log, for dashboards and alarms.

        Returns:
            `records`, `rounds`, `bytes`, `age_rounds` (mean rounds since a record was logged), `error_energy` (mean
            ‖ℓ‖² per target token), `repeated_share` (records of rows that had been logged before) and, for lossy
            storage, `truncation_error` (relative, see `TopKStorage`).
        """
        sizes = torch.tensor([len(logged) for logged in self.rounds], dtype=torch.float)
        ages = torch.tensor([self.seen_rounds - 1 - logged.round for logged in self.rounds], dtype=torch.float)
        return {
            "records": float(len(self)),
            "rounds": float(len(self.rounds)),
            "bytes": float(self.nbytes),
            "age_rounds": ((ages * sizes).sum() / sizes.sum()).item(),
            "error_energy": self.concatenated("energy").mean().item(),
            "repeated_share": self.concatenated("repeated").float().mean().item(),
            **self.storage.statistics(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next append and the next draw depend on: tensors and plain values only."""
        return {
            "rounds": [
                {"tensors": r.tensors, "round": r.round, "energy_B": r.energy_B, "repeated_B": r.repeated_B}
                for r in self.rounds
            ],
            "seen_rounds": self.seen_rounds,
            "seen_ids": torch.tensor(sorted(self._seen_ids), dtype=torch.int64),
            "generator": self._generator.get_state(),
            "storage": self.storage.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a log; the draws go on as if nothing had happened."""
        self.rounds = deque(LoggedRound(**logged) for logged in state["rounds"])
        self.seen_rounds = state["seen_rounds"]
        self._seen_ids = set(state["seen_ids"].tolist())
        self._generator.set_state(state["generator"].cpu())
        self.storage.load_state_dict(state["storage"])

    def _over_bytes(self) -> bool:
        return self.max_bytes is not None and len(self.rounds) > 1 and self.nbytes > self.max_bytes

    def _row(self, index: int) -> dict[str, Tensor]:
        for logged in self.rounds:
            if index < len(logged):
                break
            index -= len(logged)
        source_mask, target_mask = logged.tensors["source_mask"][index], logged.tensors["target_mask"][index]
        first = int(source_mask.int().argmax())  # the prompt is one run of real tokens, padded on either side
        prompt = slice(first, first + int(source_mask.sum()))
        target = slice(0, int(target_mask.sum()))
        row = {name: logged.tensors[name][index, prompt] for name in ("source", "source_mask")}
        for name in ("states", "targets", "target_mask", *self.storage.names):
            row[name] = logged.tensors[name][index, target]
        return row


def _to_cpu(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An owned copy on the CPU: the log must not keep the Pilot's graph or a shared buffer alive."""
    return torch.empty_like(tensor, dtype=dtype, device="cpu").copy_(tensor.detach())


def _joined(first: LoggedRound, second: LoggedRound) -> LoggedRound:
    """Records of two micro-batches as one round, padded to one width."""
    tensors = {}
    for name, one in first.tensors.items():
        two = second.tensors[name]
        if one.dim() > 1 and one.shape[1] != two.shape[1]:
            width = max(one.shape[1], two.shape[1])
            one, two = (torch.cat([t, t.new_zeros(len(t), width - t.shape[1], *t.shape[2:])], 1) for t in (one, two))
        tensors[name] = torch.cat([one, two])
    energy_B, repeated_B = (
        torch.cat([getattr(r, name) for r in (first, second)]) for name in ("energy_B", "repeated_B")
    )
    return LoggedRound(tensors, first.round, energy_B, repeated_B)


def _mean_energy(probs_BNV: Tensor, targets_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean ‖ℓ‖² per record, from ‖p̂‖² − 2 p̂_y + 1."""
    right_BN = probs_BNV.gather(-1, targets_BN.unsqueeze(-1)).squeeze(-1)
    energy_BN = (probs_BNV.square().sum(-1) - 2 * right_BN + 1) * mask_BN
    return energy_BN.sum(-1) / mask_BN.sum(-1).clamp_min(1)
