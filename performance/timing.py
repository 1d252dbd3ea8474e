"""What the scripts that time something share: actions taken in turn, and their operations."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tcopilot.training.callbacks.flops import FlopCounter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Action = Callable[[], object]
Name = TypeVar("Name")


def in_turn(actions: Mapping[Name, Action], repeats: int) -> dict[Name, float]:
    """Median seconds of each action; all are timed once before any is timed again, and the first turn warms up."""
    taken: dict[Name, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, act in actions.items():
            taken[name].append(seconds_of(act))
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def seconds_of(act: Action) -> float:
    """Seconds that an action takes, with what it has a GPU do."""
    synchronise()
    began = time.perf_counter()
    act()
    synchronise()
    return time.perf_counter() - began


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def flops_of(act: Action) -> int:
    """Operations of an action by torch's formulas, attention written out, as one backward pass takes it everywhere."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
        act()
    return counter.flops
