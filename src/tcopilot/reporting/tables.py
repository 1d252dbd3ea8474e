"""`tcopilot-table`: one table from many run directories, beside the paper's figures.

The terminal and Markdown show the same tables as text; CSV and JSON hold their figures without rounding.
"""

import argparse
import json
import re
import sys
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tcopilot.evaluation.significance import p_text
from tcopilot.reporting import published
from tcopilot.reporting.finished_runs import FinishedRun, Found, find_runs
from tcopilot.reporting.seed_groups import group_runs
from tcopilot.reporting.summaries import IMPOSSIBLE, NONE, Line, Summary, figure, join_benchmarks, rank, summarise

FORMULA = re.compile(r"(?![-+]?[\d.,]+ ?%?$)[=+\-@\t\r]")
WIDTH = 200  # characters, if the output is not a terminal
LEFT = {"", "benchmark", "metric", "verdict"}  # headings of left-aligned text columns


@dataclass
class Sheet:
    """A table as text, for the terminal and Markdown; a row of `None` is a horizontal rule."""

    title: str
    head: list[str]
    rows: list[list[str] | None]
    notes: list[str]


def lay_out(summaries: Sequence[Summary]) -> list[Sheet]:
    """Make a sheet of the gains of each group, and sheets of all groups in the paper's columns."""
    laid = [_gain_sheet(summary) for summary in summaries if summary.lines]
    lines, labels = (
        [line for s in summaries for line in s.lines],
        {b.name: b.label for b in published.benchmarks().values()},
    )
    columns = []
    for suite in published.REASONING:
        if any(line.benchmark in published.members(suite) for line in lines):
            columns += [(labels[name], name, None) for name in published.members(suite)]
            columns.append(("avg", f"{suite}_avg", None))
    if columns:
        laid.append(_paper_sheet("In the paper's columns", summaries, columns))
    for name in published.members("recommendation"):
        if metrics := {line.metric for line in lines if line.benchmark == name}:
            laid.append(_paper_sheet(labels[name], summaries, [(m, name, m) for m in sorted(metrics, key=rank)]))
    return laid


def as_markdown(summaries: Sequence[Summary], found: Found) -> str:
    """Write the sheets as Markdown tables, each followed by its notes."""
    parts = []
    for sheet in lay_out(summaries):
        numbers = {head for head in sheet.head if head not in LEFT}
        table = markdown_table(sheet.head, filter(None, sheet.rows), numbers)
        notes = "\n".join(f"- {note}" for note in sheet.notes)
        parts.append(f"### {sheet.title}\n\n{table}\n\n{notes}")
    if problems := found.problems():
        parts.append("\n".join(["### Left out", "", *(f"- {problem}" for problem in problems)]))
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Container[str] = ()) -> str:
    """Write a Markdown table; `numbers` are the headings of right-aligned columns."""
    rule = ["---:" if name in numbers else "---" for name in head]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *rows))


def as_csv(summaries: Sequence[Summary], _: Found) -> str:
    """Write one line for each group, benchmark and metric; lists are separated by spaces."""
    rows = [
        {"group": s.group.label, "pilot": s.group.pilot, "copilot": s.group.copilot}
        | {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in record.items()}
        for s in summaries
        for record in _records(s)
    ]
    return without_formulas(pd.DataFrame(rows)).to_csv(index=False, lineterminator="\n")


def without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """Put an apostrophe before texts that a spreadsheet would execute as formulas; numbers stay as they are.

    >>> without_formulas(pd.DataFrame({"said": ["=1+1", "-5", "-5 apples", "5", "@a"]})).said.tolist()
    ["'=1+1", '-5', "'-5 apples", '5', "'@a"]
    """
    return table.map(lambda cell: f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell)


def accept_any_sign(encoding: str | None = None) -> None:
    """Print characters that stdout's encoding lacks, such as λ, as escapes; `encoding` sets another one for files."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")


def as_json(summaries: Sequence[Summary], found: Found) -> str:
    """Write everything the tables show as one JSON object."""
    shown = [
        {"label": s.group.label, "pilot": s.group.pilot, "copilot": s.group.copilot}
        | {"runs": [str(run.folder) for run in s.group.runs], "published_metric": s.published_metric}
        | {"lines": _records(s), "missing": s.missing, "notes": s.notes}
        for s in summaries
    ]
    unreadable = [{"folder": str(folder), "reason": reason} for folder, reason in found.unreadable]
    data = {"groups": shown, "unfinished": [str(folder) for folder in found.unfinished], "unreadable": unreadable}
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS = {"markdown": as_markdown, "csv": as_csv, "json": as_json}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tcopilot-table`; return 1, with a message on stderr, if nothing can be shown or a file not written."""
    parser = argparse.ArgumentParser(
        "tcopilot-table", description="One table of many runs, beside the paper's figures."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run directory, or any folder above some")
    parser.add_argument(
        "--metric", help="the metric to show; by default the one that decides and accuracy, or hits and NDCG"
    )
    for kind in FORMATS:
        parser.add_argument(
            f"--{kind}", metavar="FILE", help=f"also write {kind}; - is stdout, which then holds nothing else"
        )
    asked = parser.parse_args(arguments)
    wanted = {kind: path for kind in FORMATS if (path := getattr(asked, kind))}
    quiet = "-" in wanted.values()
    accept_any_sign("utf-8" if quiet else None)
    if list(wanted.values()).count("-") > 1:
        parser.error("only one of --markdown, --csv and --json can be - (stdout)")
    try:
        found = find_runs(asked.folders)
        runs = _usable(found, ", ".join(asked.folders), asked.metric)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    summaries = join_benchmarks([summarise(group, asked.metric) for group in group_runs(runs)])
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, quiet=quiet)
    for sheet in lay_out(summaries):
        table = Table(title=escape(sheet.title), title_justify="left")
        for head in sheet.head:
            table.add_column(head, justify="left" if head in LEFT else "right", no_wrap=head not in ("", "verdict"))
        for row in sheet.rows:
            table.add_row(*map(escape, row)) if row else table.add_section()
        console.print(table, *map(escape, (*sheet.notes, "")), sep="\n")
    for problem in found.problems():
        print(problem, file=sys.stderr if quiet else sys.stdout)
    for kind, path in wanted.items():
        text = FORMATS[kind](summaries, found)
        try:
            print(text, end="") if path == "-" else Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            print(f"error: --{kind} {path}: cannot be written, {error.strerror}", file=sys.stderr)
            return 1
    return 0


def _usable(found: Found, where: str, metric: str | None) -> list[FinishedRun]:
    """Return the runs to show, or raise a ValueError that says why there are none."""
    if not found.runs:
        reasons = "".join(f"\n  {problem}" for problem in found.problems())
        raise ValueError(f"no finished run at or below {where}; a run has results.json and config.yaml{reasons}")
    metrics = [{row.metric for row in run.results.rows if row.split == run.results.reported_on} for run in found.runs]
    every = ", ".join(sorted(set().union(*metrics)))
    if metric and not any(metric in some for some in metrics):
        raise ValueError(f"--metric {metric}: no run at or below {where} has it; there are {every}")
    if not metric and not any(row.benchmark != "all" for run in found.runs for row in run.results.rows):
        raise ValueError(f"{where}: no run has figures of a benchmark; give --metric, there are {every}")
    return [run for run, some in zip(found.runs, metrics, strict=True) if metric is None or metric in some]


def _records(summary: Summary) -> list[dict[str, Any]]:
    """Return the lines as flat records of unrounded figures."""
    records = []
    for line in summary.lines:
        record = {"benchmark": line.benchmark, "metric": line.metric, "split": summary.split}
        record |= {name: getattr(line, name) for name in ("unit", "n", "seeds", "weights")}
        for name in ("pilot", "fused", "gain"):
            record[f"{name}_mean"], record[f"{name}_sd"] = getattr(line, name) or (None, None)
        record |= {"relative_percent": line.relative, "p_value": line.p_value, "verdict": line.verdict}
        for side in ("pilot", "fused"):
            record[f"published_{side}"] = getattr(line, f"published_{side}")
            record[f"{side}_minus_published"] = line.beyond(side)
        records.append(record | {"published_impossible": sorted(line.impossible)})
    return records


def _gain_sheet(summary: Summary) -> Sheet:
    head = ["benchmark", "metric", "n", "seeds", "λ", "Pilot", "published", "Pilot + Copilot", "published", "gain"]
    rows = []
    for line in summary.lines:
        weights = dict.fromkeys(f"{weight:g}" for weight in sorted(line.weights))
        cells = [line.benchmark, line.metric, line.n, " ".join(map(str, line.seeds)), " ".join(weights)]
        for side in ("pilot", "fused"):
            beyond = line.beyond(side)
            difference = "" if beyond is None else f" ({beyond:+.1f})"
            cells += [figure(getattr(line, side), line.unit), _theirs(line, side) + difference]
        relative = NONE if line.relative is None else f"{line.relative:+.1f} %"
        p_value = NONE if line.p_value is None else p_text(line.p_value)
        rows.append([*cells, figure(line.gain, line.unit, "+"), relative, p_value, line.verdict])
    bases = {
        True: "p of a paired t test over seeds",
        False: f"p paired over the {summary.split} rows; 1 seed: no spread",
    }
    basis = ", or ".join(bases[several] for several in sorted({len(line.seeds) > 1 for line in summary.lines})[::-1])
    what = f"{summary.split} rows; %, gains in points, losses in their own unit; {basis}"
    if any(line.published_pilot is not None for line in summary.lines):
        lenient = summary.published_metric == "accuracy_lenient"
        which = " accuracy stands beside our accuracy_lenient" if lenient else ""
        what += f"; published{which} (in brackets: ours minus it)"
    missing = [f"no {average}, missing: {', '.join(names)}" for average, names in summary.missing.items()]
    notes = [what, *missing, *summary.notes]
    return Sheet(summary.group.label, [*head, "relative", "p", "verdict"], rows, notes)


def _paper_sheet(title: str, summaries: Sequence[Summary], columns: Sequence[tuple[str, str, str | None]]) -> Sheet:
    """Make a sheet of groups in the paper's columns: our figure, the published one, and their difference.

    A column is given by heading, benchmark and metric; None stands for the metric that compares with the paper's
    accuracy.
    """
    rows, metrics, notes = [], {}, []
    for summary in summaries:
        group, usual = summary.group, summary.published_metric
        lines = [summary.line(benchmark, metric or usual) for _, benchmark, metric in columns]
        if not any(lines):
            continue
        metrics[group.label] = usual
        rows += [None] if rows else []
        sides = {"pilot": f"{group.pilot}: {group.keys}" if group.keys else group.pilot}
        if group.copilot:
            sides["fused"] = f"+ {group.copilot}"
        for side, name in sides.items():
            rows.append([name, *(figure(getattr(line, side), line.unit) if line else NONE for line in lines)])
            rows.append(["  published", *(_theirs(line, side) for line in lines)])
            beyond = [line.beyond(side) if line else None for line in lines]
            if any(step is not None for step in beyond):
                rows.append(["  ours minus it", *(NONE if step is None else f"{step:+.1f}" for step in beyond)])
        of = f" for {group.label}" if len(summaries) > 1 else ""
        averages = {f"{benchmark} {metric or usual}" for _, benchmark, metric in columns}
        notes += [f"no {a}{of}, missing: {', '.join(m)}" for a, m in summary.missing.items() if a in averages]
        notes += [note for note in summary.notes if note[0] == IMPOSSIBLE and note not in notes]
    used = "%, mean ± sd over seeds; published: means of 3 runs, no spread given"
    if columns[0][2] is None:
        each = [f"{metric} for {label}" for label, metric in metrics.items()]
        used = f"metric: {'; '.join(each) if len(set(metrics.values())) > 1 else metrics.popitem()[1]}; {used}"
    return Sheet(title, ["", *(head for head, _, _ in columns)], rows, [used, *notes])


def _theirs(line: Line | None, side: str) -> str:
    """Write the published figure; an impossible one is marked with †."""
    theirs = getattr(line, f"published_{side}", None)
    return NONE if theirs is None else f"{theirs:.1f}{IMPOSSIBLE if side in line.impossible else ''}"
