"""Time with a shared beginning of all prompts read once, over the time with it read in every row.

    python performance/prefix.py [--repeats 7] [--json FILE]

Four shots of 60 tokens, a question of 60 and an answer of 16, for a small Llama with random weights. What is timed: a
pass without gradients, as recording and likelihoods make it; a Pilot's forward and backward pass; and greedy decoding,
at one λ and at three. Ratios are of medians measured in turn in one process; FLOPs are counted by torch.
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
from rich.console import Console
from rich.table import Table
from shapes import SIZES, copilot_options, pilot_of

from tcopilot.data.batch import Batch, PromptTargetCollator
from tcopilot.models.modeling import fused_class
from tcopilot.models.states import trace_pilot
from tcopilot.training.callbacks.flops import FlopCounter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    cases = [case for rows in given.rows for case in measure(given.size, rows, given.repeats)]
    table = Table(title=f"Sharing over not sharing, {given.size} Llama, {DEVICE}")
    for column in ("what", "rows", "time", "FLOPs"):
        table.add_column(column, justify="right")
    for case in cases:
        table.add_row(case.what, str(case.rows), f"{case.time:.2f}", f"{case.flops:.2f}")
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    if given.json:
        given.json.write_text(json.dumps([asdict(case) for case in cases], indent=1))


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
    batches = {"shared": batch, "whole": replace(batch, prefix=0)}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for repeat in range(repeats + 1):
        for name, given in batches.items():
            began = time.perf_counter()
            act(given)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - began)
    flops = {}
    for name, given in batches.items():
        with FlopCounter() as counter:
            act(given)
        flops[name] = counter.flops
    times = {name: statistics.median(taken) for name, taken in seconds.items()}
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
