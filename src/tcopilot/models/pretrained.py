"""What transformers asks of a model besides its forward pass: embeddings, attention, saving, loading, pickling."""

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import output_capturing

from tcopilot.models.adapters import merged_weights, save_adapters
from tcopilot.models.base_copilot import BaseCopilot
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.families import is_cross_attending
from tcopilot.models.kinds import resize_vocabulary
from tcopilot.models.quantised_export import ADAPTER, OF_HUB, load_quantised_export, trained_weights
from tcopilot.run_directory import RunDirectory

ATTENTION = ("eager", "sdpa")
"""Attention kernels that take the Copilot's masks, which are additive."""


class FusedPreTrainedModel(PreTrainedModel):
    """What transformers calls on both parts of a fused model: `pilot`, and `copilot`, which may be None."""

    config_class = TCopilotConfig
    base_model_prefix = "pilot"  # whose input embeddings are this model's, too
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # a Trainer that accumulates gradients then passes the number of all targets
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = []
    _keep_in_fp32_modules_strict = ["copilot"]  # it was trained so, whatever the Pilot's type
    pilot: PreTrainedModel
    copilot: BaseCopilot | None

    def get_output_embeddings(self) -> nn.Module:
        """Return the Pilot's output embeddings."""
        return self.pilot.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the Pilot's output embeddings."""
        self.pilot.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize both models' vocabulary; arguments as in transformers. New tokens are not corrected at first."""
        embeddings = self.pilot.resize_token_embeddings(*args, **kwargs)
        self.vocab_size = self.config.pilot.vocab_size = embeddings.num_embeddings
        if self.copilot is not None:
            resize_vocabulary(self.copilot, embeddings.num_embeddings)
            self.config.copilot = self.copilot.config.to_dict()
        self.static_decoder = None
        return embeddings

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """Recompute activations in the backward pass of both models; arguments as in transformers.

        Raises:
            ValueError: for re-entrant checkpoints, which lose the gradients of all inputs of a layer but the first.
        """
        reads_log = self.copilot is not None and self.copilot.body is not None
        reads_log = reads_log and not is_cross_attending(self.copilot.body)
        if reads_log and (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True: the layers of this Copilot read the log beside their input, and re-entrant "
                "checkpoints lose its gradient; leave it out, or use False"
            )
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Make the embedded text require gradients, by a hook that, unlike transformers' own, can be pickled."""
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(_require_grad)
        self._require_grads_hooks = [self._require_grads_hook]

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Choose both models' attention kernel; the Copilot keeps its own if the new one takes no additive masks."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        if self.copilot is not None:
            follow_attention(self.copilot, self.pilot)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load a fused model; arguments as in transformers. A device map may offload the Pilot, not the Copilot.

        Raises:
            ValueError: if a device map separates what one model reads of the other.
            OSError: as in transformers, and if the folder holds a Copilot without its Pilot.
        """
        if (alone := Path(name, Path(RunDirectory.copilot_alone.name).name)).is_file():
            raise OSError(
                f"{alone} is a Copilot alone, of a run that was judged by its recording; evaluate it by eval.py "
                f"run=<run>, or let the run export both models with resume=<run> evaluation.modes=[generation]"
            )
        config = kwargs.get("config")
        if config is None:
            config = cls.config_class.from_pretrained(name, **{key: kwargs[key] for key in OF_HUB if key in kwargs})
        if getattr(config, "base", None) is not None:
            return load_quantised_export(cls, str(name), **kwargs | {"config": config})
        found = super().from_pretrained(name, *args, **kwargs)
        check_placement(found[0] if isinstance(found, tuple) else found)
        return found

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Write a folder that `from_pretrained` loads; adapters inside either model are merged in what is written.

        Of a quantised Pilot, only the adapters and the name of its base are written.
        """
        if (base := self.config.base) is not None:
            merged, kwargs["max_shard_size"] = trained_weights(self.copilot), "1TB"
            if is_main_process:
                save_adapters(self.pilot, Path(save_directory) / ADAPTER, base["path"])
        else:
            merged = merged_weights(self)
        super().save_pretrained(save_directory, is_main_process, state_dict if merged is None else merged, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: without compiled code, and without hooks that the next forward pass installs again."""
        for module in self.modules():
            for key, hook in list(module._forward_hooks.items()):
                if hook.__module__ == output_capturing.__name__:
                    del module._forward_hooks[key]
            vars(module).pop("_output_capturing_hooks_installed", None)
        return {**vars(self), "static_decoder": None}

    def _init_weights(self, module: nn.Module) -> None:
        """Both models initialise themselves."""


def check_pilot(config: PreTrainedConfig, pilot: PreTrainedModel | None) -> None:
    """Raise a ValueError where a fused model has no Pilot, or one without a language modelling head."""
    if pilot is None and getattr(config, "pilot", None) is None:
        raise ValueError(
            "this config names no Pilot: it is a plain model's; load that model with transformers' own class and fuse "
            "it by from_pilot(model)"
        )
    if pilot is not None and pilot.get_output_embeddings() is None:
        raise ValueError(
            f"{type(pilot).__name__} has no language modelling head, whose errors a Copilot corrects; load the Pilot "
            f"with AutoModelForCausalLM or AutoModelForSeq2SeqLM"
        )


def check_placement(model: FusedPreTrainedModel) -> None:
    """Raise a ValueError where a device map puts weights that the Copilot uses out of its reach."""
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()} - {"cpu", "disk"}
    if len(devices) > 1:
        raise ValueError(
            f"device_map spreads the fused model over the devices {', '.join(sorted(devices))}, and each model reads "
            f"the other's tensors; give one device, beside 'cpu' or 'disk' for layers of the Pilot"
        )
    if model.copilot is None:
        return
    if any(parameter.is_meta for parameter in model.copilot.parameters()):
        raise ValueError(
            "device_map offloads the Copilot, which is called part by part and must stay in memory; name a device for "
            "'copilot', as in device_map={'pilot': 'disk', 'copilot': 0}"
        )
    if (unembedding_VC := model.copilot.unembedding_VC) is not None and unembedding_VC.is_meta:
        raise ValueError(
            "device_map offloads the Pilot's output embeddings, which this Copilot reads; offload no more than "
            "layers of the Pilot"
        )


def follow_attention(copilot: BaseCopilot, pilot: PreTrainedModel) -> None:
    """Give a Copilot's layers the attention kernel of its Pilot where it takes additive masks."""
    chosen = pilot.config._attn_implementation
    if copilot.body is not None and chosen in ATTENTION:
        copilot.body.config._attn_implementation = chosen


def _require_grad(module: nn.Module, given: Any, embedded: Tensor) -> None:
    embedded.requires_grad_(True)
