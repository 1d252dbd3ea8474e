"""Lightning callbacks: the Mistake Log's owner, checkpoints by round, random states, a clean stop, and alarms."""

from tcopilot.callbacks.checkpoint import RoundCheckpoint
from tcopilot.callbacks.health import CopilotHealth
from tcopilot.callbacks.mistake_log import MistakeLogCallback
from tcopilot.callbacks.random_state import RandomState
from tcopilot.callbacks.stop import CleanStop

__all__ = ["CleanStop", "CopilotHealth", "MistakeLogCallback", "RandomState", "RoundCheckpoint"]
