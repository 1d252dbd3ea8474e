"""Cost of the Mistake Log from 10² to 10⁵ rounds held. The size of a record is the matter of `memory.py`.

    python performance/log.py [--rounds 100 1000 10000 100000] [--repeats 200] [--policies fifo …] [--json FILE]

Every log is full, so an append also evicts. Logs of all lengths are timed in turn in one process, and the figures are
medians over the turns; `ratio` is a length's sample time over that of the shortest log. Records are small, so that
little but the log's own work is timed.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tables import LOG, Columns, show, write

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.policies import Balanced, Fifo, Latest, Prioritised, Reservoir
from tcopilot.models.states import PilotStates

POLICIES = {"fifo": Fifo, "latest": Latest, "reservoir": Reservoir, "prioritised": Prioritised, "balanced": Balanced}
ROWS, SOURCE, TARGET, WIDTH, VOCAB = 4, 8, 4, 8, 16
DRAWN = 16  # records of a draw
TIMES: Columns = {
    f"{name} µs": lambda row, name=name: f"{1e6 * row[name]:,.0f}" for name in ("sample", "append", "statistics")
}


@dataclass
class Cost:
    """One line of the first table; medians in seconds."""

    policy: str
    rounds: int
    append: float
    sample: float
    statistics: float
    ratio: float = 1.0
    append_ratio: float = 1.0


def main() -> None:
    """Measure all costs and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    costs = [cost for name in arguments.policies for cost in measure(name, arguments.rounds, arguments.repeats)]
    rows = [asdict(cost) for cost in costs]
    show(f"Full logs, {ROWS} records a round, {DRAWN} records a draw", rows, LOG | TIMES)
    write(arguments.json, {"costs": rows})


def measure(name: str, lengths: list[int], repeats: int) -> list[Cost]:
    """Time appends, draws and statistics of full logs of all lengths, in turn."""
    states = _states()
    logs = {length: _full(POLICIES[name], length, states) for length in lengths}
    actions: dict[str, Callable[[MistakeLog], object]] = {
        "append": lambda log: log.append(states),
        "sample": lambda log: log.sample(DRAWN),
        "statistics": lambda log: log.statistics(),
    }
    seconds: dict[tuple[int, str], list[float]] = {(n, action): [] for n in lengths for action in actions}
    gc.collect()
    gc.freeze()  # pauses of the collector belong to no one call
    for _ in range(repeats):
        for length, log in logs.items():
            for action, act in actions.items():
                began = time.perf_counter()
                act(log)
                seconds[length, action].append(time.perf_counter() - began)
    gc.unfreeze()
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    costs = [Cost(name, n, *(medians[n, action] for action in actions)) for n in lengths]
    for cost in costs:
        cost.ratio, cost.append_ratio = cost.sample / costs[0].sample, cost.append / costs[0].append
    return costs


def _full(policy: type, rounds: int, states: PilotStates) -> MistakeLog:
    log = MistakeLog(capacity_rounds=rounds, policy=policy())
    for _ in range(rounds):
        log.append(states)
    return log


def _states() -> PilotStates:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(ROWS, TARGET, dtype=torch.bool)
    return PilotStates(
        torch.randn(ROWS, TARGET, VOCAB, generator=generator),
        torch.randn(ROWS, SOURCE, WIDTH, generator=generator),
        torch.ones(ROWS, SOURCE, dtype=torch.bool),
        torch.randn(ROWS, TARGET, WIDTH, generator=generator),
        torch.randint(VOCAB, (ROWS, TARGET), generator=generator),
        mask,
        torch.arange(ROWS),
        torch.arange(ROWS) % 3,
    )


if __name__ == "__main__":
    main()
