import pytest
import torch

from tcopilot.functional import token_errors
from tcopilot.models import chunked
from tcopilot.models.chunked import chunked_sum, project_errors

ROWS, WIDTH, VOCAB = 7, 4, 10


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, generator=generator, requires_grad=True)
    goal = torch.randn(ROWS, VOCAB, generator=generator)

    def row_losses(rows, chunk):
        return (torch.tanh(rows @ weight.T) - goal[chunk]).square().sum(-1)

    return hidden, weight, row_losses


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 7, 100])
def test_value_and_gradients_do_not_depend_on_the_chunks(case, monkeypatch, rows_per_chunk):
    hidden, weight, row_losses = case
    plain = row_losses(hidden, slice(None)).sum()
    expected = torch.autograd.grad(3 * plain, [hidden, weight])
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", rows_per_chunk * VOCAB)
    total = chunked_sum(row_losses, hidden, [weight], VOCAB)
    grads = torch.autograd.grad(3 * total, [hidden, weight])
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(grads, expected)


def test_the_gradient_reaches_what_produced_the_rows(case, monkeypatch):
    hidden, weight, row_losses = case
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 2 * VOCAB)
    scale = torch.tensor(2.0, requires_grad=True)
    (plain,) = torch.autograd.grad(row_losses(scale * hidden, slice(None)).sum(), scale)
    (grad,) = torch.autograd.grad(chunked_sum(row_losses, scale * hidden, [weight], VOCAB), scale)
    torch.testing.assert_close(grad, plain)


def test_a_frozen_parameter_gets_no_gradient_and_the_rows_still_do(case):
    hidden, weight, row_losses = case
    weight.requires_grad_(False)
    chunked_sum(row_losses, hidden, [weight], VOCAB).backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_frozen_rows_leave_the_gradient_of_the_parameters_alone(case):
    hidden, weight, row_losses = case
    (expected,) = torch.autograd.grad(row_losses(hidden, slice(None)).sum(), weight)
    chunked_sum(row_losses, hidden.detach(), [weight], VOCAB).backward()
    torch.testing.assert_close(weight.grad, expected)
    assert hidden.grad is None


def test_no_graph_is_built_without_gradients(case):
    hidden, weight, row_losses = case
    with torch.no_grad():
        total = chunked_sum(row_losses, hidden, [weight], VOCAB)
    assert not total.requires_grad
    torch.testing.assert_close(total, row_losses(hidden, slice(None)).sum().detach())


def test_a_batch_without_target_tokens_has_loss_zero_and_zero_gradients(case):
    hidden, weight, row_losses = case
    total = chunked_sum(row_losses, hidden[:0], [weight], VOCAB)
    total.backward()
    assert total.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_rows_in_half_precision_give_a_float32_sum_and_gradients_of_their_own_type(case):
    hidden, weight, row_losses = case
    half = hidden.detach().bfloat16().requires_grad_()
    total = chunked_sum(lambda rows, chunk: row_losses(rows.float(), chunk), half, [weight], VOCAB)
    total.backward()
    assert total.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(total, row_losses(hidden, slice(None)).sum(), rtol=1e-2, atol=0)


# The projection of ℓ -------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", sequences_per_chunk * 3 * VOCAB)
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
