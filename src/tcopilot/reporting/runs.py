"""Finished runs: finding their directories, joining those that differ only in their seed, and naming each group."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tcopilot.evaluation.results import Results
from tcopilot.reporting import published
from tcopilot.run_directory import RUNLESS, flatten
from tcopilot.version import version_problem

ASIDE = (  # these, and what lies under them, change no figure
    *("callbacks", "compile", "control", "evaluation.batch_size", "evaluation.compile", "evaluation.decoding"),
    *("hydra", "logger", "name", "paths", "resume", "run", "seed", "traceback", "version"),
)
NOT_ASIDE = "callbacks.copilot_stop"
SHORT = {"mistake_log.log.policy": "mistake_log", "mistake_log.log.storage": "log_storage"}  # as one types them
MOST_KEYS = 4  # of a label


@dataclass
class Run:
    """A finished run: its folder, its figures, and its resolved config with dotted keys."""

    folder: Path
    results: Results
    config: dict[str, Any]


@dataclass
class Found:
    """What lies below the folders asked for: finished runs, unfinished ones, and unreadable ones with the reason."""

    runs: list[Run] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Say what is missing from the tables, a line each."""
        lines = [f"unfinished: {folder}" for folder in self.unfinished]
        return lines + [f"unreadable: {folder}: {reason}" for folder, reason in self.unreadable]


@dataclass
class Group:
    """Runs that differ only in their seed, one for each seed."""

    runs: list[Run]
    config: dict[str, Any]  # what they share, as far as it may change a figure
    pilot: str  # the paper's name of it where it has one
    copilot: str | None  # the paper's name of it, else "Copilot"; None without one
    notes: list[str]  # what a reader of the figures needs to know
    keys: str = ""  # what sets the group apart from others of its models
    label: str = ""  # models and keys in one line


def find_runs(folders: Iterable[str | Path]) -> Found:
    """Read every run directory at or below the folders, each once.

    Raises:
        FileNotFoundError: If a folder is not there.
    """
    found, seen = Found(), set()
    for top in map(Path, folders):
        if not top.is_dir():
            raise FileNotFoundError(f"{top}: no such folder; give run directories, or a folder that holds some")
        for name, below, names in os.walk(top):
            folder = Path(name)
            is_run = not {"results.json", "config.yaml"}.isdisjoint(names)
            below[:] = sorted(b for b in below if b[0] != "." and not (is_run and b in RUNLESS))
            if not is_run or folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if "results.json" not in names:
                found.unfinished.append(folder)
                continue
            try:
                found.runs.append(_read_run(folder))
            except Exception as error:  # whatever is wrong with one run, the others are shown
                found.unreadable.append((folder, " ".join(str(error).replace(f"{folder}/", "").split())))
    return found


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Join runs that differ only in their seed, and name each group by what sets it apart from the others."""
    groups = [_group(members) for members in _alike(runs)]
    _label(groups)
    return groups


def _read_run(folder: Path) -> Run:
    results = Results.load(folder / "results.json")
    if not results.rows:
        raise ValueError("results.json: 'rows' is empty; evaluate the run again with eval.py")
    for i, row in enumerate(results.rows):
        if not isinstance(row.value, int | float):
            raise ValueError(f"results.json: rows[{i}]: 'value' is {row.value!r}, not a number")
    path = folder / "config.yaml"
    if not path.exists():
        raise ValueError("no config.yaml beside results.json; copy the run directory as a whole")
    config = OmegaConf.to_container(OmegaConf.load(path))
    if not config or not isinstance(config, dict):
        raise ValueError("config.yaml: holds no keys; copy it anew from where the run was made")
    if problem := version_problem(config):
        raise ValueError(problem)
    return Run(folder, results, flatten(config))


def _alike(runs: Sequence[Run]) -> list[list[Run]]:
    """Part the runs into those that differ only in their seed.

    A seed further down (`data.seed`) either follows the run's or has a value of its own. Which of the two cannot be
    told from one run, so of several runs that are equal otherwise the reading with fewer groups is taken.
    """
    alike = []
    for members in _parted(runs, _figures_of):
        for key in sorted({key for run in members for key in run.config if key.endswith(".seed")}):
            followed = [run for run in members if run.config.get(key) == run.results.seed]
            fixed = {run.config.get(key) for run in members if run.config.get(key) != run.results.seed}
            if len({run.config.get(key) for run in members}) > len(fixed) + bool(followed):
                for run in followed:
                    run.config[key] = "seed"
        alike += _parted(members, _seeds_of)
    return alike


def _parted(runs: Sequence[Run], by: Callable[[Run], dict[str, Any]]) -> list[list[Run]]:
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(json.dumps(by(run), sort_keys=True, default=str), []).append(run)
    return list(parts.values())


def _seeds_of(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key.endswith(".seed")}


def _figures_of(run: Run) -> dict[str, Any]:
    """The config without seeds and without what changes no figure; the run's own folder goes by one name."""
    own = re.compile(rf"\A{re.escape(str(run.config.get('paths.run_dir') or run.folder))}(?=/|\Z)")
    return {
        key: own.sub("<run>", value) if isinstance(value, str) else value
        for key, value in run.config.items()
        if not (_is_aside(key) or key.endswith(".seed"))
    }


def _is_aside(key: str) -> bool:
    under = any(key == place or key.startswith(f"{place}.") for place in ASIDE)
    return under and not key.startswith(NOT_ASIDE)


def _group(runs: list[Run]) -> Group:
    """Take one run for each seed, the first found, and name the models."""
    kept: dict[int, Run] = {}
    notes = []
    for run in runs:
        first = kept.setdefault(run.results.seed, run)
        if first is not run:
            notes.append(f"seed {run.results.seed} is there twice: {first.folder} counts, {run.folder} does not")
    members = [kept[seed] for seed in sorted(kept)]
    config, chosen_on = members[0].config, members[0].results.selected_on
    if members[0].results.reported_on == chosen_on:
        notes.append(f"λ was chosen on the very rows reported ({chosen_on}): the gain is optimistic")
    if config.get("pilot.frozen"):
        notes.append("pilot.frozen=true: this Pilot was finished before; the published Pilots were fine-tuned jointly")
    path, copilot = config.get("pilot.path"), None
    own = Path(path).name if path else f"{config.get('pilot.config.model_type', 'model')} with random weights"
    if config.get("copilot.enabled", True):
        donor, layers = config.get("copilot.path"), config.get("copilot.layers")
        copilot = published.copilot_name(path, donor, layers) or "Copilot"
    seeds = _seeds_of(members[0])
    fixed = {key: seed for key, seed in seeds.items() if seed != "seed" and set(kept) != {seed}}
    return Group(members, _figures_of(members[0]) | fixed, published.pilot_name(path) or own, copilot, notes)


def _label(groups: Sequence[Group]) -> None:
    """Name each group: models, benchmarks if these differ, and the keys that differ among groups of one name."""
    benchmarks = [_names({row.benchmark for row in group.runs[0].results.rows} - {"all"}) for group in groups]
    for group, names in zip(groups, benchmarks, strict=True):
        models = f"{group.pilot} + {group.copilot}" if group.copilot else f"{group.pilot} alone"
        group.label = f"{models} on {names}" if len(set(benchmarks)) > 1 else models
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
    """Name a set of benchmarks; a whole suite goes by its own name.

    >>> _names({"gsm8k", "aqua", "svamp", "mawps", "piqa"})
    'arithmetic, piqa'
    """
    whole = [suite for suite in published.REASONING if benchmarks.issuperset(published.members(suite))]
    return ", ".join(whole + sorted(benchmarks.difference(*map(published.members, whole))))


def _differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ, without those that only repeat or belong to another one."""
    seen: dict[str, list[str]] = {}
    for key in sorted({key for config in configs for key in config}, key=lambda key: (key.count("."), key)):
        values = [json.dumps(config.get(key, "<none>"), sort_keys=True, default=str) for config in configs]
        above = [key[:end] for end, sign in enumerate(key) if sign == "."]
        belongs = any(key not in config for config in configs) and any(parent in seen for parent in above)
        if len(set(values)) > 1 and not belongs and values not in seen.values():
            seen[key] = values
    return list(seen)


def _value(config: dict[str, Any], key: str) -> str:
    """Write the value of a key for a label, also of a key that only this group has or lacks."""
    if key in config:
        return _short(config[key])
    return "{…}" if any(name.startswith(f"{key}.") for name in config) else "unset"


def _short(value: Any) -> str:
    """Shorten a config value for a label; a class goes by its name in snake case, as config groups do.

    >>> _short("tcopilot.mistake_log.policies.Fifo"), _short([0, 0.3]), _short(None)
    ('fifo', '[0,0.3]', 'null')
    """
    if isinstance(value, str):
        name = re.fullmatch(r"(?:\w+\.)+([A-Z]\w*)", value)
        text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name[1]).lower() if name else value
    else:
        text = json.dumps(value, separators=(",", ":"), default=str)
    return text if len(text) <= 40 else f"{text[:39]}…"
