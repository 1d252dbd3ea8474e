"""Transformer Copilot: a fine-tuned language model that learns from its own training mistakes (arXiv 2505.16270)."""

from tcopilot.cache import TCopilotCache
from tcopilot.configuration import TCopilotConfig
from tcopilot.copilot import Copilot, CopilotConfig
from tcopilot.modeling import TCopilotForCausalLM, TCopilotForSeq2SeqLM

__version__ = "0.1.0"
__all__ = [
    "Copilot",
    "CopilotConfig",
    "TCopilotCache",
    "TCopilotConfig",
    "TCopilotForCausalLM",
    "TCopilotForSeq2SeqLM",
]
