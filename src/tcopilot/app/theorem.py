"""`tcopilot-theorem`: Theorem 4.1 on held-out data of finished runs, for every vocabulary entry and over all.

The theorem: if the Copilot's error ε_C is below S = sqrt(ε_P² + σ_P²), every λ in (0, λ0) lowers the expected squared
distance to p. It is estimated on teacher-forced target tokens, with p the one-hot target. docs/theorem.md says what
that changes, and lists what `<run dir>/theorem.json` holds.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tcopilot.app import build
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.console import quiet_libraries
from tcopilot.data.benchmarks import DataError
from tcopilot.data.shots import read_shots
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.modes import parts_to_score
from tcopilot.models.fusion import ProbabilityFusion
from tcopilot.models.pilot import ModelSourceError
from tcopilot.reporting.tables import accept_any_sign
from tcopilot.reporting.theorem.distances import DistanceSums
from tcopilot.reporting.theorem.pilot_variance import PilotSpread, dropout_draws
from tcopilot.reporting.theorem.verdict import show, verdict
from tcopilot.run_directory import RunDirectory
from tcopilot.training.error_statistics import correct_targets


class TrainedRun(NamedTuple):
    """A finished run: its folder, and its fused model ready to score its data."""

    folder: Path
    scorer: Evaluator

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, trusted: Sequence[str] = ()) -> "TrainedRun":
        """Read a run, ready to score its data; `trusted` are modules whose classes its config may name.

        Raises:
            ConfigError: if it is no finished run or has no Copilot, or with what is wrong with its data.
        """
        run = RunDirectory(folder)
        for needed in (run.config, run.export / "config.json"):
            if not needed.exists():
                missing = needed.relative_to(folder)
                raise ConfigError([f"{folder}: no {missing} there; give the directory of a finished training run"])
        config = build.read_config(run.config, str(folder), trusted)
        export, tokenizer = build.read_export(run)
        if export.copilot is None:
            raise ConfigError([f"{folder}: this run has no Copilot (copilot=none); give a run with one"])
        data = build.prepare_data(config, tokenizer, export.pilot, shots=read_shots(run.shots))
        model = build.load_export(run, export).to(device)
        return cls(folder, Evaluator(model, tokenizer, data, run.predictions, build.decoding(config.evaluation)))

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Rows of all benchmarks, in batches of similar length when cut in order."""
        data = self.scorer.data
        by_name = (data.evaluation_rows(split, name) for name in data.benchmark_names)
        return [row for rows in by_name for row in sorted(rows, key=lambda row: len(row["source_ids"]))]


def refuse_other_kinds(runs: Sequence[TrainedRun], split: str) -> None:
    """Refuse, by a ConfigError that names them all, runs that cannot be compared with the first token by token."""

    def asked(run: TrainedRun) -> list[tuple[Any, ...]]:
        return [(row["benchmark"], row["id"], row["source_ids"], row["target_ids"]) for row in run.rows(split)]

    first, *others = runs
    family, problems = first.scorer.model.config.pilot.model_type, []
    for run in others:
        if run.folder.resolve() == first.folder.resolve():
            problems.append(f"{run.folder}: given twice; give runs of other seeds")
        elif (other := run.scorer.model.config.pilot.model_type) != family:
            kinds = f"{other} Pilot, {first.folder} a {family} one"
            problems.append(f"{run.folder}: has a {kinds}; give runs that differ in their seed only")
        elif run.scorer.tokenizer.get_vocab() != first.scorer.tokenizer.get_vocab():
            problems.append(f"{run.folder}: another vocabulary than {first.folder} has; give runs of one tokenizer")
        elif asked(run) != asked(first):
            mend = "train all seeds with the same data.split_seed"
            problems.append(f"{run.folder}: its {split} rows are not those of {first.folder}; {mend}")
    if problems:
        raise ConfigError(problems)


def estimate(runs: Sequence[TrainedRun], split: str, passes: int = 0) -> dict[str, Any]:
    """Score the rows of a split, teacher-forced, with the feedback that decoding uses; returns `theorem.json`.

    Args:
        runs: the run to estimate, then runs of other seeds, for ε_P² and σ_P² only.
        split: `validation` or `test`.
        passes: number of passes with dropout, instead of other seeds; a Pilot without dropout is a ConfigError.
    """
    (first, scorer), model = runs[0], runs[0].scorer.model
    torch.manual_seed(0)  # seeds dropout
    distances, spread = DistanceSums(model.pilot.get_input_embeddings().num_embeddings), None
    if passes or len(runs) > 1:
        kind, names = ("dropout", range(passes)) if passes else ("seeds", [run.folder for run in runs])
        spread = PilotSpread(kind, [str(name) for name in names])
    for part in parts_to_score(model, runs[0].rows(split), scorer.decoding.batch_size):
        batch, *scored = scorer.scored(part)
        distances.update(batch, *scored)
        if passes:
            spread.update(batch, dropout_draws(model, batch, passes))
            if spread.sigma_sq == 0:
                settings = model.config.pilot.to_dict().items()
                rates = ", ".join(f"{key}={value}" for key, value in settings if "drop" in key and value is not None)
                lack = f"--dropout-passes: the Pilot of {first} has no dropout ({rates or 'no key'})"
                mend = "give runs of other seeds, or train with dropout (T5: pilot.config.dropout_rate=0.1)"
                raise ConfigError([f"{lack}; {mend}"])
        elif spread:
            spread.update(batch, chain([scored], (correct_targets(run.scorer.model, batch) for run in runs[1:])))
    pilots = spread.summary() if spread else None
    found = {
        "version": 1, "run": str(first), "split": split, "fusion": model.config.fusion["_target_"],
        "is_eq_8": isinstance(model.fusion, ProbabilityFusion),
        **distances.estimates(scorer.data.benchmark_names),
        "epsilon_pilot_sq": pilots and pilots["epsilon_sq"], "sigma_pilot_sq": pilots and pilots["sigma_sq"],
        "pilots": pilots,
    }  # fmt: skip
    found["entries"]["worst"] = [
        {"id": entry, "token": str(scorer.tokenizer.convert_ids_to_tokens(entry)), "increase": increase}
        for entry, increase in distances.worst_entries(found["lambda_star"])
    ]
    return found | {"verdict": verdict(found)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tcopilot-theorem`; 1 with a message on stderr if runs cannot be used or a file cannot be written."""
    parser = argparse.ArgumentParser("tcopilot-theorem", description="Theorem 4.1 on the held-out rows of a run.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, then those of other seeds")
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="rows to measure on")
    parser.add_argument("--dropout-passes", type=int, default=0, metavar="K", help="variance of one Pilot by dropout")
    parser.add_argument("--trust", nargs="+", default=[], metavar="MODULE", help="your own modules that configs name")
    parser.add_argument("--json", metavar="FILE", help="also write the figures here; - is stdout, for nothing else")
    asked = parser.parse_args(arguments)
    if asked.dropout_passes and (len(asked.runs) > 1 or asked.dropout_passes < 2):
        parser.error(f"--dropout-passes {asked.dropout_passes}: give 2 or more, with one run directory only")
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        runs = [TrainedRun.load(folder, device, asked.trust) for folder in asked.runs]
        refuse_other_kinds(runs, asked.split)
        found = estimate(runs, asked.split, asked.dropout_passes)
        text = json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        files = [RunDirectory(asked.runs[0]).theorem, *([Path(asked.json)] if asked.json not in (None, "-") else [])]
        for file in files:
            file.write_text(text, encoding="utf-8")
    except (ConfigError, DataError, ModelSourceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; choose a place that can be written", file=sys.stderr)
        return 1
    if asked.json == "-":
        accept_any_sign("utf-8")
        print(text, end="")
    else:
        show(found)
        print(f"theorem: {files[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
