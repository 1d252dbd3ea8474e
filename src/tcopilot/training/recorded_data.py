"""Records of a frozen Pilot as they are served to a fit: a row's target and, if asked for, its wrong options.

Shapes: B records, R rows, N target length, Q = D · P states read, T target tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from tcopilot.data.prepare import wrong_options
from tcopilot.data.samplers import RoundSampler
from tcopilot.mistake_log.recording import Recording, missing_rows, row_key
from tcopilot.processes import barrier
from tcopilot.training.compared_tokens import KeptTokens

Rows = Sequence[Mapping[str, Any]]
"""Prepared rows."""


class RecordBatch(NamedTuple):
    """Records padded to one length; see `Recording.record_of`.

    Attributes:
        states_BNQ: the Pilot's states that a Copilot reads.
        mask_BN: which of them are at target tokens.
        kept: what is kept of p̂ at the target tokens.
        row_B: the row that each record belongs to, from 0; a row's options have a record each.
        right_B: whether it is the record of the row's target, and not of a wrong option.
    """

    states_BNQ: Tensor
    mask_BN: Tensor
    kept: KeptTokens
    row_B: Tensor
    right_B: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[Mapping[str, Tensor]]]) -> Self:
        """Collate the records of some rows, that of the target first in each row."""
        records = list(chain(*rows))
        row_B = torch.tensor([number for number, row in enumerate(rows) for _ in row])
        right_B = torch.tensor([not place for row in rows for place in range(len(row))])
        states_BNQ = pad_sequence([record["states"].float() for record in records], batch_first=True)
        lengths_B = torch.tensor([len(record["targets"]) for record in records])
        mask_BN = torch.arange(states_BNQ.shape[1]) < lengths_B[:, None]
        names = ("head_input", "targets", "normaliser", "likeliest")
        kept = KeptTokens(*(torch.cat([record[name] for record in records]) for name in names))
        return cls(states_BNQ, mask_BN, kept, row_B, right_B)

    @property
    def padded_tokens(self) -> int:
        """Count the target tokens, padding included."""
        return self.mask_BN.numel()

    @property
    def asked_R(self) -> Tensor:
        """Whether each row has wrong options."""
        return self.row_B.bincount() > 1

    @property
    def record_T(self) -> Tensor:
        """The record of each target token."""
        return self.mask_BN.nonzero()[:, 0]


class RecordedRows(Dataset):
    """The records of some prepared rows, in their order: of each row its target and, if asked for, its wrong options.

    Attributes:
        texts: the target and the wrong options of each row, as rows of their own.
    """

    def __init__(self, recording: Recording, rows: Rows, depths: Sequence[float], options: bool = False) -> None:
        self.recording, self.depths = recording, list(depths)
        self.texts = [[row, *(wrong_options(row) if options else ())] for row in rows]
        self._keys = [list(map(row_key, texts)) for texts in self.texts]

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> list[dict[str, Tensor]]:
        return [self.recording.record_of(key, self.depths) for key in self._keys[index]]

    @property
    def keys(self) -> set[int]:
        """The keys of the targets' records."""
        return {keys[0] for keys in self._keys}

    @property
    def tokens(self) -> int:
        """Count the target tokens of all records."""
        return sum(len(text["target_ids"]) for texts in self.texts for text in texts)


class RecordedData(LightningDataModule):
    """Serves records in batches: one Lightning epoch is all passes of a fit, with a validation after each pass.

    Args:
        recording: where records are read from, and written to first if it lacks some of the rows.
        train: prepared rows to fit.
        validation: rows to judge a Copilot by; there may be none.
        recorded: all rows that are to be in the recording.
        depths: depths of the states that the Copilot reads.
        batch_size: rows of an update, over all processes.
        passes: number of passes over the rows to fit.
        seed: seed of the rows' order.
        record: writes the records of some rows, computed on a device.
        options: whether the wrong options of rows are served too.
    """

    def __init__(
        self, recording: Recording, train: Rows, validation: Rows, recorded: Rows, depths: Sequence[float],
        batch_size: int, passes: int, seed: int,
        record: Callable[[Rows, torch.device], None], options: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.recording, self.seed, self._record = recording, seed, record
        self.train, self.validation = (RecordedRows(recording, rows, depths, options) for rows in (train, validation))
        self.missing, self.distinct = list(missing_rows(recording, recorded)), len(set(map(row_key, recorded)))
        self.batch_size = batch_size
        self.updates_per_pass = math.ceil(len(train) / batch_size)
        self.updates = passes * self.updates_per_pass

    def setup(self, stage: str | None = None) -> None:
        """Record what is missing: every process its share."""
        if self.missing:
            place = self.trainer.global_rank, self.trainer.world_size
            # By benchmark, whose shots a batch then reads once, and by length.
            ordered = sorted(self.missing, key=lambda row: (row["benchmark"], -len(row["source_ids"])))
            self._record(ordered[place[0] :: place[1]], self.trainer.strategy.root_device)
            barrier()
            self.recording.find()
            self.missing = []

    def train_dataloader(self) -> DataLoader:
        """The batches of this process, which are not grouped by length: targets of one length are too much alike."""
        place = self.trainer.global_rank, self.trainer.world_size
        order = RoundSampler(len(self.train), self.batch_size, self.updates, self.seed, None, *place)
        return DataLoader(self.train, batch_sampler=order, collate_fn=RecordBatch.of)

    def val_dataloader(self) -> DataLoader:
        """This process's share of the validation records."""
        share = range(self.trainer.global_rank, len(self.validation), self.trainer.world_size)
        return DataLoader(self.validation, self.batch_size, sampler=share, collate_fn=RecordBatch.of)
