"""Lightning callbacks: the log's owner, checkpoints, random states, a clean stop, alarms, speed, FLOPs, histograms."""

from tcopilot.callbacks.agreement import Agreement
from tcopilot.callbacks.checkpoint import RoundCheckpoint
from tcopilot.callbacks.copilot_stop import CopilotStop
from tcopilot.callbacks.flops import FlopCount
from tcopilot.callbacks.health import CopilotHealth
from tcopilot.callbacks.histograms import ErrorHistograms
from tcopilot.callbacks.mistake_log import MistakeLogCallback
from tcopilot.callbacks.random_state import RandomState
from tcopilot.callbacks.stop import CleanStop
from tcopilot.callbacks.throughput import Throughput

__all__ = [
    "Agreement",
    "CleanStop",
    "CopilotHealth",
    "CopilotStop",
    "ErrorHistograms",
    "FlopCount",
    "MistakeLogCallback",
    "RandomState",
    "RoundCheckpoint",
    "Throughput",
]
