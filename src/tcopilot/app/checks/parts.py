"""Parts that are built late, tried out before weights load: objective, optimisers, schedules, callbacks, trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

REFUSALS = (ValueError, TypeError, ImportError, MisconfigurationException)
"""What a constructor raises, or its import, at values that it does not take."""
ROUNDS = 100  # of the schedule that is tried out


def refusal(error: Exception) -> str | None:
    """What a constructor did not take, in one line; None if the error is another one, a bug perhaps."""
    cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ is not None else error
    if isinstance(error, InstantiationException) and error.__cause__ is None:
        return " ".join(str(error).split())
    return " ".join(str(cause).split()) if isinstance(cause, REFUSALS) else None


def part_problems(cfg: DictConfig) -> list[str]:
    """Parts that cannot be built, or that do not take the values given."""
    problems = [problem for key in ("pilot", "copilot") for problem in _learner_problems(cfg, key)]
    if cfg.copilot.enabled:
        problems += _tried("objective", cfg.objective)
    broken = [
        problem for key in cfg.callbacks for problem in _tried(f"callbacks.{key}", cfg.callbacks[key], _check_callback)
    ]
    return (
        problems + broken + ([] if broken else _tried("trainer", cfg.trainer, logger=False, callbacks=callbacks(cfg)))
    )


def callbacks(cfg: DictConfig) -> list[Callback]:
    """The callbacks of the config, in its order; progress bars only where the trainer shows any."""
    made = [instantiate(node) for node in cfg.callbacks.values() if node is not None]
    return [one for one in made if cfg.trainer.enable_progress_bar or not isinstance(one, ProgressBar)]


def _learner_problems(cfg: DictConfig, key: str) -> list[str]:
    if (key == "pilot" and cfg.pilot.frozen) or (key == "copilot" and not cfg.copilot.enabled):
        return []
    optimizers: list[Any] = []
    problems = _tried(
        f"{key}.optimizer",
        cfg[key].optimizer,
        lambda make: optimizers.append(make([nn.Parameter(torch.zeros(1))])),
    )

    def schedule(make: Callable[..., Any]) -> None:
        make(optimizer=optimizers[0], num_training_steps=ROUNDS)

    return problems or _tried(f"{key}.scheduler", cfg[key].scheduler, schedule)


def _check_callback(made: Any) -> None:
    if not isinstance(made, Callback):
        raise TypeError(f"{type(made).__name__} is no Lightning callback")


def _tried(key: str, node: DictConfig | None, use: Callable[[Any], None] | None = None, **more: Any) -> list[str]:
    """Build a part and use it; what it does not take is told with the values given."""
    if node is None:
        return []
    warnings = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = warnings.level
    warnings.setLevel(logging.ERROR)  # Lightning's hints come when the real trainer is built
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
    finally:
        warnings.setLevel(level)
    return []
