"""Train the controls of a run, score them as the run itself was scored, and compare the fused model with them.

A further control is a function here, listed in `TRAINED_BY`, and a title for tables under the function's name in
`tcopilot.app.checks.controls.CONTROLS`.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from transformers import AutoConfig

from tcopilot.app import build
from tcopilot.app.build import Prepared
from tcopilot.app.checks.controls import CONTROLS, control_names
from tcopilot.app.controls.averaged import AveragedPilots
from tcopilot.app.joint import Trained
from tcopilot.app.trainer import make_trainer
from tcopilot.data.metrics import NLL, show_difference
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.outcomes import read_predictions
from tcopilot.evaluation.results import Control, Results
from tcopilot.evaluation.significance import compare
from tcopilot.mistake_log.recording import Recording
from tcopilot.models.adapters import projections
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.families import skeleton
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.quantization import parameter_count
from tcopilot.processes import agree_on, rank, sum_over_processes, world_size
from tcopilot.run_directory import RunDirectory
from tcopilot.training.callbacks import FlopCount
from tcopilot.training.callbacks.flops import FlopCounter
from tcopilot.training.module import TrainingDivergedError

log = logging.getLogger(__name__)
WARM_UP_ROUNDS, TRIAL_ROUNDS = 5, 30  # upper limits
GRID = ((0.5, 1), (1, 1), (2, 1), (4, 1), (2, 0.5))
"""Factors of the run's own learning rate and batch size that the control `tuned` tries."""
MODEL_WIDTHS = ("d_model", "hidden_size")
WIDTHS = (*MODEL_WIDTHS, "d_kv", "head_dim", "d_ff", "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim")
MOST_TIMES = 16  # the given Pilot's width
ROUNDS_READ = 1000  # at most, to learn how many tokens a round has
ROUNDS_APART, ROUNDS_COUNTED = 100, 10  # of rounds whose FLOPs are counted: at most apart, and at least how many


@dataclass(frozen=True)
class JointRun:
    """The finished run that a control is compared with."""

    cfg: DictConfig
    prepared: Prepared
    model: TCopilotModel
    results: Results
    recording: Recording | None = None

    @property
    def trial_rounds(self) -> int:
        """Rounds of a trial: fewer where the run has few, and therefore long, rounds."""
        return 3 if self.cfg.pilot.frozen else min(TRIAL_ROUNDS, max(5, self.results.rounds // 10))


def equal_time(joint: JointRun) -> Trained:
    """The Pilot alone, for as many rounds as fit into the joint run's training time; a short trial measures them.

    They are at least the joint run's, each of which did all that a Pilot-only round does. There is no such minimum if
    the run's Pilot was frozen, since it was not trained at all.
    """
    train_pilot(joint, WARM_UP_ROUNDS)
    trial = train_pilot(joint, joint.trial_rounds, count_every=0)
    fitting = round(joint.results.train_seconds / (trial.train_seconds / trial.rounds))
    least = 1 if joint.cfg.pilot.frozen else joint.results.rounds
    return train_pilot(joint, agree_on(max(least, fitting)), count_every=ROUNDS_APART)


def equal_flops(joint: JointRun) -> Trained:
    """The Pilot alone, for as many rounds as the joint run's FLOPs pay for; a short trial counts those of a round."""
    return train_pilot(joint, _rounds_for(joint, joint.results.train_flops))


def _rounds_for(joint: JointRun, flops: float) -> int:
    """Return how many rounds of the Pilot alone some FLOPs pay for.

    A trial counts the FLOPs of its few rounds, which may be longer or shorter than most: the batches tell by how much.
    """
    trial = train_pilot(joint, joint.trial_rounds, count_every=1)
    fitting = flops * trial.rounds / trial.train_flops
    tokens_R = _tokens_by_round(joint, min(max(round(fitting), trial.rounds), ROUNDS_READ))
    return max(1, round(fitting * (tokens_R[: trial.rounds].mean() / tokens_R.mean()).item()))


def _tokens_by_round(joint: JointRun, rounds: int) -> Tensor:
    """Return the padded tokens [R] of the first rounds that a Pilot alone is trained for, over all processes."""
    data = copy.copy(joint.prepared.data)
    data.rounds, data.held_out = rounds, 0.0
    tokens = [batch.padded_tokens for batch in data.train_dataloader()]
    return sum_over_processes(torch.tensor(tokens, dtype=torch.float64))


def averaged(joint: JointRun) -> Trained:
    """The mean of the run's own Pilot and of a second one, of other initial weights and another order of the rows."""
    second = train_pilot(joint, joint.results.rounds, seed=joint.cfg.seed + 1)
    both = AveragedPilots(joint.model.pilot, second.model.pilot)
    model = type(joint.model)(TCopilotConfig(joint.model.pilot.config), both)
    flops = None if second.train_flops is None else 2 * second.train_flops
    return Trained(model, 2 * second.rounds, 2 * second.train_seconds, flops)


def equal_parameters(joint: JointRun) -> Trained:
    """A wider Pilot with as many parameters as Pilot and Copilot have together, for the joint run's rounds."""
    source, params = joint.prepared.pilot, joint.results.params
    wider = widened(source.config, source.model_config.vocab_size, params["pilot"] + params["copilot"])
    prepared = replace(joint.prepared, pilot=replace(source, config=wider))
    return train_pilot(replace(joint, prepared=prepared), joint.results.rounds)


def widened(config: dict[str, Any], vocab_size: int, parameters: int) -> dict[str, Any]:
    """Scale all widths of a Pilot's config by one factor, so that it comes closest to a number of parameters.

    Depth and number of heads stay. The model's width (`d_model` or `hidden_size`) moves in steps of two per attention
    head, which heads and rotary embeddings divide by.
    """
    width = next(config[name] for name in MODEL_WIDTHS if name in config)
    step = 2 * AutoConfig.for_model(**config).num_attention_heads
    by_distance = {}
    for wide in range(step, MOST_TIMES * width + 1, step):
        scaled = {name: max(2, 2 * round(wide / width * config[name] / 2)) for name in WIDTHS if name in config}
        model = skeleton(AutoConfig.for_model(**config | scaled, vocab_size=vocab_size))
        excess = sum(parameter.numel() for parameter in model.parameters()) - parameters
        by_distance.setdefault(abs(excess), config | scaled)
        if excess > 0:
            break
    return by_distance[min(by_distance)]


def twice(joint: JointRun) -> Trained:
    """The Pilot alone, for twice the joint run's rounds: a second epoch, where that was the first."""
    return train_pilot(joint, 2 * joint.results.rounds)


def output_head(joint: JointRun) -> Trained:
    """The Pilot alone, whose output head is trained too, untied from its embedding; for the joint run's rounds."""
    return train_pilot(joint, joint.results.rounds, free=_free_output_head)


def tuned(joint: JointRun) -> Trained:
    """The Pilot with the best validation likelihood over `GRID`; its cost is that of all that did not diverge.

    Each trial has the run's FLOPs if the run's Pilot was frozen, else as many rows as the joint run's rounds had.
    """
    results = joint.results
    return _best_of_grid(joint, _rounds_for(joint, results.train_flops) if joint.cfg.pilot.frozen else results.rounds)


def tuned_for_fit(joint: JointRun) -> Trained:
    """The Pilot tuned likewise, in each trial for the FLOPs of the Copilot's fit alone.

    Recording is not counted: the Pilot has read the rows anyway, or other Copilots are fitted to the same recording.
    """
    return _best_of_grid(joint, _rounds_for(joint, joint.results.train_flops - joint.results.recording_flops))


def _best_of_grid(joint: JointRun, rounds: int) -> Trained:
    best, lowest, seconds, flops, processes = None, math.inf, 0.0, [], world_size()
    for rate, share in GRID:
        batch_size = processes * max(1, round(share * joint.cfg.data.batch_size / processes))
        trial = f"lr x {rate:g}, batches of {batch_size}"
        try:
            one = train_pilot(
                joint, max(1, round(rounds * joint.cfg.data.batch_size / batch_size)), rate=rate, batch_size=batch_size
            )
        except TrainingDivergedError as error:  # too high a rate, which is what the grid is to find out
            log.warning("%s is left out: %s", trial, error)
            continue
        nll = Evaluator(one.model, joint.prepared.tokenizer, joint.prepared.data, Path()).likelihood("validation")
        log.info("%s: validation nll %.4f", trial, nll)
        seconds, flops = seconds + one.train_seconds, [*flops, one.train_flops]
        if nll < lowest:
            best, lowest = one, nll
        del one  # memory may hold two models, but not five
    if best is None:
        raise TrainingDivergedError("control: the Pilot to be tuned diverges in every trial; lower pilot.optimizer.lr")
    return replace(best, train_seconds=seconds, train_flops=None if None in flops else sum(flops))


def _free_output_head(model: TCopilotModel) -> None:
    head = model.pilot.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone().float())


def calibrated(joint: JointRun) -> Trained:
    """The run's own Pilot with a temperature and biases, fitted on validation rows.

    Its cost is that of reading these rows and of the fit. If a recording is read instead, its share is included.
    """
    pilot, began, counter = joint.model.pilot, time.perf_counter(), FlopCounter()
    model = type(joint.model).from_pilot(pilot, kind="calibration")
    model.copilot.to(pilot.get_output_embeddings().weight.device)
    judge = Evaluator(model, joint.prepared.tokenizer, joint.prepared.data, Path(), recording=joint.recording)
    with counter:
        judge.calibrate()
    seconds = time.perf_counter() - began
    flops = sum_over_processes(torch.tensor(counter.flops, dtype=torch.float64)).item()
    if joint.recording is not None:
        recorded = joint.recording.cost_of(joint.prepared.data.rows_of("validation"))
        seconds, flops = seconds + recorded[0], flops + recorded[1]
    return Trained(model, 0, round(agree_on(seconds), 2), flops)


TRAINED_BY: dict[str, Callable[[JointRun], Trained]] = {
    train.__name__: train
    for train in (
        *(equal_time, equal_flops, averaged, equal_parameters),
        *(calibrated, tuned, tuned_for_fit, output_head, twice),
    )
}


def train_controls(joint: JointRun, run: RunDirectory) -> Iterator[list[Control]]:
    """Train and score each control that the run's config names and its results lack; yields the figures of each."""
    for name in control_names(joint.cfg.control):
        title = CONTROLS[name]
        if all(control.name != title for control in joint.results.controls):
            log.info("Control: %s", title)
            yield _scored(name, TRAINED_BY[name](joint), joint, run.control(name).predictions)


def train_pilot(
    joint: JointRun, rounds: int, seed: int | None = None, count_every: int | None = None, rate: float = 1.0,
    batch_size: int | None = None, free: Callable[[TCopilotModel], None] = lambda model: None,
) -> Trained:  # fmt: skip
    """Train the Pilot without a Copilot on all training rows; with LoRA if the run keeps it frozen.

    Args:
        joint: the run, whose settings it is trained with.
        rounds: how many to train for.
        seed: of weights and of the rows' order; by default the run's own.
        count_every: rounds from one count of FLOPs to the next; by default few enough that ten are counted, and 0 for
            none. Counting takes time, which a control for equal time has to do without.
        rate: factor of the learning rate.
        batch_size: rows of a round; the run's own unless given.
        free: given the model, makes further weights trainable.
    """
    prepared, data = joint.prepared, copy.copy(joint.prepared.data)
    cfg = OmegaConf.merge(joint.cfg, {"copilot": {"enabled": False}, "seed": joint.cfg.seed if seed is None else seed})
    if rate != 1.0:
        cfg.pilot.optimizer.lr *= rate  # a user's own optimiser may lack it
    data.batch_size = cfg.data.batch_size = batch_size or data.batch_size
    if cfg.pilot.frozen:
        for key, value in _on_a_budget(prepared).items():
            OmegaConf.update(cfg.pilot, key, value, merge=False, force_add=True)
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = build.fused_model(cfg, prepared)
    free(model)
    module = build.training_module(cfg, model, rounds)
    if rank():
        seed_everything(cfg.seed + rank(), workers=True, verbose=False)  # dropout of its own, as in the joint run
    cfg.trainer.update({"limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_progress_bar": False})
    cfg.logger = {}
    every = min(ROUNDS_APART, max(1, rounds // ROUNDS_COUNTED)) if count_every is None else count_every
    counts = [FlopCount(every)] if every else []
    data.rounds, data.seed, data.held_out = rounds, data.seed + cfg.seed - joint.cfg.seed, 0.0
    try:
        make_trainer(cfg, counts, None, rounds).fit(module, datamodule=data)
    except SystemExit:  # Lightning turns SIGTERM into status 0, and Ctrl-C into 1
        raise KeyboardInterrupt from None
    model.to(module.trainer.strategy.root_device)  # Lightning leaves it on the CPU
    flops = next((count.total() for count in counts), None)
    return Trained(model, rounds, round(agree_on(module.seconds["pilot"]), 6), flops)


def _on_a_budget(prepared: Prepared) -> dict[str, Any]:
    """How a Pilot that the run leaves frozen is trained for its controls: LoRA on the upper 40 % of its layers."""
    targets = projections(skeleton(prepared.pilot.model_config).get_decoder())
    lora = {"_target_": "tcopilot.models.adapters.Lora", "r": 16, "alpha": 32, "dropout": 0.0}
    adapter = {**lora, "targets": targets, "top": 0.4}
    return {"frozen": False, "adapter": adapter, "scheduler.num_warmup_steps": 0.05}


def against_controls(results: Results, run: RunDirectory) -> list[str]:
    """Compare the fused model with every control on the rows that both answered: a sentence for each benchmark."""
    sentences = []
    titles = {control.name: control.weight for control in results.controls}
    for name, title in CONTROLS.items():
        for benchmark, gain in results.row_wise().items() if title in titles else ():
            ours = read_predictions(results, run.predictions, benchmark, results.weight_of(benchmark))
            theirs = read_predictions(results, run.control(name).predictions, benchmark, titles[title])
            pairs = [[found[row]["scores"][gain.metric] for found in (theirs, ours)] for row in ours if row in theirs]
            if not pairs:  # somebody removed the predictions
                continue
            found = compare(*zip(*pairs, strict=True), higher_is_better=gain.higher_is_better)
            shown = show_difference(found.difference, gain.unit, found.ci95, named=True)
            sentences.append(f"{benchmark}, {gain.metric}, against {title}: {shown}, {found.verdict}")
    return sentences


def _scored(name: str, trained: Trained, joint: JointRun, folder: Path) -> list[Control]:
    cfg, prepared = joint.cfg, joint.prepared
    decoding = build.decoding(cfg.evaluation)
    if isinstance(trained.model.pilot, AveragedPilots):
        decoding = replace(decoding, compile=False)  # its caches are joined anew in each step
    recording = joint.recording if trained.model.pilot is joint.model.pilot else None  # valid for this Pilot only
    evaluator = Evaluator(trained.model, prepared.tokenizer, prepared.data, folder, decoding, recording=recording)
    parameters = sum(map(parameter_count, trained.model.parameters()))
    split, weight = cfg.evaluation.report_on, 0.0 if trained.model.copilot is None else 1.0
    found = evaluator.run([weight], (split, split))
    compared = {(gain.benchmark, gain.metric) for gain in found.gain} | {("all", NLL.name)}
    return [
        Control(name=CONTROLS[name], **asdict(row), **trained.costs, parameters=parameters)
        for row in found.rows
        if (row.benchmark, row.metric) in compared and row.weight == weight
    ]
