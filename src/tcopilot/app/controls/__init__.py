"""Controls beside every gain: what the joint run's rows and budget give without a Copilot.

Adding a control is one function here, an entry in `CONTROLS` and its name in `tcopilot.app.checks.config.CONTROLS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from tcopilot.app import build
from tcopilot.app.build import Prepared
from tcopilot.app.checks.config import control_names
from tcopilot.app.controls.averaged import AveragedPilots
from tcopilot.app.controls.widths import widened
from tcopilot.app.trainer import make_trainer
from tcopilot.data.metrics import NLL, show_difference
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.outcomes import read_predictions
from tcopilot.evaluation.results import Control, Results
from tcopilot.evaluation.significance import compare
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.processes import agree_on, rank
from tcopilot.training.callbacks import FlopCount

log = logging.getLogger(__name__)
WARM_UP_ROUNDS, TRIAL_ROUNDS = 5, 30  # at most; long rounds are few, and need less of a trial


@dataclass(frozen=True)
class JointRun:
    """The finished run that a control is held against."""

    cfg: DictConfig
    prepared: Prepared
    model: TCopilotModel
    results: Results


@dataclass(frozen=True)
class Alternative:
    """A model without a Copilot, and what it cost to train."""

    model: TCopilotModel
    rounds: int
    seconds: float
    flops: float | None


def controls(joint: JointRun, folder: Path) -> Iterator[list[Control]]:
    """Train each control that the run's config names and its results lack, and score it as the run itself was scored.

    Args:
        joint: the finished run.
        folder: where the controls' predictions go, to `<name>/predictions`.

    Yields:
        For each control one figure per benchmark and metric, and the likelihood, on the split that the run reports.
    """
    for name in control_names(joint.cfg.control):
        title, train = CONTROLS[name]
        if any(control.name == title for control in joint.results.controls):
            continue
        log.info("Control: %s", title)
        yield _scored(title, train(joint), joint, folder / name / "predictions")


def _equal_time(joint: JointRun) -> Alternative:
    """The Pilot alone, for as many rounds as fit into the joint run's training time.

    A short trial measures the time of a Pilot-only round; the schedule then spans exactly the rounds that fit, and
    never fewer than the joint run's, which did all that a Pilot-only round does.
    """
    _alone(joint, WARM_UP_ROUNDS)
    trial = _alone(joint, _trial_rounds(joint))
    fitting = round(joint.results.train_seconds / (trial.seconds / trial.rounds))
    rounds = agree_on(max(joint.results.rounds, fitting))
    return _alone(joint, rounds)


def _equal_flops(joint: JointRun) -> Alternative:
    """The Pilot alone, for as many rounds as the joint run's operations pay for; a short trial counts those of one."""
    trial = _alone(joint, _trial_rounds(joint), count_every=1)
    return _alone(joint, max(1, round(joint.results.train_flops / (trial.flops / trial.rounds))))


def _trial_rounds(joint: JointRun) -> int:
    return min(TRIAL_ROUNDS, max(5, joint.results.rounds // 10))


def _averaged(joint: JointRun) -> Alternative:
    """The mean of the run's own Pilot and of a second one, of other initial weights and another order of the rows."""
    second = _alone(joint, joint.results.rounds, seed=joint.cfg.seed + 1)
    both = AveragedPilots(joint.model.pilot, second.model.pilot)
    model = type(joint.model)(TCopilotConfig(joint.model.pilot.config), both)
    flops = None if second.flops is None else 2 * second.flops
    return Alternative(model, 2 * second.rounds, 2 * second.seconds, flops)


def _equal_parameters(joint: JointRun) -> Alternative:
    """A wider Pilot with as many parameters as Pilot and Copilot have together, for the joint run's rounds."""
    source, params = joint.prepared.pilot, joint.results.params
    wider = widened(source.config, source.model_config.vocab_size, params["pilot"] + params["copilot"])
    prepared = replace(joint.prepared, pilot=replace(source, config=wider))
    return _alone(replace(joint, prepared=prepared), joint.results.rounds)


CONTROLS: dict[str, tuple[str, Callable[[JointRun], Alternative]]] = {
    "equal_time": ("Pilot, equal time", _equal_time),
    "equal_flops": ("Pilot, equal FLOPs", _equal_flops),
    "averaged": ("two Pilots averaged", _averaged),
    "equal_parameters": ("Pilot, equal parameters", _equal_parameters),
}
"""Name in the config to the name in tables and how it is trained."""


def _alone(joint: JointRun, rounds: int, seed: int | None = None, count_every: int = 100) -> Alternative:
    """Train the Pilot without a Copilot for some rounds; on all training rows, none held out for a log."""
    prepared, data = joint.prepared, joint.prepared.data
    cfg = OmegaConf.merge(joint.cfg, {"copilot": {"enabled": False}, "seed": joint.cfg.seed if seed is None else seed})
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = build.fused_model(cfg, prepared)
    module = build.training_module(cfg, model, rounds)
    if rank():
        seed_everything(cfg.seed + rank(), workers=True, verbose=False)  # dropout of its own, as in the joint run
    cfg.trainer.update({"limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_progress_bar": False})
    cfg.logger = {}
    count = FlopCount(count_every)
    with _changed(data, rounds=rounds, seed=data.seed + cfg.seed - joint.cfg.seed, held_out=0.0):
        make_trainer(cfg, [count], None, rounds).fit(module, datamodule=data)
    model.to(module.trainer.strategy.root_device)  # Lightning leaves it on the CPU
    return Alternative(model, rounds, round(agree_on(module.seconds["pilot"]), 2), count.total())


def against_controls(results: Results, run_dir: Path) -> list[str]:
    """Hold the fused model against every control on the rows that both answered, in the metric that decides.

    Args:
        results: of the run, with its controls.
        run_dir: where the predictions of the run and of its controls lie.

    Returns:
        A sentence for each control and benchmark: the difference with its 95 % interval, and a verdict.
    """
    sentences = []
    titles = {control.name for control in results.controls}
    for name, (title, _) in CONTROLS.items():
        for benchmark, gain in results.row_wise().items() if title in titles else ():
            weight = results.weight_of(benchmark)
            ours = read_predictions(results, run_dir / "predictions", benchmark, weight)
            theirs = read_predictions(results, run_dir / "control" / name / "predictions", benchmark, 0.0)
            pairs = [[found[row]["scores"][gain.metric] for found in (theirs, ours)] for row in ours if row in theirs]
            if not pairs:  # somebody removed the predictions
                continue
            found = compare(*zip(*pairs, strict=True), lower_is_better=not gain.higher_is_better)
            shown = show_difference(found.difference, gain.unit, found.ci95, named=True)
            sentences.append(f"{benchmark}, {gain.metric}, against {title}: {shown}, {found.verdict}")
    return sentences


@contextmanager
def _changed(thing: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(thing, name) for name in values}
    vars(thing).update(values)
    try:
        yield
    finally:
        vars(thing).update(before)


def _scored(title: str, alternative: Alternative, joint: JointRun, folder: Path) -> list[Control]:
    cfg, prepared = joint.cfg, joint.prepared
    decoding = build.decoding(cfg.evaluation)
    if isinstance(alternative.model.pilot, AveragedPilots):
        decoding = replace(decoding, compile=False)  # its caches are put together anew in each step
    evaluator = Evaluator(alternative.model, prepared.tokenizer, prepared.data, folder, decoding)
    split = cfg.evaluation.report_on
    cost = {
        "rounds": alternative.rounds,
        "train_seconds": alternative.seconds,
        "train_flops": alternative.flops,
        "parameters": sum(parameter.numel() for parameter in alternative.model.parameters()),
    }
    found = evaluator.run([0.0], (split, split))
    compared = {(gain.benchmark, gain.metric) for gain in found.gain} | {("all", NLL.name)}
    return [
        Control(title, **{key: value for key, value in asdict(row).items() if key != "weight"}, **cost)
        for row in found.rows
        if (row.benchmark, row.metric) in compared
    ]
