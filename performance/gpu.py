"""Prove the project on a GPU in one short visit: tests, invariants on the device, then speed and memory.

    make gpu                # or: python performance/gpu.py [--minutes 8] [--out runs/gpu] [--only invariants …]
    make gpu DEVICE=cpu     # dry run: the same steps with tiny shapes, so that no visit fails for a typo

Each step is a process with a time limit of its own. What it printed and found is on disk before the next one begins,
so a visit that is cut short leaves everything up to there; started again with the same folder, it runs only the steps
that have not passed yet. On a GPU the figures join docs/performance.json, from which the tables of docs/performance.md
are made.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from all import FOUND, ON_GPU, PAGE, render
from tables import of, show

HERE = Path(__file__).parent
ROOT = HERE.parent
TAIL = 3000  # characters of a step's output that its entry keeps
SLOWER = 10  # times the limits, on the CPU
TINY_ROUND = ["--size", "tiny", "--copilot-size", "tiny", "--source", "16", "--targets", "4"]
TINY_ROUND += ["--rounds", "2", "--repeats", "1"]
TINY_DECODE = ["--size", "tiny", "--cases", "tiny", "--repeats", "1"]


@dataclass(frozen=True)
class Step:
    """One process of a visit.

    Attributes:
        name: under which its result is kept; that of a measurement is its key in docs/performance.json.
        seconds: its limit.
        on_gpu: what runs there: a script of this folder with its arguments, or arguments of pytest.
        on_cpu: the same in small, for the dry run; None where there is nothing to try without a GPU.
        measures: whether it is a script that writes figures, else arguments of pytest.
    """

    name: str
    seconds: int
    on_gpu: list[str]
    on_cpu: list[str] | None = None
    measures: bool = True


def _measurement(name: str, seconds: int, *on_cpu: str) -> Step:
    return Step(name, seconds, ON_GPU[name], list(on_cpu) or None)


STEPS = [
    Step("gpu_tests", 120, ["-m", "gpu", "tests"], ["-m", "gpu", "tests", "--collect-only"], measures=False),
    Step("invariants", 150, ["tests/test_device.py"], ["tests/test_device.py"], measures=False),
    _measurement("gpu_round_llama", 90, "round.py", *TINY_ROUND, "--architectures", "llama"),
    _measurement("gpu_round_t5", 60, "round.py", *TINY_ROUND, "--architectures", "t5"),
    _measurement("gpu_decode_1b", 150, "decode.py", *TINY_DECODE, "--architectures", "llama"),
    _measurement("gpu_decode_3b", 120),
    _measurement("gpu_decode_t5", 120, "decode.py", *TINY_DECODE, "--architectures", "t5"),
    _measurement("gpu_recording", 60, "recording.py", "--sizes", "tiny", "--rows", "32", "--repeats", "1"),
    _measurement("gpu_memory", 90),
]
"""In the order of what a visit that is cut short should have proved."""


def main() -> int:
    """Run the steps that are not done yet; returns the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, help="folder of the results; runs/gpu, or runs/gpu_dry_run on the CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all steps together; what is left is not begun")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="only these steps")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; make gpu DEVICE=cpu is the dry run")
    out = arguments.out or ROOT / "runs" / ("gpu" if arguments.device == "cuda" else "gpu_dry_run")
    out.mkdir(parents=True, exist_ok=True)
    visit = _read(out / "visit.json") or {"machine": machine(arguments.device), "steps": {}}
    end = time.monotonic() + 60 * arguments.minutes
    for step in STEPS:
        wanted = arguments.only is None or step.name in arguments.only
        if wanted and visit["steps"].get(step.name, {}).get("state") != "passed":
            visit["steps"][step.name] = run(step, arguments.device, out, end - time.monotonic())
            (out / "visit.json").write_text(json.dumps(visit, indent=1) + "\n")
    if arguments.device == "cuda":
        publish(visit, out)
    print_table(visit, out)
    return sum(found["state"] in ("failed", "out of time") for found in visit["steps"].values())


def machine(device: str) -> dict[str, str]:
    """What the figures were measured with."""
    import transformers

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU (dry run)"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def run(step: Step, device: str, out: Path, left: float) -> dict[str, Any]:
    """Run one step in a process and say how it went; `left` are the seconds that the visit still has."""
    arguments = step.on_gpu if device == "cuda" else step.on_cpu
    if arguments is None:
        return {"state": "needs a GPU"}
    if left < 10:
        return {"state": "not begun"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    if step.measures:
        command = [sys.executable, str(HERE / arguments[0]), *arguments[1:], "--json", str(out / f"{step.name}.json")]
    environment = {**os.environ, "TCOPILOT_TEST_DEVICE": device, "PYTHONPATH": _python_path()}
    print(f"{step.name}: {' '.join(command[1:])}", flush=True)
    slower = 1 if device == "cuda" else SLOWER
    began, limit = time.monotonic(), min(left, slower * step.seconds)
    with (out / f"{step.name}.log").open("w+") as log:
        try:
            options = {"cwd": ROOT, "env": environment, "stdout": log, "stderr": subprocess.STDOUT}
            code = subprocess.run(command, timeout=limit, check=False, **options).returncode
            state = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "out of time"
        log.seek(0)
        tail = log.read()[-TAIL:]
    return {"state": state, "seconds": round(time.monotonic() - began, 1), "tail": tail}


def publish(visit: dict[str, Any], out: Path) -> None:
    """Let the measured figures join those of the page, and write its tables anew; a cut measurement counts too."""
    found = _read(FOUND) or {}
    measured = {step.name: _read(out / f"{step.name}.json") for step in STEPS if step.measures}
    found |= {name: figures for name, figures in measured.items() if figures} | {"gpu": visit["machine"]}
    FOUND.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(render(PAGE.read_text(), found))


def print_table(visit: dict[str, Any], out: Path) -> None:
    """Show every step with its state, and where its output is."""
    rows = []
    for name, found in visit["steps"].items():
        lines = [line for line in found.get("tail", "").splitlines() if any(map(str.isalnum, line))]
        rows.append(found | {"step": name, "last line": lines[-1][:70] if lines else ""})
    columns = {name: of(name) for name in ("step", "state", "seconds", "last line")}
    show(", ".join(visit["machine"].values()), rows, columns)
    print(f"results: {out / 'visit.json'}")


def _python_path() -> str:
    """The package where it is not installed, before what is there already."""
    return os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))


def _read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None


if __name__ == "__main__":
    sys.exit(main())
