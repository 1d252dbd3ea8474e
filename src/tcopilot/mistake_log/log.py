"""The Mistake Log (Section 2.2): what the Pilot saw, how it saw it and where it went wrong, round after round.

A round's records are stored together on the CPU and leave together, so every policy is bounded in rounds, and in bytes
where a limit is given. Sampling draws single records. No append, draw or statistic takes longer in a longer log, but
for the logarithm of its length: running sums say where a record is. From a GPU a round is copied while training goes
on; whoever reads the log next waits for the copies.

What a record keeps of X̃: an encoder's output as it is; of a decoder-only Pilot the prompt's ids where its input
embedding is frozen (LoRA, a frozen Pilot), from which the embedding gives X̃ exactly, else the embedded prompt. How p̂
is kept is the storage's business, see `log_storage.py`.

Shapes: B records, M source length, N target length, P Pilot width, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tcopilot.functional import token_errors
from tcopilot.mistake_log.host_copy import HostCopies, owned_copy, to_device
from tcopilot.mistake_log.policies import Fifo, SamplingPolicy
from tcopilot.mistake_log.spill import Spill
from tcopilot.mistake_log.storage import DenseStorage, Storage, is_frozen
from tcopilot.mistake_log.tally import Tally
from tcopilot.mistake_log.visits import Visits
from tcopilot.models.states import PilotStates

_OF_SOURCE = ("source", "source_ids", "source_mask")
ROWS = ("all", "first_visit")
ENERGY_UNIT = 2**40  # ‖ℓ‖² of 1 as a whole number: sums of whole numbers do not depend on what came and went


class MistakeRecord(NamedTuple):
    """Records drawn from the log, padded to one shape, on the training device.

    `tokens_R` counts the target tokens through the flattened [B, N]: made on the host, where the masks are known.
    """

    source_BMP: Tensor
    source_mask_BM: Tensor
    states_BNP: Tensor
    probs_BNV: Tensor
    targets_BN: Tensor
    target_mask_BN: Tensor
    tokens_R: Tensor

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

    def figures(self) -> dict[str, int]:
        """Whole numbers whose sums over the rounds held are the log's statistics."""
        finite_B = self.energy_B.isfinite()
        energy_B = self.energy_B.double().masked_fill(~finite_B, 0.0) * ENERGY_UNIT
        return {
            "bytes": self.nbytes,
            "record_rounds": len(self) * self.round,
            "energy": int(energy_B.long().sum()),
            "not_finite": int((~finite_B).sum()),
            "repeated": int(self.repeated_B.sum()),
        }

    def __len__(self) -> int:
        return len(self.energy_B)


class _Arriving(NamedTuple):
    """A round whose copies to the host may be on their way."""

    tensors: dict[str, Tensor]
    packed: list[dict[str, Tensor]]  # p̂ as the storage keeps it, piece by piece
    energies: list[Tensor]
    ids_B: Tensor
    extend: bool

    def logged(self, round: int, seen_ids: set[int]) -> LoggedRound:
        """The round, once the copies are made; its rows' ids join those seen."""
        packed = {name: _whole([piece[name] for piece in self.packed]) for name in self.packed[0]}
        ids = self.ids_B.tolist()
        repeated_B = torch.tensor([i in seen_ids for i in ids])
        seen_ids.update(ids)
        return LoggedRound(self.tensors | packed, round, _whole(self.energies), repeated_B)


class LoggedRounds(Sequence[LoggedRound]):
    """Rounds, oldest first, of which any may leave; finding a round or a record takes O(log n) steps.

    Rounds lie in slots, in which those that left leave gaps; when half are gaps the slots are made anew.

    Args:
        weigh: a round's weights by group, see `SamplingPolicy.weights`; read when the round comes.
    """

    def __init__(self, weigh: Callable[[LoggedRound], dict[Any, Tensor]]) -> None:
        self._weigh = weigh
        self._slots: list[LoggedRound | None] = []
        self._held, self._records = Tally(), Tally()
        self._weights: dict[Any, Tally] = {}
        self.sums: Counter[str] = Counter()

    def append(self, logged: LoggedRound) -> None:
        """Add the newest round."""
        weights = self._weigh(logged)
        for group in weights.keys() - self._weights.keys():
            self._weights[group] = Tally([0] * len(self._slots))
        for group, tally in self._weights.items():
            tally.append(int(weights[group].sum()) if group in weights else 0)
        self._slots.append(logged)
        self._held.append(1)
        self._records.append(len(logged))
        self.sums.update(logged.figures())

    def pop(self, index: int = -1) -> LoggedRound:
        """Take a round out."""
        slot = self._slot(index)
        logged, self._slots[slot] = self._slots[slot], None
        for tally in (self._held, self._records, *self._weights.values()):
            tally[slot] = 0
        self.sums.subtract(logged.figures())
        if len(self._slots) > 2 * len(self) + 64:
            self._close_gaps()
        return logged

    def _close_gaps(self) -> None:
        full = [slot for slot, logged in enumerate(self._slots) if logged is not None]
        self._slots = [self._slots[slot] for slot in full]
        self._held, self._records = (tally.only(full) for tally in (self._held, self._records))
        self._weights = {group: tally.only(full) for group, tally in self._weights.items() if tally.total}

    def _slot(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"round {index} of {len(self)}")
        return self._held.find(index % len(self))[0]

    @property
    def records(self) -> int:
        """Number of records held."""
        return self._records.total

    @property
    def groups(self) -> list[Any]:
        """Groups of weights that are not all 0."""
        return [group for group, tally in self._weights.items() if tally.total]

    def record(self, index: int) -> tuple[LoggedRound, int]:
        """The round of a record, counted over all of them oldest first, and the row in it."""
        slot, row = self._records.find(index)
        return self._slots[slot], row

    def pick(self, group: Any, number: int) -> int:
        """Return the record to which a number points, taken modulo the group's total weight."""
        tally = self._weights[group]
        slot, rest = tally.find(number % tally.total)
        ends_B = self._weigh(self._slots[slot])[group].cumsum(0)
        return self._records.before(slot) + int(torch.searchsorted(ends_B, rest, right=True))

    def __getitem__(self, index: int) -> LoggedRound:
        return self._slots[self._slot(index)]

    def __iter__(self) -> Iterator[LoggedRound]:
        return (logged for logged in self._slots if logged is not None)

    def __len__(self) -> int:
        return self._held.total


class MistakeLog:
    """A bounded log of the Pilot's mistakes.

    Args:
        capacity_rounds: most rounds held (the paper: 128).
        max_bytes: most bytes of tensors held after an append, in memory or in files; None for no limit. The newest
            round is added before others leave, so there is one round more for a moment. One round always stays.
        policy: which round leaves when the log is full, and how records are drawn.
        storage: how p̂ is stored.
        dtype: type of X̃ and h̄ in the log.
        seed: of the draws.
        spill: folder for memory-mapped files; all rounds but the newest go there. None keeps them in memory. The
            draws are the same.
        rows: `all`, or `first_visit` for errors only from before the Pilot was ever trained on their row.

    Attributes:
        pilot: what rebuilds X̃ and p̂ from frozen parts: the Pilot of the last append. Set it to draw from a restored
            log before the first append.

    Raises:
        ValueError: if the capacity is below one round, the byte limit is not positive or `rows` is unknown.
    """

    def __init__(
        self,
        capacity_rounds: int = 128,
        max_bytes: int | None = None,
        policy: SamplingPolicy | None = None,
        storage: Storage | None = None,
        dtype: torch.dtype | str = torch.float32,
        seed: int = 0,
        spill: str | None = None,
        rows: str = "all",
    ) -> None:
        if rows not in ROWS:
            raise ValueError(f"mistake_log.log.rows={rows!r} is not one of {', '.join(ROWS)}")
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
        self._rounds = LoggedRounds(self.policy.weights)
        self._copies, self._arriving = HostCopies(), None
        self._in_memory: LoggedRound | None = None  # the newest round, which is not spilled yet
        self.spill = None if spill is None else Spill(spill)
        self.pilot: PreTrainedModel | None = None
        self.seen_rounds = 0
        self._seen_ids: set[int] = set()
        self._visits = Visits() if rows == "first_visit" else None
        self._has_records = False  # whether the round at hand has any, where some rows are left out
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Number of records held."""
        return self.rounds.records

    @property
    def rounds(self) -> LoggedRounds:
        """The rounds held, after waiting for the copies of the newest."""
        self._admit()
        return self._rounds

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held, in memory or in files."""
        return self.rounds.sums["bytes"]

    def describe(self, pilot: PreTrainedModel) -> str:
        """Say what a record of this Pilot keeps, for people.

        Raises:
            ValueError: if the storage cannot keep this Pilot's p̂, see `FrozenHeadStorage`.
        """
        kind, name = _source_kind(pilot), str(self.dtype).removeprefix("torch.")
        source = "prompt ids" if kind == "source_ids" else f"X̃ ({name})"
        return f"{source}, h̄ ({name}), {self.storage.describe(pilot)}"

    @torch.no_grad()
    def append(self, states: PilotStates, extend: bool = False, rows_per_piece: int = 64) -> None:
        """Log one round, detached, before the Pilot's update (Algorithm 1).

        From a GPU this starts the copies and returns.

        Args:
            states: the Pilot's trace; nothing in it is kept alive or changed.
            extend: the records belong to the round appended last, of which this is a further micro-batch.
            rows_per_piece: rows whose p̂ is formed at once, which bounds the temporary memory.
        """
        if self._visits is not None:
            states, extend = self._first_visits(states, extend)
            if states is None:
                return
        if extend and self.rounds[-1].round != self.seen_rounds - 1:
            return  # the policy did not admit this round
        self._admit()
        self._arriving = self._sent(states, extend, rows_per_piece)
        self.seen_rounds += int(not extend)
        if not self._copies.on_the_way:
            self._admit()

    def _first_visits(self, states: PilotStates, extend: bool) -> tuple[PilotStates | None, bool]:
        """The rows on their first visit, None if there are none, and whether the round has records already."""
        self._admit()
        first = self._visits.first(states.ids_B.tolist(), extend)
        if not extend:
            self._has_records = False
            self.seen_rounds += 1  # a round without records counts all the same
        if not any(first):
            return None, extend
        extend, self._has_records = self._has_records, True
        self.seen_rounds -= int(not extend)  # `append` counts it
        return states if all(first) else states.rows(torch.tensor(first, device=states.ids_B.device)), extend

    def _admit(self) -> None:
        """Take the round that is arriving, if any, into the log; others may leave."""
        if self._arriving is None:
            return
        self._copies.wait()
        arriving, self._arriving = self._arriving, None
        logged = arriving.logged(self.seen_rounds - 1, self._seen_ids)
        if arriving.extend:
            logged = _joined(self._rounds.pop(), logged)
        elif self.spill is not None and self._rounds and self._rounds[-1] is self._in_memory:
            self._in_memory.tensors = self.spill.move(self._in_memory.tensors)
        self._rounds.append(logged)
        while len(self._rounds) > self.capacity_rounds or self._over_bytes():
            self._rounds.pop(self.policy.evict(len(self._rounds), self.seen_rounds, self._generator))
        self._in_memory = logged if self._rounds[-1] is logged else None

    def _sent(self, states: PilotStates, extend: bool, rows_per_piece: int) -> _Arriving:
        self.pilot, copy = states.pilot, self._copies.copy
        packed, energies = [], []
        for first in range(0, len(states.targets_BN), rows_per_piece):
            piece = states.rows(slice(first, first + rows_per_piece))
            probs_BNV = torch.softmax(piece.logits_BNV.float(), dim=-1)
            energies.append(copy(_mean_energy(probs_BNV, piece.targets_BN, piece.target_mask_BN)))
            own = probs_BNV if probs_BNV.device.type == "cpu" else None  # formed here: nobody else's memory
            packed.append(
                {name: t if t is own else copy(t) for name, t in self.storage.pack(piece, probs_BNV).items()}
            )
        tensors = {
            **self._source(states),
            "source_mask": copy(states.source_mask_BM),
            "states": copy(states.states_BNP, self.dtype),
            "targets": copy(states.targets_BN),
            "target_mask": copy(states.target_mask_BN),
            "benchmark": copy(states.benchmark_B),
        }
        return _Arriving(tensors, packed, energies, copy(states.ids_B), extend)

    def _source(self, states: PilotStates) -> dict[str, Tensor]:
        kind = "source" if states.source_ids_BM is None else _source_kind(states.pilot)
        if self.rounds and kind not in self.rounds[-1].tensors:
            raise ValueError(
                "the Mistake Log holds rounds of a Pilot whose input embedding was "
                f"{'trained' if kind == 'source_ids' else 'frozen'} and now is not: start a new log"
            )
        if kind == "source_ids":
            return {kind: self._copies.copy(states.source_ids_BM)}
        return {kind: self._copies.copy(states.source_BMP, self.dtype)}

    @torch.no_grad()
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
        on_host = {name: pad_sequence([row[name] for row in drawn], batch_first=True) for name in drawn[0]}
        tokens_R = on_host["target_mask"].flatten().nonzero().squeeze(-1)
        padded = {name: to_device(tensor, device) for name, tensor in on_host.items()}
        return MistakeRecord(
            padded["source"] if "source" in padded else self._embedded(padded["source_ids"], padded["source_mask"]),
            padded["source_mask"],
            padded["states"],
            self.storage.unpack({name: padded[name] for name in self.storage.names}, padded["targets"], self.pilot),
            padded["targets"],
            padded["target_mask"],
            to_device(tokens_R, device),
        )

    def _embedded(self, source_ids_BM: Tensor, source_mask_BM: Tensor) -> Tensor:
        """X̃ from the prompt's ids, through the Pilot's frozen embedding."""
        if self.pilot is None:
            raise ValueError("a log that keeps prompt ids needs the Pilot to draw: append a round, or set `pilot`")
        embed = self.pilot.get_input_embeddings()
        source_BMP = embed(source_ids_BM.to(next(embed.parameters()).device)).to(source_ids_BM.device)
        return source_BMP.masked_fill(~source_mask_BM.unsqueeze(-1), 0)

    def concatenated(self, name: str) -> Tensor:
        """One value per record held, in log order: `energy`, `repeated` or `benchmark`. It takes time with the log."""
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
        records, sums = len(self), self.rounds.sums
        return {
            "records": float(records),
            "rounds": float(len(self.rounds)),
            "bytes": float(self.nbytes),
            "age_rounds": self.seen_rounds - 1 - sums["record_rounds"] / records,
            "error_energy": math.nan if sums["not_finite"] else sums["energy"] / ENERGY_UNIT / records,
            "repeated_share": sums["repeated"] / records,
            **self.storage.statistics(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next append and the next draw depend on: tensors and plain values only.

        Of a spilled log too, so that a checkpoint needs no other file; its tensors then lie in the files, which stay
        for as long as they are used.
        """
        return {
            "rounds": [
                {"tensors": r.tensors, "round": r.round, "energy_B": r.energy_B, "repeated_B": r.repeated_B}
                for r in self.rounds
            ],
            "seen_rounds": self.seen_rounds,
            "seen_ids": torch.tensor(sorted(self._seen_ids), dtype=torch.int64),
            "visited_ids": torch.tensor([] if self._visits is None else self._visits.ids, dtype=torch.int64),
            "generator": self._generator.get_state(),
            "storage": self.storage.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a log; the draws go on as if nothing had happened."""
        self._rounds, self._arriving, self._in_memory = LoggedRounds(self.policy.weights), None, None
        for logged in state["rounds"]:
            spilled = self.spill is not None and logged["round"] < state["seen_rounds"] - 1
            own = self.spill.move if spilled else _owned  # what is given may lie in a checkpoint's file
            rest = _owned({name: logged[name] for name in ("energy_B", "repeated_B")})
            self._rounds.append(LoggedRound(own(logged["tensors"]), logged["round"], **rest))
            self._in_memory = None if spilled else self._rounds[-1]
        self.seen_rounds = state["seen_rounds"]
        self._seen_ids = set(state["seen_ids"].tolist())
        if self._visits is not None:
            self._visits.ids = state["visited_ids"].tolist()
        self._generator.set_state(state["generator"].cpu())
        self.storage.load_state_dict(state["storage"])

    def _over_bytes(self) -> bool:
        return self.max_bytes is not None and len(self._rounds) > 1 and self._rounds.sums["bytes"] > self.max_bytes

    def _row(self, index: int) -> dict[str, Tensor]:
        logged, row = self.rounds.record(index)
        source_mask, target_mask = logged.tensors["source_mask"][row], logged.tensors["target_mask"][row]
        first = int(source_mask.int().argmax())  # the prompt is one run of real tokens, padded on either side
        prompt = slice(first, first + int(source_mask.sum()))
        target = slice(0, int(target_mask.sum()))
        return {
            name: tensor[row, prompt if name in _OF_SOURCE else target]
            for name, tensor in logged.tensors.items()
            if name != "benchmark"
        }


def _source_kind(pilot: PreTrainedModel) -> str:
    """What the log keeps of X̃: `source_ids` where a frozen embedding rebuilds it, else `source`."""
    rebuilt = not pilot.config.is_encoder_decoder and is_frozen(pilot.get_input_embeddings())
    return "source_ids" if rebuilt else "source"


def _owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: owned_copy(tensor) for name, tensor in tensors.items()}


def _whole(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


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
    energy_BN = (torch.linalg.vector_norm(probs_BNV, dim=-1).square() - 2 * right_BN + 1) * mask_BN
    return energy_BN.sum(-1) / mask_BN.sum(-1).clamp_min(1)
