"""From raw rows to rows of token ids, with every complaint that can be made without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from tcopilot.data.benchmarks import Benchmark, DataError, Example
from tcopilot.data.collate import Side

Overflow = Literal["error", "drop", "truncate"]
Report = Callable[[str], None]
CHUNK = 512  # rows a tokenizer call


class RowPreparer:
    """Render and tokenise rows, and hold them to the length limits.

    Prompt and target are tokenised apart. A decoder-only Pilot's prompt (``source_side="left"``) gets what the
    tokenizer puts at a text's start, such as a begin token, and never an end token; an encoder-decoder's (``"right"``)
    gets both ends as the tokenizer itself writes them. What a prompt spells out already, as those of chat templates
    do, is not written twice. A target is its tokens and one end token.

    Args:
        tokenizer: The Pilot's.
        source_side: On which side prompts are padded.
        max_source_length: Longest source in tokens; None is no limit.
        max_target_length: Longest target in tokens, end token included; None is no limit.
        overflow: What happens to a longer row. ``error`` refuses it. ``drop`` leaves it out of train, counted in
            ``dropped``, and refuses it elsewhere. ``truncate`` cuts a prompt's start and a target's end; the
            begin and end tokens stay. Targets that are one of a few options are never cut, but refused.

    Attributes:
        counts: What was ``dropped``; whoever wants other counts clears it.

    Raises:
        DataError: If ``overflow`` is none of these, or the tokenizer has no end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source_side: Side,
        max_source_length: int | None = None,
        max_target_length: int | None = None,
        overflow: Overflow = "error",
    ) -> None:
        if overflow not in ("error", "drop", "truncate"):
            raise DataError(f"data.overflow is error, drop or truncate, got {overflow!r}")
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token, so no target could end; give eos_token in the tokenizer_config.json "
                "of pilot.path"
            )
        self.tokenizer, self.overflow = tokenizer, overflow
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        self.counts: Counter[str] = Counter()
        self._start, self._end = _frame(tokenizer)
        if source_side == "left":
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
    ) -> Iterator[dict[str, Any]]:
        """Yield prepared rows.

        Their keys are ``source_ids``, ``target_ids``, ``id``, ``benchmark`` and ``length`` (source and target tokens);
        for evaluation those of :class:`Example` too and, where it has options, ``option_ids``: the token ids of each
        option, made like ``target_ids``, so that a scorer need not tokenise.

        Args:
            rows: (number in the split from 0, raw row) pairs.
            benchmark: What the rows are of.
            index: Its place among the benchmarks.
            stride: Number of benchmarks; ``number * stride + index`` is a row's id.
            training: Whether overlong rows may be dropped, and texts are left out.
            report: Called with each complaint; if it returns, the row is left out.
            skip: Called in its place where a row cannot be rendered or tokenised or gives an empty text. Overlong rows
                are not among these: ``overflow`` decides on those.
        """
        rows, skip = iter(rows), skip or report
        while chunk := list(islice(rows, CHUNK)):
            for number, example, source, target in self._tokenised(chunk, benchmark, skip):
                try:
                    fitted = self._fit(source, target, bool(example.options), training)
                    texts = {} if training or fitted is None else self._texts(example)
                except _Empty as error:
                    skip(f"row {number + 1}: {error}")
                except _TooLong as error:
                    for complaint in error.args:
                        report(f"row {number + 1}: {complaint}")
                else:
                    if fitted is not None:
                        ids = dict(zip(("source_ids", "target_ids"), fitted, strict=True))
                        place = {"id": number * stride + index, "benchmark": index}
                        yield ids | place | {"length": sum(map(len, fitted))} | texts

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
                (example.prompt + example.target).encode()  # half a surrogate pair would stop the whole chunk
            except DataError as error:
                skip(f"row {number + 1}: {error}")
            except Exception as error:  # a template or a kind that did not expect such a value
                skip(f"row {number + 1}: could not be rendered ({type(error).__name__}: {error}); mend or remove it")
            else:
                examples[number] = example
        if examples:
            sources = map(self._unframed, self._ids([example.prompt for example in examples.values()]))
            targets = self._ids([example.target for example in examples.values()])
            yield from zip(examples, examples.values(), sources, targets, strict=True)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    def _unframed(self, ids: list[int]) -> list[int]:
        """Leave out the special tokens that the prompt's text brings itself."""
        if self._start and ids[: len(self._start)] == self._start:
            ids = ids[len(self._start) :]
        return ids[: -len(self._end)] if self._end and ids[-len(self._end) :] == self._end else ids

    def _texts(self, example: Example) -> dict[str, Any]:
        """Return what only evaluation needs of a row."""
        if not example.options:
            return example._asdict()
        option_ids = [[*ids, self.tokenizer.eos_token_id] for ids in self._ids(list(example.options))]
        longest, limit = max(map(len, option_ids)), self.max_target_length
        if limit is not None and longest > limit:
            raise _TooLong(f"its longest option has {longest} tokens, data.max_target_length is {limit}; raise it")
        return example._asdict() | {"option_ids": option_ids}

    def _fit(
        self, source: list[int], target: list[int], closed: bool, training: bool
    ) -> tuple[list[int], list[int]] | None:
        """Add the special tokens and apply the limits; None if the row is dropped.

        A ``closed`` target is one of a few options, so that cutting it would cut the answer.
        """
        for what, ids in (("prompt", source), ("target", target)):
            if not ids:
                raise _Empty(f"the {what} is empty")
        frame = len(self._start) + len(self._end)
        lengths = (
            ("prompt", len(source) + frame, "max_source_length", self.max_source_length),
            ("target", len(target) + 1, "max_target_length", self.max_target_length),
        )
        over = [item for item in lengths if item[3] is not None and item[1] > item[3]]
        if over and self.overflow == "drop" and training:
            self.counts["dropped"] += 1
            return None
        if over and (self.overflow != "truncate" or (closed and over[-1][0] == "target")):
            raise _TooLong(*(self._advice(closed, training, *item) for item in over))
        if self.max_source_length is not None:
            source = source[max(0, len(source) + frame - self.max_source_length) :]
        if self.max_target_length is not None:
            target = target[: max(0, self.max_target_length - 1)]
        for what, ids in (("prompt", source), ("target", target)):
            if not ids:
                raise _TooLong(f"the {what} is empty after truncation; raise the limit")
        return self._start + source + self._end, [*target, self.tokenizer.eos_token_id]

    def _advice(self, closed: bool, training: bool, what: str, length: int, key: str, limit: int) -> str:
        ways = ["drop"] * training + ["truncate"] * (not closed or what == "prompt")
        mend = f"raise it or set data.overflow={'|'.join(ways)}" if ways else "raise it: an option is never cut"
        return f"the {what} has {length} tokens, data.{key} is {limit}; {mend}"


class _Empty(DataError):
    """Say that a row gives no text."""


class _TooLong(DataError):
    """Say, in one argument for each text, that a row does not fit the limits."""


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer itself puts before and after a text."""
    bare, full = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise DataError(f"the tokenizer writes 'a' as {bare} without and as {full} with special tokens; expected a frame")
