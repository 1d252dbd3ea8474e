"""Whether a run fits into the memory of its device, told before weights load."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
from omegaconf import DictConfig, ListConfig
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tcopilot.app import build
from tcopilot.app.build import Prepared
from tcopilot.app.checks.data import log_bytes
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.memory.dry_run import Footprint, Load, measure, pack_layers
from tcopilot.app.memory.free import available_memory
from tcopilot.app.trainer import process_count
from tcopilot.models.pilot import ModelSource
from tcopilot.processes import gather
from tcopilot.training.module import TCopilotModule

log = logging.getLogger(__name__)
MENDS = {
    "parameters": "choose a smaller pilot or copilot, or pilot.dtype=bfloat16 with adapter@pilot.adapter=lora, or "
    "pilot.quantization=4bit with it",
    "gradients": "train fewer parameters with adapter@pilot.adapter=lora",
    "optimiser": "train fewer parameters with adapter@pilot.adapter=lora",
    "log": "lower mistake_log.log.capacity_rounds or set mistake_log.log.max_bytes",
    "training": "lower pilot.micro_batch_size, copilot.batch_size or data.eval_batch_size, or set "
    "pilot.gradient_checkpointing=true",
    "decoding": "lower evaluation.batch_size",
}


@dataclass
class Budget:
    """What a run needs and what is free, in bytes."""

    needed: Footprint  # the models' part, on the training device
    log: int  # a full Mistake Log, in the host's memory; 0 where it is spilled to a disk
    free: int  # on the training device
    device: str  # `GPU` or `CPU`

    def __str__(self) -> str:
        peaks = _listed(self._peaks())
        return f"{_listed(self._certain())}; at its peak {peaks}, of {bytes_text(self.free)} free on the {self.device}"

    def check(self) -> None:
        """Refuse parameters, gradients, optimiser state and log that cannot fit; warn of peaks that may not."""
        certain, free = self._certain(), f"{bytes_text(self.free)} are free on the {self.device}"
        if (total := sum(certain.values())) > self.free:
            largest = max(certain, key=certain.__getitem__)
            need = f"{_listed(certain)} need {bytes_text(total)} and {free}"
            raise ConfigError([f"{need}; the largest part is {largest}: {MENDS[largest]}"])
        for what, size in self._peaks().items():
            if size > self.free:
                log.warning("%s may need %s and %s: %s", what, bytes_text(size), free, MENDS[what])

    @property
    def _log_here(self) -> int:
        return self.log if self.device == "CPU" else 0

    def _certain(self) -> dict[str, int]:
        """What every round needs at its end, however many rows it has."""
        models = {"parameters": self.needed.parameters, "gradients": self.needed.gradients}
        return models | {"optimiser": self.needed.optimizer, "log": self._log_here}

    def _peaks(self) -> dict[str, int]:
        """The peaks of training and of decoding with a full log."""
        peaks = {"training": self.needed.training, "decoding": self.needed.decoding}
        return {what: size + self._log_here for what, size in peaks.items()}


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {bytes_text(size)}" for name, size in parts.items() if size)


def budget(cfg: DictConfig, prepared: Prepared) -> Budget | None:
    """Estimate what a run needs before weights load; None, with a warning, if its parts cannot run without them."""
    on_gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    needed = None
    try:
        needed = measure(
            lambda: _module(cfg, prepared), _load(cfg, prepared), prepared.log, str(cfg.trainer.precision), on_gpu,
            tied=bool((prepared.donor or prepared.pilot).model_config.tie_word_embeddings),
            shards=process_count(cfg) if cfg.trainer.strategy == "fsdp" else 1,
        )  # fmt: skip
    except Exception as error:  # an estimate that fails is no reason not to train
        log.warning("memory is not estimated: %s: %s", type(error).__name__, error)
    kept, free = 0, gather([None if needed is None else _free(cfg, on_gpu)])  # all processes decide alike
    if None in free:
        return None
    if prepared.log is not None and prepared.log.spill is None:
        kept = log_bytes(cfg, prepared.pilot, prepared.data, prepared.log)
    return Budget(needed, kept, min(free), "GPU" if on_gpu else "CPU")


def _free(cfg: DictConfig, on_gpu: bool) -> int:
    """Bytes that are free for this process: on its GPU, or its share of the host's."""
    if not on_gpu:
        return available_memory() // max(1, process_count(cfg) // cfg.trainer.get("num_nodes", 1))
    local, devices = int(os.environ.get("LOCAL_RANK", 0)), cfg.trainer.devices
    return torch.cuda.mem_get_info(devices[local] if isinstance(devices, ListConfig) else local)[0]


def _module(cfg: DictConfig, prepared: Prepared) -> TCopilotModule:
    def without_weights(source: ModelSource) -> SimpleNamespace:
        auto = AutoModelForSeq2SeqLM if source.is_encoder_decoder else AutoModelForCausalLM
        made = partial(auto.from_config, source.model_config, dtype=getattr(torch, source.dtype))
        return SimpleNamespace(
            is_encoder_decoder=source.is_encoder_decoder,
            load=lambda tokenizer: made(),
            trained_copilot=source.trained_copilot,
            copilot_alone=None,
            whole_model=lambda fused, dtype: fused(source.stored_config),
        )

    donor = None if prepared.donor is None else without_weights(prepared.donor)
    model = build.fused_model(cfg, replace(prepared, pilot=without_weights(prepared.pilot), donor=donor))
    if (source := prepared.pilot).bits is not None:
        pack_layers(model.pilot, source.model_config, source.bits, getattr(torch, source.dtype))
    module = build.training_module(cfg, model, prepared.data.total_rounds)
    module.copilot_batch_size //= process_count(cfg)
    return module


def _load(cfg: DictConfig, prepared: Prepared) -> Load:
    parts = prepared.data.summary()
    training = [part for name, part in parts.items() if name.endswith("/train")] or list(parts.values())
    source, target = (int(max(part[f"{what}_max"] for part in training)) for what in ("source", "target"))
    rows = cfg.data.batch_size // process_count(cfg)
    at_once = min(cfg.pilot.micro_batch_size or rows, rows)
    given = build.evaluation_weights(cfg.fusion.weight)
    weights = len({0.0, *given} if given else (0, 1)) if cfg.copilot.enabled else 1
    ranked = any(task.catalogue is not None for task in prepared.data.benchmarks.values())
    searched = ranked and cfg.evaluation.ranking == "beam"
    beams = cfg.evaluation.ranking_beams if searched else cfg.evaluation.num_beams
    answers = [task.max_new_tokens for task in prepared.data.benchmarks.values()]
    return Load(
        at_once, source, target,
        parts=-(-rows // at_once),
        validation_rows=cfg.data.eval_batch_size if cfg.trainer.limit_val_batches else 0,
        prompts=max(1, cfg.evaluation.batch_size // (weights * (beams if searched else 1))),
        copies=weights * beams,
        answer=cfg.evaluation.max_new_tokens or max(answer or target + 2 for answer in answers),
    )  # fmt: skip


def bytes_text(size: int) -> str:
    """Write a number of bytes for people.

    >>> bytes_text(1_500_000), bytes_text(2_000_000_000)
    ('1.5 MB', '2.0 GB')
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
