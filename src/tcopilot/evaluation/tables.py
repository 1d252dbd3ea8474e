"""`tcopilot-table`: one table from many run directories, beside the paper's figures.

Runs that differ only in their seed are one experiment and give mean ± sd. Accuracies and their like are in percent,
differences in points; losses keep their own unit.
"""

import argparse
import csv
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tcopilot.evaluation import published
from tcopilot.evaluation.results import LOSSES, Results
from tcopilot.evaluation.significance import ALPHA, direction, over_seeds, p_text

INSIDE_RUNS = {"checkpoints", "control", "export", "predictions"}  # folders of a run that hold no runs
ASIDE = {
    "callbacks",
    "control",
    "hydra",
    "logger",
    "name",
    "paths",
    "resume",
    "run",
    "seed",
    "traceback",
}  # change no figure
SHORT = {"mistake_log.log.policy": "mistake_log", "mistake_log.log.storage": "log_storage"}  # as one types them
LOWER_IS_BETTER = LOSSES | {"no_answer"}
MOST_KEYS = 4  # of a label
WIDTH = 200  # characters of a table that is no terminal's
LEFT = {"", "benchmark", "metric", "verdict"}  # heads of columns of words
NONE, IMPOSSIBLE = "–", "†"


@dataclass
class Run:
    """A finished run: its folder, its figures, and its resolved config with dotted keys."""

    folder: Path
    results: Results
    config: dict[str, Any]

    @property
    def split(self) -> str:
        """The split whose figures count: the one the config reports on, else the one λ was not chosen on."""
        splits = dict.fromkeys(row.split for row in self.results.rows)
        asked = self.config.get("evaluation.report_on")
        return asked if asked in splits else next((s for s in splits if s != self.results.selected_on), min(splits))


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


class Spread(NamedTuple):
    """Mean over seeds, and sample standard deviation where there is more than one seed."""

    mean: float
    sd: float | None


class Seen(NamedTuple):
    """One metric in one run, in the unit of the table; without a Copilot `fused` is None."""

    seed: int
    n: int | None
    pilot: float
    fused: float | None
    weight: float | None
    p_value: float | None = None
    verdict: str | None = None


@dataclass
class Line:
    """One metric of one benchmark over the seeds of an experiment.

    Attributes:
        benchmark: Its name, or `commonsense_avg` and `arithmetic_avg`.
        metric: What was measured.
        unit: `%`, or empty for a loss; also the unit of every figure here.
        n: Rows, as text since it may differ between seeds; empty for an average.
        seeds: Seeds that have the figure.
        weights: The λ selected, one for each seed.
        pilot: The Pilot, λ = 0.
        fused: Pilot + Copilot at the selected λ.
        gain: Their difference.
        relative: The gain in percent of the Pilot's mean.
        p_value: Of the run's own paired test over rows, or of a paired t test over seeds.
        verdict: The same in words.
        published_pilot: The paper's figure for the Pilot.
        published_fused: The paper's figure with its Copilot.
        impossible: Which of the two contradict the hits published beside them: `pilot`, `fused`.
    """

    benchmark: str
    metric: str
    unit: str
    n: str
    seeds: list[int]
    weights: list[float]
    pilot: Spread
    fused: Spread | None
    gain: Spread | None
    relative: float | None
    p_value: float | None
    verdict: str
    published_pilot: float | None = None
    published_fused: float | None = None
    impossible: set[str] = field(default_factory=set)

    def beyond(self, side: str) -> float | None:
        """Return our mean minus the published figure in points, if there is one that is possible."""
        ours, theirs = getattr(self, side), getattr(self, f"published_{side}")
        return None if ours is None or theirs is None or side in self.impossible else ours.mean - theirs


@dataclass
class Group:
    """Runs that differ only in their seed.

    `pilot` and `copilot` are the paper's names of the models where it has one; `keys` are the config keys that set the
    group apart from others of its models, `label` says all of this in one line; `published_metric` is the one of our
    metrics that stands beside its accuracies; `missing` names the members without which a suite has no average.
    """

    runs: list[Run]
    config: dict[str, Any]
    pilot: str
    copilot: str | None
    split: str
    label: str = ""
    keys: str = ""
    lines: list[Line] = field(default_factory=list)
    published_metric: str = "accuracy"
    missing: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def line(self, benchmark: str, metric: str) -> Line | None:
        """Return the line of a metric, or None."""
        return next((line for line in self.lines if (line.benchmark, line.metric) == (benchmark, metric)), None)


@dataclass
class Sheet:
    """A table as text, for the terminal and for Markdown alike; `None` among the rows is a rule."""

    title: str
    head: list[str]
    rows: list[list[str] | None]
    notes: list[str]


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
            below[:] = sorted(b for b in below if b[0] != "." and not (is_run and b in INSIDE_RUNS))
            if not is_run or folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if "results.json" not in names:
                found.unfinished.append(folder)
                continue
            try:
                found.runs.append(_read_run(folder))
            except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
                found.unreadable.append((folder, " ".join(str(error).replace(f"{folder}/", "").split())))
    return found


def group_runs(runs: Sequence[Run], metric: str | None = None) -> list[Group]:
    """Join runs that differ only in their seed, name each group by what sets it apart, and summarise it.

    Args:
        runs: Finished runs.
        metric: The metric to show; None takes accuracy, with the lenient one if it is there, and hits and NDCG.
    """
    groups = [_group(members) for members in _alike(runs)]
    _label(groups)
    for group in groups:
        _summarise(group, metric)
    return groups


def summarise(benchmark: str, metric: str, seen: Sequence[Seen]) -> Line:
    """Make one line of one metric's figures, one for each seed.

    One seed keeps its own paired test over the rows. Several are compared with a paired t test over the seeds, and
    the verdict also counts how each seed judged alone.
    """
    both = [one for one in seen if one.fused is not None]
    gains = [one.fused - one.pilot for one in both]
    pilot, gain = _spread([one.pilot for one in seen]), _spread(gains)
    sizes = sorted({one.n for one in seen if one.n is not None})
    p_value, verdict = _judge(metric, both, gains)
    base = over_seeds([one.pilot for one in both])[0] if both else 0.0
    return Line(
        benchmark,
        metric,
        "" if metric in LOSSES else "%",
        n="–".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1]))) if sizes else "",
        seeds=[one.seed for one in seen],
        weights=[one.weight for one in both if one.weight is not None],
        pilot=pilot,
        fused=_spread([one.fused for one in both]),
        gain=gain,
        relative=100 * gain.mean / base if gain and base else None,
        p_value=p_value,
        verdict=verdict,
    )


def sheets(groups: Sequence[Group]) -> list[Sheet]:
    """Lay out the gains of each group, and then all groups in the paper's columns."""
    laid = [_gain_sheet(group) for group in groups if group.lines]
    in_suite = {name: b.suite for name, b in published.benchmarks().items()}
    suites = {in_suite.get(line.benchmark) for group in groups for line in group.lines}
    columns = []
    for suite in published.REASONING:
        if suite in suites:
            names = published.members(suite)
            columns += [(published.benchmarks()[name].label, name) for name in names] + [("avg", f"{suite}_avg")]
    if columns:
        laid.append(
            _paper_sheet("In the paper's columns", groups, lambda g: [(*c, g.published_metric) for c in columns])
        )
    for name in published.members("recommendation"):
        metrics = list(dict.fromkeys(line.metric for g in groups for line in g.lines if line.benchmark == name))
        if metrics:
            ranked = [(metric, name, metric) for metric in sorted(metrics, key=_rank)]
            laid.append(_paper_sheet(published.benchmarks()[name].label, groups, lambda _, ranked=ranked: ranked))
    return laid


def markdown(laid: Sequence[Sheet], problems: Sequence[str]) -> str:
    """Write the sheets as Markdown tables with their notes beneath."""
    parts = []
    for sheet in laid:
        rows = [
            sheet.head,
            ["---" if head in LEFT else "---:" for head in sheet.head],
            *(row for row in sheet.rows if row),
        ]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        parts.append("\n".join([f"### {sheet.title}", "", *lines, "", *(f"- {note}" for note in sheet.notes)]).strip())
    if problems:
        parts.append("\n".join(["### Left out", "", *(f"- {problem}" for problem in problems)]))
    return "\n\n".join(parts) + "\n"


def records(group: Group) -> list[dict[str, Any]]:
    """Return the lines of a group as flat records, for CSV and JSON; figures are not rounded."""
    shown = []
    for line in group.lines:
        record = {"benchmark": line.benchmark, "metric": line.metric, "split": group.split, "unit": line.unit}
        record |= {"n": line.n, "seeds": line.seeds, "weights": line.weights}
        for name in ("pilot", "fused", "gain"):
            mean, sd = getattr(line, name) or (None, None)
            record |= {f"{name}_mean": mean, f"{name}_sd": sd}
        record |= {"relative_percent": line.relative, "p_value": line.p_value, "verdict": line.verdict}
        for side in ("pilot", "fused"):
            record[f"published_{side}"] = getattr(line, f"published_{side}")
            record[f"{side}_minus_published"] = line.beyond(side)
        shown.append(record | {"published_impossible": sorted(line.impossible)})
    return shown


def as_csv(groups: Sequence[Group]) -> str:
    """Write one line for each group, benchmark and metric; lists are parted by spaces."""
    rows = [
        {"group": group.label, "pilot": group.pilot, "copilot": group.copilot}
        | {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in record.items()}
        for group in groups
        for record in records(group)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(groups: Sequence[Group], found: Found) -> str:
    """Write everything the tables show as one JSON object."""
    shown = [
        {
            "label": group.label,
            "pilot": group.pilot,
            "copilot": group.copilot,
            "runs": [str(run.folder) for run in group.runs],
            "published_metric": group.published_metric,
            "lines": records(group),
            "missing": group.missing,
            "notes": group.notes,
        }
        for group in groups
    ]
    unreadable = [{"folder": str(folder), "reason": reason} for folder, reason in found.unreadable]
    data = {"groups": shown, "unfinished": [str(folder) for folder in found.unfinished], "unreadable": unreadable}
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tcopilot-table`.

    Returns:
        0, or 1 with a message on stderr if there is nothing to show or a file cannot be written.
    """
    parser = argparse.ArgumentParser(
        "tcopilot-table", description="One table from many runs, beside the paper's figures."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run directory, or any folder above some")
    parser.add_argument("--metric", help="the metric to show; by default accuracy, or hits and NDCG")
    for kind in ("markdown", "csv", "json"):
        parser.add_argument(
            f"--{kind}", metavar="FILE", help=f"also write {kind}; - is stdout, and nothing else there"
        )
    asked = parser.parse_args(arguments)
    wanted = {kind: path for kind in ("markdown", "csv", "json") if (path := getattr(asked, kind))}
    if list(wanted.values()).count("-") > 1:
        parser.error("only one of --markdown, --csv and --json can be - (stdout)")
    try:
        found = find_runs(asked.folders)
        groups = group_runs(_usable(found, asked), asked.metric)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    laid, problems, quiet = sheets(groups), found.problems(), "-" in wanted.values()
    if not quiet:
        _print(laid)
    for problem in problems:
        print(problem, file=sys.stderr if quiet else sys.stdout)
    texts = {"markdown": lambda: markdown(laid, problems), "csv": lambda: as_csv(groups)}
    texts["json"] = lambda: as_json(groups, found)
    for kind, path in wanted.items():
        try:
            _write(path, texts[kind]())
        except OSError as error:
            print(f"error: --{kind} {path}: cannot be written, {error.strerror}", file=sys.stderr)
            return 1
    return 0


def _write(path: str, text: str) -> None:
    if path == "-":
        print(text, end="")
    else:
        Path(path).write_text(text, encoding="utf-8")


def _usable(found: Found, asked: argparse.Namespace) -> list[Run]:
    """Return the runs to show, or raise a ValueError that says why there are none."""
    where, metric = ", ".join(asked.folders), asked.metric
    if not found.runs:
        reasons = "".join(f"\n  {problem}" for problem in found.problems())
        raise ValueError(f"no finished run at or below {where}; a run has results.json and config.yaml{reasons}")
    kinds = {run.folder: {row.metric for row in run.results.rows if row.split == run.split} for run in found.runs}
    every = sorted(set().union(*kinds.values()))
    if metric and metric not in every:
        raise ValueError(f"--metric {metric}: no run at or below {where} has it; there are {', '.join(every)}")
    if not metric and not any(row.benchmark != "all" for run in found.runs for row in run.results.rows):
        raise ValueError(f"{where}: no run has figures of a benchmark; give --metric, there are {', '.join(every)}")
    return [run for run in found.runs if metric is None or metric in kinds[run.folder]]


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
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError("config.yaml: holds no keys; copy it anew from where the run was made")
    return Run(folder, results, dict(_flat(config)))


def _flat(config: dict[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """Yield dotted keys. The class of a node stands under the node's own key, as `null` does where there is none."""
    for key, value in config.items():
        name = above[:-1] if key == "_target_" and above else f"{above}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _alike(runs: Sequence[Run]) -> list[list[Run]]:
    """Part the runs into those that differ only in their seed.

    A seed further down (`data.seed`) either follows the run's or has a value of its own. Which of the two cannot be
    told from one run, so of several runs that are equal otherwise the reading with fewer groups is taken.
    """
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(json.dumps(_figures_of(run), sort_keys=True, default=str), []).append(run)
    alike = []
    for members in parts.values():
        for key in sorted({key for run in members for key in run.config if key.endswith(".seed")}):
            values = {run.config.get(key) for run in members}
            followed = [run for run in members if run.config.get(key) == run.results.seed]
            if len(values) > len({run.config.get(key) for run in members if run not in followed}) + bool(followed):
                for run in followed:
                    run.config[key] = "seed"
        seeds: dict[str, list[Run]] = {}
        for run in members:
            own = {key: value for key, value in run.config.items() if key.endswith(".seed")}
            seeds.setdefault(json.dumps(own, sort_keys=True, default=str), []).append(run)
        alike += seeds.values()
    return alike


def _figures_of(run: Run) -> dict[str, Any]:
    """The config without seeds and without what changes no figure; the run's own folder goes by one name."""
    own = str(run.config.get("paths.run_dir") or run.folder)

    def plain(value: Any) -> Any:
        inside = isinstance(value, str) and (value == own or value.startswith(f"{own}/"))
        return value.replace(own, "<run>", 1) if inside else value

    kept = {key: value for key, value in run.config.items() if key.split(".")[0] not in ASIDE}
    return {key: plain(value) for key, value in kept.items() if not key.endswith(".seed")}


def _group(runs: list[Run]) -> Group:
    """Take one run for each seed, the first found, and name the models."""
    kept: dict[int, Run] = {}
    notes = []
    for run in runs:
        first = kept.setdefault(run.results.seed, run)
        if first is not run:
            notes.append(f"seed {run.results.seed} is there twice: {first.folder} counts, {run.folder} does not")
    members = [kept[seed] for seed in sorted(kept)]
    config, results = members[0].config, members[0].results
    if members[0].split == results.selected_on:
        notes.append(f"λ was chosen on the very rows reported ({results.selected_on}): the gain is optimistic")
    path = config.get("pilot.path")
    own = f"{config.get('pilot.config.model_type', 'model')} with random weights"
    copilot = None
    if config.get("copilot.enabled", True):
        donor, layers = config.get("copilot.path"), config.get("copilot.layers")
        copilot = published.copilot_name(path, donor, layers) or "Copilot"
    fixed = {key: value for key, value in config.items() if key.endswith(".seed") and value != "seed"}
    fixed = {key: value for key, value in fixed.items() if any(run.results.seed != value for run in members)}
    pilot = published.pilot_name(path) or (str(path).rstrip("/").rpartition("/")[2] if path else own)
    return Group(members, _figures_of(members[0]) | fixed, pilot, copilot, members[0].split, notes=notes)


def _label(groups: Sequence[Group]) -> None:
    """Name each group: models, benchmarks if these differ, and the keys that differ among groups of one name."""
    benchmarks = [_names({row.benchmark for row in group.runs[0].results.rows} - {"all"}) for group in groups]
    for group, names in zip(groups, benchmarks, strict=True):
        models = f"{group.pilot} + {group.copilot}" if group.copilot else f"{group.pilot} alone"
        group.label = f"{models} on {names}" if len(set(benchmarks)) > 1 else models
    for name in {group.label for group in groups}:
        same = [group for group in groups if group.label == name]
        keys = _differing([group.config for group in same])
        for group in same:
            parts = [f"{SHORT.get(key, key)}={_value(group.config, key)}" for key in keys[:MOST_KEYS]]
            rest = [f"{len(keys) - MOST_KEYS} more"] if len(keys) > MOST_KEYS else []
            group.keys = ", ".join(parts + rest)
            group.label = f"{name}: {group.keys}" if parts else name
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
    rest = benchmarks.difference(*(published.members(suite) for suite in whole))
    return ", ".join(whole + sorted(rest))


def _differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values differ, without those that only repeat or belong to another one."""
    seen: dict[str, str] = {}
    for key in sorted({key for config in configs for key in config}, key=lambda key: (key.count("."), key)):
        values = [json.dumps(config.get(key, "<none>"), sort_keys=True, default=str) for config in configs]
        above = [key[:end] for end, sign in enumerate(key) if sign == "."]
        belongs = any(key not in config for config in configs) and any(parent in seen for parent in above)
        if len(set(values)) > 1 and not belongs and "\n".join(values) not in seen.values():
            seen[key] = "\n".join(values)
    return list(seen)


def _value(config: dict[str, Any], key: str) -> str:
    """Write the value of a key for a label, also of a key that only this group has or lacks."""
    if key in config:
        return _short(config[key])
    return "{…}" if any(name.startswith(f"{key}.") for name in config) else "unset"


def _short(value: Any) -> str:
    """Shorten a config value for a label; a class goes by its name in snake case, as config groups do.

    >>> _short("tcopilot.sampling.Fifo"), _short([0, 0.3]), _short(None)
    ('fifo', '[0,0.3]', 'null')
    """
    if isinstance(value, str):
        name = re.fullmatch(r"(?:\w+\.)+([A-Z]\w*)", value)
        text = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name[1]).lower() if name else value
    else:
        text = json.dumps(value, separators=(",", ":"), default=str)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _summarise(group: Group, metric: str | None) -> None:
    """Fill in the lines of a group: benchmarks in the paper's order, averages behind their suite."""
    seen = _observations(group)
    order = list(published.benchmarks())
    names = list(dict.fromkeys(benchmark for benchmark, _ in seen))
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    shown = {name: _shown([m for b, m in seen if b == name], metric) for name in names if metric or name != "all"}
    lenient = metric == "accuracy_lenient" or (
        metric is None
        and all("accuracy_lenient" in m for m in shown.values() if "accuracy" in m)
        and any("accuracy_lenient" in m for m in shown.values())
    )
    group.published_metric = "accuracy_lenient" if lenient else metric or "accuracy"
    for suite in (*published.REASONING, None):
        members = published.members(suite) if suite else [n for n in names if _suite(n) not in published.REASONING]
        here = [name for name in members if shown.get(name)]
        group.lines += [summarise(name, m, list(seen[name, m].values())) for name in here for m in shown[name]]
        if suite and here:
            for m in dict.fromkeys(m for name in here for m in shown[name]):
                _average(group, suite, members, m, seen)
    _publish(group)


def _observations(group: Group) -> dict[tuple[str, str], dict[int, Seen]]:
    """Collect every benchmark's metrics on the reported split by seed."""
    seen: dict[tuple[str, str], dict[int, Seen]] = {}
    for run in group.runs:
        results = run.results
        tests = {(gain.benchmark, gain.metric): gain for gain in results.gain}
        for row in results.rows:
            if (row.split, row.weight) != (run.split, 0):
                continue
            scale = 1 if row.metric in LOSSES else 100
            weight = results.weight_of(row.benchmark)
            fused = results.find(row.benchmark, row.metric, run.split, weight) if group.copilot else None
            test = tests.get((row.benchmark, row.metric)) if fused else None
            lower = row.metric in LOWER_IS_BETTER
            seen.setdefault((row.benchmark, row.metric), {})[results.seed] = Seen(
                results.seed,
                row.n,
                scale * row.value,
                scale * fused.value if fused else None,
                weight if fused else None,
                test.p_value if test else None,
                direction(test.difference, test.ci95, test.p_value, lower_is_better=lower) if test else None,
            )
    return seen


def _average(group: Group, suite: str, members: list[str], metric: str, seen: dict) -> None:
    """Add the average over a suite for the seeds that have all its members, or note which are missing."""
    by_member = [seen.get((name, metric), {}) for name in members]
    complete = [seed for seed in by_member[0] if all(seed in have for have in by_member)]
    if not complete:
        everyone = {run.results.seed for run in group.runs}
        absent = [name for name, have in zip(members, by_member, strict=True) if everyone - set(have)]
        group.missing[f"{suite}_avg {metric}"] = absent
        return
    averages = []
    for seed in complete:
        row = [have[seed] for have in by_member]
        fused = [one.fused for one in row if one.fused is not None]
        weights = {one.weight for one in row}
        averages.append(
            Seen(
                seed,
                None,
                sum(one.pilot for one in row) / len(row),
                sum(fused) / len(row) if len(fused) == len(row) else None,
                weights.pop() if len(weights) == 1 else None,
            )
        )
    group.lines.append(summarise(f"{suite}_avg", metric, averages))


def _publish(group: Group) -> None:
    """Put the paper's figures beside ours, and note where they do not compare."""
    found = {"pilot": published.figures(group.pilot)}
    found["fused"] = published.figures(group.pilot, group.copilot) if group.copilot else {}
    for line in group.lines:
        theirs = "accuracy" if line.metric == group.published_metric == "accuracy_lenient" else line.metric
        if theirs == "accuracy" and line.metric != group.published_metric:
            continue
        line.published_pilot = found["pilot"].get((line.benchmark, theirs))
        line.published_fused = found["fused"].get((line.benchmark, theirs))
        known = published.benchmarks().get(line.benchmark)
        note = f"{line.benchmark}: n = {line.n}, the published test set has {known.rows if known else 0} rows"
        if known and line.published_pilot is not None and line.n != str(known.rows) and note not in group.notes:
            group.notes.append(note)
    if any("@" in line.metric and line.published_fused is not None for line in group.lines):
        group.notes.append("the size of the Copilot in the published recommendation tables is not known to us")
    for side, figures in found.items():
        models = f"{group.pilot} + Copilot" if side == "fused" else group.pilot
        for name in dict.fromkeys(
            line.benchmark for line in group.lines if _suite(line.benchmark) == "recommendation"
        ):
            for step in published.impossible_ndcg({m: value for (b, m), value in figures.items() if b == name}):
                hit = [line for m in (step.before, step.metric) if m and (line := group.line(name, m))]
                for line in hit:
                    line.impossible.add(side)
                if hit:
                    group.notes.append(
                        f"{IMPOSSIBLE} published NDCG here is arithmetically impossible: {models} on {name}, {step}"
                    )


def _shown(metrics: Sequence[str], metric: str | None) -> list[str]:
    """Choose the metrics of a benchmark to show; those of a task that has neither accuracy nor ranks are all shown."""
    if metric is not None:
        return [metric] if metric in metrics else []
    ranked = sorted((name for name in metrics if _rank(name)[0]), key=_rank)
    return [m for m in ("accuracy", "accuracy_lenient") if m in metrics] or ranked or list(metrics)


def _rank(metric: str) -> tuple[str, int]:
    """Order hits before NDCG and both by K; anything else comes first, with an empty name."""
    found = re.fullmatch(r"(hit|ndcg)@(\d+)", metric)
    return (found[1], int(found[2])) if found else ("", 0)


def _suite(benchmark: str) -> str | None:
    known = published.benchmarks().get(benchmark)
    return known.suite if known else None


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    mean, sd = over_seeds(values)
    return Spread(mean, sd if len(values) > 1 else None)


def _judge(metric: str, both: Sequence[Seen], gains: Sequence[float]) -> tuple[float | None, str]:
    """Return p and the verdict on a gain; see `summarise`."""
    if not both:
        return None, "no figure with a Copilot"
    if len(both) == 1:
        one = both[0]
        if one.verdict is None:
            return None, "1 seed: no spread" if one.n is None else "1 seed: no spread, and no paired test in the run"
        return one.p_value, f"{one.verdict} at n = {one.n}"
    count, alone = len(both), Counter(one.verdict for one in both if one.verdict)
    each = ", ".join(f"{alone[name]} {name}" for name in ("better", "worse", "not distinguishable") if alone[name])
    each = f"; each alone: {each}" if each else ""
    if max(gains) - min(gains) < 1e-9:
        return None, f"the same gain in all {count} seeds, nothing to test{each}"
    from scipy import stats

    p_value = float(stats.ttest_1samp(gains, 0.0).pvalue)
    better = (over_seeds(gains)[0] > 0) != (metric in LOWER_IS_BETTER)
    verdict = "not distinguishable" if p_value >= ALPHA else "better" if better else "worse"
    return p_value, f"{verdict} over {count} seeds{each}"


def _gain_sheet(group: Group) -> Sheet:
    head = ["benchmark", "metric", "n", "seeds", "λ", "Pilot", "published", "Pilot + Copilot", "published", "gain"]
    rows = []
    for line in group.lines:
        weights = dict.fromkeys(f"{weight:g}" for weight in sorted(line.weights))
        cells = [line.benchmark, line.metric, line.n, " ".join(map(str, line.seeds)), " ".join(weights)]
        for side in ("pilot", "fused"):
            cells += [_text(getattr(line, side), line.unit), _theirs(line, side)]
        relative = NONE if line.relative is None else f"{line.relative:+.1f} %"
        p_value = NONE if line.p_value is None else p_text(line.p_value)
        rows.append([*cells, _text(line.gain, line.unit, "+"), relative, p_value, line.verdict])
    notes = [f"no {average}, missing: {', '.join(names)}" for average, names in group.missing.items()]
    several = len(group.runs) > 1
    basis = "p of a paired t test over seeds" if several else "p paired over the test rows; 1 seed: no spread"
    what = f"{group.split} rows; %, gains in points, losses in their own unit; {basis}"
    if any(line.published_pilot is not None for line in group.lines):
        which = " accuracy stands beside our accuracy_lenient" if group.published_metric == "accuracy_lenient" else ""
        what += f"; published{which} (in brackets: ours minus it)"
    return Sheet(group.label, [*head, "relative", "p", "verdict"], rows, [what, *notes, *group.notes])


def _paper_sheet(
    title: str, groups: Sequence[Group], columns_of: Callable[[Group], list[tuple[str, str, str]]]
) -> Sheet:
    """Lay out groups in the paper's columns: ours, the published figure, and how far ours lies above it."""
    rows, metrics, notes, above = [], {}, [], columns_of(groups[0])
    for group in groups:
        columns = columns_of(group)
        lines = [group.line(benchmark, metric) for _, benchmark, metric in columns]
        if not any(lines):
            continue
        metrics[group.label] = group.published_metric
        rows += [None] if rows else []
        pilot = f"{group.pilot}: {group.keys}" if group.keys else group.pilot
        for side, name in (("pilot", pilot), ("fused", f"+ {group.copilot}")):
            if side == "fused" and group.copilot is None:
                continue
            rows.append([name, *(_text(getattr(line, side), line.unit) if line else NONE for line in lines)])
            rows.append(["  published", *(_theirs(line, side, False) if line else NONE for line in lines)])
            beyond = [line.beyond(side) if line else None for line in lines]
            if any(step is not None for step in beyond):
                rows.append(["  ours minus it", *(NONE if step is None else f"{step:+.1f}" for step in beyond)])
        of = f" for {group.label}" if len(groups) > 1 else ""
        averages = {f"{benchmark} {metric}" for _, benchmark, metric in columns}
        notes += [f"no {a}{of}, missing: {', '.join(m)}" for a, m in group.missing.items() if a in averages]
        notes += [note for note in group.notes if note[0] == IMPOSSIBLE and note not in notes]
    used = "%, mean ± sd over seeds; published: means of 3 runs, no spread given"
    if len(set(metrics.values())) > 1:
        used = f"metric: {'; '.join(f'{metric} for {label}' for label, metric in metrics.items())}; {used}"
    elif any(head != metric for head, _, metric in above):
        used = f"metric: {next(iter(metrics.values()))}; {used}"
    return Sheet(title, ["", *(head for head, _, _ in above)], rows, [used, *notes])


def _theirs(line: Line, side: str, difference: bool = True) -> str:
    """Write the published figure, by choice with ours minus it; † marks an impossible one."""
    theirs, beyond = getattr(line, f"published_{side}"), line.beyond(side)
    if theirs is None:
        return NONE
    mark = IMPOSSIBLE if side in line.impossible else ""
    return f"{theirs:.1f}{mark}" + (f" ({beyond:+.1f})" if difference and beyond is not None else "")


def _text(spread: Spread | None, unit: str, sign: str = "") -> str:
    if spread is None:
        return NONE
    digits = 1 if unit else 4
    return f"{spread.mean:{sign}.{digits}f}" + ("" if spread.sd is None else f" ± {spread.sd:.{digits}f}")


def _print(laid: Sequence[Sheet]) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for sheet in laid:
        table = Table(title=escape(sheet.title), title_justify="left")
        for head in sheet.head:
            table.add_column(head, justify="left" if head in LEFT else "right", no_wrap=head not in ("", "verdict"))
        for row in sheet.rows:
            table.add_row(*map(escape, row)) if row else table.add_section()
        console.print(table)
        for note in sheet.notes:
            console.print(escape(note))
        console.print()


if __name__ == "__main__":
    sys.exit(main())
