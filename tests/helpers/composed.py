"""Compose the project's configs and run its two programs in process, on budgets of seconds."""

import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.utils import get_object
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import subprocess_script
from omegaconf import DictConfig, ListConfig, OmegaConf, base, open_dict
from processes import Forked, Spare

from tcopilot.app import build, run
from tcopilot.models.family_check import check_family

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
SMALL = [
    "debug=limit",
    "data.benchmarks.word_problems.train=200",
    "data.benchmarks.word_problems.validation=20",
    "data.benchmarks.word_problems.test=20",
]
"""Four rounds of the demo on few generated rows, which are quick to draw."""
FAST_EXPERIMENTS = (
    "demo",
    "flan_t5_small/arithmetic",
    "llama_3_2_1b/commonsense",
    "control/equal_time",
    "variant/offline",
)
"""What stands for all experiments where each would take its time; the slow suite takes them all."""
QUIET = ["trainer.enable_progress_bar=false", "~callbacks.progress", "traceback=true"]

base.parse = lru_cache(10_000)(base.parse)  # a tenth of what a config costs is to parse `${rounds}` and the like again


def some_fast(values: Iterable[Any], fast: Callable[[Any], bool]) -> list[Any]:
    """Values of a parameter, of which all but a few are left to the slow suite."""
    return [value if fast(value) else pytest.param(value, marks=pytest.mark.slow) for value in values]


def compose_config(*overrides: str, name: str = "train") -> DictConfig:
    """What Hydra hands to a program, without Hydra's own settings.

    The choices of config groups are composed once, which takes Hydra a third of a second; values are then set on a
    copy as Hydra sets them. What Hydra refuses, it is asked to compose whole, so that its message is the real one.
    """
    try:
        groups, values = _split(overrides)
        cfg = pickle.loads(_composed(name, *groups)).config
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
    except Exception:
        return compose_whole(*overrides, name=name)
    return cfg


def compose_whole(*overrides: str, name: str = "train", with_hydra: bool = False) -> DictConfig:
    """The same by Hydra alone, and with its own settings if asked."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"), _reading_once():
        return compose(name, list(overrides), return_hydra_config=with_hydra)


def sampled(names: Iterable[str], every: int = 3) -> list[Any]:
    """Parameters of which some are always tried, and the others in the slow suite only."""
    return [pytest.param(name, marks=[] if i % every == 0 else pytest.mark.slow) for i, name in enumerate(names)]


def choices(*overrides: str) -> dict[str, str]:
    """The value of every config group."""
    groups, _ = _split(overrides)
    return pickle.loads(_composed("train", *groups)).choices


@cache
def _composed(name: str, *overrides: str) -> bytes:
    """Config and choices, pickled, since that is by far the fastest copy of a config."""
    cfg = compose_whole(*overrides, name=name, with_hydra=True)
    chosen = OmegaConf.to_container(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return pickle.dumps(SimpleNamespace(config=cfg, choices=chosen))


Plugins.instance()  # loads the modules of sources anew, so that those imported by name are not in use
_READ = {source: source.load_config for source in map(SourcesRegistry.instance().resolve, ("file", "pkg"))}
_read: dict[tuple[str, ...], bytes] = {}


@contextmanager
def _reading_once() -> Iterator[None]:
    """Hydra reads forty files for one config; each is read and parsed once."""
    with ExitStack() as patched:
        for source in _READ:
            patched.enter_context(patch.object(source, "load_config", _load))
        yield


def _load(source: ConfigSource, config_path: str) -> ConfigResult:
    key = source.scheme(), source.provider, source.path, config_path
    if key not in _read:
        _read[key] = pickle.dumps(_READ[type(source)](source, config_path))
    return pickle.loads(_read[key])


def _split(overrides: Iterable[str]) -> tuple[list[str], list[Override]]:
    """Overrides that name a file of a config group, and those that set a value; the rest is left to Hydra."""
    groups, values = [], []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_sweep_override() or override.key_or_group.startswith("hydra"):
            raise ValueError(override.input_line)
        if (CONFIGS / override.key_or_group).is_dir() and not isinstance(override.value(), dict):
            groups.append(override.input_line)
        else:
            values.append(override)
    return groups, values


def train(folder: Path, *overrides: str, estimate: bool = False) -> Path:
    """Run `train.py` in process; errors arrive as exceptions. Returns the run directory.

    The estimate of memory is left out unless asked for, since it takes as long as all the rest of a small run.
    """
    cfg = compose_config(*QUIET, *overrides, f"paths.run_dir={folder}")
    with nullcontext() if estimate else without_estimate():
        run.train(cfg)
    return folder


def resume(folder: Path, *overrides: str) -> Path:
    """Go on with a run in process, by its own config; errors arrive as exceptions. Returns the run directory."""
    with without_estimate():
        run.train(compose_config(f"resume={folder}", "trust=[composed]", "traceback=true", *overrides))
    return folder


def without_estimate() -> AbstractContextManager:
    """Leave out the estimate of memory, also in processes that are forked meanwhile."""
    return patch.object(run, "budget", lambda *_: None)


def evaluate(run_dir: Path, folder: Path, *overrides: str) -> Path:
    """Run `eval.py` in process; errors arrive as exceptions. Returns its run directory."""
    given = [f"run={run_dir}", f"paths.run_dir={folder}", "traceback=true"]
    run.evaluate(compose_config(*given, *overrides, name="eval"))
    return folder


def forked(script: str, *overrides: str, timeout: int = 250, spare: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a program in a process that has done its imports, from the repository's root, offline and on one core.

    Lightning begins an interpreter for the second process of a job, or, with `spare`, is given a fork as well.
    """
    return start(script, *overrides, spare=spare).wait(timeout)


def start(script: str, *overrides: str, spare: bool = False, **environment: Any) -> Forked:
    """The same without waiting, so that several processes may form a job."""
    _warm_up()
    return Forked(_run_beside_spare if spare else run_script, script, *overrides, **environment)


def _run_beside_spare(script: str, *overrides: str) -> None:
    subprocess_script.subprocess = SimpleNamespace(Popen=Spare(run_script))
    run_script(script, *overrides)


@cache
def _warm_up() -> None:
    """Do what every run does once in its process, so that those that are forked from this one need not."""
    import transformers.optimization  # noqa: F401 - the schedules, with seconds of imports behind them

    compose_config()
    for name in ("tiny_t5", "tiny_llama"):
        check_family(build.model_source(compose_config(f"pilot={name}").pilot, "pilot").model_config)


def run_script(script: str, *overrides: str) -> None:
    """Be the program from here on; for a process of its own."""
    os.chdir(ROOT)
    sys.argv = [script, *overrides]
    sys.path.insert(0, str(Path(script).resolve().parent))
    with _reading_once():
        runpy.run_path(script, run_name="__main__")


def program(script: str, *overrides: str, timeout: int = 250) -> subprocess.CompletedProcess[str]:
    """Run a program as a user does, in a new interpreter, which takes ten seconds more than `forked`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, script, *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def assert_targets_exist(cfg: DictConfig) -> None:
    """Every class or function that a config names can be imported."""
    found = _dotted_targets(cfg)
    assert found
    for name in found:
        assert callable(get_object(name)), name


def _dotted_targets(node: object) -> set[str]:
    """All values of `_target_` below a node, interpolations left alone."""
    if isinstance(node, DictConfig):
        own = {node["_target_"]} if "_target_" in node else set()
        return own.union(*(_dotted_targets(node._get_node(key)) for key in node))
    if isinstance(node, ListConfig):
        return set().union(*(_dotted_targets(node._get_node(i)) for i in range(len(node))))
    return set()


def results(folder: Path) -> dict[str, Any]:
    """What the run found."""
    return json.loads((folder / "results.json").read_text())


def predictions(folder: Path, split: str, weight: float, benchmark: str = "word_problems") -> list[dict[str, Any]]:
    """The predictions of one split at one λ, by row id."""
    text = (folder / "predictions" / f"{split}-{benchmark}-weight={weight:g}.jsonl").read_text()
    return sorted((json.loads(line) for line in text.split("\n") if line), key=lambda row: row["id"])


def value(found: dict[str, Any], split: str, metric: str, weight: float, benchmark: str = "word_problems") -> float:
    """One figure of `results.json`."""
    wanted = {"split": split, "metric": metric, "weight": weight, "benchmark": benchmark}
    (row,) = [row for row in found["rows"] if wanted.items() <= row.items()]
    return row["value"]


class InterruptAfter(Callback):
    """Presses Ctrl-C during a round, as a user would."""

    def __init__(self, rounds: int | Sequence[int]) -> None:
        self.rounds = [rounds] if isinstance(rounds, int) else rounds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Send the signal in the last round wanted."""
        if pl_module.round + 1 in self.rounds:
            signal.raise_signal(signal.SIGINT)
