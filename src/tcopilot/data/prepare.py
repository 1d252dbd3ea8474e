"""From raw rows to rows of token ids, with every complaint that can be made without a model."""

from __future__ import annotations

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
    gets both ends as the tokenizer itself writes them. A target is its tokens and one end token.

    Args:
        tokenizer: The Pilot's.
        source_side: On which side prompts are padded.
        max_source_length: Longest source in tokens; None is no limit.
        max_target_length: Longest target in tokens, end token included; None is no limit.
        overflow: What happens to a longer row. ``error`` refuses it. ``drop`` leaves it out of train, counted in
            ``dropped``, and refuses it elsewhere. ``truncate`` cuts a prompt's start and a target's end; the
            begin and end tokens stay.

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
            raise DataError("the tokenizer has no end token, so targets could not end; set tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        self.overflow = overflow
        self.dropped = 0
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
    ) -> Iterator[dict[str, Any]]:
        """Yield prepared rows.

        Their keys are ``source_ids``, ``target_ids``, ``id``, ``benchmark`` and ``length`` (source and target tokens);
        for evaluation the texts ``prompt``, ``target`` and ``answer`` too.

        Args:
            rows: (number in the split from 0, raw row) pairs.
            benchmark: What the rows are of.
            index: Its place among the benchmarks.
            stride: Number of benchmarks; ``number * stride + index`` is a row's id.
            training: Whether overlong rows may be dropped, and texts are left out.
            report: Called with each complaint; if it returns, the row is skipped.
        """
        rows = iter(rows)
        while chunk := list(islice(rows, CHUNK)):
            for number, example, source, target in self._tokenised(chunk, benchmark, report):
                fitted = self._fit(source, target, training, lambda text, n=number: report(f"row {n + 1}: {text}"))
                if fitted is None:
                    continue
                source_ids, target_ids = fitted
                texts = {} if training else example._asdict()
                yield {
                    "source_ids": source_ids,
                    "target_ids": target_ids,
                    "id": number * stride + index,
                    "benchmark": index,
                    "length": len(source_ids) + len(target_ids),
                    **texts,
                }

    def _tokenised(
        self, chunk: list[tuple[int, dict[str, Any]]], benchmark: Benchmark, report: Report
    ) -> Iterator[tuple[int, Example, list[int], list[int]]]:
        numbers, examples = [], []
        for number, row in chunk:
            try:
                examples.append(benchmark.render(row))
                numbers.append(number)
            except DataError as error:
                report(f"row {number + 1}: {error}")
        if examples:
            sources = self._ids([example.prompt for example in examples])
            targets = self._ids([example.target for example in examples])
            yield from zip(numbers, examples, sources, targets, strict=True)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    def _fit(
        self, source: list[int], target: list[int], training: bool, report: Report
    ) -> tuple[list[int], list[int]] | None:
        """Add the special tokens and apply the limits; None if the row is to be skipped."""
        frame = len(self._start) + len(self._end)
        lengths = (
            ("prompt", len(source) + frame, "max_source_length", self.max_source_length),
            ("target", len(target) + 1, "max_target_length", self.max_target_length),
        )
        over = [item for item in lengths if item[3] is not None and item[1] > item[3]]
        if over and self.overflow == "drop" and training:
            self.dropped += 1
            return None
        if over and self.overflow != "truncate":
            mend = "raise it or set data.overflow=" + ("drop|truncate" if training else "truncate")
            for what, length, key, limit in over:
                report(f"the {what} has {length} tokens, data.{key} is {limit}; {mend}")
            return None
        if self.max_source_length is not None:
            source = source[max(0, len(source) + frame - self.max_source_length) :]
        if self.max_target_length is not None:
            target = target[: max(0, self.max_target_length - 1)]
        for what, ids in (("prompt", source), ("target", target)):
            if not ids:
                report(f"the {what} is empty" + (" after truncation; raise the limit" if over else ""))
                return None
        return self._start + source + self._end, [*target, self.tokenizer.eos_token_id]


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer itself puts before and after a text."""
    bare, full = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise DataError(f"the tokenizer writes 'a' as {bare} without and as {full} with special tokens; expected a frame")
