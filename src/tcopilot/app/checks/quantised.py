"""What a Pilot in 4 or 8 bits asks of the config, of this machine, and of the model that it is read from."""

import importlib.util
from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.pilot import ModelSource
from tcopilot.models.quantization import QUANTIZATIONS, device_problem, quantised_settings
from tcopilot.settings import dtype_name

MEND = "use adapter@pilot.adapter=lora, or pilot.frozen=true"


def quantization_problems(cfg: DictConfig) -> Iterator[str]:
    """Settings that do not go with `pilot.quantization`, a package that is missing, a device without its kernels."""
    bits, given = cfg.pilot.quantization, f"pilot.quantization={cfg.pilot.quantization}"
    if bits not in QUANTIZATIONS:
        return  # null, or refused by its rule
    if cfg.pilot.path is None:
        yield f"{given} with pilot.path=null: random weights must be trained in full; give pilot.path, or leave it out"
    if not _keeps_weights(cfg):
        yield f"{given} without LoRA: quantised weights cannot be trained; {MEND}"
    if cfg.trainer.strategy == "fsdp":
        yield f"{given} with trainer.strategy=fsdp: quantised weights cannot be sharded; use trainer=ddp"
    if importlib.util.find_spec("bitsandbytes") is None:
        yield f"{given}: bitsandbytes is not installed; pip install bitsandbytes, or use pilot.quantization=null"
    elif (device := _device(cfg)) is not None and (found := device_problem(bits, device)) is not None:
        yield (
            f"{given} with trainer.accelerator={cfg.trainer.accelerator}: bitsandbytes cannot compute on {device} "
            f"here ({found}); use pilot.quantization=null, or another trainer"
        )


def stored_problems(cfg: DictConfig, pilot: ModelSource) -> list[str]:
    """What the model that is read says against the config: it may be an export of ours, or be quantised already."""
    if pilot.path is None:
        return []
    stored, settings = pilot.stored_config, quantised_settings(pilot.model_config)
    where, given = f"pilot.path={pilot.path}", f"pilot.quantization={pilot.quantization}"
    if settings is None:
        if pilot.quantization and isinstance(stored, TCopilotConfig):
            return [f"{given} with {where}: an export with both models cannot be quantised; save its Pilot in a "
                    f"folder of its own by model.pilot.save_pretrained, or leave pilot.quantization out"]  # fmt: skip
        return []
    problems = []
    if pilot.quantization:
        problems.append(f"{given}: {where} is quantised already; use pilot.quantization=null")
    if not _keeps_weights(cfg):
        problems.append(f"{where} is quantised, and quantised weights cannot be trained; {MEND}")
    if getattr(stored, "base", None) is not None:
        dtype = dtype_name(pilot.model_config.dtype)
        if not cfg.pilot.frozen:
            mend = "continue with resume=<that run> rounds=<more>, or use pilot.frozen=true"
            problems.append(
                f"{where} has adapters on a quantised base, which only their own run can train further: {mend}"
            )
        if pilot.dtype != dtype:
            problems.append(f"pilot.dtype={pilot.dtype}: {where} was quantised from {dtype}; use pilot.dtype={dtype}")
    return problems


def _keeps_weights(cfg: DictConfig) -> bool:
    return bool(cfg.pilot.frozen or cfg.pilot.adapter)


def _device(cfg: DictConfig) -> str | None:
    """The kind of device that trains; None where there is none of it, which is another check's matter."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = {"gpu": ("cuda", "mps"), "auto": tuple(there)}.get(cfg.trainer.accelerator, (cfg.trainer.accelerator,))
    return next((device for device in wanted if there.get(device)), None)
