"""The count of live tensors, and what it shows of the Mistake Log's byte limit."""

import pytest
import torch
from small_training import LLAMA_FIRST, random_batch, small_module, tiny_model, train_on

from tcopilot.app.memory.live_memory import LiveMemory
from tcopilot.mistake_log.log import MistakeLog

MIB = 2**20


def test_a_tensor_counts_from_the_operation_that_makes_it_until_it_is_freed():
    with LiveMemory() as memory:
        one = torch.zeros(MIB // 4)
        two = one + 1
        assert memory.live == 2 * MIB
        del one
        assert (memory.live, memory.peak) == (MIB, 2 * MIB)
        del two
        assert (memory.live, memory.peak) == (0, 2 * MIB)
        memory.reset_peak()
        assert memory.peak == 0


def test_a_view_counts_as_the_storage_that_it_keeps_alive():
    with LiveMemory() as memory:
        whole = torch.zeros(4, MIB // 4)
        part = whole[0]
        assert memory.live == 4 * MIB
        del whole
        assert memory.live == 4 * MIB
        part = part.clone()
        assert memory.live == MIB


def test_what_autograd_keeps_for_the_backward_pass_counts():
    weight = torch.ones(MIB // 4, requires_grad=True)
    with LiveMemory() as memory:
        loss = weight.exp().sum()
        assert memory.live >= MIB
        loss.backward()
        del loss
        assert memory.live == MIB  # the gradient


@pytest.mark.slow
@pytest.mark.parametrize("family", LLAMA_FIRST)
def test_the_byte_limit_of_the_log_bounds_the_memory_that_it_takes_in_training(family):

    def held(max_bytes):
        module = small_module(tiny_model(family), 8)
        batches = [random_batch(family, rows=8, seed=seed, targets=[5] * 8) for seed in range(8)]
        log = MistakeLog(capacity_rounds=1000, max_bytes=max_bytes)
        with LiveMemory() as memory:
            train_on(module, batches, log)
            return memory.live, log.nbytes, log.rounds[-1].nbytes

    free, unbounded, newest = held(None)
    limit = 4 * newest
    bounded, kept, _ = held(limit)
    assert limit / 2 < kept <= limit < unbounded
    assert free - bounded == pytest.approx(unbounded - kept, rel=0.02)  # what left the log left the memory
