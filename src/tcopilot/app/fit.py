"""Training with a frozen Pilot and a Copilot that reads target positions only: record once, fit in seconds."""

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ProgressBar
from omegaconf import DictConfig, OmegaConf

from tcopilot.app import build
from tcopilot.app.build import Prepared
from tcopilot.app.checks.problems import ConfigError
from tcopilot.app.checks.recordings import evaluates_recording, learns_from_options
from tcopilot.app.console import show_fit
from tcopilot.app.jobs import STOPPED
from tcopilot.app.joint import Trained
from tcopilot.app.trainer import make_callbacks, make_trainer
from tcopilot.data.prepare import option_rows
from tcopilot.evaluation.modes import LIKELIHOOD
from tcopilot.evaluation.progress import progress
from tcopilot.mistake_log.recording import RecordedPilot, Recording, RecordingError, missing_rows
from tcopilot.models.pilot_files import digest, load_unembedding
from tcopilot.processes import STOP_SIGNALS, agree_on
from tcopilot.run_directory import RunDirectory
from tcopilot.training.callbacks.flops import FlopCount, FlopCounter
from tcopilot.training.fit import CopilotFit, KeepBest
from tcopilot.training.recorded_data import RecordedData

log = logging.getLogger(__name__)
LIMITS = "max_train_rows", "max_eval_rows"  # of the data


def fit(cfg: DictConfig, prepared: Prepared, run_dir: RunDirectory) -> Trained:
    """Record what is not recorded yet, and fit a new Copilot to it.

    Raises:
        ConfigError: if the recording given is of another Pilot, or lacks some of the rows.
    """
    own, given = prepared.config, cfg.mistake_log["from"]  # `own` notes which keys are read
    donor = prepared.donor  # if given, an export with a trained head
    read = own.copilot.depths if donor is None else donor.trained_copilot["depths"]
    try:
        recording = _recording(cfg, prepared, run_dir, read)
    except RecordingError as error:
        raise ConfigError([f"mistake_log.from={given}: {error}" if given else str(error)]) from error
    judged = evaluates_recording(cfg, prepared.data)
    # A new recording holds the reported rows as well, so that later fits can be evaluated from it.
    reported = [cfg.evaluation.report_on] if judged or given is None else []
    parts = {split: prepared.data.rows_of(split) for split in ("train", "validation", *reported)}
    answered = {"train", "validation"} if learns_from_options(cfg) else set()
    if LIKELIHOOD in cfg.evaluation.modes and reported:
        unanswered = cfg.fusion.select_by == "nll" and cfg.fusion.weight != "auto"  # validation, see `Evaluator.run`
        answered |= {*reported, *([] if unanswered else ["validation"])}
    options = [option for split in sorted(answered) for row in parts[split] for option in option_rows(row)]
    parts |= {"options": options} if options else {}
    data = RecordedData(
        recording, parts["train"], parts["validation"], list(chain(*parts.values())), read,
        own.copilot.batch_size, own.copilot.passes, cfg.seed,
        lambda rows, device: _record(recording, prepared, pilot, rows, device, cfg), learns_from_options(cfg),
    )  # fmt: skip
    if data.missing and given is not None:
        alike = "data, template, shots and tokenizer must be those of the recording"
        given_limits = (f"data.{key}={cfg.data[key]}" for key in LIMITS if cfg.data[key] is not None)
        if limits := " and ".join(given_limits):  # other limits may choose other rows
            alike += f", and so must {limits}, unless all rows were recorded"
        lacking = {part: sum(1 for _ in missing_rows(recording, rows)) for part, rows in parts.items()}
        if learns_from_options(cfg) and not any(count for part, count in lacking.items() if part != "options"):
            alike = "it was recorded without copilot.wrong_options=true"
        which = ", ".join(f"{count} {part}" for part, count in lacking.items() if count)
        missing = f"{len(data.missing)} of {data.distinct} rows are not in it ({which})"
        raise ConfigError([f"mistake_log.from={given}: {missing}; {alike}. To record these rows, leave it out"])
    load = prepared.pilot.load if data.missing else partial(load_unembedding, prepared.pilot)
    pilot = load(prepared.tokenizer)
    pilot.requires_grad_(False).eval()
    copilot = build.make_copilot(own, prepared, pilot)
    learner, objective = build.learner(own.copilot, data.updates), instantiate(own.objective)
    options = learns_from_options(own)
    module = CopilotFit(copilot, pilot, learner, data.updates, objective, own.copilot.own_mistakes, options)
    best = KeepBest(own.copilot.patience, own.copilot.averaging)
    count = FlopCount(min(100, own.copilot.patience * data.updates_per_pass))  # no fit ends before one is counted
    bars = [callback for callback in make_callbacks(cfg) if isinstance(callback, ProgressBar)]
    checks = {"val_check_interval": data.updates_per_pass, "limit_val_batches": 1.0 if len(data.validation) else 0}
    checks["num_sanity_val_steps"] = 0 if donor is None else -1  # a trained head is validated before its first update
    by_pass = OmegaConf.merge(cfg, {"trainer": checks})
    trainer = make_trainer(by_pass, [best, count, *bars], None, data.updates)
    model = build.fuse(own, prepared, pilot, copilot)
    params = build.parameter_counts(model)
    show_fit(cfg, prepared, params, data)
    with _stopping(run_dir):
        trainer.fit(module, datamodule=data)
    if not judged and any(weight.is_meta for weight in pilot.parameters()):
        model = build.fuse(cfg, prepared, prepared.pilot.load(prepared.tokenizer), copilot)
    device = trainer.strategy.root_device
    for part in (copilot, model.pilot.get_output_embeddings()) if judged else (model,):
        part.to(device)
    as_given = "untrained" if donor is None else "as it was"
    kept = f"after pass {best.best_pass} of {best.passes}" if best.best_pass else f"{as_given}, as no pass improved it"
    needed = [text for rows in (data.train, data.validation) for texts in rows.texts for text in texts]
    recorded_seconds, recorded_flops = recording.cost_of(needed)
    what, rate = "targets and options" if module.wrong_options else "rows", len(needed) / max(recorded_seconds, 1e-9)
    note = (
        f"{len(needed):,} {what} to learn from and to validate on were recorded in {recorded_seconds:.0f} s "
        f"({rate:.1f} a second), and the Copilot was fitted to {len(data.train):,} rows in {module.seconds:.1f} s; it "
        f"is kept {kept}"
    )
    seconds = agree_on(round(recorded_seconds + module.seconds, 2))
    flops = recorded_flops + (count.total() or 0.0)
    return Trained(
        model, trainer.global_step, seconds, flops, params, trainer.loggers, [note], recording, recorded_flops
    )


def _recording(cfg: DictConfig, prepared: Prepared, run_dir: RunDirectory, read: Sequence[float]) -> Recording:
    config, given = prepared.pilot.model_config, cfg.mistake_log["from"]
    depths = tuple(sorted({*map(float, read), 1.0}))
    about = RecordedPilot(
        digest(prepared.pilot), depths, config.vocab_size, config.hidden_size, str(cfg.mistake_log.log.dtype)
    )
    if given is None:
        return Recording.open(run_dir.recording, about)
    folder = _recorded_at(Path(given))
    Recording.read_header(folder)
    return Recording.open(folder, about)


def _recorded_at(folder: Path) -> Path:
    """The recording at a folder: the folder itself, a run's own, or the one that the run was fitted to."""
    run = RunDirectory(folder)
    if (folder / Recording.HEADER).exists():
        return folder
    if not run.recording.exists() and run.config.exists():
        fitted_to = OmegaConf.select(OmegaConf.load(run.config), "mistake_log.from")
        return _recorded_at(Path(fitted_to)) if fitted_to else run.recording
    return run.recording


def _record(
    recording: Recording, prepared: Prepared, pilot: Any, rows: Sequence[Any], device: torch.device, cfg: DictConfig
) -> None:
    """Record this process's share of the rows by benchmark, since the rows of a benchmark share their shots.

    They come in order of length, and FLOPs are counted in the pass of the middle ones.
    """
    pilot.to(device)
    size = cfg.pilot.micro_batch_size or cfg.data.eval_batch_size
    with progress("Recording", len(rows)) as bar:
        for _, members in groupby(rows, key=lambda row: row["benchmark"]):
            alike, counter = list(members), FlopCounter()
            first = max(0, (len(alike) - size) // 2)
            middle, rest = alike[first : first + size], alike[:first] + alike[first + size :]
            add = partial(
                recording.add, pilot=pilot, collate=prepared.data.collate, batch_size=size, done=bar,
                flops=lambda counter=counter, middle=middle: counter.flops / len(middle),
            )  # fmt: skip
            with counter:
                add(middle)
            add(rest)


@contextmanager
def _stopping(run_dir: RunDirectory) -> Iterator[None]:
    """Let a signal stop a recording; records made so far are kept, and the same run continues from them."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()  # where alone Python handles signals
    before = {number: signal.signal(number, stop) for number in (STOP_SIGNALS if is_main else ())}
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        log.info("Stopped; the records made so far are kept. Go on with: %s", run_dir.go_on)
        sys.exit(STOPPED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
