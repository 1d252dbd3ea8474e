"""The output of `tcopilot-theorem`: estimates, the curve over λ, the entries that a single λ helps, and a verdict."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

WIDTH = 140  # characters of a table, if the output is not a terminal
NONE = "–"
TOLERANCE = 1e-9  # numerical error of sums in float64, per target token
ESTIMATES = {
    "S² = E‖p − p̂‖²": "pilot_error_sq",
    "  of it removable by constants": "constant_error_sq",
    "ε_P², bias of the Pilots": "epsilon_pilot_sq",
    "σ_P², their variance": "sigma_pilot_sq",
    "E‖f^C − ℓ‖²": "copilot_error_sq",
    "  ε_C², along ℓ": "epsilon_copilot_sq",
    "  σ_C², the rest": "sigma_copilot_sq",
    "λ*, the best single λ": "lambda_star",
    "λ0, promised": "lambda_0",
    "zero crossing, measured": "zero_crossing",
}


def show(found: dict[str, Any]) -> None:
    """Print tables and sentences of a `theorem.json`."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    estimates = _table(f"Theorem 4.1 on {found['split']}", "quantity", "estimate", "95 %")
    for label, name in ESTIMATES.items():
        interval = found["intervals"].get(name)
        bounds = NONE if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        estimates.add_row(label, _number(found[name]), bounds)
    estimates.caption = f"{found['rows']:,} rows, {found['tokens']:,} target tokens, {found['vocabulary']:,} entries"
    curve = _table("E‖p − p̃‖² over λ", "λ", "by the parabola", "p̂ + λ f^C", "as decoded (floored)")
    for weight, *distances in found["curve"]:
        curve.add_row(f"{weight:g}", *map(_number, distances))
    heads = ("tokens of", "tokens", "energy", "own λ*", "zero crossing", "removed", "at best per entry")
    parts = _table("Where a single λ* serves", *heads, "entries' λ* 5–95 %", "served")
    whole = found | found["entries"] | {"energy": 1.0}
    positions = {f"position {name}": part for name, part in found["by_position"].items()}
    for name, part in ({"all": whole} | found["by_benchmark"] | positions).items():
        quantiles = part["best_weight_quantiles"]
        parts.add_row(
            escape(name), f"{part['tokens']:,}", _percent(part["energy"]), _number(part["lambda_star"]),
            _number(part["zero_crossing"]), _percent(part["removed_single"]), _percent(part["removed_per_entry"]),
            f"{quantiles['5']:.2f} to {quantiles['95']:.2f}", _percent(1 - part["harmed"]["energy"]),
        )  # fmt: skip
    for shown in (estimates, curve, parts, *map(escape, found["verdict"])):
        console.print(shown)


def verdict(found: dict[str, Any]) -> list[str]:
    """Explain in words what the figures show and what they do not."""
    said, entries = [_range(found), _condition(found)], found["entries"]
    if found["lambda_star"] > 0:
        smallest = entries["common_zero_crossing"]
        single, best, held_out = (
            _percent(entries[f"removed_{kind}"]) for kind in ("single", "per_entry", "per_entry_held_out")
        )
        common = f"every λ in (0, {smallest:.3g}) helps every entry" if smallest > 0 else "no λ > 0 helps every entry"
        said += [
            _served(entries),
            f"One λ for each entry would remove at most {best} of S² ({held_out} on rows that it was not chosen on), "
            f"the single one removes {single}; {common}.",
        ]
        worse = [
            f"{kind} {name} ({_percent(part['energy'])} of the error energy)"
            for kind in ("benchmark", "position")
            for name, part in found[f"by_{kind}"].items()
            if part["removed_single"] < 0
        ]
        said.append(f"By benchmark and position, λ* makes {', '.join(worse) or 'nothing'} worse as a whole.")
    on_it = "lies on" if found["curve_error"] < TOLERANCE else "DEPARTS FROM"
    weight, *_, least = min(found["curve"], key=lambda point: point[3])
    said += [
        f"The measured curve {on_it} the parabola (largest difference {found['curve_error']:.1e}). "
        f"As decoded, floored and renormalised, the distance is least at λ = {weight:g} of those tried, {least:.4f}.",
        _pilots(found["pilots"]),
        "p is the one-hot target, so S², ε_P² and ε_C² include its noise; σ_P², λ* and the zero crossing do not.",
    ]
    if not found["is_eq_8"]:
        said.append(f"This run decodes with the rule {found['fusion']}; these figures are about p̂ + λ f^C (Eq. 8).")
    return said


def _range(found: dict[str, Any]) -> str:
    weight, crossing, removed = found["lambda_star"], found["zero_crossing"], _percent(found["removed"])
    if crossing is None:
        return "f^C is 0 everywhere: every λ is the Pilot."
    if crossing <= 0:
        away = f"f^C points away from the error (zero crossing {crossing:.3g})"
        return f"{away}: no λ > 0 helps; λ* = 0, keep the Pilot."
    return f"Measured: every λ in (0, {crossing:.3g}) lowers the distance; λ* = {weight:.3g} removes {removed} of S²."


def _condition(found: dict[str, Any]) -> str:
    promised, ratio = found["lambda_0"], found["copilot_error_sq"] / (found["pilot_error_sq"] or 1.0)
    if promised is None:
        return "Theorem 4.1 promises nothing here: ε_C < S does not hold."
    whole = f"E‖f^C − ℓ‖² is {ratio:.3g} S²"
    if ratio < 1:
        return f"Theorem 4.1 promises (0, {promised:.3g}), its largest range; {whole}, so λ = 1 helps too."
    alone = "so it promises nothing if all of that counts as ε_C²"
    return f"Theorem 4.1 promises (0, {promised:.3g}) with σ_C² split off; {whole}, {alone}."


def _served(entries: dict[str, Any]) -> str:
    harmed, never = entries["harmed"], entries["never"]
    served = f"A single λ* serves {_percent(1 - harmed['energy'])} of the error energy"
    if not harmed["entries"]:
        return f"{served}: no entry of the vocabulary gets worse."
    worst = ", ".join(repr(entry["token"]) for entry in entries["worst"])
    lost = f"{_percent(harmed['entries'])} of the entries ({_percent(harmed['occurrences'])} of target occurrences)"
    increase = _percent(harmed["increase"])
    unhelped = f" For {_percent(never['energy'])} of the energy no λ > 0 helps." if never["entries"] else ""
    return f"{served}; for {lost} it raises the error, by {increase} of S² in all, most for {worst}.{unhelped}"


def _pilots(pilots: dict[str, Any] | None) -> str:
    if pilots is None:
        return "One Pilot cannot tell ε_P² from σ_P²; give runs of other seeds, or --dropout-passes K."
    count = f"{len(pilots['draws'])} {'passes with dropout' if pilots['kind'] == 'dropout' else 'runs'}"
    share = _percent(pilots["sigma_sq"] / pilots["pilot_error_sq"]) if pilots["pilot_error_sq"] else NONE
    best = ", ".join(f"{draw['lambda_star']:.3g}" for draw in pilots["draws"][:10])
    return f"Over {count}, variance is {share} of S²; λ* of each: {best}."


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head in ("quantity", "tokens of") else "right")
    return table


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _percent(share: float) -> str:
    percent = 100 * share
    if 0 < percent < 0.05:
        return "< 0.1 %"
    return "> 99.9 %" if 99.95 <= percent < 100 - 1e-9 else f"{percent:,.1f} %"
