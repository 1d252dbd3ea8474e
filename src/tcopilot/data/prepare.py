"""Turn raw rows into rows of token ids, and report every problem that can be found without a model."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tcopilot.data.batch import Side
from tcopilot.data.benchmarks import Benchmark, DataError, Example
from tcopilot.data.shots import SEPARATOR
from tcopilot.data.summary import COUNTED, Figures
from tcopilot.data.tokenizers import ids_of

Overflow = Literal["error", "drop", "truncate"]
Report = Callable[[str], None]
CHUNK = 512  # rows a tokenizer call
SHOWN = 3  # complaints about one split that are printed in full
log = logging.getLogger(__name__)


@dataclass(eq=False)
class RowPreparer:
    """Render and tokenise rows, and enforce the length limits.

    Prompt and target are tokenised separately, the target of a decoder-only Pilot (``source_side="left"``) as a text
    that follows another (`ids_of`). The prompt of a decoder-only Pilot gets the special tokens that the tokenizer puts
    at the start of a text, and never an end token; the prompt of an encoder-decoder (``"right"``) gets those of both
    ends. Special tokens that a prompt already spells out, as chat templates do, are not added again. Shots stand
    between the start and the prompt, each as prompt, target with end token, and a blank line. A target ends in exactly
    one end token, also if its text spells one out. Special tokens at the end of a target are ignored when answers are
    judged, since generated texts have none.

    A text that a chat template writes as a whole is tokenised as a whole, without additional special tokens.

    Limits count all tokens, special ones included; None means no limit. If a row is too long, ``overflow`` decides:
    ``error`` refuses it, ``drop`` drops it from train and refuses it elsewhere, ``truncate`` cuts it. A prompt is cut
    in the middle, so that its start and above all its end, from the options on, are kept as far as they fit. A target
    is cut at its end and gets no end token, since the answer does not end there; a target that is one of a few options
    is refused instead. If a prompt is too long with its shots, the earliest shots are removed first, whatever
    ``overflow`` is.

    Attributes:
        train_options: Whether train rows have ``option_ids`` too. Options that are too long are left out there, unless
            ``overflow`` is ``error``.
        shots: Token ids of each shot of the current benchmark, as `solved` makes them.
        counts: How many rows were ``dropped``, ``lost_shots``, had ``cut_prompts``, ``cut_options`` or
            ``cut_targets``, spell out ``end_tokens`` in their targets, or offer the right option twice
            (``twin_options``). The caller clears it.
        reserved: Questions (see ``Example.question``) that must not be trained on; train rows with them are left out.

    Raises:
        DataError: If ``overflow`` has another value, or the tokenizer has no end token.
    """

    tokenizer: PreTrainedTokenizerBase
    source_side: Side
    max_source_length: int | None = None
    max_target_length: int | None = None
    overflow: Overflow = "error"
    train_options: bool = False
    counts: Counter[str] = field(default_factory=Counter, init=False)
    reserved: set[str] = field(default_factory=set, init=False)
    shots: list[list[int]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        if self.overflow not in ("error", "drop", "truncate"):
            raise DataError(f"data.overflow={self.overflow!r}: use error, drop or truncate")
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token, so no answer could end; give eos_token in the tokenizer_config.json "
                "of pilot.path"
            )
        self._special = tuple(tokenizer.all_special_tokens)
        self._ends = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
        self._start, self._end = _frame(tokenizer)
        if self.source_side == "left":
            self._end = []

    def __call__(
        self,
        rows: Iterable[tuple[int, dict[str, Any]]],
        benchmark: Benchmark,
        index: int,
        stride: int,
        training: bool,
        report: Report,
        skip: Report | None = None,
        note: Report | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield prepared rows.

        Their keys are ``source_ids``, ``target_ids``, ``id``, ``benchmark`` and ``length`` (source and target tokens).
        Evaluation rows also have the fields of :class:`Example` and, if there are options, ``option_ids``: the token
        ids of each option, made like ``target_ids``, so that scoring needs no tokenizer.

        Args:
            rows: (number in the split from 0, raw row) pairs.
            benchmark: The benchmark of the rows.
            index: The index of the benchmark among all.
            stride: Number of benchmarks; ``number * stride + index`` is a row's id.
            training: Whether these are train rows: overlong ones may be dropped, and texts are left out.
            report: Called with each problem; if it returns, the row is left out.
            skip: Called in place of ``report`` if a row cannot be rendered or tokenised, or gives an empty text.
                Overlong rows are still reported, since ``overflow`` decides on those.
            note: Called with the question of each row that is yielded.
        """
        rows, skip = iter(rows), skip or report
        start = [] if benchmark.templated else self._start
        while chunk := list(islice(rows, CHUNK)):
            for number, example, source, target in self._tokenised(chunk, benchmark, skip):
                try:
                    fitted = self._fit(example, start, source, target, training)
                    texts = {} if fitted is None else self._texts(example, training)
                except _Empty as error:
                    skip(f"row {number + 1}: {error}")
                except _TooLong as error:
                    for complaint in error.args:
                        report(f"row {number + 1}: {complaint}")
                else:
                    if fitted is not None:
                        if example.twin:
                            self.counts["twin_options"] += 1
                        if note:
                            note(example.question)
                        ids = dict(zip(("source_ids", "target_ids"), fitted, strict=True))
                        place = {"id": number * stride + index, "benchmark": index}
                        yield ids | place | {"length": sum(map(len, fitted))} | texts

    def solved(
        self, rows: Sequence[tuple[int, dict[str, Any]]], benchmark: Benchmark, report: Report
    ) -> tuple[list[list[int]], list[str]]:
        """Return the token ids and the question of each shot; a row that cannot serve as a shot is reported.

        Prompt and target are tokenised separately, as in training. For a decoder-only Pilot each target ends in the
        end token, so that it sees how its own answer should end.
        """
        if rows and benchmark.templated:
            raise DataError(f"{benchmark.name}: data.shots are not supported for conversations; use data.shots=0")
        (separator,) = self._ids([SEPARATOR], follows=True)
        end = [] if self._end else [self.tokenizer.eos_token_id]  # an encoder would take it as the prompt's end
        ids, questions = [], []
        for _, example, source, _ in self._tokenised(list(rows), benchmark, report):
            ids.append([*source, *self._ids([example.target], follows=True)[0], *end, *separator])
            questions.append(example.question)
        return ids, questions

    def _tokenised(
        self, chunk: list[tuple[int, dict[str, Any]]], benchmark: Benchmark, skip: Report
    ) -> Iterator[tuple[int, Example, list[int], list[int]]]:
        examples: dict[int, Example] = {}
        for number, row in chunk:
            try:
                example = benchmark.render(row)
                for what in ("prompt", "target"):
                    if not getattr(example, what).strip():
                        raise _Empty(f"the {what} is empty")
                (example.prompt + example.target).encode()  # a lone surrogate would stop the whole chunk
            except DataError as error:
                skip(f"row {number + 1}: {error}")
            except Exception as error:  # a template or a benchmark class met a value that it did not expect
                skip(f"row {number + 1}: could not be rendered ({type(error).__name__}: {error}); mend or remove it")
            else:
                examples[number] = example
        if examples:
            sources = self._ids([example.prompt for example in examples.values()])
            targets = self._ids([example.target for example in examples.values()], follows=True)
            if benchmark.templated:
                whole = self._ids([example.prompt + example.target for example in examples.values()])
                parts = zip(sources, whole, targets, strict=True)  # a target's own tokens where one spans the boundary
                targets = [both[len(ids) :] if both[: len(ids)] == ids else own for ids, both, own in parts]
            else:
                sources = map(self._unframed, sources)
            for (number, example), source, target in zip(examples.items(), sources, targets, strict=True):
                if target and target[-1] in self._ends:
                    self.counts["end_tokens"] += 1
                    example = self._without_end(example)
                    while target and target[-1] == self.tokenizer.eos_token_id:
                        target.pop()
                yield number, example, source, target

    def _without_end(self, example: Example) -> Example:
        def bare(text: str) -> str:
            while found := next((token for token in self._special if text.rstrip().endswith(token)), None):
                text = text.rstrip().removesuffix(found)
            return text

        options = tuple(map(bare, example.options))
        return example._replace(target=bare(example.target), answer=bare(example.answer).rstrip(), options=options)

    def _ids(self, texts: Sequence[str], follows: bool = False) -> list[list[int]]:
        """Return the token ids of texts; the decoder of an encoder-decoder begins its texts anew."""
        return ids_of(self.tokenizer, texts, follows and self.source_side == "left")

    def _unframed(self, ids: list[int]) -> list[int]:
        """Remove special tokens that the prompt's text already spells out, since they are added later."""
        if self._start and ids[: len(self._start)] == self._start:
            ids = ids[len(self._start) :]
        return ids[: -len(self._end)] if self._end and ids[-len(self._end) :] == self._end else ids

    def _texts(self, example: Example, training: bool) -> dict[str, Any]:
        """Return the fields of a row that only evaluation needs, or a fit that learns from wrong options."""
        texts = {name: value for name, value in example._asdict().items() if name not in ("ending", "twin")}
        texts = {} if training else texts
        if not example.options or (training and not self.train_options):
            return texts
        option_ids = [[*ids, self.tokenizer.eos_token_id] for ids in self._ids(example.options, follows=True)]
        longest, limit = max(map(len, option_ids)), self.max_target_length
        if training and limit is not None and self.overflow != "error":
            option_ids = [ids for ids in option_ids if len(ids) <= limit]
        elif limit is not None and longest > limit:
            raise _TooLong(f"its longest option has {longest} tokens, data.max_target_length is {limit}; raise it")
        return texts | {"option_ids": option_ids}

    def _fit(
        self, example: Example, start: list[int], source: list[int], target: list[int], training: bool
    ) -> tuple[list[int], list[int]] | None:
        """Add special tokens and apply the limits; return None if the row is left out."""
        if training and self.reserved and example.question in self.reserved:
            self.counts["asked_in_validation_or_shots"] += 1
            return None
        for what, ids in (("prompt", source), ("target", target)):
            if not ids:
                raise _Empty(f"the {what} is empty")
        frame = len(start) + len(self._end)
        shots = self._fitting_shots(len(source) + frame)
        lengths = (
            ("prompt", len(source) + sum(map(len, shots)) + frame, "max_source_length", self.max_source_length),
            ("target", len(target) + 1, "max_target_length", self.max_target_length),
        )
        closed = bool(example.options)  # an option must not be cut, since it would no longer be that option
        over = [item for item in lengths if item[3] is not None and item[1] > item[3]]
        if over and self.overflow == "drop" and training:
            self.counts["dropped"] += 1
            return None
        if over and (self.overflow != "truncate" or (closed and over[-1][0] == "target")):
            raise _TooLong(*(self._advice(closed, training, *item) for item in over))
        end = [self.tokenizer.eos_token_id]
        for what, *_ in over:
            self.counts[f"cut_{what}s"] += 1
            if what == "prompt":
                source = self._middle_cut(example, source, self.max_source_length - frame)
            else:
                target, end = target[: self.max_target_length], []
        if len(shots) < len(self.shots):
            self.counts["lost_shots"] += 1
        return [*start, *chain(*shots), *source, *self._end], target + end

    def _fitting_shots(self, length: int) -> list[list[int]]:
        """Return the last shots that fit before a prompt of that many tokens."""
        shots, limit = self.shots, self.max_source_length
        while shots and limit is not None and length + sum(map(len, shots)) > limit:
            shots = shots[1:]
        return shots

    def _middle_cut(self, example: Example, source: list[int], room: int) -> list[int]:
        if room < 1:
            raise _TooLong("the prompt is empty after truncation; raise the limit")
        ending = len(self._ids([example.prompt[-example.ending :]])[0]) if example.ending else 0
        if ending > room:
            self.counts["cut_options"] += 1
        first = max(0, room - ending) // 4  # keep more of the end, which is nearer to the answer
        return source[:first] + source[len(source) - room + first :]

    def _advice(self, closed: bool, training: bool, what: str, length: int, key: str, limit: int) -> str:
        ways = ["drop"] * training + ["truncate"] * (not closed or what == "prompt")
        mend = f"raise it or set data.overflow={'|'.join(ways)}" if ways else "raise it, since options are never cut"
        return f"the {what} has {length} tokens, data.{key} is {limit}; {mend}"


def option_rows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a copy of a row for each of its options, if it has any, with the option as the target."""
    return [{**row, "target_ids": ids} for ids in row.get("option_ids") or ()]


def wrong_options(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row's options other than its target, as `option_rows` does."""
    return [option for option in option_rows(row) if option["target_ids"] != row["target_ids"]]


@dataclass
class StreamedRows:
    """Prepare the rows of a streamed split anew at each call, and log how many rows each pass left out.

    Attributes:
        tally: Rows read, skipped and of each kind in `COUNTED`, over all passes; in memory shared with loader workers.
    """

    preparer: RowPreparer
    shared: tuple[Any, ...]
    place: str
    skips: bool
    tally: Tensor = field(default_factory=lambda: torch.zeros(2 + len(COUNTED), dtype=torch.int64).share_memory_())

    @property
    def figures(self) -> Figures:
        """The counts of the rows read so far, for the summary; empty before the first row."""
        return dict(zip(("rows", "skipped", *COUNTED), self.tally.tolist(), strict=True)) if self.tally.any() else {}

    def __call__(self) -> Iterator[dict[str, Any]]:
        """Start a pass."""
        self.preparer.counts.clear()
        before, number = self.tally.clone(), 0
        rows = self.preparer(*self.shared, partial(_complain, self.place), self._skip if self.skips else None)
        for number, row in enumerate(rows, start=1):
            self._count(before, number)
            yield row
        self._count(before, number)
        if left := ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in self.preparer.counts.items()):
            log.warning("%sof this pass over the stream: %s", self.place, left)

    def _count(self, before: Tensor, rows: int) -> None:
        counts = self.preparer.counts
        self.tally.copy_(before + torch.tensor([rows, *(counts[kind] for kind in ("skipped", *COUNTED))]))

    def _skip(self, text: str) -> None:
        count = self.preparer.counts["skipped"] = self.preparer.counts["skipped"] + 1
        if count <= SHOWN or count % 1000 == 0:
            log.warning("skipped %s%s (%d so far)", self.place, text, count)


def shortened(complaints: list[str], skipped: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """Return the first complaints and the number of the others; if no row is left without a complaint, say why."""
    if len(complaints) > SHOWN:
        return [*complaints[:SHOWN], f"and {len(complaints) - SHOWN} more such problems"]
    if complaints or rows:
        return complaints
    if skipped:
        return [f"no row is left: {len(skipped)} were skipped, the first since {skipped[0]}"]
    return ["no row is left: all were dropped as too long"]


def _complain(where: str, text: str) -> None:
    raise DataError(where + text)


class _Empty(DataError):
    """Raised if a row has an empty prompt or target."""


class _TooLong(DataError):
    """Raised if texts of a row exceed the length limits; one argument for each text."""


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer adds before and after a text."""
    bare, full = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise DataError(f"tokenizer: 'a' is {bare}, but with special tokens {full}, which lacks it; use another tokenizer")
