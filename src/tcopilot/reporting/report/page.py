"""`tcopilot-report <run dir>`: a run as one HTML page that opens from disk, its plots as PNG and their numbers as CSV.

The page contains its data, styles and script, and loads nothing. Parts that the run has not recorded are left out, and
the page names the command that records them.
"""

import argparse
import html
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from tcopilot.data.metrics import NLL, SHARE, digits_of, scale, show_difference
from tcopilot.evaluation.outcomes import answers_of_both
from tcopilot.evaluation.results import Gain
from tcopilot.evaluation.significance import p_text
from tcopilot.reporting.evidence import BEGIN, END
from tcopilot.reporting.finished_runs import FinishedRun, RunError
from tcopilot.reporting.report import drawing
from tcopilot.reporting.report.corrections import frequent_mistakes
from tcopilot.reporting.report.plots import all_plots
from tcopilot.reporting.tables import accept_any_sign, without_formulas
from tcopilot.run_directory import RunDirectory, override

MOST_MISTAKES = 20
MOST_POSITIONS = 60_000  # target positions in the explorer, about 15 MB
MOST_NUMBERS = 60  # lines of a table beneath a plot; longer tables are only written to CSV


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tcopilot-report`; return 1, with a message on stderr, if the run cannot be read or the page not written."""
    parser = argparse.ArgumentParser("tcopilot-report", description="A run as one HTML page, with its plots.")
    parser.add_argument("run", metavar="RUN", help="directory of a train.py run, or better of an eval.py trace=true")
    parser.add_argument("--out", metavar="FOLDER", help="where to write; by default <RUN>/report")
    parser.add_argument("--evidence", metavar="FILE", help="its tables are shown too; by default docs/evidence.md")
    asked = parser.parse_args(arguments)
    accept_any_sign()
    try:
        if asked.evidence and not Path(asked.evidence).is_file():
            raise RunError(f"--evidence {asked.evidence}: there is no such file; leave it out, or name the page")
        evidence = evidence_tables(Path(asked.evidence or "docs/evidence.md"))
        folder = Path(asked.out) if asked.out else RunDirectory(asked.run).report
        page = write_report(FinishedRun.read(asked.run), folder, evidence)
    except RunError as error:
        print(f"error: {asked.run}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: cannot be written, {error.strerror}", file=sys.stderr)
        return 1
    print(f"report: {page}")
    return 0


def write_report(run: FinishedRun, folder: Path, evidence: Markup | None = None) -> Path:
    """Write `index.html`, `figures/*.png` and `figures/*.csv`, and return the page's path.

    Args:
        run: the finished run.
        folder: the folder to write to.
        evidence: tables of many runs, as HTML, for the end of the page.

    Raises:
        RunError: if the run has no gain, or its trace cannot be read.
    """
    if not run.results.gain:
        raise RunError("results.json holds no gain; evaluate the run again with eval.py")
    plots, tables = all_plots(run), {"gain": gain_lines(run), "likelihood": likelihood_lines(run)}
    tables["mistakes"] = frequent_mistakes(run.trace.rows, MOST_MISTAKES) if run.trace else []
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    shown: dict[str, list[dict[str, Any]]] = {}
    for plot in plots:
        png, svg = drawing.render(plot.draw)
        (figures / f"{plot.name}.png").write_bytes(png)
        without_formulas(plot.numbers).to_csv(figures / f"{plot.name}.csv", index=False)
        rows = plot.numbers.to_numpy(dtype=object).tolist() if len(plot.numbers) <= MOST_NUMBERS else []
        inline = drawing.inline_svg(svg, plot.name, html.escape(f"Plot: {plot.title}", quote=True))
        shown.setdefault(plot.section, []).append(
            {"name": plot.name, "title": plot.title, "note": plot.note, "svg": Markup(inline)}
            | {"columns": list(plot.numbers.columns), "rows": [[_number(value) for value in row] for row in rows]}
        )
    for name, lines in tables.items():
        if lines:
            without_formulas(pd.DataFrame(lines, dtype=object)).to_csv(figures / f"{name}.csv", index=False)
    page = folder / "index.html"
    page.write_text(_page(run, plots=shown, evidence=evidence, **tables), encoding="utf-8")
    return page


def evidence_tables(file: Path) -> Markup | None:
    """Render the tables that `scripts/evidence.py` writes into a page as HTML; None if there is no file or no table.

    Headings move down one level, below those of the report. HTML in the file is escaped.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(text.partition(BEGIN)[2].partition(END)[0])
    if not any(token.type == "table_open" for token in tokens):
        return None
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 1)}"
    return Markup(parser.renderer.render(tokens, parser.options, {}))


def gain_lines(run: FinishedRun) -> list[dict[str, Any]]:
    """Return the gains of `results.json`, with a check that (fixed − broken) / n equals the difference."""
    lines = []
    for gain in run.results.gain:
        weight = run.results.weight_of(gain.benchmark)
        row = run.results.find(gain.benchmark, gain.metric, run.results.reported_on, weight)
        line = asdict(gain)
        line["ci95_low"], line["ci95_high"] = line.pop("ci95")
        line |= {"n": row.n if row else None, "weight": weight, "adds_up": adds_up(gain, row.n) if row else None}
        lines.append(line | {"verdict": gain.verdict})
    return lines


def adds_up(gain: Gain, n: int) -> bool | None:
    """Tell whether (fixed − broken) / n equals the improvement; None if it need not, as for graded metrics.

    >>> adds_up(Gain("a", "accuracy", 0.5, 0.75, 0.25, (0, 1), fixed=2, broken=1, p_value=1.0), 4)
    True
    """
    counts = (gain.pilot * n, gain.fused * n)
    if gain.fixed is None or gain.unit != SHARE or any(abs(count - round(count)) > 1e-6 for count in counts):
        return None
    improvement = gain.difference if gain.higher_is_better else -gain.difference
    return abs((gain.fixed - gain.broken) / n - improvement) < 1e-9


def likelihood_lines(run: FinishedRun) -> list[dict[str, Any]]:
    """Return, by split, the NLL per target token of right answers under Pilot and fused model."""
    weight, found = run.results.weight_of("all"), []
    for split in dict.fromkeys(row.split for row in run.results.rows):
        pilot, fused = (run.results.find("all", NLL.name, split, w) for w in (0.0, weight))
        if pilot and fused:
            line = {"split": split, "tokens": pilot.n}
            for name, row in (("pilot", pilot), ("fused", fused)):
                line |= {name: row.value, f"{name}_ci95_low": row.ci95[0], f"{name}_ci95_high": row.ci95[1]}
            found.append(line)
    return found


def examples(run: FinishedRun) -> dict[str, Any]:
    """Return the data of the explorer: every answer, and the traced positions in a form small enough to embed.

    The texts of tokens are in one list, to which positions refer by number. `templates/report.js` reads this layout.
    `examples` are [benchmark, id, outcome, prompt, right answer, Pilot's, fused model's, view or null]. A view holds
    `gold`, `emitted` and `pilot_emitted`. The page holds at most `MOST_POSITIONS` positions; answers that the Copilot
    changed get their views first.
    """
    found, numbers, views, room = [], defaultdict(count().__next__), {}, MOST_POSITIONS
    for benchmark in run.results.benchmarks:
        answers = answers_of_both(run.results, run.directory.predictions, benchmark)
        found += [(benchmark, a.id, a.outcome, a.prompt, a.target.strip(), a.pilot, a.fused) for a in answers]
    traced = {(name, row["id"]): row for name, rows in (run.trace.rows.items() if run.trace else ()) for row in rows}
    changed_first = sorted(range(len(found)), key=lambda place: found[place][2] not in ("fixed", "broken"))
    for place in changed_first:
        row = traced.get(found[place][:2])
        size = len(row["gold"]) + len(row.get("emitted", ())) if row else 0
        if row and size <= room:
            room -= size
            view = {name: [_position(p, numbers) for p in row[name]] for name in ("gold", "emitted") if name in row}
            said = {"pilot_emitted": [numbers[text] for text in row["pilot_emitted"]]} if "emitted" in row else {}
            views[place] = view | said
    order = sorted(range(len(found)), key=lambda place: place not in views)  # examples with a view come first
    shown = [[*found[place], views.get(place)] for place in order]
    counts = {"traced": len(traced), "shown": len(views)}
    return {"benchmarks": run.results.benchmarks, "examples": shown, "tokens": list(numbers), **counts}


def _position(position: dict[str, Any], numbers: dict[str, int]) -> list[Any]:
    """Encode as [token, top-5 before, corrections, top-5 after, ‖f^C‖, cosine, Pilot's lens, Copilot's lens]."""

    def pairs(name: str) -> list[Any]:  # flattens [text, score] pairs to number, score, …
        return [part for text, s in position[name] for part in (numbers[text], float(f"{s:.3g}"))]

    token = numbers[position["token"]]
    size = [float(f"{value:.3g}") for value in next(iter(position["feedback"].values()))]
    tops = map(pairs, ("before", "correction", "after"))
    return [token, *tops, *size, *map(pairs, ("pilot_lens", "copilot_lens"))]


def _page(run: FinishedRun, *, gain: list[dict[str, Any]], **parts: Any) -> str:
    environment = Environment(
        loader=PackageLoader("tcopilot.reporting.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": _number, "step": show_difference, "p": p_text}
    environment.filters["value"] = lambda value, unit: f"{scale(unit) * value:.{digits_of(unit)}f}"
    again = shlex.quote(override("run", run.folder)) if run.directory.export.exists() else "run=<training run>"
    templates, shown = files("tcopilot.reporting.report") / "templates", examples(run)
    data = json.dumps(shown | {"gain": gain}, ensure_ascii=False, separators=(",", ":"))
    return environment.get_template("report.html.j2").render(
        run=run, results=run.results, split=run.results.reported_on, meta=run.trace.meta if run.trace else None,
        again=again, explorer=shown, gain=gain, **parts,
        style=Markup((templates / "report.css").read_text(encoding="utf-8")),
        script=Markup((templates / "report.js").read_text(encoding="utf-8")),
        data=Markup(data.replace("<", "\\u003c")),  # safe inside a script element
    )  # fmt: skip


def _number(value: Any) -> str:
    """Format a number, or each of a mapping: whole numbers as they are, others with four significant digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_number(one)}" for name, one in value.items())
    if value is None or value != value:  # pandas writes missing numbers as nan
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{int(value):,}" if value == int(value) and abs(value) >= 1 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
