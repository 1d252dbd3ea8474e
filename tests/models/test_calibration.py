"""A calibrated Pilot as a Copilot: a no-op when new, the fit, decoding, export; as the option and as the control."""

import composed
import pytest
import torch
from family_models import FAST, make_batch
from small_training import source_side, tiny_model
from transformers import AutoModelForCausalLM

from tcopilot.app.checks.config import config_problems
from tcopilot.data import DataError, GeneratedTask, TCopilotDataModule, word_tokenizer
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.results import Results
from tcopilot.models import calibration as calibration_module
from tcopilot.models.calibration import Observed
from tcopilot.models.fusion import ProbabilityFusion
from tcopilot.models.modeling import fused_class
from tcopilot.reporting.run_tables import gain_table
from tcopilot.training.error_statistics import correct_targets

VOCAB = 200


def calibration(pilot):
    return fused_class(pilot.config.is_encoder_decoder).from_pilot(pilot, kind="calibration").eval()


def drawn(scale: float, bias_V, count: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Distributions, and targets drawn from softmax(scale · log p̂ + b): a Pilot off by just that, as [1, N, V]."""
    generator = torch.Generator().manual_seed(0)
    log_probs_NV = torch.randn(count, VOCAB, generator=generator).mul(2).log_softmax(-1)
    true_NV = (scale * log_probs_NV + bias_V).softmax(-1)
    return log_probs_NV[None], torch.multinomial(true_NV, 1, generator=generator).T


def fitted(log_probs_BNV, targets_BN, tokens_A):
    """A calibration of a tiny Pilot's size, fitted to what is given."""
    copilot = tiny_model("t5", vocab=VOCAB, kind="calibration").copilot
    mask_BN = torch.ones_like(targets_BN, dtype=torch.bool)
    copilot.fit(Observed.of(log_probs_BNV, targets_BN, mask_BN, tokens_A))
    return copilot


def nll(log_probs_BNV, corrections_BNV, targets_BN) -> float:
    fused_BNV = ProbabilityFusion().fuse(log_probs_BNV, corrections_BNV, 1.0)
    return -fused_BNV.gather(-1, targets_BN[..., None]).mean().item()


# The fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.6])
def test_the_fit_finds_the_temperature_of_a_pilot_that_is_too_sure_or_not_sure_enough(scale):
    log_probs, targets = drawn(scale, torch.zeros(VOCAB))
    copilot = fitted(log_probs, targets, torch.arange(20))  # most of the vocabulary has no bias
    assert copilot.temperature == pytest.approx(1 / scale, rel=0.05)
    better = nll(log_probs, None, targets) - nll(log_probs, copilot.correct(log_probs[..., :0], log_probs), targets)
    assert better > 0.05 if scale != 1.0 else abs(better) < 0.01


@pytest.mark.slow
def test_the_fit_finds_the_bias_of_tokens_that_answers_use_and_leaves_the_others():
    bias = torch.zeros(VOCAB)
    bias[3], bias[5] = 4.0, 3.0
    log_probs, targets = drawn(1.0, bias)
    found = fitted(log_probs, targets, torch.tensor([3, 5, 7])).head.bias
    assert found[[3, 5]].tolist() == pytest.approx([4.0, 3.0], abs=0.3)
    assert found[7].abs() < 1.0
    others = torch.ones(VOCAB, dtype=torch.bool)
    others[[3, 5, 7]] = False
    assert found[others].abs().max() == 0


def test_the_fit_reads_some_rows_at_once_and_finds_the_same(monkeypatch):
    given, seen, nll_of = (*drawn(1.3, torch.zeros(VOCAB), count=100), torch.arange(9)), [], Observed.nll
    whole = fitted(*given)
    monkeypatch.setattr(calibration_module, "AT_ONCE", 16 * (9 + calibration_module.BINS))
    monkeypatch.setattr(Observed, "nll", lambda part, *at: seen.append(len(part.target_R)) or nll_of(part, *at))
    parted = fitted(*given)
    assert max(seen) == 16
    assert parted.temperature == pytest.approx(whole.temperature, rel=1e-5)
    torch.testing.assert_close(parted.head.bias, whole.head.bias, rtol=1e-4, atol=1e-5)


def test_a_token_seen_once_or_never_gets_no_endless_bias():
    log_probs, _ = drawn(1.0, torch.zeros(VOCAB), count=6)
    targets = torch.tensor([[2, 3, 3, 3, 3, 3]])
    found = fitted(log_probs, targets, torch.tensor([2, 3, 4])).head.bias
    assert found.abs().max() < 10
    assert found[4] < 0 < found[2]


def test_counting_the_other_tokens_in_bins_loses_next_to_nothing():
    log_probs, targets = drawn(1.0, torch.zeros(VOCAB), count=200)
    tokens = torch.arange(0, VOCAB, 7)
    mask = torch.ones_like(targets, dtype=torch.bool)
    seen, bias = Observed.of(log_probs, targets, mask, tokens), torch.randn(len(tokens), dtype=torch.float64)
    of_all = torch.zeros(VOCAB, dtype=torch.float64).index_add(0, tokens, bias)
    for inverse, off in ((1.0, 1e-5), (0.4, 1e-3), (2.5, 5e-3)):
        exact = (inverse * log_probs.double() + of_all).log_softmax(-1).gather(-1, targets[..., None]).flatten()
        torch.testing.assert_close(-seen.nll(torch.tensor(inverse).double(), bias), exact, atol=off, rtol=0)


# As a Copilot ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAST)
def test_a_new_one_is_the_pilot_and_none_of_it_is_trained(tiny_pilot, prompts, family):
    model = calibration(tiny_pilot(family))
    assert correct_targets(model, make_batch(model.pilot))[1].abs().max() < 1e-6
    assert not any(parameter.requires_grad for parameter in model.copilot.parameters())
    tokens = prompts(model.pilot, padded=True)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**tokens, **options), model.pilot.generate(**tokens, **options))


@pytest.mark.parametrize("family", FAST)
def test_decoding_with_caches_is_decoding_without(tiny_pilot, prompts, randomise, family):
    model = calibration(tiny_pilot(family)).double()
    torch.nn.init.normal_(model.copilot.head.bias, std=2.0)
    tokens = prompts(model.pilot, padded=True)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    found = model.generate(**tokens, **options)
    assert torch.equal(found, model.generate(**tokens, use_cache=False, **options))
    assert not torch.equal(found, model.pilot.generate(**tokens, **options))


def test_it_is_exported_and_loaded_again(tiny_pilot, tmp_path):
    model = calibration(tiny_pilot("llama"))
    torch.nn.init.normal_(model.copilot.head.bias)
    model.copilot.head.log_temperature.fill_(0.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = make_batch(model.pilot)
    torch.testing.assert_close(correct_targets(again, batch), correct_targets(model, batch))
    assert again.copilot.temperature == model.copilot.temperature


# On the rows of a data module --------------------------------------------------------------------------------------


def judge_of(family: str, folder, scale: float = 1.0) -> Evaluator:
    """An evaluator of a random Pilot whose logits are `scale` times what they would be."""
    task = GeneratedTask(name="word_problems", kind="word_problems", train=60, validation=50, test=50)
    data = TCopilotDataModule({"word_problems": task}, batch_size=8, rounds=1)
    tokenizer = word_tokenizer(task.vocabulary)
    tokenizer.padding_side = source_side(family)
    data.prepare(tokenizer, source_side(family))
    model = tiny_model(family, vocab=len(tokenizer), kind="calibration")
    if scale != 1.0:
        head = model.pilot.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach() * scale)
    return Evaluator(model, tokenizer, data, folder)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_it_mends_the_likelihood_of_a_pilot_that_is_too_sure_on_rows_it_was_not_fitted_on(family, tmp_path):
    judge = judge_of(family, tmp_path, scale=5.0)
    judge.calibrate()
    assert judge.model.copilot.temperature > 1.5
    assert judge.likelihood("test", 1.0) < judge.likelihood("test", 0.0) - 0.5


def test_the_tokens_of_training_targets_have_a_bias(tmp_path):
    judge = judge_of("t5", tmp_path)
    judge.calibrate()
    used = {token for row in judge.data._train for token in row["target_ids"]}
    assert judge.data.target_tokens() == sorted(used)
    assert set(judge.model.copilot.head.bias.nonzero().flatten().tolist()) <= used


def test_without_validation_rows_there_is_nothing_to_fit_on(tmp_path):
    judge = judge_of("t5", tmp_path)
    del judge.data._evaluation["validation", "word_problems"]
    with pytest.raises(DataError, match="no rows of word_problems validation"):
        judge.calibrate()


# As the option and as the control ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_option_fits_in_place_of_training(tmp_path):
    folder = composed.train(tmp_path / "run", *composed.SMALL, "copilot=calibration", "fusion.weight=1")
    found = composed.results(folder)
    assert found["params"]["copilot_trainable"] == 0
    assert composed.value(found, "validation", "nll", 1.0, "all") < composed.value(
        found, "validation", "nll", 0.0, "all"
    )
    again = composed.results(composed.evaluate(folder, tmp_path / "again"))
    for old, new in zip(found["rows"], again["rows"], strict=True):
        assert new["value"] == pytest.approx(old["value"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("copilot", ["copilot=equal", pytest.param("copilot=none", marks=pytest.mark.slow)])
def test_the_control_is_the_runs_own_pilot_calibrated(copilot, tmp_path):
    folder = composed.train(tmp_path, *composed.SMALL, "fusion.weight=[0,1]", "control=calibrated", copilot)
    results = Results.load(folder / "results.json")
    accuracy, likelihood = results.controls
    assert {control.name for control in results.controls} == {"Pilot, calibrated"}
    assert (accuracy.metric, likelihood.metric, likelihood.rounds) == ("accuracy", "nll", 0)
    assert likelihood.value < results.find("all", "nll", "test", 0.0).value
    assert likelihood.train_flops > 0
    said = composed.predictions(folder / "control" / "calibrated", "test", 1.0)
    assert accuracy.value == sum(row["scores"]["accuracy"] for row in said) / len(said)
    columns = [list(column.cells) for column in gain_table(results).columns]
    assert [name for name, metric in zip(columns[-1], columns[1], strict=True) if metric == "nll"] == [
        "", "Pilot, calibrated",
    ]  # fmt: skip


def test_a_frozen_pilot_may_be_calibrated_as_a_control_but_not_averaged():
    frozen = ("pilot.frozen=true", "pilot.path=some/model")
    assert not config_problems(composed.compose_config(*frozen, "control=calibrated"))
    (problem,) = config_problems(composed.compose_config(*frozen, "control=[calibrated,averaged]"))
    assert "control=['averaged'] with pilot.frozen=true" in problem
    (problem,) = config_problems(composed.compose_config(*frozen, "copilot=calibration"))
    assert "copilot=calibration: nothing would be trained" in problem
