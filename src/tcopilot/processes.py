"""The processes of one job, or the only one: who am I, wait, agree, add up."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

T = TypeVar("T")
PARENT = "TCOPILOT_PARENT"  # environment variable: the process that starts the others of a job
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what SLURM sends ahead of its time limit
WAIT = "TCOPILOT_WAIT"  # environment variable: how many seconds the processes of a job have to meet
_began = time.monotonic()


class DisagreementError(RuntimeError):
    """Processes of one job were started with different configs or data."""


def is_lost_process(error: RuntimeError) -> bool:
    """Tell whether an error is what gloo and NCCL raise when another process does not answer any more."""
    signs = ("Connection closed", "Connection reset", "Broken pipe", "Read error", "Timed out", "timeout", "NCCL")
    return world_size() > 1 and any(sign in str(error) for sign in signs)


def start() -> None:
    """Join the processes that `torchrun` has started, so that they can agree before training sets anything up.

    Processes that Lightning starts itself join when training begins, and a single process never does. Such
    processes end when the process that started them ends, even while they wait for it.
    """
    if not rank():
        os.environ[PARENT] = str(os.getpid())  # for those that Lightning starts
    elif PARENT in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun ends its processes itself
        threading.Thread(target=_end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not _on():
        expect_others(int(os.environ["WORLD_SIZE"]))
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")


def expect_others(size: int) -> None:
    """End this process with a message if those of its job have not met after a while; torch waits for half an hour.

    `TCOPILOT_WAIT` gives the seconds. Without it, the limit is a minute plus twice the time that this process has run
    so far, since the processes that it starts have to do all of that themselves first.
    """
    if size > 1 and not _on():
        seconds = _patience() or 60 + 2 * (time.monotonic() - _began)
        threading.Thread(target=_end_alone, args=(size, seconds), daemon=True).start()


def _patience() -> float | None:
    """The seconds of `TCOPILOT_WAIT`; None if it is not set, or no number above 0."""
    try:
        seconds = float(os.environ.get(WAIT, ""))
    except ValueError:
        return None
    return seconds if 0 < seconds < threading.TIMEOUT_MAX else None


def _end_alone(size: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not _on():
        if time.monotonic() >= end:
            place = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
            print(
                f"error: process {rank()} of a job of {size} has waited {seconds:.0f} s for the others at {place}; "
                f"start all {size}, with the same address and a port of the first one's machine that they can reach. "
                f"{WAIT}=<seconds> waits longer",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(1)  # the main thread waits in torch and cannot be woken
        time.sleep(min(0.5, seconds))


def leave_stop_to_parent(worker: int) -> None:
    """In a process that loads data: a signal that all processes of a run get is for the one that trains.

    A second SIGTERM ends it, by which its parent ends one that hangs.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    print(f"error: the first process of this job is gone, so process {rank()} stops too", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may be waiting for a process that will never answer


def address_problem(size: int, nodes: int) -> str | None:
    """Say why the processes of a job cannot meet at MASTER_ADDR and MASTER_PORT, if one of the variables shows it."""
    if size > 1 and WAIT in os.environ and _patience() is None:
        return f"{WAIT}={os.environ[WAIT]}: give a number of seconds above 0, or leave it out"
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if size == 1 or _on() or rank() or "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun listens there itself
        return None
    here = nodes == 1 and "LOCAL_RANK" not in os.environ  # all processes are started from this one
    for name, address, mend in (
        ("MASTER_PORT", ("", port), "give the number of a free port, or leave it out"),
        ("MASTER_ADDR", (host if here else "", 0), "give an address of this machine, or leave it out"),
    ):
        try:
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            socket.create_server((address[0], int(address[1] or 0)), family=family).close()
        except (OSError, OverflowError, ValueError) as error:
            reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
            return f"{name}={os.environ.get(name)}: {reason}; {mend}"
    return None


def rank() -> int:
    """Number of this process, from 0; before the processes have joined, as the environment variables give it."""
    if _on():
        return distributed.get_rank()
    return next((int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), 0)


def world_size() -> int:
    """Number of processes that have joined."""
    return distributed.get_world_size() if _on() else 1


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if _on():
        distributed.barrier()


def agree_on(value: T) -> T:
    """Return the first process's value, on all of them."""
    if not _on():
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def refuse_differences(settings: dict[str, Any]) -> None:
    """Compare settings over all processes.

    Raises:
        DisagreementError: on every process, naming each setting that differs and its values.
    """
    everyone = gather([settings])
    different = [name for name in settings if any(other[name] != everyone[0][name] for other in everyone)]
    if different:
        shown = "; ".join(f"{name}: {', '.join(str(other[name]) for other in everyone)}" for name in different)
        raise DisagreementError(
            f"the {len(everyone)} processes of this job were not started alike. By process, {shown}. Start all with "
            f"the same overrides, code and data, and give paths.run_dir if each makes its own"
        )


def gather(values: list[T]) -> list[T]:
    """Return the values of all processes, in the order of the processes, on each of them."""
    if not _on():
        return values
    everyone: list[Any] = [None] * world_size()
    distributed.all_gather_object(everyone, values)
    return [value for part in everyone for value in part]


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on each of them."""
    if not _on():
        return value
    gpu = "nccl" in distributed.get_backend()
    total = value.to(torch.device("cuda", torch.cuda.current_device()) if gpu else value.device, copy=True)
    distributed.all_reduce(total)
    return total.to(value.device)


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its sum over all processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = sum_over_processes(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def undivided(value: Tensor) -> Tensor:
    """Return a tensor, which may be sharded over the processes, as a plain one; all of them must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _on() -> bool:
    return distributed.is_available() and distributed.is_initialized()
