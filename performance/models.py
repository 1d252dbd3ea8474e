"""Modules with random weights and batches of random tokens, for the scripts that vary shapes."""

from dataclasses import dataclass
from functools import partial

import torch
from shapes import pilot_of
from torch import nn
from transformers import get_scheduler

from tcopilot.data.batch import Batch
from tcopilot.models.adapters import Lora
from tcopilot.models.modeling import fused_class
from tcopilot.training.module import Learner, TCopilotModule


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
