r"""Extract answers from generated text, each kind of answer in two ways: strictly and leniently.

The strict reading accepts an answer only in the form that the prompt asks for. A text in another form has no answer,
nor has a text that gives a second answer ("B and C") or continues the number ("12:30"). The lenient reading follows
the published evaluation of LLM-Adapters, so that figures can be compared with published ones. It takes the first name,
the last number or the first capital letter anywhere in the text, and may thus find an answer where none was given.
"""

import math
import re
from collections.abc import Sequence
from decimal import Context, Decimal
from unicodedata import category, normalize

TOLERANCE = Decimal("0.001")  # as in LLM-Adapters; some gold answers of MAWPS have 16 decimals
QUOTIENT = Context(prec=16)  # significant digits of a fraction in decimal form
EXACT = Context(prec=10_000)  # significant digits of other numbers; the default of 28 would round long ones
LARGEST_POWER = 100  # of ten; larger ones are not meant, and 1e999999999 written out would fill the memory
MAGNITUDES = {
    **{"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12},
    **{"k": 1000, "m": 10**6, "bn": 10**9, "b": 10**9},
}

_QUANTITY = r"""
    (?P<sign>[-+]?)[ ]?(?:[$€£¥₹][ ]?)?(?P<late_sign>-?)
    (?:
        (?:(?P<whole>\d+)[ ]+)?(?P<over>\d+)[ ]?/[ ]?(?P<under>\d+)
      | (?:(?P<factor>\d+(?:\.\d+)?)[ ]?[x*·×][ ]?)?10[ ]?\^[ ]?(?P<braces>\{)?(?P<power>[-+]?\d+)(?(braces)\})
      | (?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ \xa0\u2009\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)
        (?:[eE](?P<exponent>[-+]?\d+))?
    )
    (?P<magnitudes>(?:[kKMB]|bn)\b|(?:[ -]?(?i:hundred|thousand|million|billion|trillion|dozen)s?\b)*)
    (?:[ ]?[%‰°$€£¥₹])?
"""
# Text behind a number that shows it to be only a part of the answer: a second number, an operator, a range, a list, a
# clock time, "and a half", an unclear magnitude ("5 M"), or a smaller unit ("2 hours 30 minutes").
_GOES_ON = r"""
    [.,'_:(]+\d | \s?\^ | [ ]?[-/*·×x+=÷±~:;,&|\\]+[ ]?[-+($€£¥₹]*\.?\d | [ ]+\d | h\d | [a-z]+\d+[a-z]
  | [ ](?:[KMBk]|mi?ln?|mio|bln|lakh|crore)\b
  | [ ]?\(?[ ]?(?:to|or|and|through|plus|minus|times|over|by|vs)\b[. ]+
        (?:(?:an?|one)[ ])?(?:[-+$€£¥₹.]*\d|half|quarter|third)
  | [ ]?(?!(?:of|out|in|per|every|after|for|at|on|from)\b)[^\W\d_]+\.?(?:[ ]?(?:,|and\b|or\b|to\b|[-/+])[ ]?|[ ])
        [$€£¥₹]?\d[\d.,/]*(?:[ ]?[^\W\d_]+)?[ ]?[.!?)]*(?:\n|$)
"""
_NUMBER = re.compile(rf"(?<![\w.√±])(?<!\w[-/:^*]){_QUANTITY}(?P<more>{_GOES_ON})?", re.VERBOSE)
_UNIT = re.compile(r"[\s.,)!]*(?:\(?(?!(?:or|and|to|but|not)\b)[^\W\d_][^\s=:,;]*[\s.)]*){0,4}")
_LOOSE_NUMBER = re.compile(r"-?\d+\.?\d*")


def until_end(token_ids: Sequence[int], *end_ids: int) -> list[int]:
    """Cut generated tokens at the first end token, because what a model writes after it is not part of its answer."""
    ids = list(token_ids)
    return ids[: next((place for place, token in enumerate(ids) if token in end_ids), len(ids))]


def tidy(text: str) -> str | None:
    """Collapse white space and compose accents, as texts that look alike should be equal; None for a blank text."""
    return normalize("NFC", " ".join(text.split())) or None


def is_finite(value: object) -> bool:
    """Tell whether a value of a row is not NaN or an infinity, which JSON readers accept."""
    return not isinstance(value, float) or math.isfinite(value)


def is_blank(text: str) -> bool:
    """Tell whether a text has nothing visible in it, only white space and zero-width characters."""
    return all(category(char) in ("Cc", "Cf", "Zl", "Zp", "Zs") for char in text)


def first_number(text: str) -> str | None:
    """Return the first number of a text in plain decimal form; None if it is only part of a longer expression.

    Units, currency and per cent signs are ignored. Fractions, mixed numbers, powers of ten and magnitudes are read:

    >>> [first_number(text) for text in ("$1,200.50.", "so 18 eggs", "1/2", "2 1/2", "5e3", "2 × 10^6", "5 million")]
    ['1200.5', '18', '0.5', '2.5', '5000', '2000000', '5000000']
    >>> [first_number(text) for text in ("12-15", "3 or 4", "12:30", "1,2", "2*3", "2 hours 30 minutes", "v13")]
    [None, None, None, None, None, None, None]
    """
    text = _spelt_out(text)
    found = _NUMBER.search(text)
    if not found or found["more"] or re.search(r"\bnot\b|n't\b", text[: found.start()]):
        return None
    return _value(found)


def read_number(text: str) -> str | None:
    """Read the number of a gold label as `first_number` does; None if the text holds more than a number and its unit.

    >>> [read_number(text) for text in ("145.0", "1e-05", " -1,200 ", "18 eggs", "3/4", "about 5", "12:30", "nan")]
    ['145', '0.00001', '-1200', '18', '0.75', None, None, None]
    """
    text = _spelt_out(text).strip()
    found = _NUMBER.match(text)
    return _value(found) if found and not found["more"] and _UNIT.fullmatch(text, found.end()) else None


def number_after(text: str, marker: str) -> str | None:
    """Read a number strictly, by `first_number` behind the last ``marker``; numbers elsewhere are reasoning."""
    _, found, tail = text.rpartition(marker)
    return first_number(tail) if found else None


def last_number(text: str) -> str | None:
    """Read a number leniently: the last number anywhere in the text, after removing commas."""
    found = _LOOSE_NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else None


def close(found: str | None, gold: str) -> bool:
    """Tell whether two numbers differ by at most 0.001."""
    return found is not None and abs(Decimal(found) - Decimal(gold)) <= TOLERANCE


def name_after(text: str, sentence: str, names: str) -> str | None:
    """Read a name strictly: it must follow the answer sentence directly, and be the only name from there on.

    Case matters. The same name may be repeated, but a text that goes on to another name, or to a second number
    ("answer1 or 2"), has no answer, because it is ambiguous.

    Args:
        text: What was generated.
        sentence: The words in front of the name; "" reads the whole text, which must then contain exactly one name.
        names: Regular expression that matches any of the names.
    """
    text = " ".join(text.split())
    if sentence:
        edge = r"\b" if sentence[-1].isalnum() else ""
        found = re.search(rf"{re.escape(sentence)}{edge}\W*((?:{names})(?!\w).*)", text)
        text = found[1] if found else ""
    named = set(re.findall(rf"(?<!\w)(?:{names})(?!\w)", text))
    second = re.search(rf"(?:{names})(?:\.| ?[/&-] ?| (?:and|or|to) )\d", text)
    return named.pop() if len(named) == 1 and not second else None


def first_name(text: str, names: str) -> str | None:
    """Read a name leniently: the first one anywhere, even inside a word."""
    found = re.search(names, text)
    return found[0] if found else None


def letter_after(text: str, marker: str, letters: str) -> str | None:
    """Read an option's letter strictly: the only letter, as a word of its own, directly behind the last ``marker``."""
    _, found, tail = text.rpartition(marker)
    second = rf"[).]?(?: ?[,;/&+-] ?| (?:and|or|to) )\(?[{letters}](?!\w)"
    letter = re.match(rf"\s*\(?([{letters}])(?!\w)(?!{second})", tail) if found else None
    return letter[1] if letter else None


def _spelt_out(text: str) -> str:
    """Replace non-ASCII digits, minus signs, fractions and superscripts, and LaTeX numbers, by plain characters."""
    text = re.sub(r"(?![0-9])\d", lambda found: str(int(found[0])), text.replace("{,}", ","))
    text = re.sub(
        r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r" \1/\2", text.replace("\\times", "×").replace("\\cdot", "·")
    )
    text = re.sub("[¼-¾⅐-⅞]", lambda found: " " + normalize("NFKC", found[0]).replace("\N{FRACTION SLASH}", "/"), text)
    text = re.sub("[⁻⁰¹²³⁴-⁹]+", lambda found: "^" + normalize("NFKC", found[0]), text)
    return re.sub("[\N{MINUS SIGN}\N{EN DASH}]", "-", text).replace("\\", "")


def _value(found: re.Match[str]) -> str | None:
    """Return the value of a match of ``_QUANTITY`` in decimal form; None if it is not a valid number."""
    power = found["power"] or found["exponent"] or "0"
    if len(power) > len(f"-{LARGEST_POWER}") or abs(int(power)) > LARGEST_POWER:
        return None
    if found["under"]:
        over, under = Decimal(found["over"]), Decimal(found["under"])
        if not under or (found["whole"] and over >= under):
            return None
        value = QUOTIENT.divide(Decimal(found["whole"] or 0) * under + over, under)
    else:
        value = Decimal(f"{re.sub('[^0-9.]', '', found['number'] or found['factor'] or '1')}E{power}")
    for word in re.findall("[a-z]+", found["magnitudes"].lower()):
        value = EXACT.multiply(value, MAGNITUDES[word.removesuffix("s")])
    sign = -1 if "-" in (found["sign"], found["late_sign"]) else 1
    return format(EXACT.multiply(value, sign).normalize(EXACT) if value else Decimal(0), "f")
