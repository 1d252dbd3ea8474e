"""Lightning callbacks: the log's owner, checkpoints, random states, a clean stop, alarms, speed, FLOPs, histograms."""

from tcopilot.training.callbacks.alarms import CopilotAlarms
from tcopilot.training.callbacks.checkpoint import RoundCheckpoint
from tcopilot.training.callbacks.copilot_stop import CopilotStop
from tcopilot.training.callbacks.flops import FlopCount
from tcopilot.training.callbacks.graceful_stop import GracefulStop
from tcopilot.training.callbacks.histograms import ErrorHistograms
from tcopilot.training.callbacks.mistake_log import MistakeLogCallback
from tcopilot.training.callbacks.rng_state import RngState
from tcopilot.training.callbacks.throughput import Throughput

__all__ = [
    "CopilotAlarms",
    "CopilotStop",
    "ErrorHistograms",
    "FlopCount",
    "GracefulStop",
    "MistakeLogCallback",
    "RngState",
    "RoundCheckpoint",
    "Throughput",
]
