"""LoRA by peft, for Pilot and Copilot alike: injected into the model at hand, merged before export."""

from __future__ import annotations

from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@dataclass
class Lora:
    """Low-rank adapters on the projections named by `targets`; everything else of the given module is frozen.

    Attributes:
        r: rank.
        alpha: scale numerator; updates are scaled by alpha / r.
        dropout: on the adapters' input.
        targets: suffixes of the module names that get an adapter.
    """

    r: int = 32
    alpha: int = 64
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

    def __call__(self, module: nn.Module) -> None:
        """Inject the adapters in place.

        Raises:
            ValueError: if no module has one of the target names.
        """
        names = {name.rsplit(".", 1)[-1] for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        if not names & set(self.targets):
            raise ValueError(
                f"adapter.targets={list(self.targets)}: the model has no such modules; it has {sorted(names)}"
            )
        config = LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=list(self.targets)
        )
        inject_adapter_in_model(config, module)


def merge_adapters(model: nn.Module) -> None:
    """Fold every adapter into the weight that it adapts, in place: a plain model remains."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
