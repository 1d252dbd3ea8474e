"""Built-in tasks, generated from a seed over a closed vocabulary, without a download.

Every task is a :class:`Benchmark`, so the rest of the code need not know that its rows are generated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import NamedTuple

from tcopilot.data.benchmarks import DataError, ExactMatch, Splits

NAMES = ("amy", "ben", "carl", "dora", "nina", "omar", "paul", "rosa")
THINGS = ("apples", "books", "coins", "eggs", "pens", "stamps", "cards", "shells")
SUMS = (
    "{a} has {x} {o} and {b} has {y} {o} . how many {o} do they have in all ?",
    "{a} had {x} {o} and found {y} more . how many {o} does {a} have now ?",
    "there are {x} {o} on the table and {y} in the box . how many {o} are there in all ?",
)
DIFFERENCES = (
    "{a} had {x} {o} and gave {y} to {b} . how many {o} does {a} have left ?",
    "{a} has {x} {o} and {b} has {y} . how many more {o} does {a} have than {b} ?",
    "{a} needs {x} {o} and has {y} . how many more {o} does {a} need ?",
)


def _word_problem(random: Random) -> tuple[str, str]:
    template = random.choice(SUMS + DIFFERENCES)
    a, b = random.sample(NAMES, 2)
    x, y = random.randint(2, 20), random.randint(2, 20)
    if template in DIFFERENCES:
        x, y = max(x, y), min(x, y)
    answer = x - y if template in DIFFERENCES else x + y
    return template.format(a=a, b=b, o=random.choice(THINGS), x=x, y=y), str(answer)


WORD_PROBLEM_WORDS = [
    *dict.fromkeys(word for template in SUMS + DIFFERENCES for word in template.split() if "{" not in word),
    *(*NAMES, *THINGS, *map(str, range(41))),
]


ENTITIES, RELATIONS, CLASSES, VALUES = 60, 6, 6, 24


def _world(random: Random) -> list[list[int]]:
    """Return value[entity][relation]: the value of the entity's class, replaced at random in one fact of four."""
    rule = [[random.randrange(VALUES) for _ in range(RELATIONS)] for _ in range(CLASSES)]
    return [
        [random.randrange(VALUES) if random.random() < 0.25 else value for value in rule[entity % CLASSES]]
        for entity in range(ENTITIES)
    ]


WORLD = _world(Random("world"))


def _choice(random: Random) -> tuple[str, str]:
    entity, relation = random.randrange(ENTITIES), random.randrange(RELATIONS)
    gold = WORLD[entity][relation]
    options = [gold, *random.sample([value for value in range(VALUES) if value != gold], 2)]
    random.shuffle(options)
    return f"what is r{relation} of e{entity} ? " + " ".join(f"v{v}" for v in options), f"answer : v{gold}"


CHOICE_WORDS = [
    *("what", "is", "of", "?", "answer", ":"),
    *(f"{kind}{i}" for kind, count in (("r", RELATIONS), ("e", ENTITIES), ("v", VALUES)) for i in range(count)),
]


ITEMS, TASTES, HISTORY = 120, 12, 8
ITEMS_PER_TASTE = ITEMS // TASTES


def _next_item(random: Random) -> tuple[str, str]:
    """Simulate a user with two tastes: each step advances one by 1 (70 %) or 3 (20 %), or takes any item (10 %)."""
    tastes = random.sample(range(TASTES), 2)
    places = [random.randrange(ITEMS_PER_TASTE) for _ in tastes]
    items = []
    for _ in range(HISTORY + 1):
        which, luck = random.randrange(2), random.random()
        if luck < 0.9:
            places[which] = (places[which] + (1 if luck < 0.7 else 3)) % ITEMS_PER_TASTE
            items.append(tastes[which] * ITEMS_PER_TASTE + places[which])
        else:
            items.append(random.randrange(ITEMS))
    *history, target = (f"i{item}" for item in items)
    return " ".join(history), target


UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def _in_words(number: int) -> str:
    """Spell a number from -99 to 99.

    >>> _in_words(-47), _in_words(30), _in_words(0)
    ('minus forty seven', 'thirty', 'zero')
    """
    tens, unit = divmod(abs(number), 10)
    said = UNITS[abs(number)] if tens < 2 else " ".join([TENS[tens - 2], *([UNITS[unit]] if unit else [])])
    return f"minus {said}" if number < 0 else said


def _signed_difference(random: Random) -> tuple[str, str]:
    """Ask for x - y in words; x - y and y - x use the same words, so only their order determines the sign."""
    x, y = random.randrange(100), random.randrange(100)
    return f"what is {_in_words(x)} minus {_in_words(y)} ?", _in_words(x - y)


class Kind(NamedTuple):
    """One family of tasks: ``draw`` makes a (prompt, target), ``words`` lists every word that it may use."""

    draw: Callable[[Random], tuple[str, str]]
    words: list[str]


KINDS = {
    "word_problems": Kind(_word_problem, WORD_PROBLEM_WORDS),
    "multiple_choice": Kind(_choice, CHOICE_WORDS),
    "signed_difference": Kind(_signed_difference, ["what", "is", "minus", "?", *UNITS, *TENS]),
    "next_item": Kind(_next_item, [f"i{item}" for item in range(ITEMS)]),
}


@dataclass(kw_only=True)
class GeneratedTask(ExactMatch):
    """Generate the rows of a task; equal settings give equal rows.

    Test and validation rows are drawn first. Their prompts are all distinct, and none of them occurs in train, where
    prompts may repeat. The target starts with a space, as byte and subword tokenizers require.

    Attributes:
        kind: ``word_problems``, ``multiple_choice``, ``signed_difference`` or ``next_item``.
        train: Number of rows; likewise ``validation`` and ``test``.
        seed: Seed of the draw. The world of ``multiple_choice`` is the same for every seed.
    """

    target: str = " {target}"
    splits: Splits = field(default_factory=lambda: {s: s for s in ("train", "validation", "test")})
    kind: str
    train: int = 32_000
    validation: int = 1_000
    test: int = 2_000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise DataError(f"{self.name}: unknown kind {self.kind!r}; the known ones are {', '.join(KINDS)}")

    @property
    def vocabulary(self) -> list[str]:
        """List every word of prompts and targets, in an order that does not depend on the seed."""
        return KINDS[self.kind].words

    def builtin_rows(self, split: str) -> list[dict[str, str]]:
        """Return the rows of a split; all splits are drawn once, at the first call."""
        return self._rows[split]

    @cached_property
    def _rows(self) -> dict[str, list[dict[str, str]]]:
        random = Random(f"{self.kind} {self.seed}")
        held: set[str] = set()
        rows = {split: self._draw(random, getattr(self, split), held, keep=True) for split in ("test", "validation")}
        return rows | {"train": self._draw(random, self.train, held, keep=False)}

    def _draw(self, random: Random, count: int, held: set[str], keep: bool) -> list[dict[str, str]]:
        """Draw rows whose prompts are not in ``held``; with ``keep`` the new prompts are added to ``held``."""
        rows: list[dict[str, str]] = []
        for _ in range(20 * count + 1000):  # if so many draws do not suffice, there are no new prompts left
            if len(rows) == count:
                return rows
            prompt, target = KINDS[self.kind].draw(random)
            if prompt not in held:
                rows.append({"prompt": prompt, "target": target})
                if keep:
                    held.add(prompt)
        raise DataError(f"{self.name}: {count} rows asked for, but only {len(rows)} have new prompts; ask for fewer")
