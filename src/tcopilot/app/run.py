"""The two programs: `train` runs Algorithm 1 and evaluates the result, `evaluate` runs Algorithm 2 on an export."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from filelock import Timeout
from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from tcopilot import processes
from tcopilot.app import build, sweep
from tcopilot.app.build import Prepared
from tcopilot.app.checks.config import config_problems, refuse_missing, unread_in_evaluation, unread_keys
from tcopilot.app.checks.groups import given_overrides
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.checks.recordings import evaluates_recording, fits_from_recording
from tcopilot.app.checks.resumed import take_overrides
from tcopilot.app.console import quiet_libraries, show_results
from tcopilot.app.controls.training import JointRun, against_controls, train_controls
from tcopilot.app.failures import errors_for_people
from tcopilot.app.fit import fit
from tcopilot.app.joint import train_jointly
from tcopilot.app.memory.estimate import Budget, budget
from tcopilot.data.shots import read_shots, write_shots
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.modes import TARGETS
from tcopilot.evaluation.results import Results, Row
from tcopilot.evaluation.trace import trace_problems, write_trace
from tcopilot.mistake_log.recording import Recording
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.gates import GATES
from tcopilot.models.pilot import ModelSource
from tcopilot.models.transfer import transfer_copilot, transfer_problems
from tcopilot.processes import agree_on, is_first
from tcopilot.reporting.dashboards import log_evaluation
from tcopilot.reporting.model_card import model_card
from tcopilot.run_directory import RunDirectory, write_whole
from tcopilot.training.checkpoints import checkpoints
from tcopilot.training.compilation import clear_empty_libraries
from tcopilot.training.loggers import closing_wandb
from tcopilot.version import __version__, git_revision

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> float | None:
    """Train Pilot and Copilot, export the fused model, evaluate it and write `results.json`.

    With `resume=<run dir>` the config of that run is used instead of `cfg`.

    Returns:
        The gain on validation, see `sweep.validation_gain`; None for a job of a sweep that failed.
    """
    with errors_for_people(cfg), closing_wandb():
        return sweep.job(_resumed(cfg), _train)


def _train(cfg: DictConfig) -> float:
    run_dir = _join_processes(cfg)
    quiet_libraries()
    if not cfg.get("resume"):
        _refuse_another_run(cfg, run_dir)
    prepared = build.prepare(cfg)
    memory = None if fits_from_recording(cfg) else budget(cfg, prepared)
    if memory is not None:
        memory.check()
    with _claimed(cfg, run_dir):
        return _train_prepared(cfg, prepared, memory, run_dir)


def _train_prepared(cfg: DictConfig, prepared: Prepared, memory: Budget | None, run_dir: RunDirectory) -> float:
    seed_everything(cfg.seed, workers=True, verbose=False)
    if is_first() and prepared.data.shots:
        write_shots(prepared.data.shot_rows, run_dir.shots)
    is_fit = fits_from_recording(cfg)
    trained = fit(cfg, prepared, run_dir) if is_fit else train_jointly(cfg, prepared, memory)
    model = trained.model
    if model.copilot is not None and not model.copilot.learns:
        Evaluator(model, prepared.tokenizer, prepared.data, run_dir.predictions).calibrate()
    recorded = None if trained.recording is None else trained.recording.pilot.digest
    build.export(model, prepared.tokenizer, run_dir.export, recorded)
    recording = trained.recording if evaluates_recording(cfg, prepared.data) else None
    weights = build.evaluation_weights(cfg.fusion.weight)
    results = _run_evaluator(cfg, model, prepared, run_dir, weights, recording=recording)
    if is_first():
        model.config.save_pretrained(run_dir.export)  # now with the selected λ
    costs = {**trained.costs, "recording_flops": trained.recording_flops}
    results = replace(results, **costs, params=trained.params, notes=[*trained.notes, *results.notes])
    before = _results_of(run_dir) if cfg.get("resume") and run_dir.results.exists() else results
    results.controls = agree_on(before.controls if _of_the_pilot(before) == _of_the_pilot(results) else [])
    _save_results(results, run_dir)
    log_evaluation(trained.loggers, results, run_dir.folder)
    for found in train_controls(JointRun(cfg, prepared, model, results, recording), run_dir):
        results.controls += found
        _save_results(results, run_dir)
    results.notes += agree_on(against_controls(results, run_dir) if is_first() else [])
    if is_first() and model.copilot is not None:
        is_alone = run_dir.copilot_alone.exists()
        write_whole(run_dir.model_card, model_card(results, cfg.pilot.path, model.config.pilot, is_alone))
    return _finish(results, run_dir)


def _resumed(cfg: DictConfig) -> DictConfig:
    """The config of the run to resume, or else the config given."""
    if not cfg.get("resume"):
        return cfg
    path = RunDirectory(str(cfg.resume)).config
    if not path.exists():
        raise ConfigError([f"resume={cfg.resume}: no config.yaml there; give the folder of a run that was started"])
    before = build.read_config(path, f"resume={cfg.resume}", cfg.trust)
    before.resume = before.paths.run_dir
    given = [override for override in given_overrides() if not override.startswith(("resume=", "trust=", "paths."))]
    if ignored := take_overrides(before, cfg, given):
        log.warning("resume=%s goes on with that run's own config; not used: %s", cfg.resume, ", ".join(ignored))
    return before


def evaluate(cfg: DictConfig) -> float | None:
    """Evaluate an exported run, at any λ and on any data, without training.

    Args:
        cfg: composed from `configs/eval.yaml`; `run` names the run directory.

    Returns:
        The gain on validation in the first benchmark's metric; None for a job of a sweep that failed.
    """
    with errors_for_people(cfg):
        return sweep.job(cfg, _evaluate)


def _evaluate(cfg: DictConfig) -> float:
    quiet_libraries()
    refuse_missing(cfg)
    source = _run_to_evaluate(cfg)
    run_dir = _join_processes(cfg)
    _refuse_another_run(cfg, run_dir)
    trained = build.read_config(source.config, f"run={source}", cfg.trust, run_dir.folder)
    known = _override(trained, cfg, source)
    unread = [*unread_keys(cfg), *unread_in_evaluation(cfg)]
    if problems := [*unread, *config_problems(trained, training=False), *trace_problems(cfg, trained)]:
        raise ConfigError(problems)

    config, tokenizer = build.read_export(source)
    other = ModelSource(cfg.pilot.path) if cfg.pilot.path else None
    if other is not None:
        trained.name, trained.pilot.path, trained.copilot.path = "transfer", cfg.pilot.path, str(source.export)
        if problems := transfer_problems(other, config, tokenizer):
            raise ConfigError(problems)
    keeps = known is not None and cfg.fusion.weight == "run" and cfg.fusion.per is None
    weights = [] if keeps else build.evaluation_weights(trained.fusion.weight)
    fits = cfg.fusion.per in GATES or (known is None and trained.fusion.per in GATES)
    data = build.prepare_data(trained, tokenizer, config.pilot, fits, read_shots(source.shots))
    data.remarks += build.split_seed_remarks(data, ModelSource(str(source.export), key="run"), other)
    model = build.load_export(source, config, needs_pilot=other is None)
    if other is not None:
        model = transfer_copilot(other, model, tokenizer)
    model.set_fusion(build.fusion_rule(trained.fusion))
    model.config.feedback = trained.fusion.feedback
    if keeps:
        trained.fusion.weight = known["all"] if isinstance(known, dict) else known

    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prepared = Prepared(build.model_source(trained.pilot, "pilot"), None, tokenizer, data, None)
    with _claimed(trained, run_dir):
        results = _run_evaluator(trained, model, prepared, run_dir, weights, known)
        if cfg.trace and is_first():
            decoding = replace(build.decoding(trained.evaluation), decoding="dynamic")  # timed, so nothing may compile
            evaluator = Evaluator(model, tokenizer, data, run_dir.predictions, decoding)
            weights = {name: results.weight_of(name) for name in data.benchmark_names}
            write_trace(evaluator, trained.evaluation.report_on, run_dir, cfg.trace_rows, source.folder, weights)
        results.params = build.parameter_counts(model)
        _add_training(results, cfg, source)
        log_evaluation([], results, run_dir.folder, most=sys.maxsize)
        if other is not None:
            note = f"the Copilot of {source} on a Pilot that it was not trained with: {cfg.pilot.path}"
            results.notes.insert(0, note)
        return _finish(results, run_dir)


def _override(trained: DictConfig, cfg: DictConfig, source: RunDirectory) -> float | dict[str, float] | None:
    """Put what an evaluation asks for in place of the training run's own settings.

    Returns:
        The run's λ; None if it has none, or if another fusion rule or another Pilot makes it invalid.
    """
    if "_target_" in cfg.data:
        trained.data = cfg.data
    elif cfg.data.path is not None:
        trained.data.path = cfg.data.path
    is_other_rule = cfg.fusion.rule not in (None, trained.fusion.rule)
    for group in ("evaluation", "fusion"):
        whole = group == "evaluation" and None not in (cfg.evaluation.num_beams, cfg.evaluation.modes)
        for key, value in cfg[group].items():  # evaluation=<name> sets every key, and null is one of its values
            if (value is not None or whole) and (key, value) != ("weight", "run"):
                OmegaConf.update(trained, f"{group}.{key}", value, merge=False, force_add=True)
    if cfg.evaluation.modes is None and trained.evaluation.modes == [TARGETS] and evaluates_recording(trained):
        trained.evaluation.modes = ["generation"]  # the Pilot is loaded here
    trained.paths.run_dir, trained.control = cfg.paths.run_dir, None
    if is_other_rule and cfg.fusion.weight == "run":
        raise ConfigError(["fusion.weight=run: that λ suits the run's own fusion rule only; leave fusion=… out"])
    if is_other_rule or cfg.pilot.path or not source.results.exists():
        return None
    return _results_of(source).selected_weight


def _run_to_evaluate(cfg: DictConfig) -> RunDirectory:
    """The finished run whose export is evaluated: `run`, or the one that `copilot.path` belongs to."""
    if bool(cfg.run) == bool(cfg.copilot.path):
        transfer = "pilot.path=<model> copilot.path=<run dir>/export for its Copilot on another Pilot"
        raise ConfigError([f"give run=<run dir> to evaluate a run, or {transfer}"])
    source = RunDirectory(str(cfg.run) if cfg.run else Path(str(cfg.copilot.path)).resolve().parent)
    if not (source.export / "config.json").exists() or not source.config.exists():
        key = f"run={cfg.run}" if cfg.run else f"copilot.path={cfg.copilot.path}"
        what = "export/config.json" if cfg.run else "config.yaml beside the export"
        raise ConfigError([f"{key}: no {what} there; give the folder of a finished training run"])
    return source


def _add_training(results: Results, cfg: DictConfig, source: RunDirectory) -> None:
    """Add the training run's costs, and its controls' figures of what is scored here, on the same rows as there."""
    if not source.results.exists():
        return
    before = _results_of(source)
    results.rounds, results.train_seconds = before.rounds, before.train_seconds
    results.train_flops, results.recording_flops = before.train_flops, before.recording_flops
    if not cfg.pilot.path:
        results.params = before.params
        if cfg.data == {"path": None} and not any(value is not None for value in cfg.evaluation.values()):
            scored = {(row.benchmark, row.metric) for row in results.rows}
            results.controls = [one for one in before.controls if (one.benchmark, one.metric) in scored]


def _run_evaluator(
    cfg: DictConfig,
    model: TCopilotModel,
    prepared: Prepared,
    run_dir: RunDirectory,
    weights: list[float] | None,
    known: float | dict[str, float] | None = None,
    recording: Recording | None = None,
) -> Results:
    decoding = build.decoding(cfg.evaluation)
    where, choice = run_dir.predictions, (cfg.fusion.per, cfg.fusion.select_by)
    if decoding.decoding == "static" and decoding.compile:
        clear_empty_libraries()
    splits = ("validation", cfg.evaluation.report_on)
    evaluator = Evaluator(model, prepared.tokenizer, prepared.data, where, decoding, *choice, recording)
    found = evaluator.run(weights, splits, known)
    notes = list(found.verdicts)
    if weights == []:
        notes.insert(0, "λ is the one that the training run chose (fusion.weight=run)")
    if not model.fusion.has_closed_form:
        found.best_weight = None
    if found.best_weight is not None:
        notes.insert(0, f"λ* in closed form on {splits[0]}: {found.best_weight:.3f}")
    if splits[0] == splits[1]:
        notes.append(f"λ was chosen on the very rows reported ({splits[0]}): the gain is optimistic")
    notes += [
        f"{name}: {len(rows)} rows could not be read and were left out (data.on_error=skip)"
        for name, rows in prepared.data.skipped.items()
        if rows
    ]
    return Results(
        seed=cfg.seed, git=git_revision(), config=RunDirectory.config.name, params={}, rounds=0, train_seconds=0.0,
        selected_weight=found.selected_weight, selected_on=splits[0], reported_on=splits[1],
        rows=found.rows, gain=found.gain, notes=notes + prepared.data.remarks, data=prepared.data.summary(),
        best_weight=found.best_weight, selection=found.selection,
    )  # fmt: skip


def _join_processes(cfg: DictConfig) -> RunDirectory:
    """Join the processes of the job, and let all write to the first one's run directory."""
    folder = cfg.paths.run_dir
    if not isinstance(folder, str) or not folder:
        raise ConfigError([f"paths.run_dir={folder}: give the folder that the run writes to"])
    processes.start()
    cfg.paths.run_dir = agree_on(str(Path(folder).absolute()))
    return RunDirectory(cfg.paths.run_dir)


def _refuse_another_run(cfg: DictConfig, run_dir: RunDirectory) -> None:
    """Refuse a run directory with a training run in it, whose files this program would overwrite."""
    evaluates = "run" in cfg
    finished = run_dir.export.exists() and (evaluates or not run_dir.job.exists())  # a job only meets itself
    if checkpoints(run_dir.checkpoints) or finished:
        mend = "choose another folder" if evaluates else f"continue it with resume={run_dir}, or choose another folder"
        raise ConfigError([f"paths.run_dir={run_dir}: holds the checkpoints or export of an earlier run; {mend}"])


@contextmanager
def _claimed(cfg: DictConfig, run_dir: RunDirectory) -> Iterator[None]:
    """Keep other programs out of the run directory and write the config there; all processes learn if that fails."""
    OmegaConf.update(cfg, "version", __version__, force_add=True)
    problem = None
    with ExitStack() as held:
        try:
            if is_first():
                held.enter_context(run_dir.locked())
                write_whole(run_dir.config, build.saved_config(cfg))
        except Timeout:
            problem = "another program is writing there; wait until it has ended, or choose another folder"
        except OSError as error:
            problem = f"{error.strerror}; choose a folder that can be written"
        if problem := agree_on(problem):
            raise ConfigError([f"paths.run_dir={run_dir}: {problem}"])
        yield


def _save_results(results: Results, run_dir: RunDirectory) -> None:
    if is_first():
        results.save(run_dir.results)


def _results_of(run_dir: RunDirectory) -> Results:
    try:
        return Results.load(run_dir.results)
    except ValueError as error:
        raise ConfigError([f"{error}; remove that file, or evaluate another run"]) from error


def _of_the_pilot(results: Results) -> tuple[int, list[Row]]:
    """What changes where a run goes on for more rounds, or answers in another way; its controls are then trained anew.

    The likelihood is left out, since on a GPU it may differ in its last digits.
    """
    rows = [row for row in results.rows if (row.split, row.weight) == (results.reported_on, 0)]
    return results.rounds, [row for row in rows if row.benchmark != "all"]


def _finish(results: Results, run_dir: RunDirectory) -> float:
    """Write and print the figures; return the gain on validation."""
    _save_results(results, run_dir)
    show_results(results, run_dir.results)
    return sweep.validation_gain(results)
