"""Refuse what cannot work before weights load: every problem at once, each with key, value and mend."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psutil
from omegaconf import DictConfig
from transformers import PreTrainedConfig

from tcopilot import families
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


class ConfigError(ValueError):
    """The config cannot work; `problems` holds one message per problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        heading = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{heading} in the config or data:", *(f"  - {p}" for p in problems)]))


def config_problems(cfg: DictConfig, pilot: ModelSource, donor: ModelSource | None) -> list[str]:
    """Problems that the composed config shows by itself (model configs are read, weights are not)."""
    problems: list[str] = []
    for check in (_trainer, _fusion, _batches, _copilot_options):
        problems += check(cfg)
    problems += _collect(lambda: families.check_family(pilot.model_config))
    if donor is not None:
        problems += _collect(lambda: _check_donor(pilot.model_config, donor.model_config))
    return problems


def data_problems(cfg: DictConfig, pilot: ModelSource, data: TCopilotDataModule, log: MistakeLog | None) -> list[str]:
    """Problems that the prepared rows show: texts longer than the model, a log larger than memory."""
    problems = []
    summary = data.summary().values()
    longest = {part: int(max(split[f"{part}_max"] for split in summary)) for part in ("source", "target")}
    needed = max(longest.values()) if pilot.is_encoder_decoder else sum(longest.values())
    limit = getattr(pilot.model_config, "max_position_embeddings", None)
    if limit is not None and needed > limit:
        problems.append(
            f"the longest prompt ({longest['source']} tokens) and target ({longest['target']}) exceed the Pilot's "
            f"{limit} positions; set data.max_source_length, data.max_target_length and data.overflow=truncate"
        )
    if log is not None:
        needed_bytes, free = log_bytes(cfg, pilot, data, log), psutil.virtual_memory().available
        if needed_bytes > free:
            problems.append(
                f"a full Mistake Log takes about {needed_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; lower "
                f"mistake_log.log.capacity_rounds={log.capacity_rounds}, set mistake_log.log.max_bytes, or keep less "
                f"of p̂ with log_storage@mistake_log.log.storage=topk"
            )
    return problems


def log_bytes(cfg: DictConfig, pilot: ModelSource, data: TCopilotDataModule, log: MistakeLog) -> int:
    """Bytes of a full Mistake Log, from the mean lengths of the training rows."""
    config = pilot.model_config
    rows = [split for name, split in data.summary().items() if name.endswith("/train")]
    count = sum(split["rows"] for split in rows) or 1
    source, target = (
        sum(split[f"{part}_mean"] * split["rows"] for split in rows) / count for part in ("source", "target")
    )
    vector = config.hidden_size * log.dtype.itemsize
    token = vector + log.storage.bytes_per_token(config.vocab_size) + 9
    record = source * (vector + 1) + target * token
    rounds = min(log.capacity_rounds, data.total_rounds)
    total = int(record * data.batch_size * rounds)
    return total if log.max_bytes is None else min(total, log.max_bytes)


def _trainer(cfg: DictConfig) -> Iterator[str]:
    precision, strategy = str(cfg.trainer.precision), str(cfg.trainer.strategy)
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


def _fusion(cfg: DictConfig) -> Iterator[str]:
    weight = cfg.fusion.weight
    if weight != "auto":
        values = [weight] if isinstance(weight, int | float) else weight
        if isinstance(weight, str) or not values:
            yield f"fusion.weight={weight}: give a number, a list of numbers or auto"
        elif any(not isinstance(value, int | float) or value < 0 for value in values):
            yield f"fusion.weight={weight}: λ must be 0 (the Pilot) or positive"
    yield from _one_of("fusion.space", cfg.fusion.space, FUSIONS)
    yield from _one_of("fusion.feedback", cfg.fusion.feedback, FEEDBACKS)


def _batches(cfg: DictConfig) -> Iterator[str]:
    for key, value in {
        "rounds": cfg.rounds,
        "data.batch_size": cfg.data.batch_size,
        "pilot.micro_batch_size": cfg.pilot.micro_batch_size,
        "copilot.batch_size": cfg.copilot.get("batch_size"),
        "copilot.steps_per_round": cfg.copilot.get("steps_per_round"),
    }.items():
        if value is not None and value < 1:
            yield f"{key}={value}: must be at least 1"
    devices = str(cfg.trainer.devices)
    ranks = int(devices) * int(cfg.trainer.get("num_nodes", 1)) if devices.isdigit() else 1
    if cfg.data.batch_size % ranks:
        yield (
            f"data.batch_size={cfg.data.batch_size} does not divide over {ranks} processes; "
            f"change it or trainer.devices"
        )
    micro = cfg.pilot.micro_batch_size
    if micro and micro > 0 and (cfg.data.batch_size // ranks) % micro:
        yield (
            f"pilot.micro_batch_size={micro} does not divide data.batch_size={cfg.data.batch_size} over {ranks} "
            f"process(es); choose a divisor of {cfg.data.batch_size // ranks}"
        )


def _copilot_options(cfg: DictConfig) -> Iterator[str]:
    if not cfg.copilot.enabled:
        if cfg.pilot.frozen:
            yield "pilot.frozen=true with copilot=none: nothing would be trained"
        return
    for name, allowed in {
        "head": HEADS, "pattern": PATTERNS, "pooling": POOLINGS, "context": CONTEXTS, "positions": POSITIONS,
        "error_input": ("embedding", "normal"),
    }.items():  # fmt: skip
        yield from _one_of(f"copilot.{name}", cfg.copilot[name], allowed)
    if not 0 <= cfg.copilot.own_feedback <= 1:
        yield f"copilot.own_feedback={cfg.copilot.own_feedback}: a probability lies in [0, 1]"


def _check_donor(pilot: PreTrainedConfig, donor: PreTrainedConfig) -> None:
    families.check_family(donor)
    if pilot.model_type != donor.model_type or pilot.vocab_size != donor.vocab_size:
        raise ValueError(
            f"copilot.path: {donor.model_type} with {donor.vocab_size} tokens cannot read a {pilot.model_type} Pilot "
            f"with {pilot.vocab_size} tokens; choose a checkpoint of the same family and vocabulary"
        )


def _one_of(key: str, value: object, allowed: object) -> Iterator[str]:
    if value not in allowed:
        yield f"{key}={value}: use one of {', '.join(map(str, allowed))}"


def _collect(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except (families.UnsupportedFamilyError, ModelSourceError, ValueError) as error:
        return [str(error)]
    return []
