"""Answers as a ranking of all items, which is how recommendation data sets are evaluated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tcopilot.data.metrics import Answer
from tcopilot.data.next_item import NextItem
from tcopilot.evaluation.item_search import Ranking, rank_by_beams, rank_exhaustively
from tcopilot.evaluation.item_trie import ItemTrie
from tcopilot.evaluation.modes import Mode, about
from tcopilot.evaluation.predictions import Prediction, digest_of

SHOWN = 10  # number of best items stored in a prediction
NODES_OF_A_USER = 32  # trie nodes per user in a batch, by which the number of users in it is chosen


@dataclass
class ItemRanking(Mode):
    """Rank a catalogue for each user at every λ, and look up the rank of the gold item."""

    benchmark: NextItem

    def __post_init__(self) -> None:
        follows = not self.model.config.is_encoder_decoder
        self._trie = ItemTrie.from_texts(self.benchmark.catalogue, self.tokenizer, follows)
        self._places = {text: place for place, text in enumerate(self.benchmark.catalogue)}

    @property
    def settings(self) -> dict[str, Any]:
        """The way of searching the catalogue, and a hash of its contents."""
        beams = self.decoding.ranking_beams if self.decoding.ranking == "beam" else None
        return {"ranking": self.decoding.ranking, "beams": beams, "catalogue": digest_of(self.benchmark.catalogue)}

    def rows_at_once(self, weights: int) -> int:
        """Return the number of users in a batch at so many λ."""
        by_beams = self.decoding.ranking == "beam"
        per_user = weights * self.decoding.ranking_beams if by_beams else NODES_OF_A_USER
        return max(1, self.decoding.batch_size // per_user)

    def answer(self, rows: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[float, list[Prediction]]:
        """Return one prediction per λ and user, with the best items, the rank of the gold item and the scores."""
        seen, keep = [row["seen"] for row in rows], max(self.benchmark.cutoffs)
        shared = (self.model, self.collate(rows).to(self.model.device), self._trie, seen, keep, weights)
        if self.decoding.ranking == "beam":
            found = rank_by_beams(*shared, self.decoding.ranking_beams, self.tokenizer.eos_token_id)
        else:
            found = rank_exhaustively(*shared, self.decoding.batch_size)
        gold = [self._places[row["target"]] for row in rows]
        return {weight: self._predictions(rows, gold, ranking) for weight, ranking in found.items()}

    def read(self, prediction: Prediction) -> Answer:
        """Make an answer from the best item and the rank of the gold item."""
        first = next(iter(prediction["prediction"]), "")
        return self.benchmark.read_ranking(prediction["rank"], first, prediction["answer"])

    def _predictions(self, rows: Sequence[dict[str, Any]], gold: list[int], ranking: Ranking) -> list[Prediction]:
        catalogue = self.benchmark.catalogue
        found = [
            about(row) | {"prediction": [catalogue[i].strip() for i in items[:SHOWN] if i >= 0], "rank": place}
            for row, items, place in zip(rows, ranking.items_BK, ranking.ranks(gold), strict=True)
        ]
        return list(map(self.judged, found))


def ranking_problems(name: str, benchmark: NextItem, ranking: str, num_beams: int, most_seen: int) -> list[str]:
    """Report cutoffs above the number of beams, or above the fewest items that any user has left to rank."""
    problems, largest = [], max(benchmark.cutoffs)
    if ranking == "beam" and largest > num_beams:
        problems.append(
            f"evaluation.ranking_beams={num_beams}: that many beams cannot find the {largest} items of {name}'s "
            f"largest cutoff; raise it to {largest}, or lower data.benchmarks.{name}.cutoffs"
        )
    reachable = len(benchmark.catalogue) - most_seen
    if largest > reachable:
        problems.append(
            f"data.benchmarks.{name}.cutoffs={list(benchmark.cutoffs)}: some user has only {reachable} items left to "
            f"rank; lower the cutoffs to at most {reachable}"
        )
    return problems
