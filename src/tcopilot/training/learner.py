"""How a model is updated: its optimiser, its schedule, and the clipping of its gradients."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from tcopilot.settings import POSITIVE


@dataclass
class Learner:
    """How one of the two models is updated.

    The schedule is made from the optimiser and the number of rounds, and stepped once a round; `clip` is the largest
    gradient norm.
    """

    SETTINGS: ClassVar = {"clip": POSITIVE.or_null()}

    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler]
    clip: float | None = 1.0


def take_settings(optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Let the config's settings win over those in a checkpoint, as when a diverged run goes on at a lower rate."""
    if len(optimizer.param_groups) != 1 or not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        return  # a user's own optimiser or scheduler
    (group,), rate = optimizer.param_groups, optimizer.defaults["lr"]
    group.update({name: value for name, value in optimizer.defaults.items() if name in group})
    scheduler.base_lrs = [rate]
    group["initial_lr"], group["lr"] = rate, rate * scheduler.lr_lambdas[0](scheduler.last_epoch)
