"""Log attention (Eq. 5–6): the Copilot's queries attend to the Mistake Log's record of their own example.

Keys and values come from Concat(null, X̃, h̄) along the sequence; a learned null row leaves no query without a key.
Masks and positions of the log are built here for training and decoding alike.

Shapes: B batch, M source length, N target length, C Copilot width, S = 1 + M + N log length (null row included),
H heads, D head width, K keys of the self-attention.
"""

import sys

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CONTEXTS = ("strict", "inclusive")


class LogAttention(nn.Module):
    """Stands in for a decoder-only layer's self-attention; queries from the Copilot, keys and values from the log.

    Wraps the family's own attention module, so weights, head layout, kernels and adapters stay the family's. The log's
    arguments reach it through the stock decoder, which hands unknown keyword arguments on to its attention.

    The projections were trained behind the layer's input norm, so a copy of it weights the rows of the log, which have
    been normalised before. It leaves a row's own scale as it is: that is how null row, X̃ and h̄ can be told apart.
    """

    NEEDED = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling")

    def __init__(self, attention: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.attention, self.norm = attention, norm

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None,
        *, log_BSC, log_mask, log_rotary, **kwargs,
    ):  # fmt: skip
        """Attend from `hidden_states` [B, N, C] to the log; new rows `log_BSC` join those in the cache."""
        stock = self.attention
        if self.norm is not None:
            log_BSC = self.norm(log_BSC) * (log_BSC.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        query_BHND = _heads(stock.q_proj(hidden_states), stock.head_dim, getattr(stock, "q_norm", None))
        key_BHSD = _heads(stock.k_proj(log_BSC), stock.head_dim, getattr(stock, "k_norm", None))
        value_BHSD = _heads(stock.v_proj(log_BSC), stock.head_dim)
        query_BHND, key_BHSD = _rotate(query_BHND, position_embeddings), _rotate(key_BHSD, log_rotary)
        if past_key_values is not None:
            key_BHSD, value_BHSD = past_key_values.update(key_BHSD, value_BHSD, stock.layer_idx)
        family = sys.modules[type(stock).__module__]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            stock.config._attn_implementation, family.eager_attention_forward
        )
        softcap = getattr(stock, "attn_logit_softcapping", None)
        output_BNHD, weights = attend(
            stock, query_BHND, key_BHSD, value_BHSD, log_mask,
            dropout=stock.attention_dropout if self.training else 0.0,
            scaling=stock.scaling,
            **({} if softcap is None else {"softcap": softcap}),
        )  # fmt: skip
        return stock.o_proj(output_BNHD.flatten(2)), weights


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
    """Turn True = visible into the additive form [B, 1, N, K], right for every attention kernel (bool is not)."""
    zeros_BNK = torch.zeros(mask_BNK.shape, dtype=dtype, device=mask_BNK.device)
    return zeros_BNK.masked_fill_(~mask_BNK, torch.finfo(dtype).min)[:, None]


def _heads(projected: Tensor, width: int, norm: nn.Module | None = None) -> Tensor:
    heads = projected.unflatten(-1, (-1, width))
    return (heads if norm is None else norm(heads)).transpose(1, 2)


def _rotate(heads_BHND: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos_B1ND, sin_B1ND = (part.unsqueeze(1) for part in rotary)
    first, second = heads_BHND.chunk(2, dim=-1)
    return heads_BHND * cos_B1ND + torch.cat([-second, first], dim=-1) * sin_B1ND
