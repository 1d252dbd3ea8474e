"""Read answers out of generated text. Strict: a text that does not answer in the asked form has no answer."""

from __future__ import annotations

import re
from decimal import Decimal

# A sign and a number start neither inside a word ("v13", "m2") nor inside another number ("12-15" holds no -15).
_NUMBER = re.compile(r"(?<![\w.])(-?)\s?[$€£]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_OPTION = re.compile(r"(?<![A-Za-z0-9_])answer(\d+)(?![A-Za-z0-9_])")


def tidy(text: str) -> str | None:
    r"""Collapse white space; a blank text has no answer.

    >>> tidy("  answer :  v13 \n")
    'answer : v13'
    >>> tidy(" ") is None
    True
    """
    return " ".join(text.split()) or None


def last_number(text: str) -> str | None:
    """Return the last number of a text in its plain form: no commas, units, leading ``+`` or trailing zeros.

    >>> [last_number(text) for text in ("1,234 apples", "$1,200.50.", "-3", "- $5", "about 72.0%", "5 m2", "so 18.")]
    ['1234', '1200.5', '-3', '-5', '72', '5', '18']
    >>> [last_number(text) for text in ("12-15", "3 of 4", "v13", "none", "-0", ".50", "1,2", "007")]
    ['15', '4', None, None, '0', '0.5', '2', '7']
    """
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    if not found:
        return None
    sign, digits = found[-1]
    number = Decimal(digits.replace(",", ""))
    return format((-number if sign and number else number).normalize(), "f")


def number_after(text: str, marker: str) -> str | None:
    r"""Return the last number after the last ``marker``; None without a marker or without a number behind it.

    >>> number_after("2 + 3 = 5\n#### 5 apples", "####")
    '5'
    >>> number_after("2 + 3 = 5", "####") is None
    True
    >>> number_after("5 ####", "####") is None
    True
    """
    _, found, tail = text.rpartition(marker)
    return last_number(tail) if found else None


def first_option(text: str) -> str | None:
    """Return the first option named ``answer<number>``; only as a word of its own and in lower case.

    >>> first_option("the correct answer is answer2.")
    'answer2'
    >>> first_option("answer2, not answer1")
    'answer2'
    >>> [first_option(text) for text in ("myanswer2", "answer 2", "Answer2", "answer2b", "answer", "2")]
    [None, None, None, None, None, None]
    >>> first_option("answer12")
    'answer12'
    """
    found = _OPTION.search(text)
    return found.group(0) if found else None
