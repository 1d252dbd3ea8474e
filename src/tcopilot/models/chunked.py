"""What the Copilot does over the vocabulary, without keeping a second [B, N, V] tensor beside p̂.

Its head is d_C × V and its loss compares V entries per token; its input reads all V entries of ℓ. Autograd would keep
several [B, N, V] tensors until the backward pass. Here each chunk of rows is evaluated and differentiated at once, so
that only the gradients of the head's input and parameters survive, and ℓ is formed from p̂ chunk by chunk, where it is
read.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tcopilot.functional import token_errors

CHUNK_ELEMENTS = 2**24  # rows × V of one chunk: 64 MB in float32


def chunked_sum(
    row_losses: Callable[[Tensor, slice], Tensor], hidden_RC: Tensor, parameters: Sequence[Tensor], vocab_size: int
) -> Tensor:
    """Return Σ_r row_losses(hidden)[r], with gradients computed in the forward pass, chunk by chunk.

    Args:
        row_losses: maps a chunk of rows [r, C] and the slice of R that it is to losses [r]. It must be a function of
            its rows and of `parameters` only.
        hidden_RC: the rows.
        parameters: tensors that `row_losses` closes over and that may need a gradient.
        vocab_size: V, from which the rows of a chunk follow.

    Returns:
        A float32 scalar. Equal to `row_losses(hidden, slice(None)).sum()` up to rounding.
    """
    trainable = [p for p in parameters if p.requires_grad]
    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    return _ChunkedSum.apply(row_losses, rows, hidden_RC, *trainable)


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row_losses, rows, hidden_RC, *parameters):
        wanted = [hidden_RC] if ctx.needs_input_grad[2] else []
        needs_grad = bool(wanted or parameters)
        total = torch.zeros((), dtype=torch.float32, device=hidden_RC.device)
        hidden_grad = torch.zeros_like(hidden_RC) if wanted else None
        parameter_grads: list[Tensor] = []
        for start in range(0, hidden_RC.shape[0], rows):
            chunk = slice(start, min(start + rows, hidden_RC.shape[0]))
            with torch.set_grad_enabled(needs_grad):
                hidden = hidden_RC[chunk].detach().requires_grad_(bool(wanted))
                loss = row_losses(hidden, chunk).float().sum()
            total += loss.detach()
            if needs_grad:
                inputs = ([hidden] if wanted else []) + list(parameters)
                grads = list(torch.autograd.grad(loss, inputs))
                if wanted:
                    hidden_grad[chunk] = grads.pop(0)
                if parameter_grads:
                    torch._foreach_add_(parameter_grads, grads)
                else:
                    parameter_grads = grads
        ctx.grads = (hidden_grad, *(parameter_grads or [torch.zeros_like(p) for p in parameters]))
        return total

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, *parameter_grads = (g if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.grads)
        ctx.grads = None
        return None, None, hidden_grad, *parameter_grads


def project_errors(probs_BNV: Tensor, targets_BN: Tensor, matrix_VC: Tensor) -> Tensor:
    """Return the embedded errors Eᵀℓ for ℓ = onehot(y) − p̂, without keeping ℓ beside p̂.

    ℓ is formed in the precision of p̂ before it meets E: E[y] − Eᵀp̂ would cancel in bfloat16 where p̂_y is near 1.

    Args:
        probs_BNV: the Pilot's distribution p̂, float32; it gets no gradient.
        targets_BN: target token ids.
        matrix_VC: E, which gets a gradient if it is trained.

    Returns:
        Shape [B, N, C], in autocast's type where that is on, else in E's. Equal to `token_errors(…) @ E`.
    """
    return _ProjectErrors.apply(probs_BNV, targets_BN, matrix_VC)


class _ProjectErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, probs_BNV, targets_BN, matrix_VC):
        ctx.save_for_backward(probs_BNV, targets_BN, matrix_VC)
        pieces = [errors.to(matrix_VC.dtype) @ matrix_VC for errors, _ in _error_chunks(probs_BNV, targets_BN)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    @staticmethod
    def backward(ctx, grad_BNC):
        if not ctx.needs_input_grad[2]:
            return None, None, None
        probs_BNV, targets_BN, matrix_VC = ctx.saved_tensors
        matrix_grad = None
        for errors, rows in _error_chunks(probs_BNV, targets_BN):
            grad_RC = grad_BNC[rows].flatten(0, 1)
            piece = (errors.flatten(0, 1).to(grad_RC.dtype).mT @ grad_RC).to(matrix_VC.dtype)
            matrix_grad = piece if matrix_grad is None else matrix_grad.add_(piece)
        return None, None, matrix_grad


def _error_chunks(probs_BNV: Tensor, targets_BN: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """ℓ of a few sequences at a time, at least one, and which they are."""
    batch, length, vocab_size = probs_BNV.shape
    step = max(1, CHUNK_ELEMENTS // max(1, length * vocab_size))
    for first in range(0, max(batch, 1), step):
        rows = slice(first, first + step)
        yield token_errors(probs_BNV[rows], targets_BN[rows]), rows
