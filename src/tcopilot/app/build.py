"""From a composed config to objects: the one place where config keys meet constructors."""

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from yaml import YAMLError

from tcopilot.app.checks import models as checks
from tcopilot.app.checks.config import config_problems, fusion_rule, refuse_missing, values_for_groups
from tcopilot.app.checks.data import data_problems, memory_problems
from tcopilot.app.checks.problems import ConfigError, attempt
from tcopilot.app.checks.recordings import fits_from_recording, learns_from_options, option_problems
from tcopilot.app.checks.sharding import pilot_and_row_problems
from tcopilot.app.checks.targets import target_problems
from tcopilot.app.checks.trial_build import trial_problems
from tcopilot.app.checks.unused import watch
from tcopilot.data.module import TCopilotDataModule
from tcopilot.data.shots import NumberedRow
from tcopilot.evaluation.modes import LIKELIHOOD, TARGETS, Decoding
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.base_copilot import BaseCopilot
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.families import decoder_depth, skeleton
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.kinds import empty_copilot, learns, new_copilot, settings_of
from tcopilot.models.modeling import fused_class
from tcopilot.models.pilot import ModelSource, ModelSourceError
from tcopilot.models.pilot_files import digest
from tcopilot.models.quantization import parameter_count
from tcopilot.processes import is_first
from tcopilot.run_directory import RunDirectory, share
from tcopilot.settings import is_list
from tcopilot.training.learner import Learner
from tcopilot.training.module import TCopilotModule
from tcopilot.version import version_problem


@dataclass
class Prepared:
    """What is known before any weights load."""

    pilot: ModelSource
    donor: ModelSource | None
    tokenizer: PreTrainedTokenizerBase
    data: TCopilotDataModule
    log: MistakeLog | None
    config: DictConfig | None = None  # as `tcopilot.app.checks.unused.watch` gives it, with the keys read so far
    read: Collection[str] = ()


def prepare(cfg: DictConfig) -> Prepared:
    """Check the config, read and check the data, size the log; no weights are loaded.

    Raises:
        ConfigError: with every problem found.
    """
    refuse_missing(cfg)
    if problems := list(values_for_groups(cfg)):
        raise ConfigError(problems)
    watched, read = watch(cfg)
    pilot = model_source(watched.pilot, "pilot")
    donor = model_source(watched.copilot, "copilot") if cfg.copilot.enabled and cfg.copilot.path else None
    problems, log, tokenizer = config_problems(cfg), None, None
    problems += [] if problems else trial_problems(cfg)
    logs = cfg.copilot.enabled and learns(cfg.copilot.kind) and not fits_from_recording(cfg)
    if logs and not any(problem.startswith(("mistake_log.log", "seed")) for problem in problems):
        log = attempt(problems, lambda: instantiate(watched.mistake_log.log, _convert_="all"))
    data = attempt(problems, lambda: instantiate(cfg.data))
    unreadable = checks.source_problems(cfg, pilot, donor)
    problems += unreadable
    if not unreadable:
        problems += checks.model_problems(cfg, pilot, donor)
    if data is not None and not unreadable:
        tokenizer = attempt(problems, lambda: pilot.tokenizer(data.vocabulary))
    if tokenizer is not None:
        problems += checks.tokenizer_problems(pilot, tokenizer)
        problems += [] if donor is None else checks.donor_problems(pilot, donor, tokenizer)
        longest = _most_generated(cfg.evaluation)
        how = {"max_new_tokens": longest, "train_options": learns_from_options(cfg)}
        attempt(problems, lambda: data.prepare(tokenizer, pilot.source_side, **how))
    if not problems:
        data.remarks += split_seed_remarks(data, pilot, donor)
        problems += data_problems(cfg, pilot.model_config, data)
        problems += option_problems(cfg, data)
        problems += [] if log is None else memory_problems(cfg, pilot, data, log)
        problems += pilot_and_row_problems(cfg, pilot.model_config, data)
    if problems:
        raise ConfigError(problems)
    return Prepared(pilot, donor, tokenizer, data, log, watched, read)


def prepare_data(
    cfg: DictConfig, tokenizer: PreTrainedTokenizerBase, pilot: PreTrainedConfig, fits: bool = True,
    shots: Mapping[str, list[NumberedRow]] | None = None,
) -> TCopilotDataModule:  # fmt: skip
    """Read and check the data of a config, without training on it, for a tokenizer that is already loaded.

    Validation rows are needed if something is to be fitted on them (`fits`), such as a gate. `shots` are those of the
    training run.

    Raises:
        ConfigError: with every problem found in the data.
    """
    problems: list[str] = []
    data = attempt(problems, lambda: instantiate(cfg.data))
    if data is not None:
        side, longest = "right" if pilot.is_encoder_decoder else "left", _most_generated(cfg.evaluation)
        attempt(problems, lambda: data.prepare(tokenizer, side, False, longest, shots))
    if not problems:
        problems += data_problems(cfg, pilot, data, fits)
    if problems:
        raise ConfigError(problems)
    return data


def read_export(run: RunDirectory) -> tuple[TCopilotConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of a finished run's export.

    Raises:
        ModelSourceError: if one of them cannot be read, or the export is of another kind.
    """
    source = ModelSource(str(run.export), key="run")
    config = source.stored_config
    if not isinstance(config, TCopilotConfig) or config.pilot is None:
        raise ModelSourceError(f"run={run}: export/config.json is of a {config.model_type!r} model, no export of ours")
    return config, source.tokenizer()


def load_export(run: RunDirectory, config: TCopilotConfig, needs_pilot: bool = True) -> TCopilotModel:
    """The fused model of a finished run's export, with the Pilot in the type in which it was trained.

    A run that never loaded its Pilot (`evaluation=targets`) exports the Copilot alone, and names the Pilot. Its layers
    are left without weights if only the Copilot is needed.

    Raises:
        ModelSourceError: if weights are missing, of other shapes than the config says, or not finite; or if there are
            others now where the Pilot was.
    """
    fused = fused_class(config.is_encoder_decoder)
    if run.copilot_alone.exists():
        pilot = _pilot_of(run) if needs_pilot else skeleton(config.pilot)
        return fused(config, pilot, _copilot_alone(config.copilot, run.copilot_alone))
    return ModelSource(str(run.export), key="run").whole_model(fused, config.dtype or torch.float32)


def saved_config(cfg: DictConfig) -> str:
    """The text of a run's `config.yaml`: resolved, and valid wherever the run directory is moved.

    Paths in the run directory refer to `paths.run_dir`, which `read_config` sets; other local paths become absolute.
    """
    values = OmegaConf.to_container(cfg, resolve=True)
    run_dir = values["paths"]["run_dir"]

    def portable(node: Any, key: str = "") -> Any:
        if isinstance(node, dict):
            return {name: portable(value, name) for name, value in node.items()}
        if isinstance(node, list):
            return [portable(value) for value in node]
        if isinstance(node, str) and f"{node}/".startswith(f"{run_dir}/"):
            return "${paths.run_dir}" + node.removeprefix(run_dir)
        is_local = key in ("path", "spill", "from") and isinstance(node, str) and Path(node).exists()
        return str(Path(node).absolute()) if is_local else node

    return OmegaConf.to_yaml(OmegaConf.create(portable(values) | {"paths": {"run_dir": "."}}))


def read_config(file: Path, key: str, trusted: Collection[str] = (), run_dir: Path | None = None) -> DictConfig:
    """The config of an earlier run.

    Args:
        file: its `config.yaml`.
        key: the user's setting, for error messages.
        trusted: modules whose classes it may name, see `target_problems`.
        run_dir: where to write; by default the folder that the file lies in now.

    Raises:
        ConfigError: if the file is not a YAML mapping, if another version made the run, or if it names a class that a
            config from disk may not name.
    """
    try:
        config = OmegaConf.load(file)
        if isinstance(config, DictConfig) and isinstance(config.get("paths"), DictConfig):
            config.paths.run_dir = str((run_dir or file.parent).absolute())
        OmegaConf.resolve(config)  # so that what is checked below is what will be built
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([f"{key}: {file} cannot be read ({reason}); give the folder of another run"]) from error
    if not isinstance(config, DictConfig) or "paths" not in config:
        raise ConfigError([f"{key}: {file} is not the config of a run; give the folder of another run"])
    if problem := version_problem(config):
        raise ConfigError([f"{key}: {problem}"])
    if hostile := target_problems(config, trusted):
        raise ConfigError([f"{key}: {problem}" for problem in hostile])
    if OmegaConf.select(config, "fusion.rule") is not None:
        fusion_rule(config.fusion)  # imports the user's own class, which the export names but may not import
    return config


def split_seed_remarks(data: TCopilotDataModule, *sources: ModelSource | None) -> list[str]:
    """Return a warning for each export that was trained on another split of the rows than the one used here."""
    exports = {source.path: source.stored_config for source in sources if source is not None and source.path}
    seeds = {path: getattr(config, "split_seed", data.split_seed) for path, config in exports.items()}
    return [
        f"{path} was trained with data.split_seed={seed}, and here it is {data.split_seed}: it may have seen the "
        f"rows that it is evaluated on; use data.split_seed={seed}"
        for path, seed in seeds.items()
        if seed != data.split_seed
    ]


def model_source(node: DictConfig, key: str) -> ModelSource:
    """Where the Pilot, or the checkpoint that a Copilot starts from, comes from."""
    names = ["path", "dtype", *(["revision", "quantization"] if node.get("path") is not None else ["config"])]
    given = {name: node[name] for name in names if name in node}
    if OmegaConf.is_config(given.get("config")):
        given["config"] = OmegaConf.to_container(given["config"], resolve=True)
    return ModelSource(**given, key=key)


def fused_model(cfg: DictConfig, prepared: Prepared) -> TCopilotModel:
    """Load the Pilot, build its Copilot, inject adapters."""
    pilot = prepared.pilot.load(prepared.tokenizer)
    copilot = make_copilot(cfg, prepared, pilot) if cfg.copilot.enabled else None
    _adapt(cfg.pilot, pilot)
    if copilot is not None and copilot.body is not None:
        _adapt(cfg.copilot, copilot.body)
    return fuse(cfg, prepared, pilot, copilot)


def fuse(cfg: DictConfig, prepared: Prepared, pilot: PreTrainedModel, copilot: BaseCopilot | None) -> TCopilotModel:
    """Put both models together, with the config's fusion rule."""
    fusion: dict[str, Any] = {}
    if copilot is not None:
        weight = cfg.fusion.weight  # validation reports the fused likelihood at 1, or at the only λ given
        weight = float(weight) if isinstance(weight, int | float) else 1.0
        fusion = {"fusion": fusion_rule(cfg.fusion), "feedback": cfg.fusion.feedback, "weight": weight}
    rows = {"split_seed": prepared.data.split_seed}  # so that later runs on the export use the same split
    config = TCopilotConfig(pilot.config, None if copilot is None else copilot.config, **fusion, **rows)
    return fused_class(prepared.pilot.is_encoder_decoder)(config, pilot, copilot)


def make_copilot(cfg: DictConfig, prepared: Prepared, pilot: PreTrainedModel) -> BaseCopilot:
    """A new Copilot, or the trained one of the export that `copilot.path` names."""
    donor, encoder_decoder = prepared.donor, prepared.pilot.is_encoder_decoder
    if donor is not None and donor.trained_copilot is not None:
        if (alone := donor.copilot_alone) is not None:
            copilot = _copilot_alone(donor.trained_copilot, alone)
        else:
            copilot = donor.whole_model(fused_class(encoder_decoder), torch.float32).detach_copilot()
        if copilot.reads_errors:
            copilot.error_in.requires_grad_(cfg.copilot.train_error_input)
        return copilot
    given = {name: cfg.copilot[name] for name in settings_of(cfg.copilot.kind)}
    options = {name: list(value) if isinstance(value, ListConfig) else value for name, value in given.items()}
    if "layers" in cfg.copilot:
        donor = None if donor is None else donor.load(prepared.tokenizer)
        layers = checks.copilot_layers(cfg.copilot.layers, decoder_depth((donor or pilot).config))
        options |= {"layers": layers, "donor": donor, "tokens": len(prepared.tokenizer)}
    return new_copilot(pilot, cfg.copilot.kind, **options)


def _pilot_of(run: RunDirectory) -> PreTrainedModel:
    """The Pilot beside which the Copilot of an export without it was fitted."""
    source = model_source(OmegaConf.load(run.config).pilot, "pilot")
    with safe_open(run.copilot_alone, framework="pt") as weights:
        known = (weights.metadata() or {}).get("pilot")
    pilot = source.load(read_export(run)[1])
    if known is not None and known != digest(source):
        mend = "give its Pilot back, or evaluate its Copilot on this one"
        raise ModelSourceError(
            f"pilot.path={source.path}: its weights are not those that the Copilot of {run} was fitted to; {mend}: "
            f"pilot.path={source.path} copilot.path={run.export}"
        )
    return pilot


def _copilot_alone(settings: dict[str, Any], weights: Path) -> BaseCopilot:
    copilot = empty_copilot(settings)
    copilot.load_state_dict(load_file(weights))
    return copilot


def evaluation_weights(weight: Any) -> list[float] | None:
    """The λ to evaluate; None stands for λ* in closed form (`auto`)."""
    if weight == "auto":
        return None
    return [float(weight)] if isinstance(weight, int | float) else [float(value) for value in weight]


def decoding(node: DictConfig) -> Decoding:
    """How answers are generated or scored, from the config's `evaluation` group."""
    values = OmegaConf.to_container(node, resolve=True)
    return Decoding(**{field.name: values[field.name] for field in fields(Decoding)})


def training_module(cfg: DictConfig, model: TCopilotModel, rounds: int) -> TCopilotModule:
    """The LightningModule with both learners."""
    if cfg.pilot.gradient_checkpointing:
        model.pilot.gradient_checkpointing_enable({"use_reentrant": False})
    if model.copilot is not None and model.copilot.body is not None and cfg.copilot.gradient_checkpointing:
        model.copilot.body.gradient_checkpointing_enable({"use_reentrant": False})
    options: dict[str, Any] = {}
    if trained := cfg.copilot.enabled and learns(cfg.copilot.kind):
        options = {name: cfg.copilot[name] for name in ("steps_per_round", "own_feedback")}
        options |= {"objective": instantiate(cfg.objective), "copilot_batch_size": cfg.copilot.batch_size}
    return TCopilotModule(
        model,
        pilot=None if cfg.pilot.frozen else learner(cfg.pilot, rounds),
        copilot=learner(cfg.copilot, rounds) if trained else None,
        rounds=rounds,
        micro_batch_size=cfg.pilot.micro_batch_size,
        compile={True: "inductor", False: None}.get(cfg.compile, cfg.compile),
        **options,
    )


def learner(node: DictConfig, rounds: int) -> Learner:
    """Optimiser, schedule and clipping of one model; a warm-up below 1 is a share of the rounds."""
    schedule = OmegaConf.to_container(node.scheduler, resolve=True)
    warm_up = schedule.get("num_warmup_steps", 0)
    if isinstance(warm_up, float):
        schedule["num_warmup_steps"] = round(warm_up * rounds) if warm_up < 1 else round(warm_up)
    return Learner(instantiate(node.optimizer, _convert_="all"), instantiate(schedule, _convert_="all"), node.clip)


def parameter_counts(model: TCopilotModel) -> dict[str, int]:
    """Parameters of both models, all and trainable."""
    counts = {}
    for name in ("pilot", "copilot"):
        parameters = list((getattr(model, name) or nn.Module()).parameters())
        counts[name] = sum(map(parameter_count, parameters))
        counts[f"{name}_trainable"] = sum(p.numel() for p in parameters if p.requires_grad)
    return counts


def export(
    model: TCopilotModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, pilot: str | None = None
) -> None:
    """Write the fused model and its tokenizer, in the first process, as a folder that `from_pretrained` loads.

    If the Pilot's layers are not in memory, only its config is written, and the Copilot's weights beside it. What an
    export of the other kind has left, from before the run went on with another evaluation, is removed.

    Args:
        model: the fused model.
        tokenizer: the Pilot's.
        folder: the export.
        pilot: hash of the Pilot's weights, by which a Copilot that is written alone knows its Pilot again.
    """
    if not is_first():
        return
    alone = RunDirectory(Path(folder).parent).copilot_alone
    if any(weight.is_meta for weight in model.parameters()):
        model.config.save_pretrained(folder)
        save_file(model.copilot.state_dict(), alone, None if pilot is None else {"pilot": pilot})
        outdated = list(Path(folder).glob("model*.safetensors*"))
    else:
        model.save_pretrained(folder)
        outdated = [alone]
    for file in outdated:
        file.unlink(missing_ok=True)
    for file in Path(folder).rglob("*.safetensors"):  # adapters too
        share(file)
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # else it is not saved, and loads as right
    tokenizer.save_pretrained(folder)


def _most_generated(evaluation: DictConfig) -> int | None:
    """Most tokens of an answer; None where each benchmark has its own limit. Scored texts may be of any length."""
    only_scores = is_list(evaluation.modes) and {*evaluation.modes} <= {LIKELIHOOD, TARGETS}
    return sys.maxsize if only_scores else evaluation.max_new_tokens


def _adapt(node: DictConfig, module: PreTrainedModel | nn.Module) -> None:
    if node.adapter:
        instantiate(node.adapter, _convert_="all")(module)
