"""The paper's equations as pure functions of tensors: one function per equation, no model, no state.

Shapes: B batch, N target length, P Pilot width, C Copilot width, V vocabulary. Equation numbers are those of
arXiv 2505.16270. Everything here works in the precision that it is given; callers hand in float32 probabilities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

LAYER_RANGES = ("all", "first_half", "second_half")
POOLINGS = ("mean", "max", "sum")
ROUNDING_ENERGY = 1e-10  # ‖f^C‖² below this is rounding of float32 probabilities


def token_errors(probs_BNV: Tensor, targets_BN: Tensor) -> Tensor:
    """Return the token-level error ℓ = onehot(y) − p̂ (Eq. 4).

    Every row sums to 0 and lies in [−1, 1]. Rows of padding get an error too: mask them where they are used.

    >>> token_errors(torch.tensor([[[0.25, 0.75]]]), torch.tensor([[1]]))
    tensor([[[-0.2500,  0.2500]]])
    """
    ones = torch.ones_like(targets_BN, dtype=probs_BNV.dtype).unsqueeze(-1)
    return probs_BNV.neg().scatter_add_(-1, targets_BN.unsqueeze(-1), ones)


def shift_right(past_BKC: Tensor, start_C: Tensor) -> Tensor:
    """Put the start vector before the embedded errors of the past, so that position i reads ℓ_{<i} (Algorithm 1).

    Args:
        past_BKC: embedded errors of positions 0 … K−1; the result has one position more.
        start_C: what position 0 reads, having no past.

    >>> shift_right(torch.tensor([[[1.0], [2.0]]]), torch.tensor([0.0])).flatten().tolist()
    [0.0, 1.0, 2.0]
    """
    start_B1C = start_C.to(past_BKC.dtype).expand(past_BKC.shape[0], 1, -1)
    return torch.cat([start_B1C, past_BKC], dim=1)


def pool_states(layers: Sequence[Tensor], pooling: str = "mean", layer_range: str = "all") -> Tensor:
    """Pool the Pilot's decoder states over its layers: h̄_i = pool_l h_{i,l} (Section 3.1).

    Args:
        layers: outputs of layers 1 … L, each [B, N, P]; the embedding layer is not among them.
        pooling: `mean` (the paper's), `max` or `sum`.
        layer_range: `all`, `first_half` (insertion pattern 3) or `second_half` (pattern 4).

    Returns:
        Pooled states, shape [B, N, P].

    >>> pool_states([torch.full((1, 1, 1), x) for x in (1.0, 2.0, 6.0)]).item()
    3.0
    >>> pool_states([torch.full((1, 1, 1), x) for x in (1.0, 2.0, 6.0)], "max", "second_half").item()
    6.0
    """
    half = len(layers) // 2
    chosen = {"all": layers, "first_half": layers[: max(half, 1)], "second_half": layers[half:]}[layer_range]
    kept = chosen[0].dtype
    pooled = chosen[0].float() if kept == torch.float16 else chosen[0]  # whose range a sum of layers may leave
    for layer in chosen[1:]:
        pooled = torch.maximum(pooled, layer) if pooling == "max" else pooled + layer
    return (pooled / len(chosen) if pooling == "mean" else pooled).to(kept)


def root_mean_square(sum_of_squares: Tensor, tokens: Tensor | float, eps: float = 1e-8) -> Tensor:
    """Return L^C = sqrt(Σ_i ‖f^C_i − ℓ_i‖² / n), the Copilot's loss (Eq. 7).

    The root stands outside the mean over the whole batch: a root per example or per token weakens training
    measurably. ε keeps the gradient finite at a perfect match.

    >>> round(root_mean_square(torch.tensor(8.0), 2.0).item(), 4)
    2.0
    """
    return torch.sqrt(sum_of_squares / tokens + eps)


def fuse_probabilities(
    log_probs_BNV: Tensor, corrections_BNV: Tensor, weight: float | Tensor, floor: float = 0.05
) -> Tensor:
    """Return log p̃ with p̃ = p̂ + λ f^C put back onto the simplex (Eq. 8).

    p̂ + λ f^C may leave the simplex. Entries below `floor · p̂` are raised to it and the row is renormalised: a token
    that the Pilot holds possible stays possible, so the likelihood of any text stays finite.

    Args:
        log_probs_BNV: log p̂, float32.
        corrections_BNV: f^C.
        weight: λ ≥ 0, one or [B, 1, 1]. At 0 the result is log p̂.
        floor: smallest share of p̂ that a correction may leave.

    Returns:
        log p̃, shape [B, N, V], float32.

    >>> log_p = torch.tensor([[[0.6, 0.4]]]).log()
    >>> fuse_probabilities(log_p, torch.tensor([[[-0.5, 0.5]]]), 1.0).exp()
    tensor([[[0.1000, 0.9000]]])
    """
    probs_BNV = log_probs_BNV.float().exp()
    fused_BNV = torch.maximum(probs_BNV + weight * corrections_BNV.float(), floor * probs_BNV)
    fused_BNV = fused_BNV.clamp_min(torch.finfo(torch.float32).tiny)
    return fused_BNV.log() - fused_BNV.sum(-1, keepdim=True).log()


def fuse_logits(log_probs_BNV: Tensor, corrections_BNV: Tensor, weight: float | Tensor) -> Tensor:
    """Return log softmax(f^P + λ f^C), the fusion that the paper's figures speak of.

    Its λ lives on another scale than Eq. 8's, since corrections lie in about [−1, 1] and logits in about [−10, 10].

    >>> log_p = torch.tensor([[[0.5, 0.5]]]).log()
    >>> fuse_logits(log_p, torch.tensor([[[1.0, 0.0]]]), 1.0).exp()
    tensor([[[0.7311, 0.2689]]])
    """
    return torch.log_softmax(log_probs_BNV.float() + weight * corrections_BNV.float(), dim=-1)


def best_weight(inner: float, correction_energy: float) -> float:
    """Return λ* = E⟨ℓ, f^C⟩ / E‖f^C‖², the minimum of E‖p − p̂ − λ f^C‖² (Theorem 4.1 over a data set).

    Every λ in (0, 2λ*) lowers the expected squared error. A Copilot that outputs 0, or points away from the error,
    gives 0: keep the Pilot. So does one whose outputs are only rounding errors, as those of a new soft head are.

    Args:
        inner: E⟨ℓ, f^C⟩, the mean over target tokens.
        correction_energy: E‖f^C‖², likewise.

    >>> best_weight(0.3, 0.6), best_weight(0.3, 0.0), best_weight(-1.0, 2.0), best_weight(1e-9, 1e-14)
    (0.5, 0.0, 0.0, 0.0)
    """
    return max(inner / correction_energy, 0.0) if correction_energy > ROUNDING_ENERGY else 0.0
