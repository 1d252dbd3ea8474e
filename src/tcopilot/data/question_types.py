"""The types of question that reasoning benchmarks ask: named options, true or false, a number, a lettered option.

All of them are judged twice, see :class:`TwoReadings`. A benchmark of one of these types needs only a YAML. Settings
named ``…_column`` hold the name of a column or a path into one, such as ``question.stem``.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter, ascii_uppercase
from typing import ClassVar, Literal

from tcopilot.data import answers
from tcopilot.data.benchmarks import Benchmark, DataError, Example, Row, lookup, text_at
from tcopilot.data.metrics import Answer, LenientAccuracy, Metric, NoAnswer


@dataclass(kw_only=True)
class TwoReadings(Benchmark):
    """Judge a text twice: strictly, in the form that the prompt asks for, and leniently, as LLM-Adapters does.

    The strict reading is the metric. The lenient one is reported too, because published figures use it, and so is the
    share of texts without a strict answer, which tells a model that has not learned the form from one that errs.
    """

    def _usual_metrics(self, name: str) -> Sequence[Metric]:
        return Metric(name), LenientAccuracy(f"{name}_lenient"), NoAnswer()

    def read(self, prediction: str, answer: str) -> Answer:
        """Read a generated text in both ways."""
        lenient = self.same(self.extract_lenient(prediction), answer)
        return super().read(prediction, answer)._replace(correct_leniently=lenient)

    @abstractmethod
    def extract_lenient(self, text: str) -> str | None:
        """Return the answer that the evaluation of LLM-Adapters finds in a text, or None."""

    def _require(self, text: str, why: str) -> None:
        if not text or text not in self.target:
            raise self._error("target", f"{text!r}: {why}", says=" lacks ")


@dataclass(kw_only=True)
class NamedAnswer(TwoReadings):
    """Ask for one of a few names, so that every possible target is known.

    Template words: ``question``; ``names``, all names separated by slashes; ``answer``, the gold name. The text in
    front of ``{answer}`` in the target template is the answer sentence. The strict reading accepts a name only
    directly behind it; see :func:`tcopilot.data.answers.name_after`.
    """

    words: ClassVar[frozenset[str]] = frozenset({"question", "options", "names", "answer"})

    target: str = " the correct answer is {answer}"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("{answer}", "without it all answers would be the same text")

    def extract(self, text: str) -> str | None:
        """Return the one name behind the answer sentence."""
        before = next(text for text, word, _, _ in Formatter().parse(self.target) if word == "answer")
        return answers.name_after(text, " ".join(before.split()), self._pattern)

    def extract_lenient(self, text: str) -> str | None:
        """Return the first name anywhere in the text."""
        return answers.first_name(text, self._pattern)

    @property
    @abstractmethod
    def _pattern(self) -> str:
        """Regular expression that matches any of the names."""

    def _closed(self, row: Row, gold: int, names: Sequence[str], /, **words: str) -> Example:
        """Render a row with its own target, and with the targets of all names as options."""
        words["names"] = "/".join(names)
        every = [self._example(row, names[gold], **words, answer=name) for name in names]
        return every[gold]._replace(options=tuple(example.target for example in every))


@dataclass(kw_only=True)
class MultipleChoice(NamedAnswer):
    """Ask for one of several options by its name, such as ``answer2``, counted from 1.

    Further template word: ``options``, a line ``answer1: …`` for each.

    Attributes:
        heading_column: A heading that is put before the question with a colon; left out where it is empty.
        option_columns: Each holds one option or a list of them, in order.
        option_labels_column: List of the options' own labels, to which the gold label belongs. If None, or if a row
            lacks the last key of the path, options are numbered as ``label`` says.
        option_name: Name of an option without its number.
        option_count: Number of options that each row must have; None allows any number.
        label: How the label denotes an option: ``zero_based`` or ``one_based`` number, or ``letter`` (A is the first).
    """

    prompt: str = "Question: {question}\n{options}\nReply with one of {names}.\nReply:"
    heading_column: str | None = None
    question_column: str
    option_columns: list[str]
    option_labels_column: str | None = None
    option_name: str = "answer"
    option_count: int | None = None
    label_column: str
    label: Literal["zero_based", "one_based", "letter"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.option_columns:
            raise self._error("option_columns", "name the column of the options, or one column for each")
        if not self.option_name.strip():
            raise self._error("option_name", "give a word, such as answer")
        if self.option_count is not None and self.option_count < 2:
            raise self._error("option_count", "a choice needs at least 2, or null for any number")

    def render(self, row: Row) -> Example:
        """Name each option, and the gold one as the answer."""
        options = _options(row, self.option_columns, self.option_count)
        names = self._names(options)
        question = text_at(row, self.question_column).strip()
        heading = self.heading_column and lookup(row, self.heading_column)
        heading = text_at(row, self.heading_column).strip() if heading is not None else ""
        gold = self._gold(row, len(options))
        example = self._closed(
            row,
            gold,
            names,
            question=f"{heading}: {question}" if heading else question,
            options="\n".join(f"{name}: {option}" for name, option in zip(names, options, strict=True)),
        )
        return example._replace(twin=_has_twin(options, gold))

    def _names(self, options: Sequence[str]) -> list[str]:
        """Return the name by which the answer refers to each option."""
        return [f"{self.option_name}{number}" for number in range(1, len(options) + 1)]

    @property
    def _pattern(self) -> str:
        name = re.escape(self.option_name)
        if self.option_count is None:
            return rf"{name}\d+"
        return "|".join(f"{name}{number}" for number in range(self.option_count, 0, -1))  # 12 before 1

    def _gold(self, row: Row, options: int) -> int:
        """Return the index of the gold option."""
        label = lookup(row, self.label_column)
        *path, key = (self.option_labels_column or "").split(".")
        held = lookup(row, ".".join(path)) if path else row
        if key and key in held:
            given = held[key] if isinstance(held[key], list) else []
            names = [str(name).strip().upper() for name in given if name is not None and not isinstance(name, bool)]
            if len(set(names)) != options or len(names) != options:
                expected = f"{options} different labels, one for each option"
                raise DataError(f"{self.option_labels_column} is {held[key]!r:.80}, expected {expected}")
        elif self.label == "letter":
            names = list(ascii_uppercase[:options])
        else:
            names = [str(number + (self.label == "one_based")) for number in range(options)]
        if (text := str(label).strip().upper()) not in names:
            expected = f"{names[0]} to {names[-1]}" if names == sorted(names) else f"one of {', '.join(names)}"
            raise DataError(
                f"{self.label_column} is {label!r}, expected {expected} (a {self.label} label of {options} options)"
            )
        return names.index(text)


@dataclass(kw_only=True)
class Cloze(MultipleChoice):
    """Ask a question without showing the options; the answer is the text of one, as a pretrained model might continue.

    Meant for `evaluation=likelihood`, which chooses the likeliest option; a generated text must equal the gold option.
    """

    prompt: str = "Question: {question}\nAnswer:"
    target: str = " {answer}"

    def extract(self, text: str) -> str | None:
        """Return the text itself, without what the target template has around it."""
        before, _, after = (" ".join(part.split()) for part in self.target.partition("{answer}"))
        found = answers.tidy(text)
        return found and (found.removeprefix(before).removesuffix(after).strip() or None)

    def same(self, found: str | None, answer: str) -> bool:
        """Compare two texts up to white space and the encoding of accents."""
        return found == answers.tidy(answer)

    def extract_lenient(self, text: str) -> str | None:
        """Return the same as the strict reading."""
        return self.extract(text)

    def _names(self, options: Sequence[str]) -> list[str]:
        return list(options)


@dataclass(kw_only=True)
class YesNo(NamedAnswer):
    """Ask whether something holds; the label is a boolean, the answer is ``true`` or ``false``."""

    words: ClassVar[frozenset[str]] = frozenset({"question", "names", "answer"})
    _pattern: ClassVar[str] = "true|false"

    prompt: str = "Question: {question}\nReply with {names}.\nReply:"
    question_column: str
    label_column: str

    def render(self, row: Row) -> Example:
        """Turn the boolean into a word."""
        label = lookup(row, self.label_column)
        if not isinstance(label, bool):
            mend = " (CSV holds texts only: use JSON or Parquet)" if isinstance(label, str) else ""
            wanted = f"expected a boolean, true or false without quotes{mend}"
            raise DataError(f"{self.label_column} is {label!r:.80}, {wanted}")
        question = text_at(row, self.question_column).strip()
        return self._closed(row, int(not label), ("true", "false"), question=question)


@dataclass(kw_only=True)
class NumberAnswer(TwoReadings):
    """Ask for a number behind a marker, after free reasoning if the data has it.

    Template words: ``reasoning`` (may be empty) and ``number``. If the reasoning has its own column, use that column's
    name in the target template. Numbers count as equal if they differ by at most 0.001.

    Attributes:
        split_on: Text between reasoning and number in the answer column; None if the column holds only the number.
        remove: Regular expression of what is removed from the reasoning, such as calculator annotations.
        marker: Text in front of the number in targets and predictions.
    """

    words: ClassVar[frozenset[str]] = frozenset({"reasoning", "number"})

    answer_column: str
    split_on: str | None = None
    remove: str | None = None
    marker: str = "####"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("{number}", "without it the target has no answer")
        self._require(self.marker, "predictions are read behind this marker")
        try:
            re.compile(self.remove or "")
        except re.error as error:
            raise self._error("remove", f"not a valid regular expression: {error}; mend it", says=" is ") from error

    def render(self, row: Row) -> Example:
        """Split the answer column into reasoning and number."""
        text = text_at(row, self.answer_column)
        reasoning, found, tail = text.rpartition(self.split_on) if self.split_on else ("", True, text)
        if not found:
            lack = f"no {self.split_on!r} before a number"
            raise DataError(f"{self.answer_column} is {text[-40:]!r}, which gives no number: it has {lack}")
        number = answers.read_number(tail)
        if number is None:
            raise DataError(
                f"{self.answer_column} is {text[-40:]!r}, which gives no number; expected one, with at most a unit"
            )
        if self.remove:
            reasoning = re.sub(self.remove, "", reasoning)
        return self._example(row, number, reasoning=reasoning.strip(), number=number)

    def extract(self, text: str) -> str | None:
        """Return the first number behind the last marker."""
        return answers.number_after(text, self.marker)

    def extract_lenient(self, text: str) -> str | None:
        """Return the last number anywhere in the text."""
        return answers.last_number(text)

    def same(self, found: str | None, answer: str) -> bool:
        """Compare two numbers with a tolerance of 0.001."""
        return answers.close(found, answer)


@dataclass(kw_only=True)
class LetteredOptions(TwoReadings):
    """Ask for the letter of an option behind a marker, after free reasoning if the data has it.

    Template words: ``question``; ``options``, a line ``A) …`` for each; ``reasoning`` (may be empty); ``answer``, the
    gold letter. ``Example.options`` stays empty: a target contains the reasoning of its gold answer, so the targets of
    the other letters are not known, and the model was not trained to write a letter without reasoning.

    Attributes:
        options_column: The list of options, each of which begins with its letter, as in "A)12".
        option_count: Options that each row must have.
        marker: Text in front of the letter in targets and predictions.
    """

    words: ClassVar[frozenset[str]] = frozenset({"question", "options", "reasoning", "answer"})

    prompt: str = "Question: {question}\n{options}\nAnswer:"
    target: str = " {reasoning}\n#### {answer}"
    question_column: str
    options_column: str
    option_count: int = 5
    label_column: str
    reasoning_column: str | None = None
    marker: str = "####"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("{answer}", "without it the target has no answer")
        self._require(self.marker, "predictions are read behind this marker")
        if not 2 <= self.option_count <= len(ascii_uppercase):
            raise self._error("option_count", f"there are letters for 2 to {len(ascii_uppercase)} options")

    def render(self, row: Row) -> Example:
        """Separate the options from their letters."""
        options = _options(row, [self.options_column], self.option_count)
        for letter, option in zip(self._letters, options, strict=True):
            if not option.startswith(f"{letter})"):
                raise DataError(f"{self.options_column} has {option!r:.80}, expected it to begin with '{letter})'")
        label = lookup(row, self.label_column)
        if not isinstance(label, str) or label not in tuple(self._letters):
            raise DataError(f"{self.label_column} is {label!r:.80}, expected a letter A to {self._letters[-1]}")
        example = self._example(
            row,
            label,
            question=text_at(row, self.question_column).strip(),
            options="\n".join(f"{option[:2]} {option[2:].strip()}" for option in options),
            reasoning=text_at(row, self.reasoning_column).strip() if self.reasoning_column else "",
            answer=label,
        )
        texts = [option[2:] for option in options]
        return example._replace(twin=_has_twin(texts, self._letters.index(label)))

    def extract(self, text: str) -> str | None:
        """Return the letter directly behind the last marker."""
        return answers.letter_after(text, self.marker, self._letters)

    def extract_lenient(self, text: str) -> str | None:
        """Return the first capital letter that denotes an option, even inside a word."""
        return answers.first_name(text, f"[{self._letters}]")

    @property
    def _letters(self) -> str:
        return ascii_uppercase[: self.option_count]


def _has_twin(options: Sequence[str], gold: int) -> bool:
    """Tell whether another option equals the gold one, up to white space and the encoding of accents."""
    texts = [answers.tidy(option) for option in options]
    return texts.count(texts[gold]) > 1


def _options(row: Row, paths: Sequence[str], count: int | None) -> list[str]:
    """Return a row's stripped options; refuse options that are empty or no text, and a number other than ``count``."""
    options: list[str] = []
    for path in paths:
        value = lookup(row, path)
        for option in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(option, str | int | float) or not answers.is_finite(option):
                raise DataError(f"{path} is {value!r:.80}, expected a text or a list of texts")
            options.append(text_at({"option": option}, "option").strip())
            if answers.is_blank(options[-1]):
                raise DataError(f"{path} has an empty option: {value!r:.80}")
    if len(options) < 2 or (count is not None and len(options) != count):
        expected = "at least 2" if count is None else str(count)
        raise DataError(f"{', '.join(paths)} gives {len(options)} options {options!r:.80}, expected {expected}")
    return options
