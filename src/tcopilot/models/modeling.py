"""The fused models of both architectures, by their Pilot's kind and by transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tcopilot.models.causal import TCopilotForCausalLM
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.seq2seq import TCopilotForSeq2SeqLM


def fused_class(is_encoder_decoder: bool) -> type[TCopilotForCausalLM | TCopilotForSeq2SeqLM]:
    """The fused class for a Pilot of that architecture."""
    return TCopilotForSeq2SeqLM if is_encoder_decoder else TCopilotForCausalLM


AutoConfig.register("t_copilot", TCopilotConfig)
AutoModelForCausalLM.register(TCopilotConfig, TCopilotForCausalLM)
AutoModelForSeq2SeqLM.register(TCopilotConfig, TCopilotForSeq2SeqLM)
