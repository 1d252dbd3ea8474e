"""Count the bytes of live tensors: torch has no such count for the CPU, and `tracemalloc` does not see them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While active, counts every storage that an operation returns until it is freed.

    The count is the same on every machine and in every run. It does not see what a kernel takes and frees before it
    returns, nor memory that the allocator keeps for later. Tensors of `FakeTensorMode` count with the bytes that they
    stand for.

    `live` is the number of bytes now, `peak` the largest since the last `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch compile in this mode, and count the tensors of compiled code."""
        return True

    def reset_peak(self) -> None:
        """Look for a new peak from what is live now."""
        self.peak = self.live

    def count(self, tensor: Tensor) -> None:
        """Count a tensor that was made before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._forget(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.count(value)
        return out
