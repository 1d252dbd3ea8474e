"""A loss that compares few tokens of the vocabulary, for a Copilot that is only a head.

Most of the cost of a loss over the vocabulary goes to tokens that are neither targets nor likely under p̂. Here only
the targets and likeliest tokens of a batch and some random tokens are compared. All others form one more entry, the
tail, which has their exact mass under p̂ and is shifted as the random tokens are on average.

Shapes: T target tokens, P Pilot width, k likeliest tokens, C Copilot width, U tokens compared, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tcopilot.mistake_log.log import KeptRecord
from tcopilot.mistake_log.storage import LikelyTokensStorage
from tcopilot.models.families import logits_from_head_input
from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.training.chunked_loss import chunked_sum, rows_at_once
from tcopilot.training.objectives import CrossEntropy, Objective, losses_of_rows

RANDOM_TOKENS = 256
SMALL_VOCABULARY = 4096  # is compared as a whole


class KeptTokens(NamedTuple):
    """What records keep of p̂ at their target tokens, one after another.

    Attributes:
        head_input_TP: what the Pilot's head read.
        targets_T: ids of the target tokens.
        normaliser_T: log Σ exp of the Pilot's logits, float32.
        likeliest_Tk: ids of the likeliest tokens under p̂.
    """

    head_input_TP: Tensor
    targets_T: Tensor
    normaliser_T: Tensor
    likeliest_Tk: Tensor


class ComparedTokens:
    """The tokens to compare in a batch, p̂ and f^C over them and the tail, and what follows from these.

    Args:
        copilot: a head-only Copilot.
        pilot: the Pilot, whose frozen head rebuilds p̂.
        kept: what the records of the batch keep.
        autocast: whether the records were made under the autocast that may be on now, as those of joint training are.
    """

    def __init__(self, copilot: HeadCopilot, pilot: PreTrainedModel, kept: KeptTokens, autocast: bool = False) -> None:
        self.copilot, self.pilot, self.kept, self._autocast = copilot, pilot, kept, autocast
        self.vocab_size, device = pilot.get_output_embeddings().weight.shape[0], kept.targets_T.device
        if self.vocab_size <= SMALL_VOCABULARY:
            self.tokens_U = torch.arange(self.vocab_size, device=device)
            self._is_random_U = torch.ones(self.vocab_size, dtype=torch.bool, device=device)
            return
        meant = torch.cat([kept.targets_T, kept.likeliest_Tk.flatten()])
        drawn = torch.randint(self.vocab_size, (RANDOM_TOKENS,), device=device)
        self.tokens_U = torch.cat([meant, drawn]).unique()
        is_random_U = ~torch.isin(self.tokens_U, meant)
        self._is_random_U = is_random_U | ~is_random_U.any()

    def compare(self, hidden_tC: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Compare some of the target tokens.

        Args:
            hidden_tC: the Copilot's hidden states of these target tokens.
            rows: which of all target tokens they are.

        Returns:
            f^C and p̂ over the tokens compared and the tail, both [t, U + 1] in float32 (without a tail [t, V]), and
            the places of the targets there, [t].
        """
        head_input_tP = self.kept.head_input_TP[rows].to(self.pilot.get_output_embeddings().weight.dtype)
        kind = hidden_tC.device.type
        with torch.autocast(kind, enabled=self._autocast and torch.is_autocast_enabled(kind)):  # p̂ as it was recorded
            logits_tU = logits_from_head_input(self.pilot, head_input_tP, self.tokens_U).float()
        log_probs_tU = logits_tU - self.kept.normaliser_T[rows, None]
        shift_tU = self.copilot.shift(hidden_tC, self.tokens_U)
        if len(self.tokens_U) < self.vocab_size:
            tail_t1 = (1 - log_probs_tU.exp().sum(-1, keepdim=True)).clamp_min(1e-12).log()
            random_tU, moved_tU = log_probs_tU[:, self._is_random_U], shift_tU[:, self._is_random_U]
            mean_t1 = (random_tU + moved_tU).logsumexp(-1, keepdim=True) - random_tU.logsumexp(-1, keepdim=True)
            log_probs_tU, shift_tU = torch.cat([log_probs_tU, tail_t1], -1), torch.cat([shift_tU, mean_t1], -1)
        probs_tU = log_probs_tU.exp()
        corrections_tU = torch.softmax(log_probs_tU + shift_tU, dim=-1) - probs_tU
        return corrections_tU, probs_tU, torch.searchsorted(self.tokens_U, self.kept.targets_T[rows])

    def right(self, hidden_TC: Tensor) -> Tensor:
        """Probability of each target token under p̂ and under p̃ at λ = 1, which a soft head makes sum to 1; [2, T]."""
        found = []
        for corrections_tU, probs_tU, targets_t in self._in_chunks(hidden_TC):
            both_2tU = torch.stack([probs_tU, probs_tU + corrections_tU])
            found.append(both_2tU[:, torch.arange(len(targets_t)), targets_t])
        return torch.cat(found, dim=1)

    def fused(self, hidden_TC: Tensor) -> Tensor:
        """Log p̃ of each target token at λ = 1 as Eq. 8 fuses it, which keeps p̃ above a floor; [T]."""
        return torch.cat([-CrossEntropy().row_losses(*compared) for compared in self._in_chunks(hidden_TC)])

    def _in_chunks(self, hidden_TC: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Compare all target tokens, as many at once as fit."""
        rows = rows_at_once(len(self.tokens_U))
        for first in range(0, len(hidden_TC), rows):
            chunk = slice(first, first + rows)
            yield self.compare(hidden_TC[chunk], chunk)

    def objective_sum(self, objective: Objective, hidden_TC: Tensor, importance_T: Tensor) -> Tensor:
        """Return the objective's sum over the target tokens, each multiplied by its importance; float32."""

        def row_losses(hidden_tC: Tensor, chunk: slice) -> Tensor:
            return losses_of_rows(objective, *self.compare(hidden_tC, chunk)) * importance_T[chunk]

        return chunked_sum(row_losses, hidden_TC, list(self.copilot.head.parameters()), len(self.tokens_U))


def compared_sum(objective: Objective, copilot: HeadCopilot, pilot: PreTrainedModel, record: KeptRecord) -> Tensor:
    """Return the objective's sum over the target tokens of records of `LikelyTokensStorage`; a float32 scalar.

    Its gradients reach the Copilot alone, since the log is detached and the Pilot's head frozen.
    """
    inputs_BN0 = record.states_BNP.new_empty(*record.targets_BN.shape, 0)
    hidden_BNC, _ = copilot(inputs_BN0, None, None, record.states_BNP)
    head_input_BNP, normaliser_BN, likeliest_BNk = (record.kept[name] for name in LikelyTokensStorage.names)
    kept = head_input_BNP, record.targets_BN, normaliser_BN, likeliest_BNk
    importance_BN = record.importance_B[:, None].expand_as(record.targets_BN)
    hidden_TC, importance_T, *kept = (
        tensor.flatten(0, 1)[record.tokens_R] for tensor in (hidden_BNC, importance_BN, *kept)
    )
    return ComparedTokens(copilot, pilot, KeptTokens(*kept), autocast=True).objective_sum(
        objective, hidden_TC, importance_T
    )
