"""A run directory: the name of every file in it, the one way to write a file whole, and a config by dotted keys.

It stands at the root of the package because every layer below the programs writes to a run directory: training its
checkpoints, evaluation its predictions, reporting its tables. `tcopilot.reporting.finished_runs` reads one back.
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

SECONDS_TO_END = 10  # for the loader processes of a run that was killed, which hold its lock


class _Entry:
    """Descriptor of a file or folder: its path in a run directory, and its bare `name` on the class."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: "RunDirectory | None", owner: type) -> Any:
        return self if run is None else run.folder / self.name


class RunDirectory:
    """Names everything that programs leave in a run directory.

    `RunDirectory(folder).results` is a path, `RunDirectory.results.name` the name alone.
    """

    config = _Entry("config.yaml")  # resolved, as the run used it
    shots = _Entry("shots.json")  # the solved rows before each prompt, where data.shots asks for some
    results = _Entry("results.json")  # see `tcopilot.evaluation.results`
    metrics = _Entry("metrics.csv")  # the name that Lightning's CSVLogger gives it
    weights = _Entry("weights.csv")  # every metric over λ
    generations = _Entry("generations.csv")  # answers of Pilot and fused model side by side
    predictions = _Entry("predictions")  # every answer, see `tcopilot.evaluation.predictions`
    answers = _Entry("predictions/answers.csv")  # answers of both models to all reported rows, with their scores
    answers_exact = _Entry("predictions/answers.parquet")  # the same, without a spreadsheet's apostrophes
    checkpoints = _Entry("checkpoints")
    recording = _Entry("recording")  # of a frozen Pilot, see `tcopilot.mistake_log.recording`
    export = _Entry("export")  # the fused model as transformers saves it
    copilot_alone = _Entry("export/copilot.safetensors")  # of a run that never had its Pilot's layers in memory
    model_card = _Entry("export/README.md")  # what a reader of the export needs to know of it
    controls = _Entry("control")  # a run directory for each control, with predictions only
    trace = _Entry("trace")  # target positions of both models, see `tcopilot.evaluation.trace`
    trace_meta = _Entry("trace/meta.json")
    theorem = _Entry("theorem.json")  # what tcopilot-theorem has measured
    report = _Entry("report")  # the page of tcopilot-report
    wandb = _Entry("wandb.json")  # id and group of wandb's run, which a resumed run goes on with
    job = _Entry("job.yaml")  # what a job of a sweep was asked to do
    done = _Entry("done.json")  # written when the job is done
    failed = _Entry("failed.json")  # why the job failed
    lock = _Entry(".lock")  # held by the program that writes here
    output = _Entry("output.txt")  # what the job printed, where it ran in a process of its own

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def go_on(self) -> str:
        """The command that goes on with this run, as one types it in a shell."""
        return f"python train.py {shlex.quote(override('resume', self))}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other programs out of this folder, which is made if need be; a process that dies lets go of it.

        Raises:
            Timeout: if another program holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.lock, SECONDS_TO_END):
            yield

    def control(self, name: str) -> "RunDirectory":
        """The directory of a control, such as `equal_time`."""
        return RunDirectory(self.controls / name)

    def trace_rows(self, benchmark: str) -> Path:
        """The traced rows of a benchmark."""
        return self.trace / f"{benchmark}.jsonl.gz"


RUNLESS = {entry.name for entry in (RunDirectory.checkpoints, RunDirectory.controls, RunDirectory.export)}
RUNLESS |= {entry.name for entry in (RunDirectory.predictions, RunDirectory.trace, RunDirectory.report)}
RUNLESS |= {RunDirectory.recording.name}
"""Folders of a run directory that are not searched for further runs."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, and its folder, so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # same folder: a rename is atomic on one disk only
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def share(file: Path) -> None:
    """Let those read a file who may read its folder, if the disk knows permissions: safetensors lets its owner."""
    with suppress(OSError):
        file.chmod(file.parent.stat().st_mode & 0o666)


def override(key: str, value: object) -> str:
    r"""Return a Hydra override by a text, quoted where Hydra would interpret its brackets, commas or spaces.

    >>> override("run", "runs/1"), override("run", "runs/[a] it's")
    ('run=runs/1', "run='runs/[a] it\\'s'")
    """
    text = str(value)
    if re.fullmatch(r"[\w/.:%@+-]+", text, re.ASCII):
        return f"{key}={text}"
    quoted = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (found[2] and "\\'"), text)
    return f"{key}='{quoted}'"


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config, as plain values, by dotted keys.

    The class of a node stands under the node's own key, where other configs have `null` or a plain value.

    >>> flatten({"seed": 0, "log": {"policy": {"_target_": "tcopilot.mistake_log.policies.Fifo", "power": 2}}})
    {'seed': 0, 'log.policy': 'tcopilot.mistake_log.policies.Fifo', 'log.policy.power': 2}
    """
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= {f"{key}.{name}" if name else key: leaf for name, leaf in flatten(value).items()}
        else:
            flat["" if key == "_target_" else key] = value
    return flat
