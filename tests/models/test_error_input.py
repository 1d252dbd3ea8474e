import pytest
import torch

from tcopilot.functional import token_errors
from tcopilot.models import error_input
from tcopilot.models.error_input import project_errors

WIDTH, VOCAB = 4, 10


@pytest.fixture
def errors_case():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(5, 3, VOCAB, generator=generator).mul(4).softmax(-1)
    targets = torch.randint(0, VOCAB, (5, 3), generator=generator)
    matrix = torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)
    return probs, targets, matrix


@pytest.mark.parametrize("sequences_per_chunk", [1, 2, 100])
def test_projected_errors_and_their_gradient_are_those_of_the_product(errors_case, monkeypatch, sequences_per_chunk):
    probs, targets, matrix = errors_case
    monkeypatch.setattr(error_input, "CHUNK_ELEMENTS", sequences_per_chunk * 3 * VOCAB)
    expected = token_errors(probs, targets) @ matrix
    got = project_errors(probs, targets, matrix)
    torch.testing.assert_close(got, expected)
    goal = torch.randn_like(expected)
    grads = [torch.autograd.grad((value * goal).sum(), matrix)[0] for value in (got, expected)]
    torch.testing.assert_close(*grads)


def test_a_single_target_has_no_past_error_to_project(errors_case):
    probs, targets, matrix = errors_case
    got = project_errors(probs[:, :0], targets[:, :0], matrix)
    assert got.shape == (5, 0, WIDTH)
    got.sum().backward()
    assert torch.equal(matrix.grad, torch.zeros_like(matrix))


def test_small_errors_survive_bfloat16(errors_case):
    _, _, matrix = errors_case
    probs = torch.full((1, 1, VOCAB), 1e-4)
    probs[..., 0] = 1 - 1e-4 * (VOCAB - 1)
    targets = torch.zeros(1, 1, dtype=torch.long)
    exact = token_errors(probs, targets) @ matrix
    with torch.autocast("cpu", torch.bfloat16):
        got = project_errors(probs, targets, matrix)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())
    got.float().sum().backward()
    assert matrix.grad.dtype == torch.float32
