"""The controls by name, and what they ask of the config of the run that they are trained beside."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig

from tcopilot.app.checks.recordings import fits_from_recording

CONTROLS = {
    "equal_time": "Pilot, equal time",
    "equal_flops": "Pilot, equal FLOPs",
    "averaged": "two Pilots averaged",
    "equal_parameters": "Pilot, equal parameters",
    "calibrated": "Pilot, calibrated",
    "tuned": "Pilot, tuned",
    "tuned_for_fit": "Pilot, tuned for the fit's FLOPs",
    "output_head": "Pilot with its output head",
    "twice": "Pilot, twice the rounds",
}
"""Name in the config: name in tables."""
OF_FROZEN = ("equal_time", "equal_flops", "calibrated", "tuned", "tuned_for_fit")
"""Controls of a frozen Pilot; all but the calibrated one train it with LoRA."""


def control_names(given: Any) -> list[str]:
    """The controls that `control` asks for: null, a name or a list of names.

    >>> control_names(None), control_names("averaged")
    ([], ['averaged'])
    """
    if given is None:
        return []
    return list(given) if isinstance(given, ListConfig | list) else [given]


def trains_frozen(cfg: DictConfig) -> bool:
    """Whether a control trains the Pilot that the run itself leaves frozen."""
    return bool(cfg.pilot.frozen and set(control_names(cfg.control)) - {"calibrated"})


def control_problems(cfg: DictConfig) -> Iterator[str]:
    """List the controls that there are not, or that this run cannot have."""
    names, given = control_names(cfg.control), f"control={cfg.control}"
    if any(isinstance(name, bool) or name not in CONTROLS for name in names) or len(set(names)) < len(names):
        yield f"{given}: use one, or a list of different ones, of null, {', '.join(CONTROLS)}"
        return
    if cfg.pilot.frozen and (alone := [name for name in names if name not in OF_FROZEN]):
        own = ", ".join(OF_FROZEN)
        yield f"control={alone} with pilot.frozen=true: a frozen Pilot can only have {own}; leave the others out"
    if "tuned_for_fit" in names and not fits_from_recording(cfg):
        yield f"{given}: no Copilot is fitted to a recording here; use pilot=frozen copilot=head, or control=tuned"
    if set(names) - {"calibrated"} and not cfg.copilot.enabled:
        yield f"{given} with copilot=none: the run itself is the Pilot alone; use control=null"
    if cfg.callbacks.get("copilot_stop") is not None and not cfg.copilot.enabled:
        yield "callbacks.copilot_stop with copilot=none: there is no Copilot to stop; use callbacks=default"
    counting = cfg.callbacks.get("flops") is not None or fits_from_recording(cfg)
    if not counting and ("equal_flops" in names or (cfg.pilot.frozen and "tuned" in names)):
        yield f"{given} without callbacks.flops: nothing counts the joint run's operations; use callbacks=default"
    widths = {"d_model", "hidden_size"} & set(cfg.pilot.config or {})
    if "equal_parameters" in names and (cfg.pilot.path or not widths):
        yield (
            f"{given} with pilot.path={cfg.pilot.path}: only a Pilot built from pilot.config, with its d_model or "
            f"hidden_size, can be made wider; a pretrained one cannot. Leave out equal_parameters"
        )
