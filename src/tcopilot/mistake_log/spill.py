"""Keeps a Mistake Log that is larger than the memory in memory-mapped files.

A spilled tensor is a tensor like any other; its pages come from the file when they are read and may leave the memory
again. A file is deleted when its last tensor is freed, so one that is still held, as by a state dict, stays valid.
"""

import ctypes
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE_BYTES = 2**22  # smaller rounds share a file: a process may map some 65,000 files only
_ALIGNMENT = 64  # bytes


class Spill:
    """A folder `mistake_log-…` of memory-mapped files, made inside another when the first tensor comes.

    It is deleted with this object; a folder that a killed process has left behind may be deleted by hand.
    """

    def __init__(self, folder: str | Path) -> None:
        self.parent = Path(folder)
        self.folder: Path | None = None
        self._file: weakref.ref[np.ndarray] = lambda: None  # the mapped file that takes the next tensors, if it lives
        self._used = self._files = 0

    def move(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors into a file and return them as they lie there.

        Raises:
            OSError: if the folder cannot be written or the disk is full; found here, not when a page is written.
        """
        sizes = {name: -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for name, tensor in tensors.items()}
        needed, file, placed = sum(sizes.values()), self._file(), dict(tensors)
        if file is None or self._used + needed > len(file):
            file = self._open(max(needed, FILE_BYTES))
        for name, tensor in tensors.items():
            if tensor.numel():  # each gets its own storage, so that saving one does not save the file
                place = torch.frombuffer(file, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
                placed[name] = place.view(tensor.shape).copy_(tensor)
                self._used += sizes[name]
        return placed

    def _open(self, size: int) -> np.ndarray:
        if self.folder is None:
            self.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="mistake_log-", dir=self.parent))
            weakref.finalize(self, _if_owner, os.getpid(), shutil.rmtree, self.folder, True)
        path = self.folder / f"{self._files}.bin"
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=size)  # keeps no file open
        # Small blocks in between would make glibc keep the memory that the moved rounds have freed.
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        mapped = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        weakref.finalize(mapped, _if_owner, os.getpid(), Path.unlink, path, True)
        self._file, self._used, self._files = weakref.ref(mapped), 0, self._files + 1
        return mapped


def _if_owner(process: int, remove: Callable[[Path, bool], None], path: Path, quietly: bool) -> None:
    if os.getpid() == process:  # a forked data worker does not own the files
        remove(path, quietly)
