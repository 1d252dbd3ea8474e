"""Scoring by likelihood: the fused model's own probability of each option, whatever the batch."""

import json
from functools import partial

import pytest
import torch
from small_training import source_side, tiny_model

from tcopilot.data import MultipleChoice, PromptTargetCollator, TCopilotDataModule, byte_tokenizer
from tcopilot.evaluation import modes
from tcopilot.evaluation.evaluate import Evaluator
from tcopilot.evaluation.likelihood import Likelihood, log_likelihoods
from tcopilot.evaluation.modes import Decoding
from tcopilot.training.error_statistics import correct_targets

FAMILIES = ("t5", "llama")
WEIGHTS = (0.0, 0.3, 1.0)
OTHERS = (("t5", "own"), ("llama", "observed"))


def rows(tmp_path, number: int = 6) -> None:
    """Questions of two to four options of very different length."""
    options = ["no", "noooooo", "noooooooooooo", "maybe"]
    for split in ("train", "validation", "test"):
        lines = [
            {"q": f"Which {'very ' * (i % 4)}thing is {split} {i}?", "o": options[: 2 + i % 3], "l": i % 2}
            for i in range(number)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def setting(tmp_path):
    def build(family: str, batch_size: int = 4, modes=("likelihood",), num_beams=1, **options) -> Evaluator:
        rows(tmp_path)
        task = MultipleChoice(
            name="choice", question_column="q", option_columns=["o"], label_column="l", label="zero_based",
            target=" the correct answer is {answer}", max_new_tokens=8,
        )  # fmt: skip
        data = TCopilotDataModule({"choice": task}, path=tmp_path, batch_size=2, rounds=1)
        tokenizer = byte_tokenizer()
        tokenizer.padding_side = source_side(family)
        data.prepare(tokenizer, source_side(family))
        model = tiny_model(family, vocab=len(tokenizer), head_std=0.1, **options).eval()
        decoding = Decoding(batch_size=batch_size, modes=modes, num_beams=num_beams)
        return Evaluator(model, tokenizer, data, tmp_path / f"p{batch_size}", decoding)

    return build


def alone(model, source: list[int], target: list[int], weight: float) -> float:
    """Σ log p̃ of a target through the model's own loss, one row and one λ at a time."""
    model.weight = weight
    labels = torch.tensor([target])
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            loss = model(input_ids=torch.tensor([source]), labels=labels).loss
        else:
            ignored = torch.full((1, len(source)), -100)
            loss = model(input_ids=torch.tensor([source + target]), labels=torch.cat([ignored, labels], dim=1)).loss
    return -loss.item() * len(target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "feedback"),
    [("t5", "observed"), ("llama", "own"), *(pytest.param(*p, marks=pytest.mark.slow) for p in OTHERS)],
)
def test_the_likelihood_of_an_answer_is_the_models_and_does_not_depend_on_its_batch(setting, family, feedback):
    judge = setting(family, batch_size=64, feedback=feedback)
    examples = judge.data.evaluation_rows("test", "choice")
    judge.model.double()  # own outputs fed back amplify rounding
    (mode,) = judge.modes("choice")
    together = mode.answer(examples, WEIGHTS)
    for weight in WEIGHTS:
        for row, prediction in zip(examples, together[weight], strict=True):
            expected = [alone(judge.model, row["source_ids"], ids, weight) for ids in row["option_ids"]]
            assert prediction["log_likelihoods"] == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert together[0.0][0]["log_likelihoods"] != pytest.approx(together[1.0][0]["log_likelihoods"], abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_in_batches_of_one_and_of_eight(setting, family):
    found = {size: setting(family, batch_size=size).scores("test", "choice", WEIGHTS) for size in (1, 8)}
    assert found[1] == found[8]


def test_long_targets_are_scored_a_few_at_once_with_the_same_result(setting, tmp_path, monkeypatch):
    found, numbers = [], []
    for most in (modes.AT_ONCE, 64 * 300):  # targets of up to 41 tokens
        monkeypatch.setattr(modes, "AT_ONCE", most)
        judge = setting("t5", batch_size=64, modes=("likelihood", "targets"))
        score = judge.scored
        seen = []
        monkeypatch.setattr(judge, "scored", lambda rows, score=score, seen=seen: keep(seen, score(rows)))
        judge.folder = tmp_path / f"at most {most}"
        found.append((judge.scores("test", "choice", WEIGHTS), judge.likelihood("test")))
        numbers.append(max(seen))
    assert numbers[1] <= 64 * 300 < numbers[0]
    for weight in WEIGHTS:
        for metric, scores in found[0][0][weight].items():
            assert found[1][0][weight][metric] == pytest.approx(scores)
    assert found[1][1] == pytest.approx(found[0][1])


def keep(seen, scored):
    """Note the size of log p̂."""
    seen.append(scored[1].numel())
    return scored


def test_sum_and_mean_choose_by_what_they_are_named_after():
    row = {"id": 0, "prompt": "p", "target": "b", "answer": "b", "options": ("a", "b"), "option_ids": [[1], [1, 2, 3]]}
    (prediction,) = Likelihood._chosen([row], [-2.0, -3.0])
    assert prediction["scores"] == {"accuracy_sum": 0.0, "accuracy_mean": 1.0}
    assert (prediction["prediction_sum"], prediction["prediction_mean"]) == ("a", "b")


@pytest.mark.slow
def test_both_modes_are_reported_and_the_first_decides(setting, tmp_path):
    found = setting("llama", modes=("likelihood", "generation")).run([1.0])
    metrics = [row.metric for row in found.rows if (row.split, row.weight) == ("test", 0.0)]
    assert metrics == ["accuracy_sum", "accuracy_mean", "accuracy", "accuracy_lenient", "no_answer", "nll"]
    assert [gain.metric for gain in found.gain] == ["accuracy_sum", "accuracy_mean", "accuracy", "accuracy_lenient"]
    assert len((tmp_path / "p4" / "test-choice-likelihood-weight=1.jsonl").read_text().splitlines()) == 6
    assert len((tmp_path / "p4" / "test-choice-weight=1.jsonl").read_text().splitlines()) == 6


def test_a_copilot_that_knows_the_answer_moves_the_choice(setting):
    judge = setting("llama")
    collate: PromptTargetCollator = judge.collate
    (row,) = judge.data.evaluation_rows("test", "choice")[:1]
    batch = collate([row | {"target_ids": ids} for ids in row["option_ids"]])
    before = log_likelihoods(judge.model, (batch, *correct_targets(judge.model, batch)), [1.0])
    with torch.no_grad():
        judge.model.copilot.head.weight.zero_()
    after = log_likelihoods(judge.model, (batch, *correct_targets(judge.model, batch)), [0.0, 1.0])
    torch.testing.assert_close(after[0], after[1], atol=1e-4, rtol=1e-5)
    assert not torch.allclose(before[0], after[1], atol=1e-3)


def test_the_answer_in_a_stored_prediction_is_the_likeliest_option():
    read = partial(Likelihood.read, None)
    stored = {"prediction_sum": " b", "prediction_mean": " a", "target": " b"}
    assert (read(stored).text, read(stored).correct) == (" b", True)
    assert not read(stored | {"target": " a"}).correct


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_reranking_answers_with_the_likeliest_of_the_pilots_own_beams(setting, family):
    judge = setting(family, batch_size=9, modes=("reranking",), num_beams=3)
    (mode,) = judge.modes("choice")
    rows = judge.data.evaluation_rows("test", "choice")[:4]
    (decoded,) = mode.decode(rows, [0.0], num_return_sequences=3)
    said = mode.emit(rows, [0.0, 1.0])
    for number, row in enumerate(rows):
        beams = [mode._with_end(tokens) for tokens in decoded[3 * number : 3 * number + 3]]
        assert all(set(beam[:-1]).isdisjoint(mode.ends) for beam in beams)
        sums = [[alone(judge.model, row["source_ids"], beam, weight) for beam in beams] for weight in (0.0, 1.0)]
        assert sums[0] != pytest.approx(sums[1], abs=1e-3)  # the Copilot has a say
        for weight, of_weight in zip((0.0, 1.0), sums, strict=True):
            assert said[weight][number] == beams[of_weight.index(max(of_weight))]
