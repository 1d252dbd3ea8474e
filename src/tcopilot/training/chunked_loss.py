"""A loss over the vocabulary that keeps no second [B, N, V] tensor beside p̂.

The Copilot's head is d_C × V and its loss compares V entries per token; autograd would keep several such tensors until
the backward pass. Here each chunk of rows is evaluated and differentiated at once, so that only the gradients of the
head's input and parameters survive.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tcopilot.models.error_input import CHUNK_ELEMENTS


def chunked_sum(
    row_losses: Callable[[Tensor, slice], Tensor], hidden_RC: Tensor, parameters: Sequence[Tensor], vocab_size: int
) -> Tensor:
    """Return Σ_r row_losses(hidden)[r] in float32, with gradients computed in the forward pass, chunk by chunk.

    Args:
        row_losses: maps a chunk of rows [r, C] and its slice of R to losses [r]. It must be a function of
            its rows and of `parameters` only.
        hidden_RC: the rows.
        parameters: tensors that `row_losses` closes over and that may need a gradient.
        vocab_size: V, from which the rows of a chunk follow.
    """
    trainable = [p for p in parameters if p.requires_grad]
    return _ChunkedSum.apply(row_losses, rows_at_once(vocab_size), hidden_RC, *trainable)


def rows_at_once(vocab_size: int) -> int:
    """Rows of a chunk."""
    return max(1, CHUNK_ELEMENTS // vocab_size)


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
