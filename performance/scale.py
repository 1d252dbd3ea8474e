"""Cost against model width, target length, vocabulary and number of λ, each over that of the first value.

    python performance/scale.py [--repeats 5] [--json FILE]

A round is a joint round without the Trainer's part: trace, log, both losses, backward pass. `measured` is a ratio of
medians taken in turn in one process; `FLOPs` is the same ratio of the operations that torch counts.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from models import Shape
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.states import trace_pilot
from tcopilot.training.objectives import RootMeanSquaredError, objective_sum

BASE = Shape("llama", width=128, vocab=4096, target=32)
VALUES = {"width": (128, 256, 512), "target": (16, 32, 64, 128), "vocab": (4096, 16_384, 65_536)}
WEIGHTS = (1, 2, 4, 8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Cost:
    """One line of the table; both ratios are over the first value's."""

    what: str
    varied: str
    value: int
    measured: float
    flops: float


def main() -> None:
    """Measure all costs and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    costs = []
    for varied, values in VALUES.items():
        shapes = {value: replace(BASE, **{varied: value}) for value in values}
        for what, make in (("round", _round), ("decoded token", _decode)):
            actions = {value: make(shape) for value, shape in shapes.items()}
            tokens = {value: shape.target if what == "decoded token" else 1 for value, shape in shapes.items()}
            costs += compared(what, varied, actions, tokens, arguments.repeats)
    actions = {count: _decode(BASE, count) for count in WEIGHTS}
    costs += compared("decoding at all λ", "λ", actions, dict.fromkeys(WEIGHTS, 1), arguments.repeats)
    table = Table(title="Cost over the first value's")
    for column in ("what", "varied", "value", "measured", "FLOPs"):
        table.add_column(column, justify="right")
    for c in costs:
        table.add_row(c.what, c.varied, f"{c.value:,}", f"{c.measured:.2f}", f"{c.flops:.2f}")
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1))


def compared(
    what: str, varied: str, actions: dict[int, Callable[[], None]], units: dict[int, int], repeats: int
) -> list[Cost]:
    """Time actions in turn; each is divided by its number of units."""
    seconds: dict[int, list[float]] = {value: [] for value in actions}
    for repeat in range(repeats + 1):
        for value, act in actions.items():
            began = time.perf_counter()
            act()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                seconds[value].append((time.perf_counter() - began) / units[value])
    times = {value: statistics.median(taken) for value, taken in seconds.items()}
    flops = {value: _flops(act) / units[value] for value, act in actions.items()}
    first = next(iter(actions))
    return [Cost(what, varied, value, times[value] / times[first], flops[value] / flops[first]) for value in actions]


def _round(shape: Shape) -> Callable[[], None]:
    module = shape.module().to(DEVICE)
    model, log, batch = module.model, MistakeLog(4), shape.batch().to(DEVICE)
    objective = RootMeanSquaredError()

    def act() -> None:
        states = trace_pilot(model.pilot, batch, model.copilot.pooler)
        log.append(states)
        record = log.sample(shape.rows, DEVICE)
        inputs_BNC = model.copilot.taught_inputs(record.probs_BNV, record.targets_BN)
        hidden_BNC, _ = model.copilot(inputs_BNC, record.source_BMP, record.source_mask_BM, record.states_BNP)
        loss = objective_sum(objective, model.copilot, record, hidden_BNC) + module._pilot_loss(states)
        loss.backward()
        module.zero_grad()

    return act


def _decode(shape: Shape, weights: int = 1) -> Callable[[], None]:
    model, batch = shape.module().model.eval().to(DEVICE), shape.batch().to(DEVICE)
    options = {"max_new_tokens": shape.target, "min_new_tokens": shape.target, "pad_token_id": 0, "eos_token_id": 1}

    def act() -> None:
        lambdas = [1.0 + i / 10 for i in range(weights)]
        mask = batch.source_mask_BM.long()
        with torch.no_grad():
            model.generate_at_weights(lambdas, batch.source_ids_BM, mask, do_sample=False, **options)

    return act


def _flops(act: Callable[[], None]) -> int:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with sdpa_kernel(SDPBackend.MATH), counter:  # torch counts nothing inside the fused attention of the CPU
        act()
    return counter.get_total_flops()


class _NoModules:
    """Count for the whole model only: torch's per-module hooks refuse the gradients inside the chunked loss."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


if __name__ == "__main__":
    main()
