"""What a run that goes on may be given besides its own config."""

from __future__ import annotations

from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

from tcopilot.app.checks.unused import is_within, key_of
from tcopilot.run_directory import flatten

CHANGEABLE = (
    *("rounds", "data.rounds", "data.epochs", "data.eval_batch_size", "data.num_workers", "evaluation", "fusion"),
    *("trainer", "callbacks", "logger", "control", "compile", "traceback", "objective", "mistake_log.every_n_rounds"),
    *(f"{model}.{part}" for model in ("pilot", "copilot") for part in ("optimizer", "scheduler", "clip")),
    *("copilot.steps_per_round", "copilot.own_feedback", "pilot.gradient_checkpointing", "pilot.micro_batch_size"),
)
"""What no checkpoint depends on: a run may go on with other values of these keys."""


def take_overrides(before: DictConfig, cfg: DictConfig, given: Iterable[str]) -> list[str]:
    """Put overrides of the command line into the config of a run that goes on.

    Keys that follow another, as `data.rounds` follows `rounds`, follow it still. A key that the run's config lacks,
    because a later version of this package has added it, is taken whatever it is.

    Args:
        before: the run's own config, changed in place.
        cfg: what the command line composes.
        given: its overrides.

    Returns:
        The overrides that were not taken.
    """
    following = flatten(OmegaConf.to_container(cfg, resolve=False))
    left_out = []
    for override in given:
        key = key_of(override)
        group, _, name = key.rpartition(".")
        there, wanted = (OmegaConf.select(config, group) if group else config for config in (before, cfg))
        known = isinstance(wanted, DictConfig) and name in wanted and isinstance(there, DictConfig)
        if not known or (name in there and not any(is_within(key, other) for other in CHANGEABLE)):
            left_out.append(override)
            continue
        old = there.get(name)
        value = wanted[name]
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for place in (key, *(other for other, raw in following.items() if raw == f"${{{key}}}")):
            if place == key or OmegaConf.select(before, place) == old:
                OmegaConf.update(before, place, value, merge=False, force_add=True)
    return left_out
