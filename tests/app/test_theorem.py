"""Theorem 4.1 measured: known errors come back, sums are exact, and the command says what it found or lacks."""

import importlib
import json
import math
import shutil
import tomllib
from types import SimpleNamespace

import composed
import numpy as np
import pytest
import torch
from small_training import VOCAB, random_batch, tiny_model

from tcopilot.app.theorem import TrainedRun, estimate, main
from tcopilot.data.batch import Batch
from tcopilot.data.tokenizers import byte_tokenizer
from tcopilot.evaluation import modes
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.modes import Decoding
from tcopilot.functional import token_errors
from tcopilot.reporting.theorem.distances import WEIGHTS, DistanceSums
from tcopilot.reporting.theorem.parabola import EntrySums, Parabola, promised_weight, row_intervals, served_entries
from tcopilot.reporting.theorem.pilot_variance import PilotSpread, dropout_draws
from tcopilot.reporting.theorem.verdict import verdict
from tcopilot.training.error_statistics import ErrorStatistics, correct_targets

SAME_ROWS = ("data.seed=0", "data.benchmarks.word_problems.seed=0")


def batch_of(targets, benchmarks=None) -> Batch:
    """Rows of targets without prompts, none padded."""
    targets_BN = torch.as_tensor(targets)
    rows = len(targets_BN)
    empty = torch.zeros(rows, 0, dtype=torch.long)
    mask_BN = torch.ones_like(targets_BN, dtype=torch.bool)
    benchmark_B = torch.zeros(rows, dtype=torch.long) if benchmarks is None else torch.tensor(benchmarks)
    return Batch(empty, empty.bool(), targets_BN, mask_BN, torch.arange(rows), benchmark_B)


def synthetic(tokens: int = 400, vocabulary: int = 5, seed: int = 0):
    """A Pilot that is often wrong: batch of one token a row, log p̂, ℓ, and a generator."""
    generator = torch.Generator().manual_seed(seed)
    batch = batch_of(torch.randint(0, vocabulary, (tokens, 1), generator=generator))
    logits = 2 * torch.randn(tokens, 1, vocabulary, generator=generator, dtype=torch.float64)
    log_probs = logits.log_softmax(-1)
    return batch, log_probs, token_errors(log_probs.exp(), batch.target_ids_BN), generator


def estimates(batch, log_probs, corrections, benchmarks=("all",)):
    """The figures of one batch, complete enough for the verdict."""
    sums = DistanceSums(log_probs.shape[-1])
    sums.update(batch, log_probs, corrections)
    found = sums.estimates(benchmarks) | {"pilots": None, "is_eq_8": True}
    found["entries"]["worst"] = [{"token": str(v)} for v, _ in sums.worst_entries(found["lambda_star"])]
    return found


def orthogonal(noise, *others):
    """The part of the noise that is uncorrelated with others."""
    for other in others:
        noise = noise - (noise * other).sum() / other.square().sum() * other
    return noise


def scored(family: str, seed: int = 0, benchmarks=None):
    """A tiny model with a loud Copilot, a batch, and what it says of it."""
    model = tiny_model(family, head_std=0.3, seed=seed).eval()
    batch = random_batch(family, rows=6, seed=3, benchmarks=benchmarks)
    return model, batch, correct_targets(model, batch)


# Known errors come back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("short", "noise"), [(0.3, 0.2), (0.5, 1.5), (0.9, 0.4)])
def test_a_copilot_with_known_error_gives_the_closed_form(short, noise):
    batch, log_probs, errors, generator = synthetic()
    added = orthogonal(torch.randn(errors.shape, generator=generator, dtype=torch.float64), errors)
    pilot = errors.square().sum().item() / 400
    added *= math.sqrt(noise * pilot * 400) / added.norm()  # σ_C² = noise · S²
    found = estimates(batch, log_probs, (1 - short) * errors + added)
    assert found["pilot_error_sq"] == pytest.approx(pilot)
    assert found["epsilon_copilot_sq"] == pytest.approx(short**2 * pilot)
    assert found["sigma_copilot_sq"] == pytest.approx(noise * pilot)
    assert found["copilot_error_sq"] == pytest.approx((short**2 + noise) * pilot)
    by_hand = 2 * (1 - short) / ((1 - short) ** 2 + noise)  # in units of S
    assert found["lambda_0"] == pytest.approx(min(1, by_hand))
    assert found["zero_crossing"] == pytest.approx(by_hand)
    assert found["lambda_star"] == pytest.approx(by_hand / 2)


def test_every_split_that_the_proof_allows_promises_no_more_than_holds():
    generator = np.random.default_rng(0)
    met = 0
    for _ in range(300):
        error, bias, noise = torch.tensor(generator.normal(size=(3, 4)) * generator.uniform(0.1, 2, size=(3, 1)))
        noise = orthogonal(noise, error, orthogonal(bias, error))
        correction = error + bias + noise
        parts = (error.square().sum(), (error * correction).sum(), correction.square().sum())
        parabola = Parabola(*(part.item() for part in parts))
        promised = promised_weight(parabola.error, bias.square().sum().item(), noise.square().sum().item())
        if promised is not None:
            met += 1
            assert promised <= parabola.zero_crossing + 1e-9
            assert parabola.distance(0.999 * promised) < parabola.error
            assert parabola.promised_weight >= promised - 1e-9
    assert met > 50


def test_bias_and_variance_of_known_pilots_come_back():
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary, deviation = 4000, 4, 0.1
    batch = batch_of(torch.randint(0, vocabulary, (tokens, 1), generator=generator))
    mean = 0.5 + 0.3 * torch.rand(tokens, 1, vocabulary, generator=generator, dtype=torch.float64)
    bias = token_errors(mean, batch.target_ids_BN).square().sum().item() / tokens
    pilots = [
        mean + deviation * torch.randn(mean.shape, generator=generator, dtype=torch.float64).clamp(-4, 4)
        for _ in range(4)
    ]
    spread = PilotSpread("seeds", ["a", "b", "c", "d"])
    spread.update(batch, ((pilot.log(), torch.zeros_like(pilot)) for pilot in pilots))
    found = spread.summary()
    assert found["sigma_sq"] == pytest.approx(vocabulary * deviation**2, rel=0.03)
    assert found["epsilon_sq"] == pytest.approx(bias, rel=0.01)
    assert found["pilot_error_sq"] == pytest.approx(found["epsilon_sq"] + found["sigma_sq"])


def test_two_pilots_are_exact_and_batches_add_up():
    batch, log_probs, _, _ = synthetic(tokens=6)
    middle = 0.5 * log_probs.exp() + 0.2
    draws = [(middle + 0.1).log(), (middle - 0.1).log()]
    none = torch.zeros_like(middle)
    whole, parts = PilotSpread("seeds", "ab"), PilotSpread("seeds", "ab")
    whole.update(batch, [(draw, none) for draw in draws])
    for start in (0, 2):
        rows = slice(start, 2 if start == 0 else 6)
        part = batch_of(batch.target_ids_BN[rows])
        parts.update(part, [(draw[rows], none[rows]) for draw in draws])
    assert whole.sigma_sq == pytest.approx(5 * 2 * 0.1**2)
    around = token_errors(middle, batch.target_ids_BN).square().sum().item() / 6
    assert whole.summary()["epsilon_sq"] == pytest.approx(around - 5 * 0.1**2)
    assert parts.summary()["pilot_error_sq"] == pytest.approx(whole.summary()["pilot_error_sq"])
    assert parts.sigma_sq == pytest.approx(whole.sigma_sq)


def test_a_sampled_target_adds_its_noise_to_the_errors_and_nothing_to_the_weights():
    p, probs, correction = (torch.tensor(v, dtype=torch.float64) for v in ((0.75, 0.25), (0.4, 0.6), (0.2, -0.3)))
    batch = batch_of([[0], [0], [0], [1]])  # as often as p says
    found = estimates(batch, probs.log().expand(4, 1, 2), correction.expand(4, 1, 2))
    error = p - probs
    label_noise = 1 - p.square().sum().item()
    assert found["pilot_error_sq"] == pytest.approx(error.square().sum().item() + label_noise)
    assert found["copilot_error_sq"] == pytest.approx((correction - error).square().sum().item() + label_noise)
    best = (error * correction).sum() / correction.square().sum()
    assert found["lambda_star"] == pytest.approx(best.item())
    assert found["zero_crossing"] == pytest.approx(2 * best.item())


# Copilots at the ends -----------------------------------------------------------------------------------------------


def test_a_new_soft_head_whose_corrections_are_rounding_promises_nothing():
    model, sums = tiny_model("llama", head="soft").eval(), DistanceSums(VOCAB)
    for seed in range(4):
        batch = random_batch("llama", rows=8, seed=seed)
        log_probs, corrections = correct_targets(model, batch)
        assert corrections.any()
        sums.update(batch, log_probs, corrections)
    found = sums.estimates(["all"]) | {"pilots": None, "is_eq_8": True}
    entries = found["entries"]
    assert [found[name] for name in ("lambda_star", "lambda_0", "zero_crossing")] == [0.0, None, None]
    assert found["intervals"] == {}
    assert entries["common_zero_crossing"] is None
    assert set(entries["best_weight_quantiles"].values()) == {0.0}
    assert entries["removed_per_entry"] == entries["removed_per_entry_held_out"] == entries["never"]["entries"] == 0.0
    assert verdict(found)[0] == "f^C is 0 everywhere: every λ is the Pilot."


def test_a_copilot_that_knows_the_error_has_weight_one_and_leaves_nothing():
    batch, log_probs, errors, _ = synthetic()
    found = estimates(batch, log_probs, errors)
    assert (found["lambda_star"], found["lambda_0"], found["zero_crossing"]) == pytest.approx((1, 1, 2))
    assert found["copilot_error_sq"] == pytest.approx(0, abs=1e-12)
    assert dict((row[0], row[2]) for row in found["curve"])[1.0] == pytest.approx(0, abs=1e-12)
    assert found["entries"]["harmed"]["entries"] == 0
    assert "every λ in (0, 2) lowers the distance; λ* = 1 removes 100.0 % of S²" in verdict(found)[0]
    assert any("no entry of the vocabulary gets worse" in text for text in verdict(found))


def test_a_copilot_that_points_away_gets_weight_zero_and_is_told_so():
    batch, log_probs, errors, _ = synthetic()
    found = estimates(batch, log_probs, -errors)
    assert found["lambda_star"] == 0
    assert found["lambda_0"] is None
    assert found["zero_crossing"] == pytest.approx(-2)
    assert "no λ > 0 helps; λ* = 0, keep the Pilot" in verdict(found)[0]
    assert "promises nothing" in verdict(found)[1]


def test_a_silent_copilot_is_the_pilot():
    batch, log_probs, errors, _ = synthetic()
    found = estimates(batch, log_probs, torch.zeros_like(errors))
    assert (found["lambda_star"], found["zero_crossing"], found["lambda_0"]) == (0, None, None)
    assert [row[3] for row in found["curve"]] == pytest.approx([found["pilot_error_sq"]] * len(WEIGHTS))
    assert "every λ is the Pilot" in verdict(found)[0]
    json.dumps(found, allow_nan=False)


# One λ for all entries ----------------------------------------------------------------------------------------------


def test_entries_that_one_weight_cannot_serve_are_counted():
    errors = torch.tensor([[0.8, 0.4, 0.2]], dtype=torch.float64)
    correction = torch.tensor([[0.8, 1.6, -0.1]], dtype=torch.float64)  # λ*_v: 1, 1/4, below 0
    sums = EntrySums(3)
    sums.add(errors, correction, torch.tensor([0]))
    found = served_entries(sums, 0.6)
    energy = 0.64 + 0.16 + 0.04
    assert found["harmed"]["entries"] == pytest.approx(2 / 3)  # zero crossings 2, 1/2 and −4
    assert found["harmed"]["occurrences"] == 0
    assert found["harmed"]["energy"] == pytest.approx((0.16 + 0.04) / energy)
    rise = (0.4 - 0.96) ** 2 - 0.16 + (0.2 + 0.06) ** 2 - 0.04
    assert found["harmed"]["increase"] == pytest.approx(rise / energy)
    assert found["never"]["energy"] == pytest.approx(0.04 / energy)
    assert found["common_zero_crossing"] == pytest.approx(-4)
    assert found["removed_per_entry"] == pytest.approx(0.8 / energy)  # all of the first two
    left = (0.8 - 0.48) ** 2 + (0.4 - 0.96) ** 2 + (0.2 + 0.06) ** 2
    assert found["removed_single"] == pytest.approx(1 - left / energy)
    assert found["best_weight_quantiles"] == {"5": 0.25, "25": 1.0, "50": 1.0, "75": 1.0, "95": 1.0}


def test_weights_chosen_for_entries_on_noise_do_not_hold_on_the_other_half():
    batch, log_probs, errors, generator = synthetic(tokens=40, vocabulary=50)
    found = estimates(batch, log_probs, torch.randn(errors.shape, generator=generator, dtype=torch.float64))
    entries = found["entries"]
    assert entries["removed_per_entry"] > max(entries["removed_single"], 0)
    assert entries["removed_per_entry_held_out"] < 0


def test_the_halves_hold_as_many_rows_of_each_benchmark_whatever_their_ids():
    sums, seen = DistanceSums(2), []
    log_probs = torch.tensor([0.6, 0.4], dtype=torch.float64).log().expand(64, 3, 2)
    for _ in range(4):  # of two benchmarks by turns, as ids were once given: the parity is the benchmark
        batch = batch_of([[0, 1, 1]] * 64, benchmarks=[0, 1] * 32)
        corrections = token_errors(log_probs.exp(), batch.target_ids_BN) * (1 - 2 * batch.benchmark_B.view(-1, 1, 1))
        sums.update(batch, log_probs, corrections)
        seen.append([half.tokens for half in sums.halves])
    assert seen[-1] == [3 * 128, 3 * 128]
    for half in sums.halves:  # f is ℓ on one benchmark, −ℓ on the other: together they cancel in either half
        assert half.total.inner == pytest.approx(0, abs=1e-12)
    found = sums.estimates(("a", "b"))
    assert found["entries"]["removed_per_entry_held_out"] == pytest.approx(0, abs=1e-12)
    order = [DistanceSums(2) for _ in range(2)]
    drawn = [[one._half_of(0) for _ in range(400)] for one in order]
    assert drawn[0] == drawn[1]  # a second call finds the same
    assert 60 < sum(drawn[0][::2]) < 140  # by chance, not by turns
    assert sum(drawn[0]) == 200


def test_positions_and_benchmarks_are_told_apart():
    log_probs = torch.tensor([0.6, 0.4], dtype=torch.float64).log().expand(2, 3, 2)
    batch = batch_of([[0, 1, 1], [0, 1, 1]], benchmarks=[0, 1])
    corrections = token_errors(log_probs.exp(), batch.target_ids_BN)
    corrections[:, 0] *= -1  # the first position only
    corrections[1] /= 2  # the second benchmark
    found = estimates(batch, log_probs, corrections, ("a", "b"))
    assert {name: part["tokens"] for name, part in found["by_position"].items()} == {"1": 2, "2": 2, "3–4": 2}
    assert found["by_position"]["1"]["lambda_star"] == 0
    assert found["by_position"]["1"]["removed_single"] < 0 < found["by_position"]["2"]["removed_single"]
    assert found["by_benchmark"]["b"]["lambda_star"] == pytest.approx(2 * found["by_benchmark"]["a"]["lambda_star"])
    assert sum(part["energy"] for part in found["by_benchmark"].values()) == pytest.approx(1)
    assert any("position 1" in text and "worse as a whole" in text for text in verdict(found))


def test_intervals_resample_examples_not_tokens():
    rows = np.array([[1.0, 0.5, 1.0, 1.0], [3.0, 0.9, 1.0, 1.0]] * 50)
    found = row_intervals(rows)
    low, high = found["lambda_star"]
    assert low < 0.7 < high
    joined = row_intervals(rows.reshape(50, 2, 4).sum(1))  # every example is one of each: no two are unlike
    assert joined["lambda_star"] == pytest.approx((0.7, 0.7))
    assert row_intervals(rows * [1, 0, 0, 1]) == {}


# Real models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_measured_curve_lies_on_the_parabola_and_everything_adds_up(family):
    model, batch, (log_probs, corrections) = scored(family, benchmarks=[0, 1, 0, 1, 1, 0])
    sums = DistanceSums(VOCAB)
    for part in batch.split(4):
        cut = slice(0, 4) if part.ids_B[0] == batch.ids_B[0] else slice(4, 6)
        columns = part.target_ids_BN.shape[1]
        sums.update(part, log_probs[cut, :columns], corrections[cut, :columns])
    found = sums.estimates(("a", "b"))
    assert found["curve_error"] < 1e-12
    assert found["entry_curve_error"] < 1e-12
    whole = EntrySums.of(sums.halves)
    for weight, (_, predicted, direct, _) in zip(WEIGHTS, found["curve"], strict=True):
        assert whole.distances_V(weight).sum() == pytest.approx(predicted, rel=1e-12)
        mask = batch.target_mask_BN
        fused = log_probs[mask].double().exp() + weight * corrections[mask].double()
        by_hand = torch.nn.functional.one_hot(batch.target_ids_BN[mask], VOCAB) - fused
        assert direct == pytest.approx(by_hand.square().sum(1).mean().item(), rel=1e-12)
    for part in ("by_benchmark", "by_position"):
        assert sum(group["tokens"] for group in found[part].values()) == found["tokens"] == int(batch.tokens)
        energies = [group["pilot_error_sq"] * group["tokens"] for group in found[part].values()]
        assert sum(energies) == pytest.approx(found["pilot_error_sq"] * found["tokens"])
    statistics = ErrorStatistics([0.0])
    statistics.observe(model, batch)
    summary = statistics.summary()
    assert whole.total.inner / whole.total.correction == pytest.approx(
        (statistics._sums[3] / statistics._sums[2]).item(), rel=1e-5
    )
    assert found["lambda_star"] == pytest.approx(summary["best_weight"], rel=1e-5)
    assert found["copilot_error_sq"] / found["pilot_error_sq"] == pytest.approx(summary["error_ratio"], rel=1e-5)


def test_the_curve_of_decoding_is_that_of_the_floored_distribution():
    log_probs = torch.tensor([[[0.6, 0.4]]]).log()
    found = estimates(batch_of([[1]]), log_probs, torch.tensor([[[-1.0, 1.0]]]))
    weight, predicted, direct, fused = found["curve"][WEIGHTS.index(1.0)]
    assert (weight, predicted, direct) == (1.0, pytest.approx(2 * 0.4**2), pytest.approx(2 * 0.4**2))
    left = 0.03 / 1.43  # 5 % of p̂ stay, then the row is divided by its sum
    assert fused == pytest.approx(2 * left**2, rel=1e-5)
    at_2 = 0.03 / 2.43  # p̂ + 2f puts 2.4 on the target
    assert any(f"least at λ = 2 of those tried, {2 * at_2**2:.4f}" in sentence for sentence in verdict(found))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_variance_by_dropout_is_zero_without_and_grows_with_it(family):
    def variance(rate):
        torch.manual_seed(0)
        model = tiny_model(family, head_std=0.3, dropout=rate).eval()
        batch = random_batch(family, rows=6, seed=3)
        spread = PilotSpread("dropout", [str(n) for n in range(8)])
        spread.update(batch, dropout_draws(model, batch, 8))
        assert not model.pilot.training
        return spread.sigma_sq

    assert variance(0.0) == 0
    assert 0 < variance(0.02) < variance(0.3)


def test_long_targets_are_scored_few_rows_at_once(monkeypatch, tmp_path):
    model, random = tiny_model("llama", head_std=0.3), np.random.default_rng(0)
    rows = [
        {"source_ids": [5, 6], "target_ids": random.integers(3, VOCAB, length).tolist(), "id": length, "benchmark": 0}
        for length in range(1, 21)
    ]
    data, tokenizer = SimpleNamespace(benchmark_names=["a"], evaluation_rows=lambda *_: rows), byte_tokenizer()
    scorer = Evaluator(model, tokenizer, data, tmp_path, Decoding(batch_size=8))
    sizes, score = [], scorer.scored
    monkeypatch.setattr(scorer, "scored", lambda part: sizes.append(len(part)) or score(part))
    at_once = estimate([TrainedRun(tmp_path, scorer)], "test")
    monkeypatch.setattr(modes, "AT_ONCE", 64 * VOCAB)  # 64 target tokens
    few = estimate([TrainedRun(tmp_path, scorer)], "test")
    assert sizes[:3] == [8, 8, 4]
    assert sizes[3:] == [8, 4, 4, 3, 1]
    assert few["lambda_star"] == pytest.approx(at_once["lambda_star"], rel=1e-4)
    assert few["rows"] == at_once["rows"] == 20


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three seeds on one draw, the last with dropout, a run on rows of its own, and one without a Copilot."""
    root = tmp_path_factory.mktemp("runs")
    made = {
        "first": [*SAME_ROWS],
        "second": ["seed=1", *SAME_ROWS],
        "dropout": ["seed=2", *SAME_ROWS, "pilot.config.dropout_rate=0.2"],
        "other_rows": ["seed=1", "data.split_seed=1"],
        "alone": ["copilot=none"],
    }
    for name, overrides in made.items():
        composed.train(root / name, *composed.SMALL, "fusion.weight=[0,1]", "rounds=2", *overrides)
    return root


def told(capsys, *arguments) -> str:
    """What the command says on stderr when it refuses."""
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.slow
def test_the_command_writes_its_figures_and_says_them(runs, capsys, tmp_path):
    copy = tmp_path / "copy.json"
    assert main([str(runs / "first"), str(runs / "second"), "--json", str(copy)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((runs / "first" / "theorem.json").read_text())
    assert json.loads(copy.read_text()) == found
    assert not (runs / "second" / "theorem.json").exists()
    assert printed.splitlines()[-1] == f"theorem: {runs / 'first' / 'theorem.json'}"
    assert all(sentence[:40] in printed for sentence in found["verdict"])
    assert found["split"] == "test"
    assert found["epsilon_pilot_sq"] + found["sigma_pilot_sq"] == pytest.approx(found["pilots"]["pilot_error_sq"])
    assert found["sigma_pilot_sq"] > 0
    draws = found["pilots"]["draws"]
    assert [draw["name"] for draw in draws] == [str(runs / "first"), str(runs / "second")]
    for name in ("pilot_error_sq", "copilot_error_sq", "lambda_star", "lambda_0", "zero_crossing"):
        assert draws[0][name] == (None if found[name] is None else pytest.approx(found[name]))
    assert [row[0] for row in found["curve"]] == list(WEIGHTS)
    assert set(found["by_benchmark"]) == {"word_problems"}
    assert list(found["by_position"])[:1] == ["1"]


@pytest.mark.slow
def test_one_run_says_that_bias_and_variance_cannot_be_told_apart(runs, capsys):
    assert main([str(runs / "first"), "--split", "validation", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "validation"
    assert (found["epsilon_pilot_sq"], found["sigma_pilot_sq"], found["pilots"]) == (None, None, None)
    assert any("One Pilot cannot tell" in sentence for sentence in found["verdict"])


@pytest.mark.slow
def test_dropout_passes_give_a_variance_that_a_second_call_repeats(runs, capsys):
    found = []
    for _ in range(2):
        assert main([str(runs / "dropout"), "--dropout-passes", "3", "--json", "-"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["pilots"]["kind"] == "dropout"
    assert found[0]["sigma_pilot_sq"] > 0


@pytest.mark.slow
def test_a_pilot_without_dropout_is_refused(runs, capsys):
    message = told(capsys, runs / "first", "--dropout-passes", "2")
    assert "dropout_rate=0.0" in message
    assert "pilot.config.dropout_rate=0.1" in message


@pytest.mark.slow
def test_runs_that_cannot_be_compared_are_refused(runs, capsys):
    message = told(capsys, runs / "first", runs / "other_rows", runs / "first")
    assert f"{runs / 'other_rows'}: its test rows are not those of {runs / 'first'}" in message
    assert "given twice" in message


@pytest.mark.slow
def test_another_vocabulary_is_refused(runs, capsys, tmp_path):
    other = shutil.copytree(runs / "second", tmp_path / "other")
    file = other / "export" / "tokenizer.json"
    file.write_text(file.read_text().replace('"eggs"', '"figs"'))
    message = told(capsys, runs / "first", other)
    assert "another vocabulary than" in message


@pytest.mark.slow
def test_what_is_no_finished_run_with_a_copilot_is_refused(runs, capsys, tmp_path):
    assert "no config.yaml there; give the directory of a finished" in told(capsys, tmp_path)
    (tmp_path / "config.yaml").write_text("paths: {}\n")
    assert "no export/config.json there" in told(capsys, tmp_path)
    assert "has no Copilot (copilot=none)" in told(capsys, runs / "alone")


@pytest.mark.parametrize("arguments", [["a", "b", "--dropout-passes", "3"], ["a", "--dropout-passes", "1"], []])
def test_arguments_that_contradict_each_other_are_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "tcopilot-theorem: error" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_that_cannot_be_written_is_named(runs, capsys, tmp_path):
    assert "no/such.json: No such file" in told(capsys, runs / "first", "--json", tmp_path / "no" / "such.json")


def test_the_command_is_installed_under_its_name():
    scripts = tomllib.loads((composed.ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["tcopilot-theorem"].partition(":")
    assert getattr(importlib.import_module(module), function) is main
