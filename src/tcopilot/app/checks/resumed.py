"""What a run that goes on may be given besides its own config."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tcopilot.app.checks.problems import ConfigError
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
    because a later version of this package has added it, is taken whatever it is. Of a group's file, such as
    `evaluation=beam4`, the one thing is taken that it changes; see `_changes`.

    Args:
        before: the run's own config, changed in place.
        cfg: what the command line composes.
        given: its overrides.

    Returns:
        The overrides that were not taken.

    Raises:
        ConfigError: if a group's file would change several of the run's settings, which are named.
    """
    given = list(given)
    keys = [key_of(override) for override in given]
    following = flatten(OmegaConf.to_container(cfg, resolve=False))
    left_out, problems, taken = [], [], {}
    for key, override in zip(keys, given, strict=True):
        group, _, name = key.rpartition(".")
        there, wanted = (OmegaConf.select(config, group) if group else config for config in (before, cfg))
        known = isinstance(wanted, DictConfig) and name in wanted and isinstance(there, DictConfig)
        if not known or (name in there and not any(is_within(key, other) for other in CHANGEABLE)):
            left_out.append(override)
        elif isinstance(there.get(name), DictConfig) and OmegaConf.is_dict(wanted[name]):
            changes = dict(_changes(there[name], wanted[name], key))
            by_name = {place for place in changes if any(is_within(place, other) for other in keys if other != key)}
            if len(changes.keys() - by_name) > 1:
                problems.append(_ambiguous(before, override, changes.keys() - by_name, changes))
            taken |= {place: changes[place] for place in changes.keys() - by_name}
        else:
            value = wanted[name]
            taken[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if problems:
        raise ConfigError(problems)
    for key, value in taken.items():
        old = OmegaConf.select(before, key)
        for place in (key, *(other for other, raw in following.items() if raw == f"${{{key}}}")):
            if place == key or OmegaConf.select(before, place) == old:
                OmegaConf.update(before, place, value, merge=False, force_add=True)
    return left_out


def _changes(there: DictConfig, wanted: DictConfig, key: str) -> Iterator[tuple[str, Any]]:
    """The places at which a group's file differs from what the run has there, with the values to put in.

    A group for another class is one place, where settings that both classes have keep the run's values. Values that
    refer to other keys differ in nothing, and what the file lacks stays.
    """
    if there.get("_target_") != wanted.get("_target_"):
        values = OmegaConf.to_container(wanted, resolve=True)
        yield key, values | {name: there[name] for name in values if name in there and name != "_target_"}
        return
    for name in wanted:
        place = f"{key}.{name}"
        if name in there and OmegaConf.is_interpolation(wanted, name):
            continue
        value, old = wanted[name], there.get(name)
        if isinstance(value, DictConfig) and isinstance(old, DictConfig):
            yield from _changes(old, value, place)
        elif name not in there or value != old:
            yield place, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _ambiguous(before: DictConfig, override: str, places: Collection[str], changes: dict[str, Any]) -> str:
    def shown(value: Any) -> Any:
        value = value.get("_target_", "…").rpartition(".")[2] if isinstance(value, dict | DictConfig) else value
        return "null" if value is None else value

    listed = ", ".join(
        f"{place} from {shown(OmegaConf.select(before, place))} to {shown(changes[place])}" for place in sorted(places)
    )
    return (
        f"{override} on resuming would change several settings of the run: {listed}; instead, give the key of each "
        f"setting to change, or with {override} also the keys and values that are to stay"
    )
