"""Fits to a recording: a loss over some tokens stands for that over all, and the best Copilot is kept."""

from types import SimpleNamespace

import pytest
import torch
from family_models import perturb, tiny_pilot
from lightning import Trainer, seed_everything
from small_recording import DEPTHS, recorded
from small_training import learner

from tcopilot.mistake_log.recording import row_key
from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.training import chunked_loss, compared_tokens
from tcopilot.training.compared_tokens import ComparedTokens
from tcopilot.training.fit import CopilotFit, KeepBest, reached
from tcopilot.training.objectives import RootMeanSquaredError
from tcopilot.training.recorded_data import RecordBatch, RecordedData


@pytest.fixture(scope="module")
def pilot():
    return tiny_pilot(vocab_size=600).eval().requires_grad_(False)


def rows_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(size):
        return torch.randint(3, 600, (size,), generator=generator).tolist()

    return [
        {"source_ids": draw(4), "target_ids": [*draw(1 + i % 3), 1], "id": i, "benchmark": 0} for i in range(count)
    ]


def batch_of(recording):
    return RecordBatch.of([[recording.record_of(key, DEPTHS)] for key in recording._places])


def compared(module, batch):
    """f^C, p̂ and the targets' places of a whole batch at once."""
    return module._compared(batch).compare(module._hidden(batch))


@pytest.mark.parametrize("context", ["inclusive", "strict"])
@pytest.mark.parametrize("head", ["soft", "full", "low_rank"])
def test_the_loss_over_some_tokens_is_near_that_over_all(pilot, head, context, tmp_path, monkeypatch):
    batch = batch_of(recorded(tmp_path, pilot, rows_of(12)))
    copilot = perturb(HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=16, head=head, context=context), 0.1)
    module = CopilotFit(copilot, pilot, learner(1e-3), 1)
    torch.manual_seed(0)
    all_tokens = loss(module, batch)
    monkeypatch.setattr(compared_tokens, "SMALL_VOCABULARY", 0)
    some, probs = loss(module, batch), compared(module, batch)[1]
    assert probs.shape[-1] < 600
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))
    assert some == pytest.approx(all_tokens, rel=0.02)


def test_the_tail_has_a_shift_where_no_token_is_there_by_chance(pilot, tmp_path, monkeypatch):
    monkeypatch.setattr(compared_tokens, "SMALL_VOCABULARY", 0)
    monkeypatch.setattr(compared_tokens, "RANDOM_TOKENS", 0)  # as where all that are drawn are meant, too
    copilot = perturb(HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=16), 0.1)
    module = CopilotFit(copilot, pilot, learner(1e-3), 1)
    corrections, probs, _ = compared(module, batch_of(recorded(tmp_path, pilot, rows_of(12))))
    assert probs.shape[-1] < 600
    torch.testing.assert_close(corrections.sum(-1), torch.zeros(len(probs)))


def test_mixed_precision_leaves_p_hat_as_it_was_recorded(pilot, tmp_path, monkeypatch):
    monkeypatch.setattr(compared_tokens, "SMALL_VOCABULARY", 0)
    module = CopilotFit(HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=16), pilot, learner(1e-3), 1)
    batch, probs = batch_of(recorded(tmp_path, pilot, rows_of(12))), []
    for mixed in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            corrections, of_pilot, _ = compared(module, batch)
        probs.append(of_pilot)
        assert corrections.abs().max() < 1e-6  # a new Copilot corrects nothing
    assert torch.equal(*probs)


def loss(module, batch):
    corrections, probs, targets = compared(module, batch)
    return module.objective.row_losses(corrections, probs, targets).mean().item()


@pytest.mark.parametrize("own_mistakes", [False, True])
@pytest.mark.parametrize("hidden", [16, None])
def test_a_long_batch_is_compared_in_parts_with_the_same_loss_and_gradients(
    pilot, hidden, own_mistakes, tmp_path, monkeypatch
):
    monkeypatch.setattr(compared_tokens, "SMALL_VOCABULARY", 0)
    batch, found, seen = batch_of(recorded(tmp_path, pilot, rows_of(12))), [], []
    copilot = perturb(HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=hidden), 0.1)
    module = CopilotFit(copilot, pilot, learner(1e-3), 1, own_mistakes=own_mistakes)
    module.log, module._trainer = (lambda *given, **options: None), SimpleNamespace(world_size=1)
    compare = ComparedTokens.compare
    monkeypatch.setattr(ComparedTokens, "compare", lambda *given: seen.append(len(given[1])) or compare(*given))
    for elements in (2**24, 4000):
        monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", elements)
        torch.manual_seed(0)
        copilot.zero_grad()
        module.on_validation_epoch_start()
        module.validation_step(batch, 0)
        step = module.training_step(batch, 0)
        step.backward()
        found.append([module._sums, step.detach(), *(weight.grad.clone() for weight in copilot.parameters())])
    assert 1 < min(seen) < max(seen) == len(batch.kept.targets_T)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_all_tokens_give_what_the_copilot_corrects_in_decoding(pilot, tmp_path):
    recording = recorded(tmp_path, pilot, rows_of(6))
    batch = batch_of(recording)
    copilot = perturb(HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=16), 0.1)
    corrections, probs, targets = compared(CopilotFit(copilot, pilot, learner(1e-3), 1), batch)
    hidden, _ = copilot(batch.states_BNQ.new_empty(6, 4, 0), None, None, batch.states_BNQ)
    torch.testing.assert_close(corrections, copilot.correct(hidden[batch.mask_BN], probs.log()))
    assert torch.equal(targets, batch.kept.targets_T)


def test_own_mistakes_weigh_a_token_by_how_often_sampled_answers_come_to_it_right(pilot, tmp_path):
    right = torch.tensor([0.5, 0.4, 0.9, 0.2])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    torch.testing.assert_close(reached(right, mask), torch.tensor([1.0, 0.5, 0.2, 1.0]))
    batch = batch_of(recorded(tmp_path, pilot, rows_of(6)))
    copilot = perturb(HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=16), 0.1)
    module = CopilotFit(copilot, pilot, learner(1e-3), 1, own_mistakes=True)
    corrections, probs, targets = compared(module, batch)
    places = torch.arange(len(targets))
    losses, own = -(probs + corrections)[places, targets].log(), probs[places, targets]
    lengths, first = batch.mask_BN.sum(1).tolist(), 0
    counts = []
    for length in lengths:
        counts += [own[first : first + place].prod() for place in range(length)]
        first += length
    counts = torch.stack(counts)
    module.log, module._trainer = (lambda *given, **options: None), SimpleNamespace(world_size=1)
    torch.testing.assert_close(module.training_step(batch, 0), (losses * counts).sum() / counts.sum())


def fitted(
    folder, pilot, copilot, train, validation, patience=50, passes=30, objective=None, averaging=8, rate=1e-2,
    checked_before=0,
):  # fmt: skip
    recording = recorded(folder, pilot, [*train, *validation])
    data = RecordedData(
        recording, train, validation, [*train, *validation], DEPTHS, 8, passes, 0, lambda rows, device: None
    )
    module, best = CopilotFit(copilot, pilot, learner(rate), data.updates, objective), KeepBest(patience, averaging)
    judged = {"val_check_interval": data.updates_per_pass, "limit_val_batches": 1.0 if validation else 0}
    trainer = Trainer(
        max_epochs=1, callbacks=[best], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=checked_before, accelerator="cpu", **judged,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module, best, recording


def nll(corrections, probs, targets):
    return -(probs + corrections)[torch.arange(len(targets)), targets].log().mean().item()


@pytest.mark.parametrize(("objective", "averaging"), [(None, 8), (None, None), (RootMeanSquaredError(), 8)])
def test_a_fit_learns_what_the_pilot_gets_wrong(pilot, objective, averaging, tmp_path):
    copilot, rows = HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=32), rows_of(16)
    module, best, recording = fitted(tmp_path, pilot, copilot, rows, rows, objective=objective, averaging=averaging)
    with torch.no_grad():
        corrections, probs, targets = compared(module, batch_of(recording))
    assert nll(corrections, probs, targets) < 0.7 * nll(0, probs, targets)
    assert best.best_nll == pytest.approx(nll(corrections, probs, targets), rel=1e-3)


def steps_of(folder, pilot, validation, averaging, passes=3):
    """The weights after each update of a fit, and those that it keeps."""
    seed_everything(0, verbose=False)
    steps = []
    copilot = HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=16)
    copilot.register_forward_pre_hook(lambda *_: steps.append(flat(copilot)) if copilot.training else None)
    fitted(folder, pilot, copilot, rows_of(12), validation, passes=passes, averaging=averaging)
    return steps[1:], flat(copilot)  # each pass but the first sees what the update before it has left


def flat(copilot):
    return torch.cat([weight.detach().flatten() for weight in copilot.parameters()])


@pytest.mark.parametrize("validated", [False, True])
def test_a_fit_keeps_the_mean_of_its_updates_in_which_later_ones_count_more(pilot, validated, tmp_path):
    validation = rows_of(12) if validated else []
    steps, last = steps_of(tmp_path / "last", pilot, validation, None)
    again, mean = steps_of(tmp_path / "mean", pilot, validation, 2.0)
    assert all(torch.equal(*both) for both in zip(steps, again, strict=True))  # the updates themselves do not change
    expected, every = torch.zeros_like(last), [*steps, last]
    for update, weights in enumerate(every, start=1):
        expected += 3 / (update + 2) * (weights - expected)
    assert len(every) == 6
    torch.testing.assert_close(mean, expected)
    assert not torch.allclose(mean, last, rtol=0.01)


def test_batches_of_a_fit_hold_targets_of_all_lengths(pilot, tmp_path):
    rows = [
        {"source_ids": [5, number], "target_ids": [7] * number, "id": number, "benchmark": 0}
        for number in range(1, 33)
    ]
    data = RecordedData(
        recorded(tmp_path, pilot, rows), rows, [], rows, DEPTHS, 8, 1, 0, lambda rows, device: None
    )  # fmt: skip
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)
    spans = [batch.mask_BN.sum(1).amax() - batch.mask_BN.sum(1).amin() for batch in data.train_dataloader()]
    assert len(spans) == 4
    assert min(spans) > 8


def test_a_copilot_that_never_helps_on_validation_stays_a_no_op(pilot, tmp_path):
    train = rows_of(8)
    guesses = recorded(tmp_path / "guesses", pilot, train)
    likeliest = [guesses.record_of(row_key(row), DEPTHS)["likeliest"][0, 0].item() for row in train]
    right = [dict(row, target_ids=[token]) for row, token in zip(train, likeliest, strict=True)]
    copilot = HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=32)
    module, best, recording = fitted(tmp_path / "fit", pilot, copilot, train, right, patience=3, passes=40)
    corrections, *_ = compared(module, batch_of(recording))
    assert (best.best_pass, best.passes) == (0, 3)
    assert corrections.abs().max() < 1e-6  # rounding of p̂


def test_a_trained_copilot_gives_way_to_a_better_one_only(pilot, tmp_path):
    copilot, rows = HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=32), rows_of(16)
    _, best, _ = fitted(tmp_path / "a", pilot, copilot, rows, rows)
    before = flat(copilot)
    _, worse, _ = fitted(tmp_path / "b", pilot, copilot, rows, rows, passes=1, rate=0.08, checked_before=-1)
    assert worse.passes == 1
    assert worse.best_nll == pytest.approx(best.best_nll, rel=1e-5)
    assert torch.equal(flat(copilot), before)
    _, better, _ = fitted(tmp_path / "c", pilot, copilot, rows, rows, passes=1, rate=1e-3, checked_before=-1)
    assert better.best_nll < best.best_nll
    assert not torch.equal(flat(copilot), before)


def test_a_fit_is_the_same_again_and_without_validation_rows_takes_all_passes(pilot, tmp_path):
    weights = []
    for name in ("a", "b"):
        seed_everything(0, verbose=False)
        copilot = HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=16)
        _, best, _ = fitted(tmp_path / name, pilot, copilot, rows_of(12), [], passes=3)
        weights.append(torch.cat([weight.detach().flatten() for weight in copilot.parameters()]))
    assert best.passes == 0
    assert torch.equal(*weights)
