"""Time of a training round: Pilot alone against Pilot and Copilot, side by side, with the FLOP floor beside it.

    python benchmarks/round.py [--rounds 6] [--repeats 2] [--json FILE]

Every figure is a ratio of medians measured alternately in one process, through the real `training_step` under a
Lightning Trainer. The floor is what the extra arithmetic alone would cost: FLOPs of a joint round over FLOPs of a
Pilot-only round, counted by torch. `overhead` is the measured ratio over the floor; 1.00 would be perfect.
"""

import argparse
import contextlib
import json
import logging
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning import Callback, Trainer
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    T5Config,
    get_constant_schedule_with_warmup,
)

from tcopilot.callbacks import MistakeLogCallback
from tcopilot.copilot import Copilot
from tcopilot.data.batch import Batch
from tcopilot.mistake_log import MistakeLog
from tcopilot.modeling import TCopilotConfig, fused_class
from tcopilot.module import Learner, TCopilotModule

WARM_UP = 3  # rounds of each fit that are not counted
ROWS = 8
SHAPES = ((128, 16), (128, 128))
VOCAB, WIDTH, LAYERS = 4096, 128, 4


@dataclass
class Case:
    """One line of the table."""

    pilot: str
    copilot: str
    source: int
    target: int
    steps_per_round: int
    ratio: float
    floor: float

    @property
    def overhead(self) -> float:
        """Measured ratio over the FLOP floor."""
        return self.ratio / self.floor


class Stopwatch(Callback):
    """Seconds of every round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        """Start."""
        _synchronise()
        self._began = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        """Stop."""
        _synchronise()
        self.seconds.append(time.perf_counter() - self._began)


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    _quiet()
    cases = [
        measure(architecture, share, source, target, steps, arguments.rounds, arguments.repeats)
        for architecture in ("llama", "t5")
        for source, target in SHAPES
        for share, steps in ((1.0, 1), (0.5, 1), (1.0, 4))
    ]
    table = Table(title=f"Time of a round, batch {ROWS}, width {WIDTH}, {LAYERS} layers, vocabulary {VOCAB}")
    for column in ("Pilot", "Copilot", "M", "N", "updates", "joint : Pilot alone", "FLOP floor", "overhead"):
        table.add_column(column, justify="right")
    for case in cases:
        table.add_row(
            case.pilot, case.copilot, str(case.source), str(case.target), str(case.steps_per_round),
            f"{case.ratio:.2f}", f"{case.floor:.2f}", f"{case.overhead:.2f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(c) | {"overhead": c.overhead} for c in cases], indent=1))


def measure(architecture: str, share: float, source: int, target: int, steps: int, rounds: int, repeats: int) -> Case:
    """Time both kinds of rounds alternately and count their FLOPs."""
    batches = [_batch(source, target, seed) for seed in range(rounds + WARM_UP)]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    flops: dict[bool, int] = {}
    for joint in (False, True):
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _NoModules()
        with sdpa_kernel(SDPBackend.MATH), counter:  # torch counts nothing inside the fused attention of the CPU
            _fit(_module(architecture, share if joint else None, steps, 1), batches[:1])
        flops[joint] = counter.get_total_flops()
    for _ in range(repeats):
        for joint in (False, True):
            module = _module(architecture, share if joint else None, steps, len(batches))
            seconds[joint] += _fit(module, batches)[WARM_UP:]
    ratio = statistics.median(seconds[True]) / statistics.median(seconds[False])
    layers = f"{round(share * LAYERS)} layers"
    return Case(architecture, layers, source, target, steps, ratio, flops[True] / flops[False])


def _fit(module: TCopilotModule, batches: list[Batch]) -> list[float]:
    watch = Stopwatch()
    trainer = Trainer(
        accelerator="auto", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[watch, MistakeLogCallback(MistakeLog(8))],
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return watch.seconds


def _module(architecture: str, share: float | None, steps: int, rounds: int) -> TCopilotModule:
    torch.manual_seed(0)
    pilot = _pilot(architecture)
    copilot = None if share is None else Copilot.from_pilot(pilot, layers=round(share * LAYERS))
    config = TCopilotConfig(pilot.config, None if copilot is None else copilot.config)
    learner = Learner(
        torch.optim.AdamW,
        lambda optimizer, num_training_steps: get_constant_schedule_with_warmup(optimizer, num_warmup_steps=1),
    )
    model = fused_class(pilot.config.is_encoder_decoder)(config, pilot, copilot)
    return TCopilotModule(model, learner, learner, rounds, copilot_batch_size=ROWS, steps_per_round=steps)


def _pilot(architecture: str):
    special = {"pad_token_id": 0, "eos_token_id": 1, "vocab_size": VOCAB}
    if architecture == "t5":
        config = T5Config(
            d_model=WIDTH, d_kv=32, num_heads=8, d_ff=4 * WIDTH, num_layers=LAYERS, decoder_start_token_id=0, **special
        )
        return AutoModelForSeq2SeqLM.from_config(config)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8, **special
    )
    return AutoModelForCausalLM.from_config(config)


def _batch(source: int, target: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    source_ids, target_ids = (torch.randint(2, VOCAB, (ROWS, n), generator=generator) for n in (source, target))
    masks = (torch.ones_like(ids, dtype=torch.bool) for ids in (source_ids, target_ids))
    source_mask, target_mask = masks
    return Batch(
        source_ids, source_mask, target_ids, target_mask, torch.arange(ROWS) + ROWS * seed, torch.zeros(ROWS).long()
    )


class _NoModules(contextlib.nullcontext):
    """Count for the whole model only: torch's per-module hooks refuse the gradients inside the chunked loss."""

    parents = frozenset({"Global"})


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    main()
