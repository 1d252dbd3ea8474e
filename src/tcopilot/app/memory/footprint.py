"""How much memory a run takes, found before weights load: its first round, validation and decoding step are run with
tensors that have shapes and no memory.

Nothing is worked out by formulas, so an estimate follows whatever the models, losses and optimisers do.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from tcopilot.app.memory.live_tensors import LiveMemory
from tcopilot.data.batch import Batch
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.rounds import ABOUT_RECORD
from tcopilot.models.caches import LEAST_ROOM
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.training.callbacks.mistake_log import MistakeLogCallback
from tcopilot.training.module import TCopilotModule

aten = torch.ops.aten


@dataclass
class Load:
    """The largest shapes that pass through the models of one process.

    Attributes:
        rows: of one forward pass of the Pilot in training.
        source: longest prompt, in tokens.
        target: longest target.
        parts: micro-batches of a round.
        validation_rows: of one validation batch; 0 for none.
        prompts: of one decoding pass.
        copies: of each prompt in it: λ times beams.
        answer: longest answer; 0 if nothing is decoded.
    """

    rows: int
    source: int
    target: int
    parts: int = 1
    validation_rows: int = 0
    prompts: int = 1
    copies: int = 1
    answer: int = 0


@dataclass
class Footprint:
    """Bytes on the training device, without the log.

    Attributes:
        parameters: of both models, buffers included.
        gradients: of what is trained, when all have come.
        optimizer: state of both optimisers.
        logits: tensors over the vocabulary at the peak of training; those of the log's sample included.
        training: the peak of training: the parts above, activations, gradients so far and the kernels' results.
        caches: keys and values of both models for the longest answer, with what else a step carries.
        decoding: the peak of decoding, parameters included.
    """

    parameters: int
    gradients: int
    optimizer: int
    logits: int
    training: int
    caches: int
    decoding: int

    @property
    def certain(self) -> int:
        """What every round needs at its end, however many rows it has."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def activations(self) -> int:
        """What is left of training's peak: activations, and gradients as far as they have come."""
        return max(0, self.training - self.parameters - self.optimizer - self.logits)


def measure(
    make: Callable[[], TCopilotModule],
    load: Load,
    log: MistakeLog | None,
    precision: str = "32-true",
    on_gpu: bool = False,
    tied: bool = True,
) -> Footprint:
    """Run a round, a validation batch and a decoding step without memory, and count what they would take.

    Args:
        make: builds the module that would be trained; called where torch puts tensors on its meta device.
        load: the shapes.
        log: the run's log, of which storage and types are taken; it stays empty. None without a Copilot.
        precision: the Trainer's.
        on_gpu: count as on a GPU, where optimisers update all parameters at once.
        tied: whether input and output embeddings are one, which tensors without values cannot tell.
    """
    with _Shapes(tied), torch.device("meta"):
        module = make()
    vocab = (module.model.pilot.config.vocab_size,)
    with (
        FakeTensorMode(),
        _Shapes(tied, lambda tensor: "logits" if tensor.shape[-1:] == vocab else "others") as memory,
    ):
        _take_off_meta(module)
        parameters, meter = memory.live, _Meter(memory, on_gpu)
        gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        _fit(module, load, log, precision, meter)
        training, logits = meter.peak()
        decoding, caches = _decoding(module.model, load, memory) if load.answer else (0, 0)
    return Footprint(parameters, gradients, meter.state, logits, training, caches, parameters + decoding)


def _take_off_meta(module: nn.Module) -> None:
    """Give parameters and buffers the CPU as their place, so that operations choose the kernels that they would there.

    Models are built on the meta device first, since modules of tensors without memory can be built but not moved.
    """
    made: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = made[old]


class _Shapes(LiveMemory):
    """Answers for tensors without values where the measured code asks for a value."""

    def __init__(self, tied: bool, label: Callable[[Tensor], str] = lambda tensor: "others") -> None:
        super().__init__(label)
        self._tied = tied

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return 1  # finite, true, a first row: nothing that is counted depends on it
        if func is aten.equal.default:
            return self._tied
        if func is aten.nonzero.default:
            func, args = aten.zeros.default, ([args[0].numel(), args[0].dim()],)  # all rows are as long as the longest
            kwargs = {"dtype": torch.int64, "device": "cpu"}
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Meter(Callback):
    """Notes the peaks between optimiser steps; later rounds have the optimisers' state from the start."""

    def __init__(self, memory: LiveMemory, on_gpu: bool) -> None:
        self._memory, self._on_gpu = memory, on_gpu
        self._optimizers: list[torch.optim.Optimizer] = []
        self._peaks: list[tuple[int, int]] = []
        self.mistake_log: MistakeLog | None = None  # Lightning replaces an attribute named `log`

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """A round's forward and backward passes are done, or the other optimiser is."""
        self._note()
        self._optimizers.append(optimizer)
        for group in optimizer.param_groups:
            if self._on_gpu and group.get("foreach", False) is None:
                group["foreach"] = True  # torch's choice where parameters lie on a GPU

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last peak: of the last optimiser, or of validation."""
        self._note()

    def _note(self) -> None:
        held = 0 if self.mistake_log is None else self.mistake_log.nbytes
        self._peaks.append((self._memory.peak - held, self._memory.at_peak["logits"]))
        self._memory.reset_peak()

    @property
    def state(self) -> int:
        """Bytes of the optimisers' state."""
        return sum(map(_state_bytes, self._optimizers))

    def peak(self) -> tuple[int, int]:
        """The largest peak of a later round, and its bytes of tensors over the vocabulary."""
        missing = [sum(map(_state_bytes, self._optimizers[i:])) for i in range(len(self._peaks))]
        return max((peak + more, logits) for (peak, logits), more in zip(self._peaks, missing, strict=True))


class _Stand(SingleDeviceStrategy):
    """Leaves the module where it is; tensors without memory cannot be moved."""

    def model_to_device(self) -> None:
        """Stay."""

    def teardown(self) -> None:
        """Stay."""


class _LongestRows(Batch):
    """A batch of equal rows, to be read in several parts."""

    parts = 1

    def split(self, rows: int) -> list[Batch]:
        """The second part is traced while gradients of the first are held; a third would be like it."""
        return [self] * min(2, self.parts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Stay: a tensor without memory cannot be moved."""
        return self


class _FullLog(MistakeLog):
    """A log whose records are all as long as the longest."""

    def _record(self, index: int) -> dict[str, Tensor]:
        return {name: rows[0] for name, rows in self.rounds[-1].tensors.items() if name not in ABOUT_RECORD}


def _fit(module: TCopilotModule, load: Load, log: MistakeLog | None, precision: str, meter: _Meter) -> None:
    module.steps_per_round = 1  # further ones are smaller
    module.compile_backend = None  # what torch refuses to compile here it would never compile again
    module.log = module.log_dict = module.on_validation_epoch_end = lambda *_, **__: None  # no figures to report
    module._sum_over_ranks = lambda value: value  # other processes estimate for themselves
    callbacks: list[Callback] = [meter]
    if log is not None:
        meter.mistake_log = _FullLog(1, storage=copy.deepcopy(log.storage), dtype=log.dtype)
        callbacks.append(MistakeLogCallback(meter.mistake_log))
    with _quiet():
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=_Stand("cpu"), precision=precision, callbacks=callbacks,
            max_epochs=1, limit_val_batches=int(load.validation_rows > 0), num_sanity_val_steps=0, logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(
            module,
            DataLoader([_batch(load.rows, load)], batch_size=None),
            DataLoader([_batch(load.validation_rows, load)], batch_size=None),
        )


def _batch(rows: int, load: Load) -> Batch:
    source, target = torch.zeros(rows, load.source).long(), torch.zeros(rows, load.target).long()
    ids = torch.zeros(rows).long()
    batch = _LongestRows(source, source == 0, target, target == 0, ids, ids)
    object.__setattr__(batch, "parts", load.parts)
    return batch


@torch.no_grad()
def _decoding(model: TCopilotModel, load: Load, memory: LiveMemory) -> tuple[int, int]:
    """The peak of reading the prompts and of one step, beyond what is held now, and the caches after it.

    The step makes room for the columns to come. Where an answer is longer than that room, what is read is longer by
    as much.
    """
    model.eval()
    held = memory.live
    memory.reset_peak()
    prompts = torch.zeros(load.prompts * load.copies, load.source).long()
    known = prompts.new_zeros(len(prompts), max(0, load.answer - LEAST_ROOM))
    token, mask = prompts[:, :1], torch.ones_like(prompts)
    if model.config.is_encoder_decoder:
        start = torch.cat([token, known], dim=1)
        found = model(prompts, mask, decoder_input_ids=start, use_cache=True, copies=load.copies)
        encoded = found.encoder_last_hidden_state.repeat_interleave(load.copies, dim=0)
        step: dict[str, Any] = {"decoder_input_ids": token, "encoder_outputs": (encoded,), "attention_mask": mask}
    else:
        ids = torch.cat([prompts, known], dim=1)
        seen = torch.ones_like(ids)
        start = {"target_start": prompts.shape[1], "logits_to_keep": 1}
        found = model(ids, seen, use_cache=True, copies=load.copies, **start)
        step = {"input_ids": token, "attention_mask": torch.cat([seen, token], dim=1)}
    cache = found.past_key_values
    del found
    model(**step, past_key_values=cache, use_cache=True)
    return memory.peak - held, memory.live - held


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning, since this is not a real training run."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
