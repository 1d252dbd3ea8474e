"""What a composed config shows by itself: every problem at once, each with key, value and mend.

Components declare rules for their own settings (`tcopilot.settings`), which are applied here. The checks that stand
here concern several components at once, or parts that other libraries build.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from tcopilot.app.checks.controls import control_problems, trains_frozen
from tcopilot.app.checks.problems import ConfigError, existing
from tcopilot.app.checks.quantised import quantization_problems
from tcopilot.app.checks.recordings import fits_from_recording, recording_problems
from tcopilot.app.checks.sharding import sharding_problems
from tcopilot.app.checks.unused import slips
from tcopilot.app.trainer import process_count, trainer_problems
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.modes import Decoding
from tcopilot.models.decoding import FEEDBACKS
from tcopilot.models.fusion import FusionRule, breach, build_fusion
from tcopilot.models.gates import GATES
from tcopilot.models.kinds import KINDS, learns, settings_of
from tcopilot.models.pilot import ModelSource
from tcopilot.models.quantization import QUANTIZATIONS
from tcopilot.run_directory import RunDirectory
from tcopilot.settings import ANY, FLAG, POSITIVE, SEED, Rule, is_whole, number, one_of, whole
from tcopilot.training.callbacks import MistakeLogCallback
from tcopilot.training.fit import CopilotFit
from tcopilot.training.learner import Learner
from tcopilot.training.module import TCopilotModule

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
LEARNER = {
    **dict.fromkeys(("path", "revision"), ANY),
    **{**ModelSource.SETTINGS, **Learner.SETTINGS, "gradient_checkpointing": FLAG},
}
OF_MODULE = TCopilotModule.SETTINGS
OPTIMIZER = {"lr": POSITIVE, "weight_decay": number()}
RECORDED = Rule(lambda value: isinstance(value, str) and value != "", "give the folder of a recording, or null")
SCHEDULER = {"num_warmup_steps": number(), "min_lr_rate": number(0, 1)}
RULES: dict[str, Mapping[str, Rule]] = {  # of groups that do not name their class; a class named has its own
    "": {
        **dict.fromkeys(("name", "resume", "trust", "compile", "traceback", "control", "version"), ANY),
        **dict.fromkeys(("run", "trace", "trace_rows"), ANY),  # of eval.py
        **{"seed": SEED, "rounds": whole().or_null()},
    },
    "paths": {"run_dir": ANY},
    "pilot": {
        **{**LEARNER, "config": ANY, "frozen": FLAG, "micro_batch_size": OF_MODULE["micro_batch_size"]},
        "quantization": one_of(QUANTIZATIONS).or_null(),
    },
    "copilot": {
        **{"enabled": FLAG, "kind": one_of(KINDS), "batch_size": OF_MODULE["copilot_batch_size"]},
        **{name: OF_MODULE[name] for name in ("steps_per_round", "own_feedback")},
        **CopilotFit.SETTINGS,
        **LEARNER,
    },
    "pilot.optimizer": OPTIMIZER,
    "copilot.optimizer": OPTIMIZER,
    "pilot.scheduler": SCHEDULER,
    "copilot.scheduler": SCHEDULER,
    "mistake_log": {**MistakeLogCallback.SETTINGS, "from": RECORDED.or_null()},
    "fusion": {**Evaluator.SETTINGS, "feedback": one_of(FEEDBACKS), "space": ANY},
    "evaluation": {**Decoding.SETTINGS, "report_on": one_of(("test", "validation"))},
}

COMPLETE = ("pilot", "copilot", "mistake_log", "fusion", "evaluation")  # groups of which no setting may be deleted


def fusion_rule(node: DictConfig) -> FusionRule:
    """The fusion rule that the config's `fusion` group names; its class may be the user's own."""
    if (space := node.get("space")) is not None:
        raise ConfigError([
            f"fusion.space={space}: was replaced by the group fusion, whose files name a class in rule._target_; use "
            f"fusion=<name>, one of probability, logits or a file of your own in configs/fusion"
        ])  # fmt: skip
    rule = node.get("rule")
    try:
        made = build_fusion(OmegaConf.to_container(rule, resolve=True) if rule else rule, may_import=True)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if not type(made).__module__.startswith("tcopilot.") and (wrong := breach(made)):
        raise ConfigError([f"fusion.rule._target_={rule._target_}: {wrong}"])
    return made


def refuse_missing(cfg: DictConfig) -> None:
    """Refuse a config with mandatory values left open (`???`) or that refer to nothing (`${nothing}`).

    Nothing else can be judged before they are given.
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


def config_problems(cfg: DictConfig, training: bool = True) -> list[str]:
    """Problems that the composed config shows by itself, without any model or data.

    An evaluation without training depends on a part of them only.
    """
    checks = [unread_keys, _settings, _folders, trainer_problems, _machine, _batches, _evaluation, _learners]
    checks += [quantization_problems, recording_problems, control_problems, sharding_problems]
    if not training:
        checks = [unread_keys, partial(_settings, sections=("fusion", "evaluation")), _folders, _evaluation]
    problems: list[str] = []
    for check in checks:
        try:
            problems += check(cfg)
        except (ConfigAttributeError, ConfigKeyError) as error:
            problems.append(_deleted(error.full_key))
        except ConfigError as error:
            problems += error.problems
    return list(dict.fromkeys(problems))


def _deleted(key: str) -> str:
    return f"{key} is not in the config: do not delete it, give {key}=<value>"


def unread_keys(cfg: DictConfig) -> Iterator[str]:
    """Say which keys nothing reads, in the groups that this package reads key by key."""
    groups = {key.rpartition(".")[::2] for key in (*SECTIONS, *PARTS)}
    rules = _rules(cfg)
    known = {key: {*rules[key], *(name for group, name in groups if group == key)} for key in ("", "paths", *COMPLETE)}
    return slips(cfg, known)


def unread_in_evaluation(cfg: DictConfig) -> Iterator[str]:
    """Say which keys `eval.py` does not read, since it takes these settings from the run."""
    if "_target_" not in cfg.data:
        for name in set(cfg.data) - {"path"}:
            yield f"data.{name}={cfg.data[name]}: read only with data=<name>; add the name of such a config"
    yield from slips(cfg, {"pilot": {"path"}, "copilot": {"path"}})


def values_for_groups(cfg: DictConfig) -> Iterator[str]:
    """Say where a value stands in place of a group of keys; nothing else can be judged then."""
    bad: list[str] = []
    for key in dict.fromkeys((*SECTIONS, *PARTS)):
        parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        if not isinstance(parent, DictConfig) or (key.startswith("copilot.") and not cfg.copilot.get("enabled")):
            continue  # the parent is reported, or there is nothing to build
        node, group = parent.get(key.rpartition(".")[2]), PARTS.get(key, key)
        fits = isinstance(node, DictConfig) and (key not in PARTS or "_target_" in node)
        if fits or (key.endswith(".adapter") and (node is None or node == {})):
            continue
        choice = f"{group}={node}" if isinstance(node, str) else f"{group}=<name>"
        bad.append(key)
        if key.endswith(".adapter") and isinstance(node, DictConfig):  # of a recipe, whose adapter was left out
            yield f"{key}={node}: these settings name no adapter; choose one ({group}=lora), or none with {key}=null"
            continue
        yield f"{key}={node}: expected a group of keys, not a value; to choose one write {choice}"
    for key in ("callbacks", "logger"):
        for name, node in cfg[key].items() if key not in bad else ():
            if node is not None and not (isinstance(node, DictConfig) and "_target_" in node):
                yield f"{key}.{name}={node}: expected a group of keys with _target_, the class to build, or null"


def _settings(cfg: DictConfig, sections: Sequence[str] = ()) -> Iterator[str]:
    """Apply the rules of every group, or of some. A wrong value that others refer to is reported where it stands."""
    all_rules = _rules(cfg)
    groups = [(key, OmegaConf.select(cfg, key) if key else cfg, all_rules[key]) for key in sections or RULES]
    if not sections:
        groups += [(key, node, _rules_of_class(node["_target_"])) for key, node in _groups(cfg) if "_target_" in node]
    for key, node, rules in groups:
        if key in COMPLETE and (key != "copilot" or node.get("enabled")):
            yield from (_deleted(f"{key}.{name}") for name in rules if name not in node)
    wrong = [
        (OmegaConf.is_interpolation(node, name), f"{key}.{name}" if key else name, rule.message(node[name]))
        for key, node, rules in groups
        for name, rule in (rules.items() if isinstance(node, DictConfig) else ())
        if rule is not ANY and name in node and not rule.allows(node[name])
    ]
    said: set[str] = set()
    for refers, key, message in sorted(wrong, key=itemgetter(0)):
        if not (refers and message in said):
            yield f"{key}={message}"
        said.add(message)


def _rules(cfg: DictConfig) -> Mapping[str, Mapping[str, Rule]]:
    """`RULES`, with those of the kind of Copilot at hand."""
    return {**RULES, "copilot": {**RULES["copilot"], **settings_of(cfg.copilot.get("kind"))}}


def _rules_of_class(target: str) -> Mapping[str, Rule]:
    try:
        return getattr(get_object(target), "SETTINGS", {})
    except Exception:  # whatever an import may raise is reported when the class is to be built
        return {}


def _groups(node: Any, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """All groups of keys in a config, with the dotted key of each."""
    if isinstance(node, DictConfig):
        yield key, node
        for name in node:
            # Hydra's own part has both: its folder before there is one, and values that only Hydra fills in.
            if not OmegaConf.is_interpolation(node, name) and not OmegaConf.is_missing(node, name):
                yield from _groups(node[name], f"{key}.{name}" if key else str(name))


def _folders(cfg: DictConfig) -> Iterator[str]:
    name = cfg.name
    if not isinstance(name, str) or not name.strip() or Path(name).is_absolute() or ".." in Path(name).parts:
        yield f"name={name}: it becomes a folder under runs/; give a name without .. and without a leading /"
    if OmegaConf.is_interpolation(cfg.paths, "run_dir"):
        return  # Hydra's own folder, before Hydra has one
    folder = cfg.paths.run_dir
    if not isinstance(folder, str) or not folder:
        yield f"paths.run_dir={folder}: give the folder that the run writes to"
        return
    there = existing(Path(folder))
    if not there.is_dir():
        yield f"paths.run_dir={folder}: {there} is a file; give a folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"paths.run_dir={folder}: {there} cannot be written to; give another folder"
    own, states = RunDirectory(folder).checkpoints, OmegaConf.select(cfg, "callbacks.checkpoint.folder")
    if states is not None and Path(states).absolute() != own.absolute():
        yield (
            f"callbacks.checkpoint.folder={states}: resume= looks for states in {own} only; leave it out, and give "
            f"paths.run_dir to write a run elsewhere"
        )


def _machine(cfg: DictConfig) -> Iterator[str]:
    """Packages and compilers that this installation lacks."""
    if not isinstance(cfg.compile, bool) and cfg.compile not in torch.compiler.list_backends(exclude_tags=None):
        known = ", ".join(torch.compiler.list_backends())
        yield f"compile={cfg.compile}: give true, false or a backend of torch.compile ({known})"
    for name in ("wandb", "tensorboard"):
        if name in cfg.logger and importlib.util.find_spec(name) is None:
            yield f"logger={name}: the package is not installed; pip install {name}, or use logger=csv"
    for key in ("pilot", "copilot"):
        optimizer = OmegaConf.select(cfg, f"{key}.optimizer._target_", default="")
        if str(optimizer).startswith("bitsandbytes.") and importlib.util.find_spec("bitsandbytes") is None:
            group = f"optimizer@{key}.optimizer"
            yield f"{group}=adamw_8bit: bitsandbytes is not installed; pip install bitsandbytes, or use {group}=adamw"


def _batches(cfg: DictConfig) -> Iterator[str]:
    if cfg.data.rounds is None and cfg.data.epochs is None:
        yield "rounds=null and data.epochs=null: training needs a budget; give one of them"
    if cfg.data.held_out and cfg.mistake_log.log.rows != "all":
        yield (
            f"mistake_log.log.rows={cfg.mistake_log.log.rows} with data.held_out={cfg.data.held_out}: the Pilot "
            f"never trains on held-out rows, so a first visit means nothing; use mistake_log.log.rows=all, or "
            f"data.held_out=0"
        )
    batch, micro, ranks = cfg.data.batch_size, cfg.pilot.micro_batch_size, process_count(cfg)
    if not is_whole(batch) or batch < 1:
        return
    if fits_from_recording(cfg) and not trains_frozen(cfg):  # no batch of a round is made; micro-batches are recorded
        batch = ranks * micro if is_whole(micro) else ranks
    if batch % ranks:
        yield f"data.batch_size={batch} cannot be divided evenly among {ranks} processes; change it or trainer.devices"
    elif is_whole(micro) and micro > 0 and (batch // ranks) % micro:
        yield (
            f"pilot.micro_batch_size={micro} does not divide data.batch_size={batch} over {ranks} process(es); "
            f"choose a divisor of {batch // ranks}"
        )
    records = cfg.copilot.get("batch_size")
    if cfg.copilot.enabled and is_whole(records) and records % ranks and not batch % ranks:
        mend = "change it or trainer.devices"
        yield f"copilot.batch_size={records} cannot be divided evenly among {ranks} processes; {mend}"


def _evaluation(cfg: DictConfig) -> Iterator[str]:
    rule = fusion_rule(cfg.fusion)
    if cfg.fusion.weight == "auto" and not rule.has_closed_form:
        name = type(rule).__name__
        yield f"fusion.weight=auto: {name} has no λ* in closed form; give numbers, or use fusion=probability"
    if cfg.fusion.per in GATES and not rule.takes_gates:
        yield (
            f"fusion.per={cfg.fusion.per}: a gate is fitted to squared error, which does not suit "
            f"{type(rule).__name__}; use fusion.per=all or fusion=probability"
        )
    given = cfg.fusion.weight if OmegaConf.is_list(cfg.fusion.weight) else []
    weights = sorted({weight for weight in given if isinstance(weight, int | float)})
    for one, other in pairwise(weights):
        if f"{one:g}" == f"{other:g}":
            yield f"fusion.weight: {one} and {other} are equal in six digits, which name the files; give one of them"
    if "reranking" in cfg.evaluation.modes and cfg.evaluation.num_beams == 1:
        yield "evaluation.modes has reranking with evaluation.num_beams=1: one beam leaves no choice; use 2 or more"
    if cfg.evaluation.decoding == "static" and cfg.evaluation.num_beams != 1:
        yield (
            f"evaluation.decoding=static with evaluation.num_beams={cfg.evaluation.num_beams}: static caches are for "
            f"greedy decoding only; set evaluation.num_beams=1 or evaluation.decoding=dynamic"
        )
    if "select_on" in cfg.evaluation:
        yield (
            f"evaluation.select_on={cfg.evaluation.select_on}: λ is always chosen on validation rows, never on the "
            f"rows that are reported; leave it out and use validation rows for it"
        )


def _learners(cfg: DictConfig) -> Iterator[str]:
    adapted = bool(cfg.pilot.adapter)
    if cfg.pilot.frozen and adapted:
        yield "pilot.frozen=true with an adapter: the adapter would never be trained; use pilot.adapter=null"
    if cfg.pilot.dtype in ("bfloat16", "float16") and not (cfg.pilot.frozen or adapted):
        yield (
            f"pilot.dtype={cfg.pilot.dtype}: weights that are trained must be float32 (trainer.precision=bf16-mixed "
            f"computes in bfloat16 all the same); use pilot.dtype=float32, or adapter@pilot.adapter=lora"
        )
    if cfg.pilot.frozen and cfg.pilot.path is None:
        yield "pilot.frozen=true with pilot.path=null: random weights would stay; give pilot.path=<model or export>"
    if cfg.pilot.frozen and not (cfg.copilot.enabled and learns(cfg.copilot.kind)):
        name = cfg.copilot.kind if cfg.copilot.enabled else "none"
        mend = "use copilot=head, or pilot.frozen=false"
        yield f"pilot.frozen=true with copilot={name}: nothing would be trained; {mend}"
