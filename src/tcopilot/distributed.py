"""The processes of one job, or the only one: who am I, wait, add up."""

import torch
from torch import Tensor, distributed


def _on() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if _on() else 0


def world_size() -> int:
    """Number of processes."""
    return distributed.get_world_size() if _on() else 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if _on():
        distributed.barrier()


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on each of them."""
    if not _on():
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else value.device
    total = value.to(device, copy=True)
    distributed.all_reduce(total)
    return total.to(value.device)
