"""A fit that compares options: ℓ of the choice, its gradient, which records serve it, and what it changes."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from family_models import perturb, tiny_pilot
from lightning import Trainer, seed_everything
from small_recording import DEPTHS, recorded
from small_training import learner

from tcopilot.data.prepare import wrong_options
from tcopilot.functional import fuse_probabilities
from tcopilot.models.head_copilot import HeadCopilot
from tcopilot.training import compared_tokens
from tcopilot.training.fit import CopilotFit, KeepBest, choice_errors, option_sums
from tcopilot.training.recorded_data import RecordBatch, RecordedData, RecordedRows


@pytest.fixture(scope="module")
def pilot():
    return tiny_pilot(vocab_size=600).eval().requires_grad_(False)


def questions(count, seed=0):
    """Rows of two to four options, the last row of none; the right option is the one that ends in token 7."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size):
        return torch.randint(10, 600, (size,), generator=generator).tolist()

    rows = []
    for number in range(count):
        options = [[*draw(1 + number % 2), 8, 1] for _ in range(2 + number % 3)]
        right = number % len(options)
        options[right][-2] = 7
        rows.append({"source_ids": draw(4), "target_ids": options[right], "option_ids": options})
    rows[-1]["option_ids"] = None  # as where a mixture has benchmarks without options
    return [row | {"id": number, "benchmark": 0} for number, row in enumerate(rows)]


def with_options(rows):
    return [text for row in rows for text in (row, *wrong_options(row))]


def fit_of(pilot, scale=0.1, **options):
    torch.manual_seed(0)
    copilot = perturb(HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=16), scale)
    module = CopilotFit(copilot, pilot, learner(1e-2), 1, **options)
    module.log, module._trainer = (lambda *given, **more: None), SimpleNamespace(world_size=1)
    return module


def batch_of(folder, pilot, rows):
    served = RecordedRows(recorded(folder, pilot, with_options(rows)), rows, DEPTHS, options=True)
    return RecordBatch.of([served[number] for number in range(len(rows))])


def log_right(module, batch):
    """log p̃ of every token at λ = 1, with gradients, over all 600 tokens."""
    corrections, probs, targets = module._compared(batch).compare(module._hidden(batch))
    fused = fuse_probabilities(probs.log(), corrections, 1.0)
    return fused[torch.arange(len(targets)), targets]


def test_a_row_serves_its_target_first_and_its_wrong_options_after_it(pilot, tmp_path):
    rows = questions(6)
    batch = batch_of(tmp_path, pilot, rows)
    assert batch.row_B.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4, 5]
    first = [not before or batch.row_B[before] != batch.row_B[before - 1] for before in range(len(batch.row_B))]
    assert batch.right_B.tolist() == first
    texts = [batch.kept.targets_T[batch.record_T == record].tolist() for record in range(len(batch.row_B))]
    assert [text for text, right in zip(texts, first, strict=True) if right] == [row["target_ids"] for row in rows]
    for number, row in enumerate(rows[:-1]):
        mine = [text for text, of in zip(texts, batch.row_B.tolist(), strict=True) if of == number]
        assert sorted(mine) == sorted(row["option_ids"])


def test_without_the_setting_rows_serve_their_targets_alone(pilot, tmp_path):
    rows = questions(6)
    served = RecordedRows(recorded(tmp_path, pilot, with_options(rows)), rows, DEPTHS)
    batch = RecordBatch.of([served[number] for number in range(len(rows))])
    assert batch.right_B.all()
    assert served.tokens == sum(len(row["target_ids"]) for row in rows)


def test_the_choice_is_a_softmax_over_the_options_of_a_row(pilot, tmp_path):
    batch = batch_of(tmp_path, pilot, questions(5))
    module = fit_of(pilot)
    with torch.no_grad():
        log_T = log_right(module, batch)
    errors, nll = choice_errors(option_sums(log_T, batch), batch)
    for row in range(5):
        mine = (batch.row_B == row).nonzero()[:, 0].tolist()
        sums = torch.stack([log_T[batch.record_T == record].double().sum() for record in mine])
        probs = sums.softmax(0)
        right = torch.tensor([1.0, *[0.0] * (len(mine) - 1)], dtype=torch.float64)
        torch.testing.assert_close(errors[mine].double(), right - probs)
        torch.testing.assert_close(nll[row], -probs[0].log())
    assert nll[-1] == errors[-1] == 0  # a row without options


@pytest.mark.parametrize(("own_mistakes", "scale"), [(False, 0.1), (True, 0.1), (False, 1.5)])
def test_the_gradient_is_that_of_both_likelihoods(pilot, own_mistakes, scale, tmp_path):
    batch = batch_of(tmp_path, pilot, questions(7))
    module = fit_of(pilot, scale, wrong_options=True, own_mistakes=own_mistakes)
    with torch.no_grad():  # with large corrections the floor of Eq. 8 matters
        corrections, probs, targets = module._compared(batch).compare(module._hidden(batch))
        at_floor = (probs + corrections)[torch.arange(len(targets)), targets].log() < log_right(module, batch) - 1e-3
    assert at_floor.any() == (scale > 1)
    logged = {}
    module.log = lambda name, value, **options: logged.update({name: value.item()})
    module.training_step(batch, 0).backward()
    found = [weight.grad.clone() for weight in module.copilot.parameters()]
    module.copilot.zero_grad()
    alone = fit_of(pilot, own_mistakes=own_mistakes)
    alone.copilot = module.copilot
    of_targets = RecordBatch.of([list(row)[:1] for row in chain([records_of(batch, number) for number in range(7)])])
    log_T = log_right(module, batch)
    sums = torch.zeros(len(batch.row_B)).index_add(0, batch.record_T, log_T)
    choice = torch.stack([-sums[batch.row_B == row].log_softmax(0)[0] for row in range(6)]).mean()  # 6 have options
    loss = alone.training_step(of_targets, 0) + choice
    assert logged["train/copilot_loss"] == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for gradient, weight in zip(found, module.copilot.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)


def records_of(batch, number):
    """The records of a row, as they were before they were put into a batch."""
    for record in (batch.row_B == number).nonzero()[:, 0].tolist():
        tokens = batch.record_T == record
        kept = {name: value[tokens] for name, value in zip(
            ("head_input", "targets", "normaliser", "likeliest"), batch.kept, strict=True)}  # fmt: skip
        yield kept | {"states": batch.states_BNQ[record][batch.mask_BN[record]]}


def test_a_large_vocabulary_is_compared_in_part_with_nearly_the_same_choice(pilot, tmp_path, monkeypatch):
    batch, found = batch_of(tmp_path, pilot, questions(7)), []
    module = fit_of(pilot, wrong_options=True)
    for size in (4096, 0):
        monkeypatch.setattr(compared_tokens, "SMALL_VOCABULARY", size)
        module.on_validation_epoch_start()
        module.validation_step(batch, 0)
        assert module._choices[2] == 6
        found.append(module._choices / 6)
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


def test_a_fit_learns_to_choose_and_is_kept_by_it(pilot, tmp_path):
    train, validation = questions(48), questions(24, seed=1)
    recording, nll = recorded(tmp_path, pilot, with_options([*train, *validation])), {}
    for options in (False, True):
        seed_everything(0)
        data = RecordedData(recording, train, validation, [], DEPTHS, 8, 20, 0, lambda rows, device: None, options)
        copilot = HeadCopilot.from_pilot(pilot, depths=list(DEPTHS), hidden=16)
        module = CopilotFit(copilot, pilot, learner(1e-2), data.updates, wrong_options=options)
        best = KeepBest(5, 8)
        trainer = Trainer(
            accelerator="cpu", max_steps=data.updates, callbacks=[best], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            val_check_interval=data.updates_per_pass, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        module.wrong_options = True
        module.on_validation_epoch_start()
        with torch.no_grad():
            module.validation_step(batch_of(tmp_path, pilot, validation), 0)
        of_pilot, nll[options], rows = module._choices.tolist()
        assert rows == 23
    assert nll[True] < 0.75 * nll[False] < 0.75 * of_pilot
    assert best.best_nll == pytest.approx(module._sums[1].item() / module._sums[2].item() + nll[True] / 23, rel=1e-4)
