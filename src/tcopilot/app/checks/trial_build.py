"""Build optimisers, schedules, callbacks and the trainer once before weights load, to hear what they refuse.

They belong to other libraries or to users, so their constructors alone know which values they take.
"""

from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Callback
from omegaconf import DictConfig, OmegaConf
from torch import nn

from tcopilot.app.checks.controls import trains_frozen
from tcopilot.app.checks.problems import refusal
from tcopilot.app.trainer import fixed, make_callbacks, quiet_lightning


@quiet_lightning()  # it gives its hints again when the real trainer is built
def trial_problems(cfg: DictConfig) -> list[str]:
    """Parts that cannot be built, or that do not take the values given."""
    is_trained = not cfg.pilot.frozen or trains_frozen(cfg)
    problems = _learner_problems("pilot", cfg.pilot) if is_trained else []
    if cfg.copilot.enabled:
        problems += _learner_problems("copilot", cfg.copilot) + _refused("objective", cfg.objective, _use_objective)
    callbacks = [
        problem for key, node in cfg.callbacks.items() for problem in _refused(f"callbacks.{key}", node, _use_callback)
    ]
    if callbacks:
        return problems + callbacks
    return problems + _refused("trainer", cfg.trainer, logger=False, callbacks=make_callbacks(cfg), **fixed(cfg))


def _learner_problems(key: str, node: DictConfig) -> list[str]:
    made: list[torch.optim.Optimizer] = []
    return _refused(
        f"{key}.optimizer", node.optimizer, lambda make: made.append(make([nn.Parameter(torch.zeros(1))]))
    ) or _refused(f"{key}.scheduler", node.scheduler, lambda make: make(optimizer=made[0], num_training_steps=100))


def _use_objective(made: Any) -> None:
    for method in ("row_losses", "reduce"):
        if not callable(getattr(made, method, None)):
            raise TypeError(f"{type(made).__name__} has no method {method}; see Objective in training/objectives.py")


def _use_callback(made: Any) -> None:
    if not isinstance(made, Callback):
        raise TypeError(f"{type(made).__name__} is not a Lightning callback")


def _refused(key: str, node: DictConfig | None, use: Callable[[Any], Any] | None = None, **more: Any) -> list[str]:
    """Build a part and use it; a refusal is reported with the values given."""
    if node is None:
        return []
    try:
        made = instantiate(node, _convert_="all", **more)
        if use is not None:
            use(made)
    except Exception as error:
        reason = refusal(error)
        values = OmegaConf.to_container(node, resolve=True)
        if reason is None and str(values["_target_"]).startswith("tcopilot."):
            raise  # a bug of ours
        reason = reason or f"{type(error).__name__}: {error}"
        given = ", ".join(
            f"{name}={value}" for name, value in values.items() if name not in ("_partial_", "_convert_")
        )
        return [f"{key} does not take {given}: {reason}"]
    return []
