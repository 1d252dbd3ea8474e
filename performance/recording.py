"""A frozen Pilot: what recording costs over a bare forward pass, and what a fit to the recording costs over recording.

    python performance/recording.py [--sizes small] [--rows 256] [--batch 16] [--json FILE]

Prompts of 150 tokens with targets of 10, for Llamas with random weights. Recording and bare passes are timed in turn
in one process, and ratios are of medians. A fit is timed over all its updates: ten passes over the rows, in batches
of 64.
"""

import argparse
import itertools
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from lightning import Trainer
from models import SIZES, pilot_of
from tables import RECORDING, show, write
from timing import DEVICE, in_turn
from transformers import PreTrainedModel, get_scheduler

from tcopilot.data.batch import PromptTargetCollator
from tcopilot.mistake_log.recording import RecordedPilot, Recording
from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.training.fit import CopilotFit
from tcopilot.training.learner import Learner
from tcopilot.training.recorded_data import RecordedData

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
    for size in given.sizes:
        costs.append(asdict(measure(size, given.rows, given.batch, given.repeats, getattr(torch, given.dtype))))
        write(given.json, costs)  # a visit that is cut short keeps what it has measured
    show(f"Recording and fitting, {given.dtype}, {DEVICE}", costs, RECORDING)


def measure(size: str, rows: int, batch: int, repeats: int, dtype: torch.dtype) -> Cost:
    """Time passes and recordings of the same rows in turn, then a fit."""
    pilot = pilot_of("llama", size, dtype).to(DEVICE).eval().requires_grad_(False)
    made, collate = _rows(SIZES[size][0], rows), PromptTargetCollator(0, "left")
    about = RecordedPilot("random", DEPTHS, SIZES[size][0], SIZES[size][1], "float32")
    with tempfile.TemporaryDirectory() as folder:
        folders = (Path(folder) / str(number) for number in itertools.count())
        recordings: list[Recording] = []

        def record() -> None:
            recordings.append(Recording.open(next(folders), about))
            recordings[-1].add(made, pilot, collate, batch)

        seconds = in_turn({"pass": lambda: _read(pilot, collate, made, batch), "recording": record}, repeats)
        fit, recorded = _fit(pilot, recordings[-1], made) / PASSES, seconds["recording"]
    return Cost(size, rows, batch, rows / recorded, recorded / seconds["pass"], rows / fit, fit / recorded)


def _read(pilot: PreTrainedModel, collate: PromptTargetCollator, rows: list[dict], batch: int) -> None:
    """What any use of a frozen Pilot takes: its distributions at the targets."""
    with torch.no_grad():
        for first in range(0, len(rows), batch):
            given = collate(rows[first : first + batch]).to(DEVICE)
            ids_BT = torch.cat([given.source_ids_BM, given.target_ids_BN], dim=1)
            pilot(input_ids=ids_BT, logits_to_keep=TARGET + 1, use_cache=False)


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
