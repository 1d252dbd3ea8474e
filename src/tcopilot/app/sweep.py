"""Sweeps (`-m`): every job has a folder named by its overrides, is done once, and stops no other job if it fails."""

import gc
import hashlib
import itertools
import json
import os
import random
import re
import shlex
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from tcopilot.app.checks.config import refuse_missing
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.jobs import SHOWN, JobFolder, note_failure
from tcopilot.app.trainer import process_count
from tcopilot.data.metrics import NLL
from tcopilot.evaluation.results import Results
from tcopilot.processes import is_first
from tcopilot.run_directory import RunDirectory

NOT_COMPARED = ("paths", "resume", "traceback", "logger")  # they do not change what a job finds
LONGEST = 100  # characters of a job's folder before it is cut; file systems allow 255 bytes


def job_folder(overrides: str) -> str:
    """Turn overrides into a folder name that needs no quotes; a name that had to be changed ends with a hash.

    >>> job_folder("copilot-half__seed-1")
    'copilot-half__seed-1'
    >>> job_folder("experiment-paper/base"), job_folder("")
    ('experiment-paper_base-19f0aa6b', 'job')
    """
    name = re.sub(r"[^\w.+-]+", "_", overrides, flags=re.ASCII).strip("._")[:LONGEST]
    if name == overrides:
        return name or "job"
    return f"{name}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


def new_folder(path: str) -> str:
    """Make a folder that nobody else has made, under this name or with a number appended, and return its path."""
    for name in itertools.chain([path], (f"{path}_{number}" for number in itertools.count(2))):
        try:
            Path(name).mkdir(parents=True)
            return name
        except FileExistsError:
            continue
        except OSError:
            return name  # the first write there reports the problem


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


def in_multirun() -> bool:
    """Whether this process runs a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def job(cfg: DictConfig, run: Callable[[DictConfig], float]) -> float:
    """Run a config and return its `validation_gain`; a job of a sweep is done once, and goes on where it was left."""
    if not in_multirun():
        return run(cfg)
    if problems := sweep_problems(cfg, HydraConfig.get()):
        raise ConfigError(problems)
    refuse_missing(cfg)
    notes = JobFolder(cfg.paths.run_dir, _settings(cfg))
    if notes.run.done.exists() or not cfg.get("resume"):  # resume=… may name a folder that no sweep made
        state = notes.state()
        if state == "done":
            gain = json.loads(notes.run.done.read_text())["gain"]
            print(f"done before: {notes.run} (gain on validation {gain:+.4f})", flush=True)
            return gain
        if state == "started":
            cfg.resume = str(notes.run)
    if is_first():
        RunDirectory(_output_dir()).failed.unlink(missing_ok=True)
        notes.start()
    with _isolated():
        gain = run(cfg)
    if is_first():
        notes.finish(gain=gain)
    return gain


def validation_gain(results: Results) -> float:
    """The gain in the first benchmark's metric on the rows that λ was chosen on, which sweepers maximise.

    If these rows were not answered, it is the gain in likelihood.

    With the reported gain, a sweep would select on test rows. The sign is reversed for metrics where lower is better.
    """
    if not results.gain:
        return 0.0
    of = results.gain[0]
    weights = (0.0, results.weight_of(of.benchmark))
    pilot, fused = (results.find(of.benchmark, of.metric, results.selected_on, weight) for weight in weights)
    if pilot is None or fused is None:  # λ was chosen by likelihood, without answers
        pilot, fused = (results.find("all", NLL.name, results.selected_on, weight) for weight in weights)
    if pilot is None or fused is None:  # an evaluation of test rows alone
        return 0.0
    return fused.value - pilot.value if fused.higher_is_better else pilot.value - fused.value


def report_failure(error: Exception, message: str | None) -> None:
    """Print the error that ended a job and note it in the job's folder; no traceback if a message explains it."""
    trace = "".join(traceback.format_exception(error))
    print(trace if message is None else f"error: {message}", file=sys.stderr, flush=True)
    note_failure(_output_dir(), message or f"{type(error).__name__}: {error}", trace)


def how_to_restart(sweep_dir: str) -> str:
    """Say how to go on with a sweep that did not finish."""
    start = f"Start the sweep again with the same command and hydra.sweep.dir={sweep_dir}"
    return f"{start}: finished jobs are skipped, others go on from their newest checkpoint"


def sweep_problems(cfg: DictConfig, hydra: DictConfig) -> list[str]:
    """Say what makes a sweep, or a job of it, impossible or wasteful; `hydra` is Hydra's own part of the config."""
    overrides, problems = _overrides(hydra), []
    for override in overrides:
        if override.key_or_group == "fusion.weight" and override.is_sweep_override() and "run" not in cfg:
            problems.append(
                f"{override.input_line}: every value would train the same models again; λ is swept at evaluation. "
                f"Give a list, fusion.weight=[…], which trains once and leaves every λ in results.json"
            )
    if "trainer" not in cfg or (processes := process_count(cfg)) == 1:
        return problems
    launcher, nodes = hydra.runtime.choices["hydra/launcher"], int(cfg.trainer.get("num_nodes", 1))
    tasks = f"hydra.launcher.tasks_per_node={processes // nodes}"
    tasks += f" hydra.launcher.nodes={nodes}" if nodes > 1 else ""
    devices = f"trainer.devices={cfg.trainer.devices}"
    if launcher == "submitit_slurm":
        if hydra.launcher.tasks_per_node * hydra.launcher.nodes != processes:
            problems.append(f"{devices} in a sweep with launcher={launcher}: a task for each process; give {tasks}")
        return problems
    runs = _single_runs(hydra, overrides)
    shared = shlex.join(text for text in hydra.overrides.task if not text.startswith("launcher="))
    lines = [
        f"{devices} in a sweep with launcher={launcher}: each of a job's {processes} processes would start the whole "
        f"sweep again. Start one run per command:",
        *(f"      {run}" for run in runs[:SHOWN]),
        *([f"      and {len(runs) - SHOWN} more"] if len(runs) > SHOWN else []),
        "    or let SLURM start the processes of every job:",
        f"      python {hydra.job.name}.py -m {shared} launcher=submitit_slurm {tasks}",
    ]
    return [*problems, "\n".join(lines)]


class SweepCallback(Callback):
    """Hydra's callback around a run or sweep: refuses what cannot work, names folders, and sets the exit status."""

    def __init__(self) -> None:
        self.before: dict[Path, int] = {}

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Give a run a folder of its own, also where another run was started in the same second."""
        if is_first():
            _make_own(config.hydra.run)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse what cannot work, fix the sweep's folder for all jobs, and name each job's by what is swept."""
        if problems := sweep_problems(config, config.hydra):
            print(f"error: {ConfigError(problems)}", file=sys.stderr, flush=True)
            sys.exit(1)
        overrides = _overrides(config.hydra)
        swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
        shared = {override.key_or_group for override in overrides} - swept if swept else ()
        keys = ",".join(f"'{key}'" for key in sorted(shared))
        given = config.hydra.overrides.hydra  # Hydra composes every job with these, whoever launches it
        with read_write(given):
            if not any(text.startswith("hydra.sweep.dir=") for text in given):
                _make_own(config.hydra.sweep)
                given.append(f"hydra.sweep.dir='{config.hydra.sweep.dir}'")
            given.append(f"hydra.job.config.override_dirname.exclude_keys=[{keys}]")
        self.before = _failures(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Name the jobs that failed; leave with status 1 if there are any."""
        failed = [path for path, time in _failures(config).items() if self.before.get(path) != time]
        if not failed:
            return
        print("1 job failed:" if len(failed) == 1 else f"{len(failed)} jobs failed:", file=sys.stderr)
        for path in failed:
            said = " ".join(json.loads(path.read_text())["error"].split())
            print(f"  - {path.parent}: {textwrap.shorten(said, 200)} (more in its {path.name})", file=sys.stderr)
        print(how_to_restart(config.hydra.sweep.dir), file=sys.stderr, flush=True)
        sys.exit(1)


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config without what does not change the result: some keys, and where the folder lies."""
    text = OmegaConf.to_yaml(cfg, resolve=True).replace(str(cfg.paths.run_dir), "<run_dir>")
    settings = OmegaConf.to_container(OmegaConf.create(text))
    return {key: value for key, value in settings.items() if key not in NOT_COMPARED}


@contextmanager
def _isolated() -> Iterator[None]:
    """Restore the state of the process: a job must not depend on the jobs before it, whether they failed or not."""
    gc.collect()  # here, not at the end: while a failed job is cleaned up its error still holds its models
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    environment = dict(os.environ)
    deterministic = torch.are_deterministic_algorithms_enabled()
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # each run seeds CUDA's
    with warnings.catch_warnings():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            torch.use_deterministic_algorithms(deterministic)
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)


def _make_own(node: DictConfig) -> None:
    """Make the folder of a run or sweep that is named by the time; the name changes if another one has it."""
    if "${now:" in OmegaConf.to_container(node)["dir"]:
        with read_write(node):
            node.dir = new_folder(node.dir)


def _overrides(hydra: DictConfig) -> list[Override]:
    """Overrides from the command line and from the sweeper's config."""
    params = OmegaConf.select(hydra, "sweeper.params") or {}
    given = [*(f"{key}={value}" for key, value in params.items()), *hydra.overrides.task]
    return OverridesParser.create().parse_overrides(given)


def _single_runs(hydra: DictConfig, overrides: list[Override]) -> list[str]:
    """The command that runs each job by itself; values that only a sweeper can expand stay as they are."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        if override.is_choice_sweep() or override.is_range_sweep():
            key = override.get_key_element()
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            values[override.get_key_element()] = [override.input_line]
    values = {key: texts for key, texts in values.items() if key not in ("launcher", "sweep")}
    return [f"python {hydra.job.name}.py {shlex.join(run)}" for run in itertools.product(*values.values())]


def _output_dir() -> Path:
    """The folder that Hydra gave this job; one with `resume=…` writes to the folder of the run that it resumes."""
    return Path(HydraConfig.get().runtime.output_dir)


def _failures(config: DictConfig) -> dict[Path, int]:
    """The notes of failed jobs in the sweep's folder, also from earlier starts, and when each was written."""
    found = sorted(Path(config.hydra.sweep.dir).glob(f"*/{RunDirectory.failed.name}"))
    return {path: path.stat().st_mtime_ns for path in found}
