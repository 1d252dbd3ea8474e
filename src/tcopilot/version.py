"""The version of this package, which every run directory carries in its `config.yaml`, and the commit of its code."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__version__ = "0.2.0"


def version_problem(config: Mapping[str, Any]) -> str | None:
    """Say why the config of a run cannot be used here, or return None if it can.

    Class paths in configs, and files of a run directory, may change between minor versions. A run is therefore read
    by the major.minor version that made it, and there is no layer that translates older configs.
    """
    made_by = config.get("version")
    if made_by is not None and str(made_by).split(".")[:2] == __version__.split(".")[:2]:
        return None
    maker = "a version before 0.2.0 (its config.yaml names none)" if made_by is None else f"version {made_by}"
    use = "the version that made it" if made_by is None else f"tcopilot {made_by}"
    return (
        f"this run was made by {maker} and this is tcopilot {__version__}; evaluate it with {use}, or train it again"
    )


def git_revision(folder: str | Path | None = None) -> str:
    """Return the commit of the code in `folder`, by default this package's, with `-dirty` if tracked files differ.

    Outside a repository or without git it is "unknown": a run must not die of that.
    """
    git = ["git", "--no-optional-locks", "-C", str(folder or Path(__file__).parent)]  # reading must not block a commit
    asked = {"capture_output": True, "text": True, "check": True, "timeout": 30}
    try:
        revision = subprocess.run([*git, "rev-parse", "HEAD"], **asked).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], **asked).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{revision}-dirty" if changes else revision
