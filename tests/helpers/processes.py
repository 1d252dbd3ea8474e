"""Programs and jobs of several processes, forked from the process of the test.

A new interpreter spends ten seconds on imports before it does anything; a fork has them behind it, and so has the
second process of a job if Lightning is given a `Spare` for it. Tests for which the
start itself matters begin a new interpreter instead (`composed.program`).
"""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Self

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


class Spare:
    """A child that becomes a program once it is told its command, as an interpreter would; a `Popen` used once.

    It is forked before its parent has begun anything, and ends without a word if the parent does.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self.returncode: int | None = None
        told, self._tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._tell)
            self._become(run, told)
        os.close(told)

    def __call__(self, command: list[str], env: dict[str, str], cwd: str | None = None) -> Self:
        with open(self._tell, "wb") as pipe:
            pickle.dump((command[1:], env, cwd), pipe)
        return self

    def _become(self, run: Callable[..., Any], told: int) -> None:
        status = 1
        try:
            with open(told, "rb") as pipe:
                given, environment, folder = pickle.load(pipe)
            Path("/proc/self/comm").write_text(Path(given[0]).name)  # its name in lists of processes
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder or ".")
            run(*given)
            status = 0
        except EOFError:
            pass
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


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
