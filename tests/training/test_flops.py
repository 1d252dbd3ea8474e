"""Counted operations: torch's own count where it has one, attention on the CPU too, and sums over a resumed run."""

import pytest
import torch
from small_training import FAMILIES, learner, random_batch, small_module, tiny_model, tiny_pilot, train_on
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from tcopilot.mistake_log.log import MistakeLog
from tcopilot.training.callbacks import FlopCount
from tcopilot.training.callbacks.flops import FlopCounter


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_and_its_gradient_are_counted_as_torch_counts_them(family):
    pilot, batch = tiny_pilot(family), random_batch(family)

    def loss():
        return pilot(input_ids=batch.source_ids_BM, labels=batch.source_ids_BM).loss

    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounter() as ours:
            loss().backward()
        with FlopCounterMode(display=False) as theirs:
            loss().backward()
        assert ours.flops == theirs.get_total_flops() > 0
        with FlopCounter() as products:
            loss()
    with FlopCounter() as fused:
        loss()
    assert fused.flops == products.flops  # the kernel that torch does not count
    with FlopCounter() as fused:
        loss().backward()
    assert fused.flops >= ours.flops  # it computes the scores once more on the way back


def test_heads_that_share_keys_cost_what_heads_with_their_own_cost():
    def cost(heads: int) -> int:
        query = torch.randn(2, 4, 5, 8, requires_grad=True)
        shared = torch.randn(2, heads, 5, 8, requires_grad=True)
        with FlopCounter() as count:
            scaled_dot_product_attention(query, shared, shared, enable_gqa=True).sum().backward()
        return count.flops

    assert cost(2) == cost(4) > 0


def total(rounds: int, every: int, pilot_only: bool = False, count: FlopCount | None = None) -> float:
    """Operations of a small run in which every round has the same shapes."""
    count = FlopCount(every) if count is None else count
    model = tiny_model("t5", copilot=not pilot_only)
    module = small_module(model, rounds, copilot=None if pilot_only else learner())
    batches = [random_batch("t5", seed=1, first_id=8 * i) for i in range(rounds)]
    train_on(module, batches, None if pilot_only else MistakeLog(capacity_rounds=1), [count])
    return count.total()


@pytest.mark.slow
def test_a_few_counted_rounds_stand_for_all():
    of_all = total(2, every=1)
    assert total(2, every=2) == pytest.approx(of_all)
    assert total(4, every=4) == pytest.approx(2 * of_all)


@pytest.mark.slow
def test_the_copilot_costs_too():
    assert total(4, every=2) > 1.1 * total(4, every=2, pilot_only=True)


@pytest.mark.slow
def test_a_resumed_count_goes_on():
    before = FlopCount(1)
    first = total(2, every=1, count=before)
    after = FlopCount(1)
    after.load_state_dict(before.state_dict())
    assert total(3, every=1, count=after) == pytest.approx(2.5 * first)


@pytest.mark.slow
def test_counting_ends_with_its_round():
    count = FlopCount(2)
    total(4, every=2, count=count)
    counted = dict(count.state_dict())
    torch.ones(4, 4) @ torch.ones(4, 4)
    assert count.state_dict() == counted
    assert FlopCount().total() is None
