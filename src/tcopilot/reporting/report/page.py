"""`tcopilot-report <run dir>`: a run as one HTML page that opens from disk, its plots as PNG and their numbers as CSV.

The page holds its data, styles and script; it loads nothing. What a run has not recorded is left out, and the page
says which command records it.
"""

from __future__ import annotations

import argparse
import csv
import html
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tcopilot.data.metrics import NLL, SHARE, digits_of, scale, show_difference
from tcopilot.evaluation.results import Gain
from tcopilot.evaluation.significance import p_text
from tcopilot.reporting.report import corrections, explorer, figures
from tcopilot.reporting.report.evidence import evidence_tables
from tcopilot.reporting.report.files import ReportError, RunFiles, read_run
from tcopilot.reporting.report.panels import Panel, all_panels

MOST_MISTAKES = 20
MOST_NUMBERS = 60  # lines of a table beneath a plot; longer ones are in the CSV only


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tcopilot-report`.

    Returns:
        0, or 1 with a message on stderr if the run cannot be read or the page not be written.
    """
    parser = argparse.ArgumentParser("tcopilot-report", description="A run as one HTML page, with its plots.")
    parser.add_argument("run", metavar="RUN", help="directory of a train.py run, or better of an eval.py trace=true")
    parser.add_argument("--out", metavar="FOLDER", help="where to write; by default <RUN>/report")
    parser.add_argument("--evidence", metavar="FILE", help="its tables are shown too; by default docs/evidence.md")
    asked = parser.parse_args(arguments)
    try:
        folder = Path(asked.out or Path(asked.run) / "report")
        if asked.evidence and not Path(asked.evidence).is_file():
            raise ReportError(f"--evidence {asked.evidence}: there is no such file; leave it out, or name the page")
        evidence = evidence_tables(Path(asked.evidence or "docs/evidence.md"))
        page = write_report(read_run(asked.run), folder, evidence)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: cannot be written, {error.strerror}", file=sys.stderr)
        return 1
    print(f"report: {page}")
    return 0


def write_report(run: RunFiles, folder: Path, evidence: Markup | None = None) -> Path:
    """Write `index.html`, `figures/*.png` and `figures/*.csv`.

    Args:
        run: the run, read.
        folder: where to write.
        evidence: tables of many runs, as HTML, that stand at the end of the page.

    Returns:
        The page's path.
    """
    plots = folder / "figures"
    plots.mkdir(parents=True, exist_ok=True)
    shown: dict[str, list[dict[str, Any]]] = {}
    for panel in all_panels(run):
        png, svg = figures.render(panel.draw)
        (plots / f"{panel.name}.png").write_bytes(png)
        (plots / f"{panel.name}.csv").write_text(panel.csv(), encoding="utf-8")
        shown.setdefault(panel.section, []).append(_plot(panel, svg))
    tables = {"gain": gain_lines(run), "likelihood": likelihood_lines(run), "mistakes": mistake_lines(run)}
    for name, lines in tables.items():
        if lines:
            (plots / f"{name}.csv").write_text(_csv(lines), encoding="utf-8")
    page = folder / "index.html"
    page.write_text(_page(run, shown, tables, evidence), encoding="utf-8")
    return page


def gain_lines(run: RunFiles) -> list[dict[str, Any]]:
    """The gain table: `results.json` as it is, and whether fixed − broken over n is the difference."""
    lines = []
    for gain in run.results.gain:
        weight = run.results.weight_of(gain.benchmark)
        row = run.results.find(gain.benchmark, gain.metric, run.results.reported_on, weight)
        low, high = gain.ci95
        lines.append(
            {
                **{key: value for key, value in asdict(gain).items() if key != "ci95"},
                "ci95_low": low,
                "ci95_high": high,
                "n": row.n if row else None,
                "weight": weight,
                "adds_up": adds_up(gain, row.n) if row else None,
                "verdict": gain.verdict,
            }
        )
    return lines


def adds_up(gain: Gain, n: int) -> bool | None:
    """Whether fixed − broken over n equals the improvement; None where it need not, as for graded metrics.

    >>> adds_up(Gain("a", "accuracy", 0.5, 0.75, 0.25, (0, 1), fixed=2, broken=1, p_value=1.0), 4)
    True
    """
    counts = (gain.pilot * n, gain.fused * n)
    if gain.fixed is None or gain.unit != SHARE or any(abs(count - round(count)) > 1e-6 for count in counts):
        return None
    improvement = gain.difference if gain.higher_is_better else -gain.difference
    return abs((gain.fixed - gain.broken) / n - improvement) < 1e-9


def likelihood_lines(run: RunFiles) -> list[dict[str, Any]]:
    """Negative log-likelihood of right answers per target token, of Pilot and fused model, by split."""
    weight, found = run.results.weight_of("all"), []
    for split in dict.fromkeys(row.split for row in run.results.rows):
        pilot, fused = (run.results.find("all", NLL.name, split, w) for w in (0.0, weight))
        if pilot and fused:
            found.append(
                {"split": split, "tokens": pilot.n, "pilot": pilot.value, "pilot_ci95": pilot.ci95,
                 "fused": fused.value, "fused_ci95": fused.ci95}
            )  # fmt: skip
    return found


def mistake_lines(run: RunFiles) -> list[dict[str, Any]]:
    """The Pilot's most frequent mistakes among the traced rows; none without a trace."""
    found = corrections.frequent_mistakes(run.trace.rows, MOST_MISTAKES) if run.trace else []
    return [mistake._asdict() for mistake in found]


def _plot(panel: Panel, svg: str) -> dict[str, Any]:
    plot = {key: getattr(panel, key) for key in ("name", "title", "note", "columns")}
    rows = panel.rows if len(panel.rows) <= MOST_NUMBERS else []
    return plot | {
        "svg": Markup(figures.inline_svg(svg, panel.name, html.escape(f"Plot: {panel.title}", quote=True))),
        "rows": [[_number(value) for value in row] for row in rows],
    }


def _page(
    run: RunFiles, plots: dict[str, list[dict[str, Any]]], tables: dict[str, Any], evidence: Markup | None
) -> str:
    environment = Environment(
        loader=PackageLoader("tcopilot.reporting.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": _number, "value": _value, "step": show_difference, "p": p_text}
    templates = files("tcopilot.reporting.report") / "templates"
    shown = explorer.examples(run)
    return environment.get_template("report.html.j2").render(
        run=run,
        results=run.results,
        split=run.results.reported_on,
        meta=run.trace.meta if run.trace else None,
        plots=plots,
        evidence=evidence,
        explorer=shown,
        most_positions=explorer.MOST_POSITIONS,
        style=Markup((templates / "report.css").read_text(encoding="utf-8")),
        script=Markup((templates / "report.js").read_text(encoding="utf-8")),
        data=_embedded(shown | {"gain": tables["gain"]}),
        **tables,
    )


def _embedded(data: Any) -> Markup:
    """JSON that may stand inside a script element."""
    return Markup(json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _number(value: Any) -> str:
    """A number as a table shows it: whole numbers whole, others with four significant digits; of a mapping, each."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_number(one)}" for name, one in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{int(value):,}" if value == int(value) and abs(value) >= 1 else f"{value:.4g}"


def _value(value: float, unit: str) -> str:
    return f"{scale(unit) * value:.{digits_of(unit)}f}"


if __name__ == "__main__":
    sys.exit(main())
