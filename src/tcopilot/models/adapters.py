"""LoRA by peft, for Pilot and Copilot alike: injected into a model in place and merged before export.

Adapters of a quantised Pilot are stored unmerged, since the merged weights would have to be rounded once more.
"""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

LAYER = re.compile(r"(.*?\b(?:layers|blocks?|h))\.(\d+)\.")
"""Matches a module's name; its groups are the list of layers that holds the module, and the layer's index."""


def projections(module: nn.Module) -> list[str]:
    """Names of a module's linear layers, without the names of the parts that hold them."""
    return sorted({name.rpartition(".")[2] for name, part in module.named_modules() if isinstance(part, nn.Linear)})


@dataclass
class Lora:
    """Low-rank adapters on the projections whose names end in one of `targets`; everything else is frozen.

    Updates are scaled by alpha / r. Dropout acts on the adapters' input. `top` is the share of each stack's layers,
    counted from the last one, that get adapters: the layers below then need no backward pass.
    """

    r: int = 32
    alpha: int = 64
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    top: float = 1.0

    def check(self, module: nn.Module) -> None:
        """Raise a ValueError if the adapters do not fit a module, which may lie on the meta device."""
        if isinstance(self.targets, str) or not all(isinstance(name, str) for name in self.targets or ()):
            raise ValueError(f"targets={self.targets}: give a list of names, such as [q_proj, v_proj]")
        self.targets = tuple(self.targets or ())
        names = set(projections(module))
        if missing := sorted(set(self.targets) - names) or ([] if self.targets else ["none"]):
            raise ValueError(
                f"targets={list(self.targets)}: no linear layer is called {', '.join(missing)}; "
                f"there are {', '.join(sorted(names))}"
            )
        numbers = type(self.r) is int and all(type(value) in (int, float) for value in (self.alpha, self.dropout))
        numbers = numbers and type(self.top) in (int, float)
        if not numbers or self.r < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1 or not 0 < self.top <= 1:
            raise ValueError(
                f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, top={self.top}: r must be a whole number, "
                f"at least 1, alpha above 0, dropout in [0, 1) and top in (0, 1]"
            )

    def __call__(self, module: nn.Module) -> None:
        """Inject the adapters in place, in float32 whatever the type of the frozen weights."""
        from peft import LoraConfig, inject_adapter_in_model  # takes up to two seconds, which runs without LoRA save

        self.check(module)
        names = [name for name, part in module.named_modules() if self._is_adapted(name, part, module)]
        options = {"lora_alpha": self.alpha, "lora_dropout": self.dropout, "target_modules": names}
        inject_adapter_in_model(LoraConfig(r=self.r, **options), module)
        _settle(module)

    def _is_adapted(self, name: str, part: nn.Module, module: nn.Module) -> bool:
        if not isinstance(part, nn.Linear) or name.rpartition(".")[2] not in self.targets:
            return False
        if (found := LAYER.match(name)) is None:
            return True
        depth = len(module.get_submodule(found[1]))
        return int(found[2]) >= depth - max(1, round(self.top * depth))


def _settle(module: nn.Module) -> None:
    """Cast new adapters to float32, since peft creates them in the frozen weights' type, and mark them initialised."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    keep_weights(module)


def keep_weights(module: nn.Module) -> None:
    """Mark weights as initialised, or transformers would draw new ones for those that it did not load itself."""
    for part in (*module.modules(), *module.parameters()):
        part._is_hf_initialized = True


OF_PEFT = "base_model.model."
"""Prefix that peft puts before weight names in its files."""


def save_adapters(model: nn.Module, folder: str | Path, base: str) -> None:
    """Write a model's adapters, if it has any, as a folder that peft loads onto the base."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return
    from peft import get_peft_model_state_dict

    config.base_model_name_or_path = base
    config.save_pretrained(folder)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {OF_PEFT + name: weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapters(model: nn.Module, folder: str, subfolder: str, **hub: Any) -> None:
    """Inject, frozen, the adapters that `save_adapters` wrote to a folder, local or on the Hub, if it has any."""
    found = cached_file(
        folder, "adapter_config.json", subfolder=subfolder, **hub, _raise_exceptions_for_missing_entries=False
    )
    if found is None:
        return
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    weights = load_file(cached_file(folder, "adapter_model.safetensors", subfolder=subfolder, **hub))
    inject_adapter_in_model(LoraConfig.from_pretrained(Path(found).parent), model)
    _settle(model)
    set_peft_model_state_dict(model, {name.removeprefix(OF_PEFT): weight for name, weight in weights.items()})
    model.requires_grad_(False)


def merge_adapters(model: nn.Module) -> None:
    """Merge every adapter into the weight that it adapts, in place; what remains is a plain model."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):  # a layer of peft's
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def merged_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the weights that the model would have after `merge_adapters`, and leave the model unchanged.

    None for a model without adapters.
    """
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    if not adapted:
        return None
    weights = model.state_dict()
    for name, module in adapted.items():
        for key in [key for key in weights if key.startswith(f"{name}.")]:
            del weights[key]
        merged = copy.deepcopy(module)  # one layer at a time
        merged.merge()
        weights |= {f"{name}.{key}": value for key, value in merged.get_base_layer().state_dict().items()}
    return weights
