"""Next-item recommendation: leave-one-out rows from whole histories, items written as text, ranking metrics.

Shape letters: ``U`` users, ``I`` items, ``F`` features.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, Literal

import numpy as np
from scipy.sparse import csr_array, diags_array
from transformers import PreTrainedTokenizerBase

from tcopilot.data.answers import is_blank, tidy
from tcopilot.data.benchmarks import SPLITS, Benchmark, DataError, Example, Row, Splits, text_at, words_of
from tcopilot.data.files import FileRows, Part, files_called, found_in
from tcopilot.data.metrics import NDCG, Answer, Hit, Metric, consistency_problems

MOST_ITEMS = 10**7  # every number up to the largest is named and ranked, even if no user has that item
SHOWN = 3  # problems of a file that are printed in full
HELD_OUT = {"test": 1, "validation": 2}  # position of a split's target, counted from the end of the history
FEATURES, ITERATIONS = 32, 20  # for collaborative ids: spectral features per item, steps of subspace iteration


@dataclass(kw_only=True)
class NextItem(Benchmark):
    """Ask for the item that a user takes next, and rank all items.

    The rows of all splits come from one file, ``interactions.jsonl``, of ``{"user": 7, "items": [3, 1, 2]}``. Items
    are numbers from 1, in order of time. Splits are leave-one-out: a user's last item is the test target and the one
    before it the validation target. Of the remaining items each but the first is a training target, given its history.

    Template words: ``title``; ``user``; ``item``, such as ``item_1253``; ``history``, the last items, comma-separated.
    The target may use ``title`` and ``item`` alone, since ``catalogue`` holds it for every item.

    ``Example.answer`` is the target with its white space normalised. ``Example.target`` is exactly the item's text in
    ``catalogue``, so ``catalogue.index(target)`` is its place: the item's number in the file minus 1.

    Attributes:
        title: What the texts call the data set, such as ``Beauty``.
        items: Number of items; None takes the largest number in the file.
        index: How items are written. ``random``: shuffled numbers. ``sequential``: numbers by first appearance, user
            after user (P5), so that items adjacent in a history get similar numbers. ``collaborative``: paths such
            as ``item_3_11_5``, where items that share a prefix are taken by the same users. These two use the
            training part of histories only; items that do not occur there come last, by number. ``text``: as a file
            beside the interactions says, ``item_text.jsonl`` of ``{"item": 3, "text": "clay mask"}``; the number of
            the item is appended to a text that another item had first.
        seed: Seed of ``index=random``.
        history: Number of most recent items in the prompt; a ranking always excludes all items of the history.
        cutoffs: The K of hit@K and ndcg@K.
        metric: What λ is chosen by: the name of one of these metrics, or a metric of your own.
    """

    words: ClassVar[frozenset[str]] = frozenset({"title", "user", "history", "item"})

    prompt: str = (
        "So far {title} user_{user} has picked, in this order: {history}. Which {title} item fits this user next?"
    )
    target: str = " {title} {item}"
    splits: Splits = field(default_factory=lambda: {split: split for split in SPLITS})
    metric: str | Metric = "ndcg@10"
    title: str
    items: int | None = None
    index: Literal["random", "sequential", "collaborative", "text"] = "random"
    seed: int = 0
    history: int = 20
    cutoffs: list[int] = field(default_factory=lambda: [5, 10, 20, 100])

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read: tuple[list[list[int]], int] | None = None
        self._names: list[str] = []
        self._catalogue: list[str] = []
        key = f"data.benchmarks.{self.name}"
        if self.history < 1:
            raise DataError(f"{key}.history is {self.history}; a prompt needs at least 1 item")
        if not self.cutoffs or min(self.cutoffs) < 1 or list(self.cutoffs) != sorted(set(self.cutoffs)):
            raise DataError(f"{key}.cutoffs is {list(self.cutoffs)}; give positive numbers that rise, such as [5, 10]")
        figures = [metric.name for metric in self._figures]
        if isinstance(self.metric, str) and self.metric not in figures:
            raise DataError(f"{key}.metric is {self.metric!r}; with these cutoffs choose one of {', '.join(figures)}")
        used = set(words_of(self.target))
        if "item" not in used or not used <= {"title", "item"}:
            raise DataError(
                f"{key}.target is {self.target!r}; it must use {{item}} and may use {{title}}, no other word"
            )

    def file(self, split: str) -> str:
        """Return the name of the file that all splits share."""
        return "interactions.jsonl"

    def derive(self, split: str, rows: Iterable[Row]) -> list[dict[str, Any]]:
        """Make the leave-one-out rows ``{user, history, item}`` of a split; every history is whole.

        Raises:
            DataError: If a row cannot be used, with file, row (from 1) and what to do.
        """
        users, sequences = self._checked(rows)
        self._number(sequences, self._texts(rows))
        made = []
        for user, items in zip(users, sequences, strict=True):
            places = range(1, len(items) - 2) if split == "train" else [len(items) - HELD_OUT[split]]
            made += [{"user": user, "history": items[:place], "item": items[place]} for place in places]
        return made

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Drop end tokens that the target template spells out, since every item gets one."""
        ends = tuple(tokenizer.all_special_tokens)
        while (text := self.target.rstrip()).endswith(ends) and not tokenizer.split_special_tokens:
            self.target = next(text.removesuffix(end) for end in ends if text.endswith(end)).rstrip()

    @property
    def catalogue(self) -> Sequence[str]:
        """List the target of every item in the order of their numbers; empty until rows were derived."""
        return self._catalogue

    def _usual_metrics(self, name: str) -> Sequence[Metric]:
        return sorted(self._figures, key=lambda metric: metric.name != name)  # stable: the rest keep their order

    def impossible(self, figures: Mapping[str, float]) -> list[str]:
        """Say which of hit@K and ndcg@K cannot come from one ranking."""
        return consistency_problems(figures)

    def read_ranking(self, rank: int | None, first: str = "", answer: str = "") -> Answer:
        """Make the answer of a ranking from its first item and the rank of the gold item (from 1; 0 or None)."""
        return Answer(first, tidy(first), answer, rank == 1, rank=rank)

    def read(self, prediction: str, answer: str) -> Answer:
        """Treat a generated text as a ranking of a single item."""
        found = super().read(prediction, answer)
        return found._replace(rank=int(found.correct))

    def render(self, row: Row) -> Example:
        """Write history and item as text; ``seen`` has the user's whole history, the prompt only its last items."""
        if not self._names:
            raise DataError(f"{self.name}: items have no names yet; call derive first")
        item, history = row["item"], row["history"]
        example = self._example(
            row,
            "",
            title=self.title,
            user=str(row["user"]),
            history=", ".join(self._names[number - 1] for number in history[-self.history :]),
            item=self._names[item - 1],
        )
        return example._replace(answer=tidy(example.target) or "", seen=tuple(number - 1 for number in history))

    def _paths(self) -> Sequence[str]:
        return "user", "history", "item"

    @property
    def _figures(self) -> list[Metric]:
        return [kind(f"{kind.__name__.lower()}@{k}", k=k) for kind in (Hit, NDCG) for k in self.cutoffs]

    def _checked(self, rows: Iterable[Row]) -> tuple[list[Any], list[list[int]]]:
        """Return users and their items, and raise an error that names the unusable rows."""
        where = f"{self.name}: {rows if isinstance(rows, FileRows) else self.file('train')}"
        first: dict[str, int] = {}
        users: list[Any] = []
        sequences: list[list[int]] = []
        problems: list[str] = []
        for number, row in enumerate(rows, start=1):
            problem = self._problem(row)
            if problem is None and (name := str(row["user"]).strip()) in first:  # 7 and "7" look the same in a prompt
                problem = f"user {row['user']!r} already has row {first[name]}; give each user one row"
            if problem is not None:
                problems.append(f"{where}, row {number}: {problem}")
                continue
            first[name] = number
            users.append(row["user"])
            sequences.append(list(row["items"]))
        if len(problems) > SHOWN:
            problems = [*problems[:SHOWN], f"{where}: and {len(problems) - SHOWN} more such problems"]
        if problems:
            raise DataError("\n".join(problems))
        return users, sequences

    def _problem(self, row: Row) -> str | None:
        """Say what is wrong with one row of the file, and what was expected."""
        if missing := [column for column in ("user", "items") if column not in row]:
            return f"no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, row))}"
        user, items = row["user"], row["items"]
        if not isinstance(user, int | str) or isinstance(user, bool) or is_blank(str(user)):
            return f"user is {user!r}; expected a number or a text"
        if not isinstance(items, list):
            return f"items is {items!r}; expected a list of item numbers"
        if bad := [item for item in items if type(item) is not int or item < 1]:
            return f"items holds {bad[0]!r}; expected whole numbers from 1"
        if max(items, default=0) > MOST_ITEMS:
            return f"items holds {max(items)}; number the items from 1 without large gaps, at most {MOST_ITEMS}"
        if self.items is not None and max(items, default=0) > self.items:
            return f"items holds {max(items)}, and data.benchmarks.{self.name}.items is {self.items}; raise it"
        if len(items) < 3:
            return f"user {user!r} has {len(items)} items; leave-one-out needs at least 3, so remove the row"
        if len(set(items)) < len(items):
            twice = next(item for place, item in enumerate(items) if item in items[:place])
            return f"user {user!r} has item {twice} twice; a ranking leaves out what was seen, so keep only the first"
        return None

    def _texts(self, rows: Iterable[Row]) -> dict[int, str]:
        """Read what each item is called, if items are written so."""
        if self.index != "text":
            return {}
        key = f"data.benchmarks.{self.name}.index=text"
        if not isinstance(rows, FileRows | Part) or not rows.files:
            raise DataError(f"{key}: the texts lie beside the file of interactions; give data.path")
        stem = rows.files[0].with_name("item_text")
        if len(files := files_called(stem)) != 1:
            found = " and ".join(file.name for file in files) or found_in(stem.parent)
            raise DataError(f"{key}: expected one file {stem}.jsonl of {{item, text}} (found: {found})")
        texts: dict[int, str] = {}
        for number, row in enumerate(FileRows(files), start=1):
            try:
                item, text = (tidy(text_at(row, column)) or "" for column in ("item", "text"))
                if not item.isdecimal() or int(item) in texts:
                    raise DataError(f"item is {item!r}; give each item's number once")
            except DataError as error:
                raise DataError(f"{files[0]}, row {number}: {error}") from None
            texts[int(item)] = text
        return texts

    def _number(self, sequences: list[list[int]], texts: Mapping[int, str]) -> None:
        """Name every item, unless the same interactions were already read."""
        items = self.items or max((max(sequence) for sequence in sequences), default=0)
        if not sequences or self._read == (sequences, items):
            return
        self._read = (sequences, items)
        if self.index == "text":
            self._names = text_names(texts, items)
        else:
            self._names = INDICES[self.index]([sequence[:-2] for sequence in sequences], items, self.seed)
        self._catalogue = [self.target.format(title=self.title, item=name) for name in self._names]


def random_names(sequences: Sequence[Sequence[int]], items: int, seed: int) -> list[str]:
    """Name items by a seeded permutation of 1 to I.

    >>> sorted(random_names([], 4, seed=0))
    ['item_1', 'item_2', 'item_3', 'item_4']
    """
    return [f"item_{number}" for number in Random(seed).sample(range(1, items + 1), items)]


def sequential_names(sequences: Sequence[Sequence[int]], items: int, seed: int = 0) -> list[str]:
    """Number items in the order in which they first appear; items that never appear come last.

    >>> sequential_names([[4, 2], [2, 1]], 4)
    ['item_3', 'item_2', 'item_4', 'item_1']
    """
    order = dict.fromkeys(item for sequence in sequences for item in sequence)
    order |= dict.fromkeys(range(1, items + 1))
    places = {item: place for place, item in enumerate(order, start=1)}
    return [f"item_{places[item]}" for item in range(1, items + 1)]


def collaborative_names(sequences: Sequence[Sequence[int]], items: int, seed: int = 0) -> list[str]:
    """Name items by paths of three numbers, such that items that share a prefix are taken by the same users.

    Items get spectral features: the leading singular vectors of the user-item matrix with both degrees normalised.
    Items are halved recursively along the direction of largest variance until each stands alone, and the resulting
    order is cut into equal parts twice to give the paths. This is the idea of P5's collaborative ids (recursive
    spectral clustering of co-occurrence) with one decomposition in place of hundreds, and with clusters of equal size.
    It is deterministic on one machine.
    """
    features_IF, degrees_I = _spectral_features(sequences, items)
    order = [int(item) for item in _halved(features_IF, np.flatnonzero(degrees_I))]
    order += [item for item in range(items) if not degrees_I[item]]
    base = next(base for base in range(1, items + 1) if base**3 >= items)
    names = [""] * items
    for place, item in enumerate(order):
        names[item] = f"item_{place // base**2 + 1}_{place // base % base + 1}_{place % base + 1}"
    return names


def text_names(texts: Mapping[int, str], items: int) -> list[str]:
    """Name items by their texts; one without a text, or with one that was there before, gets its number.

    >>> text_names({1: "clay mask", 2: "", 3: "clay mask"}, 4)
    ['clay mask', 'item_2', 'clay mask (3)', 'item_4']
    """
    names: dict[str, None] = {}  # in the order of items
    for item in range(1, items + 1):
        name = texts.get(item) or f"item_{item}"
        while name in names:
            name += f" ({item})"
        names[name] = None
    return list(names)


INDICES = {"random": random_names, "sequential": sequential_names, "collaborative": collaborative_names}


def _spectral_features(sequences: Sequence[Sequence[int]], items: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features [I, F] of length 1 (0 for items that no one has) and the number of users of each item [I]."""
    rows = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
    columns = np.array([item - 1 for sequence in sequences for item in sequence])
    matrix_UI = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(sequences), items))
    degrees_U, degrees_I = matrix_UI.sum(axis=1), matrix_UI.sum(axis=0)
    # The mean degree regularises: otherwise a small disconnected group of users would occupy a feature of its own.
    scales_U, scales_I = (1 / np.sqrt(degrees + degrees.mean()) for degrees in (degrees_U, degrees_I))
    scaled_UI = diags_array(scales_U) @ matrix_UI @ diags_array(scales_I)
    # Subspace iteration from a fixed start, because ARPACK restarts at random, so two runs could differ.
    basis_IF = np.random.RandomState(0).standard_normal((items, min(FEATURES, *scaled_UI.shape)))
    for _ in range(ITERATIONS):
        basis_IF, _ = np.linalg.qr(scaled_UI.T @ (scaled_UI @ basis_IF))
    _, values_F, rotation_FF = np.linalg.svd(scaled_UI @ basis_IF, full_matrices=False)
    features_IF = basis_IF @ rotation_FF.T * values_F
    lengths_I = np.linalg.norm(features_IF, axis=1, keepdims=True)
    return features_IF / np.maximum(lengths_I, np.finfo(float).tiny), degrees_I


def _halved(features_IF: np.ndarray, group: np.ndarray) -> list[int]:
    """Order a group of items: halve it along the direction of largest variance, then order each half."""
    if len(group) < 2:
        return group.tolist()
    centred_GF = features_IF[group] - features_IF[group].mean(axis=0)
    direction_F = np.linalg.eigh(centred_GF.T @ centred_GF)[1][:, -1]
    direction_F *= np.sign(direction_F[np.abs(direction_F).argmax()])  # the sign of an eigenvector is arbitrary
    order = group[np.argsort(centred_GF @ direction_F, kind="stable")]
    half = len(order) // 2
    return _halved(features_IF, order[:half]) + _halved(features_IF, order[half:])
