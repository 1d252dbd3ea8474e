"""Train arms, ablations and controls over seeds, and write what came of them to docs/evidence.md.

    python scripts/evidence.py cpu --parts builtin
    python scripts/evidence.py gpu --parts real --pilot <SmolLM2 folder> --data <benchmarks folder> --minutes 9

The grid is scripts/evidence.yaml. Start it again to go on: finished runs are read, stopped ones go on from their
newest checkpoint. The page is written anew after each call, from the run directories of all parts and presets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tcopilot.app.controls import CONTROLS
from tcopilot.app.run import STOPPED
from tcopilot.reporting.evidence import DEFAULT, TaskEvidence, as_markdown, gather, put_between_markers
from tcopilot.reporting.finished_runs import FinishedRun, find_runs
from tcopilot.training.checkpoints import checkpoints

ROOT = Path(__file__).parents[1]
GRID = Path(__file__).with_suffix(".yaml")
STARTED, FINISHED = "overrides.json", "finished.json"  # in a run's folder: its overrides, its end
FOREVER = float("inf")
SECONDS_TO_STOP = 60  # for a run that is told to stop: it ends its round and saves its state


@dataclass(frozen=True)
class Job:
    """One run of the grid: an arm of a task with one seed."""

    part: str
    task: str
    arm: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    program: str = "train.py"

    @property
    def finished(self) -> bool:
        """Whether it ran to its end, controls included.

        Raises:
            SystemExit: if the folder holds a run with other overrides.
        """
        note = self.folder / STARTED
        if note.exists() and json.loads(note.read_text()) != list(self.overrides):
            sys.exit(f"error: {self.folder} holds a run with other overrides; give another --folder, or remove it")
        return (self.folder / FINISHED).exists()

    def run(self, deadline: float, environment: dict[str, str]) -> str:
        """Train and evaluate, or go on with it; returns `finished`, `stopped` or `failed`."""
        if self.finished:
            return "finished"
        if time.monotonic() > deadline:
            return "stopped"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / STARTED).write_text(json.dumps(list(self.overrides), indent=1) + "\n")
        resumed = bool(checkpoints(self.folder / "checkpoints"))
        given = [f"resume={self.folder}"] if resumed else [*self.overrides, f"paths.run_dir={self.folder}"]
        with (self.folder / "output.txt").open("a") as output:
            process = subprocess.Popen(
                [sys.executable, self.program, *given], cwd=ROOT, stdout=output, stderr=output, env=environment
            )
            try:
                process.wait(None if deadline == FOREVER else max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return self._stopped(process)
        if process.returncode == STOPPED:
            return "stopped"
        if process.returncode:
            return "failed"
        (self.folder / FINISHED).write_text("{}\n")
        return "finished"

    @staticmethod
    def _stopped(process: subprocess.Popen) -> str:
        process.terminate()
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
        return "stopped"


def grid(
    preset: dict[str, Any], arms: dict[str, Any], parts: list[str], folder: Path, places: dict[str, str]
) -> Iterator[Job]:
    """All jobs of some parts of a preset; the default arm of a task comes before those that build on it."""
    for name in parts:
        part = preset["parts"][name]
        for task, about in part["tasks"].items():
            for seed in preset["seeds"]:
                home = folder / name / task
                for arm in about["arms"]:
                    extra, own = arms[arm], about.get("experiment", part.get("experiment"))
                    here = {**places, "{default}": str(home / DEFAULT / str(seed))}
                    if "evaluates" in extra:  # the default arm's models, fused in another way
                        given = [text.replace("{default}", here["{default}"]) for text in extra["evaluates"]]
                        yield Job(name, task, arm, seed, home / arm / str(seed), tuple(given), "eval.py")
                        continue
                    experiments = [one for one in (own, extra.get("experiment")) if one]
                    given = [*([f"experiment=[{','.join(experiments)}]"] if experiments else []), f"seed={seed}"]
                    given += [*part.get("overrides", []), *about.get("overrides", []), *extra.get("overrides", [])]
                    if arm == DEFAULT:
                        given.append(f"control=[{','.join(part['controls'])}]")
                    for mark, value in here.items():
                        given = [text.replace(mark, value) for text in given]
                    yield Job(name, task, arm, seed, home / arm / str(seed), tuple(given))


def run_all(jobs: list[Job], at_once: int, minutes: float | None) -> dict[str, list[Job]]:
    """Run what is not finished, some at a time; jobs that build on a default arm wait for it."""
    deadline = time.monotonic() + 60 * minutes if minutes else FOREVER
    threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    outcomes: dict[str, list[Job]] = {"finished": [], "stopped": [], "failed": []}
    for wave in (True, False):
        with ThreadPoolExecutor(at_once) as pool:
            chosen = [job for job in jobs if (job.arm == DEFAULT) == wave]
            for job, outcome in zip(chosen, pool.map(lambda job: job.run(deadline, environment), chosen), strict=True):
                outcomes[outcome].append(job)
                print(f"{outcome}: {job.folder}", flush=True)
    return outcomes


def evidence(settings: dict[str, Any], preset: str, folder: Path) -> tuple[list[TaskEvidence], list[str]]:
    """Read a preset's finished runs.

    Returns:
        The tasks of which a run of the default arm is finished, and names of the runs that are not finished yet.
    """
    about = settings["presets"][preset]
    jobs = list(grid(about, settings["arms"], list(about["parts"]), folder / preset, {}))
    done = [job for job in jobs if (job.folder / FINISHED).exists()]
    tasks = []
    for part, task in dict.fromkeys((job.part, job.task) for job in done):
        arms: dict[str, list[FinishedRun]] = {}
        for job in done:
            if (job.part, job.task) == (part, task):
                arms.setdefault(job.arm, []).extend(find_runs([job.folder]).runs)
        if DEFAULT in arms:
            titles = {name: title for name, (title, _) in CONTROLS.items()}
            tasks += gather(f"{preset}, {part}: {task}", arms, titles)
    return tasks, not_done(jobs, done, folder)


def not_done(jobs: list[Job], done: list[Job], folder: Path) -> list[str]:
    """Name the runs of a preset that are left: a part as a whole, or an arm with its seeds."""
    left = []
    for part in dict.fromkeys(job.part for job in jobs):
        of_part = [job for job in jobs if job.part == part]
        if not any(job in done for job in of_part):
            left.append(f"{of_part[0].folder.parents[2].relative_to(folder)} (all)")
            continue
        for arm in dict.fromkeys(job.folder.parent for job in of_part):
            seeds = [str(job.seed) for job in of_part if job.folder.parent == arm and job not in done]
            left += [f"{arm.relative_to(folder)} (seed {', '.join(seeds)})"] if seeds else []
    return left


def write_page(settings: dict[str, Any], asked: str, folder: Path, page: Path) -> None:
    """Put all that is finished into the page; a smoke test stands by itself."""
    presets = [name for name in settings["presets"] if (name == "smoke") == (asked == "smoke")]
    found = [evidence(settings, preset, folder) for preset in presets]
    text = as_markdown([task for tasks, _ in found for task in tasks], [run for _, runs in found for run in runs])
    page.write_text(put_between_markers(page.read_text(encoding="utf-8"), text), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run a preset and write the page; returns 1 if a run failed."""
    settings = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=settings["presets"])
    parser.add_argument("--parts", nargs="+", help="builtin, real, recommendation; default: all of the preset")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="of all runs, by preset")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "evidence.md", help="where the tables go")
    parser.add_argument("--pilot", type=Path, help="folder of SmolLM2-135M-Instruct, for the part real")
    parser.add_argument("--data", type=Path, help="folder of local copies of the benchmarks, for real, recommendation")
    parser.add_argument("--minutes", type=float, help="stop cleanly after so long; the next call goes on")
    parser.add_argument("--jobs", type=int, help="runs at once; default: the preset's")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    asked = parser.parse_args(arguments)
    preset, folder = settings["presets"][asked.preset], asked.folder.resolve()
    parts = asked.parts or list(preset["parts"])
    if wrong := [part for part in parts if part not in preset["parts"]]:
        parser.error(f"--parts {' '.join(wrong)}: preset {asked.preset} has {', '.join(preset['parts'])}")
    places = {f"{{{name}}}": getattr(asked, name) for name in ("pilot", "data")}
    needed = yaml.safe_dump([preset["parts"][part] for part in parts])
    if missing := [mark for mark, value in places.items() if value is None and mark in needed]:
        parser.error(f"give {', '.join(f'--{mark[1:-1]}' for mark in missing)}: {', '.join(parts)} cannot run without")
    places = {mark: str(value.resolve()) for mark, value in places.items() if value}
    jobs = list(grid(preset, settings["arms"], parts, folder / asked.preset, places))
    if asked.list:
        for job in jobs:
            print("finished" if job.finished else "to do   ", job.folder)
        return 0
    outcomes = run_all(jobs, asked.jobs or preset["jobs"], asked.minutes)
    write_page(settings, asked.preset, folder, asked.page)
    print(", ".join(f"{len(some)} {outcome}" for outcome, some in outcomes.items()), f"of {len(jobs)}: {asked.page}")
    for job in outcomes["failed"]:
        print(f"  - {job.folder}: see its output.txt", file=sys.stderr)
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
