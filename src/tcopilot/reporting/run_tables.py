"""The tables that a run prints at its end: every metric over λ, the choice of λ, and the gain beside the controls."""

from collections.abc import Mapping

from rich.table import Table

from tcopilot.data.metrics import NLL, SHARE, show, show_difference
from tcopilot.evaluation.results import Results
from tcopilot.evaluation.significance import p_text


def gain_table(results: Results) -> Table:
    """Make a table of the Copilot's gain on the reported rows, followed by the figures of each control.

    The difference of a control to the Pilot has no interval, because its rows are not paired here.
    """
    known = {
        gain.benchmark: f"\n{gain.benchmark}: {part['trained_on']} of {part['rows']} rows ask what was trained on"
        for gain in results.gain
        if (part := results.data.get(f"{gain.benchmark}/{results.reported_on}", {})).get("trained_on")
    }
    cost = f"{results.train_seconds:.0f} s"
    cost += "" if results.train_flops is None else f", {_tera(results.train_flops)} TFLOPs"
    table = Table(
        *("benchmark", "metric", "Pilot", "Pilot + Copilot", "difference [95 %]"),
        *("fixed / broken", "p", "n", "λ", "verdict"),
        title="Gain of the Copilot",
        caption=f"{results.rounds} rounds, {cost}; λ {results.choice}" + "".join(known.values()),
    )
    for column in table.columns[2:9]:
        column.justify = "right"
    for gain in results.gain:
        weight = results.weight_of(gain.benchmark)
        row = results.find(gain.benchmark, gain.metric, results.reported_on, weight)
        table.add_row(
            *(gain.benchmark, gain.metric, show(gain.pilot, gain.unit), show(gain.fused, gain.unit)),
            show_difference(gain.difference, gain.unit, gain.ci95),
            "" if gain.fixed is None else f"{gain.fixed} / {gain.broken}",
            p_text(gain.p_value),
            str(row.n) if row else "",
            "" if weight is None else f"{weight:g}",
            gain.verdict,
        )
    likelihoods = (results.find("all", NLL.name, results.reported_on, w) for w in (0.0, results.weight_of("all")))
    if all(pair := list(likelihoods)):  # a calibrated Pilot may gain as much in NLL
        values, weight = [row.value for row in pair], f"{pair[1].weight:g}"
        difference = show_difference(values[1] - values[0], NLL.unit)
        shown = (*(show(value, NLL.unit) for value in values), difference)
        table.add_row("all", NLL.name, *shown, "", "", str(pair[1].n), weight, "")
    if results.controls:
        table.add_section()
        table.add_row(
            *("benchmark", "metric", "Pilot", "control", "difference", "rounds", "seconds", "n", "TFLOPs", "model"),
            style="bold",
        )
    for control in results.controls:
        pilot = results.find(control.benchmark, control.metric, control.split, 0.0)
        table.add_row(
            *(control.benchmark, control.metric, show(pilot.value, pilot.unit) if pilot else ""),
            show(control.value, control.unit),
            show_difference(control.value - pilot.value, control.unit) if pilot else "",
            *(str(control.rounds), f"{control.train_seconds:.0f}", str(control.n)),
            *(_tera(control.train_flops), control.name),
        )
    return table


def weight_table(results: Results) -> Table:
    """Make a table of every metric over λ, with a line per benchmark, split and metric; the selected λ is marked."""
    columns = ["benchmark", "split", "metric"]
    table = Table(*columns, title="Metrics over λ", caption=f"λ {results.choice}")
    weights = sorted({row.weight for row in results.rows})
    for weight in weights:
        chosen = results.selected_weight
        by_name = chosen if isinstance(chosen, Mapping) else {"selected": chosen}
        names = ", ".join(name for name, of_name in by_name.items() if of_name == weight)
        table.add_column(f"λ = {weight:g}" + (f"\n({names})" if names else ""), justify="right")
    for (benchmark, split, metric, unit), rows in results.table().groupby([*columns, "unit"], sort=False):
        curve = dict(zip(rows.weight, rows.value, strict=True))
        # The unit is written once per line, because with many λ there is no room for it in every cell.
        named, of_cells = (metric, unit) if unit in ("", SHARE) else (f"{metric}, {unit}", "")
        cells = [show(curve[weight], of_cells) if weight in curve else "" for weight in weights]
        table.add_row(benchmark, split, named, *cells)
    return table


def selection_table(results: Results) -> Table:
    """Make a table of the λ that each rule chooses, with its figures; the rule that decided is marked."""
    table = Table(
        *("λ of", "rule", "λ", "metric", results.selected_on, results.reported_on),
        *(f"NLL, {results.selected_on}", f"NLL, {results.reported_on}", "taken"),
        title="How λ was chosen",
    )
    for column in (table.columns[place] for place in (2, 4, 5, 6, 7)):
        column.justify = "right"
    for one in results.selection:
        values = ("" if value is None else show(value, one.unit) for value in (one.validation, one.reported))
        likelihoods = ("" if nll is None else f"{nll:.4f}" for nll in (one.validation_nll, one.reported_nll))
        named = (one.benchmark, one.rule, f"{one.weight:g}", one.metric or "")
        table.add_row(*named, *values, *likelihoods, "yes" if one.taken else "")
    return table


def _tera(flops: float | None) -> str:
    return "" if flops is None else f"{flops / 1e12:.3g}"
