"""A Pilot by its files: the content of its weights as one hash, and its unembedding without its layers.

While Copilots are fitted from a recording (`mistake_log/recording.py`), nothing else of the frozen Pilot is needed.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from tcopilot.models.adapters import keep_weights
from tcopilot.models.families import skeleton
from tcopilot.models.pilot import ModelSource
from tcopilot.models.quantised_export import ADAPTER

OURS = "pilot."
"""Prefix of the Pilot's weight names in an export of ours, which also holds the Copilot's weights."""


def digest(source: ModelSource) -> str:
    """Hash a pretrained Pilot's weights, its compute type and its quantisation; returns 16 hex digits.

    The files are read once from beginning to end, a tensor at a time. Renamed or moved files keep their digest, and so
    does the Pilot in an export whose Copilot has changed.
    """
    found = hashlib.blake2b(f"{source.dtype}{source.bits or ''}".encode(), digest_size=8)
    for name, place in sorted(_weights(source).items()):
        found.update(name.encode())
        weight = _tensor(place).contiguous()
        found.update(f" {weight.dtype} {tuple(weight.shape)};".encode())
        found.update(weight.reshape(-1).view(torch.uint8).numpy())
    for file in _other_files(source):
        found.update(file.read_bytes())
    return found.hexdigest()


def load_unembedding(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The Pilot with the weights of its output head alone; all others are on the meta device and take no memory.

    A checkpoint whose weight names transformers converts, or without safetensors files, is first loaded as a whole.
    """
    model = skeleton(source.model_config)
    head, dtype, files = model.get_output_embeddings(), getattr(torch, source.dtype), _weights(source)
    names = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight is head.weight]
    there = next((name for name in names if name in files), None)
    if there is None or getattr(head, "bias", None) is not None:
        whole = source.load(tokenizer)
        model.set_output_embeddings(whole.get_output_embeddings())
        bias = getattr(whole, "final_logits_bias", None)
    else:
        weight = nn.Parameter(_tensor(files[there]).to(dtype))
        for name in names:  # a tied embedding is the same tensor
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, weight)
        bias = _tensor(files["final_logits_bias"]) if "final_logits_bias" in files else None
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias = torch.zeros(1, head.weight.shape[0], dtype=dtype) if bias is None else bias.to(dtype)
    model.get_output_embeddings().requires_grad_(False)
    keep_weights(model)
    return model.eval()


def _weights(source: ModelSource) -> dict[str, tuple[Path, str]]:
    """Names of the Pilot's weights in its safetensors files, each with its file and its name there."""
    source, _ = _base(source)
    prefix = OURS if getattr(source.stored_config, "pilot", None) is not None else ""
    places = [(file, name) for file in _safetensors(source) for name in _names(file) if name.startswith(prefix)]
    return {name.removeprefix(prefix): (file, name) for file, name in places}


def _safetensors(source: ModelSource) -> Iterator[Path]:
    if (whole := _file(source, "model.safetensors")) is not None:
        yield whole
    elif (index := _file(source, "model.safetensors.index.json")) is not None:
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            yield _file(source, name)


def _other_files(source: ModelSource) -> list[Path]:
    """The weights of a Pilot that is not kept in safetensors files, and the adapters beside a quantised one."""
    source, adapters = _base(source)
    if next(_safetensors(source), None) is not None:
        return adapters
    config = _file(source, "config.json")
    return adapters + sorted(config.parent.glob("pytorch_model*.bin")) if config else adapters


def _base(source: ModelSource) -> tuple[ModelSource, list[Path]]:
    """The base model that an export of a quantised Pilot names, and the adapters that are put on it."""
    if (base := getattr(source.stored_config, "base", None)) is None:
        return source, []
    adapters = _file(source, f"{ADAPTER}/adapter_model.safetensors")
    return replace(source, **base), [] if adapters is None else [adapters]


def _file(source: ModelSource, name: str) -> Path | None:
    found = cached_file(source.path, name, revision=source.revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _tensor(place: tuple[Path, str]) -> Tensor:
    file, name = place
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
