import pytest
import torch
from small_training import random_batch, tiny_pilot

from tcopilot.mistake_log.async_copy import AsyncHostCopies, owned_copy, to_device
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.states import StatePooler, trace_pilot

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_copy_shares_nothing_with_its_source_and_has_no_graph():
    source = torch.ones(3, requires_grad=True)
    copies = AsyncHostCopies()
    made = copies.copy(2 * source, torch.bfloat16)
    copies.wait()
    with torch.no_grad():
        source.zero_()
    assert made.tolist() == [2.0, 2.0, 2.0]
    assert made.dtype == torch.bfloat16
    assert not made.requires_grad


def test_on_the_cpu_nothing_is_on_the_way():
    copies = AsyncHostCopies()
    copies.copy(torch.ones(3))
    assert not copies.pending


class Late(AsyncHostCopies):
    """Copies that arrive when somebody waits, as those from a GPU may."""

    def __init__(self):
        super().__init__()
        self.started = []

    def copy(self, tensor, dtype=None):
        made = torch.full(tensor.shape, 0, dtype=dtype or tensor.dtype)
        self.started.append((made, owned_copy(tensor)))
        self.pending = True
        return made

    def wait(self):
        for made, source in self.started:
            made.copy_(source)
        self.started.clear()
        self.pending = False


def filled(copies, read):
    """A log of five rounds, some in two micro-batches, of which three stay."""
    log = MistakeLog(capacity_rounds=3)
    log._copies = copies
    pilot = tiny_pilot("llama")
    for seed in range(5):
        states = trace_pilot(pilot, random_batch("llama", seed=seed, first_id=seed % 2), StatePooler())
        log.append(states)
        if seed % 2:
            log.append(states, extend=True)
        if read:
            log.sample(2)
    return log


@pytest.mark.parametrize("read", [True, False])
def test_a_log_whose_copies_arrive_late_is_the_same_log(read):
    late, plain = filled(Late(), read), filled(AsyncHostCopies(), read)
    assert late.seen_rounds == plain.seen_rounds == 5
    assert [len(logged) for logged in late.rounds] == [len(logged) for logged in plain.rounds]
    assert late.statistics() == plain.statistics()
    for one, other in zip(late.sample(6), plain.sample(6), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_goes_on_while_a_copy_is_made_and_the_copy_is_right():
    copies = AsyncHostCopies()
    source = torch.arange(2**24, device="cuda", dtype=torch.float32)
    expected = source.cpu()
    torch.cuda._sleep(10**9)  # the copy must not overtake the work that makes its source
    source.add_(1)
    made = copies.copy(source)
    assert made.is_pinned()
    assert copies.pending
    del source
    torch.zeros(2**24, device="cuda")  # would be given the source's memory if it were free
    copies.wait()
    assert torch.equal(made, expected + 1)
    assert torch.equal(to_device(made, "cuda").cpu(), made)
