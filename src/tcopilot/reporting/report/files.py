"""What a run has left on disk, read for the report: figures, curves of training, answers and traces."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tcopilot.evaluation import trace as traces
from tcopilot.evaluation.results import Results
from tcopilot.version import version_problem

Row = dict[str, Any]


class ReportError(ValueError):
    """A run directory cannot be reported on; the message says what is missing and how to get it."""


@dataclass
class Trace:
    """What `eval.py trace=true` has written: settings, and by benchmark one entry for each traced row."""

    meta: dict[str, Any]
    rows: dict[str, list[Row]]

    def gold(self, benchmark: str) -> Iterator[Row]:
        """The target positions along the right answers of a benchmark, one after another."""
        return (position for row in self.rows[benchmark] for position in row["gold"])


@dataclass
class RunFiles:
    """A run directory, read.

    Attributes:
        folder: the run directory.
        results: its `results.json`.
        config: its resolved config.
        metrics: lines of `metrics.csv`, empty cells left out; of the training run where this is an evaluation.
        trace: None if the run has none.
    """

    folder: Path
    results: Results
    config: dict[str, Any]
    metrics: list[dict[str, float]]
    trace: Trace | None

    @property
    def folders(self) -> list[Path]:
        """The run directory, and that of the training run where the trace names one."""
        return [self.folder] if self.trace is None else [self.folder, Path(self.trace.meta["trained"])]

    @property
    def benchmarks(self) -> list[str]:
        """Benchmarks that the gain was computed for."""
        return list(dict.fromkeys(gain.benchmark for gain in self.results.gain))

    def find(self, name: str) -> Path | None:
        """A file of the run or of its training run; None if neither has it."""
        return next((folder / name for folder in self.folders if (folder / name).exists()), None)


def read_run(folder: str | Path) -> RunFiles:
    """Read a run directory.

    Raises:
        ReportError: if there is no finished evaluation, or a file cannot be read.
    """
    folder = Path(folder)
    for name in ("results.json", "config.yaml"):
        if not (folder / name).is_file():
            raise ReportError(f"{folder}: no {name} there; give the directory of a finished train.py or eval.py run")
    try:
        results = Results.load(folder / "results.json")
        trace = _read_trace(folder / "trace")
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise ReportError(f"{folder}: {error}; write it anew with eval.py trace=true") from error
    if not results.gain:
        raise ReportError(f"{folder}: results.json holds no gain; evaluate the run again with eval.py")
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    if problem := version_problem(config):
        raise ReportError(f"{folder}: {problem}")
    run = RunFiles(folder, results, config, [], trace)
    if (path := run.find("metrics.csv")) is not None:
        run.metrics = _read_metrics(path)
    return run


def _read_metrics(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in line.items() if value} for line in csv.DictReader(file)]


def _read_trace(folder: Path) -> Trace | None:
    if not (folder / "meta.json").exists():
        return None
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if meta["version"] != traces.VERSION:
        raise ValueError(f"trace/meta.json: 'version' is {meta['version']!r}, this code reads {traces.VERSION}")
    rows = {}
    for name in meta["benchmarks"]:
        with gzip.open(folder / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows[name] = [json.loads(line) for line in file]
    return Trace(meta, rows)
