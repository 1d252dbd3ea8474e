"""The data behind the page's explorer: every answer, and the traced positions in a form small enough to embed.

Texts of tokens stand in one list; positions refer to them by number. `templates/report.js` reads this layout.
"""

from __future__ import annotations

from typing import Any

from tcopilot.evaluation.outcomes import answers_of_both
from tcopilot.reporting.finished_runs import FinishedRun

MOST_POSITIONS = 60_000  # on the page, about 15 MB

Row = dict[str, Any]


class _Tokens:
    """Numbers the texts of tokens as they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def pairs(self, pairs: list[list[Any]]) -> list[Any]:
        """Flatten [text, score] pairs to number, score, and so on."""
        return [part for text, score in pairs for part in (self.number(text), float(f"{score:.3g}"))]

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def examples(run: FinishedRun) -> dict[str, Any]:
    """Return what the explorer shows, as plain values.

    `examples` are [benchmark, id, outcome, prompt, right answer, Pilot's, fused model's, view or null]. A view holds
    `gold`, `emitted` and `pilot_emitted`. Answers that the Copilot changed get their views first, should the page
    hold no more than `MOST_POSITIONS` positions.
    """
    tokens, found = _Tokens(), []
    for benchmark in run.benchmarks:
        answers = answers_of_both(run.results, run.directory.predictions, benchmark)
        found += [(benchmark, a.id, a.outcome, a.prompt, a.target.strip(), a.pilot, a.fused) for a in answers]
    traced = {(name, row["id"]): row for name, rows in (run.trace.rows.items() if run.trace else ()) for row in rows}
    views: dict[int, Row] = {}
    room = MOST_POSITIONS
    changed_first = sorted(range(len(found)), key=lambda place: found[place][2] not in ("fixed", "broken"))
    for place in changed_first:
        row = traced.get((found[place][0], found[place][1]))
        size = len(row["gold"]) + len(row.get("emitted", ())) if row else 0
        if row and size <= room:
            room -= size
            views[place] = _view(row, tokens)
    order = sorted(range(len(found)), key=lambda place: place not in views)  # what can be looked into comes first
    return {
        "benchmarks": run.benchmarks,
        "examples": [[*found[place], views.get(place)] for place in order],
        "tokens": list(tokens.numbers),
        "traced": len(traced),
        "shown": len(views),
    }


def _view(row: Row, tokens: _Tokens) -> Row:
    view = {"gold": [_position(position, tokens) for position in row["gold"]]}
    if "emitted" in row:
        view["emitted"] = [_position(position, tokens) for position in row["emitted"]]
        view["pilot_emitted"] = [tokens.number(text) for text in row["pilot_emitted"]]
    return view


def _position(position: Row, tokens: _Tokens) -> list[Any]:
    """[token, top-5 before, corrections, top-5 after, ‖f^C‖, cosine, Pilot's lens, Copilot's lens]."""
    norm, cosine = next(iter(position["feedback"].values()))
    return [
        tokens.number(position["token"]),
        *(tokens.pairs(position[name]) for name in ("before", "correction", "after")),
        float(f"{norm:.3g}"), float(f"{cosine:.3g}"),
        *(tokens.pairs(position[name]) for name in ("pilot_lens", "copilot_lens")),
    ]  # fmt: skip
