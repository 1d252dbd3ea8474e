import itertools
import random

import numpy as np
import pytest
import torch
from small_training import random_batch, tiny_model
from transformers import GenerationConfig

from tcopilot.data.tokenizers import byte_tokenizer
from tcopilot.evaluation.item_search import Ranking, rank_by_beams, rank_exhaustively
from tcopilot.evaluation.item_trie import ItemTrie
from tcopilot.models.fusion import LogitFusion
from tcopilot.models.modeling import fused_class

END = 1
WEIGHTS = (0.0, 0.3, 1.0)
ROUNDING = 5e-4  # of a log-likelihood: p̂ + λ f^C can cancel, and what is left depends on the order of sums
# Lengths of 2 to 5 tokens; several share a beginning, one continues where another ends.
ITEMS = [
    [5, 6, END],
    [5, 6, 7, END],
    [5, 6, 7, 8, END],
    [5, 9, END],
    [5, 9, 9, END],
    [10, END],
    [11, 12, END],
    [11, 12, 13, END],
    [11, 14, END],
    [15, 16, 17, 18, END],
    [15, 16, 17, 19, END],
    [10, 5, END],
]
SEEN = [[], [0, 5, 9], [3, 4], [1, 2, 6, 7, 8]]


@pytest.fixture(scope="module")
def trie() -> ItemTrie:
    return ItemTrie(ITEMS)


def fused(family: str, feedback: str = "observed", **options):
    torch.manual_seed(5)
    return tiny_model(family, head_std=0.5, feedback=feedback, **options).eval()


def by_hand(model, batch, seen, weight: float) -> list[list[tuple[float, int]]]:
    """Every unseen item scored by a pass of its own without a cache, best first."""
    model.weight = weight
    rows = []
    for user in range(len(batch)):
        mask_M = batch.source_mask_BM[user]
        source = batch.source_ids_BM[user][mask_M][None]
        scores = []
        for place, item in enumerate(ITEMS):
            if place in seen[user]:
                continue
            target = torch.tensor([item])
            if model.config.is_encoder_decoder:
                shifted = torch.cat([torch.tensor([[0]]), target[:, :-1]], dim=1)
                logits = model(input_ids=source, decoder_input_ids=shifted).logits
            else:
                start = source.shape[1]
                logits = model(input_ids=torch.cat([source, target], dim=1), target_start=start).logits
                logits = logits[:, start - 1 : -1]
            log_probs = torch.log_softmax(logits.float(), dim=-1)
            scores.append((log_probs.gather(-1, target[..., None]).sum().item(), place))
        rows.append(sorted(scores, reverse=True))
    return rows


def assert_same(left: Ranking, right: Ranking) -> None:
    np.testing.assert_array_equal(left.items_BK, right.items_BK)
    np.testing.assert_allclose(left.scores_BK, right.scores_BK, atol=ROUNDING)


def path(trie: ItemTrie, item: int) -> list[int]:
    """The nodes of an item, from the first below the root to its leaf."""
    nodes = [int(trie.leaf_I[item])]
    while trie.parent_T[nodes[-1]] > 0:
        nodes.append(int(trie.parent_T[nodes[-1]]))
    return nodes[::-1]


def children(trie: ItemTrie, node: int) -> dict[int, int]:
    """The nodes directly below one, by token."""
    first = int(trie.first_child_T[node])
    return {int(trie.token_T[child]): child for child in range(first, first + int(trie.children_T[node]))}


# The trie -------------------------------------------------------------------------------------------------------


def test_the_trie_spells_every_item(trie):
    assert (trie.items, trie.depth) == (len(ITEMS), 5)
    for place, tokens in enumerate(ITEMS):
        nodes = path(trie, place)
        assert [trie.token_T[node] for node in nodes] == tokens
        assert trie.item_T[nodes[-1]] == place
        node = 0
        for token, expected in zip(tokens, nodes, strict=True):
            assert children(trie, node)[token] == expected
            node = expected


def test_items_below_a_node_are_counted(trie):
    assert trie.items_below_T[0] == len(ITEMS)
    below = {int(trie.token_T[node]): int(trie.items_below_T[node]) for node in children(trie, 0).values()}
    assert below == {5: 5, 10: 2, 11: 3, 15: 2}


def test_steps_lead_to_children_and_nowhere_else(trie):
    size = len(trie.token_T)
    known = {(node, token): child for node in range(size) for token, child in children(trie, node).items()}
    pairs = list(itertools.product(range(-1, size), range(-1, 25)))
    nodes, tokens = (np.array(column) for column in zip(*pairs, strict=True))
    assert trie.step(nodes, tokens).tolist() == [known.get(pair, -1) for pair in pairs]


def test_unseen_items_are_counted_along_their_paths(trie):
    unseen_BT = trie.unseen_below([[], [0, 1, 0]])
    assert unseen_BT[0].tolist() == trie.items_below_T.tolist()
    assert unseen_BT[1, 0] == len(ITEMS) - 2
    assert unseen_BT[1, path(trie, 0)].tolist() == [3, 1, 0]  # under 5, 5 6, and the item itself
    users, nodes = np.array([0, 1]), np.array([0, path(trie, 0)[1]])
    rows, opened = trie.open_children(users, nodes, unseen_BT)
    assert rows.tolist() == [0, 0, 0, 0, 1]
    assert trie.token_T[opened].tolist() == [5, 10, 11, 15, 7]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "the catalogue is empty"),
        ([[5, END], []], "item 1 has no tokens"),
        ([[5, END], [6, END], [5, END]], "item 0 has the same tokens as item 2"),
        ([[5, 6, END], [5, 6]], "item 1 is the beginning of item 0"),
    ],
)
def test_items_that_cannot_be_told_apart_are_refused(items, message):
    with pytest.raises(ValueError, match=message):
        ItemTrie(items)


def test_a_random_catalogue_is_spelt():
    draw = random.Random(0)
    items = [[*map(int, number), END] for number in {str(draw.randint(10, 99_999)) for _ in range(500)}]
    items = [[token + 3 for token in item[:-1]] + [END] for item in items]
    trie = ItemTrie(items)
    assert [[int(trie.token_T[node]) for node in path(trie, place)] for place in range(len(items))] == items


def test_texts_are_tokenised_as_targets_are():
    tokenizer = byte_tokenizer()
    trie = ItemTrie.from_texts([" Beauty item_1", " Beauty item_12"], tokenizer)
    end = tokenizer.eos_token_id
    for place, text in enumerate([" Beauty item_1", " Beauty item_12"]):
        assert [int(trie.token_T[node]) for node in path(trie, place)] == [*tokenizer(text).input_ids, end]


# Ranking --------------------------------------------------------------------------------------------------------


BOTH = pytest.mark.parametrize(
    ("family", "feedback"),
    [
        *(("t5", "observed"), ("llama", "own")),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("t5", "own"), ("llama", "observed"))),
    ],
)


@pytest.mark.slow
@BOTH
def test_exhaustive_scores_are_those_of_a_pass_per_item(family, feedback, trie):
    model, batch = fused(family, feedback), random_batch(family)
    found = rank_exhaustively(model, batch, trie, SEEN, keep=7, weights=WEIGHTS, rows_at_once=5)
    for weight in WEIGHTS:
        expected = by_hand(model, batch, SEEN, weight)
        ranking = found[weight]
        for user, scores in enumerate(expected):
            assert ranking.items_BK[user].tolist() == [place for _, place in scores[:7]]
            np.testing.assert_allclose(ranking.scores_BK[user], [score for score, _ in scores[:7]], atol=ROUNDING)
    orders = [found[weight].items_BK.tolist() for weight in WEIGHTS]
    assert orders[0] != orders[2]  # the Copilot has a say


@BOTH
def test_enough_beams_find_what_is_found_exhaustively(family, feedback, trie):
    model, batch = fused(family, feedback), random_batch(family)
    exact = rank_exhaustively(model, batch, trie, SEEN, keep=7, weights=WEIGHTS)
    for num_beams in (12, 20):
        beams = rank_by_beams(model, batch, trie, SEEN, 7, WEIGHTS, num_beams, END)
        for weight in WEIGHTS:
            assert_same(beams[weight], exact[weight])


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_all_items_come_back_where_all_are_kept(family, trie):
    model, batch, seen = fused(family), random_batch(family), [[]] * 4
    exact = rank_exhaustively(model, batch, trie, seen, len(ITEMS), [1.0])[1.0]
    beams = rank_by_beams(model, batch, trie, seen, len(ITEMS), [1.0], len(ITEMS), END)[1.0]
    assert_same(beams, exact)
    assert all(sorted(items) == list(range(len(ITEMS))) for items in exact.items_BK.tolist())
    total = np.exp(exact.scores_BK).sum(axis=1)
    assert (total < 1).all()  # nothing was renormalised over the catalogue


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_few_beams_find_distinct_unseen_items_with_their_true_scores(family, trie):
    model, batch = fused(family), random_batch(family)
    beams = rank_by_beams(model, batch, trie, SEEN, 3, [0.3], 3, END)[0.3]
    for user, scores in enumerate(by_hand(model, batch, SEEN, 0.3)):
        items = beams.items_BK[user].tolist()
        assert len(set(items)) == 3
        assert not set(items) & set(SEEN[user])
        true = {place: score for score, place in scores}
        np.testing.assert_allclose(beams.scores_BK[user], [true[item] for item in items], atol=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_users_together_are_ranked_as_one_by_one(family, trie):
    model, batch = fused(family), random_batch(family)
    exact = rank_exhaustively(model, batch, trie, SEEN, 7, WEIGHTS)
    beams = rank_by_beams(model, batch, trie, SEEN, 7, WEIGHTS, 12, END)
    for user, part in enumerate(batch.split(1)):
        alone = rank_exhaustively(model, part, trie, SEEN[user : user + 1], 7, WEIGHTS, rows_at_once=1)
        searched = rank_by_beams(model, part, trie, SEEN[user : user + 1], 7, WEIGHTS, 12, END)
        for weight in WEIGHTS:
            assert_same(alone[weight], Ranking(*(part[user : user + 1] for part in exact[weight])))
            assert_same(searched[weight], Ranking(*(part[user : user + 1] for part in beams[weight])))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"fusion": LogitFusion()}, {"context": "inclusive"}, {"layers": 2, "pattern": 2}])
def test_other_copilots_rank_alike(options, trie):
    model, batch = fused("llama", **options), random_batch("llama")
    exact = rank_exhaustively(model, batch, trie, SEEN, 7, [1.0])[1.0]
    assert_same(rank_by_beams(model, batch, trie, SEEN, 7, [1.0], 12, END)[1.0], exact)
    assert exact.items_BK.tolist() == [[place for _, place in row[:7]] for row in by_hand(model, batch, SEEN, 1.0)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bart", "mistral", "qwen3", "gemma2"])
def test_other_families_rank_alike(family, trie, tiny_pilot, randomise, make_batch):
    pilot = tiny_pilot(family)
    model = fused_class(pilot.config.is_encoder_decoder).from_pilot(pilot, layers=2).eval()
    randomise(model.copilot)
    exact = rank_exhaustively(model, make_batch(pilot), trie, SEEN[:3], 7, WEIGHTS, rows_at_once=4)
    beams = rank_by_beams(model, make_batch(pilot), trie, SEEN[:3], 7, WEIGHTS, 12, END)
    for weight in WEIGHTS:
        assert_same(beams[weight], exact[weight])


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_bare_pilot_is_ranked_too(family, trie):
    model, batch = tiny_model(family, copilot=False).eval(), random_batch(family)
    exact = rank_exhaustively(model, batch, trie, SEEN, 7, [0.0])[0.0]
    assert_same(rank_by_beams(model, batch, trie, SEEN, 7, [0.0], 12, END)[0.0], exact)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_settings_of_the_checkpoint_neither_act_nor_get_lost(family, trie):
    model, batch = fused(family), random_batch(family)
    before = rank_by_beams(model, batch, trie, SEEN, 7, [1.0], 12, END)[1.0]
    mine = GenerationConfig(decoder_start_token_id=0, forced_eos_token_id=END, repetition_penalty=1.5, min_length=9)
    model.generation_config, model.weight = mine, 0.7
    assert_same(rank_by_beams(model, batch, trie, SEEN, 7, [1.0], 12, END)[1.0], before)
    rank_exhaustively(model, batch, trie, SEEN, 7, [1.0])
    assert (model.generation_config, model.weight) == (mine, 0.7)


def test_the_place_of_the_gold_item_is_its_rank():
    ranking = Ranking(np.array([[4, 2, 0], [1, 3, -1], [7, 8, 9]]), np.zeros((3, 3)))
    assert ranking.ranks([2, 1, 5]) == [2, 1, 0]


def test_cutoffs_that_cannot_be_filled_are_refused(trie):
    model, batch = fused("t5"), random_batch("t5")
    with pytest.raises(ValueError, match=r"cutoffs go up to 8, .* row 3 .* 7 unseen items.* at most 7"):
        rank_exhaustively(model, batch, trie, SEEN, 8, [0.0])
    with pytest.raises(ValueError, match="at most 7"):
        rank_by_beams(model, batch, trie, SEEN, 8, [0.0], 12, END)
    with pytest.raises(ValueError, match=r"cutoffs go up to 7 with num_beams=4.*raise num_beams to 7"):
        rank_by_beams(model, batch, trie, SEEN, 7, [0.0], 4, END)
