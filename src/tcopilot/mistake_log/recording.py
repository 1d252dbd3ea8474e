"""A recording: what the Mistake Log keeps of a frozen Pilot's pass over some rows, as a folder of safetensors files.

With a frozen Pilot every visit to a row finds the same error, so one pass is the whole log. A record holds, for each
target token, the Pilot's states at a few depths, the normaliser of its logits, its likeliest tokens and the target. It
holds no X̃, since only Copilots that do not read X̃ are fitted from it (`BaseCopilot.fits_recordings`). The state at
depth 1 is the input of the Pilot's frozen head: p̂ of any token, and with it ℓ, follows exactly without its layers.

Rows are identified by their tokenised prompt and target, so other data, another template, other shots or another
tokenizer make other rows. Files are written by any number of processes and read by any other number.

Shapes: T target tokens of all rows, N target length, D depths, P Pilot width, k likeliest tokens, V vocabulary.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tcopilot.data.batch import Batch, PromptTargetCollator
from tcopilot.mistake_log.storage import LIKELIEST, tokens_to_keep
from tcopilot.models.families import logits_from_head_input
from tcopilot.models.states import PilotStates, StackedStates, trace_pilot
from tcopilot.processes import rank, world_size
from tcopilot.run_directory import share, write_whole
from tcopilot.settings import dtype_name

IN_A_FILE = ("states", "targets", "normaliser", "likeliest", "lengths", "keys", "flops", "seconds")  # its tensors
BYTES_AT_ONCE, SECONDS_AT_ONCE = 64e6, 60  # the most that a kill can lose: records not yet on disk


class RecordingError(ValueError):
    """A folder is no recording, or one of another Pilot; or states cannot be recorded in the type asked for."""


@dataclass(frozen=True)
class RecordedPilot:
    """What all records of a folder have in common.

    Attributes:
        digest: hash of the Pilot's weights, see `tcopilot.models.pilot_files.digest`.
        depths: depths whose states are kept, as shares of the decoder's depth, the last of them 1.
        dtype: type of the states.
    """

    digest: str
    depths: tuple[float, ...]
    vocab_size: int
    width: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the record of one target token."""
        return len(self.depths) * self.width * getattr(torch, self.dtype).itemsize + 4 * LIKELIEST + 8


class Recording:
    """The records of a folder, each a dictionary of tensors: `states` [N, D, P], `targets`, `normaliser`, `likeliest`.

    Attributes:
        folder: holds `recording.json`, which describes the Pilot, and the files with records.
        pilot: see `RecordedPilot`.
        seconds, flops: what recording has cost so far, over all processes.
    """

    HEADER: ClassVar = "recording.json"

    def __init__(self, folder: Path, pilot: RecordedPilot) -> None:
        self.folder, self.pilot = folder, pilot
        self._places: dict[int, tuple[Path, int, int, int]] = {}  # key of a row: its file, its place and tokens there
        self._files: dict[Path, dict[str, Tensor]] = {}
        self.seconds = self.flops = 0.0
        self.find()

    @classmethod
    def open(cls, folder: Path, pilot: RecordedPilot) -> Self:
        """Open a recording to go on with, or begin one.

        Raises:
            RecordingError: if the folder holds a recording of another Pilot, or of states at other depths.
        """
        if not (folder / cls.HEADER).exists():
            write_whole(folder / cls.HEADER, json.dumps({"format": 1, **asdict(pilot)}, indent=2) + "\n")
        there = cls.read_header(folder)
        if there.digest != pilot.digest:
            raise RecordingError(f"{folder} was recorded with another Pilot (weights {there.digest}, these are "
                                 f"{pilot.digest}); give the Pilot that was recorded, or record this one")  # fmt: skip
        if missing := [depth for depth in pilot.depths if depth not in there.depths]:
            raise RecordingError(f"{folder} holds the states of depths {list(there.depths)}, not of {missing}; choose "
                                 f"copilot.depths among these, or record anew")  # fmt: skip
        return cls(folder, there)

    @classmethod
    def read_header(cls, folder: Path) -> RecordedPilot:
        """What a folder was recorded from.

        Raises:
            RecordingError: if it is no recording.
        """
        try:
            header = json.loads((folder / cls.HEADER).read_text(encoding="utf-8"))
            if header.pop("format") != 1:
                raise ValueError("of another version")
            return RecordedPilot(**header | {"depths": tuple(header["depths"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"{folder}/{cls.HEADER} cannot be read ({error})"
            raise RecordingError(f"{what}; give the folder `recording` of a run with pilot.frozen=true") from error

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: int) -> bool:
        return key in self._places

    def record_of(self, key: int, depths: Sequence[float]) -> dict[str, Tensor]:
        """The record of a row, with its states at some depths; the state at depth 1 is there as `head_input` too."""
        file, _, first, last = self._places[key]
        tensors = self._tensors(file)
        read = {name: tensors[name][first:last] for name in ("states", "targets", "normaliser", "likeliest")}
        columns = [self.pilot.depths.index(depth) for depth in depths]
        states_NDP = read.pop("states")
        return {
            "states": states_NDP[:, columns].flatten(1),
            "head_input": states_NDP[:, -1],
            **{name: value if value.is_floating_point() else value.long() for name, value in read.items()},
        }

    def cost_of(self, rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
        """Seconds and FLOPs that recording these rows takes as many processes as there are now.

        A file's seconds are divided among its rows by FLOPs.
        """
        seconds = flops = 0.0
        for key in dict.fromkeys(map(row_key, rows)):  # a row that comes twice was recorded once
            file, place, _, _ = self._places[key]
            tensors = self._tensors(file)
            of_row, of_file = tensors["flops"][place].item(), tensors["flops"].double().sum().item()
            share = of_row / of_file if of_file else 1 / len(tensors["lengths"])
            seconds, flops = seconds + share * tensors["seconds"].item(), flops + of_row
        return seconds / world_size(), flops

    def states_of(self, batch: Batch, rows: Sequence[Mapping[str, Any]], pilot: PreTrainedModel,
                  depths: Sequence[float]) -> PilotStates:  # fmt: skip
        """What the Pilot's pass over a batch of recorded rows left; of the Pilot only the head is used."""
        device = pilot.get_output_embeddings().weight.device
        records = [self.record_of(row_key(row), depths) for row in rows]
        states_BNP, head_input_BNP = (
            pad_sequence([record[name] for record in records], batch_first=True).to(device)
            for name in ("states", "head_input")
        )
        head_input_BNP = head_input_BNP.to(pilot.get_output_embeddings().weight.dtype)
        return PilotStates(
            logits_from_head_input(pilot, head_input_BNP), None, None, states_BNP.float(), batch.target_ids_BN,
            batch.target_mask_BN, batch.ids_B, batch.benchmark_B, head_input_BNP=head_input_BNP, pilot=pilot,
        )  # fmt: skip

    def add(self, rows: Sequence[Mapping[str, Any]], pilot: PreTrainedModel, collate: PromptTargetCollator,
            batch_size: int, done: Callable[[int], None] = lambda rows: None,
            flops: Callable[[], float] = lambda: 0.0) -> None:  # fmt: skip
        """Record rows in the order given; records that are on disk when a run stops are kept.

        Args:
            rows: prepared rows, with `source_ids` and `target_ids`.
            pilot: the frozen Pilot, in eval mode, on its device.
            collate: makes a batch of rows for it.
            batch_size: rows of a forward pass.
            done: called with the number of rows after each pass.
            flops: called after each pass for the FLOPs of a row; the recording stores their sum.
        """
        pooler, device = StackedStates(self.pilot.depths), next(pilot.parameters()).device
        waiting: list[dict[str, Tensor]] = []
        began = time.monotonic()
        try:
            for first in range(0, len(rows), batch_size):
                part = rows[first : first + batch_size]
                with torch.no_grad():
                    states = trace_pilot(pilot, collate(part).to(device), pooler)
                about = {"keys": [row_key(row) for row in part], "flops": [flops()] * len(part)}
                kept = {name: torch.tensor(values) for name, values in about.items()}
                waiting.append(self._records(states) | kept)
                size = sum(tensor.nbytes for tensors in waiting for tensor in tensors.values())
                if size > BYTES_AT_ONCE or time.monotonic() - began > SECONDS_AT_ONCE:
                    began = self._write(waiting, began)
                done(len(part))
        finally:
            if waiting:
                self._write(waiting, began)
        self.find()

    def _records(self, states: Any) -> dict[str, Tensor]:
        """The records of a pass, the rows' target tokens one after another."""
        mask_BN, logits_BNV, dtype = states.target_mask_BN, states.logits_BNV.float(), getattr(torch, self.pilot.dtype)
        states_BNDP = states.states_BNP.unflatten(-1, (len(self.pilot.depths), -1)).to(dtype)
        if not states_BNDP[mask_BN].isfinite().all():
            own = states.states_BNP.dtype
            rounds = states.states_BNP[mask_BN].isfinite().all()
            key, found = ("mistake_log.log.dtype", self.pilot.dtype) if rounds else ("pilot.dtype", dtype_name(own))
            mend = f"start a new run with {key}=bfloat16 or float32"
            raise RecordingError(f"{key}={found}: some of the Pilot's states are not finite in this type; {mend}")
        if torch.promote_types(dtype, states.states_BNP.dtype) != dtype:  # p̂ must follow from the kept states
            head = states.pilot.get_output_embeddings()
            logits_BNV = logits_from_head_input(states.pilot, states_BNDP[:, :, -1].to(head.weight.dtype)).float()
        kept = {
            "states": states_BNDP[mask_BN],
            "targets": states.targets_BN[mask_BN].int(),
            **{name: kept_BN[mask_BN] for name, kept_BN in tokens_to_keep(logits_BNV).items()},
            "lengths": mask_BN.sum(-1),
        }
        return {name: tensor.cpu() for name, tensor in kept.items()}

    def _write(self, waiting: list[dict[str, Tensor]], began: float) -> float:
        """Write the waiting records to a new file, which appears complete or not at all."""
        now = time.monotonic()
        tensors = {name: torch.cat([part[name] for part in waiting]).contiguous() for name in waiting[0]}
        tensors["seconds"] = torch.tensor(now - began, dtype=torch.float64)
        waiting.clear()
        file = self.folder / f"{time.time_ns():020d}-{rank()}.safetensors"
        temporary = file.with_suffix(".part")
        save_file(tensors, temporary)
        share(temporary)
        os.replace(temporary, file)
        return now

    def find(self) -> None:
        """Find the records in all files, also those that other processes have written meanwhile."""
        self._places.clear()
        self.seconds = self.flops = 0.0
        for file in sorted(self.folder.glob("*.safetensors")):
            tensors = self._tensors(file)
            ends = tensors["lengths"].cumsum(0).tolist()
            keys, starts = tensors["keys"].tolist(), [0, *ends[:-1]]
            places = zip(range(len(keys)), starts, ends, strict=True)
            self._places |= {key: (file, *place) for key, place in zip(keys, places, strict=True)}
            self.seconds += tensors["seconds"].item()
            self.flops += tensors["flops"].double().sum().item()

    def _tensors(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a file, which the operating system reads from disk when they are used."""
        if file not in self._files:
            try:
                self._files[file] = load_file(file)
            except SafetensorError as error:
                mend = "remove it, and its rows are recorded again when the run that recorded them goes on (resume=)"
                raise RecordingError(f"{file} is damaged ({error}); {mend}") from error
            if lacking := [name for name in IN_A_FILE if name not in self._files[file]]:
                raise RecordingError(f"{file} holds no records (it has no {', '.join(lacking)}); move it elsewhere")
        return self._files[file]


def row_key(row: Mapping[str, Any]) -> int:
    """A row's name in every recording: 63 bits of a hash of its tokens."""
    tokens = np.asarray([len(row["source_ids"]), *row["source_ids"], *row["target_ids"]], dtype="<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little") >> 1


def missing_rows(recording: Recording, rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows that a recording lacks, each once."""
    seen: set[int] = set()
    for row in rows:
        key = row_key(row)
        if key not in recording and key not in seen:
            seen.add(key)
            yield row
