"""The data behind the page's explorer: every answer, and the traced positions in a form small enough to embed.

Texts of tokens stand in one list; positions refer to them by number. `templates/report.js` reads this layout.
"""

from __future__ import annotations

from typing import Any

from tcopilot.evaluation.outcomes import answers_of_both
from tcopilot.reporting.finished_runs import FinishedRun

MOST_POSITIONS = 60_000  # on the page, about 15 MB


def examples(run: FinishedRun) -> dict[str, Any]:
    """Return what the explorer shows, as plain values.

    `examples` are [benchmark, id, outcome, prompt, right answer, Pilot's, fused model's, view or null]. A view holds
    `gold`, `emitted` and `pilot_emitted`. Answers that the Copilot changed get their views first, should the page
    hold no more than `MOST_POSITIONS` positions.
    """
    found, numbers, views, room = [], {}, {}, MOST_POSITIONS
    for benchmark in run.benchmarks:
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
            said = {"pilot_emitted": [_number(t, numbers) for t in row["pilot_emitted"]]} if "emitted" in row else {}
            views[place] = view | said
    order = sorted(range(len(found)), key=lambda place: place not in views)  # what can be looked into comes first
    shown = [[*found[place], views.get(place)] for place in order]
    counts = {"traced": len(traced), "shown": len(views)}
    return {"benchmarks": run.benchmarks, "examples": shown, "tokens": list(numbers), **counts}


def _position(position: dict[str, Any], numbers: dict[str, int]) -> list[Any]:
    """[token, top-5 before, corrections, top-5 after, ‖f^C‖, cosine, Pilot's lens, Copilot's lens]."""

    def pairs(name: str) -> list[Any]:  # [text, score] pairs as number, score, and so on
        return [part for text, s in position[name] for part in (_number(text, numbers), float(f"{s:.3g}"))]

    token = _number(position["token"], numbers)
    size = [float(f"{value:.3g}") for value in next(iter(position["feedback"].values()))]
    tops = map(pairs, ("before", "correction", "after"))
    return [token, *tops, *size, *map(pairs, ("pilot_lens", "copilot_lens"))]


def _number(text: str, numbers: dict[str, int]) -> int:
    """Number the texts of tokens as they come."""
    return numbers.setdefault(text, len(numbers))
