"""Lightning callbacks: the log's owner, checkpoints, random states, a clean stop, alarms, speed, FLOPs, histograms."""

from tcopilot.training.callbacks.alarms import CopilotHealth
from tcopilot.training.callbacks.checkpoint import RoundCheckpoint
from tcopilot.training.callbacks.clean_stop import CleanStop
from tcopilot.training.callbacks.copilot_stop import CopilotStop
from tcopilot.training.callbacks.flops import FlopCount
from tcopilot.training.callbacks.histograms import ErrorHistograms
from tcopilot.training.callbacks.mistake_log import MistakeLogCallback
from tcopilot.training.callbacks.random_state import RandomState
from tcopilot.training.callbacks.same_settings import Agreement
from tcopilot.training.callbacks.throughput import Throughput

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
