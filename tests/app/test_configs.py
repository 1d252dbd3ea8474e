"""Every config on disk composes and names classes that exist, and every recipe runs."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import composed
import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

GROUPS = {  # where train.yaml puts a group; others stand at their own name
    "adapter": ("adapter@pilot.adapter", "adapter@copilot.adapter"),
    "log_storage": ("log_storage@mistake_log.log.storage",),
    "optimizer": ("optimizer@pilot.optimizer", "optimizer@copilot.optimizer"),
    "scheduler": ("scheduler@pilot.scheduler", "scheduler@copilot.scheduler"),
}
SMALL_FOLDERS = ("", "paper", "control", "ablation", "variant")  # of experiments that are not one model on one domain
ON_A_CPU = ("trainer=cpu", "trainer.devices=1", "trainer.strategy=auto", "logger=csv")


def names_in(group: str) -> list[str]:
    """Configs of a group, those in sub-folders too, without the shared bases."""
    folder = composed.CONFIGS / group
    found = (path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    return sorted(name for name in found if Path(name).name != "base")


@cache
def group_values() -> list[str]:
    """Every `group=value` that the folders on disk allow, but for whole runs."""
    groups = sorted(path.name for path in composed.CONFIGS.iterdir() if path.is_dir())
    groups = [group for group in groups if group not in ("experiment", "paths", "hydra", "launcher", "sweep")]
    return [f"{key}={name}" for group in groups for key in GROUPS.get(group, (group,)) for name in names_in(group)]


def is_first_of_its_group(override: str) -> bool:
    group = override.partition("=")[0]
    return override == next(value for value in group_values() if value.startswith(f"{group}="))


@pytest.mark.parametrize("override", composed.some_fast(group_values(), is_first_of_its_group))
def test_every_value_of_every_group_composes_with_classes_that_exist(override, tmp_path):
    if override.endswith("adamw_8bit"):
        pytest.importorskip("bitsandbytes")
    cfg = composed.compose_config(override, f"paths.run_dir={tmp_path}")
    composed.assert_targets_exist(cfg)
    if not OmegaConf.missing_keys(cfg):
        OmegaConf.to_container(cfg, resolve=True)  # no interpolation is left open


@pytest.mark.parametrize(
    "override",
    [
        "run=/runs/a",
        *composed.some_fast((f"data={n}" for n in names_in("data")), "data=gsm8k".__eq__),
        "evaluation=beam4",
    ],
)
def test_evaluations_compose_with_any_data_and_decoding(override, tmp_path):
    given = {"run=/runs/a", override, f"paths.run_dir={tmp_path}"}
    cfg = composed.compose_config(*given, name="eval")
    OmegaConf.to_container(cfg, resolve=True)
    if override.startswith("data"):
        composed.assert_targets_exist(cfg)


def test_two_data_configs_make_a_mixture():
    cfg = composed.compose_config("data=[word_problems,multiple_choice]")
    assert list(cfg.data.benchmarks) == ["word_problems", "multiple_choice"]


def test_one_budget_and_one_seed_reach_every_part():
    cfg = composed.compose_config("rounds=7", "seed=5")
    assert cfg.data.rounds == 7
    assert [cfg.data.seed, cfg.mistake_log.log.seed] == [5, 5]


@pytest.mark.slow
def test_the_rows_of_generated_tasks_and_of_splits_are_those_of_every_seed():
    cfg = composed.compose_config("seed=5")
    assert [cfg.data.split_seed, cfg.data.benchmarks.word_problems.seed] == [0, 0]
    cfg = composed.compose_config("seed=5", "data.split_seed=3")
    assert [cfg.data.split_seed, cfg.data.benchmarks.word_problems.seed] == [3, 3]
    for name in ("multiple_choice", "next_item", "signed_difference"):
        cfg = composed.compose_config(f"data={name}", "seed=5", "data.split_seed=3")
        assert (cfg.data.seed, cfg.data.benchmarks[name].seed) == (5, 3)


def test_both_models_have_an_optimiser_of_their_own():
    cfg = composed.compose_config("pilot.optimizer.lr=0.5", "scheduler@copilot.scheduler=constant")
    assert (cfg.pilot.optimizer.lr, cfg.copilot.optimizer.lr) == (0.5, 0.003)
    assert "cosine" in cfg.pilot.scheduler._target_
    assert cfg.copilot.scheduler.name == "constant_with_warmup"


def test_a_misspelt_value_of_a_group_is_answered_with_the_values_that_exist():
    with pytest.raises(MissingConfigException, match=r"Could not find 'pilot/tiny_t4'(.|\n)*tiny_t5"):
        composed.compose_config("pilot=tiny_t4")


@pytest.mark.parametrize("key", ["round", "copilot.steps", "fusion.lambda", "data.benchmarks.word_problems.rows"])
def test_an_unknown_key_is_answered_with_its_place(key):
    with pytest.raises(ConfigCompositionException, match=f"Could not override '{key}'"):
        composed.compose_config(f"{key}=5")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Makes the export of a finished run of a family, for experiments that start from one."""

    @cache
    def export(family):
        demo = {"t5": "demo", "llama": "demo_decoder_only"}[family]
        folder = tmp_path_factory.mktemp(family)
        return composed.train(folder, f"experiment={demo}", "debug=fdr", *in_small(demo)) / "export"

    return export


RECIPES = [name for name in names_in("experiment") if name.rpartition("/")[0] in SMALL_FOLDERS]
RECIPES = [name for name in RECIPES if not name.startswith("frozen")]  # they have no rounds: test_fit.py
FAST = ("demo_decoder_only", "variant/offline")


@pytest.mark.slow
@pytest.mark.parametrize("name", composed.some_fast(RECIPES, FAST.__contains__))
def test_every_recipe_runs_two_rounds_in_small(name, tmp_path, finished):
    """With the sizes and rows of the demo in place of checkpoints and benchmarks that would be downloaded; the rows of
    the paper's tables are its recipes with other models (tests/test_experiments.py composes them all).
    """
    folder = composed.train(tmp_path / "run", f"experiment={name}", *ON_A_CPU, "debug=fdr", *in_small(name, finished))
    found = composed.results(folder)
    assert found["rounds"] == 2
    assert (folder / "export" / "config.json").exists()


def in_small(experiment: str, export: Callable[[str], Path] | None = None) -> list[str]:
    """Overrides that put a tiny Pilot with random weights and generated rows where an experiment downloads them.

    A frozen Pilot is the `export` of a finished run of its family.
    """
    cfg = composed.compose_config(f"experiment={experiment}")
    changes, data = ["data.num_workers=0"], cfg.data
    pilot = composed.choices(f"experiment={experiment}")["pilot"]
    name = f"{pilot} {OmegaConf.to_container(cfg.pilot)['path']}".lower()
    family, depth = ("t5", "num_decoder_layers") if re.search("t5|bart", name) else ("llama", "num_hidden_layers")
    if cfg.pilot.frozen:
        changes += [f"pilot.path={export(family)}"]
        changes += [] if cfg.pilot.config else ["copilot.path=null", "copilot.layers=null"]
    elif not cfg.pilot.config:
        sizes = OmegaConf.to_container(composed.compose_config(f"pilot=tiny_{family}").pilot.config)
        sizes[depth] = 8  # as many as experiments ask of their Copilots
        changes += ["pilot.path=null", "pilot.config={" + ", ".join(f"{k}: {v}" for k, v in sizes.items()) + "}"]
        changes += ["copilot.path=null"] if cfg.copilot.get("path") else []
        changes += ["pilot.quantization=null"] if cfg.pilot.quantization else []  # kept by test_quantised_runs.py
    if not all("kind" in benchmark for benchmark in data.benchmarks.values()):
        changes += ["data=word_problems", "data.path=null", "data.streaming=false", "data.weights=null"]
        data = composed.compose_config("data=word_problems").data
    small = {"train": 300, "validation": 8, "test": 8}
    return changes + [f"data.benchmarks.{n}.{split}={rows}" for n in data.benchmarks for split, rows in small.items()]
