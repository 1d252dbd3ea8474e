"""Rules for the values of settings, declared beside the component that owns them.

A component lists its rules in `SETTINGS`. The checks of a config apply those of all components before anything is
built, so that every problem is reported at once; constructors call `require`, for callers who build them in Python.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Self

LARGEST = 2**31 - 1  # whole number unless a rule names another limit: libraries count in 32 or 64 bits


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; `true` is not one."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; `true` is not one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_list(value: Any) -> bool:
    """Whether a value is a list; a text is not one."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def _range(least: float, most: float) -> str:
    return f"from {least} to {most}" if most not in (LARGEST, math.inf) else f"at least {least}"


class Rule(NamedTuple):
    """Which values a setting takes, and what a message tells the user to give instead of another value."""

    allows: Callable[[Any], bool]
    mend: str

    def message(self, value: Any) -> str:
        """Return a message that names a refused value and says what to give instead."""
        too_large = is_whole(value) and value > LARGEST and str(LARGEST) not in self.mend
        return f"{value}: {self.mend}" + (f", and at most {LARGEST}" if too_large else "")

    def or_null(self) -> Self:
        """The same rule, with null allowed."""
        return Rule(lambda value: value is None or self.allows(value), self.mend)


def whole(least: int = 1, most: float = LARGEST, mend: str | None = None) -> Rule:
    """Allow whole numbers in a range."""
    mend = mend or f"must be a whole number, {_range(least, most)}"
    return Rule(lambda value: is_whole(value) and least <= value <= most, mend)


def number(least: float = 0, most: float = math.inf) -> Rule:
    """Allow finite numbers in a range."""
    return Rule(lambda value: is_number(value) and least <= value <= most, f"must be a number, {_range(least, most)}")


def one_of(allowed: Collection[Any]) -> Rule:
    """Allow the values listed; a flag never stands for a number."""
    mend = f"use one of {', '.join(map(str, allowed))}"
    return Rule(lambda value: not isinstance(value, bool) and value in list(allowed), mend)


def list_of(allowed: Collection[Any]) -> Rule:
    """Allow a list of one or more of the values, each once."""

    def allows(value: Any) -> bool:
        return is_list(value) and 0 < len(value) == len(set(map(str, value))) and all(one in allowed for one in value)

    return Rule(allows, f"give a list of {', '.join(map(str, allowed))}")


ANY = Rule(lambda value: True, "")  # checked elsewhere
FLAG = Rule(lambda value: isinstance(value, bool), "give true or false")
POSITIVE = Rule(lambda value: is_number(value) and value > 0, "must be a number above 0")
SEED = whole(0, 2**32 - 1)
DTYPE = one_of(("float32", "bfloat16", "float16"))


def dtype_name(dtype: object) -> str:
    """Name of one of torch's dtypes as configs give it."""
    return str(dtype).removeprefix("torch.")


def problems(settings: Mapping[str, Rule], values: Mapping[str, Any], key: str = "") -> list[str]:
    """List the values that their rules do not allow; settings that `values` lacks are not checked.

    >>> problems({"k": whole(), "seed": SEED}, {"k": 0, "seed": 3}, "storage")
    ['storage.k=0: must be a whole number, at least 1']
    """
    prefix = f"{key}." if key else ""
    return [
        f"{prefix}{name}={rule.message(values[name])}"
        for name, rule in settings.items()
        if name in values and not rule.allows(values[name])
    ]


def require(settings: Mapping[str, Rule], values: Mapping[str, Any], key: str = "") -> None:
    """Check the arguments of a constructor by its rules.

    Raises:
        ValueError: with every problem found.
    """
    if found := problems(settings, values, key):
        raise ValueError("; ".join(found))
