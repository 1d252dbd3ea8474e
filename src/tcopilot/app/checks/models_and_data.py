"""What models and data show together before weights load: vocabularies, depths, lengths, memory.

Model configs are read here, weights are not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tcopilot.app.checks.config import is_whole
from tcopilot.app.checks.parts import refusal
from tcopilot.data.module import TCopilotDataModule
from tcopilot.evaluation.ranking import ranking_problems
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models import families
from tcopilot.models.adapters import Lora
from tcopilot.models.pilot import ModelSource, ModelSourceError


def source_problems(*sources: ModelSource | None) -> list[str]:
    """Models whose config cannot be read or built, or whose family is not supported; their weights are not read."""
    problems = []
    for source in filter(None, sources):
        found = _collect(source.key, lambda source=source: families.check_family(source.model_config))
        problems += found or _size_problems(source)
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


def tokenizer_problems(pilot: ModelSource, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A tokenizer with more words than the model has rows for."""
    words, rows = len(tokenizer), pilot.model_config.vocab_size
    if words <= rows:
        return []
    return [
        f"pilot.path={pilot.path}: its tokenizer has {words} words and its model {rows} rows; "
        f"they do not belong together"
    ]


def donor_problems(pilot: ModelSource, donor: ModelSource, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A checkpoint for the Copilot that cannot read the Pilot's tokens.

    Call it after the Pilot's tokenizer was made, from which a Pilot built from a config takes its vocabulary. Where
    the checkpoint comes with a tokenizer, its words must be the Pilot's too.
    """
    ours, theirs = pilot.model_config, donor.model_config
    try:
        words = donor.tokenizer().get_vocab()
    except ModelSourceError:
        words = None
    fits = len(tokenizer) <= theirs.vocab_size if words else ours.vocab_size == theirs.vocab_size
    if ours.model_type != theirs.model_type or not fits:
        return [
            f"copilot.path={donor.path}: {theirs.model_type} with {theirs.vocab_size} tokens cannot read a "
            f"{ours.model_type} Pilot with {ours.vocab_size} tokens; choose a checkpoint of the same family and "
            f"tokenizer"
        ]
    if words and words != tokenizer.get_vocab():
        return [
            f"copilot.path={donor.path}: its tokenizer has other words than the Pilot's; choose a checkpoint with the "
            f"Pilot's tokenizer (the matrices may differ in padding rows)"
        ]
    return []


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
    problems += _answer_problems(cfg, data)
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
    """A Mistake Log that would not fit once it is full: into memory, or on the disk that it is spilled to."""
    needed, spill = log_bytes(cfg, pilot, data, log), None if log.spill is None else log.spill.parent
    free = psutil.virtual_memory().available if spill is None else psutil.disk_usage(_existing(spill)).free
    if needed <= free:
        return []
    where = "in memory" if spill is None else f"on the disk of mistake_log.log.spill={spill}"
    mend = ", keep rounds on disk with mistake_log.log.spill=<folder>" if spill is None else ""
    return [
        f"a full Mistake Log takes about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free {where}; lower "
        f"mistake_log.log.capacity_rounds={log.capacity_rounds}, set mistake_log.log.max_bytes{mend}, or keep less "
        f"of p̂ with log_storage@mistake_log.log.storage=topk, or frozen_head where the Pilot's head is frozen"
    ]


def _existing(folder: Path) -> Path:
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def log_bytes(cfg: DictConfig, pilot: ModelSource, data: TCopilotDataModule, log: MistakeLog) -> int:
    """Bytes of a full Mistake Log: of mean rows where batches are grouped by length, else of rows as the longest.

    Read off the training rows; of a stream, off the validation rows.
    """
    config = pilot.model_config
    split = "validation" if data.streaming else "train"
    rows = [part for name, part in data.summary().items() if name.endswith(f"/{split}")]
    count = sum(part["rows"] for part in rows) or 1
    grouped = data.group_by_length and not data.streaming
    source, target = (
        sum(part[f"{what}_mean"] * part["rows"] for part in rows) / count
        if grouped
        else max(part[f"{what}_max"] for part in rows)
        for what in ("source", "target")
    )
    vector = config.hidden_size * log.dtype.itemsize
    computed = torch.bfloat16 if "bf16" in str(cfg.trainer.precision) else getattr(torch, pilot.dtype)
    kept = log.storage.bytes_per_token(config.vocab_size, config.hidden_size, computed)
    frozen = cfg.pilot.frozen or "_target_" in (cfg.pilot.adapter or {})
    prompt = 8 if frozen and not pilot.is_encoder_decoder else vector  # ids where the embedding rebuilds X̃
    record = source * (prompt + 1) + target * (vector + kept + 9)
    rounds = min(log.capacity_rounds, data.total_rounds)
    total = int(record * data.batch_size * rounds)
    return total if log.max_bytes is None else min(total, log.max_bytes)


def _answer_problems(cfg: DictConfig, data: TCopilotDataModule) -> list[str]:
    """Benchmarks that the modes of the evaluation cannot answer."""
    problems = []
    for name, task in data.benchmarks.items():
        if task.catalogue is not None:
            rows = (row for split in ("validation", "test") for row in data.evaluation_rows(split, name))
            most_seen = max(len(row["seen"]) for row in rows)
            problems += ranking_problems(name, task, cfg.evaluation.ranking, cfg.evaluation.ranking_beams, most_seen)
        elif "generation" not in cfg.evaluation.modes and not data.has_options(name):
            problems.append(
                f"evaluation.modes={list(cfg.evaluation.modes)}: {name} has no options whose likelihoods could be "
                f"compared; add generation"
            )
    return problems


def _size_problems(source: ModelSource) -> list[str]:
    """Sizes that no model can have; a config of one's own is also built, without memory."""
    config, given = source.model_config, source.config or {}
    heads, groups = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    where = f"{source.key}.config" if source.path is None else f"{source.key}.path={source.path}: config.json"
    if heads and groups and (groups < 1 or heads % groups):
        return [f"{where}: num_key_value_heads={groups} does not divide num_attention_heads={heads}; choose a divisor"]
    if source.path is not None:
        return []
    problems = [
        f"{where}.{name}={value}: must be at least 1"
        for name, value in given.items()
        if is_whole(value) and value < 1 and (name.startswith(("num_", "d_")) or name.endswith(("_size", "_dim")))
    ]
    known = type(config)()
    problems += [
        f"{where}.{name}={value}: {config.model_type} has no such value; look for its name in {type(config).__name__}"
        for name, value in given.items()
        if not hasattr(known, name)
    ]
    if problems:
        return problems
    try:
        families.skeleton(config)
    except Exception as error:  # what a library says to values of the user's own, of any kind
        return [f"{where}={given}: no {config.model_type} can be built of it ({type(error).__name__}: {error})"]
    return []


def _adapter_problems(cfg: DictConfig, key: str, config: PreTrainedConfig) -> list[str]:
    node = cfg[key].adapter
    if "_target_" not in (node or {}):
        return []

    def check() -> None:
        adapter = instantiate(node, _convert_="all")
        if isinstance(adapter, Lora):
            adapter.check(families.skeleton(config) if key == "pilot" else families.skeleton(config).get_decoder())

    return _collect(f"{key}.adapter", check)


def _fits(layers: Any, depth: int) -> bool:
    if layers is None:
        return True
    return 1 <= layers <= depth if is_whole(layers) else isinstance(layers, float) and 0 < layers <= 1


def _collect(key: str, check: Callable[[], None]) -> list[str]:
    """Run a check and return what it complains of, under a config key unless it names one itself."""
    try:
        check()
    except ModelSourceError as error:
        return [str(error)]
    except (ValueError, TypeError, InstantiationException) as error:
        if (reason := refusal(error)) is None:
            raise
        return [f"{key}: {reason}"]
    return []
