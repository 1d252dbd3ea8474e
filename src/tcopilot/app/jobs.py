"""Jobs: runs that are done once, go on from where they were left, and fail without stopping the others.

The folder of a job says what it is to do, that it is done, or why it failed. `tcopilot.app.sweep` runs the jobs of a
Hydra sweep, whose launcher has started the process already; `run_jobs` runs a list of commands, in a process each.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from tcopilot.app.checks.problems import ConfigError
from tcopilot.run_directory import RunDirectory, flatten, override, write_whole
from tcopilot.training.checkpoints import checkpoints

STOPPED = 130  # exit status of a program that was told to stop and has saved its state
FOREVER = float("inf")
SECONDS_TO_STOP = 60  # for a run that is told to stop: it finishes its round and saves its state
SHOWN = 8  # keys that differ, in a message


class JobFolder:
    """The folder of a job, which is also its run directory; `settings` hold all that its results depend on."""

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.run, self.settings = RunDirectory(folder), settings

    def state(self) -> Literal["new", "started", "done"]:
        """How far the job is; a job that has started has a checkpoint to go on from.

        Raises:
            ConfigError: if the folder holds a job with other settings, which is not to be mixed with this one.
        """
        if not self.run.done.exists() and not checkpoints(self.run.checkpoints):
            return "new"
        before = OmegaConf.to_container(OmegaConf.load(self.run.job)) if self.run.job.exists() else {}
        if before != self.settings:
            raise ConfigError([self._other_job(before)])
        return "done" if self.run.done.exists() else "started"

    def start(self) -> None:
        """Note what the job is to do."""
        self.run.failed.unlink(missing_ok=True)
        write_whole(self.run.job, OmegaConf.to_yaml(OmegaConf.create(self.settings)))

    def finish(self, **found: Any) -> None:
        """Note that the job is done, and what it found."""
        self.run.failed.unlink(missing_ok=True)
        _write(self.run.done, {"config": fingerprint(self.settings), **found})

    def _other_job(self, before: dict[str, Any]) -> str:
        old, new = flatten(before), flatten(self.settings)
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        shown = "; ".join(f"{key}={old.get(key)} there, {new.get(key)} now" for key in keys[:SHOWN])
        more = f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        return (
            f"{self.run} holds a job of another config: {fingerprint(before)} there, {fingerprint(self.settings)} now "
            f"({shown}{more}). Give another folder (hydra.sweep.dir in a sweep), or remove that folder"
        )


def note_failure(folder: str | Path, error: str, trace: str = "") -> None:
    """Leave in the folder of a job what ended it; it runs again when its list of jobs is started again."""
    _write(RunDirectory(folder).failed, {"error": error, "traceback": trace})


def fingerprint(settings: dict[str, Any]) -> str:
    """Hash of what a job is to do."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program with its overrides, to be run in a process of its own; its output goes to `RunDirectory.output`."""

    folder: Path
    overrides: tuple[str, ...]
    program: str = "train.py"

    @property
    def notes(self) -> JobFolder:
        """The notes in its folder."""
        return JobFolder(self.folder, {"program": self.program, "overrides": list(self.overrides)})

    def given(self, state: Literal["new", "started"]) -> list[str]:
        """The program's arguments; those of a job that was started before resume it."""
        if state == "started":
            return [override("resume", self.folder)]
        return [*self.overrides, override("paths.run_dir", self.folder)]

    def run(self, deadline: float = FOREVER, **options: Any) -> Literal["finished", "stopped", "failed"]:
        """Run the program, from its newest checkpoint if there is one; nothing is run if it was done before.

        Args:
            deadline: a time of `time.monotonic`. A run still going then is told to stop, and none starts later.
            options: arguments of `subprocess.Popen`, such as `cwd` and `env`.
        """
        notes, state = self.notes, self.notes.state()
        if state == "done":
            return "finished"
        if time.monotonic() > deadline:
            return "stopped"
        notes.start()
        command = [sys.executable, self.program, *self.given(state)]
        with notes.run.output.open("a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, **options)
            try:
                process.wait(None if deadline == FOREVER else max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()
                try:
                    process.wait(SECONDS_TO_STOP)
                except subprocess.TimeoutExpired:
                    process.kill()
                return "stopped"
        if process.returncode == STOPPED:
            return "stopped"
        if process.returncode:
            note_failure(self.folder, f"exit status {process.returncode}, see {notes.run.output.name}")
            return "failed"
        notes.finish()
        return "finished"


def run_jobs(jobs: Sequence[Job], at_once: int, deadline: float = FOREVER, cwd: Path | None = None) -> dict[Job, str]:
    """Run the jobs that are not done yet, `at_once` of them side by side, and return how each ended.

    Args:
        jobs: in the order in which they are started.
        at_once: number of jobs that run together and share the machine's cores.
        deadline: see `Job.run`.
        cwd: the folder that holds the programs.
    """
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once)), **os.environ}
    outcomes = {}
    with ThreadPoolExecutor(at_once) as pool:
        for job, outcome in zip(jobs, pool.map(lambda job: job.run(deadline, cwd=cwd, env=env), jobs), strict=True):
            outcomes[job] = outcome
            print(f"{outcome}: {job.folder}", flush=True)
    return outcomes


def _write(path: Path, values: dict[str, Any]) -> None:
    values["time"] = datetime.now().astimezone().isoformat(timespec="seconds")
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
