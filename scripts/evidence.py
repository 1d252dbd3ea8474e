"""Train arms, ablations and controls over seeds, and write what came of them to docs/evidence.md.

    python scripts/evidence.py cpu --parts builtin
    python scripts/evidence.py gpu --parts real --pilots <folder> --data <benchmarks folder> --minutes 9

`--pilots` is a folder with smollm2/, gemma3_270m/ and qwen2_5_coder_0_5b/, which `scripts/real_weights.py` makes. The
grid is scripts/evidence.yaml. Start it again to go on: finished runs are skipped, stopped ones go on from their newest
checkpoint. Each call writes the page anew, from the run directories of all parts and presets.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tcopilot.app.checks.controls import CONTROLS
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.jobs import FOREVER, Job, run_jobs
from tcopilot.reporting.evidence import DEFAULT, TaskEvidence, gather, put_between_markers
from tcopilot.reporting.finished_runs import FinishedRun, find_runs
from tcopilot.run_directory import RunDirectory, override

ROOT = Path(__file__).parents[1]
WAVES = [(other, after) for other in (False, True) for after in (False, True)]  # the default arms first
GRID = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True, kw_only=True)
class ArmJob(Job):
    """One run of the grid: an arm of a task with one seed."""

    part: str
    task: str
    arm: str
    seed: int
    after: str | None = None  # a task whose default arm must be finished

    @property
    def finished(self) -> bool:
        """Whether it ran to its end, controls included; with whatever overrides."""
        return RunDirectory(self.folder).done.exists()


def grid(
    preset: dict[str, Any], arms: dict[str, Any], parts: list[str], folder: Path, places: dict[str, str]
) -> Iterator[ArmJob]:
    """All jobs of some parts of a preset. `places` are the values of {pilots} and {data}."""
    for name in parts:
        part = preset["parts"][name]
        for task, about in part["tasks"].items():
            for seed in preset["seeds"]:
                for arm in about["arms"]:
                    extra, home = arms[arm], folder / name / task
                    if "evaluates" in extra:  # the default arm's models, fused in another way
                        program, given = "eval.py", extra["evaluates"]
                    else:
                        own = about.get("experiment", part.get("experiment"))
                        experiments = ",".join(one for one in (own, extra.get("experiment")) if one)
                        program, given = "train.py", [f"experiment=[{experiments}]"] if experiments else []
                        given += [f"seed={seed}"]
                        given += [text for level in (part, about, extra) for text in level.get("overrides", [])]
                        controls = extra.get("controls", part["controls"] if arm == DEFAULT else [])
                        given += [f"control=[{','.join(controls)}]"] if controls else []
                    known = {**places, "{default}": str(home / DEFAULT / str(seed)), "{seed}": str(seed)}
                    if after := about.get("after"):
                        known["{after}"] = str(folder / name / after / DEFAULT / str(seed))
                    yield ArmJob(
                        folder=home / arm / str(seed), overrides=tuple(_fill(text, known) for text in given),
                        program=program, part=name, task=task, arm=arm, seed=seed, after=after,
                    )  # fmt: skip


def _fill(text: str, places: dict[str, str]) -> str:
    """Put folders in the place of their marks in an override."""
    key, _, value = text.partition("=")
    for mark, place in places.items():
        value = value.replace(mark, place)
    return override(key, value) if any(mark in text for mark in places) else text


def run_all(jobs: list[ArmJob], at_once: int, minutes: float | None) -> dict[Job, str]:
    """Run what is not finished. Default arms come first, since others start from their models or recordings."""
    deadline = time.monotonic() + 60 * minutes if minutes else FOREVER
    waves = [[job for job in jobs if (job.arm != DEFAULT, job.after is not None) == wave] for wave in WAVES]
    return {job: outcome for wave in waves for job, outcome in run_jobs(wave, at_once, deadline, ROOT).items()}


def evidence(settings: dict[str, Any], preset: str, folder: Path) -> tuple[list[TaskEvidence], list[str]]:
    """Read a preset's finished runs.

    Returns:
        The tasks of which a run of the default arm is finished, and names of the runs that are not finished yet.
    """
    about = settings["presets"][preset]
    jobs = list(grid(about, settings["arms"], list(about["parts"]), folder / preset, {}))
    done = [job for job in jobs if job.finished]
    tasks = []
    for part, task in dict.fromkeys((job.part, job.task) for job in done):
        arms: dict[str, list[FinishedRun]] = {}
        for job in done:
            if (job.part, job.task) == (part, task):
                arms.setdefault(job.arm, []).extend(find_runs([job.folder]).runs)
        if DEFAULT in arms:
            hidden = {arm for arm, extra in settings["arms"].items() if "controls" in extra}
            tasks += gather(f"{preset}, {part}: {task}", arms, CONTROLS, hidden)
    return tasks, not_done(jobs, folder)


def not_done(jobs: list[ArmJob], folder: Path) -> list[str]:
    """Name the runs of a preset that are left: a part as a whole, or an arm with its seeds."""
    left = []
    for part in dict.fromkeys(job.part for job in jobs):
        of_part = [job for job in jobs if job.part == part]
        if not any(job.finished for job in of_part):
            left.append(f"{of_part[0].folder.parents[2].relative_to(folder)} (all)")
            continue
        seeds: dict[Path, list[str]] = {}
        for job in of_part:
            if not job.finished:
                seeds.setdefault(job.folder.parent, []).append(str(job.seed))
        left += [f"{arm.relative_to(folder)} (seed {', '.join(those)})" for arm, those in seeds.items()]
    return left


def write_page(settings: dict[str, Any], asked: str, folder: Path, page: Path) -> None:
    """Put all that is finished into the page; a smoke test stands by itself."""
    presets = [name for name in settings["presets"] if (name == "smoke") == (asked == "smoke")]
    found = [evidence(settings, preset, folder) for preset in presets]
    tasks, missing = ([one for part in column for one in part] for column in zip(*found, strict=True))
    page.write_text(put_between_markers(page.read_text(encoding="utf-8"), tasks, missing), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run a preset and write the page; returns 1 if a run failed."""
    settings = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=settings["presets"])
    parser.add_argument("--parts", nargs="+", help="builtin, frozen, real, recommendation; default: all of the preset")
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="of all runs, by preset")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "evidence.md", help="where the tables go")
    parser.add_argument("--pilots", type=Path, help="folder with smollm2/ and others, for real weights")
    parser.add_argument("--data", type=Path, help="folder of local copies of the benchmarks, for real, recommendation")
    parser.add_argument("--minutes", type=float, help="stop cleanly after so long; the next call goes on")
    parser.add_argument("--jobs", type=int, help="runs at once; default: the preset's")
    parser.add_argument("--list", action="store_true", help="only say which runs are done, started or new")
    asked = parser.parse_args(arguments)
    preset, folder = settings["presets"][asked.preset], asked.folder.resolve()
    parts = asked.parts or list(preset["parts"])
    if wrong := [part for part in parts if part not in preset["parts"]]:
        parser.error(f"--parts {' '.join(wrong)}: preset {asked.preset} has {', '.join(preset['parts'])}")
    places = {f"{{{name}}}": getattr(asked, name) for name in ("pilots", "data")}
    needed = yaml.safe_dump([preset["parts"][part] for part in parts])
    if missing := [mark for mark, value in places.items() if value is None and mark in needed]:
        parser.error(f"give {', '.join(f'--{mark[1:-1]}' for mark in missing)}: {', '.join(parts)} cannot run without")
    places = {mark: str(value.resolve()) for mark, value in places.items() if value}
    jobs = list(grid(preset, settings["arms"], parts, folder / asked.preset, places))
    try:
        states = {job: job.notes.state() for job in jobs}
    except ConfigError as error:
        sys.exit(f"error: {error}")
    if asked.list:
        for job, state in states.items():
            print(f"{state:7} {job.folder}")
        return 0
    outcomes = run_all(jobs, asked.jobs or preset["jobs"], asked.minutes)
    write_page(settings, asked.preset, folder, asked.page)
    counts = [f"{list(outcomes.values()).count(kind)} {kind}" for kind in ("finished", "stopped", "failed")]
    print(", ".join(counts), f"of {len(jobs)}: {asked.page}")
    failed = [job for job, outcome in outcomes.items() if outcome == "failed"]
    for job in failed:
        print(f"  - {job.folder}: see its {job.notes.run.output.name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
