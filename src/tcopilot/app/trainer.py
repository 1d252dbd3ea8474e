"""Lightning's Trainer as this program uses it: what is fixed, what it may be given, and how it is built."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import DictConfig, ListConfig

from tcopilot.app.checks.problems import ConfigError, refusal
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.settings import FLAG, Rule, is_list, is_number, is_whole, one_of, problems, whole
from tcopilot.training.callbacks import MistakeLogCallback
from tcopilot.training.checkpoints import SafeCheckpointIO
from tcopilot.training.sharding import ShardingStrategy

FIXED = {"max_epochs": 1, "min_epochs": 0, "enable_checkpointing": False, "use_distributed_sampler": False}
"""One Lightning epoch is the whole budget of rounds; a minimum of 0 lets a clean stop end it early."""
UNUSABLE = {  # arguments of Lightning's Trainer that a config cannot give, and what to do instead
    **dict.fromkeys(("max_epochs", "min_epochs", "max_steps", "limit_train_batches"), "set rounds"),
    "max_time": "set rounds, or send the signal USR1 when time is up, after which resume= goes on",
    "enable_checkpointing": "callbacks.checkpoint writes the states",
    "use_distributed_sampler": "the data module divides batches among processes",
    "overfit_batches": "set data.max_train_rows, or use debug=overfit",
    "fast_dev_run": "use debug=fdr",
    "barebones": "use logger=csv",
    "accumulate_grad_batches": "set pilot.micro_batch_size",
    "gradient_clip_val": "set pilot.clip and copilot.clip",
    "gradient_clip_algorithm": "set pilot.clip and copilot.clip",
}
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")


def _are_devices(value: Any) -> bool:
    if is_list(value):
        return len(value) > 0 and all(is_whole(number) and number >= 0 for number in value)
    if isinstance(value, bool | float) or str(value) == "0":
        return False
    return re.fullmatch(r"auto|-1|\s*\d+\s*(,\s*\d+\s*)*,?", str(value)) is not None


def _is_number_or_share(value: Any) -> bool:
    return value is None or (is_number(value) and value >= 0 and (is_whole(value) or value <= 1))


SETTINGS = {
    "accelerator": one_of(("auto", "cpu", "cuda", "gpu", "mps", "tpu")),
    "devices": Rule(_are_devices, "give a number of devices, at least 1, a list of their numbers, -1 (all) or auto"),
    "num_nodes": whole(),
    "precision": Rule(
        lambda value: value in ("32-true", "bf16-mixed"),
        "use one of 32-true, bf16-mixed (16-mixed is refused: with two optimisers the loss scaler may unscale by a "
        "factor that it did not scale with, and gradients are clipped before they are unscaled; use bf16-mixed or "
        "32-true)",
    ),
    "strategy": Rule(
        lambda value: value in STRATEGIES,
        f"use one of {', '.join(STRATEGIES)}; two optimisers are stepped by hand, which DeepSpeed forbids",
    ),
    "val_check_interval": whole(),
    "limit_val_batches": Rule(_is_number_or_share, "give a number of batches, or a share in [0.0, 1.0]"),
    "num_sanity_val_steps": whole(-1),
    "log_every_n_steps": whole(0),
    "enable_progress_bar": FLAG,
}


def trainer_problems(cfg: DictConfig) -> Iterator[str]:
    """List the problems of the config's `trainer` group."""
    node = cfg.trainer
    required = {name: node[name] for name in SETTINGS if name in node or name != "num_nodes"}
    yield from problems(SETTINGS, required, "trainer")
    for name, mend in UNUSABLE.items():
        if name in node:
            yield f"trainer.{name}={node[name]}: training is a budget of rounds, stepped by hand; leave it out: {mend}"
    if node.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        yield (
            f"trainer.accelerator={node.accelerator}: torch finds no CUDA device on this machine; use trainer=cpu, or "
            f"install a torch built for CUDA"
        )
    if process_count(cfg) > 1 and node.strategy == "auto":
        yield f"trainer.devices={node.devices} with trainer.strategy=auto: several processes need trainer.strategy=ddp"


def process_count(cfg: DictConfig) -> int:
    """Number of processes that the trainer will start, as far as the config says so."""
    devices, nodes = cfg.trainer.devices, cfg.trainer.get("num_nodes", 1)
    nodes = nodes if is_whole(nodes) and nodes > 0 else 1  # any other value is reported as such
    if isinstance(devices, ListConfig):
        return max(1, len(devices)) * nodes
    if str(devices).isdigit():
        return max(1, int(devices)) * nodes
    return (max(1, torch.cuda.device_count()) if cfg.trainer.accelerator in ("gpu", "cuda", "auto") else 1) * nodes


def fixed(cfg: DictConfig) -> dict[str, Any]:
    """Arguments that replace the config's values, since Lightning's `fsdp` is FSDP1 and not FSDP2."""
    sharding = {"strategy": ShardingStrategy(process_count(cfg))} if cfg.trainer.strategy == "fsdp" else {}
    return FIXED | sharding


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning about a trainer that is built only to check a config or to measure memory."""
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def make_callbacks(cfg: DictConfig) -> list[Callback]:
    """The callbacks of the config, in its order; progress bars only where the trainer shows any."""
    made = [instantiate(node) for node in cfg.callbacks.values() if node is not None]
    return [one for one in made if cfg.trainer.enable_progress_bar or not isinstance(one, ProgressBar)]


def make_trainer(cfg: DictConfig, callbacks: list[Callback], log: MistakeLog | None, rounds: int) -> Trainer:
    """The Lightning Trainer, with the log's owner among its callbacks.

    Raises:
        ConfigError: if a logger or plugin of the config cannot be built.
    """
    if log is not None:
        callbacks = [MistakeLogCallback(log, cfg.mistake_log.every_n_rounds), *callbacks]
    try:
        return instantiate(
            cfg.trainer,
            **fixed(cfg),
            val_check_interval=min(cfg.trainer.val_check_interval, rounds),  # Lightning refuses a longer one
            callbacks=callbacks,
            plugins=[*instantiate(cfg.trainer.get("plugins") or []), SafeCheckpointIO()],
            logger=[instantiate(node) for node in cfg.logger.values() if node is not None] or False,
            default_root_dir=cfg.paths.run_dir,
        )
    except InstantiationException as error:
        if (reason := refusal(error)) is None:
            raise
        raise ConfigError([f"{str(error).rpartition('full_key: ')[2] or 'trainer.plugins'}: {reason}"]) from error
