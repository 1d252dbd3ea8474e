"""The Copilot's input: token errors ℓ, formed from p̂ a few sequences at a time, where they are embedded."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tcopilot.functional import token_errors

CHUNK_ELEMENTS = 2**24  # rows × V of one chunk: 64 MB in float32


def project_errors(probs_BNV: Tensor, targets_BN: Tensor, matrix_VC: Tensor) -> Tensor:
    """Return the embedded errors Eᵀℓ [B, N, C] for ℓ = onehot(y) − p̂, without keeping ℓ beside p̂.

    ℓ is formed in the precision of p̂ before it meets E: E[y] − Eᵀp̂ would cancel in bfloat16 where p̂_y is near 1.
    The result has autocast's type where that is on, else E's. E gets a gradient if it is trained, p̂ gets none.
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
        probs_BNV, targets_BN, matrix_VC = ctx.saved_tensors
        matrix_grad = None
        for errors, rows in _error_chunks(probs_BNV, targets_BN) if ctx.needs_input_grad[2] else ():
            grad_RC = grad_BNC[rows].flatten(0, 1)
            piece = (errors.flatten(0, 1).to(grad_RC.dtype).mT @ grad_RC).to(matrix_VC.dtype)
            matrix_grad = piece if matrix_grad is None else matrix_grad.add_(piece)
        return None, None, matrix_grad


def _error_chunks(probs_BNV: Tensor, targets_BN: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Yield ℓ of a few sequences at a time, at least one, with the slice of their rows."""
    batch, length, vocab_size = probs_BNV.shape
    step = max(1, CHUNK_ELEMENTS // max(1, length * vocab_size))
    for first in range(0, max(batch, 1), step):
        rows = slice(first, first + step)
        yield token_errors(probs_BNV[rows], targets_BN[rows]), rows
