"""The Copilot's output heads: from its hidden states to corrections f^C [R, V], float32. Both start as a no-op.

`reads_pilot` says whether a head needs log p̂, so that training forms it only where it is read.

Shapes: R rows (any leading shape), C Copilot width, V vocabulary.
"""

import torch
from torch import Tensor, nn


class LinearHead(nn.Module):
    """f^C = W z, the paper's head: one linear map d_C → V without softmax (Section 3.1), started at zero."""

    reads_pilot = False

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
    """

    reads_pilot = True

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.map.weight)

    def forward(self, hidden_RC: Tensor, log_probs_RV: Tensor, unembedding_VC: Tensor | None = None) -> Tensor:
        """Return f^C for the Pilot's log p̂."""
        shift_RV = nn.functional.linear(self.map(hidden_RC), unembedding_VC).float()
        return torch.softmax(log_probs_RV + shift_RV, dim=-1) - log_probs_RV.exp()


HEADS = {"linear": LinearHead, "soft": SoftHead}
