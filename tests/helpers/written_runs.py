"""Run directories with known figures, as a run would have written them."""

from pathlib import Path

from omegaconf import OmegaConf

from tcopilot.data.metrics import NLL
from tcopilot.evaluation.results import Gain, Results, Row, direction_and_unit
from tcopilot.reporting import published
from tcopilot.reporting.finished_runs import find_runs
from tcopilot.reporting.seed_groups import group_runs
from tcopilot.reporting.summaries import Summary, summarise
from tcopilot.version import __version__

REASONING = ("piqa", "winogrande", "hellaswag", "boolq", "siqa", "openbookqa")
ARITHMETIC = ("aqua", "gsm8k", "mawps", "svamp")
CUTS = (5, 10, 20, 100)  # of hit@K and NDCG@K


def config_of(seed: int, folder: Path, **changes) -> dict:
    """A resolved config; changes are dotted keys with __ for the dot."""
    config = {
        "version": __version__,
        "name": "demo",
        "seed": seed,
        "resume": None,
        "rounds": 500,
        "pilot": {"path": None, "config": {"model_type": "t5"}, "adapter": None},
        "copilot": {"enabled": True, "path": None, "layers": None},
        "data": {"rounds": 500, "seed": seed, "benchmarks": {"gsm8k": {"name": "gsm8k", "seed": seed}}},
        "mistake_log": {"log": {"capacity_rounds": 128, "policy": {"_target_": "tcopilot.mistake_log.policies.Fifo"}}},
        "fusion": {"weight": [0, 0.5]},
        "evaluation": {"report_on": "test"},
        "callbacks": {"checkpoint": {"folder": f"{folder}/checkpoints"}},
        "paths": {"run_dir": str(folder)},
    }
    for key, value in changes.items():
        *above, last = key.split("__")
        node = config
        for name in above:
            node = node[name]
        node[last] = value
    return config


def write_run(folder: Path, figures: dict, seed: int = 0, p: float = 0.001, n: int = 100, **changes) -> Path:
    """Write a run whose test rows have these (Pilot, fused) fractions by (benchmark, metric); λ is 0.5."""
    rows, gain = [], []
    for (benchmark, metric), (pilot, fused) in figures.items():
        described = direction_and_unit(NLL) if metric == NLL.name else {}
        for split, shift in (("validation", 0.25), ("test", 0.0)):  # a table that reads the wrong split is far off
            for weight, value in ((0.0, pilot), (0.3, 0.99), (0.5, fused)):
                rows.append(Row(benchmark, split, metric, weight, value + shift, n, (0.0, 1.0), **described))
        step = fused - pilot
        gain.append(Gain(benchmark, metric, pilot, fused, step, (step - 0.01, step + 0.01), 9, 1, p, **described))
    config = config_of(seed, folder, **changes)
    results = Results(
        seed=seed, git="abc", config="config.yaml", params={}, rounds=500, train_seconds=60.0,
        selected_weight=0.5, selected_on="validation", reported_on=config["evaluation"]["report_on"],
        rows=rows, gain=gain,
    )  # fmt: skip
    results.save(folder / "results.json")
    OmegaConf.save(config, folder / "config.yaml")
    return folder


def write_three_seeds(folder: Path) -> Path:
    """Gains of 2, 4 and 3 points; the second seed alone is not distinguishable."""
    for seed, (pilot, fused, p) in enumerate([(0.40, 0.42, 0.01), (0.42, 0.46, 0.2), (0.44, 0.47, 0.01)]):
        write_run(folder / str(seed), {("gsm8k", "accuracy"): (pilot, fused)}, seed, p, n=1319)
    return folder


def published_run(folder: Path, benchmarks=REASONING + ARITHMETIC, shift: float = 0.0, **changes) -> Path:
    """A run of LLaMA-3.2-1B with its own decoder as Copilot that reaches the paper's figures plus `shift` points."""
    alone, fused = published.figures("LLaMA-3.2-1B"), published.figures("LLaMA-3.2-1B", "T-Copilot-1B")
    figures = {
        (name, "accuracy"): ((alone[name, "accuracy"] + shift) / 100, (fused[name, "accuracy"] + shift) / 100)
        for name in benchmarks
    }
    return write_run(folder, figures, pilot__path="meta-llama/Llama-3.2-1B", **changes)


def summaries_of(*folders: Path, metric: str | None = None) -> list[Summary]:
    """Summarise the groups of all runs below the folders."""
    return [summarise(group, metric) for group in group_runs(find_runs(folders).runs)]
