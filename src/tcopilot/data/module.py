"""The data module: turns benchmarks into the batches of training rounds and the rows of evaluations."""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from lightning import LightningDataModule
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from tcopilot.data.batch import PromptTargetCollator, Side
from tcopilot.data.benchmarks import SPLITS, Benchmark, DataError
from tcopilot.data.prepare import SHOWN, Overflow, RowPreparer, StreamedRows, shortened
from tcopilot.data.samplers import RoundSampler, StreamRounds, rank_batches, take_turns
from tcopilot.data.shots import NumberedRow
from tcopilot.data.sources import mixture
from tcopilot.data.splits import Split, SplitReader
from tcopilot.data.summary import Figures, judge, measure, metric_problems
from tcopilot.processes import leave_stop_to_parent
from tcopilot.settings import FLAG, POSITIVE, SEED, Rule, is_number, problems, whole

log = logging.getLogger(__name__)
SHARES = {
    "validation_size": Rule(
        lambda v: is_number(v) and v >= 0, "give a share of the train rows, such as 0.1, or a number of them"
    ),
    "held_out": Rule(lambda v: is_number(v) and 0 <= v < 1, "give a share of the train rows in [0, 1), such as 0.1"),
}
WEIGHT = Rule(POSITIVE.allows, "must be a number above 0; leave out a benchmark to drop it")

PreparedRow = dict[str, Any]


@dataclass(eq=False, repr=False)
class TCopilotDataModule(LightningDataModule):
    """Serve a mixture of benchmarks; one Lightning epoch is the whole budget of rounds.

    Call ``prepare`` first. Give the Trainer ``use_distributed_sampler=False``, because batches are already divided
    among ranks here. ``configs/data/base.yaml`` explains each argument; the list below adds what is not said there.

    Args:
        benchmarks: Benchmarks by name; ``Batch.benchmark_B`` numbers them in this order.
        path: Built-in tasks ignore it.
        streaming: Only train rows are streamed; evaluation rows are kept in memory.
        epochs: A pass is rounded up to whole rounds.
        validation_size: Of a stream the first rows are set aside, so give a number of rows and not a share.
        held_out: If above 0, each batch has as many held-out rows, in ``Batch.held_out``, as rows to train on.
        split_seed: Seed by which validation rows, subsamples and shots are drawn. Runs with different ``seed`` thus
            evaluate the same rows, none of which any of them trained on.
        max_train_rows: Of a stream these are its first rows.
        on_error: With ``skip``, skipped rows are counted in ``summary`` and named in the log and in ``skipped``. A
            file that cannot be read, or whose rows all lack a column, is an error in either case.
        num_workers: A stream uses at most one worker, so that its order is kept.

    Attributes:
        shot_rows: The shots of each benchmark by its name, as (number, raw row) pairs.
        skipped: Messages about skipped rows by benchmark name; for a streamed train split they are only logged.
        remarks: Sentences about rows that were cut, are both trained and tested on, or cannot be answered correctly.

    Raises:
        DataError: If the settings contradict each other.
    """

    SETTINGS: ClassVar = {
        "streaming": FLAG,
        "group_by_length": FLAG,
        **dict.fromkeys(("batch_size", "eval_batch_size", "shuffle_buffer"), whole()),
        **dict.fromkeys(("rounds", "max_train_rows", "max_eval_rows"), whole().or_null()),
        **dict.fromkeys(("max_source_length", "max_target_length"), whole().or_null()),
        "epochs": POSITIVE.or_null(),
        **dict.fromkeys(("num_workers", "shots"), whole(0)),
        "seed": SEED,
        "split_seed": SEED,
    }

    benchmarks: dict[str, Benchmark]
    path: str | Path | None = None
    weights: dict[str, float] | None = None
    streaming: bool = False
    batch_size: int = 64
    eval_batch_size: int = 64
    rounds: int | None = None
    epochs: float | None = None
    validation_size: float | int = 0.1
    held_out: float = 0.0
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    max_source_length: int | None = None
    max_target_length: int | None = None
    overflow: Overflow = "error"
    on_error: Literal["stop", "skip"] = "stop"
    group_by_length: bool = True
    num_workers: int = 0
    shuffle_buffer: int = 1000
    seed: int = 0
    split_seed: int = 0
    shots: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        alone, sizes = len(self.benchmarks) == 1, (self.validation_size, self.max_train_rows, self.max_eval_rows)
        how = self.split_seed, self.on_error, self.shots
        self._reader = SplitReader(self.path, alone, self.streaming, *sizes, *how)
        self._check_settings()
        self._train: datasets.Dataset | datasets.IterableDataset | None = None
        self._evaluation: dict[tuple[str, str], list[PreparedRow]] = {}
        self._summary: dict[str, Figures] = {}
        self._streams: dict[str, StreamedRows] = {}
        self.skipped: dict[str, list[str]] = {}
        self.remarks: list[str] = []
        self.shot_rows: dict[str, list[NumberedRow]] = {}

    @property
    def benchmark_names(self) -> list[str]:
        """List the benchmarks in the order of ``Batch.benchmark_B``."""
        return list(self.benchmarks)

    @property
    def vocabulary(self) -> list[str] | None:
        """List the distinct words of all tasks; None unless every benchmark has a closed vocabulary."""
        words = [getattr(benchmark, "vocabulary", None) for benchmark in self.benchmarks.values()]
        return None if None in words else list(dict.fromkeys(word for part in words for word in part))

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source_side: Side,
        training: bool = True,
        max_new_tokens: int | None = None,
        shots: Mapping[str, list[NumberedRow]] | None = None,
        train_options: bool = False,
    ) -> None:
        """Load, render, tokenise and check all rows, without a model; a stream's rows are checked as they are read.

        Args:
            tokenizer: The Pilot's. Without a pad token its end token pads, which is harmless since masks are explicit.
            source_side: ``left`` for decoder-only Pilots, ``right`` for encoder-decoders.
            training: Whether there must be rows to train on.
            max_new_tokens: Limit on generated tokens that the evaluation sets for all benchmarks, if any.
            shots: ``shot_rows`` of a training run, to be used in place of newly drawn ones.
            train_options: Whether train rows have the token ids of their options too.

        Raises:
            DataError: If there are problems; the message lists all of them, one per line.
        """
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        for benchmark in self.benchmarks.values():
            benchmark.use_tokenizer(tokenizer)
        fixed = tokenizer, source_side, self.max_source_length, self.max_target_length, self.overflow, train_options
        preparer = RowPreparer(*fixed)
        self.collate = PromptTargetCollator(pad, source_side)
        self._evaluation, self._summary, self._streams, self._digest = {}, {}, {}, hashlib.sha256()
        self.skipped, self.remarks = {name: [] for name in self.benchmarks}, []
        questions: dict[str, list[str]] = {}
        train: list[datasets.Dataset | datasets.IterableDataset] = []
        complaints: list[str] = []
        for index, (name, benchmark) in enumerate(self.benchmarks.items()):
            known = (shots or {}).get(name, [])
            reader = replace(self._reader, shots=0) if len(known) == self.shots else self._reader
            splits, found = reader(benchmark, training)
            shown = splits.pop("shots", Split("shots of the run", known))
            complaints += found or self._put_before(preparer, benchmark, shown, questions)
            for split, part in splits.items():
                is_train, skips, place = split == "train", self.on_error == "skip", f"{name}, {part.where}, "
                shared = part.rows, benchmark, index, len(self.benchmarks), is_train
                if is_train and self.streaming:
                    streamed = RowPreparer(*fixed)
                    streamed.reserved, streamed.shots = preparer.reserved, preparer.shots
                    self._streams[f"{name}/{split}"] = StreamedRows(streamed, shared, place, skips)
                    train.append(datasets.IterableDataset.from_generator(self._streams[f"{name}/{split}"]))
                    continue
                prepare = partial(preparer, *shared)
                refused: list[str] = []
                skipped: list[str] = []
                asked = questions[f"{name}/{split}"] = []
                preparer.counts.clear()
                rows = list(prepare(refused.append, skipped.append if skips else None, asked.append))
                complaints += [place + text for text in shortened(refused, skipped, rows)]
                figures = measure(rows, preparer.counts, len(skipped))
                self._note(name, split, rows, figures, [place + text for text in skipped])
                if part.carved and self.streaming:
                    preparer.reserved.update(asked)
                if is_train:
                    train.append(datasets.Dataset.from_list(rows))
                else:
                    self._evaluation[split, name] = rows
        if complaints := complaints or metric_problems(self._evaluation, self.benchmarks):
            raise DataError("\n".join(dict.fromkeys(complaints)))
        wait = {name: max_new_tokens or self.longest_answer(name) for _, name in self._evaluation}
        self.remarks += judge(self._summary, questions, self._evaluation, self.benchmarks, tokenizer, wait)
        list(map(log.warning, self.remarks))
        weighed = self.weights is not None and len(train) == len(self.benchmarks)
        weights = [self.weights[name] for name in self.benchmarks] if weighed else None
        self._train = mixture(train or [datasets.Dataset.from_dict({"id": [], "length": []})], weights, self.seed)
        self._lengths = None
        if train and self.group_by_length and not self.streaming:
            length, own = (np.asarray(self._train[name][:]) for name in ("length", "benchmark"))
            self._lengths = length + (length.max() + 1) * own * bool(self.shots)  # one benchmark's shots per batch

    def setup(self, stage: str | None = None) -> None:
        """Check that ``prepare`` was called; Lightning calls this."""
        if self._train is None:
            raise DataError("call prepare(tokenizer, source_side) first: the rows depend on the Pilot's tokenizer")

    @property
    def train_rows(self) -> int | None:
        """Count the training rows of a pass, including repeats due to ``weights``; None for a stream."""
        self.setup()
        return None if self.streaming else len(self._divided()[0])

    def rows_of(self, split: str) -> list[PreparedRow]:
        """Return the distinct prepared rows of a split over all benchmarks; none for a streamed train split."""
        self.setup()
        if split != "train":
            return [row for name in self.benchmarks for row in self._evaluation.get((split, name), [])]
        return list({row["id"]: row for row in ([] if self.streaming else self._train)}.values())

    @property
    def held_out_rows(self) -> int:
        """Count the train rows that are never trained on."""
        self.setup()
        return 0 if self.streaming else len(self._divided()[1])

    @property
    def total_rounds(self) -> int:
        """Count the batches of ``train_dataloader``.

        Raises:
            DataError: If neither ``rounds`` nor ``epochs`` is given.
        """
        if self.rounds is not None:
            return self.rounds
        if self.epochs is None:
            raise DataError("training needs a budget: give data.rounds or data.epochs")
        rounds = self.epochs * math.ceil(self.train_rows / self.batch_size)
        return math.ceil(round(rounds, 6))  # 2.2 * 25 is 55, and not slightly more

    def train_dataloader(self) -> StatefulDataLoader:
        """Return a loader of exactly ``total_rounds`` batches; its ``state_dict`` resumes at the next batch.

        Raises:
            DataError: If ``batch_size`` is not a multiple of the number of processes.
        """
        self.setup()
        rank, world_size = self._place
        shared = {"collate_fn": self.collate, "pin_memory": torch.cuda.is_available()}
        shared["worker_init_fn"] = leave_stop_to_parent
        if self.streaming:
            stream = self._train.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
            rounds = StreamRounds(stream, self.batch_size, self.total_rounds, rank, world_size)
            return StatefulDataLoader(rounds, batch_size=None, num_workers=min(self.num_workers, 1), **shared)
        kept, held_out = self._divided()
        pools = [kept, held_out] if len(held_out) else [kept]
        order = RoundSampler(pools, self.batch_size, self.total_rounds, self.seed, self._lengths, rank, world_size)
        if len(held_out):
            if len(held_out) < self.batch_size:
                short = "data.held_out=%s holds out %d rows, fewer than a batch of %d; a round repeats some: raise it"
                log.warning(short, self.held_out, len(held_out), self.batch_size)
            shared["collate_fn"] = replace(self.collate, halves=True)
        return StatefulDataLoader(self._train, batch_sampler=order, num_workers=self.num_workers, **shared)

    def val_dataloader(self) -> StatefulDataLoader:
        """Return a loader of all validation rows in fixed order; each rank takes every ``world_size``-th row."""
        self.setup()
        parts = [self._evaluation.get(("validation", name), []) for name in self.benchmarks]
        # Benchmarks take turns in proportion to their size, because training may validate on the first batches only.
        if self.shots:  # in whole batches, each of which then reads the shots of one benchmark once
            shares = [rank_batches(len(part), self.eval_batch_size, *self._place) for part in parts]
            rows, starts = [*chain(*parts)], [0, *accumulate(map(len, parts))]
            batches = [[starts[n] + row for row in shares[n][i]] for n, i in take_turns(map(len, shares))]
        else:
            rows = [parts[n][i] for n, i in take_turns(map(len, parts))]
            batches = rank_batches(len(rows), self.eval_batch_size, *self._place)
        return StatefulDataLoader(rows, batch_sampler=batches, collate_fn=self.collate)

    def evaluation_rows(self, split: str, benchmark_name: str) -> list[PreparedRow]:
        """Return the rows of a benchmark's split, with the keys that ``RowPreparer`` gives them.

        Raises:
            DataError: If the benchmark has no such rows.
        """
        self.setup()
        rows = self._evaluation.get((split, benchmark_name))
        if rows is None:
            there = ", ".join(f"{name} {split}" for split, name in self._evaluation)
            raise DataError(f"no rows of {benchmark_name} {split} to evaluate; there are {there}")
        return rows

    def longest_answer(self, benchmark_name: str) -> int:
        """Return the limit on generated tokens: as configured, else slightly above the longest training target."""
        parts = [self._summary.get(f"{benchmark_name}/{split}") for split in SPLITS]
        limit = self.benchmarks[benchmark_name].max_new_tokens
        return limit or 2 + int(next(figures["target_max"] for figures in parts if figures))

    def target_tokens(self) -> list[int]:
        """Return the sorted distinct tokens of the train targets; of validation if these are streamed or missing."""
        validation = [row for (split, _), rows in self._evaluation.items() if split == "validation" for row in rows]
        stored = not self.streaming and "target_ids" in self._train.column_names
        targets = self._train["target_ids"] if stored else [row["target_ids"] for row in validation]
        return sorted({token for ids in targets for token in ids})

    def has_options(self, benchmark_name: str) -> bool:
        """Tell whether the evaluation rows of a benchmark come with options to choose from."""
        return any(
            row["options"] for (_, name), rows in self._evaluation.items() if name == benchmark_name for row in rows
        )

    def summary(self) -> dict[str, Figures]:
        """Return counts and token lengths for each ``<benchmark>/<split>``, see ``measure``.

        A streamed train split has only counts, over the rows read so far, including repeated passes.

        Evaluation splits also have ``trained_on``, the number of rows whose question occurs among the train rows of
        any benchmark, and ``unreachable``, the number of gold answers that would be judged wrong if generated.
        """
        self.setup()
        streams = {part: stream.figures for part, stream in self._streams.items() if stream.figures}
        return self._summary | streams

    def fingerprint(self) -> str:
        """Return 16 hex digits that change whenever a prepared row does. A stream's train rows are not covered."""
        self.setup()
        return self._digest.hexdigest()[:16]

    @property
    def _place(self) -> tuple[int, int]:
        """Return rank and number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _divided(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the rows to train on and of those held out; copies of a row are on the same side."""
        if not self.held_out:
            return np.arange(len(self._train)), np.arange(0)
        ids = np.asarray(self._train["id"][:])
        known = np.unique(ids)
        chosen = np.random.default_rng(self.seed).permutation(known)[: max(1, round(self.held_out * len(known)))]
        is_held_out = np.isin(ids, chosen)
        if is_held_out.all():
            raise DataError(f"data.held_out={self.held_out} leaves no row to train on; lower it")
        return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

    def _check_settings(self) -> None:
        if not self.benchmarks:
            raise DataError("data.benchmarks is empty; name at least one benchmark")
        for name, benchmark in self.benchmarks.items():
            if not isinstance(benchmark, Benchmark):
                raise DataError(f"data.benchmarks.{name}={benchmark!r:.80}: give a mapping with _target_, its class")
            if name != benchmark.name:
                raise DataError(f"data.benchmarks.{name}.name is {benchmark.name!r}; it must equal its key")
        if self.on_error not in ("stop", "skip"):
            raise DataError(f"data.on_error={self.on_error!r}: use stop or skip")
        weights = self.weights or {}
        if not isinstance(self.weights, dict | None):
            raise DataError(f"data.weights={self.weights}: give a mapping of benchmark names to numbers, or null")
        if self.weights is not None and set(weights) != set(self.benchmarks):
            raise DataError(f"data.weights names {sorted(weights)}, the benchmarks are {sorted(self.benchmarks)}")
        given = {"validation_size": self.validation_size, "held_out": self.held_out}
        found = problems(SHARES, given, "data")
        if found := found + problems(dict.fromkeys(weights, WEIGHT), weights, "data.weights"):
            raise DataError("; ".join(found))
        if self.streaming and self.rounds is None and self.epochs is not None:
            raise DataError("data.epochs needs a known number of rows; give data.rounds when data.streaming=true")
        if self.held_out and self.streaming:
            raise DataError("data.held_out needs all rows in memory; use data.streaming=false, or data.held_out=0")

    def _put_before(
        self, preparer: RowPreparer, benchmark: Benchmark, shown: Split, questions: dict[str, list[str]]
    ) -> list[str]:
        """Set the shots that the preparer puts before each prompt of a benchmark; return the problems with them."""
        name, refused = benchmark.name, list[str]()
        self.shot_rows[name] = shown.rows
        preparer.shots, asked = preparer.solved(shown.rows, benchmark, refused.append)
        questions[f"{name}/shots"] = asked
        if self.streaming:
            preparer.reserved.update(asked)
        if len(shown.rows) == self.shots:
            return [f"{name}, {shown.where}, {text}; this row was drawn as a shot" for text in refused]
        return [f"{name}: data.shots={self.shots} are drawn from train rows, but there are none; use data.shots=0"]

    def _note(self, name: str, split: str, rows: list[PreparedRow], figures: Figures, skipped: list[str]) -> None:
        self.skipped[name] += skipped
        self._summary[f"{name}/{split}"] = figures
        for row in rows:
            texts = [row.get(key) for key in ("answer", "option_ids", "seen")]  # of evaluation rows
            self._digest.update(repr((name, split, row["id"], row["source_ids"], row["target_ids"], texts)).encode())
        everything = len(rows) + figures["dropped"] + len(skipped)
        if figures["dropped"]:
            log.info("%s/%s: dropped %d of %d rows as too long", name, split, figures["dropped"], everything)
        if skipped:
            shown = "\n".join(skipped[:SHOWN])
            log.warning("%s/%s: skipped %d of %d rows, such as\n%s", name, split, len(skipped), everything, shown)
