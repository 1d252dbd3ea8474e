"""Which runs record a frozen Pilot once (`tcopilot.app.fit`), which are judged by the recording, what they refuse."""

from collections.abc import Iterator

from omegaconf import DictConfig

from tcopilot.data.module import TCopilotDataModule
from tcopilot.evaluation.modes import LIKELIHOOD, TARGETS
from tcopilot.models.kinds import KINDS

OF_ROUNDS = ("rounds", "data.epochs", "data.rounds", "copilot.steps_per_round", "copilot.own_feedback")
OF_ROUNDS += ("mistake_log.every_n_rounds", "compile")
"""Settings that a fit to a recording, which has no rounds, makes no use of."""
OF_FITS = ("copilot.passes", "copilot.patience", "copilot.averaging", "copilot.own_mistakes")
"""And those that only such a fit uses."""


def fits_from_recording(cfg: DictConfig) -> bool:
    """Whether a run records its frozen Pilot once, in place of running it in every round."""
    kind = KINDS.get(cfg.copilot.kind) if cfg.copilot.enabled else None
    return bool(cfg.pilot.frozen and kind and kind.fits_recordings)


def evaluates_recording(cfg: DictConfig, data: TCopilotDataModule | None = None) -> bool:
    """Whether a run only scores texts that it recorded, so that it does without the Pilot's layers.

    A catalogue in its data is ranked in place of whatever is asked for but `targets` alone.
    """
    tasks = () if data is None else data.benchmarks.values()
    ranks = list(cfg.evaluation.modes) != [TARGETS] and any(task.catalogue is not None for task in tasks)
    return fits_from_recording(cfg) and set(cfg.evaluation.modes) <= {LIKELIHOOD, TARGETS} and not ranks


def recording_problems(cfg: DictConfig) -> Iterator[str]:
    """Settings that contradict a recording, or that ask for one where there is none."""
    fits, mend = fits_from_recording(cfg), "use pilot=frozen copilot=head"
    if not fits and (given := cfg.mistake_log["from"]) is not None:
        yield f"mistake_log.from={given}: recordings are only for a frozen Pilot with a head; {mend}, or leave it out"
    for key, wanted in (("streaming", False), ("held_out", 0)):
        if fits and cfg.data[key] != wanted:
            shown = str(wanted).lower()
            yield f"data.{key}={cfg.data[key]}: a fit uses all rows of its recording; use data.{key}={shown}"
