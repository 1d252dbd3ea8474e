"""Lightning callbacks: the Mistake Log's owner, checkpoints by round, a clean stop, and alarms."""

from tcopilot.callbacks.checkpoint import RoundCheckpoint
from tcopilot.callbacks.health import CopilotHealth
from tcopilot.callbacks.mistake_log import MistakeLogCallback
from tcopilot.callbacks.stop import CleanStop

__all__ = ["CleanStop", "CopilotHealth", "MistakeLogCallback", "RoundCheckpoint"]
