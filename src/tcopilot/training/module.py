"""Algorithm 1: a round updates the Pilot on a batch and the Copilot on records of the Mistake Log."""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from torch import Tensor, nn

from tcopilot.data.batch import Batch
from tcopilot.mistake_log.log import KeptRecord, MistakeLog, MistakeRecord
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.states import PilotStates, StatePooler, trace_pilot
from tcopilot.models.target_start import IGNORED_LABEL
from tcopilot.processes import sum_gradients, sum_over_processes, undivided
from tcopilot.settings import Rule, is_list, is_number, whole
from tcopilot.training.compared_tokens import compared_sum
from tcopilot.training.compilation import clear_empty_libraries
from tcopilot.training.error_statistics import ErrorStatistics, correct_targets
from tcopilot.training.learner import Learner, take_settings
from tcopilot.training.objectives import Objective, RootMeanSquaredError, objective_sum, safe_log
from tcopilot.training.sharding import ShardedPilot

OF_BENCHMARK = ("pilot_nll", "fused_nll", "error_ratio", "best_weight")  # validation's figures of each benchmark


class TrainingDivergedError(RuntimeError):
    """A loss or gradient is not finite; nothing was updated with it."""


def _are_probabilities(given: Any) -> bool:
    shares = given if is_list(given) else [given]
    return 1 <= len(shares) <= 2 and all(is_number(share) and 0 <= share <= 1 for share in shares)


class TCopilotModule(LightningModule):
    """Pilot and Copilot in one LightningModule with two optimisers, stepped by hand.

    The log is detached, so the sum of both losses gives each model exactly its own gradient. With several processes
    the Pilot's update and the Copilot's first update of a round share one backward pass, for DDP reduces gradients
    once. A single process runs the Pilot's backward pass first, which frees activations and overlaps with the log's
    copies. `MistakeLogCallback` puts the log into `mistake_log`.

    Args:
        model: the fused model. Without a Copilot this is plain fine-tuning.
        pilot: how the Pilot is updated; None keeps it frozen (a Copilot for a finished Pilot).
        copilot: how the Copilot is updated.
        rounds: rounds of the whole run, for the schedules.
        objective: what the Copilot learns, by default Eq. 7.
        micro_batch_size: rows per Pilot forward pass; None takes the whole batch. Gradients add up over a round.
        copilot_batch_size: records per Copilot update, over all processes; each draws its share from its own log.
        steps_per_round: Copilot updates per round.
        own_feedback: probability that a sequence of the log is trained on the Copilot's own outputs, those of a
            teacher-forced pass, instead of ℓ_{<i}; a pair moves linearly from the first to the second over the run.
        compile: backend of `torch.compile` for the forward passes of both models while training runs; None: no
            compilation. Names of weights stay as they are.
    """

    SETTINGS: ClassVar = {
        "micro_batch_size": whole().or_null(),
        "copilot_batch_size": whole(),
        "steps_per_round": whole(),
        "own_feedback": Rule(_are_probabilities, "give a probability in [0, 1], or two to move between over the run"),
    }

    def __init__(
        self,
        model: TCopilotModel,
        pilot: Learner | None,
        copilot: Learner | None,
        rounds: int,
        objective: Objective | None = None,
        micro_batch_size: int | None = None,
        copilot_batch_size: int = 64,
        steps_per_round: int = 4,
        own_feedback: float | tuple[float, float] = 0.0,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # frozen pretrained weights are not in the checkpoint
        self.model = model
        self.learners = {"pilot": pilot, "copilot": copilot if model.copilot is not None else None}
        self.rounds = rounds
        self.objective = RootMeanSquaredError() if objective is None else objective
        self.micro_batch_size = micro_batch_size
        self.copilot_batch_size = copilot_batch_size
        self.steps_per_round = steps_per_round
        self.own_feedback = (own_feedback,) * 2 if isinstance(own_feedback, float | int) else tuple(own_feedback)
        self.compile_backend = compile
        self.mistake_log: MistakeLog | None = None
        self.sharded: ShardedPilot | None = None  # set while `ShardingStrategy` trains
        self.copilot_stopped = False  # `CopilotStop` sets it: no more records and updates, while the Pilot goes on
        self.seconds = {"pilot": 0.0, "copilot": 0.0}
        self.gradient_norms: dict[str, list[Tensor]] = {}  # of this round's updates
        if pilot is None:
            model.pilot.requires_grad_(False)

    @property
    def round(self) -> int:
        """Rounds done; `global_step` counts the steps of both optimisers instead."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.completed

    @property
    def copilot_learns(self) -> bool:
        """Whether rounds record errors and update a Copilot."""
        return self.learners["copilot"] is not None and not self.copilot_stopped

    def configure_model(self) -> None:
        """Divide the Pilot among the processes, if the strategy has laid them out for it."""
        if self.device_mesh is not None and self.sharded is None:
            self.sharded = ShardedPilot(self.model.pilot, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> tuple[list, list]:
        """Build the optimisers and schedules of the models that learn, the Pilot's first."""
        optimizers, schedulers = [], []
        for name, learner in self._learning():
            parameters = [p for p in getattr(self.model, name).parameters() if p.requires_grad]
            optimizers.append(learner.optimizer(parameters))
            schedulers.append(learner.scheduler(optimizer=optimizers[-1], num_training_steps=self.rounds))
        return optimizers, schedulers

    def on_train_start(self) -> None:
        """Set training mode, since Lightning keeps each submodule's and `from_pretrained` gives eval mode; compile."""
        self.model.train()
        if self.learners["pilot"] is None:
            self.model.pilot.eval()
        for optimizer, scheduler in zip(self.trainer.optimizers, self._as_list(self.lr_schedulers()), strict=True):
            take_settings(optimizer, scheduler)
        if self.compile_backend == "inductor":
            clear_empty_libraries()
        for part in self._compiled_parts():  # in place of the method: a wrapper would rename the weights
            part.forward = torch.compile(part.forward, backend=self.compile_backend, dynamic=True)

    def on_train_end(self) -> None:
        """Undo compilation, since decoding calls the models in other ways."""
        for part in self._compiled_parts():
            del part.forward

    def on_fit_end(self) -> None:
        """Give every process the whole Pilot again."""
        if self.sharded is not None:
            self.model.replace_pilot(self.sharded.gathered())
            self.sharded = None

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One round of Algorithm 1; comments number its steps as `docs/algorithm.md` does. Step 1 drew the batch."""
        with self._timed("copilot"):
            self._log_held_out(batch.held_out)
        with self._timed("pilot"):  # 2 to 6: run the Pilot and add (X̃, h, ℓ) to the Mistake Log
            pilot_loss, loss, tokens = self._run_pilot(batch)
        copilot_loss = None
        with self._timed("copilot"):  # 8 and 9: draw from the log and run the Copilot on what was drawn
            if self.copilot_learns:
                copilot_loss = self._copilot_loss(self._draw())
                loss = loss + copilot_loss * (self.trainer.world_size if self.sharded is None else 1)  # DDP averages
            elif self.copilot_stopped and self.trainer.world_size > 1:  # DDP waits for a gradient of each weight
                loss = loss + sum(0 * p.sum() for p in self.model.copilot.parameters() if p.requires_grad)
        with self._timed("copilot" if self.trainer.world_size == 1 else "pilot"):
            self._backward(loss)
            if self.copilot_learns and self.sharded is not None:
                sum_gradients(self.model.copilot.parameters())
        with self._timed("pilot"):
            pilot_loss = self._sum_over_ranks(pilot_loss / self.trainer.world_size)
            optimizers = {n: o for (n, _), o in zip(self._learning(), self._as_list(self.optimizers()), strict=True)}
            if self.copilot_stopped:
                optimizers.pop("copilot").zero_grad()
            self._step(optimizers, pilot_loss, copilot_loss)  # 7 and 10: each on its own loss
        with self._timed("copilot"):
            for _ in range(self.steps_per_round - 1 if self.copilot_learns else 0):
                self._update_copilot_again(pilot_loss)  # 8 to 10 again, on fresh draws
        for scheduler in self._as_list(self.lr_schedulers()):
            scheduler.step()
        self._log_round(pilot_loss, copilot_loss, tokens)

    def _run_pilot(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Run steps 2 to 6 in micro-batches, and compute gradients of the cross-entropy (step 7) on the way.

        With several processes, the caller runs the last backward pass, so that DDP reduces all gradients at once.

        Returns:
            This rank's share of the Pilot's loss, times the number of ranks (DDP averages over them); the loss whose
            backward pass is still to come; the round's target tokens.
        """
        alone = self.trainer.world_size == 1
        is_logged = self.copilot_learns and batch.held_out is None
        tokens = self._sum_over_ranks(batch.tokens.float())
        *earlier, last = batch.split(self.micro_batch_size or len(batch))
        pilot_loss = torch.zeros((), device=self.device)
        with self._without_reduction():
            for i, micro_batch in enumerate(earlier):
                pilot_loss += self._backward(self._logged_loss(micro_batch, tokens, is_logged, extend=i > 0))
        loss = self._logged_loss(last, tokens, is_logged, extend=bool(earlier))
        pilot_loss += loss.detach()
        return pilot_loss, self._backward(loss) if alone else loss, tokens

    def on_validation_epoch_start(self) -> None:
        """Start the validation's sums, for each benchmark."""
        names = getattr(self.trainer.datamodule, "benchmark_names", [""])
        self._of_benchmark = {name: ErrorStatistics([self.model.weight], self.model.fusion) for name in names}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Teacher-forced pass over held-out rows, to see whether f^C estimates ℓ where it counts."""
        log_probs_BNV, corrections_BNV = correct_targets(self.model, batch)
        tensors = log_probs_BNV, corrections_BNV, batch.target_ids_BN, batch.target_mask_BN
        for number, statistics in enumerate(self._of_benchmark.values()):
            rows_B = batch.benchmark_B == number if len(self._of_benchmark) > 1 else slice(None)
            statistics.update(*(None if tensor is None else tensor[rows_B] for tensor in tensors))

    def on_validation_epoch_end(self) -> None:
        """Report `ErrorStatistics.summary` over all ranks, and the main figures of each of several benchmarks."""
        for statistics in self._of_benchmark.values():
            statistics.reduce(self._sum_over_ranks)
        self.validation_statistics = ErrorStatistics.joined(self._of_benchmark.values())
        figures = {f"val/{name}": value for name, value in self.validation_statistics.summary().items()}
        for benchmark, statistics in self._of_benchmark.items() if len(self._of_benchmark) > 1 else ():
            if statistics.tokens:
                summary = statistics.summary()
                figures |= {f"val/{benchmark}/{name}": summary[name] for name in OF_BENCHMARK}
        self.log_dict(figures, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen weights of a pretrained model: they never change and can be loaded again."""
        checkpoint["seconds"] = dict(self.seconds)
        if getattr(self.model.pilot.config, "_name_or_path", ""):
            named = [n for n, p in self.named_parameters(remove_duplicate=False) if p.requires_grad]  # tied: two names
            kept = {*named, *(name for name, _ in self.named_buffers(remove_duplicate=False))}
            checkpoint["state_dict"] = {n: value for n, value in checkpoint["state_dict"].items() if n in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the seconds, extend the rounds if the budget has grown, and refuse a checkpoint of another model."""
        trained = (name for name, parameter in self.named_parameters() if parameter.requires_grad)
        if missing := [name for name in trained if name not in checkpoint["state_dict"]]:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} trained weights, {missing[0]} among them: it is of another model"
            )
        self.seconds = dict(checkpoint["seconds"])
        loop = checkpoint["loops"]["fit_loop"]
        rounds, epoch = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
        if rounds["total"]["completed"] < self.rounds:  # Lightning's epoch is the whole budget, so it is not over
            rounds["is_last_batch"] = False
            for counts in (epoch["total"], epoch["current"]):
                counts["processed"] = counts["completed"] = 0

    def _compiled_parts(self) -> list[nn.Module]:
        parts = (self.model.pilot, self.model.copilot) if self.compile_backend is not None else ()
        return [part for part in parts if part is not None]

    def _learning(self) -> list[tuple[str, Learner]]:
        return [(name, learner) for name, learner in self.learners.items() if learner is not None]

    def _trace(self, batch: Batch) -> PilotStates:
        pooler = StatePooler() if self.model.copilot is None else self.model.copilot.pooler
        with nullcontext() if self.learners["pilot"] is not None else torch.no_grad():
            return trace_pilot(self.model.pilot, batch, pooler)

    def _logged_loss(self, batch: Batch, tokens: Tensor, is_logged: bool, extend: bool) -> Tensor:
        """Trace a micro-batch and log it; returns its share of the Pilot's loss, times the number of ranks."""
        states = self._trace(batch)  # steps 2 to 4: p̂, X̃ and h
        if is_logged:
            recorded = states if self.mistake_log.dropout else self._trace_without_dropout(batch)
            self.mistake_log.append(recorded, extend=extend)  # steps 5 and 6: ℓ follows from p̂ and the targets
        return self._pilot_loss(states) * self.trainer.world_size / tokens

    def _pilot_loss(self, states: PilotStates) -> Tensor:
        targets_BN = states.targets_BN.masked_fill(~states.target_mask_BN, IGNORED_LABEL)
        logits_TV = states.logits_BNV.flatten(0, 1).float()
        return nn.functional.cross_entropy(logits_TV, targets_BN.flatten(), reduction="sum")

    def _backward(self, loss: Tensor) -> Tensor:
        """Add the gradients of a loss, if it has any; returns its value."""
        if loss.requires_grad:
            self.manual_backward(loss)
        return loss.detach()

    @torch.no_grad()
    def _trace_without_dropout(self, batch: Batch) -> PilotStates:
        """Run a further forward pass without dropout, so that the errors are those of inference."""
        training = self.model.pilot.training
        self.model.pilot.eval()
        states = self._trace(batch)
        self.model.pilot.train(training)
        return states

    def _log_held_out(self, batch: Batch | None) -> None:
        """Log errors on rows that the Pilot never trains on."""
        if batch is None or not self.copilot_learns:
            return
        for i, part in enumerate(batch.split(self.micro_batch_size or len(batch))):
            self.mistake_log.append(self._trace_without_dropout(part), extend=i > 0)

    def _draw(self) -> MistakeRecord | KeptRecord:
        compares_few = self.model.copilot.fits_recordings and self.mistake_log.storage.serves_few_tokens
        draw = self.mistake_log.sample_kept if compares_few else self.mistake_log.sample
        return draw(self.copilot_batch_size // self.trainer.world_size, self.device)

    def _copilot_loss(self, record: MistakeRecord | KeptRecord) -> Tensor:
        """The objective over the records of all ranks; its gradient here is this rank's share of it."""
        if isinstance(record, KeptRecord):
            total = compared_sum(self.objective, self.model.copilot, self.model.pilot, record)
        else:
            hidden_BNC = self._taught_hidden(record)
            total = objective_sum(self.objective, self.model.copilot, record, hidden_BNC)
        tokens = self._sum_over_ranks((record.target_mask_BN * record.importance_B[:, None]).sum())
        others = self._sum_over_ranks(total.detach()) - total.detach()
        return self.objective.reduce(total + others, tokens)

    def _taught_hidden(self, record: MistakeRecord) -> Tensor:
        """The Copilot's hidden states for what was drawn, with its own outputs fed back in some sequences."""
        copilot = self.model.copilot
        inputs_BNC = copilot.taught_inputs(record.probs_BNV, record.targets_BN)
        memory = (record.source_BMP, record.source_mask_BM, record.states_BNP)
        first, last = self.own_feedback
        own_share = first + (last - first) * min(1.0, self.round / max(1, self.rounds - 1))
        if own_share > 0:
            with torch.no_grad():
                hidden, _ = copilot(inputs_BNC, *memory)
                own_BNV = copilot.correct(hidden, safe_log(record.probs_BNV))[:, :-1]
            use_own_B11 = torch.rand(len(own_BNV), 1, 1, device=own_BNV.device) < own_share
            inputs_BNC = torch.where(use_own_B11, copilot.inputs(own_BNV), inputs_BNC)
        return copilot(inputs_BNC, *memory)[0]

    def _update_copilot_again(self, pilot_loss: Tensor) -> None:
        with self._without_reduction():  # the reducer is armed once a round, for the joint backward
            loss = self._copilot_loss(self._draw())
            self.manual_backward(loss)
        if self.trainer.world_size > 1:
            sum_gradients(self.model.copilot.parameters())
        self._step({"copilot": self._as_list(self.optimizers())[-1]}, pilot_loss, loss)

    def _step(self, optimizers: dict[str, Any], pilot_loss: Tensor, copilot_loss: Tensor | None) -> None:
        """Update models with their clipped gradients, unless something is not finite, which all ranks then see."""
        found = {"pilot loss": pilot_loss, "copilot loss": copilot_loss}
        for name, optimizer in optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if (clip := self.learners[name].clip) is None:
                norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            else:
                norm = nn.utils.clip_grad_norm_(parameters, clip)
            found[f"{name} gradient norm"] = norm = undivided(norm)  # before clipping
            self.gradient_norms.setdefault(name, []).append(norm)
        # This waits for a GPU, so it comes when all its work is launched.
        values = {name: value.item() for name, value in found.items() if value is not None}
        if not all(map(math.isfinite, values.values())):
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise TrainingDivergedError(
                f"round {self.round + 1}: {shown}. No update was made with it. Lower the learning rate of the model "
                f"whose loss or gradient is not finite (pilot.optimizer.lr, copilot.optimizer.lr) or set its clip"
            )
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

    def _log_round(self, pilot_loss: Tensor, copilot_loss: Tensor | None, tokens: Tensor) -> None:
        losses = {"pilot": pilot_loss} | ({} if copilot_loss is None else {"copilot": copilot_loss.detach()})
        values = {f"train/{name}_loss": loss for name, loss in losses.items()}
        values |= {"train/target_tokens": tokens, "round": float(self.round + 1)}
        for (name, _), scheduler in zip(self._learning(), self._as_list(self.lr_schedulers()), strict=True):
            values[f"lr/{name}"] = scheduler.get_last_lr()[0]
        values |= {f"time/{name}_seconds": seconds for name, seconds in self.seconds.items()}
        values |= {f"train/{name}_gradient_norm": torch.stack(n).mean() for name, n in self.gradient_norms.items()}
        self.gradient_norms.clear()
        self.log_dict(values, on_step=True)
        self.log_dict(losses, prog_bar=True, logger=False)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def _without_reduction(self) -> AbstractContextManager:
        return getattr(self.trainer.strategy, "block_backward_sync", nullcontext)()

    _sum_over_ranks = staticmethod(sum_over_processes)  # not in the memory estimate, which each process makes alone

    @staticmethod
    def _as_list(value: Any) -> list:
        return value if isinstance(value, list) else [] if value is None else [value]
