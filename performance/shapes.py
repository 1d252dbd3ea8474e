"""Models of the shapes that the scripts time. Weights are random: the time of a step does not depend on them."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, PreTrainedModel, T5Config

SIZES = {  # vocabulary, width, layers, heads, feed-forward width
    "tiny": (4096, 128, 4, 8, 512),
    "small": (4096, 256, 6, 4, 1024),
    "llama-3.2-1b": (128_256, 2048, 16, 32, 8192),
    "llama-3.2-3b": (128_256, 3072, 28, 24, 8192),
    "flan-t5-base": (32_128, 768, 12, 12, 2048),
}


def pilot_of(
    architecture: str, size: str | tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A Pilot of an architecture, `llama` or `t5`, in one of the sizes, or in five figures of one's own."""
    torch.manual_seed(0)
    vocab, width, layers, heads, inner = SIZES[size] if isinstance(size, str) else size
    special = {"vocab_size": vocab, "pad_token_id": 0, "eos_token_id": 1}
    if architecture == "t5":
        config = T5Config(
            d_model=width, d_kv=width // heads, num_heads=heads, d_ff=inner, num_layers=layers,
            decoder_start_token_id=0, **special,
        )  # fmt: skip
        return AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=min(heads, 8), max_position_embeddings=4096, tie_word_embeddings=True, **special,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def copilot_options(size: str) -> dict[str, object]:
    """Head and error input of a Copilot: trained in full where the vocabulary is small, else those of LoRA runs."""
    head = "linear" if size in ("tiny", "small") else "soft"
    return {"head": head, "train_error_input": head == "linear"}
