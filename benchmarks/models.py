"""Modules with random weights and batches of random tokens, for the benchmarks that vary shapes."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config, get_scheduler

from tcopilot.adapters import Lora
from tcopilot.data.batch import Batch
from tcopilot.modeling import fused_class
from tcopilot.module import Learner, TCopilotModule


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
        torch.manual_seed(0)
        dtype = torch.bfloat16 if self.lora else torch.float32
        special = {"vocab_size": self.vocab, "pad_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": True}
        heads = self.width // 64 or 1
        if self.architecture == "t5":
            config = T5Config(
                d_model=self.width, d_kv=64, num_heads=heads, d_ff=4 * self.width, num_layers=self.layers,
                decoder_start_token_id=0, **special,
            )  # fmt: skip
            pilot = AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)
        else:
            config = LlamaConfig(
                hidden_size=self.width, intermediate_size=4 * self.width, num_hidden_layers=self.layers,
                num_attention_heads=heads, num_key_value_heads=heads, **special,
            )  # fmt: skip
            pilot = AutoModelForCausalLM.from_config(config, dtype=dtype)
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
