"""The invariants that users rely on, on the device that `TCOPILOT_TEST_DEVICE` names (`make gpu` does).

On a GPU they are the proof that streams, pinned copies and CUDA graphs change nothing; on the CPU they are the dry run
of that proof. In a plain `pytest` they are skipped, since the tests of the packages say the same about the CPU.
"""

import os
from functools import partial

import pytest
import torch
from family_models import make_batch, perturb, prompts, tiny_pilot
from lightning import Trainer
from resumable_run import Crash, Run, assert_same_end, crash_after
from small_recording import DEPTHS, recorded
from small_training import (
    FAMILIES,
    InOrder,
    furthest,
    learner,
    random_batch,
    small_module,
    tiny_model,
    train_on,
    weights,
)

from tcopilot.data.prepare import option_rows
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.models.modeling import fused_class
from tcopilot.models.states import StatePooler, trace_pilot
from tcopilot.training import chunked_loss
from tcopilot.training.checkpoints import newest_good
from tcopilot.training.fit import CopilotFit, KeepBest
from tcopilot.training.objectives import RootMeanSquaredError, objective_sum
from tcopilot.training.recorded_data import RecordedData

DEVICE = os.environ.get("TCOPILOT_TEST_DEVICE")
pytestmark = pytest.mark.skipif(not DEVICE, reason="TCOPILOT_TEST_DEVICE names no device; `make gpu` does")
ON = {"cuda": {"accelerator": "gpu"}, "cpu": {"accelerator": "cpu"}}.get(DEVICE)
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(params=["llama", "t5"])
def model(request):
    """A fused model in double precision, so that equal tokens are no matter of rounding."""
    pilot = tiny_pilot(request.param)
    fused = fused_class(pilot.config.is_encoder_decoder).from_pilot(pilot, layers=3)
    perturb(fused.copilot)
    return fused.double().to(DEVICE).eval()


def tokens_of(model, padded=True):
    return {name: tensor.to(DEVICE) for name, tensor in prompts(model.pilot, padded).items()}


def answers(model, tokens, **options):
    return model.generate(**tokens, **{**GREEDY, "pad_token_id": 0, **options})


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 4}], ids=["greedy", "beams"])
def test_cached_is_uncached(model, decoding):
    tokens = tokens_of(model)
    assert torch.equal(answers(model, tokens, **decoding), answers(model, tokens, use_cache=False, **decoding))


def test_weight_0_is_the_pilot_and_another_is_not(model):
    tokens = tokens_of(model)
    fused = answers(model, tokens)
    model.weight = 0.0
    alone = model.pilot.generate(**tokens, **GREEDY, pad_token_id=0)
    assert torch.equal(answers(model, tokens), alone)
    assert not torch.equal(fused, alone)


@pytest.mark.timeout(600)
def test_static_is_dynamic(model):
    tokens = tokens_of(model)
    assert torch.equal(answers(model, tokens, cache_implementation="static"), answers(model, tokens))


def test_a_batch_is_its_rows_alone(model):
    tokens, start = tokens_of(model), 1 if model.config.is_encoder_decoder else 7
    options = {"min_new_tokens": 12}
    together = answers(model, tokens, **options)[:, start:]
    for row in range(3):
        real = tokens["attention_mask"][row].bool()
        alone = answers(model, {name: tensor[row][real][None] for name, tensor in tokens.items()}, **options)
        assert torch.equal(alone[0, -12:], together[row])


def test_several_weights_at_once_are_each_alone(model):
    tokens, at = tokens_of(model), [0.0, 0.4, 1.0]
    found = model.generate_at_weights(at, **tokens, **GREEDY, pad_token_id=0)
    for weight, answer in zip(at, found, strict=True):
        model.weight = weight
        assert torch.equal(answers(model, tokens), answer)


def test_an_export_answers_as_before(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64, device_map=DEVICE)
    assert {parameter.device.type for parameter in again.parameters()} == {DEVICE}
    assert torch.equal(answers(again, tokens_of(again)), answers(model, tokens_of(model)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunked_objective_is_the_whole_one(family, monkeypatch):
    model = tiny_model(family, head_std=0.1).to(DEVICE)
    log = MistakeLog(policy=InOrder())
    with torch.no_grad():
        log.append(trace_pilot(model.pilot, random_batch(family).to(DEVICE), StatePooler()))
    record = log.sample(4, DEVICE)
    found = []
    for elements in (2**24, 1):
        monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", elements)
        hidden, _ = model.copilot(
            model.copilot.taught_inputs(record.probs_BNV, record.targets_BN),
            record.source_BMP, record.source_mask_BM, record.states_BNP,
        )  # fmt: skip
        total = objective_sum(RootMeanSquaredError(), model.copilot, record, hidden)
        total.backward()
        found.append((total.detach(), model.copilot.head.weight.grad.clone()))
        model.zero_grad()
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(whole, chunked)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_log_holds_what_the_pilot_did(family):
    pilot = tiny_pilot(family).to(DEVICE)
    log = MistakeLog(policy=InOrder())
    with torch.no_grad():
        states = trace_pilot(pilot, make_batch(pilot).to(DEVICE), StatePooler())
        log.append(states)
    record = log.sample(3)
    mask = states.target_mask_BN.cpu()
    torch.testing.assert_close(record.states_BNP[mask], states.states_BNP.cpu()[mask], rtol=0, atol=0)
    probs = states.logits_BNV.float().softmax(-1).cpu()
    torch.testing.assert_close(record.probs_BNV[mask], probs[mask], rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 2e-3), ("bf16-mixed", 5e-2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_joint_rounds_learn_what_they_learn_on_the_cpu(family, precision, tolerance):
    found = {}
    for device, options in (("cpu", {"accelerator": "cpu"}), (DEVICE, {**ON, "precision": precision})):
        model = tiny_model(family, head_std=0.1)
        module = small_module(model, 3, steps_per_round=2, pilot=learner(1e-3), copilot=learner(1e-3))
        batches = [random_batch(family, seed=seed) for seed in range(3)]
        losses = train_on(module, batches, MistakeLog(policy=InOrder()), **options)
        found[device, len(found)] = losses, weights(model.cpu())
    (one, expected), (other, reached) = found.values()
    assert other.pilot == pytest.approx(one.pilot, rel=tolerance)
    assert other.copilot == pytest.approx(one.copilot, rel=tolerance)
    assert furthest(reached, expected) < 10 * tolerance


@pytest.mark.parametrize("trained", [False, True], ids=["a new head", "a trained head, which is validated first"])
def test_a_fit_to_wrong_options_learns_what_it_learns_on_the_cpu(trained, tmp_path):
    pilot, found = tiny_pilot(vocab_size=600).eval().requires_grad_(False), []
    row = {"source_ids": [5, 6], "target_ids": [7, 9, 1], "option_ids": [[7, 9, 1], [8, 1]], "benchmark": 0}
    rows = [row | {"id": number, "source_ids": [number + 10, 6]} for number in range(24)]
    recording = recorded(tmp_path, pilot, [option for row in rows for option in option_rows(row)])
    for on in ({"accelerator": "cpu"}, ON):
        torch.manual_seed(0)
        copilot = perturb(HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=16), 0.1 * trained)
        data = RecordedData(recording, rows[:16], rows[16:], [], DEPTHS, 8, 3, 0, lambda *given: None, True)
        module = CopilotFit(copilot, pilot, learner(1e-2), data.updates, wrong_options=True)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        Trainer(
            max_steps=data.updates, callbacks=[KeepBest(3, 8)], val_check_interval=data.updates_per_pass,
            num_sanity_val_steps=-1 if trained else 0, default_root_dir=tmp_path, **on, **quiet,
        ).fit(module, datamodule=data)  # fmt: skip
        found.append({name: weight.detach().cpu() for name, weight in copilot.named_parameters()})
        pilot.cpu()
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_crashed_run_goes_on_as_if_nothing_had_happened(family, tmp_path):
    build = partial(Run, family, every=2, trainer=ON)
    whole = build(tmp_path / "whole").fit()
    with pytest.raises(Crash):
        build(tmp_path / "crashed", callbacks=[crash_after(7)]).fit()
    resumed = build(tmp_path / "crashed", seed=1).fit(newest_good(tmp_path / "crashed", 1))
    assert_same_end(whole, resumed, resumed_after=6)
