"""Full ranking: for each user every item of a catalogue is scored by the probability of its text, without sampling.

An item's score is Σ log p̃ over its tokens and the end token. It is neither normalised by length nor renormalised over
the tokens that the catalogue allows. Items that a user already has are excluded.

Shapes: B users, M prompt length, R rows of a step (pairs of a user and a trie node), W values of λ, I items, T nodes
of the trie, V vocabulary, K kept items.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from tcopilot.data.batch import Batch
from tcopilot.evaluation.item_trie import ItemTrie
from tcopilot.models.caches import CopilotState, TCopilotCache
from tcopilot.models.fused_model import TCopilotModel

IMPOSSIBLE = -5e8  # transformers' beam search scores empty beams −1e9; sums of log-probabilities are far larger


class Ranking(NamedTuple):
    """The best items of each user, best first.

    Attributes:
        items_BK: indices in the catalogue, int64; −1 where no item was found.
        scores_BK: Σ log p̃ in nats, float32; −inf where no item was found.
    """

    items_BK: np.ndarray
    scores_BK: np.ndarray

    def ranks(self, gold: Sequence[int]) -> list[int]:
        """Return the rank of each user's gold item, from 1; 0 where it is not among the kept items."""
        found_BK = self.items_BK == np.asarray(gold)[:, None]
        return np.where(found_BK.any(axis=1), found_BK.argmax(axis=1) + 1, 0).tolist()


@torch.no_grad()
def rank_exhaustively(
    model: TCopilotModel,
    batch: Batch,
    trie: ItemTrie,
    seen: Sequence[Sequence[int]],
    keep: int,
    weights: Sequence[float],
    rows_at_once: int = 256,
) -> dict[float, Ranking]:
    """Score every item exactly, at several λ in one pass, since for a given text neither p̂ nor f^C depends on λ.

    Each prompt is encoded once. Then the trie is traversed depth first with cached one-token steps, in batches of at
    most `rows_at_once` rows; an end token needs no step. Hence each level holds caches of that many rows, and a pass
    takes about (inner nodes of the trie × users / rows_at_once) steps.

    Args:
        model: the fused model; it may lack a Copilot.
        batch: the prompts; its targets are ignored.
        trie: the catalogue.
        seen: for each user, the indices in the catalogue of the items to exclude.
        keep: K, the largest cutoff.
        weights: the values of λ.
        rows_at_once: largest number of rows in a step.

    Returns:
        The ranking at each λ; items of equal score are in catalogue order.

    Raises:
        ValueError: if a user has fewer than `keep` unseen items.
    """
    unseen_BT = trie.unseen_below(seen)
    _check_keep(keep, unseen_BT[:, 0])
    before, model.weight = model.weight, 0.0  # saves fusing inside the model
    try:
        scores_WBI = _Walk(model, batch, trie, unseen_BT, weights, rows_at_once).run().cpu().numpy()
    finally:
        model.weight = before
    best_WBK = np.argsort(-scores_WBI, axis=-1, kind="stable")[..., :keep]
    kept_WBK = np.take_along_axis(scores_WBI, best_WBK, axis=-1)
    return {weight: Ranking(*pair) for weight, *pair in zip(weights, best_WBK, kept_WBK, strict=True)}


@torch.no_grad()
def rank_by_beams(
    model: TCopilotModel,
    batch: Batch,
    trie: ItemTrie,
    seen: Sequence[Sequence[int]],
    keep: int,
    weights: Sequence[float],
    num_beams: int,
    end_id: int,
) -> dict[float, Ranking]:
    """Search the best items by fused beam search, restricted to items of the catalogue that the user has not seen.

    This is `model.generate` with a mask. There is no length penalty, so scores are plain sums, and the search goes on
    while an open beam is better than the worst finished one. It is exact if `num_beams` is at least the number of
    unseen items; otherwise items whose first tokens score low are lost, as in any beam search.

    Arguments and return value are as in `rank_exhaustively`. `num_beams` is the number of beams of each user at each
    λ, and `end_id` is the token with which every item ends. All λ are searched side by side.

    Raises:
        ValueError: if `keep` exceeds `num_beams` or a user's unseen items.
    """
    unseen_BT = trie.unseen_below(seen)
    if keep > num_beams:
        raise ValueError(
            f"cutoffs go up to {keep} with num_beams={num_beams}: that many beams cannot find {keep} items; "
            f"raise num_beams to {keep} or lower the cutoffs"
        )
    _check_keep(keep, unseen_BT[:, 0])
    start = 1 if model.config.is_encoder_decoder else batch.source_ids_BM.shape[1]
    outputs = model.generate_at_weights(
        weights, batch.source_ids_BM, batch.source_mask_BM.long(), batch.prefix, do_sample=False, output_scores=True,
        num_beams=num_beams, num_return_sequences=num_beams, length_penalty=0.0, early_stopping="never",
        logits_processor=[_OnlyUnseen(trie, unseen_BT, num_beams, start)], max_new_tokens=trie.depth,
        eos_token_id=end_id, pad_token_id=end_id, return_dict_in_generate=True,
    )  # fmt: skip
    return {
        weight: _found(trie, out.sequences[:, start:], out.sequences_scores, len(batch), keep)
        for weight, out in zip(weights, outputs, strict=True)
    }


class _Walk:
    """One exhaustive pass over the trie for a batch of users; see `rank_exhaustively`."""

    def __init__(self, model, batch: Batch, trie: ItemTrie, unseen_BT: np.ndarray, weights, rows_at_once: int) -> None:
        self.model, self.batch, self.trie, self.unseen_BT = model, batch, trie, unseen_BT
        self.weights, self.rows_at_once = weights, rows_at_once
        self.device = batch.source_ids_BM.device
        self.scores_WBI = torch.full((len(weights), len(batch), trie.items), -torch.inf, device=self.device)

    def run(self) -> Tensor:
        """Return the scores [W, B, I] of all items; seen items have −inf."""
        users_B, is_pair = np.arange(len(self.batch)), self.model.config.is_encoder_decoder
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if is_pair else DynamicCache()
        scores_WB = torch.zeros(len(self.weights), len(self.batch), device=self.device)
        self._visit(users_B, np.zeros_like(users_B), 0, TCopilotCache(cache), scores_WB)
        return self.scores_WBI

    def _visit(self, users_R, nodes_R, depth: int, cache: TCopilotCache, scores_WR: Tensor) -> None:
        """Feed the tokens of R nodes to the model, score their children, then visit those that are not leaves."""
        rows, children = self.trie.open_children(users_R, nodes_R, self.unseen_BT)
        rows_at, tokens = self._tensor(rows), self._tensor(self.trie.token_T[children])
        out = self._read(users_R, nodes_R, depth, cache)
        log_probs_R1V = out.pilot_log_probs[:, -1:]
        fused = (self.model.fuse(log_probs_R1V, out.corrections, weight) for weight in self.weights)
        scores = scores_WR[:, rows_at] + torch.stack([log_probs[rows_at, -1, tokens] for log_probs in fused])
        del out, log_probs_R1V, fused  # frees [R, V] tensors before the recursion
        users, items = users_R[rows], self.trie.item_T[children]
        ended = np.flatnonzero(items >= 0)
        self.scores_WBI[:, self._tensor(users[ended]), self._tensor(items[ended])] = scores[:, self._tensor(ended)]
        inner = np.flatnonzero(items < 0)
        for start in range(0, len(inner), self.rows_at_once):
            part = inner[start : start + self.rows_at_once]
            at = self._tensor(part)
            chosen = _share(cache)  # leaves the given cache unchanged
            chosen.batch_select_indices(rows_at[at])
            self._visit(users[part], children[part], depth + 1, chosen, scores[:, at])

    def _read(self, users_R, nodes_R, depth: int, cache: TCopilotCache):
        """Run the model on the prompts (depth 0), or on the token of each row's node."""
        users = self._tensor(users_R)
        tokens_R1, mask_RM = self._tensor(self.trie.token_T[nodes_R])[:, None], self.batch.source_mask_BM[users].long()
        shared = {"past_key_values": cache, "use_cache": True, "output_corrections": True}
        if self.model.config.is_encoder_decoder:
            if depth == 0:
                encoder, ids_BM = self.model.get_encoder(), self.batch.source_ids_BM
                self._encoded_BMP = encoder(ids_BM, attention_mask=mask_RM).last_hidden_state
                tokens_R1 = torch.full_like(tokens_R1, self.model.config.decoder_start_token_id)
            encoded = BaseModelOutput(last_hidden_state=self._encoded_BMP[users])
            return self.model(encoder_outputs=encoded, attention_mask=mask_RM, decoder_input_ids=tokens_R1, **shared)
        if depth == 0:
            shared |= {"logits_to_keep": 1, "prefix": self.batch.prefix, "target_start": mask_RM.shape[1]}
            return self.model(input_ids=self.batch.source_ids_BM, attention_mask=mask_RM, **shared)
        mask = torch.cat([mask_RM, mask_RM.new_ones(len(mask_RM), depth)], dim=1)
        return self.model(input_ids=tokens_R1, attention_mask=mask, **shared)

    def _tensor(self, indices: np.ndarray) -> Tensor:
        return torch.from_numpy(indices).to(self.device)


class _OnlyUnseen(LogitsProcessor):
    """Allow only tokens that lead to an item that the user has not seen, and none after the end of an item."""

    def __init__(self, trie: ItemTrie, unseen_BT: np.ndarray, num_beams: int, start: int) -> None:
        self.trie, self.unseen_BT, self.start, self.num_beams = trie, unseen_BT, start, num_beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        nodes_R = np.zeros(len(input_ids), dtype=np.int64)
        for tokens_R in input_ids[:, self.start :].T.cpu().numpy():
            nodes_R = self.trie.step(nodes_R, tokens_R)
        alive = np.flatnonzero(nodes_R >= 0)
        if input_ids.shape[1] == self.start:  # beams of a user start equal, so keep one
            alive = alive[:: self.num_beams]
        users_R = np.repeat(np.arange(len(self.unseen_BT)), len(input_ids) // len(self.unseen_BT))  # λ and beams
        rows, children = self.trie.open_children(users_R[alive], nodes_R[alive], self.unseen_BT)
        rows = torch.from_numpy(alive[rows]).to(scores.device)
        tokens = torch.from_numpy(self.trie.token_T[children]).to(scores.device)
        masked = torch.full_like(scores, -torch.inf)
        masked[rows, tokens] = scores[rows, tokens]
        return masked


def _found(trie: ItemTrie, sequences_RN: Tensor, scores_R: Tensor, users: int, keep: int) -> Ranking:
    """Convert the sequences of a beam search into items, best first, and drop its empty beams."""
    nodes = np.zeros(len(sequences_RN), dtype=np.int64)
    for tokens in sequences_RN.T.cpu().numpy():
        nodes = np.where(trie.item_T[nodes] >= 0, nodes, trie.step(nodes, tokens))
    items = np.where(nodes >= 0, trie.item_T[nodes], -1)
    scores = scores_R.float().cpu().numpy()
    lost = (items < 0) | (scores < IMPOSSIBLE)
    items_BK = np.where(lost, -1, items).reshape(users, -1)
    scores_BK = np.where(lost, -np.inf, scores).astype(np.float32).reshape(users, -1)
    order_BK = np.lexsort((items_BK, -scores_BK))[:, :keep]
    return Ranking(np.take_along_axis(items_BK, order_BK, 1), np.take_along_axis(scores_BK, order_BK, 1))


def _check_keep(keep: int, unseen_B: np.ndarray) -> None:
    if keep > unseen_B.min():
        user = int(unseen_B.argmin())
        raise ValueError(
            f"cutoffs go up to {keep}, but the user in row {user} of the batch has only {unseen_B[user]} unseen items "
            f"to rank; lower the cutoffs to at most {unseen_B[user]}"
        )


def _share(value: Any) -> Any:
    """Copy a cache but not its tensors, because the selection of rows that follows creates new ones."""
    if isinstance(value, dict):
        return {key: _share(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_share(item) for item in value]
    if isinstance(value, Cache | CacheLayerMixin | CopilotState):
        shared = copy.copy(value)
        shared.__dict__.update({name: _share(item) for name, item in vars(value).items()})
        return shared
    return value
