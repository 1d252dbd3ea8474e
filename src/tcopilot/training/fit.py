"""Fit a Copilot to a recording: the Copilot's half of Algorithm 1, for a Pilot that is frozen and was recorded once.

Shapes: B records, N target length, Q = D · P states read, T target tokens, C Copilot width.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from tcopilot.data.samplers import RoundSampler
from tcopilot.mistake_log.recording import Recording, missing_rows, row_key
from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.processes import barrier, sum_over_processes
from tcopilot.settings import FLAG, Rule, number, whole
from tcopilot.training.compared_tokens import ComparedTokens, KeptTokens
from tcopilot.training.learner import Learner
from tcopilot.training.objectives import CrossEntropy, Objective

Rows = Sequence[Mapping[str, Any]]
"""Prepared rows."""


class RecordBatch(NamedTuple):
    """Records padded to one length; see `Recording.record_of`."""

    states_BNQ: Tensor
    mask_BN: Tensor
    kept: KeptTokens

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Tensor]]) -> Self:
        """Collate records."""
        states_BNQ = pad_sequence([record["states"].float() for record in records], batch_first=True)
        lengths_B = torch.tensor([len(record["targets"]) for record in records])
        mask_BN = torch.arange(states_BNQ.shape[1]) < lengths_B[:, None]
        names = ("head_input", "targets", "normaliser", "likeliest")
        kept = KeptTokens(*(torch.cat([record[name] for record in records]) for name in names))
        return cls(states_BNQ, mask_BN, kept)

    @property
    def padded_tokens(self) -> int:
        """Count the target tokens, padding included."""
        return self.mask_BN.numel()


class RecordedRows(Dataset):
    """The records of some prepared rows, in their order."""

    def __init__(self, recording: Recording, rows: Rows, depths: Sequence[float]) -> None:
        self.recording, self.depths = recording, list(depths)
        self.keys = [row_key(row) for row in rows]
        self.lengths = [len(row["target_ids"]) for row in rows]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.recording.record_of(self.keys[index], self.depths)


class RecordedData(LightningDataModule):
    """Serves records in batches: one Lightning epoch is all passes of a fit, with a validation after each pass.

    Args:
        recording: where records are read from, and written to first if it lacks some of the rows.
        train: prepared rows to fit.
        validation: rows to judge a Copilot by; there may be none.
        recorded: all rows that are to be in the recording.
        depths: depths of the states that the Copilot reads.
        batch_size: records of an update, over all processes.
        passes: number of passes over the rows to fit.
        seed: seed of the rows' order.
        record: writes the records of some rows, computed on a device.
    """

    def __init__(
        self, recording: Recording, train: Rows, validation: Rows, recorded: Rows, depths: Sequence[float],
        batch_size: int, passes: int, seed: int,
        record: Callable[[Rows, torch.device], None],
    ) -> None:  # fmt: skip
        super().__init__()
        self.recording, self.seed, self._record = recording, seed, record
        self.train, self.validation = (RecordedRows(recording, rows, depths) for rows in (train, validation))
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


class CopilotFit(LightningModule):
    """Trains a head-only Copilot on records; the Pilot takes part by its frozen head alone.

    Args:
        copilot: the Copilot to fit.
        pilot: the Pilot, whose head rebuilds p̂; its layers may be absent.
        learner: how the Copilot is updated.
        updates: updates of the whole fit, for the schedule.
        objective: what it learns, by default the likelihood of the fused distribution.
        own_mistakes: whether tokens are weighted by how likely the Pilot's own answers reach them, see `reached`.
    """

    SETTINGS: ClassVar[dict[str, Rule]] = {
        "passes": whole(),
        "patience": whole(),
        "averaging": number().or_null(),
        "own_mistakes": FLAG,
    }

    def __init__(
        self, copilot: HeadCopilot, pilot: PreTrainedModel, learner: Learner, updates: int,
        objective: Objective | None = None, own_mistakes: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.copilot, self.learner, self.rounds, self.own_mistakes = copilot, learner, updates, own_mistakes
        self.objective = CrossEntropy() if objective is None else objective
        self.__dict__["_pilot"] = pilot  # hidden from `nn.Module`: layers without weights cannot be moved
        self.seconds, self._began = 0.0, 0.0

    @property
    def head(self) -> nn.Module:
        """The Pilot's output head."""
        return self._pilot.get_output_embeddings()

    @property
    def round(self) -> int:
        """Updates done."""
        return self.global_step

    def configure_optimizers(self) -> dict[str, Any]:
        """The Copilot's optimiser, with a schedule over all updates."""
        optimizer = self.learner.optimizer([p for p in self.copilot.parameters() if p.requires_grad])
        schedule = self.learner.scheduler(optimizer=optimizer, num_training_steps=self.rounds)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, **trainers: Any) -> None:
        """Clip as the learner says, whatever the trainer's settings."""
        if self.learner.clip is not None:
            nn.utils.clip_grad_norm_(self.copilot.parameters(), self.learner.clip)

    def on_train_start(self) -> None:
        """Move the Pilot's head to the Copilot's device, and start the clock."""
        self.head.to(self.device)
        self._began = time.perf_counter()

    def on_train_end(self) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self._began

    def training_step(self, batch: RecordBatch, batch_idx: int) -> Tensor:
        """The objective over a batch, all processes together."""
        hidden_TC, compared = self._hidden(batch), self._compared(batch)
        counts_T = torch.ones(len(hidden_TC), device=self.device)
        if self.own_mistakes:
            with torch.no_grad():
                counts_T = reached(compared.right(hidden_TC)[0], batch.mask_BN)
        total = compared.objective_sum(self.objective, hidden_TC, counts_T)
        tokens = sum_over_processes(counts_T.sum())
        others = sum_over_processes(total.detach()) - total.detach()
        loss = self.objective.reduce(total + others, tokens)
        self.log("train/copilot_loss", loss.detach(), prog_bar=True, rank_zero_only=True)
        return loss * self.trainer.world_size  # DDP averages over processes

    def on_validation_epoch_start(self) -> None:
        """Start the validation's sums."""
        self._sums = torch.zeros(3, dtype=torch.float64)

    def validation_step(self, batch: RecordBatch, batch_idx: int) -> None:
        """Negative log-likelihood of the Pilot and of the distribution fused at λ = 1."""
        right_2T = self._compared(batch).right(self._hidden(batch))
        right_2T = right_2T.clamp_min(torch.finfo(torch.float32).tiny)
        self._sums += torch.cat([-right_2T.double().log().sum(1).cpu(), torch.tensor([float(right_2T.shape[1])])])

    def on_validation_epoch_end(self) -> None:
        """Report both means, over all processes."""
        pilot, fused, tokens = sum_over_processes(self._sums).tolist()
        figures = {"val/pilot_nll": pilot / tokens, "val/fused_nll": fused / tokens}
        self.log_dict(figures, prog_bar=True)  # alike on all processes, which all stop by them

    def _hidden(self, batch: RecordBatch) -> Tensor:
        """The Copilot's hidden states [T, C]."""
        inputs_BN0 = batch.states_BNQ.new_empty(*batch.mask_BN.shape, 0)
        hidden_BNC, _ = self.copilot(inputs_BN0, None, None, batch.states_BNQ)
        return hidden_BNC[batch.mask_BN]

    def _compared(self, batch: RecordBatch) -> ComparedTokens:
        return ComparedTokens(self.copilot, self._pilot, batch.kept)


def reached(right_T: Tensor, mask_BN: Tensor) -> Tensor:
    """Return the probability that an answer sampled from the Pilot is right before each target token, [T].

    This is Π_{j<i} p̂(y_j), computed from p̂(y_i) of all tokens. A sampled answer first differs from the right one at
    token i with probability Π_{j<i} p̂(y_j) · (1 − p̂(y_i)), and up to there its states are those recorded. Weighting
    tokens in this way equals, on average, training on sampled answers up to their first mistake.
    """
    log_BN = torch.zeros(mask_BN.shape, device=right_T.device).masked_scatter(mask_BN, right_T.clamp_min(1e-12).log())
    return (log_BN.cumsum(1) - log_BN).exp()[mask_BN]


class KeepBest(Callback):
    """Keeps the Copilot of the lowest negative log-likelihood on validation, at first the one given.

    A new one is a no-op. A trained one is to be validated before the first update (`num_sanity_val_steps=-1`).

    What is validated and kept is a mean of the weights over all updates so far: few records make single updates noisy.
    Update t enters the mean with a share of (η + 1) / (t + η), so that early ones are forgotten (polynomial-decay
    averaging of Shamir and Zhang, 2013, arXiv 1212.1824).

    Args:
        patience: passes without a better Copilot after which the fit ends.
        averaging: η; 0 is the plain mean of all updates, None keeps the weights of the last one.
    """

    def __init__(self, patience: int, averaging: float | None = None) -> None:
        self.patience, self.waited, self.passes, self.best_pass = patience, 0, 0, 0
        self.averaging, self.updates = averaging, 0
        self.best_nll = math.inf
        self._weights: dict[str, Tensor] = {}
        self._mean: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: CopilotFit) -> None:
        """Keep the Copilot given, in case no later one is better."""
        self._weights = copy.deepcopy(pl_module.copilot.state_dict())
        self._mean = [weight.detach().float().clone() for weight in pl_module.copilot.parameters()]

    def on_train_batch_end(self, trainer: Trainer, pl_module: CopilotFit, *batch: Any) -> None:
        """Take the weights of this update into the mean."""
        self.updates += 1
        eta = self.averaging
        share = 1.0 if eta is None else (eta + 1) / (self.updates + eta)
        for mean, weight in zip(self._mean, pl_module.copilot.parameters(), strict=True):
            mean.lerp_(weight.detach().float(), share)

    def on_validation_start(self, trainer: Trainer, pl_module: CopilotFit) -> None:
        """Judge the mean."""
        if not trainer.sanity_checking:
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: CopilotFit) -> None:
        """Compare the Copilot of this pass with the best so far."""
        figures = trainer.callback_metrics
        pilot, fused = (float(figures[f"val/{name}_nll"]) for name in ("pilot", "fused"))
        if trainer.sanity_checking:
            self.best_nll = fused
            return
        self.passes += 1
        self.waited += 1
        if fused < min(self.best_nll, pilot):
            self.best_nll, self.best_pass, self.waited = fused, self.passes, 0
            self._weights = copy.deepcopy(pl_module.copilot.state_dict())
        trainer.should_stop |= self.waited >= self.patience
        self._swap(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: CopilotFit) -> None:
        """Put the best one back, or the mean of all updates if there were no validation rows."""
        if self.passes:
            pl_module.copilot.load_state_dict(self._weights)
        else:
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: CopilotFit) -> None:
        """Exchange the weights and their mean."""
        for mean, weight in zip(self._mean, pl_module.copilot.parameters(), strict=True):
            last = weight.detach().float().clone()
            weight.copy_(mean)
            mean.copy_(last)
