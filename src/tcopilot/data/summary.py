"""Statistics of the prepared rows before training: counts, lengths, and problems that would distort the figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from tcopilot.data.answers import until_end
from tcopilot.data.benchmarks import Benchmark, DataError

MUCH = 0.01  # share of cut rows above which a warning is given
Figures = dict[str, float]
COUNTED = ("dropped", "lost_shots", "cut_prompts", "cut_options", "cut_targets", "end_tokens", "twin_options")
"""The kinds of rows that are counted in each split."""
REMARKS = {
    "lost_shots": "{count} of {rows} prompts lost shots; raise data.max_source_length, or lower data.shots",
    "cut_options": "{count} prompts lost part of their options; raise data.max_source_length",
    "end_tokens": "{count} of {rows} targets already end in an end token, so no second one is added",
    "twin_options": "{count} of {rows} rows offer the right option twice, and one of the two counts as wrong",
    "trained_on": "{count} of {rows} rows ask a question that is also trained on; remove them from one of the splits",
}
"""The remark about each kind of row, made if there are such rows."""


def measure(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, int], skipped: int) -> Figures:
    """Count the rows of a split and describe their lengths in tokens: mean, median, 95th percentile and longest."""
    figures: Figures = {"rows": len(rows), "skipped": skipped} | {kind: counts.get(kind, 0) for kind in COUNTED}
    for what in ("source", "target"):
        lengths = np.array([len(row[f"{what}_ids"]) for row in rows] or [0])
        middle = {"mean": lengths.mean(), "median": np.median(lengths), "p95": np.percentile(lengths, 95)}
        figures |= {f"{what}_{name}": float(value) for name, value in middle.items()}
        figures[f"{what}_max"] = int(lengths.max())
    return figures


def unreachable(
    rows: Sequence[Mapping[str, Any]], benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Counter[str]:
    """Judge the gold targets as if they had been generated, and count by reason those that would be judged wrong.

    Args:
        rows: Evaluation rows.
        benchmark: Their benchmark; one that ranks a catalogue reads no text, so none of its rows can fail.
        tokenizer: The Pilot's.
        longest: Most tokens that decoding generates.
    """
    why: Counter[str] = Counter()
    if benchmark.catalogue is not None:
        return why
    answers = [until_end(row["target_ids"][:longest], tokenizer.eos_token_id) for row in rows]
    for row, text in zip(rows, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
        if benchmark.correct(text, row["answer"]):
            continue
        if row["target_ids"][-1] != tokenizer.eos_token_id:
            why["cut by data.max_target_length"] += 1
        elif len(row["target_ids"]) > longest:
            why[f"longer than the {longest} tokens that decoding generates at most"] += 1
        else:
            why["changed by tokenising and decoding"] += 1
            why.setdefault(f"such as {row['answer']!r:.60} as {text!r:.60}", 0)
    return why


def remarks(part: str, figures: Mapping[str, float], why: Mapping[str, int]) -> list[str]:
    """Return sentences that a reader of a split's figures must know, each with a remedy where there is one."""
    rows, found = figures["rows"], []
    for kind, key in (("prompt", "max_source_length"), ("target", "max_target_length")):
        if (count := figures[f"cut_{kind}s"]) > MUCH * rows:
            end = "; a cut target lacks its end token and usually its answer" if kind == "target" else ""
            found.append(f"{part}: {count} of {rows} {kind}s were cut{end}; raise data.{key}")
    for kind, text in REMARKS.items():
        if count := figures.get(kind):
            found.append(f"{part}: {text.format(count=count, rows=rows)}")
    if why:
        reasons = ", ".join(f"{number} {reason}" if number else reason for reason, number in why.items())
        found.append(f"{part}: {figures['unreachable']} of {rows} gold answers are out of reach ({reasons})")
    return found


def judge(
    summary: Mapping[str, Figures], questions: Mapping[str, Sequence[str]],
    evaluation: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    benchmarks: Mapping[str, Benchmark], tokenizer: PreTrainedTokenizerBase, longest: Mapping[str, int],
) -> list[str]:  # fmt: skip
    """Add the figures that depend on all splits, and return remarks about the rows, one sentence each.

    Args:
        summary: Figures by ``<benchmark>/<split>``; ``trained_on`` and ``unreachable`` are added to them.
        questions: Questions of the rows by ``<benchmark>/<split>``, including ``<benchmark>/shots``.
        evaluation: Rows to be scored by split and benchmark.
        benchmarks: Benchmarks by name.
        tokenizer: The Pilot's.
        longest: Most tokens that decoding generates, by benchmark.
    """
    trained, shown = (
        {asked for part, all_asked in questions.items() if part.endswith(end) for asked in all_asked}
        for end in ("/train", "/shots")
    )
    taught, found = trained | shown, []
    for part, figures in summary.items():
        name, split = part.split("/")
        why: Counter[str] = Counter()
        if split != "train":
            if trained:
                figures["trained_on"] = sum(asked in taught for asked in questions[part])
            why = unreachable(evaluation[split, name], benchmarks[name], tokenizer, longest[name])
            figures["unreachable"] = sum(why.values())
        found += remarks(part, figures, why)
    return found


def metric_problems(
    evaluation: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]], benchmarks: Mapping[str, Benchmark]
) -> list[str]:
    """Score a gold answer of each benchmark, so that a metric that fails does so before training; say which do."""
    found = {}
    for (_, name), rows in evaluation.items():
        benchmark, gold = benchmarks[name], rows[0]
        try:
            benchmark.judge(benchmark.read(gold["target"], gold["answer"]))
        except DataError as error:
            found[name] = str(error)
        except Exception as error:  # of a class that is not ours
            what = f"its metrics cannot score the gold answer {gold['target']!r:.80}"
            found[name] = f"{name}: {what} ({type(error).__name__}: {error}); mend them"
    return list(found.values())


def summary_table(summary: Mapping[str, Figures]) -> Table:
    """Lay out the summary of a data module, one line per split; lengths are median, 95th percentile and longest."""
    table = Table("rows of", "rows", "prompt tokens", "target tokens", title="Data")
    named = {
        "dropped": ("dropped", "skipped"),
        "lost shots": ("lost_shots",),
        "cut": ("cut_prompts", "cut_targets"),
        "end tokens": ("end_tokens",),
        "trained on": ("trained_on",),
        "out of reach": ("unreachable",),
    }
    seen = {key for figures in summary.values() for key, count in figures.items() if count}
    shown = {name: keys for name, keys in named.items() if seen & set(keys)}
    for column in (*table.columns[1:], *map(table.add_column, shown)):
        if column is not None:
            column.justify = "right"
    for part, figures in summary.items():
        if "source_median" not in figures:
            continue  # a stream has counts but no lengths
        lengths = (
            " / ".join(f"{figures[f'{what}_{name}']:.0f}" for name in ("median", "p95", "max"))
            for what in ("source", "target")
        )
        counts = (f"{sum(figures.get(key, 0) for key in keys):,.0f}" for keys in shown.values())
        table.add_row(part, f"{figures['rows']:,.0f}", *lengths, *counts)
    return table
