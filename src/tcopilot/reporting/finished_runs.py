"""Finished runs: reading a run directory, and finding all run directories below a folder."""

import gzip
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from tcopilot.evaluation import trace as traces
from tcopilot.evaluation.results import Results
from tcopilot.run_directory import RUNLESS, RunDirectory, flatten
from tcopilot.version import version_problem


class RunError(ValueError):
    """Raised if a run directory cannot be used; the message says what is missing and how to get it."""


@dataclass
class Trace:
    """The output of `eval.py trace=true`: its settings, and by benchmark one entry for each traced row."""

    meta: dict[str, Any]
    rows: dict[str, list[dict[str, Any]]]


@dataclass
class FinishedRun:
    """A finished run: its directory, its results, and its resolved config with dotted keys."""

    directory: RunDirectory
    results: Results
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> "FinishedRun":
        """Read a run directory.

        Raises:
            RunError: if the run is not finished, was made by another version, or a file cannot be read.
        """
        run = RunDirectory(folder)
        if not run.results.is_file():
            raise RunError(f"no {run.results.name} there; give the directory of a finished train.py or eval.py run")
        if not run.config.is_file():
            raise RunError(f"no {run.config.name} beside {run.results.name}; copy the run directory as a whole")
        try:
            config = OmegaConf.to_container(OmegaConf.load(run.config))
            if not config or not isinstance(config, dict):
                raise ValueError(f"{run.config.name}: holds no keys; copy it again from where the run was made")
            if problem := version_problem(config):
                raise ValueError(problem)
            results = Results.load(run.results)
            if not results.rows:
                raise ValueError(f"{run.results.name}: 'rows' is empty; evaluate the run again with eval.py")
        except Exception as error:  # many types; one bad run must not hide the others
            raise RunError(" ".join(str(error).replace(f"{folder}/", "").split())) from error
        return cls(run, results, flatten(config))

    @property
    def folder(self) -> Path:
        """The run directory's path."""
        return self.directory.folder

    @cached_property
    def trace(self) -> Trace | None:
        """The trace of the run, or None if there is none; raises a RunError if it cannot be read."""
        if not self.directory.trace_meta.exists():
            return None
        try:
            meta = json.loads(self.directory.trace_meta.read_text(encoding="utf-8"))
            if meta["version"] != traces.VERSION:
                raise ValueError(f"'version' is {meta['version']!r}, this code reads {traces.VERSION}")
            rows = {}
            for name in meta["benchmarks"]:
                with gzip.open(self.directory.trace_rows(name), "rt", encoding="utf-8") as file:
                    rows[name] = [json.loads(line) for line in file]
        except (ValueError, OSError, EOFError, KeyError) as error:
            raise RunError(f"{self.directory.trace.name}: {error}; write it again with eval.py trace=true") from error
        return Trace(meta, rows)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The table of `metrics.csv`, which an evaluation takes from its training run; empty if there is no file."""
        path = self.here_or_in_training("metrics")
        return pd.read_csv(path, float_precision="round_trip") if path else pd.DataFrame()

    def here_or_in_training(self, entry: str) -> Path | None:
        """Return the path of a file in this run, else in the training run named by the trace; None if in neither."""
        folders = [self.folder, *([self.trace.meta["trained"]] if self.trace else [])]
        return next((path for folder in folders if (path := getattr(RunDirectory(folder), entry)).exists()), None)


@dataclass
class Found:
    """The runs found below some folders: finished ones, unfinished ones, and unreadable ones with the reason."""

    runs: list[FinishedRun] = field(default_factory=list)
    unfinished: list[Path] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)

    def problems(self) -> list[str]:
        """List the runs that are missing from the tables, one per line."""
        lines = [f"unfinished: {folder}" for folder in self.unfinished]
        return lines + [f"unreadable: {folder}: {reason}" for folder, reason in self.unreadable]


def find_runs(folders: Iterable[str | Path]) -> Found:
    """Read every run directory at or below the folders once; a missing folder raises a FileNotFoundError."""
    found, seen = Found(), set()
    for top in map(Path, folders):
        if not top.is_dir():
            raise FileNotFoundError(f"{top}: no such folder; give run directories, or a folder that holds some")
        for name, below, files in os.walk(top):
            folder, finished = Path(name), RunDirectory.results.name in files
            is_run = finished or RunDirectory.config.name in files
            below[:] = sorted(b for b in below if b[0] != "." and not (is_run and b in RUNLESS))
            if not is_run or folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            try:
                found.runs.append(FinishedRun.read(folder)) if finished else found.unfinished.append(folder)
            except RunError as error:
                found.unreadable.append((folder, str(error)))
    return found
