"""The control beside every gain: the same Pilot, without a Copilot, given the joint run's training time."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from tcopilot import build
from tcopilot.build import Prepared
from tcopilot.distributed import agree_on
from tcopilot.evaluation.evaluate import UNCOMPARED, Evaluator
from tcopilot.evaluation.results import Control
from tcopilot.evaluation.significance import mean_interval

log = logging.getLogger(__name__)
WARM_UP_ROUNDS, TRIAL_ROUNDS = 5, 30


def equal_time_controls(cfg: DictConfig, prepared: Prepared, seconds: float, folder: Path) -> list[Control]:
    """Train the Pilot alone for as many rounds as fit into the joint run's training time, and score it.

    A short trial measures the time of a Pilot-only round; the schedule then spans exactly the rounds that fit.

    Args:
        cfg: the joint run's config.
        prepared: its data and model source.
        seconds: its training time.
        folder: where the control's predictions go.

    Returns:
        One control per benchmark and metric, on the split that the run reports.
    """
    alone = OmegaConf.merge(cfg, {"copilot": {"enabled": False}})
    _trained(alone, prepared, WARM_UP_ROUNDS)
    trial = _trained(alone, prepared, TRIAL_ROUNDS)
    rounds = agree_on(max(1, round(seconds / (trial.seconds["pilot"] / TRIAL_ROUNDS))))
    log.info("Control: the Pilot alone for %d rounds, the joint run's %.0f s", rounds, seconds)
    module = _trained(alone, prepared, rounds)
    decoding = build.decoding(cfg.evaluation)
    evaluator = Evaluator(module.model, prepared.tokenizer, prepared.data, folder / "predictions", decoding)
    split, seconds = cfg.evaluation.report_on, round(module.seconds["pilot"], 2)
    controls = []
    for name in prepared.data.benchmark_names:
        scores = evaluator.scores(split, name, [0.0])[0.0]
        for metric, values in ((metric, values) for metric, values in scores.items() if metric not in UNCOMPARED):
            found = (sum(values) / len(values), len(values), mean_interval(values))
            controls.append(Control("Pilot, equal time", name, split, metric, *found, rounds, seconds))
    return controls


def _trained(cfg: DictConfig, prepared: Prepared, rounds: int):
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = build.fused_model(cfg, prepared)
    module = build.training_module(cfg, model, rounds)
    budget, prepared.data.rounds = prepared.data.rounds, rounds
    quiet = OmegaConf.merge(
        cfg,
        {"trainer": {"limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_progress_bar": False}, "logger": None},
    )
    quiet.logger = {}
    try:
        build.trainer(quiet, [], None, rounds).fit(module, datamodule=prepared.data)
    finally:
        prepared.data.rounds = budget
    module.to(module.trainer.strategy.root_device)  # Lightning leaves it on the CPU
    return module
