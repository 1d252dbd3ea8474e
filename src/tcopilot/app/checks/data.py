"""What the prepared rows show before weights load: splits, answers, lengths, and how large the Mistake Log grows."""

import psutil
import torch
from omegaconf import DictConfig
from transformers import PreTrainedConfig

from tcopilot.app.checks.problems import existing
from tcopilot.app.memory.free import available_memory
from tcopilot.data.module import TCopilotDataModule
from tcopilot.evaluation.modes import TARGETS
from tcopilot.evaluation.ranking import ranking_problems
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.kinds import KINDS
from tcopilot.models.pilot import ModelSource
from tcopilot.settings import LARGEST


def data_problems(cfg: DictConfig, pilot: PreTrainedConfig, data: TCopilotDataModule, fits: bool = True) -> list[str]:
    """Problems that the prepared rows show: no rows to score or to fit λ and gates on, texts longer than the model."""
    summary, reported = data.summary(), cfg.evaluation.report_on
    needed_for = {"validation": "λ is chosen on validation rows"} if fits else {}
    needed_for |= {reported: f"evaluation.report_on={reported}"}
    mends = {"validation": "set data.validation_size", "test": "add some, or use evaluation.report_on=validation"}
    problems = [
        f"{why}: {name} has no {split} rows; there are "
        f"{', '.join(part for part in summary if part.startswith(f'{name}/'))}; {mends[split]}"
        for split, why in needed_for.items()
        for name in data.benchmark_names
        if f"{name}/{split}" not in summary
    ]
    only_targets = list(cfg.evaluation.modes) == [TARGETS]
    for name, task in data.benchmarks.items() if not only_targets else ():
        if task.catalogue is not None:
            splits = (split for split in ("validation", "test") if f"{name}/{split}" in summary)
            most_seen = max(len(row["seen"]) for split in splits for row in data.evaluation_rows(split, name))
            problems += ranking_problems(name, task, cfg.evaluation.ranking, cfg.evaluation.ranking_beams, most_seen)
        elif list(cfg.evaluation.modes) == ["likelihood"] and not data.has_options(name):
            problems.append(
                f"evaluation.modes={list(cfg.evaluation.modes)}: {name} has no options whose likelihoods could be "
                f"compared; add generation"
            )
    if data.total_rounds > LARGEST:
        problems.append(f"data.epochs={data.epochs}: these are {data.total_rounds:.0e} rounds; give fewer")
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
    free = available_memory() if spill is None else psutil.disk_usage(existing(spill)).free
    if needed <= free:
        return []
    where = "in memory" if spill is None else f"on the disk of mistake_log.log.spill={spill}"
    mend = ", keep rounds on disk with mistake_log.log.spill=<folder>" if spill is None else ""
    kind = KINDS.get(cfg.copilot.kind)
    of_head = "likely_tokens" if kind and kind.fits_recordings else "frozen_head"
    return [
        f"a full Mistake Log takes about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free {where}; lower "
        f"mistake_log.log.capacity_rounds={log.capacity_rounds}, set mistake_log.log.max_bytes{mend}, or keep less "
        f"of p̂ with log_storage@mistake_log.log.storage=topk, or {of_head} where the Pilot's head is frozen"
    ]


def log_bytes(cfg: DictConfig, pilot: ModelSource, data: TCopilotDataModule, log: MistakeLog) -> int:
    """Bytes of a full Mistake Log."""
    rows = data.batch_size * min(log.capacity_rounds, data.total_rounds)
    if log.first_visits_only and not data.streaming:
        rows = min(rows, data.held_out_rows or data.train_rows)
    total = int(rows * record_bytes(cfg, pilot, data, log))
    return total if log.max_bytes is None else min(total, log.max_bytes)


def record_bytes(cfg: DictConfig, pilot: ModelSource, data: TCopilotDataModule, log: MistakeLog) -> float:
    """Bytes of a row's record: of a mean row where batches are grouped by length, else of one as long as the longest.

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
    frozen = cfg.pilot.frozen or cfg.pilot.adapter
    prompt = 1 + (8 if frozen and not pilot.is_encoder_decoder else vector)  # ids where the embedding rebuilds X̃
    if depths := cfg.copilot.get("depths"):  # a head-only Copilot's records hold several states and no X̃
        prompt, vector = 0, len(depths) * vector
    return source * prompt + target * (vector + kept + 9)
