"""Which runs record a frozen Pilot once (`tcopilot.app.fit`), which are judged by the recording, what they refuse."""

from collections.abc import Iterator

from omegaconf import DictConfig

from tcopilot.data.module import TCopilotDataModule
from tcopilot.evaluation.modes import LIKELIHOOD, TARGETS
from tcopilot.models.kinds import KINDS
from tcopilot.training.objectives import CrossEntropy

OF_ROUNDS = ("rounds", "data.epochs", "data.rounds", "copilot.steps_per_round", "copilot.own_feedback")
OF_ROUNDS += ("mistake_log.every_n_rounds", "compile")
"""Settings that a fit to a recording, which has no rounds, makes no use of."""
OF_FITS = ("copilot.passes", "copilot.patience", "copilot.averaging", "copilot.own_mistakes", "copilot.wrong_options")
"""And those that only such a fit uses."""
OF_LIKELIHOOD = f"{CrossEntropy.__module__}.{CrossEntropy.__name__}"


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


def learns_from_options(cfg: DictConfig) -> bool:
    """Whether a fit compares the options of its rows."""
    return fits_from_recording(cfg) and bool(cfg.copilot.get("wrong_options"))  # not in configs of earlier runs


def recording_problems(cfg: DictConfig) -> Iterator[str]:
    """Settings that contradict a recording, or that ask for one where there is none."""
    fits, mend = fits_from_recording(cfg), "use pilot=frozen copilot=head"
    if not fits and (given := cfg.mistake_log["from"]) is not None:
        yield f"mistake_log.from={given}: recordings are only for a frozen Pilot with a head; {mend}, or leave it out"
    for key, wanted in (("streaming", False), ("held_out", 0)):
        if fits and cfg.data[key] != wanted:
            shown = str(wanted).lower()
            yield f"data.{key}={cfg.data[key]}: a fit uses all rows of its recording; use data.{key}={shown}"
    if learns_from_options(cfg) and (target := str(cfg.objective["_target_"])) != OF_LIKELIHOOD:
        name = target.rpartition(".")[2]
        yield f"copilot.wrong_options=true compares likelihoods, which {name} does not train; use objective=ce"


def option_problems(cfg: DictConfig, data: TCopilotDataModule) -> Iterator[str]:
    """A fit that is to compare options, to rows that have none, or whose target is not one of them."""
    if not learns_from_options(cfg):
        return
    if not any(map(data.has_options, data.benchmark_names)):
        names = ", ".join(data.benchmark_names)
        yield f"copilot.wrong_options=true: the rows of {names} have no options; leave it out"
    for index, name in enumerate(data.benchmark_names):
        rows = [row for split in ("train", "validation") for row in data.rows_of(split) if row["benchmark"] == index]
        if other := sum(bool(row.get("option_ids")) and row["target_ids"] not in row["option_ids"] for row in rows):
            yield (
                f"copilot.wrong_options=true: the target of {other} of {len(rows)} rows is not one of its options, "
                f"token for token; let data.benchmarks.{name}.target end with the option, or leave it out"
            )
