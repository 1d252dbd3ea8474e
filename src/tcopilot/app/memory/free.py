"""How much of the host's memory this process may still take: what is free, or what its container has left."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that are free, within the limits of every control group that this process is in (containers, SLURM)."""
    return min([psutil.virtual_memory().available, *(limit - used for limit, used in _limits())])


def _limits() -> list[tuple[int, int]]:
    """Limit and use of each group, in bytes; pages of files count as use, but the kernel gives them back."""
    try:
        lines = [line.split(":", 2) for line in OWN.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    found = []
    for _, controllers, path in lines:
        if controllers == "":  # version 2
            root, names = CGROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            if folder != root and root not in folder.parents:
                break
            try:
                limit, used = ((folder / name).read_text().strip() for name in names)
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # a container sees its own group as the root
                continue
            if limit != "max":
                found.append((int(limit), int(used) - int(statistics.get("inactive_file", 0))))
    return found
