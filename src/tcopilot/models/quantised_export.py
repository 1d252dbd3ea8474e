"""The export of a fused model whose Pilot is quantised: what was trained, beside the name of the base.

The folder holds the Copilot's weights (`model.safetensors`), the Pilot's adapters as peft saves them (`adapter/`), and
a config that names the base and its quantisation. Loading reads the base where it is and quantises it as before, so
that the model is the one that was trained, to the bit.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from tcopilot.models.adapters import load_adapters, merged_weights
from tcopilot.models.base_copilot import BaseCopilot
from tcopilot.models.configuration import TCopilotConfig
from tcopilot.models.kinds import empty_copilot
from tcopilot.models.quantization import options_of, quantised_settings

WEIGHTS = "model.safetensors"
ADAPTER = "adapter"
OF_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def base_of(pilot: PreTrainedModel) -> dict[str, str | None]:
    """Where the weights of a quantised Pilot were read: a folder, or a Hub id and its commit."""
    path = pilot.config.name_or_path
    is_local = Path(path).is_dir()
    commit = None if is_local else getattr(pilot.config, "_commit_hash", None)
    return {"path": str(Path(path).resolve()) if is_local else path, "revision": commit}


def trained_weights(copilot: BaseCopilot | None) -> dict[str, Tensor]:
    """The weights that are stored, with the Copilot's adapters merged."""
    if copilot is None:
        return {}
    weights = merged_weights(copilot)
    weights = copilot.state_dict() if weights is None else weights
    return {f"copilot.{name}": weight for name, weight in weights.items()}


def load_quantised_export(
    fused: Any, folder: str, config: TCopilotConfig, output_loading_info: bool = False, **options: Any
) -> Any:
    """Load such an export as `from_pretrained` of its class does; the Pilot always has its dtype from training.

    Raises:
        OSError: if the base cannot be read.
    """
    hub = {name: options[name] for name in OF_HUB if name in options}
    kept = {name: options[name] for name in (*OF_HUB[:3], "token", "attn_implementation") if name in options}
    quantised = options_of(quantised_settings(config.pilot))
    if options.get("device_map") is not None:
        quantised["device_map"] = options["device_map"]
    try:
        pilot, report = fused.auto_class.from_pretrained(
            config.base["path"], revision=config.base["revision"], dtype=config.pilot.dtype, trust_remote_code=False,
            output_loading_info=True, **quantised, **kept,
        )  # fmt: skip
    except OSError as error:
        raise OSError(
            f"the weights of this export's Pilot are those of its base {config.base['path']}, which cannot be read "
            f"({str(error).splitlines()[0]}); put it there, or write where it is into config.json, as base.path"
        ) from error
    load_adapters(pilot, folder, ADAPTER, **hub)
    copilot = None
    if config.copilot is not None:
        copilot = empty_copilot(config.copilot)
        stored = load_file(cached_file(folder, WEIGHTS, **hub))
        copilot.load_state_dict({name.removeprefix("copilot."): weight for name, weight in stored.items()})
        copilot.to(pilot.device)
    model = fused(config, pilot, copilot).eval()
    model.generation_config = GenerationConfig.from_pretrained(folder, **hub)
    return (model, report) if output_loading_info else model
