"""Groups of finished runs that differ only in their seed, named by the settings in which the groups differ."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcopilot.reporting import published
from tcopilot.reporting.finished_runs import FinishedRun

IRRELEVANT = (  # keys that, with all below them, affect no figure, except for callbacks.copilot_stop
    *("callbacks", "compile", "control", "evaluation.batch_size", "evaluation.compile", "evaluation.decoding"),
    *("hydra", "logger", "mistake_log.from", "name", "paths", "resume", "run", "seed", "traceback", "version"),
)
SHORT = {"mistake_log.log.policy": "mistake_log", "mistake_log.log.storage": "log_storage"}  # as on the command line
MOST_KEYS = 4  # number of keys in a label


@dataclass
class Group:
    """Runs that differ only in their seed, one for each seed."""

    runs: list[FinishedRun]
    config: dict[str, Any]  # the settings that they share, as far as these may affect a figure
    pilot: str  # the paper's name of the Pilot, if it has one
    copilot: str | None  # the paper's name of the Copilot, else "Copilot"; None without a Copilot
    notes: list[str]  # what a reader of the figures needs to know
    keys: str = ""  # settings that distinguish the group from others with the same models
    label: str = ""  # models and keys in one line

    @property
    def models(self) -> str:
        """Pilot and Copilot in one phrase."""
        return f"{self.pilot} + {self.copilot}" if self.copilot else f"{self.pilot} alone"


def group_runs(runs: Sequence[FinishedRun]) -> list[Group]:
    """Join runs that differ only in their seed, and name each group by the settings that distinguish it from others.

    A nested seed such as `data.seed` either follows the run's seed or is set separately. A single run does not show
    which, so among runs that are otherwise equal the interpretation that gives fewer groups is used.
    """
    groups = []
    for members in _parted(runs, _figures_of):
        for key in sorted({key for run in members for key in run.config if key.endswith(".seed")}):
            followed = [run for run in members if run.config.get(key) == run.results.seed]
            fixed = {run.config.get(key) for run in members if run.config.get(key) != run.results.seed}
            if len({run.config.get(key) for run in members}) > len(fixed) + bool(followed):
                for run in followed:
                    run.config[key] = "seed"
        groups += map(_group, _parted(members, _seeds_of))
    _label(groups)
    return groups


def _parted(runs: Sequence[FinishedRun], by: Callable[[FinishedRun], dict[str, Any]]) -> list[list[FinishedRun]]:
    """Partition the runs by the value of a function."""
    parts: dict[str, list[FinishedRun]] = {}
    for run in runs:
        parts.setdefault(json.dumps(by(run), sort_keys=True, default=str), []).append(run)
    return list(parts.values())


def _seeds_of(run: FinishedRun) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key.endswith(".seed")}


def _figures_of(run: FinishedRun) -> dict[str, Any]:
    """Return the settings that may affect figures, without seeds; the run's own folder is replaced by a fixed name."""
    own = re.compile(rf"\A{re.escape(str(run.config.get('paths.run_dir') or run.folder))}(?=/|\Z)")
    return {
        key: own.sub("<run>", value) if isinstance(value, str) else value
        for key, value in run.config.items()
        if key.startswith("callbacks.copilot_stop")
        or not (key.endswith(".seed") or f"{key}.".startswith(tuple(f"{place}." for place in IRRELEVANT)))
    }


def _group(runs: list[FinishedRun]) -> Group:
    """Make a group of the first run found for each seed, and name the models."""
    kept: dict[int, FinishedRun] = {}
    notes = []
    for run in runs:
        first = kept.setdefault(run.results.seed, run)
        if first is not run:
            notes.append(f"seed {run.results.seed} was found twice: {first.folder} counts, {run.folder} does not")
    members = [kept[seed] for seed in sorted(kept)]
    config, chosen_on = members[0].config, members[0].results.selected_on
    if members[0].results.reported_on == chosen_on:
        notes.append(f"λ was chosen on the same rows that are reported ({chosen_on}): the gain is optimistic")
    if config.get("pilot.frozen"):
        notes.append("pilot.frozen=true: this Pilot was finished before; the published Pilots were fine-tuned jointly")
    path, copilot = config.get("pilot.path"), None
    own = Path(str(path)).name if path else f"{config.get('pilot.config.model_type', 'model')} with random weights"
    if config.get("copilot.enabled", True):
        copilot = published.copilot_name(path, config.get("copilot.path"), config.get("copilot.layers")) or "Copilot"
    fixed = {key: seed for key, seed in _seeds_of(members[0]).items() if seed != "seed" and set(kept) != {seed}}
    return Group(members, _figures_of(members[0]) | fixed, published.pilot_name(path) or own, copilot, notes)


def _label(groups: Sequence[Group]) -> None:
    """Name each group by its models, by benchmarks if these differ, and by keys that differ among equal names."""
    benchmarks = [_names({row.benchmark for row in group.runs[0].results.rows} - {"all"}) for group in groups]
    for group, names in zip(groups, benchmarks, strict=True):
        group.label = f"{group.models} on {names}" if len(set(benchmarks)) > 1 else group.models
    for name in {group.label for group in groups}:
        same = [group for group in groups if group.label == name]
        keys = _differing([group.config for group in same])
        rest = [f"{len(keys) - MOST_KEYS} more"] if len(keys) > MOST_KEYS else []
        for group in same:
            parts = [f"{SHORT.get(key, key)}={_value(group.config, key)}" for key in keys[:MOST_KEYS]]
            group.keys = ", ".join(parts + rest)
            group.label = f"{name}: {group.keys}" if keys else name
    taken = Counter(group.label for group in groups)
    for group in groups:
        if taken[group.label] > 1:
            group.label += f" ({group.runs[0].folder})"


def _names(benchmarks: set[str]) -> str:
    """Name a set of benchmarks; a complete suite is given by the name of the suite.

    >>> _names({"gsm8k", "aqua", "svamp", "mawps", "piqa"})
    'arithmetic, piqa'
    """
    whole = [suite for suite in published.REASONING if benchmarks.issuperset(published.members(suite))]
    return ", ".join(whole + sorted(benchmarks.difference(*map(published.members, whole))))


def _differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ, without keys that vary exactly as, or lie below, another such key."""
    seen: dict[str, list[str]] = {}
    for key in sorted({key for config in configs for key in config}, key=lambda key: (key.count("."), key)):
        values = [json.dumps(config.get(key, "<none>"), sort_keys=True, default=str) for config in configs]
        above = [key[:end] for end, sign in enumerate(key) if sign == "."]
        belongs = any(key not in config for config in configs) and any(parent in seen for parent in above)
        if len(set(values)) > 1 and not belongs and values not in seen.values():
            seen[key] = values
    return list(seen)


def _value(config: dict[str, Any], key: str) -> str:
    """Shorten the value of a key, which the config may lack; a class is given by its name in snake case.

    >>> config = {"log": "tcopilot.mistake_log.policies.Fifo", "fusion.weight": [0, 0.3], "path": None}
    >>> [_value(config, key) for key in (*config, "fusion", "rounds")]
    ['fifo', '[0,0.3]', 'null', '{…}', 'unset']
    """
    if key not in config:
        return "{…}" if any(name.startswith(f"{key}.") for name in config) else "unset"
    text = value = config[key]
    if not isinstance(value, str):
        text = json.dumps(value, separators=(",", ":"), default=str)
    elif name := re.fullmatch(r"(?:\w+\.)+([A-Z]\w*)", value):
        text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name[1]).lower()
    text = text.replace("\n", "\\n")  # a line break would end a row of a Markdown table
    return text if len(text) <= 40 else f"{text[:39]}…"
