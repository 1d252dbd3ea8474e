"""Refuse what cannot work before weights load: every problem at once, each with key, value and mend."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from transformers import PreTrainedConfig

from tcopilot import families
from tcopilot.adapters import Lora
from tcopilot.copilot import PATTERNS, POSITIONS
from tcopilot.data.module import TCopilotDataModule
from tcopilot.decoding import FEEDBACKS
from tcopilot.functional import POOLINGS
from tcopilot.fusion import FUSIONS
from tcopilot.heads import HEADS
from tcopilot.log_attention import CONTEXTS
from tcopilot.mistake_log import MistakeLog
from tcopilot.pilot import ModelSource, ModelSourceError

PRECISIONS = ("32-true", "bf16-mixed")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_spawn")
DTYPES = ("float32", "bfloat16", "float16")
CHOICES = {
    "pilot.dtype": DTYPES,
    "copilot.dtype": DTYPES,
    "copilot.head": HEADS,
    "copilot.pattern": PATTERNS,
    "copilot.pooling": POOLINGS,
    "copilot.context": CONTEXTS,
    "copilot.positions": POSITIONS,
    "copilot.error_input": ("embedding", "normal"),
    "mistake_log.log.dtype": DTYPES,
    "mistake_log.log.storage.dtype": DTYPES,
    "control": (None, "equal_time"),
}
COUNTS = ("data.batch_size", "data.eval_batch_size", "copilot.batch_size", "copilot.steps_per_round")
COUNTS_OR_NULL = (
    "rounds", "data.rounds", "data.max_train_rows", "data.max_eval_rows", "data.max_source_length",
    "data.max_target_length", "pilot.micro_batch_size", "mistake_log.every_n_rounds",
    "callbacks.checkpoint.every_n_rounds", "callbacks.checkpoint.keep",
)  # fmt: skip
POSITIVE_OR_NULL = (
    "data.epochs", "pilot.clip", "pilot.optimizer.lr", "copilot.clip", "copilot.optimizer.lr",
)  # fmt: skip


class ConfigError(ValueError):
    """The config cannot work; `problems` holds one message per problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        heading = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{heading} in the config or data:", *(f"  - {p}" for p in problems)]))


def refuse_missing(cfg: DictConfig) -> None:
    """Refuse a config with mandatory values left open (`???`); nothing else can be judged before they are given.

    Raises:
        ConfigError: naming every such key.
    """
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError([f"{key} is not set: give {key}=<value>" for key in missing])


def config_problems(cfg: DictConfig) -> list[str]:
    """Problems that the composed config shows by itself, without any model or data."""
    checks = (_trainer, _numbers, _choices, _batches, _evaluation, _learners, _copilot_options)
    return [problem for check in checks for problem in check(cfg)]


def evaluation_problems(cfg: DictConfig) -> list[str]:
    """The part of `config_problems` that an evaluation without training depends on."""
    return list(_evaluation(cfg))


def source_problems(*sources: ModelSource | None) -> list[str]:
    """Models whose config cannot be read or whose family is not supported; their weights are not read."""
    problems = []
    for source in filter(None, sources):
        problems += _collect(source.key, lambda source=source: families.check_family(source.model_config))
    return problems


def model_problems(cfg: DictConfig, pilot: ModelSource, donor: ModelSource | None) -> list[str]:
    """Problems of models that can be read: a Copilot too deep or too flat, adapters without a place."""
    problems = _adapter_problems(cfg, "pilot", pilot.model_config)
    if not cfg.copilot.enabled:
        return problems
    model = pilot if donor is None else donor
    depth = families.decoder_depth(model.model_config)
    layers = cfg.copilot.layers
    if not _fits(layers, depth):
        problems.append(
            f"copilot.layers={layers}: the {model.model_config.model_type} decoder of {model.key} has {depth} layers; "
            f"use 1 to {depth}, a share of them such as 0.5, or null for all"
        )
    elif cfg.copilot.pattern != 2 and not pilot.is_encoder_decoder and (copilot_layers(layers, depth) or depth) < 2:
        problems.append(
            f"copilot.layers={layers} of {depth} with copilot.pattern={cfg.copilot.pattern}: the first layer of a "
            f"decoder-only Copilot keeps self-attention, so no layer would read the log; use at least 2 layers or "
            f"copilot.pattern=2"
        )
    return problems + _adapter_problems(cfg, "copilot", model.model_config)


def donor_problems(pilot: PreTrainedConfig, donor: ModelSource) -> list[str]:
    """A checkpoint for the Copilot that cannot read the Pilot's tokens.

    Call it after the Pilot's tokenizer was made, from which a Pilot built from a config takes its vocabulary.
    """
    config = donor.model_config
    if (pilot.model_type, pilot.vocab_size) == (config.model_type, config.vocab_size):
        return []
    return [
        f"copilot.path={donor.path}: {config.model_type} with {config.vocab_size} tokens cannot read a "
        f"{pilot.model_type} Pilot with {pilot.vocab_size} tokens; choose a checkpoint of the same family and "
        f"vocabulary"
    ]


def copilot_layers(layers: int | float | None, depth: int) -> int | None:
    """A depth as it is, or a share of the Pilot's (0.5 is half, at least one layer).

    >>> copilot_layers(0.5, 12), copilot_layers(3, 12), copilot_layers(None, 12)
    (6, 3, None)
    """
    return max(1, round(layers * depth)) if isinstance(layers, float) else layers


def data_problems(cfg: DictConfig, pilot: PreTrainedConfig, data: TCopilotDataModule) -> list[str]:
    """Problems that the prepared rows show: no rows to score, texts longer than the model."""
    problems, summary = [], data.summary()
    for key in ("select_on", "report_on"):
        split = cfg.evaluation[key]
        problems += [
            f"evaluation.{key}={split}: {name} has no {split} rows; there are "
            f"{', '.join(part for part in summary if part.startswith(f'{name}/'))}"
            for name in data.benchmark_names
            if f"{name}/{split}" not in summary
        ]
    longest = {part: int(max(split[f"{part}_max"] for split in summary.values())) for part in ("source", "target")}
    needed = max(longest.values()) if pilot.is_encoder_decoder else sum(longest.values())
    limit = getattr(pilot, "max_position_embeddings", None)
    if limit is not None and needed > limit:
        problems.append(
            f"the longest prompt ({longest['source']} tokens) and target ({longest['target']}) exceed the Pilot's "
            f"{limit} positions; set data.max_source_length, data.max_target_length and data.overflow=truncate"
        )
    return problems


def memory_problems(cfg: DictConfig, pilot: ModelSource, data: TCopilotDataModule, log: MistakeLog) -> list[str]:
    """A Mistake Log that would not fit into memory once it is full."""
    needed, free = log_bytes(cfg, pilot, data, log), psutil.virtual_memory().available
    if needed <= free:
        return []
    return [
        f"a full Mistake Log takes about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; lower "
        f"mistake_log.log.capacity_rounds={log.capacity_rounds}, set mistake_log.log.max_bytes, or keep less "
        f"of p̂ with log_storage@mistake_log.log.storage=topk"
    ]


def log_bytes(cfg: DictConfig, pilot: ModelSource, data: TCopilotDataModule, log: MistakeLog) -> int:
    """Bytes of a full Mistake Log, from the mean lengths of the training rows; of a stream, the validation rows."""
    config = pilot.model_config
    split = "validation" if data.streaming else "train"
    rows = [part for name, part in data.summary().items() if name.endswith(f"/{split}")]
    count = sum(part["rows"] for part in rows) or 1
    source, target = (
        sum(part[f"{what}_mean"] * part["rows"] for part in rows) / count for what in ("source", "target")
    )
    vector = config.hidden_size * log.dtype.itemsize
    token = vector + log.storage.bytes_per_token(config.vocab_size) + 9
    record = source * (vector + 1) + target * token
    rounds = min(log.capacity_rounds, data.total_rounds)
    total = int(record * data.batch_size * rounds)
    return total if log.max_bytes is None else min(total, log.max_bytes)


def _trainer(cfg: DictConfig) -> Iterator[str]:
    precision, strategy, devices = (str(cfg.trainer[key]) for key in ("precision", "strategy", "devices"))
    if precision == "16-mixed":
        yield (
            "trainer.precision=16-mixed: with two optimisers the loss scaler may unscale by another factor than it "
            "scaled with, and gradients are clipped before they are unscaled; use bf16-mixed or 32-true"
        )
    elif precision not in PRECISIONS:
        yield f"trainer.precision={precision}: use one of {', '.join(PRECISIONS)}"
    if strategy not in STRATEGIES:
        yield (
            f"trainer.strategy={strategy}: two optimisers are stepped by hand, which DeepSpeed and FSDP do not allow; "
            f"use one of {', '.join(STRATEGIES)}"
        )
    if devices == "0":
        yield "trainer.devices=0: must be at least 1"
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        yield (
            f"trainer.accelerator={cfg.trainer.accelerator}: torch finds no CUDA device on this machine; use "
            f"trainer=cpu, or install a torch built for CUDA"
        )
    if _processes(cfg) > 1 and _is_plain_multirun():
        yield (
            f"--multirun with trainer.devices={devices}: every process would run the whole sweep by itself, and "
            f"different jobs would average their gradients; start one program per job, or use a launcher that does"
        )
    for name in ("wandb", "tensorboard"):
        if name in cfg.logger and importlib.util.find_spec(name) is None:
            yield f"logger={name}: the package is not installed; pip install {name}, or use logger=csv"


def _numbers(cfg: DictConfig) -> Iterator[str]:
    for key in (*COUNTS, *COUNTS_OR_NULL):
        value = OmegaConf.select(cfg, key)
        if key == "data.rounds" and value == cfg.rounds:
            continue
        if value is None and (key in COUNTS_OR_NULL or OmegaConf.select(cfg, key.split(".")[0] + ".enabled") is False):
            continue
        if not _is_whole(value) or value < 1:
            yield f"{key}={value}: must be a whole number, at least 1"
    for key in POSITIVE_OR_NULL:
        value = OmegaConf.select(cfg, key)
        if value is not None and not (_is_number(value) and value > 0):
            yield f"{key}={value}: must be a number above 0"
    if cfg.data.rounds is None and cfg.data.epochs is None:
        yield "rounds=null and data.epochs=null: training needs a budget; give one of them"


def _choices(cfg: DictConfig) -> Iterator[str]:
    for key, allowed in CHOICES.items():
        node, _, name = key.rpartition(".")
        parent = OmegaConf.select(cfg, node) if node else cfg
        if parent is not None and name in parent:
            yield from _one_of(key, parent[name], allowed)


def _batches(cfg: DictConfig) -> Iterator[str]:
    batch, micro, ranks = cfg.data.batch_size, cfg.pilot.micro_batch_size, _processes(cfg)
    if not _is_whole(batch) or batch < 1:
        return
    if batch % ranks:
        yield f"data.batch_size={batch} does not divide over {ranks} processes; change it or trainer.devices"
    elif _is_whole(micro) and micro > 0 and (batch // ranks) % micro:
        yield (
            f"pilot.micro_batch_size={micro} does not divide data.batch_size={batch} over {ranks} process(es); "
            f"choose a divisor of {batch // ranks}"
        )


def _evaluation(cfg: DictConfig) -> Iterator[str]:
    weight = cfg.fusion.weight
    values = weight if isinstance(weight, ListConfig) else [weight]
    if weight != "auto" and (not values or not all(_is_number(value) for value in values)):
        yield f"fusion.weight={weight}: give a number, a list of numbers or auto"
    elif weight != "auto" and min(values) < 0:
        yield f"fusion.weight={weight}: λ must be 0 (the Pilot) or positive"
    yield from _one_of("fusion.space", cfg.fusion.space, FUSIONS)
    yield from _one_of("fusion.feedback", cfg.fusion.feedback, FEEDBACKS)
    for key in ("num_beams", "max_new_tokens", "batch_size"):
        value = cfg.evaluation[key]
        if not (value is None and key == "max_new_tokens") and (not _is_whole(value) or value < 1):
            yield f"evaluation.{key}={value}: must be a whole number, at least 1"
    if cfg.evaluation.select_on != "validation":
        yield (
            f"evaluation.select_on={cfg.evaluation.select_on}: λ is chosen on validation rows, never on the rows that "
            f"are reported; use validation"
        )
    yield from _one_of("evaluation.report_on", cfg.evaluation.report_on, ("test", "validation"))


def _learners(cfg: DictConfig) -> Iterator[str]:
    adapted = "_target_" in (cfg.pilot.adapter or {})
    if cfg.pilot.frozen and adapted:
        yield "pilot.frozen=true with an adapter: it would never be trained; use adapter@pilot.adapter=none"
    if cfg.pilot.dtype != "float32" and not (cfg.pilot.frozen or adapted):
        yield (
            f"pilot.dtype={cfg.pilot.dtype}: weights that are trained must be float32 (trainer.precision=bf16-mixed "
            f"computes in bfloat16 all the same); use pilot.dtype=float32, or adapter@pilot.adapter=lora"
        )
    if cfg.pilot.frozen and cfg.control:
        yield f"control={cfg.control} with pilot.frozen=true: a frozen Pilot cannot be trained alone; use control=null"
    if not cfg.copilot.enabled:
        if cfg.pilot.frozen:
            yield "pilot.frozen=true with copilot=none: nothing would be trained"
        if cfg.control:
            yield f"control={cfg.control} with copilot=none: the run itself is the Pilot alone; use control=null"


def _copilot_options(cfg: DictConfig) -> Iterator[str]:
    if cfg.copilot.enabled:
        share = cfg.copilot.own_feedback
        if not _is_number(share) or not 0 <= share <= 1:
            yield f"copilot.own_feedback={share}: a probability lies in [0, 1]"


def _adapter_problems(cfg: DictConfig, key: str, config: PreTrainedConfig) -> list[str]:
    node = cfg[key].adapter
    if "_target_" not in (node or {}):
        return []

    def check() -> None:
        adapter = instantiate(node, _convert_="all")
        if isinstance(adapter, Lora):
            adapter.check(families.skeleton(config) if key == "pilot" else families.skeleton(config).get_decoder())

    return _collect(f"{key}.adapter", check)


def _processes(cfg: DictConfig) -> int:
    """Number of processes that the trainer will start, as far as the config says so."""
    devices, nodes = cfg.trainer.devices, int(cfg.trainer.get("num_nodes", 1))
    if isinstance(devices, ListConfig):
        return max(1, len(devices)) * nodes
    if str(devices).isdigit():
        return max(1, int(devices)) * nodes
    return (max(1, torch.cuda.device_count()) if cfg.trainer.accelerator in ("gpu", "cuda", "auto") else 1) * nodes


def _is_plain_multirun() -> bool:
    if not HydraConfig.initialized():
        return False
    hydra = HydraConfig.get()
    return hydra.mode == RunMode.MULTIRUN and hydra.launcher._target_.endswith(".BasicLauncher")


def _fits(layers: Any, depth: int) -> bool:
    if layers is None:
        return True
    return 1 <= layers <= depth if _is_whole(layers) else isinstance(layers, float) and 0 < layers <= 1


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(key: str, value: Any, allowed: Any) -> Iterator[str]:
    if value not in list(allowed):
        yield f"{key}={value}: use one of {', '.join('null' if name is None else str(name) for name in allowed)}"


def _collect(key: str, check: Callable[[], None]) -> list[str]:
    """Run a check and return what it complains of, under a config key unless it names one itself."""
    try:
        check()
    except ModelSourceError as error:
        return [str(error)]
    except (ValueError, TypeError) as error:
        return [f"{key}: {error}"]
    return []
