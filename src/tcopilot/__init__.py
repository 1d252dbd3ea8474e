"""Transformer Copilot: a fine-tuned language model that learns from its own training mistakes (arXiv 2505.16270)."""

from tcopilot.models.caches import TCopilotCache
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.copilot import Copilot, CopilotConfig
from tcopilot.models.modeling import TCopilotForCausalLM, TCopilotForSeq2SeqLM
from tcopilot.version import __version__

__all__ = [
    "Copilot",
    "CopilotConfig",
    "TCopilotCache",
    "TCopilotConfig",
    "TCopilotForCausalLM",
    "TCopilotForSeq2SeqLM",
    "__version__",
]
