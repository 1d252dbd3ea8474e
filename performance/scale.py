"""Cost against model width, target length, vocabulary and number of λ, each over that of the first value.

    python performance/scale.py [--repeats 5] [--json FILE]

A round is a joint round without the Trainer's part: trace, log, both losses, backward pass. `measured` is a ratio of
medians taken in turn in one process; `FLOPs` is the same ratio of the operations that torch counts.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from models import Shape
from tables import SCALE, show, write
from timing import DEVICE, flops_of, in_turn

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.states import trace_pilot
from tcopilot.training.objectives import RootMeanSquaredError, objective_sum

BASE = Shape("llama", width=128, vocab=4096, target=32)
VALUES = {"width": (128, 256, 512), "target": (16, 32, 64, 128), "vocab": (4096, 16_384, 65_536)}
WEIGHTS = (1, 2, 4, 8)


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
    rows = [asdict(cost) for cost in costs]
    show("Cost over the first value's", rows, SCALE)
    write(arguments.json, rows)


def compared(
    what: str, varied: str, actions: dict[int, Callable[[], None]], units: dict[int, int], repeats: int
) -> list[Cost]:
    """Time actions in turn; each is divided by its number of units."""
    times = {value: seconds / units[value] for value, seconds in in_turn(actions, repeats).items()}
    flops = {value: flops_of(act) / units[value] for value, act in actions.items()}
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


if __name__ == "__main__":
    main()
