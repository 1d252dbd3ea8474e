"""Run the short version of every script here and write the tables of docs/performance.md from what they found.

    python performance/all.py [--only memory log …] [--render]

Each script runs in a process of its own; its JSON joins docs/performance.json, from which alone the tables are made
(`--render` makes them without running anything). On a machine with a GPU the scripts take the shapes of LLaMA-3.2 and
FLAN-T5 with random weights in bfloat16.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import RECORDS, TABLES, Row, markdown

HERE = Path(__file__).parent
PAGE, FOUND = HERE.parent / "docs" / "performance.md", HERE.parent / "docs" / "performance.json"
GPU = torch.cuda.is_available()
BF16 = ["--dtype", "bfloat16"]
ALL_BATCHES = ["--cases", "gpu", "--static", "--repeats", "3"]
ON_CPU = {
    "round": ["round.py", "--rounds", "5"],
    "decode": ["decode.py", "--repeats", "7"],
    "memory": ["memory.py"],
    "scale": ["scale.py", "--repeats", "2"],
    "prefix": ["prefix.py"],
    "recording": ["recording.py"],
    "few_tokens": ["few_tokens.py"],
    "log": ["log.py", "--policies", "fifo", "reservoir", "prioritised", "--repeats", "100"],
}
ON_GPU = {
    "gpu_round_llama": ["round.py", *BF16, "--size", "llama-3.2-3b", "--copilot-size", "llama-3.2-1b",
                        "--architectures", "llama", "--source", "150", "--targets", "10"],
    "gpu_round_t5": ["round.py", *BF16, "--size", "flan-t5-base", "--architectures", "t5", "--source", "150",
                     "--targets", "10"],
    "gpu_decode_1b": ["decode.py", *BF16, *ALL_BATCHES, "--size", "llama-3.2-1b", "--architectures", "llama"],
    "gpu_decode_3b": ["decode.py", *BF16, *ALL_BATCHES, "--size", "llama-3.2-3b", "--architectures", "llama"],
    "gpu_decode_t5": ["decode.py", *BF16, *ALL_BATCHES, "--size", "flan-t5-base", "--architectures", "t5"],
    "gpu_recording": ["recording.py", *BF16, "--sizes", "llama-3.2-1b", "llama-3.2-3b", "--rows", "1024",
                      "--batch", "64"],
    "gpu_memory": ["memory.py", "--full"],
}  # fmt: skip
SCRIPTS = ON_CPU | ON_GPU


def main() -> None:
    """Run what was asked for and rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=list(ON_GPU if GPU else ON_CPU))
    parser.add_argument("--render", action="store_true", help="write the tables anew, run nothing")
    arguments = parser.parse_args()
    found = json.loads(FOUND.read_text()) if FOUND.exists() else {}
    for name in [] if arguments.render else arguments.only:
        found[name] = run(SCRIPTS[name])
        FOUND.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(render(PAGE.read_text(), found))
    print("\n".join(bars(found)))


def run(command: list[str]) -> Any:
    """Run a script and return its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        subprocess.run([sys.executable, HERE / command[0], *command[1:], "--json", file], check=True)
        return json.loads(file.read_text())


def render(page: str, found: dict[str, Any]) -> str:
    """Put tables between the page's markers; what was not measured stays as it is."""
    tables = {
        name: markdown(rows(found[name], of), columns) for name, (of, columns) in TABLES.items() if name in found
    }
    if "memory" in found:
        tables["records"] = markdown(found["memory"]["sizes"], RECORDS)
    if "gpu" in found:
        card = found["gpu"]
        tables["gpu_device"] = f"{card['device']}, torch {card['torch']}, transformers {card['transformers']}"
    if checks := bars(found):
        tables["bars"] = "\n".join(f"- {line}" for line in checks)
    for name, text in tables.items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page = between.sub(lambda marks, text=text: f"{marks[1]}{text}\n{marks[2]}", page)
    return page


def rows(result: Any, of: str | None) -> list[Row]:
    """The rows of a script's JSON."""
    return result if of is None or isinstance(result, list) else result[of]


def bars(found: dict[str, Any]) -> list[str]:
    """Every bar of what was measured, with its worst figure, and whether it is met."""
    lines = []
    for what, name, of, limit, figure in BARS:
        figures = (
            [value for row in rows(found[name], of) if (value := figure(row)) is not None] if name in found else []
        )
        if figures:
            worst = max(figures)
            lines.append(f"{what}: {worst:.2f}, at most {limit:.2f}: {'met' if worst <= limit else 'missed'}")
    return lines


def _static_over_stock(row: Row) -> float | None:
    return row.get("static") if row["batch"] == 1 and row["beams"] == 1 else None


def _last(row: Row) -> float | None:
    return row["ratio"] if row["rounds"] == 100_000 else None


def _log_estimate(row: Row) -> float | None:
    return abs(row["off"]) if row["off"] is not None else None


BARS: list[tuple[str, str, str | None, float, Callable[[Row], float | None]]] = [
    ("joint round over (Pilot-only round × FLOP floor)", "round", None, 1.25, lambda row: row["overhead"]),
    ("Pilot-only round over a step of HF's Trainer", "round", None, 1.05, lambda row: row["trainer"]),
    ("decoding at λ = 0 over HF's generate", "decode", "cases", 1.03, lambda row: row["pilot"]),
    ("fused decoding over (the Pilot's × floor)", "decode", "cases", 1.25, lambda row: row["overhead"]),
    ("drawing from 10⁵ rounds over drawing from 10²", "log", "costs", 1.5, _last),
    ("estimate of memory, off by", "memory", "peaks", 0.2, _log_estimate),
    ("GPU: joint round, 3B and 1B, over (Pilot-only × floor)", "gpu_round_llama", None, 1.1,
     lambda row: row["overhead"]),
    ("GPU: joint round, 3B and 1B, over Pilot-only", "gpu_round_llama", None, 1.05, lambda row: row["ratio"]),
    ("GPU: Pilot-only round over a step of HF's Trainer", "gpu_round_llama", None, 1.0, lambda row: row["trainer"]),
    ("GPU: decoding at λ = 0 over HF's generate", "gpu_decode_1b", "cases", 1.0, lambda row: row["pilot"]),
    ("GPU: fused decoding over (the Pilot's × floor)", "gpu_decode_1b", "cases", 1.15, lambda row: row["overhead"]),
    ("GPU: fused with static caches over HF's generate, batch 1", "gpu_decode_1b", "cases", 0.5, _static_over_stock),
    ("GPU: estimate of memory, off by", "gpu_memory", "peaks", 0.2, _log_estimate),
]  # fmt: skip


if __name__ == "__main__":
    main()
