"""The Copilot's output heads: from its hidden states to corrections f^C [R, V], float32. All start as a no-op.

`reads_pilot` says whether a head needs log p̂, so that training forms it for such heads only; `is_difference` whether
f^C is a difference of two distributions, so that p̂ + λ f^C is one for λ ≤ 1.

Shapes: R rows (any leading shape), C Copilot width, V vocabulary.
"""

import torch
from torch import Tensor, nn


class LinearHead(nn.Module):
    """f^C = W z, the paper's head: one linear map d_C → V without softmax (Section 3.1), started at zero."""

    reads_pilot = False
    is_difference = False

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab_size, width))

    def forward(self, hidden_RC: Tensor, log_probs_RV: Tensor | None, unembedding_VC: Tensor | None = None) -> Tensor:
        """Return f^C; the Pilot's distribution plays no part and need not be given."""
        return nn.functional.linear(hidden_RC, self.weight).float()


class SoftHead(nn.Module):
    """f^C = softmax(log p̂ + E M z) − p̂: a difference of two distributions, beyond the paper.

    It sums to 0 as ℓ does, p̃ = (1 − λ) p̂ + λ softmax(…) stays on the simplex for λ ≤ 1, and no V × d matrix is
    trained: E is the family's frozen unembedding, M a small map started at zero.

    Args:
        width: C, of z.
        vocab_size: V.
        output_width: width of E; by default the width of z.
    """

    reads_pilot = True
    is_difference = True
    reads_unembedding = True

    def __init__(self, width: int, vocab_size: int, output_width: int | None = None) -> None:
        super().__init__()
        self.map = nn.Linear(width, output_width or width, bias=False)
        nn.init.zeros_(self.map.weight)

    def forward(self, hidden_RC: Tensor, log_probs_RV: Tensor, unembedding_VC: Tensor | None = None) -> Tensor:
        """Return f^C for the Pilot's log p̂."""
        shifted_RV = log_probs_RV + self.shift(hidden_RC, unembedding_VC)
        return torch.softmax(shifted_RV, dim=-1) - log_probs_RV.exp()

    def shift(
        self, hidden_RC: Tensor, unembedding_VC: Tensor | None, tokens_U: Tensor | slice = slice(None)
    ) -> Tensor:
        """What is added to log p̂ before the softmax, [R, V]; with `tokens_U` for these tokens only, [R, U]."""
        return nn.functional.linear(self.map(hidden_RC).to(unembedding_VC.dtype), unembedding_VC[tokens_U]).float()


class FullHead(SoftHead):
    """The soft head with a trained V × C matrix of its own in place of E M; for small vocabularies."""

    reads_unembedding = False

    def __init__(self, width: int, vocab_size: int, output_width: int | None = None) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(vocab_size, width))

    def shift(
        self, hidden_RC: Tensor, unembedding_VC: Tensor | None, tokens_U: Tensor | slice = slice(None)
    ) -> Tensor:
        """Return what is added to log p̂, computed with its own matrix."""
        return nn.functional.linear(hidden_RC, self.weight[tokens_U]).float()


class LowRankHead(FullHead):
    """The full head with a matrix of rank 32: the product of V × 32, started at zero, and 32 × C."""

    RANK = 32

    def __init__(self, width: int, vocab_size: int, output_width: int | None = None) -> None:
        super().__init__(self.RANK, vocab_size)
        self.narrow = nn.Linear(width, self.RANK, bias=False)

    def shift(
        self, hidden_RC: Tensor, unembedding_VC: Tensor | None, tokens_U: Tensor | slice = slice(None)
    ) -> Tensor:
        """Return what is added to log p̂, computed with both matrices."""
        return super().shift(self.narrow(hidden_RC), None, tokens_U)


HEADS = {"linear": LinearHead, "soft": SoftHead}
"""Heads of the paper's Copilot."""
SOFT_HEADS = {"soft": SoftHead, "full": FullHead, "low_rank": LowRankHead}
"""Heads of a head-only Copilot."""
