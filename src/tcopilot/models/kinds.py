"""The kinds of Copilot, by the name that a config and an export give (`kind`)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tcopilot.models.base_copilot import BaseCopilot
from tcopilot.models.calibration import Calibration
from tcopilot.models.copilot import Copilot
from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.settings import Rule

KINDS: dict[str, type[BaseCopilot]] = {
    copilot.config_class.kind: copilot for copilot in (Copilot, HeadCopilot, Calibration)
}


def settings_of(kind: str) -> dict[str, Rule]:
    """The rules for a kind's config and for its `from_pilot`; for an unknown kind, those of all kinds."""
    parts = [KINDS[kind]] if kind in KINDS else KINDS.values()
    return {name: rule for part in parts for name, rule in (part.SETTINGS | part.config_class.SETTINGS).items()}


def learns(kind: str) -> bool:
    """Whether a kind is trained on the Mistake Log; if not, it is fitted on validation rows after training."""
    return kind not in KINDS or KINDS[kind].learns


def new_copilot(pilot: PreTrainedModel, kind: str = "decoder", **options: Any) -> BaseCopilot:
    """Build a Copilot of a kind for a Pilot; options are those of its `from_pilot`.

    Raises:
        ValueError: if there is no such kind.
    """
    return _of(kind).from_pilot(pilot, **options)


def empty_copilot(settings: Mapping[str, Any]) -> BaseCopilot:
    """A Copilot without trained weights, from the settings that an export keeps of it."""
    copilot = _of(settings.get("kind", "decoder"))
    return copilot(copilot.config_class(**{name: value for name, value in settings.items() if name != "kind"}))


def resize_vocabulary(copilot: BaseCopilot, vocab_size: int) -> None:
    """Cut or extend all that a Copilot holds for each token; rows of zeros leave new tokens uncorrected."""
    settings = copilot.config.to_dict() | {"vocab_size": vocab_size}
    with torch.device("meta"):
        wanted = dict(empty_copilot(settings).named_parameters())
    for name, own in copilot.named_parameters():
        if name in wanted and own.shape != wanted[name].shape:
            added = max(0, vocab_size - len(own))
            own.data = nn.functional.pad(own.data[:vocab_size], (*(0, 0) * (own.dim() - 1), 0, added))
    copilot.config.vocab_size = vocab_size


def _of(kind: str) -> type[BaseCopilot]:
    if kind not in KINDS:
        raise ValueError(f"copilot.kind={kind}: use one of {', '.join(KINDS)}")
    return KINDS[kind]
