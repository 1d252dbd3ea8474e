"""Which classes a config read from disk may name.

Hydra imports and calls whatever a `_target_` names. What a user composes on the command line is the user's own, but a
run directory may come from anyone, and evaluating or resuming it must not run what somebody wrote into its config.
"""

import inspect
from collections.abc import Collection, Iterator
from typing import Any

from hydra._internal.utils import _locate
from omegaconf import DictConfig, OmegaConf

LIBRARY_TARGETS = {
    "bitsandbytes.optim.AdamW8bit",
    "lightning.Trainer",
    "lightning.pytorch.callbacks.RichProgressBar",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "torch.optim.AdamW",
    "transformers.get_cosine_with_min_lr_schedule_with_warmup",
    "transformers.get_scheduler",
}
"""What the configs of this package name beside its own classes; a test holds the list to the configs."""


def target_problems(cfg: DictConfig, trusted: Collection[str] = ()) -> list[str]:
    """Say which `_target_`s of a config from disk are not to be built.

    Allowed are classes that this package defines, `LIBRARY_TARGETS`, and what lies in a module of the user's own,
    `trusted` on the command line by `trust=[<module>]`.
    """
    return [
        f"{key}={target}: a config from disk may name only classes of this package and the few of its libraries that "
        f"it uses; if you wrote this run yourself, give trust=[{target.rpartition('.')[0] or target}]"
        for key, target in _targets(OmegaConf.to_container(cfg), "")
        if not _is_allowed(target, trusted)
    ]


def _targets(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every `_target_` at any depth; unresolved, so that an interpolation is refused rather than followed."""
    children = enumerate(node) if isinstance(node, list) else node.items() if isinstance(node, dict) else ()
    for name, value in children:
        place = f"{key}[{name}]" if isinstance(node, list) else f"{key}.{name}" if key else str(name)
        if name == "_target_":
            yield place, str(value)
        else:
            yield from _targets(value, place)


def _is_allowed(target: str, trusted: Collection[str]) -> bool:
    if target in LIBRARY_TARGETS or any(target.startswith(f"{module}.") for module in trusted):
        return True
    if not target.startswith("tcopilot."):
        return False
    try:
        found = _locate(target)
    except Exception:  # whatever stands in the way of finding it
        return False
    # `tcopilot.app.run.sys.exit` is found below this package too: what counts is where a class was written.
    return inspect.isclass(found) and found.__module__.startswith("tcopilot.")
