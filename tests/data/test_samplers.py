from itertools import chain, product

import numpy as np
import pytest

from tcopilot.data import DataError
from tcopilot.data.samplers import RoundSampler, rank_batches, rank_slice


def test_a_pass_has_every_row_and_the_next_pass_another_order():
    batches = list(RoundSampler(rows=10, batch_size=4, rounds=6, seed=3))
    first, second = list(chain(*batches[:3])), list(chain(*batches[3:]))
    assert set(first) == set(second) == set(range(10))
    assert first != second
    assert all(len(batch) == 4 for batch in batches)


def test_fewer_rows_than_a_batch_repeat():
    assert [sorted(batch) for batch in RoundSampler(rows=2, batch_size=4, rounds=2)] == [[0, 0, 1, 1]] * 2


def test_grouping_keeps_the_rows_of_a_pass_and_narrows_the_lengths_of_a_batch():
    lengths = np.random.default_rng(0).integers(1, 100, 640)
    grouped = list(RoundSampler(640, 64, 10, lengths=lengths))
    plain = list(RoundSampler(640, 64, 10))
    assert sorted(chain(*grouped)) == list(range(640))
    assert np.mean([np.ptp(lengths[b]) for b in grouped]) < 0.2 * np.mean([np.ptp(lengths[b]) for b in plain])
    assert [lengths[b].mean() for b in grouped] != sorted(lengths[b].mean() for b in grouped)


def test_two_ranks_together_see_what_one_process_sees():
    one = list(RoundSampler(50, 8, 20, seed=1, lengths=range(50)))
    two = [list(RoundSampler(50, 8, 20, seed=1, lengths=range(50), rank=rank, world_size=2)) for rank in (0, 1)]
    assert [left + right for left, right in zip(*two, strict=True)] == one


def test_ranks_have_equally_many_batches_of_rows_that_are_each_in_one():
    for rows, size, ranks in product(range(3, 30), (2, 3, 4), (1, 2, 3)):
        shares = [rank_batches(rows, size, rank, ranks) for rank in range(ranks)]
        assert len({len(batches) for batches in shares}) == 1
        assert sorted(chain(*chain(*shares))) == list(range(rows))
        assert all(1 <= len(batch) <= size for batch in chain(*shares))
    assert [list(batch) for batch in rank_batches(5, 2, 0, 1)] == [[0, 1], [2, 3], [4]]


def test_the_state_is_the_number_of_batches_and_goes_on_at_the_next():
    sampler = RoundSampler(10, 4, 8)
    everything, iterator = list(sampler), iter(sampler)
    for _ in range(5):
        next(iterator)
    resumed = iter(sampler)
    resumed.load_state_dict(iterator.state_dict())
    assert list(resumed) == everything[5:]


def test_with_fewer_rounds_than_are_done_nothing_is_left():
    iterator = iter(RoundSampler(10, 4, rounds=3))
    iterator.load_state_dict({"done": 5})
    assert list(iterator) == []


def test_a_batch_that_does_not_divide_names_both_numbers():
    with pytest.raises(DataError, match=r"batch_size=64 .* 3 processes; use 63"):
        rank_slice(64, 0, 3)
