"""Drawing of the report's plots in one style, without pyplot's global state, as PNG for papers and SVG for the page.

Series differ in colour (Okabe and Ito's palette, which colour-blind readers can distinguish), marker and line style.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

SIZE = (4.5, 3.1)  # inches; legible on a phone without zooming
DPI = 200
INK, RULE = "#010203", "#c4c8cc"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.5, "axes.axisbelow": True, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "lines.linewidth": 1.6,
    "lines.markersize": 5, "legend.frameon": False, "legend.fontsize": 8.5, "svg.hashsalt": "tcopilot",
}  # fmt: skip
PAINTS = {  # colours to CSS, so that the page's dark scheme can brighten them
    INK: "currentColor", RULE: "var(--rule)", "#0072b2": "var(--blue)", "#d55e00": "var(--red)",
    "#009e73": "var(--green)", "#cc79a7": "var(--pink)", "#e69f00": "var(--orange)", "#56b4e9": "var(--sky)",
}  # fmt: skip
LOOKS = [  # colour, marker and line style of each series
    ("#0072b2", "o", "-"), ("#d55e00", "s", "--"), ("#009e73", "^", "-."), ("#cc79a7", "D", ":"),
    ("#e69f00", "v", (0, (5, 1))), ("#56b4e9", "P", (0, (3, 1, 1, 1))),
]  # fmt: skip
Draw = Callable[[Axes], None]
"""A function that draws a plot on axes."""


@dataclass
class Series:
    """A line of points, optionally with their 95 % intervals as half widths or as (below, above)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    errors: Sequence[Sequence[float]] | Sequence[float] | None = None


class Mark(NamedTuple):
    """A labelled vertical line, or with `line` None the shaded range from 0 to `x`."""

    label: str
    x: float
    line: str | None


def lines(
    series: Sequence[Series], x_label: str, y_label: str, marks: Sequence[Mark] = (), *,
    whole_x: bool = False, diagonal: bool = False, log_x: bool = False,
) -> Draw:  # fmt: skip
    """Draw lines over a common x axis, which may be logarithmic or limited to whole numbers; `diagonal` adds y = x."""

    def draw(axes: Axes) -> None:
        if diagonal:
            axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":", label="as often right as sure")
        for place, one in enumerate(series):
            colour, marker, line = LOOKS[place % len(LOOKS)]
            every = len(one.x) // 12 if len(one.x) > 25 else 1  # crowded lines have markers on some points only
            axes.errorbar(
                one.x, one.y, yerr=one.errors, label=one.label, color=colour, linestyle=line, marker=marker,
                markevery=every, errorevery=every, capsize=2.5, elinewidth=0.9,
            )  # fmt: skip
        for mark in marks:
            if mark.line is None:
                axes.axvspan(0, mark.x, color=INK, alpha=0.08, linewidth=0, label=mark.label)
            else:
                axes.axvline(mark.x, color=INK, linewidth=1, linestyle=mark.line, label=mark.label)
        axes.set(xlabel=x_label, ylabel=y_label)
        places = [x for one in series for x in one.x]
        if log_x and max(places) >= 10 * min(places):  # within one decade the labels would overlap
            axes.set_xscale("log")
        if whole_x:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        if not any(value for one in series for value in one.y):
            axes.set_ylim(0, 1)  # a line that is 0 everywhere defines no scale

    return draw


def bars(labels: Sequence[str], groups: Sequence[Series], y_label: str, base: float | None = None) -> Draw:
    """Draw bars side by side for each label, hatched by group; `groups` hold a height (and error) for each label."""

    def draw(axes: Axes) -> None:
        width = 0.8 / len(groups)
        for place, group in enumerate(groups):
            at = [x - 0.4 + width * (place + 0.5) for x in range(len(labels))]
            axes.bar(
                at, group.y, width * 0.92, yerr=group.errors, label=group.label, capsize=3,
                color="none" if place else LOOKS[0][0], edgecolor=LOOKS[place][0],
                hatch=("", "///", "...")[place % 3], error_kw={"ecolor": INK, "elinewidth": 1},
            )  # fmt: skip
        if base is not None:
            axes.axhline(base, color=INK, linewidth=1, linestyle=":")
        slanted = sum(map(len, labels)) > 36
        axes.set_xticks(range(len(labels)), labels, rotation=30 if slanted else 0, ha="right" if slanted else "center")
        axes.set_xlim(-0.6 - 0.5 / len(labels), len(labels) - 0.4 + 0.5 / len(labels))
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(y_label)

    return draw


def render(draw: Draw) -> tuple[bytes, str]:
    """Draw a plot once, and return it as PNG and as SVG; `inline_svg` adapts the latter to the page."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside lower center", ncols=2 if len(labels) < 5 else 3)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return png.getvalue(), svg.getvalue()


def inline_svg(svg: str, name: str, title: str) -> str:
    """Adapt matplotlib's SVG for a page with several: without prolog, with unique ids, CSS colours and a title.

    `name` makes the ids unique; `title`, without markup, is the text for screen readers.
    """
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="|href="#|url\(#', rf"\g<0>{name}-", svg)
    for colour, paint in PAINTS.items():
        svg = svg.replace(colour, paint)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', svg, count=1)
