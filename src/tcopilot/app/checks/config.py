"""What a composed config shows by itself: every problem at once, each with key, value and mend.

What models and data show before weights load stands in `preflight.py`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from tcopilot.evaluation.evaluate import DECODINGS, MODES, PER
from tcopilot.evaluation.ranking import RANKINGS
from tcopilot.functional import POOLINGS
from tcopilot.mistake_log.log import ROWS
from tcopilot.models.copilot import PATTERNS, POSITIONS, READS
from tcopilot.models.decoding import FEEDBACKS
from tcopilot.models.fusion import FusionRule, build_fusion
from tcopilot.models.gates import GATES
from tcopilot.models.heads import HEADS
from tcopilot.models.log_attention import CONTEXTS

PRECISIONS = ("32-true", "bf16-mixed")
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps", "tpu")
DTYPES = ("float32", "bfloat16", "float16")
CONTROLS = ("equal_time", "equal_flops", "averaged", "equal_parameters")
SECTIONS = (
    "pilot", "copilot", "data", "data.benchmarks", "mistake_log", "mistake_log.log", "fusion", "evaluation",
    "trainer", "callbacks", "logger", "paths",
)  # fmt: skip
PARTS = {  # what is built from a config of its own, and the group that it is chosen from
    "pilot.optimizer": "optimizer@pilot.optimizer",
    "pilot.scheduler": "scheduler@pilot.scheduler",
    "pilot.adapter": "adapter@pilot.adapter",
    "copilot.optimizer": "optimizer@copilot.optimizer",
    "copilot.scheduler": "scheduler@copilot.scheduler",
    "copilot.adapter": "adapter@copilot.adapter",
    "mistake_log.log.policy": "mistake_log",
    "mistake_log.log.storage": "log_storage@mistake_log.log.storage",
    "objective": "objective",
    "fusion.rule": "fusion",
    "trainer": "trainer",
    "data": "data",
}
FLAGS = (
    "pilot.frozen", "pilot.gradient_checkpointing", "copilot.enabled", "copilot.gradient_checkpointing",
    "copilot.train_error_input", "data.streaming", "data.group_by_length", "trainer.enable_progress_bar",
    "evaluation.compile",
)  # fmt: skip
FIXED = {  # what the joint round leaves no choice in
    "trainer.max_epochs": (1, "one Lightning epoch is the whole budget; set rounds"),
    "trainer.min_epochs": (0, "more would keep a clean stop from ending the run"),
    "trainer.enable_checkpointing": (False, "callbacks.checkpoint writes the states"),
    "trainer.use_distributed_sampler": (False, "the data module divides batches among processes"),
}
FOREIGN = {  # what Lightning offers and a budget of rounds with two optimisers cannot use
    "max_steps": "set rounds",
    "limit_train_batches": "set rounds",
    "overfit_batches": "set data.max_train_rows, or use debug=overfit",
    "fast_dev_run": "use debug=fdr",
    "barebones": "use logger=csv",
    "accumulate_grad_batches": "set pilot.micro_batch_size",
    "gradient_clip_val": "set pilot.clip and copilot.clip",
    "gradient_clip_algorithm": "set pilot.clip and copilot.clip",
}
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
    "mistake_log.log.rows": ROWS,
    "mistake_log.log.storage.dtype": DTYPES,
}
COUNTS = (
    "data.batch_size", "data.eval_batch_size", "copilot.batch_size", "copilot.steps_per_round",
    "mistake_log.every_n_rounds", "callbacks.checkpoint.keep", "trainer.val_check_interval", "trainer.num_nodes",
    "data.shuffle_buffer",
)  # fmt: skip
COUNTS_OR_NULL = (
    "rounds", "data.rounds", "data.max_train_rows", "data.max_eval_rows", "data.max_source_length",
    "data.max_target_length", "pilot.micro_batch_size", "callbacks.checkpoint.every_n_rounds",
)  # fmt: skip
POSITIVE = ("pilot.optimizer.lr", "copilot.optimizer.lr")
POSITIVE_OR_NULL = ("data.epochs", "pilot.clip", "copilot.clip")
WHOLE = ("mistake_log.log.capacity_rounds", "mistake_log.log.storage.k")  # their classes say how small they may be
SEEDS = ("seed", "data.seed", "mistake_log.log.seed")
RANGES = {  # numbers between two bounds, and whether they must be whole
    **dict.fromkeys(SEEDS, (0, 2**32 - 1, True)),
    "data.num_workers": (0, math.inf, True),
    "trainer.log_every_n_steps": (0, math.inf, True),
    "trainer.num_sanity_val_steps": (-1, math.inf, True),
    **{
        f"{name}.{key}": (0, largest, False)
        for name in ("pilot", "copilot")
        for key, largest in (
            ("optimizer.weight_decay", math.inf),
            ("scheduler.num_warmup_steps", math.inf),
            ("scheduler.min_lr_rate", 1),
        )
    },
}


class ConfigError(ValueError):
    """The config cannot work; `problems` holds one message per problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        heading = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{heading} in the config or data:", *(f"  - {p}" for p in problems)]))


def fusion_rule(node: DictConfig) -> FusionRule:
    """The fusion rule that the config's `fusion` group names; its class may be the user's own.

    Raises:
        ConfigError: if it names none.
    """
    if (space := node.get("space")) is not None:
        raise ConfigError([
            f"fusion.space={space}: was replaced by the group fusion, whose files name a class in rule._target_; use "
            f"fusion=<name>, one of probability, logits or a file of your own in configs/fusion"
        ])  # fmt: skip
    rule = node.get("rule")
    try:
        return build_fusion(OmegaConf.to_container(rule, resolve=True) if rule else rule, may_import=True)
    except ValueError as error:
        raise ConfigError([str(error)]) from error


def refuse_missing(cfg: DictConfig) -> None:
    """Refuse a config with mandatory values left open (`???`) or that refer to nothing (`${nothing}`).

    Nothing else can be judged before they are given.

    Raises:
        ConfigError: naming every open key, or the first one that refers to nothing.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if not missing:
            OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError([f"{error.full_key}: {reason}; give {error.full_key}=<value>"]) from error
    if missing:
        raise ConfigError([f"{key} is not set: give {key}=<value>" for key in missing])


def refuse_misshapen(cfg: DictConfig) -> None:
    """Refuse a config with a value where a group of keys is expected; nothing else can be judged then.

    Raises:
        ConfigError: naming every such key.
    """
    if problems := list(_shape(cfg)):
        raise ConfigError(problems)


def config_problems(cfg: DictConfig) -> list[str]:
    """Problems that the composed config shows by itself, without any model or data."""
    checks = (
        *(_names, _flags, _trainer, _loops, _numbers, _ranges, _choices),
        *(_batches, _evaluation, _learners, _controls, _copilot_options),
    )
    return [problem for check in checks for problem in _guarded(check, cfg)]


def evaluation_problems(cfg: DictConfig) -> list[str]:
    """The part of `config_problems` that an evaluation without training depends on."""
    return [problem for check in (_names, _evaluation) for problem in _guarded(check, cfg)]


def _guarded(check: Callable[[DictConfig], Iterator[str]], cfg: DictConfig) -> Iterator[str]:
    """Turn a key that was deleted into a problem."""
    try:
        yield from check(cfg)
    except (ConfigAttributeError, ConfigKeyError) as error:
        yield f"{error.full_key} is not in the config: do not delete it, give {error.full_key}=<value>"


def _shape(cfg: DictConfig) -> Iterator[str]:
    bad: list[str] = []
    for key in dict.fromkeys((*SECTIONS, *PARTS)):
        parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        if not isinstance(parent, DictConfig) or (key.startswith("copilot.") and not cfg.copilot.get("enabled")):
            continue  # told by the parent, or there is nothing to build
        node, group = parent.get(key.rpartition(".")[2]), PARTS.get(key, key)
        fits = isinstance(node, DictConfig) and (key not in PARTS or "_target_" in node)
        if fits or (key.endswith(".adapter") and (node is None or node == {})):
            continue
        choice = f"{group}={node}" if isinstance(node, str) else f"{group}=<name>"
        bad.append(key)
        yield f"{key}={node}: expected a group of keys, not a value; to choose one write {choice}"
    for key in ("callbacks", "logger"):
        for name, node in cfg[key].items() if key not in bad else ():
            if node is not None and not (isinstance(node, DictConfig) and "_target_" in node):
                yield f"{key}.{name}={node}: expected a group of keys with _target_, the class to build, or null"


def _names(cfg: DictConfig) -> Iterator[str]:
    name = cfg.name
    if not isinstance(name, str) or not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
        yield f"name={name}: it becomes a folder under runs/; give a name without .. and without a leading /"
    if OmegaConf.is_interpolation(cfg.paths, "run_dir"):
        return  # Hydra's own folder, before Hydra has one
    folder = cfg.paths.run_dir
    if not isinstance(folder, str) or not folder:
        yield f"paths.run_dir={folder}: give the folder that the run writes to"
        return
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not there.is_dir():
        yield f"paths.run_dir={folder}: {there} is a file; give a folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"paths.run_dir={folder}: {there} cannot be written to; give another folder"


def _flags(cfg: DictConfig) -> Iterator[str]:
    for key in FLAGS:
        value = OmegaConf.select(cfg, key, default=True)
        if not isinstance(value, bool):
            yield f"{key}={value}: give true or false"


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
    elif not _is_devices(cfg.trainer.devices):
        yield f"trainer.devices={devices}: give a number of devices, a list of their numbers, -1 (all) or auto"
    yield from _one_of("trainer.accelerator", cfg.trainer.accelerator, ACCELERATORS)
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        yield (
            f"trainer.accelerator={cfg.trainer.accelerator}: torch finds no CUDA device on this machine; use "
            f"trainer=cpu, or install a torch built for CUDA"
        )
    if process_count(cfg) > 1 and strategy == "auto":
        yield f"trainer.devices={devices} with trainer.strategy=auto: several processes need trainer.strategy=ddp"
    if not isinstance(cfg.compile, bool) and cfg.compile not in torch.compiler.list_backends(exclude_tags=None):
        known = ", ".join(torch.compiler.list_backends())
        yield f"compile={cfg.compile}: give true, false or a backend of torch.compile ({known})"
    for name in ("wandb", "tensorboard"):
        if name in cfg.logger and importlib.util.find_spec(name) is None:
            yield f"logger={name}: the package is not installed; pip install {name}, or use logger=csv"


def _loops(cfg: DictConfig) -> Iterator[str]:
    """Settings of Lightning's loops: validation, and what the joint round decides itself."""
    share = cfg.trainer.limit_val_batches
    if share is not None and not (_is_number(share) and share >= 0 and (is_whole(share) or share <= 1)):
        yield f"trainer.limit_val_batches={share}: give a number of batches, or a share in [0.0, 1.0]"
    for key, (only, why) in FIXED.items():
        value = OmegaConf.select(cfg, key, default=only)
        if value is None or type(value) is not type(only) or value != only:
            yield f"{key}={value}: must be {str(only).lower()}: {why}"
    for name, mend in FOREIGN.items():
        if cfg.trainer.get(name) is not None:
            yield f"trainer.{name}={cfg.trainer[name]}: training is a budget of rounds, stepped by hand; {mend}"


def _numbers(cfg: DictConfig) -> Iterator[str]:
    for key in (*COUNTS, *COUNTS_OR_NULL):
        value = OmegaConf.select(cfg, key, default=1)  # a part that is not there has nothing to check
        if key == "data.rounds" and str(value) == str(cfg.rounds):
            continue  # told as rounds
        if not (value is None and key in COUNTS_OR_NULL) and (not is_whole(value) or value < 1):
            yield f"{key}={value}: must be a whole number, at least 1"
    for key in (*POSITIVE, *POSITIVE_OR_NULL):
        value = OmegaConf.select(cfg, key, default=1)  # a part that is not there has nothing to check
        if not (value is None and key in POSITIVE_OR_NULL) and not (_is_number(value) and value > 0):
            yield f"{key}={value}: must be a number above 0"
    if cfg.data.rounds is None and cfg.data.epochs is None:
        yield "rounds=null and data.epochs=null: training needs a budget; give one of them"


def _ranges(cfg: DictConfig) -> Iterator[str]:
    for key in WHOLE:
        value = OmegaConf.select(cfg, key, default=1)
        if not is_whole(value):
            yield f"{key}={value}: must be a whole number, at least 1"
    most = OmegaConf.select(cfg, "mistake_log.log.max_bytes")
    if most is not None and not is_whole(most):
        yield f"mistake_log.log.max_bytes={most}: give a positive number of bytes, or null for no limit"
    for key, (low, high, whole) in RANGES.items():
        value = OmegaConf.select(cfg, key, default=low)
        if key in SEEDS[1:] and str(value) == str(cfg.seed):
            continue  # told as seed
        if not (_is_number(value) and low <= value <= high and (is_whole(value) or not whole)):
            bounds = f"from {low} to {high}" if high < math.inf else f"at least {low}"
            yield f"{key}={value}: must be a {'whole ' if whole else ''}number, {bounds}"


def _choices(cfg: DictConfig) -> Iterator[str]:
    for key, allowed in CHOICES.items():
        node, _, name = key.rpartition(".")
        parent = OmegaConf.select(cfg, node) if node else cfg
        if parent is not None and name in parent:
            yield from _one_of(key, parent[name], allowed)


def _batches(cfg: DictConfig) -> Iterator[str]:
    batch, micro, ranks = cfg.data.batch_size, cfg.pilot.micro_batch_size, process_count(cfg)
    if not is_whole(batch) or batch < 1:
        return
    if batch % ranks:
        yield f"data.batch_size={batch} does not divide over {ranks} processes; change it or trainer.devices"
    elif is_whole(micro) and micro > 0 and (batch // ranks) % micro:
        yield (
            f"pilot.micro_batch_size={micro} does not divide data.batch_size={batch} over {ranks} process(es); "
            f"choose a divisor of {batch // ranks}"
        )
    records = cfg.copilot.get("batch_size")
    if cfg.copilot.enabled and is_whole(records) and records % ranks and not batch % ranks:
        yield f"copilot.batch_size={records} does not divide over {ranks} processes; change it or trainer.devices"


def _evaluation(cfg: DictConfig) -> Iterator[str]:
    weight = cfg.fusion.weight
    values = weight if isinstance(weight, ListConfig) else [weight]
    if weight != "auto" and (not values or not all(_is_number(value) for value in values)):
        yield f"fusion.weight={weight}: give a number, a list of numbers or auto"
    elif weight != "auto" and min(values) < 0:
        yield f"fusion.weight={weight}: λ must be 0 (the Pilot) or positive"
    yield from _one_of("fusion.feedback", cfg.fusion.feedback, FEEDBACKS)
    per = cfg.fusion.get("per", "all")  # runs of before do not have it
    yield from _one_of("fusion.per", per, PER)
    try:
        rule = fusion_rule(cfg.fusion)
    except ConfigError as error:
        yield from error.problems
    else:
        name = type(rule).__name__
        if weight == "auto" and not rule.has_closed_form:
            yield f"fusion.weight=auto: {name} has no λ* in closed form; give numbers, or use fusion=probability"
        if per in GATES and not rule.takes_gates:
            yield (
                f"fusion.per={per}: a gate is fitted to squared error, which does not suit {name}; use fusion.per=all "
                f"or fusion=probability"
            )
    modes = cfg.evaluation.modes
    if not isinstance(modes, ListConfig) or not modes or not set(modes) <= set(MODES) or len(set(modes)) < len(modes):
        yield f"evaluation.modes={modes}: give a list of {', '.join(MODES)}"
    yield from _one_of("evaluation.ranking", cfg.evaluation.ranking, RANKINGS)
    yield from _one_of("evaluation.decoding", cfg.evaluation.decoding, DECODINGS)
    if cfg.evaluation.decoding == "static" and cfg.evaluation.num_beams != 1:
        yield (
            f"evaluation.decoding=static with evaluation.num_beams={cfg.evaluation.num_beams}: static caches decode "
            f"greedily only; set evaluation.num_beams=1 or evaluation.decoding=dynamic"
        )
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
    for key in ("pilot", "copilot"):
        optimizer = OmegaConf.select(cfg, f"{key}.optimizer._target_", default="")
        if str(optimizer).startswith("bitsandbytes.") and importlib.util.find_spec("bitsandbytes") is None:
            group = f"optimizer@{key}.optimizer"
            yield f"{group}=adamw_8bit: bitsandbytes is not installed; pip install bitsandbytes, or use {group}=adamw"
    adapted = "_target_" in (cfg.pilot.adapter or {})
    if cfg.pilot.frozen and adapted:
        yield "pilot.frozen=true with an adapter: it would never be trained; use adapter@pilot.adapter=none"
    if cfg.pilot.dtype != "float32" and not (cfg.pilot.frozen or adapted):
        yield (
            f"pilot.dtype={cfg.pilot.dtype}: weights that are trained must be float32 (trainer.precision=bf16-mixed "
            f"computes in bfloat16 all the same); use pilot.dtype=float32, or adapter@pilot.adapter=lora"
        )
    if cfg.pilot.frozen and cfg.pilot.path is None:
        yield "pilot.frozen=true with pilot.path=null: random weights would stay; give pilot.path=<model or export>"
    if cfg.pilot.frozen and not cfg.copilot.enabled:
        yield "pilot.frozen=true with copilot=none: nothing would be trained"


def control_names(given: Any) -> list[str]:
    """The controls that `control` asks for: null, a name or a list of names.

    >>> control_names(None), control_names("averaged")
    ([], ['averaged'])
    """
    if given is None:
        return []
    return list(given) if isinstance(given, ListConfig | list) else [given]


def _controls(cfg: DictConfig) -> Iterator[str]:
    names, given = control_names(cfg.control), f"control={cfg.control}"
    if any(isinstance(name, bool) or name not in CONTROLS for name in names) or len(set(names)) < len(names):
        yield f"{given}: use one or a list of null, {', '.join(CONTROLS)}"
        return
    if names and cfg.pilot.frozen:
        yield f"{given} with pilot.frozen=true: a frozen Pilot cannot be trained alone; use control=null"
    if names and not cfg.copilot.enabled:
        yield f"{given} with copilot=none: the run itself is the Pilot alone; use control=null"
    if cfg.callbacks.get("copilot_stop") is not None and not cfg.copilot.enabled:
        yield "callbacks.copilot_stop with copilot=none: there is no Copilot to stop; use callbacks=default"
    if "equal_flops" in names and cfg.callbacks.get("flops") is None:
        yield f"{given} without callbacks.flops: nobody would count the joint run's operations; use callbacks=default"
    widths = {"d_model", "hidden_size"} & set(cfg.pilot.config or {})
    if "equal_parameters" in names and (cfg.pilot.path or not widths):
        yield (
            f"{given} with pilot.path={cfg.pilot.path}: only a Pilot built from pilot.config, with its d_model or "
            f"hidden_size, can be made wider; a pretrained one cannot. Leave out equal_parameters"
        )


def _copilot_options(cfg: DictConfig) -> Iterator[str]:
    if cfg.data.held_out and cfg.mistake_log.log.rows != "all":
        yield (
            f"mistake_log.log.rows={cfg.mistake_log.log.rows} with data.held_out={cfg.data.held_out}: rows that are "
            f"held out are never trained on; use mistake_log.log.rows=all, or data.held_out=0"
        )
    if cfg.copilot.enabled:
        reads = cfg.copilot.reads
        if not isinstance(reads, ListConfig) or not reads or not set(reads) <= set(READS):
            yield f"copilot.reads={reads}: give a list of {', '.join(READS)}"
        dropout = cfg.copilot.dropout
        if dropout is not None and not (_is_number(dropout) and 0 <= dropout < 1):
            yield f"copilot.dropout={dropout}: give a number in [0, 1), or null for the checkpoint's own"
        given = cfg.copilot.own_feedback
        shares = given if isinstance(given, ListConfig) else [given]
        if not 1 <= len(shares) <= 2 or not all(_is_number(share) and 0 <= share <= 1 for share in shares):
            yield f"copilot.own_feedback={given}: give a probability in [0, 1], or two to move between over the run"


def process_count(cfg: DictConfig) -> int:
    """Number of processes that the trainer will start, as far as the config says so."""
    devices, nodes = cfg.trainer.devices, cfg.trainer.get("num_nodes", 1)
    nodes = nodes if is_whole(nodes) and nodes > 0 else 1  # told elsewhere
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


def _is_devices(value: Any) -> bool:
    if isinstance(value, ListConfig):
        return bool(value) and all(is_whole(number) and number >= 0 for number in value)
    parts = str(value).split(",")
    return not isinstance(value, bool | float) and (
        str(value) in ("auto", "-1") or all(part.strip().isdigit() for part in parts if part or len(parts) == 1)
    )


def _one_of(key: str, value: Any, allowed: Any) -> Iterator[str]:
    if isinstance(value, bool) or value not in list(allowed):
        yield f"{key}={value}: use one of {', '.join('null' if name is None else str(name) for name in allowed)}"
