"""Log attention (Eq. 5–6): the Copilot's queries attend to the Mistake Log's record of their own example.

Keys and values come from Concat(null, X̃, h̄) along the sequence; a learned null row leaves no query without a key.
Masks and positions of the log are built here for training and decoding alike.

Shapes: B batch, M source length, N target length, C Copilot width, S = 1 + M + N log length (null row included),
H heads, D head width, K keys of the self-attention.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

CONTEXTS = ("strict", "inclusive")


class LogAttention(nn.Module):
    """Stands in for a decoder-only layer's self-attention; queries from the Copilot, keys and values from the log.

    Wraps the family's own attention and runs its own forward pass, so that projections, norms, rotation, sinks,
    kernels and adapters are the family's, whatever they are. That pass hands its keys and values to a cache and
    attends to those that the cache returns. It runs twice: on the log until it has handed over keys and values, then
    on the Copilot's states with a cache that returns the log's. The log's arguments reach it through the stock
    decoder, which hands unknown keyword arguments on to its attention.

    The projections were trained on the output of the layer's input norm, so a copy of this norm is applied to the rows
    of the log too. Each row gets its own scale back, by which null row, X̃ and h̄ can be told apart.
    """

    def __init__(self, attention: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.attention, self.norm = attention, norm

    def forward(
        self, hidden_states: Tensor, *, log_BSC: Tensor | None = None, log_mask: Tensor | None = None,
        log_places: dict[str, Any] | None = None, **kwargs: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Attend from `hidden_states` [B, N, C] to the log; new rows `log_BSC` join those in the cache.

        `log_places` are the positions of these rows, as the arguments that the stock decoder gives its layers.
        """
        if log_BSC is None or log_places is None:
            raise ValueError("the decoder does not pass unknown arguments on to its attention")
        stock, cache = self.attention, "layer_past" if "layer_past" in kwargs else "past_key_values"
        if self.norm is not None:
            log_BSC = self.norm(log_BSC) * (log_BSC.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        places = {name: log_places[name] for name in log_places.keys() & kwargs.keys()}
        if isinstance(places.get("position_embeddings"), dict):
            places["position_embeddings"] = places["position_embeddings"][stock.config.layer_types[stock.layer_idx]]
        given, new = kwargs | {"attention_mask": log_mask}, _Caught()
        with suppress(_Handed):  # not `__call__`: hooks must see whole passes only
            stock.forward(log_BSC, **given | places | {cache: new})
        if new.rows is None:
            raise ValueError(f"{type(stock).__name__} does not hand its keys and values to a cache")
        key_BHSD, value_BHSD = new.rows
        if (past := kwargs.get(cache)) is not None:
            key_BHSD, value_BHSD = past.update(key_BHSD, value_BHSD, stock.layer_idx)
        return stock(hidden_states, **given | {cache: _Held(key_BHSD, value_BHSD)})


class _Handed(Exception):
    """Keys and values were handed over."""


class _Caught:
    """A cache that catches the keys and values handed to it and ends the pass there."""

    rows: tuple[Tensor, Tensor] | None = None

    def update(self, key_BHSD: Tensor, value_BHSD: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.rows = key_BHSD, value_BHSD
        raise _Handed


class _Held:
    """A cache that ignores the keys and values of the pass and returns those of the log."""

    def __init__(self, *rows: Tensor) -> None:
        self.rows = rows

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return self.rows


def log_positions(source_mask_BM: Tensor, targets: int) -> tuple[Tensor, Tensor]:
    """Return the Pilot's own positions of null row, X̃ and h [B, 1 + M + N], and those of the N targets [B, N].

    A prompt token stands at its index among the real tokens; h_i and the query of target i stand where the Pilot
    predicted target i, at the prompt's length − 1 + i.

    >>> log_positions(torch.tensor([[False, True, True]]), 2)
    (tensor([[0, 0, 0, 1, 1, 2]]), tensor([[1, 2]]))
    """
    source_BM = (source_mask_BM.long().cumsum(-1) - 1).clamp_min(0)
    first_B1 = (source_mask_BM.long().sum(-1, keepdim=True) - 1).clamp_min(0)
    targets_BN = first_B1 + torch.arange(targets, device=source_mask_BM.device)
    return torch.cat([torch.zeros_like(first_B1), source_BM, targets_BN], dim=1), targets_BN


def log_mask(source_mask_BM: Tensor, targets: int, context: str) -> Tensor:
    """Return which rows of the log each of N targets may read (Eq. 5), a boolean mask [B, N, 1 + M + N].

    In `strict` context (the paper's) i reads h_{<i}, in `inclusive` h_{≤i}.

    >>> log_mask(torch.tensor([[True]]), 2, "strict").int().tolist()
    [[[1, 1, 0, 0], [1, 1, 1, 0]]]
    """
    batch, device = source_mask_BM.shape[0], source_mask_BM.device
    past_NN = torch.ones(targets, targets, dtype=torch.bool, device=device).tril(-1 if context == "strict" else 0)
    open_BNM = source_mask_BM.bool().unsqueeze(1).expand(-1, targets, -1)
    null_BN1 = torch.ones(batch, targets, 1, dtype=torch.bool, device=device)
    return torch.cat([null_BN1, open_BNM, past_NN.expand(batch, -1, -1)], dim=-1)


def causal_mask(targets: int, device: torch.device) -> Tensor:
    """Boolean mask [1, N, N] of the self-attention over the error sequence."""
    return torch.ones(1, targets, targets, dtype=torch.bool, device=device).tril()


def additive(mask_BNK: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn True = visible into the additive form [B, 1, N, K], which all attention kernels read alike, unlike bool."""
    zeros_BNK = torch.zeros(mask_BNK.shape, dtype=dtype, device=mask_BNK.device)
    return zeros_BNK.masked_fill_(~mask_BNK, torch.finfo(dtype).min)[:, None]
