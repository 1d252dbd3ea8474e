"""Models with random weights, on which the time of a step does not depend, and batches of random tokens."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
    get_scheduler,
)

from tcopilot.data.batch import Batch
from tcopilot.models.adapters import Lora
from tcopilot.models.modeling import fused_class
from tcopilot.training.learner import Learner
from tcopilot.training.module import TCopilotModule

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


@dataclass(frozen=True)
class Shape:
    """What is put through which model.

    Attributes:
        architecture: `llama` or `t5`.
        vocab: V.
        width: of Pilot and Copilot; feed-forward layers are four times as wide.
        layers: of both decoders, and of an encoder.
        rows: of a batch.
        source: tokens of a prompt.
        target: tokens of a target.
        lora: adapters in both models, a soft head, and everything else frozen in bfloat16.
    """

    architecture: str = "llama"
    vocab: int = 4096
    width: int = 128
    layers: int = 4
    rows: int = 8
    source: int = 128
    target: int = 16
    lora: bool = False

    def module(self, joint: bool = True, rounds: int = 1) -> TCopilotModule:
        """Build the module; joint rounds have a Copilot, others are plain fine-tuning."""
        heads = self.width // 64 or 1
        size = (self.vocab, self.width, self.layers, heads, 4 * self.width)
        pilot = pilot_of(self.architecture, size, torch.bfloat16 if self.lora else torch.float32)
        cls = fused_class(pilot.config.is_encoder_decoder)
        options = {"head": "soft", "train_error_input": False} if self.lora else {}
        model = cls.from_pilot(pilot, **options) if joint else cls(cls.config_class(pilot.config), pilot)
        if joint:
            nn.init.normal_(next(model.copilot.head.parameters()), std=0.02)
        if self.lora:
            names = ("q", "k", "v", "wi", "wo") if self.architecture == "t5" else Lora.targets
            for body in [pilot, model.copilot.body] if joint else [pilot]:
                Lora(targets=names)(body)
        learner = Learner(torch.optim.AdamW, partial(get_scheduler, name="constant"))
        copilot = {"copilot_batch_size": self.rows, "steps_per_round": 1} if joint else {}
        return TCopilotModule(model, learner, learner if joint else None, rounds, **copilot)

    def batch(self, seed: int = 0) -> Batch:
        """Rows without padding."""
        generator = torch.Generator().manual_seed(seed)
        source, target = (
            torch.randint(2, self.vocab, (self.rows, length), generator=generator)
            for length in (self.source, self.target)
        )
        ids = torch.arange(self.rows) + self.rows * seed
        return Batch(source, source > 0, target, target > 0, ids, torch.zeros_like(ids))
