"""The paper's experiments: every file composes and can be built, sets only what exists, and names its sources."""

import re
import shlex
from functools import cache
from pathlib import Path

import composed
import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from tcopilot.app import build
from tcopilot.app.checks.config import config_problems
from tcopilot.app.trainer import make_callbacks
from tcopilot.models.adapters import Lora

EXPERIMENTS = composed.CONFIGS / "experiment"
DOCS = composed.ROOT / "docs" / "experiments.md"
SOURCE = re.compile(r"Tables? \d|A\.\d|[DEF]\.\d|Algorithm \d|not in the paper")
NUMBER = re.compile(r"(?<![\w./])\d+(\.\d+)?(e[-+]?\d+)?(?![\w./])")
NAME = re.compile(r"\w+/\w+")
ON_A_CPU = "trainer=cpu"  # a machine without a CUDA device is told so by its own check


def files(group: str, inside: str = "") -> list[str]:
    """Configs of a group by name, those in sub-folders too, without the shared bases."""
    folder = composed.CONFIGS / group
    found = (path.relative_to(folder).with_suffix("").as_posix() for path in (folder / inside).rglob("*.yaml"))
    return sorted(name for name in found if Path(name).name != "base")


ABLATIONS = ["ablation/latest_log", "ablation/no_errors", "ablation/no_source", "ablation/no_states"]
CHANGES = [*files("experiment", "control"), *ABLATIONS, *files("experiment", "variant")]  # for any Pilot and any data
ROWS = [name for name in files("experiment") if "/" in name and name not in CHANGES]  # the paper's


def own(group: str, name: str) -> dict:
    """What a config's file says itself, without what it inherits."""
    return yaml.safe_load((composed.CONFIGS / group / f"{name}.yaml").read_text()) or {}


def leaves(node: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        found |= leaves(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def exists(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and name in node


@pytest.mark.parametrize("name", composed.some_fast(files("experiment"), composed.FAST_EXPERIMENTS.__contains__))
def test_every_experiment_gives_parts_that_can_be_built(name, tmp_path):
    cfg = composed.compose_config(f"experiment={name}", ON_A_CPU, f"paths.run_dir={tmp_path}")
    composed.assert_targets_exist(cfg)
    assert cfg.name != composed.compose_config().name or name == "demo"  # runs of experiments stand apart
    if cfg.pilot.frozen:
        (problem,) = config_problems(cfg)
        assert "give pilot.path=<model or export>" in problem
        cfg.pilot.path = "/runs/a/export"
    assert config_problems(cfg) == []
    for node in (cfg.pilot, cfg.copilot):
        learner = build.learner(node, 100)
        optimizer = learner.optimizer([torch.nn.Parameter(torch.zeros(2))])
        learner.scheduler(optimizer=optimizer, num_training_steps=1000)
        assert not node.adapter or isinstance(instantiate(node.adapter, _convert_="all"), Lora)
    instantiate(cfg.mistake_log.log, _convert_="all")
    instantiate(cfg.objective)
    assert instantiate(cfg.data).benchmark_names
    make_callbacks(cfg)


@pytest.mark.parametrize("name", composed.some_fast(files("experiment"), composed.FAST_EXPERIMENTS.__contains__))
def test_an_experiment_sets_only_keys_that_exist_without_it(name):
    """Hydra merges a config group's unknown keys in silence, so a misspelt one would be lost."""
    given = composed.choices(f"experiment={name}")
    kept = [f"{key}={value}" for key, value in given.items() if value and not key.startswith(("hydra", "experiment"))]
    plain = composed.compose_config(*kept)
    values = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    values.pop("hydra", None)
    values.pop("defaults", None)
    if name in ROWS:
        values |= {"paper": yaml.safe_load((EXPERIMENTS / "paper" / "base.yaml").read_text())}
        values["paper"].pop("defaults")
    flat = [key.removeprefix("paper.") for key in leaves(values)]
    assert [key for key in flat if not exists(plain, key)] == []


@pytest.mark.parametrize("name", [*ROWS, "paper/base"])
def test_every_number_of_a_paper_row_names_its_source(name):
    for line in (EXPERIMENTS / f"{name}.yaml").read_text().splitlines():
        value, _, comment = line.partition("#")
        if NUMBER.search(value):
            assert SOURCE.search(comment), line


# Settings of Tables 5 to 10, copied by hand from the paper.
PAPER = {
    "flan_t5_small/commonsense": ("8", 12, 16, 1, 1e-3, 3e-3, 0.01, 64),
    "flan_t5_base/arithmetic": ("9", 12, 16, 1, 1e-3, 3e-3, 0.01, 256),
    "t5_base/lastfm": ("10", 20, 16, 1, 1e-3, 1e-3, 0.01, 64),
    "llama_3_2_1b/commonsense": ("5", 3, 16, 4, 3e-4, 5e-4, 0.0, 64),
    "qwen2_5_7b/commonsense": ("5", 3, 16, 4, 3e-4, 5e-4, 0.0, 64),
    "llama_3_2_3b/arithmetic": ("6", 3, 16, 4, 2e-4, 3e-4, 0.0, 256),
    "llama_3_1_8b/arithmetic": ("6", 3, 16, 4, 1e-4, 3e-4, 0.0, 256),
    "llama_3_1_8b/beauty": ("7", 3, 32, 1, 3e-4, 5e-4, 0.0, 64),
}


@pytest.mark.parametrize("name", composed.some_fast(PAPER, composed.FAST_EXPERIMENTS.__contains__))
def test_values_are_those_of_the_paper(name):
    _, epochs, batch, micro, pilot_lr, copilot_lr, decay, tokens = PAPER[name]
    cfg = composed.compose_config(f"experiment={name}")
    assert (cfg.data.rounds, cfg.data.epochs, cfg.data.batch_size) == (None, epochs, batch)
    assert (cfg.pilot.micro_batch_size, cfg.copilot.batch_size) == (micro, batch)
    assert (cfg.pilot.optimizer.lr, cfg.copilot.optimizer.lr) == (pilot_lr, copilot_lr)
    assert (cfg.pilot.optimizer.weight_decay, cfg.copilot.optimizer.weight_decay) == (decay, decay)
    assert (cfg.evaluation.num_beams, cfg.evaluation.max_new_tokens) == (4, tokens)


@pytest.mark.parametrize("name", composed.some_fast(ROWS, composed.FAST_EXPERIMENTS.__contains__))
def test_every_row_is_the_papers_method(name):
    cfg = composed.compose_config(f"experiment={name}")
    assert cfg.mistake_log.log.capacity_rounds == 128
    assert cfg.mistake_log.log.policy._target_ == "tcopilot.mistake_log.policies.Fifo"
    assert (cfg.fusion.rule["_target_"].rpartition(".")[2], cfg.fusion.feedback) == ("ProbabilityFusion", "own")
    assert {0, 0.3, 0.5, 0.8, 1.0} <= set(cfg.fusion.weight)
    copilot = cfg.copilot
    assert (copilot.context, copilot.positions, copilot.pattern, copilot.pooling) == ("strict", "none", 1, "mean")
    assert (copilot.steps_per_round, copilot.own_feedback) == (1, 0.0)
    assert cfg.objective._target_ == "tcopilot.training.objectives.RootMeanSquaredError"
    assert (cfg.data.max_source_length, cfg.data.max_target_length) == (256, 256)
    for node in (cfg.pilot, cfg.copilot):
        assert node.optimizer._target_ == "torch.optim.AdamW"
        assert "cosine" in node.scheduler._target_
        assert node.scheduler.min_lr_rate == 0


def test_lora_of_recommendation_has_its_own_rank():
    other, own = (composed.compose_config(f"experiment=llama_3_2_1b/{d}") for d in ("commonsense", "beauty"))
    for cfg, r, alpha in ((other, 32, 64), (own, 16, 16)):
        assert (cfg.pilot.adapter.r, cfg.pilot.adapter.alpha, cfg.pilot.adapter.dropout) == (r, alpha, 0.05)
        assert (cfg.copilot.adapter.r, cfg.copilot.adapter.alpha, cfg.copilot.adapter.dropout) == (r, alpha, 0.08)


@pytest.mark.parametrize(
    "name",
    composed.some_fast(
        (name for name in files("pilot") if not name.startswith(("tiny", "smollm2", "frozen"))),
        ("lora", "t5_base").__contains__,
    ),
)
def test_a_pilot_is_trained_as_in_the_paper(name):
    cfg = composed.compose_config(f"pilot={name}").pilot
    if "t5" in name:
        assert (dict(cfg.adapter), cfg.dtype) == ({}, "float32")
    else:
        assert (cfg.adapter.r, cfg.adapter.alpha, cfg.adapter.dropout, cfg.dtype) == (32, 64, 0.05, "bfloat16")
        assert list(cfg.adapter.targets) == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    if name != "lora":
        assert re.fullmatch(r"[\w-]+/[\w.-]+", cfg.path)


@pytest.mark.parametrize("name", [name for name in files("copilot") if own("copilot", name).get("path")])
def test_a_copilot_has_a_head_that_its_training_allows(name):
    cfg = composed.compose_config(f"copilot={name}").copilot
    if "t5" in name:
        assert (cfg.head, dict(cfg.adapter)) == ("linear", {})
    else:
        assert (cfg.head, cfg.train_error_input, cfg.adapter.r, cfg.adapter.dropout) == ("soft", False, 32, 0.08)


@pytest.mark.slow
def test_the_command_line_wins_over_an_experiment():
    given = composed.choices("experiment=llama_3_2_3b/arithmetic", "copilot=llama_3_2_3b", "data=gsm8k")
    assert (given["pilot"], given["copilot"], given["data"]) == ("llama_3_2_3b", "llama_3_2_3b", "gsm8k")
    kept = composed.compose_config("experiment=llama_3_2_3b/arithmetic", "copilot=llama_3_2_3b").copilot
    assert (kept.path, kept.optimizer.lr) == ("meta-llama/Llama-3.2-3B", 3e-4)  # Table 6 stays in force


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("pooling", "copilot.pooling", ["mean", "max", "sum"]),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("weight", "pilot", ["llama_3_2_1b", "llama_3_2_3b", "llama_3_1_8b"]),
                ("pattern", "copilot.pattern", ["1", "2", "3", "4"]),
                ("loss", "objective", ["rmse", "ce", "kl"]),
            )
        ),
    ],
)
def test_an_ablation_brings_its_sweep(name, key, values):
    sweep = OmegaConf.to_container(
        composed.compose_whole(f"experiment=ablation/{name}", with_hydra=True).hydra.sweeper.params
    )
    assert {k: str(v).split(",") for k, v in sweep.items()} == {key: values}
    for value in values:
        assert (
            config_problems(composed.compose_config(f"experiment=ablation/{name}", ON_A_CPU, f"{key}={value}")) == []
        )


def test_an_ablation_and_a_row_combine():
    both = ("experiment=[ablation/pattern,llama_3_2_1b/arithmetic]", "copilot.pattern=2")
    cfg = composed.compose_config(*both)
    assert composed.choices(both[0])["data"] == "arithmetic"
    assert (cfg.copilot.pattern, cfg.pilot.optimizer.lr, cfg.evaluation.max_new_tokens) == (2, 2e-4, 256)


@pytest.mark.parametrize(
    "other",
    composed.some_fast(
        ["demo_decoder_only", "smollm2_openbookqa", "flan_t5_small/arithmetic"], "demo_decoder_only".__eq__
    ),
)
@pytest.mark.parametrize("name", composed.some_fast(CHANGES, composed.FAST_EXPERIMENTS.__contains__))
def test_a_control_ablation_or_variant_changes_any_run_and_neither_its_pilot_nor_its_data(name, other):
    plain = composed.compose_config(f"experiment={other}", "pilot.path=x")
    cfg = composed.compose_config(f"experiment=[{other},{name}]", "pilot.path=x", ON_A_CPU)
    assert cfg.name == name.replace("/", "_")
    assert (cfg.pilot.path, cfg.pilot.config) == ("x", plain.pilot.config)
    held_out = {"held_out": 0.1} if name == "variant/held_out" else {}
    assert OmegaConf.to_container(cfg.data) == OmegaConf.to_container(plain.data) | held_out
    refused = config_problems(cfg)
    assert refused == [] or (name == "control/equal_parameters" and "a pretrained one cannot" in refused[0])
    heads = {"variant/soft_head": "soft", "variant/linear_head": "linear"}
    assert cfg.copilot.head == heads.get(name, plain.copilot.head)


@pytest.mark.slow
def test_what_ablations_and_variants_change():
    names = [*ABLATIONS, "variant/literal", "variant/offline", "control/equal_time", "control/averaged"]
    given = {name: composed.compose_config(f"experiment={name}") for name in names}
    for name in ("states", "source", "errors"):
        assert name not in given[f"ablation/no_{name}"].copilot.reads
        assert len(given[f"ablation/no_{name}"].copilot.reads) == 2
    latest, literal = (given[name] for name in ("ablation/latest_log", "variant/literal"))
    assert (
        latest.mistake_log.log.policy
        == literal.mistake_log.log.policy
        == {"_target_": "tcopilot.mistake_log.policies.Latest"}
    )
    assert (latest.copilot.steps_per_round, latest.fusion.feedback) == (4, "observed")
    assert (literal.copilot.steps_per_round, literal.fusion.feedback) == (1, "own")
    offline = given["variant/offline"].pilot
    assert (offline.frozen, offline.adapter) == (True, None)
    assert [given[f"control/{name}"].control for name in ("equal_time", "averaged")] == ["equal_time", "averaged"]


@cache
def commands() -> list[tuple[str, ...]]:
    """Overrides of every `train.py` command in the documentation; of a sweep, its first job."""
    found = []
    for text in re.findall(r"`python train\.py ([^`]+)`", DOCS.read_text()):
        for domain in ("commonsense", "arithmetic") if "<domain>" in text else ("",):
            parts = [part for part in shlex.split(text.replace("<domain>", domain)) if part != "-m"]
            parts = [part if "[" in part else part.partition(",")[0] for part in parts]
            found.append(tuple(re.sub(r"<[^>]*>", "x", part) for part in parts))
    return found


@pytest.mark.parametrize(
    "overrides", composed.some_fast(commands(), lambda given: given in commands()[:3]), ids=" ".join
)
def test_every_documented_command_composes(overrides):
    assert config_problems(composed.compose_config(*overrides, ON_A_CPU)) == []


@pytest.mark.slow
def test_every_row_and_every_model_is_documented():
    rows = {name for part in sum(commands(), ()) if part.startswith("experiment=") for name in NAME.findall(part)}
    assert set(ROWS) - set(files("experiment", "paper")) <= rows
    given = [composed.choices(*overrides, ON_A_CPU) for overrides in commands()]
    for group, others in (
        ("pilot", ("tiny", "smollm2", "lora", "frozen")),
        ("copilot", ("equal", "half", "lora", "head", "calibration", "shared")),
    ):
        used = {choice[group] for choice in given}
        assert {name for name in files(group) if not name.startswith(others)} <= used


def test_only_what_stands_for_the_paper_goes_without_positions():
    for given, positions in (("paper/base", "none"), ("variant/literal", "none"), ("demo_decoder_only", None)):
        assert composed.compose_config(f"experiment={given}").copilot.positions == positions
