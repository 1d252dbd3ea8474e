"""A frozen Pilot: what recording costs over a bare forward pass, and what a fit to the recording costs over recording.

    python performance/recording.py [--sizes small] [--rows 256] [--batch 16] [--json FILE]

Prompts of 150 tokens with targets of 10, for Llamas with random weights. Recording and bare passes are timed in turn
in one process, and ratios are of medians. A fit is timed over all its updates: ten passes over the rows, in batches
of 64.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from lightning import Trainer
from rich.console import Console
from rich.table import Table
from shapes import SIZES, pilot_of
from transformers import PreTrainedModel, get_scheduler

from tcopilot.data.batch import PromptTargetCollator
from tcopilot.mistake_log.recording import RecordedPilot, Recording
from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.training.fit import CopilotFit, RecordedData
from tcopilot.training.module import Learner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEPTHS = (0.8, 0.9, 1.0)
PROMPT, TARGET, PASSES = 150, 10, 10


@dataclass
class Cost:
    """One line of the table.

    Attributes:
        recorded: rows that are recorded in a second.
        over_pass: time of recording over that of the Pilot's forward pass without gradients.
        fitted: rows that a fit reads in a second.
        fit_over_recording: time of a pass of the fit over that of recording the same rows.
    """

    size: str
    rows: int
    batch: int
    recorded: float
    over_pass: float
    fitted: float
    fit_over_recording: float


def main() -> None:
    """Measure all sizes and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    costs = []
    table = Table(title=f"Recording and fitting, {given.dtype}, {DEVICE}")
    for column in ("Pilot", "rows", "recorded/s", "recording : pass", "fitted/s", "a pass of the fit : recording"):
        table.add_column(column, justify="right")
    for size in given.sizes:
        costs.append(cost := measure(size, given.rows, given.batch, given.repeats, getattr(torch, given.dtype)))
        shown = f"{cost.recorded:.0f}", f"{cost.over_pass:.2f}", f"{cost.fitted:.0f}", f"{cost.fit_over_recording:.3f}"
        table.add_row(size, str(cost.rows), *shown)
        if given.json:
            given.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def measure(size: str, rows: int, batch: int, repeats: int, dtype: torch.dtype) -> Cost:
    """Time passes and recordings of the same rows in turn, then a fit."""
    pilot = pilot_of("llama", size, dtype).to(DEVICE).eval().requires_grad_(False)
    made, collate = _rows(SIZES[size][0], rows), PromptTargetCollator(0, "left")
    about = RecordedPilot("random", DEPTHS, SIZES[size][0], SIZES[size][1], "float32")
    passes, recordings = [], []
    for repeat in range(repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            _read(pilot, collate, made, batch)
            between = time.perf_counter()
            recording = Recording.open(Path(folder), about)
            recording.add(made, pilot, collate, batch)
            if repeat:  # the first one warms up
                passes.append(between - began)
                recordings.append(time.perf_counter() - between)
            if repeat == repeats:
                fit = _fit(pilot, recording, made) / PASSES
    recorded = statistics.median(recordings)
    over_pass = recorded / statistics.median(passes)
    return Cost(size, rows, batch, rows / recorded, over_pass, rows / fit, fit / recorded)


def _read(pilot: PreTrainedModel, collate: PromptTargetCollator, rows: list[dict], batch: int) -> None:
    """What any use of a frozen Pilot takes: its distributions at the targets."""
    with torch.no_grad():
        for first in range(0, len(rows), batch):
            given = collate(rows[first : first + batch]).to(DEVICE)
            ids_BT = torch.cat([given.source_ids_BM, given.target_ids_BN], dim=1)
            pilot(input_ids=ids_BT, logits_to_keep=TARGET + 1, use_cache=False)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _fit(pilot: PreTrainedModel, recording: Recording, rows: list[dict]) -> float:
    data = RecordedData(recording, rows, [], rows, DEPTHS, 64, PASSES, 0, lambda rows, device: None)
    learner = Learner(torch.optim.AdamW, partial(get_scheduler, name="constant"))
    module = CopilotFit(HeadCopilot.from_pilot(pilot, depths=list(DEPTHS)), pilot, learner, data.updates)
    Trainer(
        accelerator="auto", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    ).fit(module, datamodule=data)  # fmt: skip
    return module.seconds


def _rows(vocabulary: int, count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int) -> list[int]:
        return torch.randint(3, vocabulary, (tokens,), generator=generator).tolist()

    return [{"source_ids": draw(PROMPT), "target_ids": draw(TARGET), "id": i, "benchmark": 0} for i in range(count)]


if __name__ == "__main__":
    main()
