"""What the Copilot is trained to do: the paper's RMSE on ℓ (Eq. 7) and the losses of its ablation (Section F.4).

An objective of your own is one class and one YAML (docs/extending.md). Each gives a loss per target token, which is
summed in chunks (`chunked_loss.py`), and a reduction of sum and count over the whole batch, all ranks included.

Shapes: R target tokens, V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from tcopilot.functional import fuse_probabilities, root_mean_square, token_errors
from tcopilot.mistake_log.log import MistakeRecord
from tcopilot.models.base_copilot import BaseCopilot
from tcopilot.training.chunked_loss import chunked_sum


class Objective(Protocol):
    """What training asks of an objective."""

    def row_losses(self, corrections_RV: Tensor, probs_RV: Tensor, targets_R: Tensor) -> Tensor:
        """Loss of each target token, [R], float32."""

    def reduce(self, total: Tensor, tokens: Tensor | float) -> Tensor:
        """The loss from the sum over tokens and their number."""


class MeanSquaredError:
    """E‖f^C − ℓ‖², the square of the paper's loss."""

    def row_losses(self, corrections_RV: Tensor, probs_RV: Tensor, targets_R: Tensor) -> Tensor:
        """‖f^C − ℓ‖² of each token."""
        errors_RV = token_errors(probs_RV, targets_R)
        return nn.functional.mse_loss(corrections_RV, errors_RV, reduction="none").sum(-1)

    def reduce(self, total: Tensor, tokens: Tensor | float) -> Tensor:
        """Mean over tokens."""
        return total / tokens


class RootMeanSquaredError(MeanSquaredError):
    """sqrt(E‖f^C − ℓ‖²), Eq. 7, the default; the root stands outside the mean over the batch."""

    def reduce(self, total: Tensor, tokens: Tensor | float) -> Tensor:
        """Root of the mean over tokens."""
        return root_mean_square(total, tokens)


class KullbackLeibler(MeanSquaredError):
    """KL(softmax ℓ ‖ softmax f^C): both sides need a softmax, since ℓ sums to 0 (Section A.4)."""

    def row_losses(self, corrections_RV: Tensor, probs_RV: Tensor, targets_R: Tensor) -> Tensor:
        """KL divergence of each token, in nats."""
        log_target = torch.log_softmax(token_errors(probs_RV, targets_R), dim=-1)
        log_estimate = torch.log_softmax(corrections_RV, dim=-1)
        return (log_target.exp() * (log_target - log_estimate)).sum(-1)


class CrossEntropy(MeanSquaredError):
    """−log p̃_y of the distribution fused at λ = 1 (Eq. 8): it does not estimate ℓ."""

    def row_losses(self, corrections_RV: Tensor, probs_RV: Tensor, targets_R: Tensor) -> Tensor:
        """Negative log-likelihood of each target token, in nats."""
        fused_RV = fuse_probabilities(safe_log(probs_RV), corrections_RV, 1.0)
        return -fused_RV.gather(-1, targets_R.unsqueeze(-1)).squeeze(-1)


def objective_sum(objective: Objective, copilot: BaseCopilot, record: MistakeRecord, hidden_BNC: Tensor) -> Tensor:
    """Return the objective's sum over the target tokens of a record, without a second [B, N, V] tensor.

    A float32 scalar with gradients for the Copilot, whose hidden states for the record are given.
    """
    tokens_R = record.tokens_R
    hidden_RC, probs_RV, targets_R = (
        whole.flatten(0, 1) for whole in (hidden_BNC, record.probs_BNV, record.targets_BN)
    )
    padded = len(tokens_R) < len(targets_R)
    importance_R = record.importance_B.repeat_interleave(record.targets_BN.shape[1])

    def row_losses(hidden_rC: Tensor, chunk: slice) -> Tensor:
        here = tokens_R[chunk] if padded else chunk  # without padding no row of p̂ is copied
        probs_rV = probs_RV[here]
        corrections_rV = copilot.correct(hidden_rC, safe_log(probs_rV) if copilot.head.reads_pilot else None)
        return losses_of_rows(objective, corrections_rV, probs_rV, targets_R[here]) * importance_R[here]

    hidden_RC = hidden_RC[tokens_R] if padded else hidden_RC
    return chunked_sum(row_losses, hidden_RC, list(copilot.head.parameters()), probs_RV.shape[-1])


def losses_of_rows(objective: Objective, corrections_RV: Tensor, probs_RV: Tensor, targets_R: Tensor) -> Tensor:
    """An objective's loss of each token.

    Raises:
        ValueError: If its class, which may be the user's own, does not return one loss for each.
    """
    losses_R = objective.row_losses(corrections_RV, probs_RV, targets_R)
    if losses_R.shape != targets_R.shape:
        raise ValueError(
            f"{type(objective).__name__}.row_losses returned the shape {list(losses_R.shape)} for "
            f"{len(targets_R)} tokens; return one loss for each, [{len(targets_R)}]"
        )
    return losses_R


def safe_log(probs: Tensor) -> Tensor:
    """Log p of probabilities that may have been rounded to 0."""
    return probs.clamp_min(torch.finfo(torch.float32).tiny).log()
