"""Nested values as JSON and tensors: what a checkpoint can hold. Nothing that is read back can be executed."""

from typing import Any

import torch
from torch import Tensor

DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


class CheckpointError(Exception):
    """A checkpoint cannot be written or must not be used; the message says why and how to go on."""


def pack(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested dicts, lists, tuples, plain values and tensors into a structure for JSON and named tensors.

    One tensor that occurs twice, as tied weights do, is kept once and is one tensor again after `unpack`. Tensors
    that overlap otherwise are copied.

    >>> pack({3: (1, None)})[0]
    {'dict': [[3, {'tuple': [1, None]}]]}

    Raises:
        CheckpointError: if it holds anything else; the message names the place.
    """
    packer = _Packer()
    return packer.pack(value, "checkpoint"), packer.tensors


def unpack(structure: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `pack`.

    >>> unpack({"dict": [[3, {"tuple": [1, None]}]]}, {})
    {3: (1, None)}
    """
    if isinstance(structure, list):
        return [unpack(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in content)
    if kind == "dict":
        return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
    raise ValueError(f"unknown kind of value: {kind!r}")


class _Packer:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}  # which tensor is in the file already
        self._storages: set[int] = set()

    def pack(self, value: Any, place: str) -> Any:
        if _is_plain(value):
            return value
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, place)}
        if type(value) in (list, tuple):
            items = [self.pack(item, f"{place}[{i}]") for i, item in enumerate(value)]
            return items if type(value) is list else {"tuple": items}
        if not isinstance(value, dict):
            raise _refusal(place, type(value).__qualname__)
        for key in value:
            if not all(map(_is_plain, key if type(key) is tuple else [key])):
                raise _refusal(f"a key of {place}", type(key).__qualname__)
        return {"dict": [[self.pack(key, place), self.pack(item, f"{place}[{key!r}]")] for key, item in value.items()]}

    def _tensor(self, tensor: Tensor, place: str) -> str:
        if tensor.layout is not torch.strided or tensor.dtype not in DTYPES or tensor.is_meta:
            raise _refusal(place, f"tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}")
        start = (tensor.device, tensor.data_ptr()) if tensor.numel() else object()  # empty ones share no data
        view = (start, tensor.dtype, tensor.shape, tensor.stride())
        if view not in self._names:
            owned = tensor.detach().cpu().contiguous()
            if owned.untyped_storage().data_ptr() in self._storages:
                owned = owned.clone()
            self._storages.add(owned.untyped_storage().data_ptr())
            self._names[view] = str(len(self.tensors))
            self.tensors[self._names[view]] = owned
        return self._names[view]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _refusal(place: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{place} is a {what}: a checkpoint holds dicts, lists, tuples, numbers, texts, None and dense tensors only, "
        f"so that loading it can execute nothing. Change the state_dict it comes from"
    )
