"""Sum a loss over the vocabulary without keeping a second [B, N, V] tensor.

The Copilot's head is d_C × V and its loss compares V entries per token. Autograd would keep several [B, N, V] tensors
until the backward pass; here each chunk of rows is evaluated and differentiated at once, and only the gradients of the
head's input and parameters survive.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
        parameter_grads = [torch.zeros_like(p) for p in parameters]
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
                torch._foreach_add_(parameter_grads, grads) if grads else None
        ctx.grads = (hidden_grad, *parameter_grads)
        return total

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, *parameter_grads = (g if g is None else g * grad.to(g.dtype) for g in ctx.grads)
        ctx.grads = None
        return None, None, hidden_grad, *parameter_grads
