import pytest
import torch

from tcopilot.training import chunked_loss
from tcopilot.training.chunked_loss import chunked_sum

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
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", rows_per_chunk * VOCAB)
    total = chunked_sum(row_losses, hidden, [weight], VOCAB)
    grads = torch.autograd.grad(3 * total, [hidden, weight])
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(grads, expected)


def test_the_gradient_reaches_what_produced_the_rows(case, monkeypatch):
    hidden, weight, row_losses = case
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", 2 * VOCAB)
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
