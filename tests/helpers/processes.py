"""Programs and jobs of several processes, forked from the process of the test.

A new interpreter spends ten seconds on imports before it does anything; a fork has them behind it. Tests for which the
start itself matters begin a new interpreter instead (`composed.program`).
"""

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from torch import distributed

FORK = multiprocessing.get_context("fork")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}


class Forked:
    """A child process that calls a function; what it writes is kept."""

    def __init__(self, function: Callable[..., Any], *given: Any, **environment: Any) -> None:
        self.files = [tempfile.TemporaryFile("w+") for _ in ("stdout", "stderr")]  # noqa: SIM115 - closed in `wait`
        self.environment = ENVIRONMENT | {name: str(value) for name, value in environment.items()}
        self.process = FORK.Process(target=self._run, args=(function, *given))
        self.process.start()

    def _run(self, function: Callable[..., Any], *given: Any) -> None:
        for number, file in enumerate(self.files, start=1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        logging.getLogger().handlers.clear()  # pytest's
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(self.environment)
        try:
            function(*given)
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
        finally:
            sys.stdout.flush()

    def wait(self, timeout: float) -> CompletedProcess[str]:
        """Its exit status and what it wrote; a process that takes too long is killed."""
        self.process.join(timeout)
        if late := self.process.is_alive():
            self.process.kill()
            self.process.join()
        written = []
        for file in self.files:
            with file:
                file.seek(0)
                written.append(file.read())
        assert not late, f"not done after {timeout} s\n" + "\n".join(written)
        return CompletedProcess(self.process.name, self.process.exitcode, *written)


def run_in_processes(function: Callable[[Path], Any], folder: Path, size: int = 2, timeout: int = 120) -> None:
    """Call `function(folder)` in `size` gloo processes that form one job, as `torchrun` would; all must succeed."""
    with tempfile.TemporaryDirectory() as scratch:
        started = [Forked(_join, function, folder, f"file://{scratch}/store", rank, size) for rank in range(size)]
        try:
            done = [process.wait(timeout) for process in started]
        finally:
            for process in started:
                process.process.kill()
    failed = [process.stdout + process.stderr for process in done if process.returncode]
    assert not failed, "\n".join(failed)


def _join(function: Callable[[Path], Any], folder: Path, store: str, rank: int, size: int) -> None:
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    function(folder)
    distributed.destroy_process_group()
