"""What a composed config shows by itself: every problem at once, each with key, value and mend.

What models and data show before weights load stands in `preflight.py`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from tcopilot.copilot import PATTERNS, POSITIONS
from tcopilot.decoding import FEEDBACKS
from tcopilot.evaluation.evaluate import MODES
from tcopilot.evaluation.recommendation import RANKINGS
from tcopilot.functional import POOLINGS
from tcopilot.fusion import FUSIONS
from tcopilot.heads import HEADS
from tcopilot.log_attention import CONTEXTS

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
COUNTS = (
    "data.batch_size", "data.eval_batch_size", "copilot.batch_size", "copilot.steps_per_round",
    "mistake_log.every_n_rounds", "callbacks.checkpoint.keep", "trainer.val_check_interval",
)  # fmt: skip
COUNTS_OR_NULL = (
    "rounds", "data.rounds", "data.max_train_rows", "data.max_eval_rows", "data.max_source_length",
    "data.max_target_length", "pilot.micro_batch_size", "callbacks.checkpoint.every_n_rounds",
)  # fmt: skip
POSITIVE = ("pilot.optimizer.lr", "copilot.optimizer.lr")
POSITIVE_OR_NULL = ("data.epochs", "pilot.clip", "copilot.clip")


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
    if _processes(cfg) > 1:
        yield (
            f"trainer.devices={devices}: one run trains in one process so far (logs, checkpoints and evaluation of "
            f"several are not divided yet); use trainer.devices=1"
        )
    for name in ("wandb", "tensorboard"):
        if name in cfg.logger and importlib.util.find_spec(name) is None:
            yield f"logger={name}: the package is not installed; pip install {name}, or use logger=csv"


def _numbers(cfg: DictConfig) -> Iterator[str]:
    for key in (*COUNTS, *COUNTS_OR_NULL):
        value = OmegaConf.select(cfg, key, default=1)  # a part that is not there has nothing to check
        if key == "data.rounds" and value == cfg.rounds:
            continue
        if not (value is None and key in COUNTS_OR_NULL) and (not is_whole(value) or value < 1):
            yield f"{key}={value}: must be a whole number, at least 1"
    for key in (*POSITIVE, *POSITIVE_OR_NULL):
        value = OmegaConf.select(cfg, key, default=1)  # a part that is not there has nothing to check
        if not (value is None and key in POSITIVE_OR_NULL) and not (_is_number(value) and value > 0):
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
    if not is_whole(batch) or batch < 1:
        return
    if batch % ranks:
        yield f"data.batch_size={batch} does not divide over {ranks} processes; change it or trainer.devices"
    elif is_whole(micro) and micro > 0 and (batch // ranks) % micro:
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
    if weight == "auto" and cfg.fusion.space == "logits":
        yield "fusion.weight=auto: λ* in closed form belongs to fusion.space=probability; give numbers for logits"
    yield from _one_of("fusion.space", cfg.fusion.space, FUSIONS)
    yield from _one_of("fusion.feedback", cfg.fusion.feedback, FEEDBACKS)
    modes = cfg.evaluation.modes
    if not isinstance(modes, ListConfig) or not modes or not set(modes) <= set(MODES):
        yield f"evaluation.modes={modes}: give a list of {', '.join(MODES)}"
    yield from _one_of("evaluation.ranking", cfg.evaluation.ranking, RANKINGS)
    for key in ("num_beams", "max_new_tokens", "batch_size", "ranking_beams"):
        value = cfg.evaluation[key]
        if not (value is None and key == "max_new_tokens") and (not is_whole(value) or value < 1):
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
        given = cfg.copilot.own_feedback
        shares = given if isinstance(given, ListConfig) else [given]
        if len(shares) > 2 or not all(_is_number(share) and 0 <= share <= 1 for share in shares):
            yield f"copilot.own_feedback={given}: give a probability in [0, 1], or two to move between over the run"


def _processes(cfg: DictConfig) -> int:
    """Number of processes that the trainer will start, as far as the config says so."""
    devices, nodes = cfg.trainer.devices, int(cfg.trainer.get("num_nodes", 1))
    if isinstance(devices, ListConfig):
        return max(1, len(devices)) * nodes
    if str(devices).isdigit():
        return max(1, int(devices)) * nodes
    return (max(1, torch.cuda.device_count()) if cfg.trainer.accelerator in ("gpu", "cuda", "auto") else 1) * nodes


def is_whole(value: Any) -> bool:
    """Whether a config value is a whole number; `true` is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(key: str, value: Any, allowed: Any) -> Iterator[str]:
    if value not in list(allowed):
        yield f"{key}={value}: use one of {', '.join('null' if name is None else str(name) for name in allowed)}"
