r"""Read answers out of generated text, each kind of answer in two ways.

The strict reading wants the asked form: a text that does not answer in it has no answer. The lenient one does what the
published evaluation of LLM-Adapters does, so that figures can be compared with published ones. It takes the first
name, the last number or the first capital letter anywhere in the text, and so finds answers where none is given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

TOLERANCE = Decimal("0.001")  # LLM-Adapters'; MAWPS has golds of 16 decimals

# A sign and a number start neither inside a word ("v13", "m2") nor inside another number ("12-15" holds no -15).
_NUMBER = re.compile(r"(?<![\w.])(-?)\s?[$€£]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_LOOSE_NUMBER = re.compile(r"-?\d+\.?\d*")


def until_end(token_ids: Sequence[int], end_id: int) -> list[int]:
    """Cut generated tokens at the first end token: what a model writes after it is no part of its answer.

    >>> until_end([7, 8, 1, 9, 1], 1)
    [7, 8]
    >>> until_end([7, 8], 1)
    [7, 8]
    """
    ids = list(token_ids)
    return ids[: ids.index(end_id)] if end_id in ids else ids


def tidy(text: str) -> str | None:
    r"""Collapse white space; a blank text has no answer.

    >>> tidy("  answer :  v13 \n")
    'answer : v13'
    >>> tidy(" ") is None
    True
    """
    return " ".join(text.split()) or None


# Numbers -----------------------------------------------------------------------------------------------------------


def first_number(text: str) -> str | None:
    """Return the first number of a text in its plain form: no commas, units, leading ``+`` or trailing zeros.

    >>> [first_number(text) for text in ("1,234 apples", "$1,200.50.", "-3", "- $5", "about 72.0%", "5 m2", "so 18.")]
    ['1234', '1200.5', '-3', '-5', '72', '5', '18']
    >>> [first_number(text) for text in ("12-15", "3 of 4", "v13", "none", "-0", ".50", "1,2", "007")]
    ['12', '3', None, None, '0', '0.5', '1', '7']
    """
    found = _NUMBER.search(text.replace("\N{MINUS SIGN}", "-"))
    return _plain(Decimal(found[1] + found[2].replace(",", ""))) if found else None


def read_number(text: str) -> str | None:
    """Return a label's number: the whole text in any notation of Python or JSON, else the first number in it.

    >>> [read_number(text) for text in ("145.0", "1e-05", "1E+16", " -1,200 ", "18 eggs", "nan", "inf", "")]
    ['145', '0.00001', '10000000000000000', '-1200', '18', None, None, None]
    """
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return first_number(text)
    return _plain(number) if number.is_finite() else None


def number_after(text: str, marker: str) -> str | None:
    r"""Read a number strictly: the first one behind the last ``marker``.

    What follows the number, a unit or a remark, does not count; a number without a marker is reasoning.

    >>> number_after("2 + 3 = 5\n#### 5 apples, 2 of them red", "####")
    '5'
    >>> number_after("#### 4\nno:\n#### 5", "####")
    '5'
    >>> [number_after(text, "####") for text in ("2 + 3 = 5", "5 ####", "#### five")]
    [None, None, None]
    """
    _, found, tail = text.rpartition(marker)
    return first_number(tail) if found else None


def last_number(text: str) -> str | None:
    """Read a number leniently: the last digits of the text once commas are gone, wherever they stand.

    >>> [last_number(text) for text in ("#### 1,234", "5 apples, 2 of them red", "9-5", "in m2", "18.", ".5", "none")]
    ['1234', '2', '-5', '2', '18.', '5', None]
    """
    found = _LOOSE_NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else None


def close(found: str | None, gold: str) -> bool:
    """Tell whether two numbers differ by at most 0.001.

    >>> close("0.667", "0.6666666666666666"), close("0.66", "0.6666666666666666"), close("18.", "18"), close(None, "0")
    (True, False, True, False)
    """
    return found is not None and abs(Decimal(found) - Decimal(gold)) <= TOLERANCE


# Names and letters -------------------------------------------------------------------------------------------------


def name_after(text: str, sentence: str, names: str) -> str | None:
    r"""Read a name strictly: directly behind the answer sentence, and the only one from there on.

    Upper and lower case differ. A name may come again, but a text that goes on to another one has no answer: which of
    the two is meant cannot be told.

    Args:
        text: What was generated.
        sentence: The words in front of the name; "" reads the whole text, where exactly one name must stand.
        names: Regular expression of the names.

    >>> names, sentence = "answer[1-4]", "the correct answer is"
    >>> name_after("the correct answer is answer2.\nthe correct  answer is answer2", sentence, names)
    'answer2'
    >>> name_after("not answer1: the correct answer is: 'answer2'", sentence, names)
    'answer2'
    >>> name_after("the correct answer is answer2, not answer1", sentence, names) is None
    True
    >>> texts = ("answer2", "the correct answer is not answer1", "the correct answer is answer12", "nothing")
    >>> [name_after(text, sentence, names) for text in texts]
    [None, None, None, None]
    >>> name_after("(answer2)", "", names)
    'answer2'
    """
    text = " ".join(text.split())
    if sentence:
        edge = r"\b" if sentence[-1].isalnum() else ""
        found = re.search(rf"{re.escape(sentence)}{edge}\W*((?:{names})(?!\w).*)", text)
        text = found[1] if found else ""
    named = set(re.findall(rf"(?<!\w)(?:{names})(?!\w)", text))
    return named.pop() if len(named) == 1 else None


def first_name(text: str, names: str) -> str | None:
    """Read a name leniently: the first one anywhere, even inside a word.

    >>> first_name("not answer1 but answer2", "answer[1-4]"), first_name("untrue", "true|false")
    ('answer1', 'true')
    """
    found = re.search(names, text)
    return found[0] if found else None


def letter_after(text: str, marker: str, letters: str) -> str | None:
    r"""Read an option's letter strictly: a word of its own, directly behind the last ``marker``.

    >>> texts = ("Ask Ed.\n#### B", "#### (B)", "#### B) 12", "#### A\n#### B")
    >>> [letter_after(text, "####", "ABCDE") for text in texts]
    ['B', 'B', 'B', 'B']
    >>> texts = ("B", "#### Because", "#### F", "#### b", "#### the answer is B", "B ####")
    >>> [letter_after(text, "####", "ABCDE") for text in texts]
    [None, None, None, None, None, None]
    """
    _, found, tail = text.rpartition(marker)
    letter = re.match(rf"\s*\(?([{letters}])(?!\w)", tail) if found else None
    return letter[1] if letter else None


def first_letter(text: str, letters: str) -> str | None:
    r"""Read an option's letter leniently: the first one anywhere, even inside a word.

    >>> first_letter("Each has 4, so 12\n#### B", "ABCDE"), first_letter("4 * 3 = 12\n#### B", "ABCDE")
    ('E', 'B')
    """
    return first_name(text, f"[{letters}]")


def _plain(number: Decimal) -> str:
    return format(number.normalize() if number else Decimal(0), "f")
