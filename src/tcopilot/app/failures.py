"""What a program says when it cannot go on: the reason, and how to continue."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError

from tcopilot.app import sweep
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.jobs import STOPPED
from tcopilot.data.benchmarks import DataError
from tcopilot.mistake_log.recording import RecordingError
from tcopilot.models.pilot import ModelSourceError
from tcopilot.processes import DisagreementError, is_lost_process, rank
from tcopilot.run_directory import RunDirectory
from tcopilot.training.checkpoints import CheckpointError, checkpoints
from tcopilot.training.module import TrainingDivergedError

EXPLAINED = (CheckpointError, ConfigError, DataError, DisagreementError, ModelSourceError)
EXPLAINED += (RecordingError, TrainingDivergedError)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def errors_for_people(cfg: DictConfig) -> Iterator[None]:
    """Print an error that the user can mend as one message and exit with status 1, unless `traceback=true`.

    In a sweep an error ends its own job only; Ctrl-C ends the sweep.
    """
    try:
        yield
    except BaseException as error:
        folder = cfg.get("resume") or OmegaConf.select(cfg, "paths.run_dir", throw_on_resolution_failure=False)
        message = what_happened(error, RunDirectory(str(folder)))
        if cfg.get("traceback", False) and isinstance(error, Exception):
            message = None
        if sweep.in_multirun() and isinstance(error, Exception):
            sweep.report_failure(error, message)
            return
        if sweep.in_multirun():
            print(sweep.how_to_restart(HydraConfig.get().sweep.dir), file=sys.stderr, flush=True)
        if message is None:
            raise
        stopped = isinstance(error, KeyboardInterrupt)
        print(message if stopped else f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(STOPPED if stopped else 1)


def what_happened(error: BaseException, run_dir: RunDirectory) -> str | None:
    """Say what went wrong and how to go on; None if only a traceback can tell."""
    said = str(error)
    go_on = f"go on with: {run_dir.go_on}"
    if not checkpoints(run_dir.checkpoints) and not run_dir.recording.exists():
        go_on = "start again with the same command"
    if isinstance(error, KeyboardInterrupt):
        return f"stopped; states and predictions written so far are in {run_dir}. To continue, {go_on}"
    if isinstance(error, RuntimeError) and is_lost_process(error):
        reason = "another process of this job is gone (its own message says why)"
        return f"{reason}, so process {rank()} stops too. To continue, {go_on}"
    if isinstance(error, Exception) and "DataLoader worker" in said:  # of whatever type it was in that process
        lines = said.strip().splitlines()
        reason = " ".join(dict.fromkeys((lines[0], lines[-1])))
        hint = "If shared memory is short, give more of it (docker: --shm-size) or set data.num_workers: 0"
        return f"a process that loads data failed: {reason}. {hint} in {run_dir.config}; then {go_on}"
    if isinstance(error, EXPLAINED):
        return said
    if isinstance(error, OSError | SafetensorError):
        name = str(getattr(error, "filename", None) or (run_dir if isinstance(error, SafetensorError) else ""))
        if name.startswith(str(run_dir)) and not run_dir.config.exists():
            return f"{run_dir} was removed while the run was writing to it ({said}); start again with the same command"
        if isinstance(error, PermissionError) or any(os.strerror(code) in said for code in NO_SPACE):
            return f"{said}. Free some space there, or make it writable; then {go_on}"
    return None
