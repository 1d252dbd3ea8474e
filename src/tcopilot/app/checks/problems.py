"""Problems that the user can mend: how they are collected, told apart from bugs, and raised together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tcopilot.data.benchmarks import DataError
from tcopilot.models.pilot import ModelSourceError

REFUSALS = (ValueError, TypeError, ImportError, OSError, MisconfigurationException)
"""What a constructor, or the import of its class, raises at values that it does not take."""


class ConfigError(ValueError):
    """The config cannot work; `problems` holds one message per problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        heading = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{heading} in the config or data:", *(f"  - {p}" for p in problems)]))


def attempt(problems: list[str], make: Callable[[], Any], key: str | None = None) -> Any:
    """Run a step of the preparation; what the user can mend is added to `problems`, and None returned.

    Data and models that cannot be read, and values that a constructor called by Hydra does not take, are problems of
    the user's; given the config key of what is made, so are `REFUSALS` of the step. Anything else is raised as the
    bug that it probably is, unless problems were found before, of which it may be a consequence.
    """
    try:
        return make()
    except (DataError, ModelSourceError) as error:
        problems += str(error).split("\n")  # a row that is quoted may hold other line separators
    except OSError as error:
        place = error.filename or key or "a file"
        problems.append(f"{place}: {error.strerror or error}; make it readable, or give another place")
    except Exception as error:
        by_hydra = isinstance(error, InstantiationException)
        reason = refusal(error) if by_hydra or key else None
        if reason is None:
            if problems:
                return None
            raise
        place = key or str(error).rpartition("full_key: ")[2]
        names_its_key = isinstance(error.__cause__, DataError) or reason.startswith(place.split(".")[0])
        problems.append(reason if names_its_key else f"{place}: {reason}")
    return None


def refusal(error: Exception) -> str | None:
    """What a constructor did not take, in one line; None if the error is of another kind, perhaps a bug."""
    cause = error
    if isinstance(error, InstantiationException):
        if error.__cause__ is None:
            return " ".join(str(error).split())
        cause = error.__cause__
    return " ".join(str(cause).split()) if isinstance(cause, REFUSALS) else None


def existing(path: Path) -> Path:
    """The path itself if it is there, or the nearest folder above it."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
