"""The tables of docs/evidence.md for the report page."""

from __future__ import annotations

from pathlib import Path

from markdown_it import MarkdownIt
from markupsafe import Markup

from tcopilot.reporting.evidence import BEGIN, END


def evidence_tables(file: Path) -> Markup | None:
    """Render the part of the page that `scripts/evidence.py` writes; None without the file, or without a table in it.

    Headings go one level down, beneath those of the report. Markup in the file stays text.
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
