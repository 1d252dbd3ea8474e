"""Time with a shared beginning of all prompts read once, over the time with it read in every row.

    python performance/prefix.py [--repeats 7] [--json FILE]

Four shots of 60 tokens, a question of 60 and an answer of 16, for a small Llama with random weights. What is timed: a
pass without gradients, as recording and likelihoods make it; a Pilot's forward and backward pass; and greedy decoding,
at one λ and at three. Ratios are of medians measured in turn in one process; FLOPs are counted by torch.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from models import SIZES, copilot_options, pilot_of
from tables import PREFIX, show, write
from timing import DEVICE, flops_of, in_turn

from tcopilot.data.batch import Batch, PromptTargetCollator
from tcopilot.models.modeling import fused_class
from tcopilot.models.states import trace_pilot

SHOTS, TOKENS, ANSWER = 4, 60, 16


@dataclass
class Case:
    """One line of the table: sharing over not sharing."""

    what: str
    rows: int
    time: float
    flops: float


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rows", type=int, nargs="+", default=[8])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cases = [asdict(case) for rows in given.rows for case in measure(given.size, rows, given.repeats)]
    show(f"Sharing over not sharing, {given.size} Llama, {DEVICE}", cases, PREFIX)
    write(given.json, cases)


def measure(size: str, rows: int, repeats: int) -> list[Case]:
    """Time every action with and without sharing, in turn."""
    batch = _batch(SIZES[size][0], rows)
    model = fused_class(False).from_pilot(pilot_of("llama", size), layers=2, **copilot_options(size)).to(DEVICE).eval()
    options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "pad_token_id": 0, "eos_token_id": 1}

    def record(batch: Batch) -> None:
        with torch.no_grad():
            trace_pilot(model.pilot, batch, model.copilot.pooler)

    def train(batch: Batch) -> None:
        logits_BNV = trace_pilot(model.pilot, batch, model.copilot.pooler).logits_BNV
        torch.nn.functional.cross_entropy(logits_BNV.flatten(0, 1), batch.target_ids_BN.flatten()).backward()
        model.zero_grad()

    def decode(weights: list[float]) -> Callable[[Batch], None]:
        def act(batch: Batch) -> None:
            prompts = (batch.source_ids_BM, batch.source_mask_BM.long(), batch.prefix)
            with torch.no_grad():
                model.generate_at_weights(weights, *prompts, do_sample=False, **options)

        return act

    actions = {"recording": record, "training": train, "decoding": decode([0.5]), "decoding, 3 λ": decode([0, 0.5, 1])}
    return [_case(what, act, batch, rows, repeats) for what, act in actions.items()]


def _case(what: str, act: Callable[[Batch], None], batch: Batch, rows: int, repeats: int) -> Case:
    actions = {"shared": partial(act, batch), "whole": partial(act, replace(batch, prefix=0))}
    times, flops = in_turn(actions, repeats), {name: flops_of(action) for name, action in actions.items()}
    return Case(what, rows, times["shared"] / times["whole"], flops["shared"] / flops["whole"])


def _batch(vocabulary: int, rows: int) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def some(tokens: int) -> list[int]:
        return torch.randint(3, vocabulary, (tokens,), generator=generator).tolist()

    shots = some(SHOTS * TOKENS)
    lengths = torch.randint(TOKENS // 2, 3 * TOKENS // 2, (rows,), generator=generator).tolist()
    questions = [[3 + row % 2, *some(length - 1)] for row, length in enumerate(lengths)]
    made = [
        {"source_ids": shots + question, "target_ids": some(ANSWER), "id": row, "benchmark": 0}
        for row, question in enumerate(questions)
    ]
    return PromptTargetCollator(0, "left")(made).to(DEVICE)


if __name__ == "__main__":
    main()
