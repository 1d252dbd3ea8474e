"""Time of a training round: Pilot alone, Pilot and Copilot, and Hugging Face's Trainer on the same Pilot.

    python performance/round.py [--rounds 6] [--repeats 2] [--device cuda] [--dtype bfloat16] [--json FILE]
    python performance/round.py --size llama-3.2-3b --copilot-size llama-3.2-1b --architectures llama --profile FILE

Every figure is a ratio of medians measured alternately in one process, through the real `training_step` under a
Lightning Trainer. The floor is what the extra arithmetic alone would cost: FLOPs of a joint round over FLOPs of a
Pilot-only round, counted by torch. `overhead` is the measured ratio over the floor; 1.00 would be perfect. The last
column is a Pilot-only round over a step of `transformers.Trainer` with the same batch, loss, optimiser and clipping.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning import Callback, Trainer
from models import SIZES, Shape, copilot_options, pilot_of
from tables import ROUND, show, write
from timing import DEVICE, flops_of, synchronise
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.data import DataLoader
from transformers import get_constant_schedule_with_warmup

from tcopilot.data.batch import Batch
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.copilot import Copilot
from tcopilot.models.modeling import fused_class
from tcopilot.models.states import position_ids
from tcopilot.training.callbacks import MistakeLogCallback
from tcopilot.training.learner import Learner
from tcopilot.training.module import TCopilotModule

WARM_UP = 3  # rounds of each fit that are not counted
KINDS = {"whole, 1 update": (1.0, 1), "half, 1 update": (0.5, 1), "whole, 4 updates": (1.0, 4)}
"""Depth of the Copilot as a share of its donor's, and its updates a round."""


@dataclass
class Setting:
    """What all rounds of a run share."""

    size: str
    copilot_size: str
    dtype: str
    device: str
    rows: int

    @property
    def precision(self) -> str:
        """Lightning's name for the type that is computed in; weights are float32."""
        return "bf16-mixed" if self.dtype == "bfloat16" else "32-true"


@dataclass
class Case:
    """One line of the table."""

    pilot: str
    copilot: str
    source: int
    target: int
    ratio: float  # joint round over Pilot alone
    floor: float
    trainer: float  # Pilot alone over a step of transformers' Trainer

    @property
    def overhead(self) -> float:
        """Measured ratio over the FLOP floor."""
        return self.ratio / self.floor


class Stopwatch:
    """Seconds of every round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def start(self) -> None:
        """Begin a round."""
        synchronise()
        self._began = time.perf_counter()

    def stop(self) -> None:
        """End it."""
        synchronise()
        self.seconds.append(time.perf_counter() - self._began)


class OurStopwatch(Stopwatch, Callback):
    """Of Lightning's Trainer."""

    def on_train_batch_start(self, *_: object) -> None:
        """Start."""
        self.start()

    def on_train_batch_end(self, *_: object) -> None:
        """Stop."""
        self.stop()


class TheirStopwatch(Stopwatch, transformers.TrainerCallback):
    """Of transformers' Trainer."""

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Start."""
        self.start()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Stop."""
        self.stop()


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default=DEVICE, choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the Pilot, with random weights")
    parser.add_argument("--copilot-size", choices=SIZES, help="of the Copilot's donor; the Pilot's unless given")
    parser.add_argument("--architectures", nargs="+", default=["llama", "t5"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--source", type=int, default=128, help="prompt length M")
    parser.add_argument("--targets", type=int, nargs="+", default=[16, 128], help="target lengths N")
    parser.add_argument("--profile", type=Path, help="write a trace of joint rounds for chrome://tracing, and stop")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    _quiet()
    setting = Setting(given.size, given.copilot_size or given.size, given.dtype, given.device, given.rows)
    if given.profile:
        trace(setting, given.architectures[0], given.source, given.targets[0], given.profile)
        return
    cases = [
        case
        for architecture in given.architectures
        for target in given.targets
        for case in measure(setting, architecture, given.source, target, given.rounds, given.repeats)
    ]
    pair = setting.size if setting.copilot_size == setting.size else f"{setting.size} + {setting.copilot_size}"
    rows = [asdict(case) | {"overhead": case.overhead} for case in cases]
    show(f"Time of a round, {pair}, batch {setting.rows}, {setting.dtype}, {setting.device}", rows, ROUND)
    write(given.json, rows)


def measure(setting: Setting, architecture: str, source: int, target: int, rounds: int, repeats: int) -> list[Case]:
    """Time all kinds of rounds on the same batches, in turn, and count their FLOPs."""
    batches = _batches(setting, source, target, rounds + WARM_UP)
    modules: dict[str, Callable[[int], TCopilotModule]] = {
        "Pilot alone": partial(_module, setting, architecture, None)
    }
    modules |= {name: partial(_module, setting, architecture, kind) for name, kind in KINDS.items()}
    flops = {name: flops_of(partial(_fit, setting, module(1), batches[:1])) for name, module in modules.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*modules, "HF")}
    for _ in range(repeats):
        seconds["HF"] += _fit_theirs(setting, architecture, batches)[WARM_UP:]
        for name, module in modules.items():
            seconds[name] += _fit(setting, module(len(batches)), batches)[WARM_UP:]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    alone, theirs = medians["Pilot alone"], medians["HF"]
    return [
        Case(
            architecture,
            name,
            source,
            target,
            medians[name] / alone,
            flops[name] / flops["Pilot alone"],
            alone / theirs,
        )
        for name in KINDS
    ]


def trace(setting: Setting, architecture: str, source: int, target: int, file: Path) -> None:
    """Write what the CPU and the GPU do in joint rounds, copies to the Mistake Log included."""
    batches = _batches(setting, source, target, WARM_UP)
    _fit(setting, _module(setting, architecture, KINDS["whole, 1 update"], WARM_UP), batches)
    with profile() as profiler:
        _fit(setting, _module(setting, architecture, KINDS["whole, 1 update"], WARM_UP), batches)
    profiler.export_chrome_trace(str(file))


def _fit(setting: Setting, module: TCopilotModule, batches: list[Batch]) -> list[float]:
    watch = OurStopwatch()
    trainer = Trainer(
        accelerator=setting.device, devices=1, precision=setting.precision, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[watch, MistakeLogCallback(MistakeLog(8))],
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return watch.seconds


def _fit_theirs(setting: Setting, architecture: str, batches: list[Batch]) -> list[float]:
    """The same steps by transformers' Trainer: logits at target positions only, as ours."""
    watch, pilot = TheirStopwatch(), pilot_of(architecture, setting.size)
    optimizer = _optimizer(pilot.parameters())
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder, max_steps=len(batches), per_device_train_batch_size=1, max_grad_norm=1.0,
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=setting.device == "cpu", bf16=setting.dtype == "bfloat16", remove_unused_columns=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            pilot, options, train_dataset=[_their_inputs(architecture, batch) for batch in batches],
            data_collator=lambda rows: rows[0], callbacks=[watch], compute_loss_func=_their_loss,
            optimizers=(optimizer, _schedule(optimizer)),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return watch.seconds


def _their_inputs(architecture: str, batch: Batch) -> dict[str, Tensor]:
    labels = batch.target_ids_BN.masked_fill(~batch.target_mask_BN, -100)
    if architecture == "t5":
        start = torch.zeros_like(labels[:, :1])
        shifted = torch.cat([start, batch.target_ids_BN[:, :-1]], dim=1)
        source = {"input_ids": batch.source_ids_BM, "attention_mask": batch.source_mask_BM.long()}
        return source | {"decoder_input_ids": shifted, "labels": labels}
    mask = torch.cat([batch.source_mask_BM, batch.target_mask_BN], dim=1)
    first = batch.source_ids_BM.shape[1] - 1
    return {
        "input_ids": torch.cat([batch.source_ids_BM, batch.target_ids_BN], dim=1),
        "attention_mask": mask.long(),
        "position_ids": position_ids(mask),
        "logits_to_keep": torch.arange(first, first + labels.shape[1]),
        "labels": labels,
    }


def _their_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1).float(), labels.flatten())


def _module(setting: Setting, architecture: str, kind: tuple[float, int] | None, rounds: int) -> TCopilotModule:
    pilot, copilot, steps = pilot_of(architecture, setting.size), None, 1
    if kind is not None:
        share, steps = kind
        donor = pilot if setting.copilot_size == setting.size else pilot_of(architecture, setting.copilot_size)
        layers = round(share * SIZES[setting.copilot_size][2])
        copilot = Copilot.from_pilot(pilot, layers, donor, **copilot_options(setting.copilot_size))
    config = TCopilotConfig(pilot.config, None if copilot is None else copilot.config)
    learner = Learner(_optimizer, lambda optimizer, num_training_steps: _schedule(optimizer))
    model = fused_class(architecture == "t5")(config, pilot, copilot)
    return TCopilotModule(model, learner, learner, rounds, copilot_batch_size=setting.rows, steps_per_round=steps)


_optimizer = partial(torch.optim.AdamW, fused=True)
_schedule = partial(get_constant_schedule_with_warmup, num_warmup_steps=1)


def _batches(setting: Setting, source: int, target: int, count: int) -> list[Batch]:
    shape = Shape(vocab=SIZES[setting.size][0], rows=setting.rows, source=source, target=target)
    return [shape.batch(seed) for seed in range(count)]


def _quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    main()
