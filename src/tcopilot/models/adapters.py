"""LoRA by peft, for Pilot and Copilot alike: injected into a model in place and merged before export."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass
class Lora:
    """Low-rank adapters on the projections whose names end in one of `targets`; everything else is frozen.

    Updates are scaled by alpha / r. Dropout acts on the adapters' input.
    """

    r: int = 32
    alpha: int = 64
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

    def check(self, module: nn.Module) -> None:
        """Raise a ValueError if the adapters do not fit a module, which may lie on the meta device."""
        if isinstance(self.targets, str) or not all(isinstance(name, str) for name in self.targets or ()):
            raise ValueError(f"targets={self.targets}: give a list of names, such as [q_proj, v_proj]")
        self.targets = tuple(self.targets or ())
        names = {name.rsplit(".", 1)[-1] for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        if missing := sorted(set(self.targets) - names) or ([] if self.targets else ["none"]):
            raise ValueError(
                f"targets={list(self.targets)}: no linear layer is called {', '.join(missing)}; "
                f"there are {', '.join(sorted(names))}"
            )
        numbers = type(self.r) is int and all(type(value) in (int, float) for value in (self.alpha, self.dropout))
        if not numbers or self.r < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}: r must be a whole number, at least 1, "
                f"alpha above 0 and dropout in [0, 1)"
            )

    def __call__(self, module: nn.Module) -> None:
        """Inject the adapters in place, in float32 whatever the type of the frozen weights."""
        from peft import LoraConfig, inject_adapter_in_model  # takes up to two seconds, which runs without LoRA save

        self.check(module)
        options = {"lora_alpha": self.alpha, "lora_dropout": self.dropout, "target_modules": list(self.targets)}
        inject_adapter_in_model(LoraConfig(r=self.r, **options), module)
        for parameter in module.parameters():
            if parameter.requires_grad:  # peft gives adapters the frozen weights' type; optimisers need float32
                parameter.data = parameter.data.float()


def merge_adapters(model: nn.Module) -> None:
    """Merge every adapter into the weight that it adapts, in place; what remains is a plain model."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):  # a layer of peft's
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
