"""Copies between a GPU and page-locked memory of the host that training does not wait for."""

import torch
from torch import Tensor


class AsyncHostCopies:
    """Copies to the host; those from a GPU run on a stream of their own, beside the kernels that are launched next.

    Read a copy only after `wait`. From the CPU a copy is made at once and there is nothing to wait for.
    """

    def __init__(self) -> None:
        self.pending = False  # whether copies were started that nothing has waited for yet
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Start to copy a tensor, detached, as the work launched so far will leave it; returns the copy's memory."""
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return owned_copy(tensor, dtype)
        copied = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, pin_memory=True)
        stream = self._streams.setdefault(tensor.device, torch.cuda.Stream(tensor.device))
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            copied.copy_(tensor.to(copied.dtype), non_blocking=True)
        tensor.record_stream(stream)  # keeps the allocator from reusing its memory before the copy is made
        self.pending = True
        return copied

    def wait(self) -> None:
        """Wait until all copies are made, without waiting for other work of the GPU."""
        if self.pending:
            for stream in self._streams.values():
                stream.synchronize()
        self.pending = False


def owned_copy(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on the CPU that shares no memory with anything."""
    return torch.empty_like(tensor, dtype=dtype, device="cpu").copy_(tensor.detach())


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Bring a tensor to a device; a GPU copies it from page-locked memory, so that the host need not wait."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
