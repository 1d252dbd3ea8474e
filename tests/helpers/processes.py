"""Run a function of a test module in several processes that form one job, as `torchrun` would."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HELPERS = Path(__file__).parent
START = """
import importlib.util, pathlib, sys
from torch import distributed
module, function, rank, size, store, folder = sys.argv[1:]
sys.path[:0] = [{helpers!r}, {tests!r}]
distributed.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=int(size))
spec = importlib.util.spec_from_file_location("job", module)
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)
getattr(job, function)(pathlib.Path(folder))
distributed.destroy_process_group()
"""


def run_in_processes(function, folder: Path, size: int = 2, timeout: int = 120) -> None:
    """Call `function(folder)`, a top-level function of a test module, in `size` gloo processes; all must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        started = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", START.format(helpers=str(HELPERS), tests=str(HELPERS.parent))),
                    *(function.__code__.co_filename, function.__name__, str(rank), str(size)),
                    *(f"{scratch}/store", str(folder)),
                ],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=timeout)[0] for process in started]
        finally:
            for process in started:
                process.kill()
    failed = [text for process, text in zip(started, said, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
