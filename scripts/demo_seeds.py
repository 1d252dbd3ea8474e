"""Run the demo for several seeds and both architectures, and print the gains side by side.

    python scripts/demo_seeds.py [--seeds 0 1 2] [--folder runs/demo_seeds]

A run that is already there is read, not repeated.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tcopilot.evaluation.results import Results
from tcopilot.evaluation.significance import over_seeds, p_text

EXPERIMENTS = ("demo", "demo_decoder_only", "demo_multiple_choice")


def main() -> None:
    """Train what is missing and print one line per run and one per experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--experiments", nargs="+", default=EXPERIMENTS)
    arguments = parser.parse_args()
    table = Table(title="Pilot + Copilot against the same Pilot, held-out test rows")
    for column in ("experiment", "seed", "Pilot %", "Pilot + Copilot %", "gain [95 %]", "p", "λ", "train s"):
        table.add_column(column, justify="left" if column == "experiment" else "right")
    for experiment in arguments.experiments:
        gains, pilots, fused = [], [], []
        for seed in arguments.seeds:
            results = _run(experiment, seed, arguments.folder / experiment / str(seed))
            gain = results.gain[0]
            low, high = (100 * bound for bound in gain.ci95)
            gains.append(100 * gain.difference)
            pilots.append(100 * gain.pilot)
            fused.append(100 * gain.fused)
            table.add_row(
                experiment, str(seed), f"{pilots[-1]:.1f}", f"{fused[-1]:.1f}",
                f"{gains[-1]:+.1f} [{low:+.1f}, {high:+.1f}]", p_text(gain.p_value),
                f"{results.selected_weight:g}", f"{results.train_seconds:.0f}",
            )  # fmt: skip
        summary = [f"{mean:.1f} ± {sd:.1f}" for mean, sd in map(over_seeds, (pilots, fused, gains))]
        table.add_row(f"[bold]{experiment}", "mean ± sd", *summary, "", "", "", end_section=True)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _run(experiment: str, seed: int, folder: Path) -> Results:
    if not (folder / "results.json").exists():
        command = [sys.executable, "train.py", f"experiment={experiment}", f"seed={seed}", f"paths.run_dir={folder}"]
        subprocess.run(command, check=True)
    return Results.load(folder / "results.json")


if __name__ == "__main__":
    main()
