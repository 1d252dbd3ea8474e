"""The Mistake Log (Section 2.2): what the Pilot read, how it represented it and where it went wrong, round by round.

`MistakeLog.append` takes the `PilotStates` of a batch and holds them on the CPU as a `LoggedRound`; all records of a
round come and leave together. `MistakeLog.sample` draws single records, cut to their own length, and pads them to one
shape on the training device: a `MistakeRecord`, from which the Copilot learns.

For X̃, a record of an encoder-decoder Pilot keeps the encoder's output. A record of a decoder-only Pilot keeps the
prompt's ids if the input embedding is frozen (LoRA, a frozen Pilot), since X̃ follows from them exactly, else the
embedded prompt. How p̂ is kept is up to the storage, see `storage.py`.

Shapes: B records, M source length, N target length, P Pilot width, V vocabulary.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tcopilot.functional import token_errors
from tcopilot.mistake_log.async_copy import AsyncHostCopies, owned_copy, to_device
from tcopilot.mistake_log.policies import Fifo, SamplingPolicy
from tcopilot.mistake_log.recording import RecordingError
from tcopilot.mistake_log.rounds import LoggedRecords, LoggedRound, SeenRows, join
from tcopilot.mistake_log.spill import Spill
from tcopilot.mistake_log.storage import DenseStorage, Storage, is_frozen
from tcopilot.models.family_check import embeds_tokens_alone
from tcopilot.models.states import PilotStates, StackedStates, StatePooler
from tcopilot.settings import DTYPE, FLAG, SEED, dtype_name, one_of, require, whole

ROWS_AT_ONCE = 64  # rows whose p̂ is formed together, to bound the temporary memory of an append


class MistakeRecord(NamedTuple):
    """Records drawn from the log, padded to one shape, on the training device.

    `tokens_R` indexes the target tokens in the flattened [B, N]; it is made on the host, where the masks are known.
    `importance_B` multiplies the records' losses, see `SamplingPolicy.importance`.
    """

    source_BMP: Tensor | None
    source_mask_BM: Tensor | None
    states_BNP: Tensor
    probs_BNV: Tensor
    targets_BN: Tensor
    target_mask_BN: Tensor
    tokens_R: Tensor
    importance_B: Tensor

    @property
    def errors_BNV(self) -> Tensor:
        """ℓ = onehot(y) − p̂ (Eq. 4)."""
        return token_errors(self.probs_BNV, self.targets_BN)


class KeptRecord(NamedTuple):
    """The same for a Copilot that reads the Pilot's states alone, with what the storage keeps of p̂ in place of p̂.

    `kept` has the storage's tensors by their names, each with leading dimensions [B, N].
    """

    states_BNP: Tensor
    kept: dict[str, Tensor]
    targets_BN: Tensor
    target_mask_BN: Tensor
    tokens_R: Tensor
    importance_B: Tensor


class MistakeLog:
    """A bounded log of the Pilot's mistakes; `configs/mistake_log/base.yaml` says what each argument does.

    `max_bytes` limits the tensors held after an append, in memory or in files. The newest round is added before others
    leave, so one round more is held for a moment, and one round always stays. With `spill`, all rounds but the newest
    go to files, and draws are the same. `dropout=False` records a further pass.

    Attributes:
        pilot: the Pilot of the last append, whose frozen parts rebuild X̃ and p̂. Set it to draw from a restored log
            before the first append.
        seen_rounds: rounds appended so far.
        first_visits_only: whether only errors made before the Pilot was trained on a row are recorded.
    """

    SETTINGS: ClassVar = {
        "capacity_rounds": whole(mend="the log must hold at least one round; give a whole number"),
        "max_bytes": whole(most=math.inf, mend="give a positive number of bytes, or null for no limit").or_null(),
        "dtype": DTYPE,
        "seed": SEED,
        "rows": one_of(("all", "first_visit")),
        "dropout": FLAG,
    }

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
        dropout: bool = True,
    ) -> None:
        given = {"capacity_rounds": capacity_rounds, "max_bytes": max_bytes, "rows": rows, "dropout": dropout}
        require(self.SETTINGS, given, "mistake_log.log")
        self.capacity_rounds, self.max_bytes = capacity_rounds, max_bytes
        self.policy, self.storage = policy or Fifo(), storage or DenseStorage()
        self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self.spill = None if spill is None else Spill(spill)
        self.dropout = dropout
        self.pilot: PreTrainedModel | None = None
        self.seen_rounds = 0
        self._filled_rounds = 0  # of these, those with records
        self._held = LoggedRecords(self.policy.weights)
        self._copies = AsyncHostCopies()
        self._arriving: list[dict[str, Tensor]] = []  # parts of the newest round, whose copies may be on their way
        self._begun = False  # whether records of the newest round were appended
        self.first_visits_only = rows == "first_visit"
        self._seen_rows = SeenRows(of_all_processes=self.first_visits_only)
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.held)

    @property
    def held(self) -> LoggedRecords:
        """The records held, after waiting for the copies of the newest round."""
        self._admit()
        return self._held

    @property
    def rounds(self) -> list[LoggedRound]:
        """The rounds held, oldest first."""
        return self.held.rounds

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held, in memory or in files."""
        return self.held.nbytes

    def describe(self, pilot: PreTrainedModel, pooler: StatePooler | StackedStates | None = None) -> str:
        """Say what a record of this Pilot keeps; raise ValueError if the storage cannot keep this Pilot's p̂."""
        name, pooler = dtype_name(self.dtype), pooler or StatePooler()
        source = "prompt ids" if _kept_of_source(pilot) == "source_ids" else f"X̃ ({name})"
        return f"{f'{source}, ' if pooler.keeps_source else ''}{pooler.title} ({name}), {self.storage.describe(pilot)}"

    @torch.no_grad()
    def append(self, states: PilotStates, extend: bool = False) -> None:
        """Log one round, detached, before the Pilot's update (Algorithm 1).

        From a GPU this only starts the copies; whoever reads the log next waits for them.

        Args:
            states: the Pilot's trace; nothing in it is kept alive or changed.
            extend: the records belong to the round appended last, of which this is a further micro-batch.
        """
        if not extend:
            self._admit()
            self.seen_rounds += 1
            self._begun = False
        self.pilot = states.pilot
        if self.first_visits_only:
            new = self._seen_rows.new(states.ids_B.tolist(), self._newest)
            if not any(new):
                return  # the round counts all the same
            states = states if all(new) else states.rows(torch.tensor(new, device=states.ids_B.device))
        if self._begun and not self._arriving and self._held.rounds[-1].round != self._newest:
            return  # the policy did not admit this round
        self._begun = True
        for first in range(0, len(states.targets_BN), ROWS_AT_ONCE):
            self._arriving.append(self._on_host(states.rows(slice(first, first + ROWS_AT_ONCE))))
        if not self._copies.pending:
            self._admit()

    @property
    def _newest(self) -> int:
        return self.seen_rounds - 1

    def _on_host(self, states: PilotStates) -> dict[str, Tensor]:
        """Start to copy what a record keeps."""
        copy, held = self._copies.copy, self._held.rounds
        source: dict[str, Tensor] = {}
        if states.source_BMP is not None:
            source["source_mask"] = copy(states.source_mask_BM)
            if states.source_ids_BM is not None and _kept_of_source(states.pilot) == "source_ids":
                source["source_ids"] = copy(states.source_ids_BM)
            else:
                source["source"] = copy(states.source_BMP, self.dtype)
        if held and not source.keys() <= held[-1].tensors.keys():
            raise ValueError(
                "the Mistake Log holds rounds of a Pilot whose input embedding was "
                f"{'trained' if 'source_ids' in source else 'frozen'} and now is not: start a new log"
            )
        probs_BNV = torch.softmax(states.logits_BNV.float(), dim=-1)
        fresh = probs_BNV if probs_BNV.device.type == "cpu" else None  # made here, so that it needs no copy
        packed = self.storage.pack(states, probs_BNV)
        return {
            **source,
            "states": copy(states.states_BNP, self.dtype),
            "targets": copy(states.targets_BN),
            "target_mask": copy(states.target_mask_BN),
            "benchmark": copy(states.benchmark_B),
            "energy": copy(_mean_energy(probs_BNV, states.targets_BN, states.target_mask_BN)),
            "ids": copy(states.ids_B),
            **{name: tensor if tensor is fresh else copy(tensor) for name, tensor in packed.items()},
        }

    def _admit(self) -> None:
        """Take what is arriving, if anything, into the log; other rounds may leave."""
        if not self._arriving:
            return
        self._copies.wait()
        tensors, self._arriving = join(self._arriving), []
        sound = tensors["energy"].isfinite().all()  # else the Pilot has diverged, which training reports
        if self.dtype == torch.float16 and sound and not tensors["states"].isfinite().all():
            raise RecordingError(
                "mistake_log.log.dtype=float16: some of the Pilot's states are not finite in this type; start a new "
                "run with mistake_log.log.dtype=bfloat16 or float32"
            )
        ids = tensors.pop("ids").tolist()
        new = [True] * len(ids) if self.first_visits_only else self._seen_rows.new(ids, self._newest)
        tensors["repeated"] = ~torch.tensor(new)
        held = self._held
        if held.rounds and held.rounds[-1].round == self._newest:
            tensors = join([held.pop(-1).tensors, tensors])
        else:
            self._filled_rounds += 1
            if self.spill is not None and held.rounds and not held.rounds[-1].spilled:
                last = held.rounds[-1]
                last.tensors, last.spilled = self.spill.move(last.tensors), True
        held.append(LoggedRound(tensors, self._newest))
        limit = float("inf") if self.max_bytes is None else self.max_bytes
        while len(held.rounds) > self.capacity_rounds or (len(held.rounds) > 1 and held.nbytes > limit):
            held.pop(self.policy.evict(len(held.rounds), self._filled_rounds, self._generator))

    @torch.no_grad()
    def sample(self, records: int, device: torch.device | str = "cpu") -> MistakeRecord:
        """Draw records by the policy and pad them to one shape on a device.

        Fewer records than asked for come back only if the policy draws without replacement from a smaller log.

        Raises:
            ValueError: if the log is empty.
        """
        padded, *of_loss = self._drawn(records, device)
        source_BMP = padded.get("source")
        if "source_ids" in padded:
            source_BMP = self._embedded(padded["source_ids"], padded["source_mask"])
        probs_BNV = self.storage.unpack(self._kept(padded), padded["targets"], self.pilot)
        read = source_BMP, padded.get("source_mask"), padded["states"], probs_BNV
        return MistakeRecord(*read, padded["targets"], padded["target_mask"], *of_loss)

    @torch.no_grad()
    def sample_kept(self, records: int, device: torch.device | str = "cpu") -> KeptRecord:
        """As `sample`, but p̂ stays as the storage keeps it."""
        padded, *of_loss = self._drawn(records, device)
        read = padded["states"], self._kept(padded), padded["targets"], padded["target_mask"]
        return KeptRecord(*read, *of_loss)

    def _drawn(self, records: int, device: torch.device | str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Drawn records as padded tensors, `tokens_R` and `importance_B`."""
        held = self.held
        if not len(held):
            raise ValueError("the Mistake Log is empty: append a round before drawing from it")
        indices = self.policy.draw(held, records, self._generator)
        if outside := [index for index in indices.tolist() if not 0 <= index < len(held)]:
            raise ValueError(
                f"{type(self.policy).__name__}.draw returned {outside[0]}, which is no record of the {len(held)} "
                f"held; return 0 to {len(held) - 1}"
            )
        drawn = [self._record(*held.find(index)) for index in indices.tolist()]
        on_host = {name: pad_sequence([one[name] for one in drawn], batch_first=True) for name in drawn[0]}
        tokens_R = on_host["target_mask"].flatten().nonzero().squeeze(-1)
        padded = {name: to_device(tensor, device) for name, tensor in on_host.items()}
        return padded, to_device(tokens_R, device), to_device(self.policy.importance(held, indices), device)

    def _kept(self, padded: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: padded[name] for name in self.storage.names}

    def _record(self, logged: LoggedRound, row: int) -> dict[str, Tensor]:
        return logged.record(row)  # the memory estimate overrides this

    def _embedded(self, source_ids_BM: Tensor, source_mask_BM: Tensor) -> Tensor:
        """X̃ from the prompt's ids, through the Pilot's frozen embedding."""
        if self.pilot is None:
            raise ValueError("a log that keeps prompt ids needs the Pilot to draw: append a round, or set `pilot`")
        embed = self.pilot.get_input_embeddings()
        source_BMP = embed(source_ids_BM.to(next(embed.parameters()).device)).to(source_ids_BM.device)
        return source_BMP.masked_fill(~source_mask_BM.unsqueeze(-1), 0)

    def statistics(self) -> dict[str, float]:
        """Describe the log in figures, for dashboards and alarms.

        `age_rounds` is the mean number of rounds since a record was logged, `error_energy` the mean ‖ℓ‖² per target
        token, `repeated_share` the share of records whose row was logged before. Storages may add their own.
        """
        records, rounds = len(self), self.rounds
        return {
            "records": float(records),
            "rounds": float(len(rounds)),
            "bytes": float(self.nbytes),
            "age_rounds": self._newest - sum(len(logged) * logged.round for logged in rounds) / records,
            "error_energy": sum(logged.energy for logged in rounds) / sum(logged.tokens for logged in rounds),
            "repeated_share": sum(logged.repeated for logged in rounds) / records,
            **self.storage.statistics(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next append and the next draw depend on: tensors and plain values only.

        The tensors of a spilled log lie in its files, which stay for as long as they are used.
        """
        return {
            "rounds": [{"tensors": logged.tensors, "round": logged.round} for logged in self.rounds],
            "seen_rounds": self.seen_rounds,
            "filled_rounds": self._filled_rounds,
            "seen_ids": torch.tensor(self._seen_rows.ids, dtype=torch.int64),
            "generator": self._generator.get_state(),
            "storage": self.storage.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a log; the draws go on as if nothing had happened."""
        self._held, self._arriving = LoggedRecords(self.policy.weights), []
        for logged in state["rounds"]:
            tensors, spilled = logged["tensors"], self.spill is not None and logged["round"] < state["seen_rounds"] - 1
            # The given tensors may be mapped from a checkpoint's file.
            own = self.spill.move(tensors) if spilled else {name: owned_copy(tensors[name]) for name in tensors}
            self._held.append(LoggedRound(own, logged["round"], spilled))
        self.seen_rounds = state["seen_rounds"]
        self._filled_rounds = state.get("filled_rounds", self.seen_rounds)
        self._seen_rows.ids = state["seen_ids"].tolist()
        self._generator.set_state(state["generator"].cpu())
        self.storage.load_state_dict(state["storage"])


def _kept_of_source(pilot: PreTrainedModel) -> str:
    """What the log keeps of X̃: `source_ids` where a frozen embedding rebuilds it, else `source`."""
    if pilot.config.is_encoder_decoder or not is_frozen(pilot.get_input_embeddings()):
        return "source"
    return "source_ids" if embeds_tokens_alone(pilot.config) else "source"


def _mean_energy(probs_BNV: Tensor, targets_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean ‖ℓ‖² per record, from ‖p̂‖² − 2 p̂_y + 1."""
    right_BN = probs_BNV.gather(-1, targets_BN.unsqueeze(-1)).squeeze(-1)
    energy_BN = (torch.linalg.vector_norm(probs_BNV, dim=-1).square() - 2 * right_BN + 1) * mask_BN
    return energy_BN.sum(-1) / mask_BN.sum(-1).clamp_min(1)
