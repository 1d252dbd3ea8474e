"""What a benchmark is: where its rows are, how a row becomes prompt and target, how an answer is read and judged.

A new benchmark of a known question type is one YAML under ``configs/data/``. A new type is one class, like those in
``question_types``.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from numbers import Real
from pathlib import PurePath
from string import Formatter
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from transformers import PreTrainedTokenizerBase

from tcopilot.data.answers import is_blank, is_finite, tidy
from tcopilot.data.metrics import NLL, Answer, CorpusMetric, Metric, class_called
from tcopilot.settings import is_list

Row = Mapping[str, Any]
Splits = dict[str, str | list[str]]
SPLITS = ("train", "validation", "test")
TYPES = {  # what an attribute's type stands for in a config
    str: "a text",
    int: "a whole number",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    Splits: "a mapping of texts or of lists of texts",
    Metric: "a metric with its _target_",
    list[Metric]: "a list of metrics with their _target_",
    NoneType: "null",
}
FRAME = ("names", "options", "title")  # template words that are not the question itself
LONGEST_NAME = 100  # characters; names become parts of file names


class DataError(ValueError):
    """Raised for wrong data or data settings; the message says what is wrong, where, and how to mend it."""


class Example(NamedTuple):
    """One row as rendered for the models."""

    prompt: str
    target: str
    answer: str
    """The gold answer, in the form in which ``Benchmark.extract`` returns a predicted one."""
    options: tuple[str, ...] = ()
    """Every target that the row allows, ``target`` included; empty for open-ended answers."""
    seen: tuple[int, ...] = ()
    """Indices in ``Benchmark.catalogue`` of items that the user already has, which no ranking may contain."""
    ending: int = 0
    """Number of characters at the end of the prompt, from the options on, that do not belong to the question."""
    twin: bool = False
    """Whether another option has the same text as the gold one, so that the label is ambiguous."""

    @property
    def question(self) -> str:
        """The question without its options, in normalised case and white space, so that equal questions are equal."""
        return " ".join(self.prompt[: len(self.prompt) - self.ending].split()).casefold()


@dataclass(kw_only=True)
class Benchmark(ABC):
    r"""Describe one benchmark.

    Templates are ``str.format`` strings over the row's columns, paths into them (``{meta.lang}``, ``{turns.0.text}``)
    and the words that the class adds (``words``). For real tokenizers of decoder-only Pilots the target template
    should start with a space or a line break, since prompt and target are tokenised separately and then joined;
    spaces at the end of the prompt are then removed. A ``\n`` that a shell or plain YAML passes as two characters
    becomes a line break; ``\\n`` becomes the two characters.

    Attributes:
        name: Its key in ``data.benchmarks`` and in the results.
        target: Template of the target, without the end token.
        hub: Data set id on the Hugging Face Hub; None for data that is only local.
        revision: Commit or tag on the Hub; None means the newest.
        splits: Maps our split names to those of the Hub, optionally with a slice (``train[:2000]``), or to files
            (``a.csv``, ``part-*.json.gz[:90%]``, or a list of such); each split may use either. None names
            nothing: a local file is read if there is one; else there is no such split, and ``validation`` is carved.
        folder: Folder of the local copy under a common root; ``name`` unless given.
        metric: What λ is chosen by: a name for the share of right answers, or a metric of your own, which then
            comes before the benchmark's usual metrics.
        version: To be increased whenever prompt, target or extraction change, as scores are then no longer comparable.
        max_new_tokens: Most tokens that decoding generates for an answer; None derives it from the longest training
            target with the Pilot's tokenizer.
        source: Where the data comes from and under which licence.
    """

    words: ClassVar[frozenset[str]] = frozenset()
    templated: ClassVar[bool] = False
    """Whether a chat template writes prompt and target as one text, which must then be tokenised as a whole."""
    no_answer_depends_on: ClassVar[frozenset[str]] = frozenset(
        {"source", "hub", "config", "revision", "folder", "splits", "metric", "more_metrics"}
    )
    """Fields that may change without invalidating stored predictions: remarks, the place of the rows (predictions are
    keyed by the contents of the rows), and metrics, which are computed again from the stored answers."""

    name: str
    prompt: str
    target: str
    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    splits: Splits = field(default_factory=lambda: {"train": "train", "test": "test"})
    folder: str | None = None
    metric: str | Metric = "accuracy"
    more_metrics: list[Metric] = field(default_factory=list)
    version: int = 1
    max_new_tokens: int | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.splits, Mapping):
            self.splits = {name: place for name, place in self.splits.items() if place is not None}
        if problems := list(self._wrong_values()):
            raise DataError("; ".join(problems))
        if unknown := sorted(set(self.splits) - set(SPLITS)):
            raise DataError(f"{self.name}: splits has {unknown}; the known ones are {list(SPLITS)}")
        if "train" not in self.splits:
            raise DataError(f"data.benchmarks.{self.name}.splits={self.splits}: there is no train split; name one")
        for name in ("prompt", "target", "marker", "split_on"):
            if isinstance(text := getattr(self, name, None), str):
                setattr(self, name, re.sub(r"(?<!\\)\\n", "\n", text).replace(r"\\n", r"\n"))
        for name in ("prompt", "target"):
            try:
                bad = any(not word or word[0].isdigit() for word in words_of(getattr(self, name)))
            except ValueError:
                bad = True
            if bad:
                raise self._error(name, "no valid template: write {column}, and {{ or }} for a brace", says=" is ")

    @property
    def columns(self) -> list[str]:
        """List the columns that every row must have: those that the templates use and those that the class reads."""
        in_templates = (word for text in (self.prompt, self.target) for word in words_of(text))
        paths = (*(word for word in in_templates if word not in self.words), *self._paths())
        return list(dict.fromkeys(path.split(".")[0] for path in paths))

    def answer_settings(self) -> dict[str, Any]:
        """Return the settings on which the answers, or their extraction, depend."""
        return {name: value for name, value in asdict(self).items() if name not in self.no_answer_depends_on}

    def builtin_rows(self, split: str) -> list[dict[str, str]] | None:
        """Return the rows of a split if the benchmark generates them itself; None if they must be loaded."""
        return None

    def file(self, split: str) -> str:
        """Return the file name of a split in a local copy."""
        return f"{split}.jsonl"

    def derive(self, split: str, rows: Iterable[Row]) -> Iterable[Row]:
        """Turn the rows of a file into a split's rows, which can be iterated repeatedly; here they are the same."""
        return rows

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: B027
        """Adopt the Pilot's tokenizer where rendering depends on it; called before any row is read."""

    def group_of(self, row: Row) -> str:
        """Return a key, here the question. Rows of equal key stay in one split, lest one be trained and tested on."""
        return self.render(row).question

    @property
    def catalogue(self) -> Sequence[str] | None:
        """List every possible target, for benchmarks that rank all of them; None for the others."""
        return None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """List the metrics; λ is chosen by the first one."""
        if isinstance(self.metric, Metric):
            return (self.metric, *self._usual_metrics("accuracy"), *self.more_metrics)
        return (*self._usual_metrics(self.metric), *self.more_metrics)

    def _usual_metrics(self, name: str) -> Sequence[Metric]:
        """List the metrics that every benchmark of this class reports; the first one is called ``name``."""
        return (Metric(name),)

    def read(self, prediction: str, answer: str) -> Answer:
        """Extract the answer from a generated text and compare it with the gold one."""
        return Answer(prediction, self.extract(prediction), answer, self.correct(prediction, answer))

    def score(self, prediction: str, answer: str) -> dict[str, float]:
        """Score a generated text by each metric; see `judge`."""
        return self.judge(self.read(prediction, answer))

    def judge(self, answer: Answer) -> dict[str, float]:
        """Score an answer by each metric that is a mean over rows.

        Raises:
            DataError: If a score is not a finite number.
        """
        scores = {metric.name: metric.score(answer) for metric in self.metrics if not isinstance(metric, CorpusMetric)}
        for name, score in scores.items():
            if not isinstance(score, Real) or not math.isfinite(score):
                found = f"{self.name}: the metric {name} gave {score!r} for the answer {answer.text!r:.80}"
                raise DataError(f"{found}; a score must be a finite number, such as a float")
        return {name: float(score) for name, score in scores.items()}

    def impossible(self, figures: Mapping[str, float]) -> list[str]:
        """Say which figures of the benchmark's metrics contradict each other; by default none can."""
        return []

    @abstractmethod
    def render(self, row: Row) -> Example:
        """Turn a row into prompt, target and gold answer.

        Raises:
            DataError: If a value of the row is not what the class expects.
        """

    def extract(self, text: str) -> str | None:
        """Return the answer in a generated text, or None; here the whole text with its white space normalised."""
        return tidy(text)

    def same(self, found: str | None, answer: str) -> bool:
        """Tell whether an extracted answer is the gold one."""
        return found == answer

    def correct(self, prediction: str, answer: str) -> bool:
        """Tell whether a generated text gives the gold answer."""
        return self.same(self.extract(prediction), answer)

    def _paths(self) -> Iterable[str]:
        """List the columns that the class reads itself: the values of all ``…_column`` and ``…_columns`` settings."""
        values = [getattr(self, item.name) for item in fields(self) if re.search("_columns?$", item.name)]
        return [path for value in values if value for path in ([value] if isinstance(value, str) else value)]

    def _error(self, name: str, text: str, says: str = ": ") -> DataError:
        """Make an error about one setting that states its key, its value and what is wrong."""
        return DataError(f"data.benchmarks.{self.name}.{name}={getattr(self, name)!r}{says}{text}")

    def _wrong_values(self) -> Iterator[str]:
        """Say which attributes have the wrong type or value, or cannot be part of a file name."""
        key = f"data.benchmarks.{self.name}"
        types = _attribute_types(type(self))
        for item in fields(self):
            value, kind = getattr(self, item.name), types.get(item.name)
            kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
            if get_origin(kind) is Literal and value not in get_args(kind):
                yield f"{key}.{item.name}={value!r}: use one of {', '.join(get_args(kind))}"
            if set(kinds) <= set(TYPES) and not any(_is_of(value, one) for one in kinds):
                yield f"{key}.{item.name}={value!r}: expected {' or '.join(TYPES[one] for one in kinds)}"
        if isinstance(self.name, str) and not re.fullmatch(rf"\w[\w.+-]{{0,{LONGEST_NAME - 1}}}", self.name):
            yield (
                f"data.benchmarks: {self.name!r} becomes part of file names; give a name of letters, digits and "
                f"_ . + -, at most {LONGEST_NAME}"
            )
        own = isinstance(self.metric, Metric) or self.more_metrics
        names = [metric.name for metric in self.metrics] if own and _is_of(self.more_metrics, list[Metric]) else []
        if twice := next((name for name in names if names.count(name) > 1), None):
            yield f"{key}: two metrics are called {twice!r}; give one of them another name"
        if isinstance(self.metric, str) and (usual := class_called(self.metric)):
            yield f"{key}.metric={self.metric!r} would only rename accuracy; write {key}.metric={{_target_: {usual}}}"
        if self.metric == NLL.name:
            yield f"{key}.metric='nll' would only rename accuracy; write fusion.select_by=nll"
        folder = PurePath(self.folder if isinstance(self.folder, str) else "")
        if folder.is_absolute() or ".." in folder.parts:
            yield f"{key}.folder={self.folder!r}: must lie under data.path"
        if _is_of(self.max_new_tokens, int) and self.max_new_tokens < 1:
            yield f"{key}.max_new_tokens={self.max_new_tokens}: must be at least 1, or null"

    def _example(self, row: Row, answer: str, /, **words: str) -> Example:
        texts = self.prompt, self.target, self._ending
        prompt, target, ending = (_Filler(words).vformat(text, (), row) for text in texts)
        for what, names in self._asked.items():
            if names and all(is_blank(words[name] if name in words else text_at(row, name)) for name in names):
                raise DataError(f"the {what} is empty: there is no text in {', '.join(names)}")
        if target.startswith(" "):
            prompt, ending = prompt.rstrip(" "), ending.rstrip(" ")
        return Example(prompt, target, answer, ending=len(ending))

    @cached_property
    def _asked(self) -> dict[str, list[str]]:
        """The fields that each template fills from a row, at least one of which must not be blank."""
        texts = {"prompt": self.prompt, "target": self.target}
        return {what: [word for word in words_of(text) if word not in FRAME] for what, text in texts.items()}

    @cached_property
    def _ending(self) -> str:
        """The end of the prompt template: from the options on, else what follows its last field."""
        fields = list(re.finditer(r"(?<!\{)\{\w[^{}]*\}", self.prompt))
        options = [field.start() for field in fields[1:] if field[0] == "{options}"]
        return self.prompt[(options or [fields[-1].end() if fields else len(self.prompt)])[0] :]


@dataclass(kw_only=True)
class ExactMatch(Benchmark):
    """Compare whole texts, up to white space. Template words: ``prompt``, ``target``, each from the column named."""

    words: ClassVar[frozenset[str]] = frozenset({"prompt", "target"})

    prompt: str = "{prompt}"
    target: str = "{target}"
    prompt_column: str = "prompt"
    target_column: str = "target"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not words_of(self.target):
            raise self._error("target", "{column}, so all answers would be the same text; add one", says=" holds no ")
        used = {"prompt", "target"} & {*words_of(self.prompt), *words_of(self.target)}
        self._named = {word: getattr(self, f"{word}_column") for word in used}

    def render(self, row: Row) -> Example:
        """Fill the templates with the two columns; the answer is the tidied target."""
        example = self._example(row, "", **{word: text_at(row, path) for word, path in self._named.items()})
        return example._replace(answer=tidy(example.target) or "")

    def _paths(self) -> Iterable[str]:
        unused = {self.prompt_column, self.target_column} - {*self._named.values()}
        return [path for path in super()._paths() if path not in unused]


class _Filler(Formatter):
    """Fill a template with the words of a benchmark's class and the values of a row."""

    def __init__(self, words: Mapping[str, str]) -> None:
        self.words = words

    def get_field(self, name: str, args: Sequence[Any], row: Row) -> tuple[Any, str]:
        if name in self.words:
            return self.words[name], name
        value = lookup(row, name)
        if value is None:
            raise DataError(f"{name} is null or missing, expected a text")
        text = text_at(row, name)
        return (text if isinstance(value, bool) else value), name  # a format such as :.2f wants the number


def words_of(template: str) -> list[str]:
    """List the names in a template's braces.

    Raises:
        ValueError: If it is no template.
    """
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]


def _attribute_types(benchmark: type) -> dict[str, Any]:
    """Return the types of a benchmark's attributes; of `Benchmark` alone if a subclass has unresolvable hints."""
    try:
        return get_type_hints(benchmark)
    except NameError:
        return get_type_hints(Benchmark)


def _is_of(value: Any, kind: Any) -> bool:
    """Tell whether a value is of a type that `TYPES` lists."""
    if kind == Splits:
        values = value.values() if isinstance(value, Mapping) else [None]
        return all(isinstance(part, str) or (part and _is_of(part, list[str])) for part in values)
    if get_origin(kind) is not list:
        return isinstance(value, kind) and not isinstance(value, bool)
    (inner,) = get_args(kind)
    return is_list(value) and all(_is_of(part, inner) for part in value)


def lookup(row: Row, path: str) -> Any:
    """Return the value at a column or a dotted path: ``turns.0.text`` is ``text`` of the first entry of ``turns``.

    Raises:
        DataError: If a part of the path is missing.
    """
    value: Any = row
    if "." in path and path in row:
        if (first := path.split(".")[0]) in row:
            raise DataError(f"{path!r} is a column, and a key in the column {first!r}; rename one of them")
        return row[path]
    for key in path.split("."):
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
            continue
        if not isinstance(value, Mapping) or key not in value:
            found = ", ".join(value) if isinstance(value, Mapping) else repr(value)
            raise DataError(f"no {path!r} in the row: found {found}")
        value = value[key]
    return value


def text_at(row: Row, path: str) -> str:
    """Return the text at a column or a dotted path; numbers and booleans are written as in JSON.

    Raises:
        DataError: If a part of the path is missing, or if the value is not a text, such as null, NaN or a list.
    """
    value = lookup(row, path)
    if not isinstance(value, str | int | float) or not is_finite(value):
        key = next(iter(value), 0) if isinstance(value, Mapping) else 0
        mend = "" if value is None else "; write it as one in the data"
        mend = f"; write {path}.{key} for what is in it" if isinstance(value, list | Mapping) else mend
        mend = " or a finite number" if isinstance(value, float) else mend
        raise DataError(f"{path} is {value!r:.80}, expected a text{mend}")
    return str(value).lower() if isinstance(value, bool) else str(value)
