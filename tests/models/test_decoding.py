import pytest
import torch

from tcopilot import Copilot
from tcopilot.functional import token_errors
from tcopilot.models.decoding import correct_next, correct_text

VARIANTS = [
    ("llama", "strict", "linear"),
    ("gemma2", "inclusive", "soft"),
    ("qwen3", "inclusive", "linear"),
    ("t5", "strict", "soft"),
    ("bart", "inclusive", "linear"),
]


@pytest.fixture(params=VARIANTS, ids="-".join)
def case(request, tiny_pilot, randomise):
    """A Copilot and a text of 6 targets, of which 5 tokens are known, for two rows."""
    family, context, head = request.param
    copilot = randomise(Copilot.from_pilot(tiny_pilot(family), layers=3, context=context, head=head)).eval()
    generator = torch.Generator().manual_seed(0)
    text = {
        "log_probs_BNV": (2 * torch.randn(2, 6, 56, generator=generator)).log_softmax(-1),
        "tokens_BK": torch.randint(0, 56, (2, 5), generator=generator),
        "source_BMP": torch.randn(2, 4, 32, generator=generator),
        "source_mask_BM": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool(),
        "states_BNP": torch.randn(2, 6, 32, generator=generator),
    }
    return copilot, text


def cut(text, targets):
    """The text as it was known when only that many targets had been reached."""
    short = {name: text[name][:, :targets] for name in ("log_probs_BNV", "states_BNP")}
    return text | short | {"tokens_BK": text["tokens_BK"][:, : targets - 1]}


@torch.no_grad()
def recomputed(copilot, feedback, text):
    """Algorithm 2 without a cache: every target runs the whole Copilot again."""
    probs, corrections = text["log_probs_BNV"].exp(), text["log_probs_BNV"][:, :0]
    for i in range(6):
        past = corrections if feedback == "own" else token_errors(probs[:, :i], text["tokens_BK"][:, :i])
        log = text["source_BMP"], text["source_mask_BM"], text["states_BNP"][:, : i + 1]
        hidden, _ = copilot(copilot.inputs(past), *log)
        new = copilot.correct(hidden[:, -1:], text["log_probs_BNV"][:, i : i + 1])
        corrections = torch.cat([corrections, new], dim=1)
    return corrections


@pytest.mark.parametrize("feedback", ["observed", "own"])
def test_correcting_a_text_equals_algorithm_2_without_a_cache(case, feedback):
    copilot, text = case
    with torch.no_grad():
        corrections, state = correct_text(copilot, feedback, **text)
    assert state is None
    assert corrections.abs().mean() > 1e-3
    torch.testing.assert_close(corrections, recomputed(copilot, feedback, text), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("known", [1, 3])
@pytest.mark.parametrize("feedback", ["observed", "own"])
def test_going_on_token_by_token_equals_correcting_the_whole_text(case, feedback, known):
    copilot, text = case
    with torch.no_grad():
        whole, _ = correct_text(copilot, feedback, **text)
        first, state = correct_text(copilot, feedback, **cut(text, known), keep=True)
        steps = [
            correct_next(
                copilot, text["log_probs_BNV"][:, i : i + 1], text["tokens_BK"][:, i - 1 : i],
                text["states_BNP"][:, i : i + 1], state,
            )
            for i in range(known, 6)
        ]  # fmt: skip
    torch.testing.assert_close(torch.cat([first, *steps], dim=1), whole, atol=1e-4, rtol=1e-3)


def test_observed_feedback_depends_on_the_tokens_and_own_feedback_does_not(case):
    copilot, text = case
    other = text | {"tokens_BK": (text["tokens_BK"] + 1) % 56}
    with torch.no_grad():
        assert torch.equal(correct_text(copilot, "own", **text)[0], correct_text(copilot, "own", **other)[0])
        before, after = (correct_text(copilot, "observed", **given)[0] for given in (text, other))
    torch.testing.assert_close(before[:, 0], after[:, 0])
    assert (before - after)[:, 1:].abs().amax((0, 2)).min() > 1e-4


def test_both_feedbacks_agree_on_the_first_target_only(case):
    copilot, text = case
    with torch.no_grad():
        observed, own = (correct_text(copilot, feedback, **text)[0] for feedback in ("observed", "own"))
    torch.testing.assert_close(observed[:, 0], own[:, 0], atol=1e-5, rtol=1e-4)
    assert (observed - own)[:, 1:].abs().amax((0, 2)).min() > 1e-4


@pytest.mark.parametrize("feedback", ["observed", "own"])
def test_one_target_without_known_tokens_is_corrected(case, feedback):
    copilot, text = case
    with torch.no_grad():
        alone, state = correct_text(copilot, feedback, **cut(text, 1), keep=True)
        whole, _ = correct_text(copilot, feedback, **text)
    assert state.feedback_BV.shape == (2, 56)
    torch.testing.assert_close(alone, whole[:, :1], atol=1e-5, rtol=1e-4)
