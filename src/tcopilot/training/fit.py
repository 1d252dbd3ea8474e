"""Fit a Copilot to a recording: the Copilot's half of Algorithm 1, for a Pilot that is frozen and was recorded once.

Shapes: B records, R rows, N target length, Q = D · P states read, T target tokens, C Copilot width.
"""

import copy
import math
import time
from typing import Any, ClassVar

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.processes import sum_over_processes
from tcopilot.settings import FLAG, Rule, number, whole
from tcopilot.training.compared_tokens import ComparedTokens
from tcopilot.training.learner import Learner
from tcopilot.training.objectives import CrossEntropy, Objective, safe_log
from tcopilot.training.recorded_data import RecordBatch


class CopilotFit(LightningModule):
    """Trains a head-only Copilot on records; the Pilot takes part by its frozen head alone.

    Args:
        copilot: the Copilot to fit.
        pilot: the Pilot, whose head rebuilds p̂; its layers may be absent.
        learner: how the Copilot is updated.
        updates: updates of the whole fit, for the schedule.
        objective: what it learns, by default the likelihood of the fused distribution.
        own_mistakes: whether tokens are weighted by how likely the Pilot's own answers reach them, see `reached`.
        wrong_options: whether it also learns which option is right, see `choice_errors`; for `CrossEntropy` alone.
    """

    SETTINGS: ClassVar[dict[str, Rule]] = {
        "passes": whole(),
        "patience": whole(),
        "averaging": number().or_null(),
        "own_mistakes": FLAG,
        "wrong_options": FLAG,
    }

    def __init__(
        self, copilot: HeadCopilot, pilot: PreTrainedModel, learner: Learner, updates: int,
        objective: Objective | None = None, own_mistakes: bool = False, wrong_options: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.copilot, self.learner, self.rounds = copilot, learner, updates
        self.own_mistakes, self.wrong_options = own_mistakes, wrong_options
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
        """The objective over a batch, all processes together, of the rows' targets.

        With wrong options the mean of −log P(target) over the rows that have some is added. Its gradient is that of
        the tokens' cross-entropies, each times ℓ of its option, so these weights are all that it needs.
        """
        hidden_TC, compared = self._hidden(batch), self._compared(batch)
        counts_T = batch.right_B[batch.record_T].float()
        if self.own_mistakes:
            with torch.no_grad():
                counts_T = counts_T * reached(compared.right(hidden_TC)[0], batch.mask_BN)
        tokens, weights_T, more = sum_over_processes(counts_T.sum()), counts_T, 0.0
        if self.wrong_options:
            with torch.no_grad():
                sums_B = option_sums(compared.fused(hidden_TC), batch)
            errors_B, nll_R = choice_errors(sums_B, batch)
            rows = sum_over_processes(batch.asked_R.sum()).clamp_min(1)
            weights_T = counts_T + errors_B[batch.record_T] * tokens / rows
            # The weights give the gradient; the value that is logged lacks this much.
            more = sum_over_processes(nll_R.sum() + (errors_B * sums_B).sum()) / rows
        total = compared.objective_sum(self.objective, hidden_TC, weights_T)
        others = sum_over_processes(total.detach()) - total.detach()
        loss = self.objective.reduce(total + others, tokens)
        self.log("train/copilot_loss", loss.detach() + more, prog_bar=True, rank_zero_only=True)
        return loss * self.trainer.world_size  # DDP averages over processes

    def on_validation_epoch_start(self) -> None:
        """Start the validation's sums over tokens and over rows."""
        self._sums, self._choices = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
        self.head.to(self.device)  # a trained head is validated before training starts

    def validation_step(self, batch: RecordBatch, batch_idx: int) -> None:
        """Negative log-likelihood of the Pilot and of the distribution fused at λ = 1."""
        compared, hidden_TC = self._compared(batch), self._hidden(batch)
        log_2T = safe_log(compared.right(hidden_TC)).double()
        nll_2T = -log_2T[:, batch.right_B[batch.record_T]].cpu()
        self._sums += torch.cat([nll_2T.sum(1), torch.tensor([float(nll_2T.shape[1])])])
        if self.wrong_options:
            both = (option_sums(log_T, batch) for log_T in (log_2T[0], compared.fused(hidden_TC)))
            nll_2 = torch.stack([choice_errors(sums_B, batch)[1].sum() for sums_B in both])
            self._choices += torch.cat([nll_2, batch.asked_R.sum()[None]]).cpu()

    def on_validation_epoch_end(self) -> None:
        """Report both means, over all processes; with wrong options, those of choices as well."""
        pilot, fused, tokens = sum_over_processes(self._sums).tolist()
        figures = {"val/pilot_nll": pilot / tokens, "val/fused_nll": fused / tokens}
        if self.wrong_options:
            pilot, fused, rows = sum_over_processes(self._choices).tolist()
            figures |= {"val/pilot_choice_nll": pilot / max(rows, 1), "val/fused_choice_nll": fused / max(rows, 1)}
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


def option_sums(log_T: Tensor, batch: RecordBatch) -> Tensor:
    """Σ log p of each record's tokens, [B], float64 in nats."""
    sums_B = torch.zeros(len(batch.row_B), dtype=torch.float64, device=log_T.device)
    return sums_B.index_add(0, batch.record_T, log_T.double())


def choice_errors(sums_B: Tensor, batch: RecordBatch) -> tuple[Tensor, Tensor]:
    """Return ℓ of the choice among a row's options, and −log P(target) of each row.

    A model chooses an option o with P(o) ∝ Π_i p(o_i). Its error is ℓ = onehot(target) − P, as ℓ of a token is. It is
    also what −log P(target) has as the negative of its gradient with respect to the options' Σ log p.

    Args:
        sums_B: Σ log p of each option, see `option_sums`.
        batch: says which options are of one row, and which is its target.

    Returns:
        ℓ of each option, [B], float32, and −log P(target), [R], in nats. Both are 0 for a row without wrong options.
    """
    row_B, shape = batch.row_B, int(batch.row_B.max()) + 1
    peak_R = sums_B.new_full((shape,), -math.inf).scatter_reduce(0, row_B, sums_B, "amax")
    shifted_B = sums_B - peak_R[row_B]
    total_R = sums_B.new_zeros(shape).index_add(0, row_B, shifted_B.exp())
    log_chosen_B = shifted_B - total_R.log()[row_B]
    return (batch.right_B.float() - log_chosen_B.exp()).float(), -log_chosen_B[batch.right_B]


class KeepBest(Callback):
    """Keeps the Copilot of the lowest negative log-likelihood on validation, at first the one given.

    Where wrong options take part, that of the choice is added.

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
        pilot, fused = (
            float(figures[f"val/{name}_nll"] + figures.get(f"val/{name}_choice_nll", 0.0))
            for name in ("pilot", "fused")
        )
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
