"""A calibrated Pilot as a Copilot that reads nothing but log p̂: f^C = softmax(log p̂ / T + b) − p̂.

Beyond the paper. It has one temperature T and a bias for each token that answers use, and is fitted by the likelihood
of validation rows, in seconds, after training. On a Pilot that has converged this is all that is left to gain.

Shapes: B batch, N target length, V vocabulary, R target tokens, A tokens that have a bias, H bins of a histogram.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from tcopilot.models.base_copilot import BaseConfig, LayerlessCopilot
from tcopilot.models.states import StackedStates

BIN, BINS = 0.125, 480
"""Width in nats, and number, of the bins of log p̂ (from 0 down) that count the tokens without a bias."""
TINY = torch.finfo(torch.float32).tiny
ROWS_AT_ONCE, AT_ONCE = 64, 10_000_000
"""Rows whose bins are counted together, and numbers that a step of the fit reads together (80 MB)."""


class CalibrationConfig(BaseConfig):
    """Defines a calibration, which has no settings of its own."""

    kind = "calibration"
    context = "inclusive"


class CalibrationHead(nn.Module):
    """f^C = softmax(log p̂ / T + b) − p̂; a no-op at T = 1 and b = 0, where it starts."""

    reads_pilot = True
    reads_unembedding = False
    is_difference = True

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden_RC: Tensor, log_probs_RV: Tensor, unembedding_VC: Tensor | None = None) -> Tensor:
        """Return f^C for the Pilot's log p̂."""
        calibrated_RV = log_probs_RV * torch.exp(-self.log_temperature) + self.bias
        return torch.softmax(calibrated_RV, dim=-1) - log_probs_RV.exp()


@dataclass
class Observed:
    """What a calibration is fitted on: log p̂ of the tokens that have a bias, and how the others are distributed.

    The other tokens matter only through the sum of their p̂^(1/T). Counts in bins of log p̂ suffice for it, so that p̂
    need not be kept; the sum is exact at T = 1.

    Attributes:
        tokens_A: the tokens that have a bias, in order.
        log_probs_RA: log p̂ of these tokens.
        log_count_RH: logarithm of the number of other tokens in each bin.
        log_mean_RH: logarithm of the mean p̂ of these tokens.
        target_R: log p̂ of the target.
        place_R: index of the target in `tokens_A`; −1 if it is not among them.
    """

    tokens_A: Tensor
    log_probs_RA: Tensor
    log_count_RH: Tensor
    log_mean_RH: Tensor
    target_R: Tensor
    place_R: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, log_probs_BNV: Tensor, targets_BN: Tensor, mask_BN: Tensor, tokens_A: Tensor) -> Self:
        """Observe a batch of targets, teacher-forced; padding is left out."""
        targets_R, device = targets_BN[mask_BN], log_probs_BNV.device
        places_V = torch.full((log_probs_BNV.shape[-1],), -1, device=device)
        places_V[tokens_A.to(device)] = torch.arange(len(tokens_A), device=device)
        log_probs_RV, parts = log_probs_BNV[mask_BN], []
        for some_RV in log_probs_RV.split(ROWS_AT_ONCE):
            others_RV = some_RV[:, places_V < 0]
            bins_RV = (others_RV / -BIN).clamp(0, BINS - 1).long()
            empty_RH = some_RV.new_zeros(len(some_RV), BINS)
            count_RH = empty_RH.scatter_add(1, bins_RV, torch.ones_like(others_RV))
            mass_RH = empty_RH.scatter_add(1, bins_RV, others_RV.exp())
            log_mean_RH = (mass_RH / count_RH.clamp_min(1)).clamp_min(TINY).log()
            parts.append((some_RV[:, places_V >= 0].cpu(), count_RH.log().cpu(), log_mean_RH.cpu()))
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        target_R = log_probs_RV.gather(-1, targets_R[:, None])[:, 0].cpu()
        return cls(tokens_A.cpu(), *columns, target_R, places_V[targets_R].cpu())

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """Join the observations of many batches."""
        parts = list(parts)
        columns = zip(*(tuple(vars(one).values())[1:] for one in parts), strict=True)
        return cls(parts[0].tokens_A, *(torch.cat(column) for column in columns))

    def parts(self) -> list[Self]:
        """Split into views of a few rows each, so that the likelihood of a part fits into memory."""
        rows = max(1, AT_ONCE // (self.log_probs_RA.shape[1] + BINS))
        columns = (column.split(rows) for column in tuple(vars(self).values())[1:])
        return [type(self)(self.tokens_A, *part) for part in zip(*columns, strict=True)]

    def nll(self, inverse_temperature: Tensor, bias_A: Tensor) -> Tensor:
        """−log of the calibrated probability of each target, [R]."""
        with_bias_RA = inverse_temperature * self.log_probs_RA.double() + bias_A
        others_RH = inverse_temperature * self.log_mean_RH.double() + self.log_count_RH
        total_R = torch.cat([with_bias_RA, others_RH], dim=1).logsumexp(1)
        bias_R = torch.where(self.place_R >= 0, bias_A[self.place_R], 0.0)
        return total_R - inverse_temperature * self.target_R.double() - bias_R


class Calibration(LayerlessCopilot):
    """A Copilot that is not trained, but fitted to what is `Observed` of validation rows."""

    config_class = CalibrationConfig
    learns = False
    unembedding_VC = None

    def __init__(self, config: CalibrationConfig) -> None:
        super().__init__(config)
        self.pooler = StackedStates((1.0,))  # required by the interface, but not read
        self.head = CalibrationHead(config.vocab_size).requires_grad_(False)

    @property
    def temperature(self) -> float:
        """T; a value above 1 means that the Pilot was overconfident."""
        return self.head.log_temperature.exp().item()

    def _read(self, states_BNP: Tensor) -> Tensor:
        return states_BNP[..., :0]

    def fit(self, seen: Observed) -> None:
        """Maximise the likelihood of the targets seen by L-BFGS, with a prior N(0, 1) on each bias and on log T.

        The prior is worth about one target token, which keeps the bias of a rare token finite.
        """
        log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
        bias_A = torch.zeros(len(seen.tokens_A), dtype=torch.float64, requires_grad=True)
        parts, rows = seen.parts(), len(seen.target_R)
        search = torch.optim.LBFGS([log_temperature, bias_A], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            total = (bias_A.square().sum() + log_temperature.square()) / 2 / rows  # the prior
            total.backward()
            for part in parts:
                mean = part.nll(torch.exp(-log_temperature), bias_A).sum() / rows
                mean.backward()
                total = total.detach() + mean.detach()
            return total

        with torch.enable_grad():
            search.step(loss)
        with torch.no_grad():
            self.head.log_temperature.copy_(log_temperature)
            self.head.bias.zero_()[seen.tokens_A] = bias_A.detach().to(self.head.bias)
