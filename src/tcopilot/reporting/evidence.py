"""One table for each task from the runs of `scripts/evidence.py`, which compares arms and controls in pairs.

An arm is a way to train; its runs differ only in the seed. Every comparison is over the rows that both sides answered,
paired by seed and row. If seeds share a row, its scores under all of them are resampled together.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tcopilot.data.metrics import NLL, SHARE, scale, show_difference
from tcopilot.evaluation.outcomes import read_predictions
from tcopilot.evaluation.significance import Comparison, compare, over_seeds, p_text
from tcopilot.reporting.finished_runs import FinishedRun
from tcopilot.reporting.tables import markdown_table
from tcopilot.run_directory import RunDirectory

DEFAULT = "default"
VERDICTS = ("better", "worse", "not distinguishable")
BEGIN, END = "<!-- evidence: tables -->", "<!-- evidence: end of tables -->"
BRIEF = "<!-- evidence: in brief -->", "<!-- evidence: end of brief -->"
SECTION = re.compile(r"(?ms)^## (.+?)$\n(.*?)(?=^## |\Z)")
BRIEF_CONTROLS = (
    ("Pilot, calibrated",),
    ("Pilot, tuned for the fit's FLOPs",),
    ("Pilot, equal time",),
    ("Pilot, tuned", "Pilot, equal FLOPs"),
)
"""The control of each column: the one of most seeds, or the first. A tuned Pilot has the same FLOPs at each rate."""
BRIEF_HEAD = (
    *("regime: task", "Pilot", "with Copilot", "gain over its Pilot [95 %]", "ahead of the calibrated Pilot"),
    *("of LoRA for the FLOPs of the fit", "of a Pilot for equal time", "of a Pilot for equal FLOPs"),
)
HEAD = (
    *("arm", "Pilot", "with it", "gain over its Pilot [95 %], p", f"against `{DEFAULT}` [95 %], p"),
    *("NLL", f"NLL against `{DEFAULT}` [95 %], p", "ε²/S²", "λ*", "λ", "rounds", "train s", "TFLOP", "seeds ahead"),
)

Scores = dict[tuple[int, int], tuple[float, str]]
"""By (seed, row id), the score and the text of the row, by which rows that seeds share are recognised."""


@dataclass
class Line:
    """An arm or a control over its seeds; figures are means over seeds, in the unit of the metric."""

    name: str
    seeds: list[int]
    scores: Scores  # at the selected λ, or those of the control
    pilot: Scores  # at λ = 0 of the same runs
    nll: tuple[float, float]  # at λ = 0, and at the selected λ or that of the control
    error_ratio: float | None
    best_weight: float | None
    weights: list[float]
    rounds: float
    seconds: float
    flops: float | None
    control: bool = False
    nll_scores: Scores = field(default_factory=dict)  # as `scores`; empty unless targets were scored
    gain: Comparison | None = None
    against: Comparison | None = None
    nll_against: Comparison | None = None
    ahead: list[int] | None = None  # seeds on which this line is better than the default arm


@dataclass
class TaskEvidence:
    """All lines of a task, the default arm first, and controls last."""

    name: str
    metric: str
    lines: list[Line]
    unit: str = SHARE

    @property
    def part(self) -> str:
        """The beginning of the name, which holds preset and part."""
        return self.name.partition(": ")[0]

    def line(self, name: str) -> Line | None:
        """Return the line of an arm or control, or None."""
        return next((line for line in self.lines if line.name == name), None)


def gather(
    name: str, arms: Mapping[str, Sequence[FinishedRun]], controls: Mapping[str, str], hidden: Container[str] = ()
) -> list[TaskEvidence]:
    """Read the runs of a task and make a table for each of its benchmarks.

    Args:
        name: name of the task.
        arms: finished runs by arm, one for each seed; `default` must be among them.
        controls: by folder of a control its name in `results.json`; they belong to the default arm or a hidden one.
        hidden: arms that are not shown and only provide their controls.

    Raises:
        ValueError: if a run has no comparison of a benchmark, or answered none of the default arm's rows.
    """
    first = arms[DEFAULT][0].results
    if not first.gain:
        raise ValueError(f"{arms[DEFAULT][0].folder}: no benchmark was compared")
    deciding, found = first.row_wise(), []
    for benchmark, gain in reversed(deciding.items()):
        metric, higher = gain.metric, gain.higher_is_better
        shown = {arm: runs for arm, runs in arms.items() if runs and arm not in hidden}
        # An arm may answer in another way than the default one: decode what that only scores, for example.
        lines = [
            _line(arm, runs, benchmark, runs[0].results.row_wise()[benchmark].metric) for arm, runs in shown.items()
        ]
        lines.sort(key=lambda line: line.name != DEFAULT)
        for folder, title in controls.items():
            beside = (run for arm, runs in arms.items() if arm == DEFAULT or arm in hidden for run in runs)
            having = [run for run in beside if any(control.name == title for control in run.results.controls)]
            if runs := list({run.results.seed: run for run in having}.values()):
                lines.append(_line(title, runs, benchmark, metric, folder))
        for line in lines:
            line.gain, _ = _compared(line.pilot, line.scores, higher)
        for line in lines[1:]:
            line.against, line.ahead = _compared(lines[0].scores, line.scores, higher)
            if lines[0].nll_scores and line.nll_scores:
                line.nll_against, _ = _compared(lines[0].nll_scores, line.nll_scores, NLL.higher_is_better)
        task = f"{name}/{benchmark}" if len(deciding) > 1 else name
        found.append(TaskEvidence(task, metric, lines, gain.unit))
    return found


def as_markdown(tasks: Sequence[TaskEvidence], missing: Sequence[str] = ()) -> str:
    """Write the tasks as Markdown tables, with an overview, conclusions, and a list of runs that are missing."""
    if not tasks:
        return "Nothing was run yet."
    parts = [f"### At a glance\n\n{_overview(tasks)}\n\n{conclusions(tasks)}"]
    for task in tasks:
        table = markdown_table(HEAD, [_cells(line, task.unit) for line in task.lines])
        parts.append(f"### {task.name} ({task.metric})\n\n{table}")
    if missing:
        parts.append(f"Not run, or not finished: {', '.join(missing)}.")
    return "\n\n".join(parts)


def conclusions(tasks: Sequence[TaskEvidence]) -> str:
    """Write a paragraph: where the default arm helps its Pilot, how controls of equal cost compare, which arms win."""
    short = _short_names(tasks)
    gains = [(short[task.name], task.lines[0].gain) for task in tasks]
    sentences = [f"Over its own Pilot, `{DEFAULT}` is {_counted(gains)} of {len(tasks)} tables."]
    ahead = []
    for name, control in _others(tasks).items():
        lines = [(short[task.name], line) for task in tasks if (line := task.line(name))]
        seeds = sum(len(line.ahead) == len(line.seeds) for _, line in lines)
        if control:
            found = _counted([(task, line.against) for task, line in lines])
            sentences.append(f"{name[0].upper()}{name[1:]}: {found}, of {len(lines)} against `{DEFAULT}`.")
        elif 2 * seeds > len(lines):
            ahead.append(f"`{name}` ({seeds} of {len(lines)} tables)")
    if ahead:
        sentences.append(f"Ahead of `{DEFAULT}` on every seed of most tables: {', '.join(ahead)}.")
    else:
        sentences.append(f"No other arm is ahead of `{DEFAULT}` on every seed of most of its tables.")
    return " ".join(sentences)


def _overview(tasks: Sequence[TaskEvidence]) -> str:
    """Tabulate, by task, the difference of each arm and control to the default arm, in bold if it is significant."""

    def glance(found: Comparison, unit: str) -> str:
        shown = show_difference(found.difference, unit, digits=_digits(unit))
        return shown if found.direction == "not distinguishable" else f"**{shown}**"

    rows = [(f"gain of `{DEFAULT}` over its Pilot", *(glance(task.lines[0].gain, task.unit) for task in tasks))]
    for name, control in _others(tasks).items():
        cells = [glance(line.against, task.unit) if (line := task.line(name)) else "" for task in tasks]
        rows.append((f"{name if control else f'`{name}`'} − `{DEFAULT}`", *cells))
    return markdown_table(("", *_short_names(tasks).values()), rows)


def _others(tasks: Sequence[TaskEvidence]) -> dict[str, bool]:
    """Return the names of the other arms, then of the controls, each mapped to whether it is a control."""
    found = {line.name: line.control for task in tasks for line in task.lines if line.name != DEFAULT}
    return dict(sorted(found.items(), key=lambda one: one[1]))


def _short_names(tasks: Sequence[TaskEvidence]) -> dict[str, str]:
    """Shorten the names of tasks by preset and part, unless they would then be ambiguous."""
    short = {task.name: task.name.rpartition(": ")[2] for task in tasks}
    values = list(short.values())
    return {name: one if values.count(one) == 1 else name for name, one in short.items()}


def _counted(comparisons: Sequence[tuple[str, Comparison]]) -> str:
    """Count the tasks by verdict of their comparison, and name the tasks of all but the most frequent verdict."""
    found = {verdict: [name for name, one in comparisons if one.direction == verdict] for verdict in VERDICTS}
    most = max(found, key=lambda verdict: len(found[verdict]))
    return ", ".join(
        f"{verdict} on {len(names)}" + (f" ({', '.join(names)})" if verdict != most else "")
        for verdict, names in found.items()
        if names
    )


def put_between_markers(page: str, tasks: Sequence[TaskEvidence], missing: Sequence[str] = ()) -> str:
    """Insert tasks into a page: a brief table at its top, and a section for each part of a preset that has tasks.

    Sections of other parts are kept, so that each part may be run on another machine.

    Args:
        page: text of the page, with two pairs of markers.
        tasks: tasks of any parts; their names begin with the part.
        missing: unfinished runs, as paths that begin with preset and part.

    Raises:
        ValueError: if a marker is missing.
    """
    for mark in (*BRIEF, BEGIN, END):
        if mark not in page:
            raise ValueError(f"the page has no {mark}: put it where the tables belong")
    sections = dict(SECTION.findall(_between(page, BEGIN, END)))
    for part in dict.fromkeys(task.part for task in tasks):
        left = [run for run in missing if run.startswith(f"{part.replace(', ', '/')}/")]
        sections[part] = as_markdown([task for task in tasks if task.part == part], left)
    lines = (line.strip().removeprefix("|").removesuffix("|") for line in _between(page, *BRIEF).splitlines())
    known = [tuple(cell.strip() for cell in line.split("|")) for line in lines]
    known = [row for row in known if len(row) == len(BRIEF_HEAD) and row[0] not in (BRIEF_HEAD[0], "---")]
    rows = {row[0]: row for row in (*known, *map(_brief, tasks))}
    brief = markdown_table(BRIEF_HEAD, rows.values())
    text = "\n\n".join(f"## {part}\n\n{text.strip()}" for part, text in sections.items())
    for (begin, end), new in ((BRIEF, brief), ((BEGIN, END), text)):
        page = f"{page.partition(begin)[0]}{begin}\n\n{new}\n\n{end}{page.partition(end)[2]}"
    return page


def _between(page: str, begin: str, end: str) -> str:
    return page.partition(begin)[2].partition(end)[0]


def _brief(task: TaskEvidence) -> tuple[str, ...]:
    """Summarise a task in a line: its gain, and its lead over controls of equal cost, in bold if significant."""

    def shown(found: Comparison | None, sign: int) -> str:
        if found is None:
            return ""
        ends = sorted(sign * end + 0.0 for end in found.ci95)  # adding 0 leaves no -0.0
        text = show_difference(sign * found.difference + 0.0, task.unit, (ends[0], ends[1]), _digits(task.unit))
        return text if found.direction == "not distinguishable" else f"**{text}**"

    first = task.lines[0]
    pilot, fused = (f"{scale(task.unit) * one:.{_digits(task.unit)}f}" for one in (first.gain.pilot, first.gain.fused))
    trained = [list(filter(None, map(task.line, names))) for names in BRIEF_CONTROLS]
    against = [max(lines, key=lambda line: len(line.seeds)).against if lines else None for lines in trained]
    return task.name, pilot, fused, shown(first.gain, 1), *(shown(found, -1) for found in against)


def _line(name: str, runs: Sequence[FinishedRun], benchmark: str, metric: str, control: str | None = None) -> Line:
    """Read the line of an arm, or of the control `name` if `control` gives the folder of its predictions."""
    pilot, scores, nll_scores, likelihoods, weights, costs = {}, {}, {}, [], [], []
    for run in runs:
        results, weight, folder = run.results, run.results.weight_of(benchmark), run.directory
        if control is None:
            likelihood, cost = results.find("all", NLL.name, results.reported_on, weight), results
        else:
            folder = folder.control(control)
            likelihood = cost = next(
                one for one in results.controls if (one.name, one.benchmark, one.metric) == (name, "all", NLL.name)
            )
            weight = cost.weight
        pilot |= _scores(run, run.directory, benchmark, metric, 0.0)
        scores |= _scores(run, folder, benchmark, metric, weight)
        nll_scores |= _scores(run, folder, benchmark, NLL.name, weight)
        likelihoods.append([results.find("all", NLL.name, results.reported_on, 0.0).value, likelihood.value])
        weights.append(weight)
        costs.append(cost)
    measured = [run.metrics.reindex(columns=["val/error_ratio"]).dropna() for run in runs]
    ratios = [None if table.empty else float(table.iloc[-1, 0]) for table in measured]  # from the last validation
    return Line(
        name, [run.results.seed for run in runs], scores, pilot,
        nll=tuple(_mean(column) for column in zip(*likelihoods, strict=True)),
        nll_scores=nll_scores,
        error_ratio=_mean(ratios if control is None else []),
        best_weight=_mean(run.results.best_weight for run in runs if control is None),
        weights=weights if control is None else [],
        rounds=_mean(cost.rounds for cost in costs),
        seconds=_mean(cost.train_seconds for cost in costs),
        flops=_mean(cost.train_flops for cost in costs),
        control=control is not None,
    )  # fmt: skip


def _scores(run: FinishedRun, folder: RunDirectory, benchmark: str, metric: str, weight: float) -> Scores:
    """Read the score of each reported row from the predictions, from which `results.json` was also made.

    Rows whose predictions were not scored by this metric are left out.
    """
    found = read_predictions(run.results, folder.predictions, benchmark, weight)
    if not found:
        raise ValueError(f"{folder}: no predictions of {benchmark} at λ = {weight:g}; run it again")
    return {
        (run.results.seed, row): (prediction["scores"][metric], f"{prediction['prompt']}\n{prediction['target']}")
        for row, prediction in found.items()
        if metric in prediction["scores"]
    }


def _compared(before: Scores, after: Scores, higher_is_better: bool) -> tuple[Comparison, list[int]]:
    """Compare the rows that both have, and list the seeds on whose rows the sum of scores is better in `after`."""
    common = sorted(before.keys() & after.keys())
    if not common:
        raise ValueError("two arms have no row in common: they were run on other data or other seeds")
    pairs = ([scores[key][0] for key in common] for scores in (before, after))
    rows = [(row, after[seed, row][1]) for seed, row in common]
    sums = dict.fromkeys((seed for seed, _ in common), 0.0)
    for key in common:
        sums[key[0]] += (after[key][0] - before[key][0]) * (1 if higher_is_better else -1)
    ahead = [seed for seed, improvement in sums.items() if improvement > 0]
    return compare(*pairs, higher_is_better=higher_is_better, groups=rows), ahead


def _mean(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return None if not values or None in values else over_seeds(values)[0]


def _cells(line: Line, unit: str) -> tuple[str, ...]:
    def plain(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    def step(found: Comparison | None, unit: str = unit) -> str:
        if found is None:
            return ""
        return f"{show_difference(found.difference, unit, found.ci95, _digits(unit))}, {p_text(found.p_value)}"

    return (
        line.name,
        *(plain(scale(unit) * value, _digits(unit)) for value in (line.gain.pilot, line.gain.fused)),
        *(step(line.gain), step(line.against), f"{line.nll[0]:.3f} → {line.nll[1]:.3f}"),
        step(line.nll_against, NLL.unit),
        *(plain(line.error_ratio, 2), plain(line.best_weight, 2)),
        ", ".join(f"{weight:g}" for weight in sorted(set(line.weights))),
        *(plain(line.rounds, 0), plain(line.seconds, 0), plain(line.flops and line.flops / 1e12, 3)),
        str(len(line.seeds)) if line.ahead is None else f"{len(line.ahead)} of {len(line.seeds)}",
    )


def _digits(unit: str) -> int:
    return 1 if unit == SHARE else 3
