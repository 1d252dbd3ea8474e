"""The cache of `torch.compile`, which outlives a process that was killed."""

import time
from contextlib import suppress
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import cache_dir

SECONDS_TO_LINK = 10  # a library of another process may be empty for a moment


def clear_empty_libraries() -> None:
    """Remove the empty libraries of a killed run from the compiler's cache, which later runs would fail to load."""
    for library in Path(cache_dir()).rglob("*.so"):
        with suppress(FileNotFoundError):  # another process clears up too
            if not library.stat().st_size and time.time() - library.stat().st_mtime > SECONDS_TO_LINK:
                library.unlink()
