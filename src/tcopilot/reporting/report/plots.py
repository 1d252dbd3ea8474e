"""The plots of the report, each with its numbers, its drawing function and a note on how to read it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd

from tcopilot.data.metrics import NLL, printed_unit, scale
from tcopilot.models.gates import GATES
from tcopilot.reporting.finished_runs import FinishedRun, Trace
from tcopilot.reporting.report import corrections, drawing, overhead
from tcopilot.reporting.report.calibration import calibration_error, reliability
from tcopilot.reporting.report.drawing import Draw, Mark, Series

MODELS = ("Pilot", "Pilot + Copilot")


@dataclass
class Plot:
    """One plot of the report."""

    name: str  # stem of its file names
    section: str  # section of the page
    title: str  # what the plot shows, with the unit
    note: str  # one or two sentences on how to read it
    numbers: pd.DataFrame = field(repr=False)
    draw: Draw = field(repr=False)


def all_plots(run: FinishedRun) -> list[Plot]:
    """Return every plot that the files of a run allow, in the order of the page."""
    found = [*weight_curves(run), *training_curves(run)]
    if run.trace is not None:
        found += [*calibration_plots(run.trace), *correction_plots(run.trace), *drift_plots(run.trace)]
    return [*found, *overhead_plots(run)]


def weight_curves(run: FinishedRun) -> Iterator[Plot]:
    """Plot the deciding metric of each benchmark, and the likelihood, over λ."""
    results, table = run.results, run.results.table()
    first = {gain.benchmark: gain.metric for gain in reversed(results.gain)}
    for benchmark, metric in [*((name, first[name]) for name in results.benchmarks), ("all", NLL.name)]:
        rows = table[(table.benchmark == benchmark) & (table.metric == metric)]
        if rows.weight.nunique() < 2:
            continue
        kind, series = rows.unit.iloc[0], []
        unit, factor = f" ({printed_unit(kind)})" if kind else "", scale(kind)
        for split, some in rows.groupby("split", sort=False):
            some = some.sort_values("weight")
            errors = [(factor * (some.value - some[end]).abs()).tolist() for end in ("ci95_low", "ci95_high")]
            series.append(Series(split, some.weight.tolist(), (factor * some.value).tolist(), errors))
        marks = [Mark("selected λ = {:g}", results.weight_of(benchmark), "-")]
        if not isinstance(results.selected_weight, dict):  # λ* and λ0 hold for all benchmarks together
            marks += [Mark("λ* = {:.3g}", results.best_weight, "--")]
            marks += [Mark("theorem's λ₀ = {:.3g}", theorem_bound(run), None)]
        marks = [mark._replace(label=mark.label.format(mark.x)) for mark in marks if mark.x is not None]
        where = "all benchmarks" if benchmark == "all" else benchmark
        yield Plot(
            re.sub(r"[^\w.@+-]", "_", f"weight_{benchmark}_{metric}"), "weights", f"{where}: {metric} over λ{unit}",
            "λ = 0 is the Pilot. Bars are 95 % intervals. λ* has the least squared error; where the theorem's λ₀ is "
            "known, every λ in the shade is promised a squared error below the Pilot's. That is not this metric.",
            rows[["split", "weight", "value", "ci95_low", "ci95_high", "n"]],
            drawing.lines(series, "λ", f"{metric}{unit}", marks),
        )  # fmt: skip


def theorem_bound(run: FinishedRun) -> float | None:
    """Return λ0 of Theorem 4.1 as estimated by `tcopilot-theorem` for this run; None without an estimate."""
    file = run.here_or_in_training("theorem")
    gated = run.config.get("fusion.per") in GATES
    if file is None or (gated and file != run.directory.theorem):  # the training run had no gate
        return None
    return json.loads(file.read_text(encoding="utf-8"))["lambda_0"]


def calibration_plots(trace: Trace) -> Iterator[Plot]:
    """Plot the reliability of both models on tokens of right answers, for all benchmarks together and for each."""
    groups = dict(trace.rows)
    if len(groups) > 1:
        groups = {"all benchmarks": [row for rows in groups.values() for row in rows], **groups}
    for name, rows in groups.items():
        lines, series, tokens = [], [], [token for row in rows for token in row["gold"]]
        of_row = [place for place, row in enumerate(rows) for _ in row["gold"]]
        for after, (model, top) in enumerate(zip(MODELS, ("before", "after"), strict=True)):
            right = [token["right"][after] for token in tokens]
            bins = reliability([token[top][0][1] for token in tokens], right, rows=of_row)
            errors = ([b.accuracy - b.ci95[0] for b in bins], [b.ci95[1] - b.accuracy for b in bins])
            title = f"{model}, ECE {100 * calibration_error(bins):.1f} %"
            series.append(Series(title, [b.confidence for b in bins], [b.accuracy for b in bins], errors))
            lines += [(model, *b[:5], *b.ci95) for b in bins]
        yield Plot(
            f"reliability_{name.replace(' ', '_')}", "calibration", f"{name}: reliability",
            f"Share of tokens whose likeliest candidate is right, over the confidence in it; {len(tokens):,} tokens "
            f"of right answers in bins of 0.1; the intervals are over rows. Below the diagonal a model is too sure.",
            pd.DataFrame(
                lines, columns=["model", "low", "high", "tokens", "confidence", "accuracy", "ci95_low", "ci95_high"]
            ),
            drawing.lines(series, "confidence", "share right", diagonal=True),
        )  # fmt: skip


def correction_plots(trace: Trace) -> Iterator[Plot]:
    """Plot, as in Figure 3, the correction's share of the Pilot's logit range, and the distribution of its size."""
    found = [(name, *corrections.share(rows), len(rows)) for name, rows in trace.rows.items()]
    lines = [(name, mean, *ends, rows) for name, mean, ends, rows in found]
    shares = pd.DataFrame(lines, columns=["benchmark", "share", "ci95_low", "ci95_high", "rows"])
    errors = [(100 * (shares[end] - shares.share).abs()).tolist() for end in ("ci95_low", "ci95_high")]
    bars = Series("share", [], (100 * shares.share).tolist(), errors)
    yield Plot(
        "correction_share", "corrections", "Correction beside the Pilot's logit range (%)",
        "Mean logit shift over max − min of the Pilot's logits, with 95 % intervals over rows.",
        shares, drawing.bars(list(trace.rows), [bars], "share of range (%)"),
    )  # fmt: skip
    tokens = ((name, token["shift"]) for name, rows in trace.rows.items() for row in rows for token in row["gold"])
    shifts = [(corrections.domain(name), shift) for name, shift in tokens]
    points = corrections.magnitudes(pd.DataFrame(shifts, columns=["domain", "shift"]))
    series = [
        Series(name, some["shift"].tolist(), (100 * some.share_of_tokens).tolist())
        for name, some in points.groupby("domain", sort=False)
    ]
    yield Plot(
        "correction_magnitude", "corrections", "Correction magnitudes by domain (nats)",
        "Share of target tokens whose logit shift is below the value: a line further right has larger corrections.",
        points, drawing.lines(series, "mean logit shift of a token (nats)", "tokens below (%)", log_x=True),
    )  # fmt: skip


def drift_plots(trace: Trace) -> Iterator[Plot]:
    """Plot ‖f^C‖ and its cosine with ℓ over the target position, under observed and own feedback."""
    for name, rows in trace.rows.items():
        found = corrections.drift(rows)
        if found.position.nunique() < 2:
            continue
        for what, label in (("norm", f"‖f^C‖ ({trace.meta['correction_unit']})"), ("cosine", "cosine of f^C with ℓ")):
            points = found[["feedback", "position", "tokens", what, f"{what}_half"]]
            points = points.set_axis(["feedback", "position", "tokens", "mean", "ci95_half_width"], axis=1)
            series = [
                Series(
                    f"{feedback} feedback", *(some[key].tolist() for key in ("position", "mean", "ci95_half_width"))
                )
                for feedback, some in points.groupby("feedback")
            ]
            yield Plot(
                f"drift_{what}_{name}", "drift", f"{name}: {label} over position",
                "Mean over rows that reach the position, along right answers; bars are 95 % intervals.",
                points, drawing.lines(series, "target position", label, whole_x=True),
            )  # fmt: skip


CURVES = (  # name, title, y label, note, {label: metric}
    ("pilot_loss", "Pilot's loss (nats)", "cross-entropy (nats)", "Mean over a round's target tokens, before its "
     "update; on validation, also of the fused model.",
     {"training": "train/pilot_loss", "validation": "val/pilot_nll", "validation, fused": "val/fused_nll"}),
    ("copilot_loss", "Copilot's loss", "objective", "Mean over the target tokens of the round's first draw.",
     {"training": "train/copilot_loss"}),
    ("cosine", "Does f^C estimate ℓ?", "cosine or ratio", "On validation rows. Cosine: 1 is a correction that points "
     "at the error. Error ratio Σ‖f^C − ℓ‖² / Σ‖ℓ‖²: below 1 f^C is closer to ℓ than 0 is.",
     {"cosine": "val/cosine", "error ratio": "val/error_ratio"}),
    ("norms", "‖f^C‖ and ‖ℓ‖ (medians)", "norm", "Medians over validation tokens.",
     {"‖f^C‖": "val/correction_norm_p50", "‖ℓ‖": "val/error_norm_p50"}),
    ("log_age", "Age of the log (rounds)", "rounds", "Mean over records since each was logged.",
     {"mean age": "log/age_rounds", "rounds held": "log/rounds"}),
    ("log_repeats", "Composition of the log: repeated rows (share)", "share of records", "Records of rows that had "
     "been logged before.", {"repeated": "log/repeated_share"}),
    ("log_energy", "Error energy ‖ℓ‖² in the log", "‖ℓ‖²", "Mean over records. If far below validation, the log no "
     "longer represents the errors that lie ahead.",
     {"log": "log/error_energy", "validation": "val/error_energy"}),
)  # fmt: skip


def training_curves(run: FinishedRun) -> Iterator[Plot]:
    """Plot losses, corrections and figures of the Mistake Log over rounds.

    Lines of `metrics.csv` that only repeat an earlier value are left out, except for the last one.
    """
    for name, title, y_label, note, wanted in CURVES:
        series, lines = [], []
        for label, metric in wanted.items():
            points = run.metrics.reindex(columns=["round", metric]).dropna().astype(float)
            changed = points[metric].diff() != 0
            points = points[changed | (points.index == points.index.max())]
            if len(points) > 1:
                series.append(Series(label, points["round"].tolist(), points[metric].tolist()))
                lines += [(label, *point) for point in points.itertuples(index=False)]
        if series:
            numbers = pd.DataFrame(lines, columns=["series", "round", "value"])
            plot = drawing.lines(series, "round", y_label, whole_x=True)
            yield Plot(f"training_{name}", "training", title, note, numbers, plot)


def overhead_plots(run: FinishedRun) -> Iterator[Plot]:
    """Plot, as in Figure 5, time with the Copilot relative to the Pilot alone, beside its lower bound."""
    floor, decoding = None, []
    if run.trace:
        lengths = overhead.lengths([row for rows in run.trace.rows.values() for row in rows], "gold")
        floor = overhead.training_floor(run.trace.meta["parameters"], *lengths, run.config["copilot.steps_per_round"])
        decoding = overhead.decoding_costs(run.trace.meta, run.trace.rows)
    training = overhead.training_cost(run.metrics, floor)
    if costs := [*([training] if training else []), *decoding]:
        groups = [Series("measured", [], [cost.ratio for cost in costs])]
        if all(cost.floor is not None for cost in costs):
            groups.append(Series("floor", [], [cost.floor for cost in costs]))
        yield Plot(
            "efficiency", "efficiency", "Time with the Copilot over time of the Pilot alone",
            "Training: seconds inside training steps. Decoding: seconds per row, batch after batch in one process. "
            "Floor: the ratio of multiplications by weights or, where smaller, of weights read.",
            pd.DataFrame(costs).set_axis(["what", "pilot_seconds", "both_seconds", "ratio", "floor"], axis=1),
            drawing.bars([cost.what for cost in costs], groups, "ratio", base=1.0),
        )  # fmt: skip
