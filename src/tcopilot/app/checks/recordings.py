"""Which runs record a frozen Pilot once (`tcopilot.app.fit`), which are judged by the recording, what they refuse."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from tcopilot.evaluation.modes import RECORDED
from tcopilot.models.kinds import KINDS

OF_ROUNDS = ("rounds", "data.epochs", "data.rounds", "copilot.steps_per_round", "copilot.own_feedback")
OF_ROUNDS += ("mistake_log.every_n_rounds", "compile")
"""Settings that a fit to a recording, which has no rounds, makes no use of."""
OF_FITS = ("copilot.passes", "copilot.patience")
"""And those that only such a fit uses."""


def fits_from_recording(cfg: DictConfig) -> bool:
    """Whether a run records its frozen Pilot once, in place of running it in every round."""
    kind = KINDS.get(cfg.copilot.kind) if cfg.copilot.enabled else None
    return bool(cfg.pilot.frozen and kind and kind[0].fits_recordings)


def evaluates_recording(cfg: DictConfig) -> bool:
    """Whether a run scores recorded targets in place of answering rows, so that it never needs the Pilot's layers."""
    return list(cfg.evaluation.modes) == [RECORDED]


def recording_problems(cfg: DictConfig, controls: list[str]) -> Iterator[str]:
    """Settings that contradict a recording, or that ask for one where there is none."""
    fits, mend = fits_from_recording(cfg), "use pilot=frozen copilot=head"
    if not fits and (given := cfg.mistake_log["from"]) is not None:
        yield f"mistake_log.from={given}: only a frozen Pilot is recorded, for a head; {mend}, or leave it out"
    for key, wanted in (("streaming", False), ("held_out", 0)):
        if fits and cfg.data[key] != wanted:
            shown = str(wanted).lower()
            yield f"data.{key}={cfg.data[key]}: a recording holds all rows, and all are fitted; use data.{key}={shown}"
    if RECORDED not in cfg.evaluation.modes:
        return
    key = f"evaluation.modes={list(cfg.evaluation.modes)}"
    if len(cfg.evaluation.modes) > 1:
        yield f"{key}: recorded stands for the likelihood alone, without answers; leave out the others"
    if not fits:
        yield f"{key}: only a frozen Pilot is recorded; {mend}, or evaluation=greedy"
    if cfg.fusion.weight == "auto" or cfg.fusion.per != "all":
        yield f"{key}: one λ is chosen by likelihood; give fusion.weight=<numbers> and fusion.per=all"
    if controls:
        yield f"{key} with control={cfg.control}: controls answer rows; use evaluation=greedy, or control=null"
