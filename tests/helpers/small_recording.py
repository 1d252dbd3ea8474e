"""A recording of a tiny Pilot with 600 tokens, for tests of fits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tcopilot.data.batch import PromptTargetCollator
from tcopilot.mistake_log.recording import RecordedPilot, Recording

DEPTHS = (0.5, 1.0)


def recorded(folder: Path, pilot: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> Recording:
    """The recording of some prepared rows."""
    recording = Recording.open(folder, RecordedPilot("a", DEPTHS, 600, pilot.config.hidden_size, "float32"))
    recording.add(rows, pilot, PromptTargetCollator(0, "left"), 8)
    return recording
