"""Small runs with a report: trained, evaluated with a trace, and with outcomes that a test knows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import composed

from tcopilot.data.metrics import Metric
from tcopilot.evaluation.results import Gain, Results
from tcopilot.evaluation.significance import compare

BOTH = ["data=[word_problems,multiple_choice]"]
SMALL = [
    "debug=limit",
    *(
        f"data.benchmarks.{name}.{split}={rows}"
        for name in ("word_problems", "multiple_choice")
        for split, rows in (("train", 200), ("validation", 20), ("test", 30))
    ),
]
TRACED = 12  # of 30 rows
FIXED, BROKEN = (0, 1, 2, 3, 4), (5, 6)  # places in the predictions file


def traced_run(folder: Path) -> Path:
    """Train four rounds on two benchmarks and evaluate with a trace; returns the evaluation's run directory."""
    given = [*SMALL, "data.max_eval_rows=null", "mistake_log.every_n_rounds=1", "fusion.weight=[0,0.5,1]"]
    trained = composed.train(folder / "train", *BOTH, *given)
    return composed.evaluate(trained, folder / "eval", "trace=true", f"trace_rows={TRACED}")


def with_outcomes(run: Path, folder: Path, benchmark: str = "word_problems") -> Path:
    """Copy a run and let the Copilot have fixed and broken known rows of a benchmark, in all of its files."""
    shutil.copytree(run, folder)
    results, scores = Results.load(folder / "results.json"), {}
    for weight in (0.0, results.weight_of(benchmark)):
        file = folder / "predictions" / f"test-{benchmark}-weight={weight:g}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        right = BROKEN if weight == 0 else FIXED
        for place, row in enumerate(rows):
            row["scores"]["accuracy"] = float(place in right)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        scores[weight] = [row["scores"]["accuracy"] for row in rows]
    gain = Gain.of(benchmark, Metric("accuracy"), compare(*scores.values()))
    results.gain = [gain if one.benchmark == benchmark and one.metric == "accuracy" else one for one in results.gain]
    values = {weight: sum(some) / len(some) for weight, some in scores.items()}
    results.rows = [
        replace(row, value=values[row.weight])
        if (row.benchmark, row.split, row.metric) == (benchmark, "test", "accuracy") and row.weight in values
        else row
        for row in results.rows
    ]
    results.save(folder / "results.json")
    return folder
