"""Config groups: what their files say by themselves, and values that stand where the name of a file should."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig


def group_problems(overrides: Sequence[str], configs: Path) -> list[str]:
    """Overrides such as `objective=null` and `pilot=5`, in which a group is given something that names no file."""
    problems = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            continue  # an option such as --cfg, or what Hydra itself refuses in one line
        folder = configs / override.key_or_group
        plain = not (override.is_delete() or override.is_add() or override.is_sweep_override())
        if plain and folder.is_dir() and not isinstance(override.value(), str | list):
            names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml"))) or "a file below it"
            problems.append(
                f"{text}: {override.key_or_group} is a config group; leave it out, or choose one of {names}"
            )
    return problems


def given_overrides() -> list[str]:
    """The overrides of the command line."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def plain_config(cfg: DictConfig) -> DictConfig | None:
    """The program's config by the files of its groups alone, without experiments and what a data file adds.

    None for a run that goes on, outside of Hydra's programs, and where an experiment has brought groups of its own.
    """
    if cfg.get("resume") or not HydraConfig.initialized():
        return None
    chosen = {**HydraConfig.get().runtime.choices, "data": "base"}
    own = ("hydra", "experiment", "debug")
    given = [f"{key}={name}" for key, name in chosen.items() if key.split("/")[0] not in own]
    try:
        return compose(HydraConfig.get().job.config_name, [text.replace("=None", "=null") for text in given])
    except HydraException:
        return None


def refuse_values_for_group_names(configs: Path) -> None:
    """End the program with one message if its command line has such overrides."""
    if problems := group_problems(sys.argv[1:], configs):
        sys.exit("\n".join(["error: the command line cannot work:", *(f"  - {problem}" for problem in problems)]))
