import torch

from tcopilot.data import Batch, PromptTargetCollator

ROWS = [
    {"source_ids": [5, 6, 7], "target_ids": [8, 2], "id": 0, "benchmark": 0},
    {"source_ids": [5], "target_ids": [8, 9, 2], "id": 1, "benchmark": 0},
    {"source_ids": [6, 7], "target_ids": [2], "id": 2, "benchmark": 1},
]


def collate(side: str = "left", pad: int = 2) -> Batch:
    return PromptTargetCollator(pad, side)(ROWS)


def test_prompts_are_padded_on_the_source_side_and_targets_on_the_right():
    assert collate("left").source_ids_BM.tolist() == [[5, 6, 7], [2, 2, 5], [2, 6, 7]]
    assert collate("right").source_ids_BM.tolist() == [[5, 6, 7], [5, 2, 2], [6, 7, 2]]
    assert collate("left").target_ids_BN.tolist() == [[8, 2, 2], [8, 9, 2], [2, 2, 2]]


def test_the_end_token_is_kept_when_it_is_also_the_pad_token():
    assert collate(pad=2).target_mask_BN.tolist() == [[True, True, False], [True, True, True], [True, False, False]]


def test_split_trims_columns_that_are_padding_in_the_whole_part():
    first, second = collate("left").split(2)
    assert (len(first), len(second)) == (2, 1)
    assert second.source_ids_BM.tolist() == [[6, 7]]
    assert second.target_ids_BN.tolist() == [[2]]
    assert second.ids_B.tolist() == [2]
    assert second.benchmark_B.tolist() == [1]


def test_tokens_of_the_parts_add_up():
    batch = collate()
    assert batch.tokens.item() == 6
    assert sum(part.tokens.item() for part in batch.split(1)) == 6


def test_to_moves_every_tensor():
    batch = collate().to("meta")
    assert batch.ids_B.device == batch.target_mask_BN.device == torch.device("meta")
