"""What a benchmark is: where its rows are, how a row becomes prompt and target, how an answer is read and judged.

A new benchmark of a known kind is one YAML under ``configs/data/``; a new kind is one class here.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, ClassVar, Literal, NamedTuple

from tcopilot.data.answers import first_option, last_number, number_after, tidy

Row = Mapping[str, Any]
SPLITS = ("train", "validation", "test")


class DataError(ValueError):
    """Say what is wrong with the data or its settings, where, and how to mend it."""


class Example(NamedTuple):
    """One row as the models see it."""

    prompt: str
    target: str
    answer: str
    """The gold answer, in the form in which ``Benchmark.extract`` returns a predicted one."""


@dataclass(kw_only=True)
class Benchmark(ABC):
    """Describe one benchmark.

    Templates are ``str.format`` strings over the row's columns and the words that the kind adds (``words``). For real
    tokenizers of decoder-only Pilots the target template should start with a space or a line break, since prompt
    and target are tokenised apart and then joined.

    Attributes:
        name: Its key in ``data.benchmarks`` and in the results.
        prompt: Template of the prompt.
        target: Template of the target, without the end token.
        hub: Data set id on the Hugging Face Hub; None for data that is only local.
        config: The Hub's configuration name.
        revision: The Hub's revision (commit, tag); None is the newest.
        splits: Our split names to the Hub's. Without ``validation`` the data module carves one from train.
        folder: Folder of the local copy under a common root; ``name`` unless given.
        metric: Name of the metric in the results.
        version: Raised whenever prompt, target or extraction change, since scores are then no longer comparable.
        max_new_tokens: Longest answer that decoding waits for, in tokens; None is what the longest training target
            needs with the Pilot's tokenizer.
        source: Where the data comes from and under which licence.
    """

    words: ClassVar[frozenset[str]] = frozenset()

    name: str
    prompt: str
    target: str
    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    folder: str | None = None
    metric: str = "accuracy"
    version: int = 1
    max_new_tokens: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.splits) - set(SPLITS))
        if unknown:
            raise DataError(f"{self.name}: splits has {unknown}; the known ones are {list(SPLITS)}")
        if "train" not in self.splits:
            raise DataError(f"{self.name}: splits names no train split")
        for key in ("prompt", "target"):
            try:
                names = [name for _, name, _, _ in Formatter().parse(getattr(self, key))]
            except ValueError:
                names = [""]
            if any(name is not None and (not name or name[0].isdigit()) for name in names):
                raise DataError(
                    f"data.benchmarks.{self.name}.{key}={getattr(self, key)!r} is no template: write {{column}}, and "
                    "{{ or }} for a brace itself"
                )

    @property
    def columns(self) -> list[str]:
        """List the columns that every row must have: those of the templates and those the kind reads."""
        fields = [name for text in (self.prompt, self.target) for _, name, _, _ in Formatter().parse(text) if name]
        read = [*(name for name in fields if name not in self.words), *self._paths()]
        return list(dict.fromkeys(path.split(".")[0] for path in read))

    def builtin_rows(self, split: str) -> list[dict[str, str]] | None:
        """Return the rows of a split if the benchmark makes them itself; None if they are to be read."""
        return None

    @abstractmethod
    def render(self, row: Row) -> Example:
        """Turn a row into prompt, target and gold answer.

        Raises:
            DataError: If a value of the row cannot be read as the benchmark's kind says.
        """

    @abstractmethod
    def extract(self, text: str) -> str | None:
        """Return the answer in a generated text, None if it holds none."""

    def correct(self, prediction: str, answer: str) -> bool:
        """Tell whether a generated text gives the gold answer."""
        return self.extract(prediction) == answer

    def _paths(self) -> Sequence[str]:
        """Name the columns read besides those of the templates; ``a.b`` is key b of column a."""
        return ()

    def _example(self, row: Row, answer: str, /, **words: str) -> Example:
        values = {**row, **words}
        return Example(self.prompt.format(**values), self.target.format(**values), answer)


@dataclass(kw_only=True)
class ExactMatch(Benchmark):
    """Judge the whole text, white space apart. Template words: ``prompt`` and ``target``, the two named columns."""

    words: ClassVar[frozenset[str]] = frozenset({"prompt", "target"})

    prompt: str = "{prompt}"
    target: str = "{target}"
    prompt_column: str = "prompt"
    target_column: str = "target"

    def render(self, row: Row) -> Example:
        """Fill the templates with the two columns; the answer is the tidied target."""
        prompt, target = str(lookup(row, self.prompt_column)), str(lookup(row, self.target_column))
        example = self._example(row, "", prompt=prompt, target=target)
        return example._replace(answer=tidy(example.target) or "")

    def extract(self, text: str) -> str | None:
        """Return the text with white space collapsed; None if it is blank."""
        return tidy(text)

    def _paths(self) -> Sequence[str]:
        return self.prompt_column, self.target_column


@dataclass(kw_only=True)
class MultipleChoice(Benchmark):
    """Ask for one of several options by the name ``answer<number>``, counted from 1.

    Template words: ``question``; ``options``, a line ``answer1: …`` for each; ``names``, ``answer1/answer2/…``;
    ``answer``, the gold name.

    Attributes:
        question_column: Column of the question, or a path such as ``question.stem``.
        option_columns: Columns or paths, each of one option (str) or of a list of them, in order.
        label_column: Column or path of the gold option.
        label: How the label counts: ``zero_based`` or ``one_based`` (int or digits), or ``letter`` (A is the first).
    """

    words: ClassVar[frozenset[str]] = frozenset({"question", "options", "names", "answer"})

    prompt: str = "Question: {question}\n{options}\nReply with one of {names}.\nReply:"
    target: str = " the correct answer is {answer}"
    question_column: str
    option_columns: list[str]
    label_column: str
    label: Literal["zero_based", "one_based", "letter"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label not in ("zero_based", "one_based", "letter"):
            raise DataError(f"{self.name}: label is zero_based, one_based or letter, got {self.label!r}")

    def render(self, row: Row) -> Example:
        """Name the options and the gold one."""
        values = [lookup(row, path) for path in self.option_columns]
        options = [str(o) for value in values for o in ([value] if isinstance(value, str) else value)]
        gold = self._index(lookup(row, self.label_column), len(options))
        names = [f"answer{number}" for number in range(1, len(options) + 1)]
        return self._example(
            row,
            names[gold],
            question=str(lookup(row, self.question_column)).strip(),
            options="\n".join(f"{name}: {option.strip()}" for name, option in zip(names, options, strict=True)),
            names="/".join(names),
            answer=names[gold],
        )

    def extract(self, text: str) -> str | None:
        """Return the first option that is named."""
        return first_option(text)

    def _paths(self) -> Sequence[str]:
        return self.question_column, *self.option_columns, self.label_column

    def _index(self, label: Any, options: int) -> int:
        text = str(label).strip()
        if self.label == "letter":
            index = ord(text.upper()) - ord("A") if len(text) == 1 else -1
        else:
            index = int(text) - (self.label == "one_based") if text.isdigit() else -1
        if not 0 <= index < options:
            raise DataError(f"{self.label_column} is {label!r}, no {self.label} label of {options} options")
        return index


@dataclass(kw_only=True)
class NumberAnswer(Benchmark):
    """Ask for a number behind a marker, after free reasoning if the data has it.

    Template words: ``reasoning`` (may be empty) and ``number``. The target template should hold the marker.

    Attributes:
        answer_column: Column or path of the answer.
        split_on: Text between reasoning and number in that column; None if the column is the number alone.
        remove: Regular expression of what is taken out of the reasoning, such as a calculator's notes.
        marker: Text that stands before the number in targets and predictions.
    """

    words: ClassVar[frozenset[str]] = frozenset({"reasoning", "number"})

    answer_column: str
    split_on: str | None = None
    remove: str | None = None
    marker: str = "####"

    def render(self, row: Row) -> Example:
        """Divide the answer column into reasoning and number."""
        text = str(lookup(row, self.answer_column))
        reasoning, _, tail = text.rpartition(self.split_on) if self.split_on else ("", "", text)
        number = last_number(tail)
        if number is None:
            raise DataError(f"{self.answer_column} is {text[-40:]!r}, which gives no number")
        if self.remove:
            reasoning = re.sub(self.remove, "", reasoning)
        return self._example(row, number, reasoning=reasoning.strip(), number=number)

    def extract(self, text: str) -> str | None:
        """Return the last number behind the marker."""
        return number_after(text, self.marker)

    def _paths(self) -> Sequence[str]:
        return (self.answer_column,)


def lookup(row: Row, path: str) -> Any:
    """Return the value at a column or a dotted path.

    >>> lookup({"choices": {"text": ["a", "b"]}}, "choices.text")
    ['a', 'b']

    Raises:
        DataError: If a part of the path is missing.
    """
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            found = ", ".join(value) if isinstance(value, Mapping) else repr(value)
            raise DataError(f"no {path!r} in the row: found {found}")
        value = value[key]
    return value
