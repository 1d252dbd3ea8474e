"""Evaluation: answer every row at every λ, choose λ on validation, compare with the Pilot on test.

A mode defines how rows are answered: by generated text, by the likeliest option, or by a ranking of all items.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from tcopilot.data.batch import PromptTargetCollator
from tcopilot.data.metrics import NLL, CorpusMetric, show
from tcopilot.data.module import TCopilotDataModule
from tcopilot.evaluation.generation import Generation, Reranking
from tcopilot.evaluation.likelihood import Likelihood, Targets
from tcopilot.evaluation.modes import LIKELIHOOD, TARGETS, Decoding, Mode, Scored, parts_to_score
from tcopilot.evaluation.predictions import PredictionFiles, claim, digest_of, fingerprint
from tcopilot.evaluation.progress import progress
from tcopilot.evaluation.ranking import ItemRanking
from tcopilot.evaluation.results import Gain, Row, Selection, direction_and_unit
from tcopilot.evaluation.selection import (
    SELECT_BY,
    Outcomes,
    Scores,
    by_likelihood,
    by_metric,
    enough,
    rule_for,
    selections,
    settle,
    too_few,
)  # fmt: skip
from tcopilot.evaluation.significance import compare_by, interval_of
from tcopilot.mistake_log.recording import Recording
from tcopilot.models.calibration import Observed
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.fusion import WEIGHT
from tcopilot.models.gates import GATES, Observations, build_gate
from tcopilot.models.pilot import end_ids
from tcopilot.processes import agree_on, gather, rank, sum_over_processes, world_size
from tcopilot.settings import Rule, is_list, one_of
from tcopilot.training.error_statistics import ErrorStatistics, correct_targets

log = logging.getLogger(__name__)
SPECIAL = re.compile(r"(pad|bos|eos|decoder_start)_token_id|_|transformers_version|output_|return_dict|use_cache")
"""Keys of a generation config that do not affect how text is decoded."""
PER = ("all", "benchmark", *GATES)
"""Values of `Evaluator.per`: what gets a λ of its own."""


@dataclass
class Evaluation:
    """The outcome of an evaluation, in the fields of `results.json`."""

    rows: list[Row] = field(default_factory=list)
    gain: list[Gain] = field(default_factory=list)
    selected_weight: float | dict[str, float] = 0.0
    best_weight: float | None = None
    selection: list[Selection] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)

    def weight_of(self, benchmark: str) -> float:
        """λ chosen for a benchmark."""
        selected = self.selected_weight
        return selected[benchmark] if isinstance(selected, dict) else selected


def _are_weights(given: Any) -> bool:
    weights = given if is_list(given) else [given]
    return given == "auto" or (len(weights) > 0 and all(map(WEIGHT.allows, weights)))


@dataclass
class Evaluator:
    """Runs a fused model over the rows of a data module.

    Every process of a job takes its share of the rows; each row is answered once, and all processes return the same
    figures. An interrupted evaluation continues where it stopped if it is started again with the same folder.

    Attributes:
        model: the fused model; its λ is changed while it runs and left at the selected one.
        tokenizer: the Pilot's.
        data: the data module, with prepared rows.
        folder: where predictions are written, one JSON line per row as soon as it is answered.
        decoding: how answers are generated or scored.
        per: what gets a λ of its own: `all` for one common λ; `benchmark`; or a gate of `tcopilot.models.gates`,
            which is fitted on the split that λ is chosen on, and which λ then scales.
        select_by: what decides on λ: `metric`; `nll`, which needs no answers on the split that λ is chosen on, so that
            the other split is answered only at 0 and at the chosen λ; or `auto`, which picks one of the two by the
            number of rows, see `tcopilot.evaluation.selection`.
        recording: states of the frozen Pilot on these rows; with it targets are scored without the Pilot's layers.
    """

    SETTINGS: ClassVar = {
        "per": one_of(PER),
        "select_by": one_of(SELECT_BY),
        "weight": Rule(_are_weights, f"{WEIGHT.mend}, a list of numbers or auto (closed form)"),
    }

    model: TCopilotModel
    tokenizer: PreTrainedTokenizerBase
    data: TCopilotDataModule
    folder: Path
    decoding: Decoding = field(default_factory=Decoding)
    per: str = "all"
    select_by: str = "auto"
    recording: Recording | None = None

    def __post_init__(self) -> None:
        self.model.eval()
        side = "right" if self.model.config.is_encoder_decoder else "left"
        self.collate = PromptTargetCollator(self.tokenizer.pad_token_id, side)
        self._fingerprint: str | None = None  # cached while weights cannot change

    @property
    def device(self) -> torch.device:
        """The device of the Pilot's head, because the Pilot's layers may be missing."""
        return self.model.pilot.get_output_embeddings().weight.device

    def run(
        self,
        weights: Sequence[float] | None,
        splits: Sequence[str] = ("validation", "test"),
        known: float | Mapping[str, float] | None = None,
    ) -> Evaluation:
        """Evaluate at every λ, choose λ on validation, and compare with the Pilot on test.

        Args:
            weights: the λ to choose from. 0 is always evaluated, and λ at which p̃ might not be a distribution are
                left out. A single λ is used as given; an empty list means `known`; None means λ* in closed form on
                validation.
            splits: the split on which λ is chosen, then the split to report. If the first has no rows, λ is a
                constant (`FusionRule.usual_weight`).
            known: λ that an earlier run chose: one value, or a mapping from each benchmark and `all`. It is kept, with
                the gate, if there are too few rows to choose on.
        """
        found, names = Evaluation(), self.data.benchmark_names
        (chosen_on, reported), largest, constant = splits, math.inf, 0.0
        if self.model.copilot is None:
            weights, known = [0.0], None
        else:
            largest = self.model.fusion.largest_weight(self.model.copilot.head.is_difference)
            constant = self.model.fusion.usual_weight
        if weights is not None and len(weights) > 1 and (beyond := [weight for weight in weights if weight > largest]):
            weights = [0.0, *(weight for weight in weights if weight <= largest)]
            listed = ", ".join(f"{weight:g}" for weight in beyond)
            found.verdicts.append(f"λ = {listed} left out: above {largest:g} this Copilot's p̃ may be no distribution")
        own = {} if known is None else dict(known) if isinstance(known, Mapping) else {"all": known}
        summary = self.data.summary()
        counts = {name: int(summary.get(f"{name}/{chosen_on}", {}).get("rows", 0)) for name in names}
        has_rows = all(counts.values())
        groups = {"all": names} | ({name: [name] for name in names} if self.per == "benchmark" else {})
        rows = {name: has_rows * sum(counts[member] for member in members) for name, members in groups.items()}
        settled = {name: settle(name, weights, rows[name], self.select_by, own, constant) for name in groups}
        rules = {name: rule for name, (rule, _) in settled.items()}
        chosen = {name: weight for name, (_, weight) in settled.items() if weight is not None}
        if self.model.copilot is not None:
            gate, wanted = self.model.copilot.gate, self.per if self.per in GATES else None
            if set(rules.values()) != {"kept"} or (gate and gate.settings()["per"]) != wanted:
                self._fit_gate(chosen_on)
        self._fingerprint = fingerprint(self.model)

        given, statistics, closed_form = [float(weight) for weight in (*(weights or ()), *chosen.values())], {}, {}
        if has_rows:
            statistics = self._statistics(chosen_on, sorted({0.0, *given}))
            found.best_weight = ErrorStatistics.joined(statistics.values()).best_weight
            best = {name: of_name.best_weight for name, of_name in statistics.items()}
            best = best if self.per == "benchmark" else {"all": found.best_weight}
            closed_form = {name: round(min(weight, largest), 3) for name, weight in best.items()}
        if "closed_form" in rules.values():
            given += closed_form.values()
            statistics = self._statistics(chosen_on, sorted({0.0, *given}))
        candidates, seen = sorted({0.0, *given}), {}
        answered = dict.fromkeys((chosen_on, reported) if has_rows else (reported,))
        if self.select_by == "nll" and len(answered) > 1 and "closed_form" not in rules.values():
            likelihoods = {
                name: ErrorStatistics.joined(map(statistics.get, members)).nll() for name, members in groups.items()
            }
            seen = {name: {chosen_on: ({}, nll)} for name, nll in likelihoods.items()}
            chosen = {name: by_likelihood(nll) for name, nll in likelihoods.items()} | chosen
            self._report(found, chosen_on, {name: {} for name in names}, statistics)
            candidates, answered = sorted({0.0, *chosen.values()}), (reported,)
        for split in answered:
            outcomes = {name: self.scores(split, name, candidates) for name in names}
            by_name = statistics if split == chosen_on else self._statistics(split, candidates)
            self._report(found, split, outcomes, by_name)
            for name, members in groups.items():
                nll = ErrorStatistics.joined(by_name[member] for member in members).nll()
                seen.setdefault(name, {})[split] = {member: outcomes[member] for member in members}, nll
                if name not in chosen:  # true for the first split only
                    rule = rules[name] if rules[name] != "closed_form" else rule_for(self.select_by, rows[name])
                    best = by_metric(*seen[name][split]) if rule == "metric" else by_likelihood(nll)
                    best = closed_form.get(name, best) if rules[name] == "closed_form" else best
                    chosen[name] = chosen["all"] if rule == "shared" else best
        found.selected_weight = chosen if self.per == "benchmark" else chosen["all"]
        self._compare(found, outcomes)
        found.verdicts += self._on_the_choice(rules, rows, chosen, weights, chosen_on, largest)
        for name, rule in rules.items() if weights is None or len(weights) > 1 else ():
            found.selection += selections(name, rule, chosen[name], seen[name], chosen_on, reported)
        found.verdicts += self._settings_of_the_pilot()
        self.model.weight, self.model.static_decoder = chosen["all"], None  # frees its caches
        self._fingerprint = None
        return found

    def _on_the_choice(
        self, rules: Mapping[str, str], rows: Mapping[str, int], chosen: Mapping[str, float],
        weights: Sequence[float] | None, chosen_on: str, largest: float,
    ) -> Iterator[str]:  # fmt: skip
        """Say what a reader must know about how λ was chosen."""
        by_choice = [chosen[name] for name, rule in rules.items() if rule in ("nll", "metric")]
        if weights and max(weights) in by_choice and max(weights) < largest:
            yield f"λ = {max(weights):g} is the largest one tried, so a larger one may be even better"
        for name, rule in rules.items() if weights is None or len(weights) > 1 else ():
            if rows[name] < (wanted := enough(self.select_by, weights)) and weights != []:
                log.warning(few := too_few(name, rule, chosen[name], f"{rows[name]} {chosen_on}", wanted))
                yield few
        if self.per == "benchmark":
            each = ", ".join(f"{name} {chosen[name]:g}" for name in self.data.benchmark_names)
            yield f"λ of each benchmark: {each}; the model keeps the best for all together, {chosen['all']:g}"

    def _settings_of_the_pilot(self) -> Iterator[str]:
        """Report what the checkpoint defines for generation: further end tokens, which apply, and unused settings."""
        if len(ends := end_ids(self.tokenizer, self.model)) > 1:
            yield f"answers end at any of {', '.join(map(str, self.tokenizer.convert_ids_to_tokens(ends)))}"
        settings = self.model.generation_config.to_diff_dict().items()
        if unused := [f"{key}={value}" for key, value in settings if value and not SPECIAL.match(key)]:
            yield f"the Pilot's generation_config.json is not used in evaluation: {', '.join(unused)}"

    @torch.no_grad()
    def _fit_gate(self, split: str) -> None:
        """Fit the gate, if the settings ask for one, by a teacher-forced pass over a split."""
        self.model.set_gate(None)
        if self.per not in GATES:
            return
        seen = [
            Observations.of(*scored, batch.target_ids_BN, batch.target_mask_BN)
            for name in self.data.benchmark_names
            for batch, *scored in self.scored_batches(split, name)
        ]
        fitted = GATES[self.per].fit(Observations.joined(gather(seen)))
        self.model.set_gate(build_gate(agree_on(fitted.settings())))

    def calibrate(self) -> None:
        """Fit temperature and biases of the model, whose Copilot is a `Calibration`, to the validation rows.

        Tokens that occur in train targets get a bias. Each process observes a share of rows; all fit the same values.

        Raises:
            DataError: if a benchmark has no validation rows.
        """
        tokens_A = torch.tensor(self.data.target_tokens())
        seen = [
            Observed.of(log_probs_BNV, batch.target_ids_BN, batch.target_mask_BN, tokens_A)
            for name in self.data.benchmark_names
            for batch, log_probs_BNV, _ in self.scored_batches("validation", name)
        ]
        self.model.copilot.fit(Observed.joined(gather(seen)))

    def scores(self, split: str, benchmark: str, weights: Sequence[float]) -> dict[float, Scores]:
        """Answer every row of a benchmark's split in every mode; return, by λ and metric, values in order of the rows.

        Predictions are appended to `<folder>/<split>-<benchmark>-weight=<λ>.jsonl` batch by batch (other modes have
        files of their own), so that an interrupted run keeps them and does not repeat the work.
        """
        rows = self.data.evaluation_rows(split, benchmark)
        found: dict[float, Scores] = {weight: {} for weight in weights}
        for mode in self.modes(benchmark):
            stem = f"{split}-{benchmark}{mode.suffix}"
            claim(self.folder, stem, self._key(mode, rows))
            files = PredictionFiles(self.folder, stem, weights)
            self._answer(mode, files, rows, weights, f"{split} {benchmark}{mode.suffix}")
            for weight, predictions in files.finish([row["id"] for row in rows], mode.judged).items():
                for metric in mode.metrics:
                    corpus = isinstance(metric, CorpusMetric)
                    found[weight][metric] = [mode.read(p) if corpus else p["scores"][metric.name] for p in predictions]
        return found

    def _answer(self, mode: Mode, files: PredictionFiles, rows, weights: Sequence[float], title: str) -> None:
        """Answer this process's share of the unanswered rows, sorted by length to save padding."""
        done = files.done()
        unanswered = [row["id"] for row in rows if any(row["id"] not in done[weight] for weight in weights)]
        unanswered = set(agree_on(unanswered))  # else slow processes skip what fast ones just answered
        open_rows = [row for row in rows if row["id"] in unanswered]
        ordered = sorted(open_rows, key=lambda row: len(row["source_ids"]))[rank() :: world_size()]
        size = mode.rows_at_once(len(weights))
        metric = next(metric for metric in mode.metrics if not isinstance(metric, CorpusMetric))
        if len(open_rows) < len(rows):
            log.info("%s: %d of %d rows were already answered", title, len(rows) - len(open_rows), len(rows))
        sums, asked = dict.fromkeys(weights, 0.0), 0
        with progress(title, len(ordered)) as bar:
            for first in range(0, len(ordered), size):
                members = ordered[first : first + size]
                answers = mode.answer(members, weights)
                files.append(answers)
                asked += len(members)
                for weight in weights:
                    sums[weight] += sum(prediction["scores"][metric.name] for prediction in answers[weight])
                ends = sorted({weights[0], weights[-1]})
                means = ", ".join(f"{show(sums[w] / asked, metric.unit, 1)} at λ={w:g}" for w in ends)
                bar(len(members), f"{metric.name} {means}")

    def modes(self, benchmark: str) -> list[Mode]:
        """Return the modes in which a benchmark is answered; the first one decides on λ and gain."""
        task, decoding = self.data.benchmarks[benchmark], self.decoding
        shared = (self.model, self.tokenizer, self.collate, task, decoding)
        if task.catalogue is not None and list(decoding.modes) != [TARGETS]:
            return [ItemRanking(*shared)]
        longest = decoding.max_new_tokens or self.data.longest_answer(benchmark)
        made = {
            "generation": lambda: Generation(*shared, longest),
            "reranking": lambda: Reranking(*shared, longest, self.scored),
            LIKELIHOOD: lambda: Likelihood(*shared, self.scored),
            TARGETS: lambda: Targets(*shared, self.scored),
        }
        has_options = self.data.has_options(benchmark)
        return [made[name]() for name in decoding.modes if name != LIKELIHOOD or has_options]

    def _statistics(self, split: str, weights: Sequence[float]) -> dict[str, ErrorStatistics]:
        """Score a split in one teacher-forced pass: each benchmark's fused likelihood at every λ, and its λ*."""
        found = {}
        for name in self.data.benchmark_names:
            found[name] = ErrorStatistics(weights, self.model.fusion)
            for batch, *scored in self.scored_batches(split, name):
                found[name].update(*scored, batch.target_ids_BN, batch.target_mask_BN)
            found[name].reduce(sum_over_processes)
        return found

    def likelihood(self, split: str, weight: float = 0.0) -> float:
        """Return the mean −log p̃ per target token over all benchmarks of a split, in nats."""
        return ErrorStatistics.joined(self._statistics(split, [weight]).values()).nll()[weight]

    def scored(self, rows: Sequence[dict[str, Any]]) -> Scored:
        """Return rows as a batch with log p̂ and f^C at its targets (`correct_targets`), from the recording if any."""
        batch, copilot = self.collate(rows).to(self.device), self.model.copilot
        if self.recording is None:
            return batch, *correct_targets(self.model, batch)
        states = self.recording.states_of(batch, rows, self.model.pilot, copilot.pooler.depths)
        return batch, *correct_targets(self.model, batch, states)

    def scored_batches(self, split: str, benchmark: str) -> Iterator[Scored]:
        """Yield this process's share of a benchmark's rows in `scored` batches, sorted by length to save padding."""
        rows = sorted(self.data.evaluation_rows(split, benchmark), key=lambda row: len(row["source_ids"]))
        for part in parts_to_score(self.model, rows[rank() :: world_size()], self.decoding.batch_size):
            yield self.scored(part)

    def _report(
        self, found: Evaluation, split: str, outcomes: Outcomes, statistics: dict[str, ErrorStatistics]
    ) -> None:
        """Add the figures of a split at every λ to the evaluation."""
        for name, by_weight in outcomes.items():
            for weight, scores in by_weight.items():
                figures = {metric.name: metric.value(values) for metric, values in scores.items()}
                for metric, values in scores.items():
                    row = (figures[metric.name], len(values), interval_of(metric, values))
                    found.rows.append(Row(name, split, metric.name, weight, *row, **direction_and_unit(metric)))
                problems = self.data.benchmarks[name].impossible(figures)
                found.verdicts += [f"{name}, {split}, λ = {weight:g}: {text}" for text in problems]
        observed = ErrorStatistics.joined(statistics.values())
        intervals, described = observed.nll_intervals(), direction_and_unit(NLL)
        tokens = sum(len(row["target_ids"]) for name in outcomes for row in self.data.evaluation_rows(split, name))
        found.rows += [
            Row("all", split, NLL.name, weight, nll, tokens, intervals[weight], **described)
            for weight, nll in observed.nll().items()
        ]

    @staticmethod
    def _compare(found: Evaluation, outcomes: Outcomes) -> None:
        """Compare each benchmark's answers at its λ with the Pilot's."""
        for name, by_weight in outcomes.items():
            for place, metric in enumerate(metric for metric in by_weight[0.0] if metric.compared):
                comparison = compare_by(metric, by_weight[0.0][metric], by_weight[found.weight_of(name)][metric])
                found.gain.append(Gain.of(name, metric, comparison))
                if not place:  # the table shows the verdicts on the other metrics
                    found.verdicts.append(f"{name}, {metric.name}: {comparison.verdict}")

    def _key(self, mode: Mode, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return everything that an answer depends on, by contents and not by name, so that it is reused correctly."""
        return {
            "model": self._fingerprint or fingerprint(self.model),
            "recording": self.recording and self.recording.pilot.digest,
            "vocabulary": digest_of(self.tokenizer.get_vocab()),
            "rows": digest_of([{key: value for key, value in row.items() if key != "benchmark"} for row in rows]),
            "benchmark": mode.benchmark.answer_settings(),
            **mode.settings,
        }
