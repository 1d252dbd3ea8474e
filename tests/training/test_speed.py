"""What makes rounds fast or small leaves what they learn as it is."""

import os
import shutil
import time
from functools import partial

import pytest
import torch
from small_training import (
    FAMILIES,
    EachRound,
    InOrder,
    furthest,
    learner,
    random_batch,
    small_module,
    tiny_model,
    tiny_pilot,
    train_on,
    weights,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tcopilot.app.memory.dry_run import Load, measure
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models import error_input
from tcopilot.models.states import StatePooler, trace_pilot
from tcopilot.training import chunked_loss, compilation
from tcopilot.training.callbacks import FlopCount
from tcopilot.training.objectives import RootMeanSquaredError, objective_sum
from tcopilot.training.serialization import pack, unpack


def trained(family, callbacks=(), rounds=3, shape=None, **options):
    """Losses of rounds with two Copilot updates each, and the model after them."""
    model = tiny_model(family, head_std=0.1, **shape or {})
    module = small_module(model, rounds, steps_per_round=2, **options)
    batches = [random_batch(family, seed=seed) for seed in range(rounds)]
    return train_on(module, batches, MistakeLog(policy=InOrder()), callbacks), model


def compiled_and_plain(family, backend, rounds=3, **shape):
    names, seen = list(tiny_model(family, **shape).state_dict()), []
    inside = EachRound(lambda trainer, module: seen.append(list(module.model.state_dict())))
    plain, expected = trained(family, rounds=rounds, shape=shape)
    losses, model = trained(family, [inside], rounds, shape, compile=backend)
    assert seen == [names] * rounds
    assert losses.pilot == pytest.approx(plain.pilot, rel=1e-5)
    assert losses.copilot == pytest.approx(plain.copilot, rel=1e-4)
    assert furthest(weights(model), weights(expected)) < 1e-4
    assert not any(
        "forward" in vars(part) for part in (model.pilot, model.copilot)
    )  # decoding finds them as they were


@pytest.mark.slow
def test_what_dynamo_traces_trains_as_the_plain_models_do():
    compiled_and_plain("llama", "eager")


@pytest.mark.slow
def test_neither_the_estimate_of_memory_nor_the_count_of_operations_turns_compiling_off():
    ran, by_round = [], []

    def counting(graph, _):
        return lambda *inputs: (ran.append(1), graph(*inputs))[1]

    torch._dynamo.register_backend(counting, name="counting")
    make = partial(small_module, tiny_model("llama"), 3, compile="counting")
    measure(make, Load(rows=2, source=4, target=3), MistakeLog())
    count = FlopCount(3)
    after = EachRound(lambda trainer, module: (by_round.append(len(ran)), ran.clear()))
    trained("llama", [count, after], compile="counting")
    assert by_round[0] > 0
    assert by_round == [by_round[0]] * 3
    assert count.total() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layers"), [("t5", 1), ("llama", 2)])  # those of T5 take the longest
def test_compiled_models_train_as_the_plain_ones_do(family, layers):
    compiled_and_plain(family, "aot_eager", layers=layers)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_models_compiled_by_inductor_train_as_the_plain_ones_do():
    """One layer, since each takes half a minute; the second round's shapes are other than the first's."""
    compiled_and_plain("llama", "inductor", rounds=2, layers=1, pattern=2)


def test_fused_adamw_takes_the_steps_of_the_plain_one():
    models = [
        trained("llama", pilot=learner(optimizer=one), copilot=learner(optimizer=one))[1]
        for one in (torch.optim.AdamW, partial(torch.optim.AdamW, fused=True))
    ]
    assert furthest(*map(weights, models)) < 1e-3  # AdamW divides small gradients by small ones


def test_8_bit_adamw_trains_and_its_state_survives_a_checkpoint():
    adamw = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    weight = nn.Parameter(torch.randn(128, 64, generator=torch.Generator().manual_seed(0)))  # smaller ones stay whole
    optimizer = adamw([weight], lr=1e-2)

    def step(one):
        one.zero_grad()
        loss = weight.square().mean()
        loss.backward()
        one.step()
        return loss.item()

    assert step(optimizer) > step(optimizer)
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    before, state = weight.detach().clone(), optimizer.state_dict()
    restored = adamw([weight], lr=1e-2)
    restored.load_state_dict(unpack(*pack(state)))
    step(restored)
    after = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(before)
    step(optimizer)
    assert torch.equal(weight, after)


def storage_of(output):
    return (output[0] if isinstance(output, tuple) else output).untyped_storage()


@pytest.mark.parametrize("family", FAMILIES)
def test_pooling_keeps_no_layer_that_checkpointing_does_not_keep_anyway(family):
    pilot, batch = tiny_pilot(family, layers=6).train(), random_batch(family)
    pilot.gradient_checkpointing_enable({"use_reentrant": False})
    decoder, outputs = pilot.get_decoder(), []
    for layer in decoder.block if family == "t5" else decoder.layers:
        layer.register_forward_hook(lambda _, given, out: outputs.append(StorageWeakRef(storage_of(out))))

    def alive():
        return sum(not output.expired() for output in outputs)

    states = trace_pilot(pilot, batch, StatePooler())
    assert len(outputs) == 6
    assert alive() <= 6  # each is the input of the next, from which checkpointing runs it again
    states.logits_BNV.sum().backward()
    del states.logits_BNV
    assert alive() == 0  # h̄ holds none of them


class LargeTensors(TorchDispatchMode):
    """Counts the memories of [B, N, V] or nearly so that are in use at one time."""

    def __init__(self, least):
        super().__init__()
        self.least, self.most, self._seen = least, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= 4 * self.least:
                self._seen[tensor.untyped_storage().data_ptr()] = StorageWeakRef(tensor.untyped_storage())
        self._seen = {place: one for place, one in self._seen.items() if not one.expired()}
        self.most = max(self.most, len(self._seen))
        return out


@pytest.mark.parametrize("head", ["linear", "soft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_of_the_copilot_holds_one_tensor_of_tokens_times_vocabulary(family, head, monkeypatch):
    rows, length, vocab = 16, 9, 600  # so that all else is small
    model = tiny_model(family, head_std=0.1, head=head, vocab=vocab)
    log = MistakeLog(policy=InOrder())
    log.append(trace_pilot(model.pilot, random_batch(family, rows, targets=[length] * rows), StatePooler()))
    for module in (error_input, chunked_loss):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", length * vocab)
    record = log.sample(rows)
    with LargeTensors(least=rows * (length - 1) * vocab) as large:
        inputs = model.copilot.taught_inputs(record.probs_BNV, record.targets_BN)
        hidden, _ = model.copilot(inputs, record.source_BMP, record.source_mask_BM, record.states_BNP)
        objective_sum(RootMeanSquaredError(), model.copilot, record, hidden).backward()
    assert model.copilot.error_in.grad is not None
    assert large.most == 1  # p̂, as it was drawn


def test_an_empty_library_in_the_compilers_cache_is_removed_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "cache_dir", lambda: str(tmp_path))
    for name, content, age in (
        ("killed.so", "", 60),
        ("whole.so", "x", 60),
        ("linking.so", "", 0),
        ("empty.txt", "", 60),
    ):
        (tmp_path / name).write_text(content)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    compilation.clear_empty_libraries()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.so", "linking.so", "empty.txt"}
