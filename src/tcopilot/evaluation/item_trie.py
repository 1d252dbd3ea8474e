"""A trie of the token ids of a catalogue's items: which tokens may follow, and which unseen items lie below a node.

Shapes: B users, R rows of a step (pairs of a user and a trie node), I items, T nodes of the trie.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from tcopilot.data.tokenizers import ids_of


class ItemTrie:
    """The token ids of all items as a trie, held in arrays so that many nodes can be looked up at once.

    Nodes are numbered level by level, so that the children of a node have consecutive numbers; node 0 is the root.
    Every item ends in a leaf.

    Args:
        sequences: token ids of each item, end token included.

    Raises:
        ValueError: if there is no item, or an item has no tokens or is equal to another item or a prefix of one.

    Attributes:
        depth: number of tokens of the longest item.
        token_T: the token that leads to a node; −1 for the root.
        parent_T: the parent of a node; −1 for the root.
        first_child_T: the first child of a node, if it has any.
        children_T: number of children of a node.
        items_below_T: number of items that end in a node or below it.
        item_T: index of the item that ends in a node; −1 for inner nodes.
        leaf_I: the node in which each item ends.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        order = sorted(range(len(sequences)), key=lambda item: list(sequences[item]))
        if not order or not len(sequences[order[0]]):
            what = f"item {order[0]} has no tokens" if order else "the catalogue is empty"
            raise ValueError(f"{what}; every item to be ranked needs a text")
        spans = [(0, len(order), 0)]  # of every node: from, to (in `order`) and depth
        tokens, parents, first_child, children, item_at = [-1], [-1], [], [], []
        for node, (start, stop, depth) in enumerate(spans):  # the loop appends to spans
            first_child.append(len(spans))
            item = order[start]
            ends = len(sequences[item]) == depth
            if ends and stop - start > 1:
                other = order[start + 1]
                how = "has the same tokens as" if len(sequences[other]) == depth else "is the beginning of"
                raise ValueError(
                    f"item {item} {how} item {other} of the catalogue (counted from 0), tokens "
                    f"{list(sequences[item])}; ranking needs texts that the tokenizer tells apart"
                )
            item_at.append(item if ends else -1)
            while start < stop and not ends:
                token, begin = sequences[order[start]][depth], start
                while start < stop and sequences[order[start]][depth] == token:
                    start += 1
                spans.append((begin, start, depth + 1))
                tokens.append(token)
                parents.append(node)
            children.append(len(spans) - first_child[-1])
        self.items, self.depth = len(order), spans[-1][2]
        self.token_T, self.parent_T = np.array(tokens), np.array(parents)
        self.first_child_T, self.children_T, self.item_T = np.array(first_child), np.array(children), np.array(item_at)
        self.items_below_T = np.array([stop - start for start, stop, _ in spans])
        self.leaf_I = np.empty(self.items, dtype=np.int64)
        leaves = np.flatnonzero(self.item_T >= 0)
        self.leaf_I[self.item_T[leaves]] = leaves
        self._stride = int(self.token_T.max()) + 1
        self._keys = self.parent_T[1:] * self._stride + self.token_T[1:]  # ascending, by the numbering

    @classmethod
    def from_texts(cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, follows: bool = False) -> "ItemTrie":
        """Tokenise the targets of a catalogue as the data module does, each with one end token; see `ids_of`."""
        return cls([[*ids, tokenizer.eos_token_id] for ids in ids_of(tokenizer, texts, follows)])

    def step(self, nodes_R: np.ndarray, tokens_R: np.ndarray) -> np.ndarray:
        """Return the node to which each token leads [R]; −1 if there is none, or if the given node is −1."""
        keys_R = nodes_R * self._stride + tokens_R
        places_R = np.searchsorted(self._keys, keys_R).clip(max=len(self._keys) - 1)
        known_R = (self._keys[places_R] == keys_R) & (nodes_R >= 0) & (tokens_R >= 0) & (tokens_R < self._stride)
        return np.where(known_R, places_R + 1, -1)

    def unseen_below(self, seen: Sequence[Sequence[int]]) -> np.ndarray:
        """Count, [B, T], the unseen items of each user that end in or below each node; `seen` may hold repeats."""
        unseen_BT = np.tile(self.items_below_T.astype(np.int32), (len(seen), 1))
        for unseen_T, items in zip(unseen_BT, seen, strict=True):
            nodes = self.leaf_I[np.unique(np.asarray(items, dtype=np.int64))]
            while len(nodes):
                np.subtract.at(unseen_T, nodes, 1)
                nodes = self.parent_T[nodes]
                nodes = nodes[nodes >= 0]
        return unseen_BT

    def open_children(
        self, users_R: np.ndarray, nodes_R: np.ndarray, unseen_BT: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """List the children that lead to an unseen item of the row's user, as row indices, ascending, and nodes."""
        counts_R = self.children_T[nodes_R]
        rows = np.repeat(np.arange(len(nodes_R)), counts_R)
        within = np.arange(len(rows)) - np.repeat(counts_R.cumsum() - counts_R, counts_R)
        children = self.first_child_T[nodes_R][rows] + within
        opened = unseen_BT[users_R[rows], children] > 0
        return rows[opened], children[opened]
