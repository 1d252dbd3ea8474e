"""Algorithm 1 as it runs: what a round does to the Pilot, the Copilot, the schedules and the reported losses."""

import math
from functools import partial

import pytest
import torch
from small_training import (
    FAMILIES,
    LLAMA_FIRST,
    T5_FIRST,
    EachRound,
    InOrder,
    Losses,
    furthest,
    learner,
    random_batch,
    same,
    small_module,
    task_data,
    tiny_model,
    tiny_pilot,
    train_on,
    trainer_for,
    vocabulary_size,
    weights,
)
from torch import nn
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_scheduler

from tcopilot.data import GeneratedTask, TCopilotDataModule, word_tokenizer
from tcopilot.mistake_log.log import MistakeLog
from tcopilot.mistake_log.policies import Fifo, Prioritised
from tcopilot.models.decoding import correct_text
from tcopilot.models.states import trace_pilot
from tcopilot.training.error_statistics import ErrorStatistics, correct_targets
from tcopilot.training.module import TrainingDivergedError

SGD = partial(learner, lr=1.0, clip=None, optimizer=torch.optim.SGD)  # the update is the negative gradient


def batches_of(family, count, rows=4, **options):
    return [random_batch(family, rows=rows, seed=seed, **options) for seed in range(count)]


def trained(family, batches, log=None, model=None, trainer=None, callbacks=(), **options):
    """Losses and model after a round on each batch."""
    model = tiny_model(family, head_std=0.1) if model is None else model
    log = MistakeLog(capacity_rounds=100, policy=InOrder()) if log is None else log
    module = small_module(model, len(batches), **options)
    return train_on(module, batches, log, callbacks, **(trainer or {})), model


def cross_entropy(family, pilot, batch):
    """The Pilot's loss per target token, from the row alone and the model's own loss."""
    total = 0.0
    for row in range(len(batch)):
        source = batch.source_ids_BM[row, batch.source_mask_BM[row]][None]
        target = batch.target_ids_BN[row, batch.target_mask_BN[row]][None]
        if family == "t5":
            loss = pilot(input_ids=source, labels=target).loss
        else:
            labels = torch.cat([torch.full_like(source, -100), target], dim=1)
            loss = pilot(input_ids=torch.cat([source, target], dim=1), labels=labels).loss
        total = total + loss * target.numel()
    return total / batch.tokens


def copilot_rmse(copilot, record):
    """Eq. 7 written out, all positions at once."""
    errors = record.errors_BNV
    hidden, _ = copilot(copilot.inputs(errors[:, :-1]), record.source_BMP, record.source_mask_BM, record.states_BNP)
    corrections = copilot.correct(hidden, record.probs_BNV.clamp_min(1e-38).log())
    squares = (corrections - errors).square().sum(-1)[record.target_mask_BN]
    return squares.mean().sqrt()


# Who learns from what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_moves_both_models(family):
    model = tiny_model(family, head_std=0.1)
    before = weights(model)
    trained(family, batches_of(family, 1), model=model)
    after = weights(model)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in still if name.startswith("pilot.")]
    assert not [name for name in still if name.startswith("copilot.head") or name.startswith("copilot.states_in")]


@pytest.mark.parametrize("family", T5_FIRST)
def test_the_copilot_never_changes_the_pilot(family):
    before = weights(tiny_model(family, head_std=0.1).pilot)
    _, model = trained(family, batches_of(family, 3), pilot=learner(lr=0.0), steps_per_round=3)
    assert same(before, weights(model.pilot))

    batches = batches_of(family, 5)
    with_copilot, fused = trained(family, batches, steps_per_round=4)
    without, bare = trained(family, batches, model=tiny_model(family, copilot=False), copilot=None)
    assert with_copilot.pilot == without.pilot
    assert same(weights(fused.pilot), weights(bare.pilot))


@pytest.mark.slow
@pytest.mark.parametrize("family", LLAMA_FIRST)
def test_the_pilot_changes_the_copilot_through_the_log_alone(family):
    before = weights(tiny_model(family, head_std=0.1).copilot)
    losses, model = trained(family, batches_of(family, 3), copilot=learner(lr=0.0), steps_per_round=2)
    assert same(before, weights(model.copilot))
    assert losses.pilot[0] != losses.pilot[-1]

    batches = [random_batch(family)] * 4  # at lr 0 the Pilot logs what a frozen one does
    _, still = trained(family, batches, pilot=learner(lr=0.0))
    _, frozen = trained(family, batches, pilot=None)
    assert furthest(weights(still.copilot), weights(frozen.copilot)) < 1e-4  # without a graph other kernels run
    assert not same(before, weights(still.copilot))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["linear", "soft"])
def test_the_joint_backward_gives_each_model_the_gradient_of_its_own_loss(family, head):
    batch = random_batch(family, rows=5, seed=7)
    model = tiny_model(family, head_std=0.1, head=head)
    pilot, copilot = weights(model.pilot), weights(model.copilot)
    log = MistakeLog(policy=InOrder())
    losses, _ = trained(family, [batch], log, model, pilot=SGD(), copilot=SGD())

    fresh = tiny_model(family, head_std=0.1, head=head)
    loss = cross_entropy(family, fresh.pilot, batch)
    loss.backward()
    assert losses.pilot == pytest.approx([loss.item()], rel=1e-5)
    for name, parameter in fresh.pilot.named_parameters():
        update = pilot[name] - model.pilot.get_parameter(name)
        torch.testing.assert_close(update, parameter.grad, atol=1e-5, rtol=1e-3, msg=name)

    loss = copilot_rmse(fresh.copilot, log.sample(5))
    loss.backward()
    assert losses.copilot == pytest.approx([loss.item()], rel=1e-5)
    for name, parameter in fresh.copilot.named_parameters():
        update = copilot[name] - model.copilot.get_parameter(name)
        gradient = torch.zeros_like(update) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(update, gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_extra_copilot_steps_follow_the_gradient_of_the_same_loss():
    batch = random_batch("llama", rows=5, seed=7)
    model = tiny_model("llama", head_std=0.1)
    log = MistakeLog(policy=InOrder())
    slow = SGD(lr=0.1)
    trained("llama", [batch], log, model, pilot=SGD(), copilot=slow, steps_per_round=3)

    fresh = tiny_model("llama", head_std=0.1)
    for _ in range(3):
        fresh.copilot.zero_grad()
        copilot_rmse(fresh.copilot, log.sample(5)).backward()
        with torch.no_grad():
            for parameter in fresh.copilot.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    assert furthest(weights(fresh.copilot), weights(model.copilot)) < 1e-5


# Batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", T5_FIRST)
def test_micro_batches_of_2_equal_one_batch_of_8(family):
    lengths = [1, 12, 2, 1, 1, 3, 8, 1]  # a mean of means would weigh the short rows up
    batches = [random_batch(family, rows=8, seed=seed, targets=lengths) for seed in range(4)]
    results = {}
    for size in (None, 2):
        log = MistakeLog(capacity_rounds=100, policy=InOrder())
        options = {"copilot_batch_size": 64, "steps_per_round": 2, "micro_batch_size": size}
        slow = {"pilot": learner(lr=1e-2, optimizer=torch.optim.SGD), "copilot": SGD(lr=0.1)}
        losses, model = trained(family, batches, log, **options, **slow)
        results[size] = losses, weights(model), len(log)
    assert results[None][2] == results[2][2] == 32
    assert furthest(results[None][1], results[2][1]) < 1e-5
    assert results[2][0].pilot == pytest.approx(results[None][0].pilot, rel=1e-5)
    assert results[2][0].copilot == pytest.approx(results[None][0].copilot, rel=1e-5)


@pytest.mark.slow
def test_micro_batches_equal_one_batch_under_adamw_with_clipping():
    batches = batches_of("t5", 4, rows=8)
    models = [trained("t5", batches, micro_batch_size=size, copilot_batch_size=64)[1] for size in (None, 2, 3)]
    for model in models[1:]:
        assert furthest(weights(models[0]), weights(model)) < 1e-3  # AdamW divides small gradients by small ones


@pytest.mark.parametrize("family", LLAMA_FIRST)
@pytest.mark.parametrize("size", [None, 1])
def test_the_pilots_loss_is_the_mean_over_target_tokens_not_over_rows(family, size):
    batch = random_batch(family, rows=4, seed=5, targets=[1, 1, 1, 20])
    losses, _ = trained(family, [batch], micro_batch_size=size)
    expected = cross_entropy(family, tiny_pilot(family), batch).item()
    assert losses.pilot == pytest.approx([expected], rel=1e-5)
    rows = sum(cross_entropy(family, tiny_pilot(family), row).item() for row in batch.split(1)) / 4
    assert abs(rows - expected) > 0.02


# Optimisers --------------------------------------------------------------------------------------------------------


def step_norm(before, model):
    return math.sqrt(sum((before[name] - p).square().sum().item() for name, p in model.named_parameters()))


def test_gradients_are_clipped_for_each_model_by_itself():
    batch = random_batch("llama")
    norms = {}
    for clips in ((None, None), (0.01, None), (None, 0.02), (0.01, 0.02)):
        model = tiny_model("llama", head_std=0.1)
        before = weights(model.pilot), weights(model.copilot)
        trained("llama", [batch], model=model, pilot=SGD(clip=clips[0]), copilot=SGD(clip=clips[1]))
        norms[clips] = step_norm(before[0], model.pilot), step_norm(before[1], model.copilot)
    free = norms[None, None]
    assert free[0] > 0.1
    assert free[1] > 0.1
    assert norms[0.01, None] == pytest.approx((0.01, free[1]), rel=1e-3)
    assert norms[None, 0.02] == pytest.approx((free[0], 0.02), rel=1e-3)
    assert norms[0.01, 0.02] == pytest.approx((0.01, 0.02), rel=1e-3)


def test_extra_copilot_steps_are_clipped_too():
    model = tiny_model("llama", head_std=0.1)
    before = weights(model.copilot)
    trained("llama", [random_batch("llama")], model=model, copilot=SGD(clip=0.01), steps_per_round=5)
    assert 0.02 < step_norm(before, model.copilot) <= 0.05 + 1e-6


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_both_schedules_step_once_a_round_whatever_else_happens_in_it(micro_batch_size):
    rounds, rates = 8, []

    def note(trainer, module):
        rates.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers))

    linear = learner(lr=0.1, schedule=partial(get_scheduler, name="linear", num_warmup_steps=4))
    cosine = partial(get_cosine_with_min_lr_schedule_with_warmup, num_warmup_steps=2, min_lr_rate=0.1)
    trained(
        "llama", batches_of("llama", rounds), callbacks=[EachRound(note)], pilot=linear,
        copilot=learner(lr=0.01, schedule=cosine), steps_per_round=2, micro_batch_size=micro_batch_size,
    )  # fmt: skip

    def linear_at(k):
        return 0.1 * (k / 4 if k < 4 else (rounds - k) / (rounds - 4))

    def cosine_at(k):
        share = 0.5 * (1 + math.cos(math.pi * (k - 2) / (rounds - 2)))
        return 0.01 * (k / 2 if k < 2 else 0.1 + 0.9 * share)

    for k, (pilot, copilot) in enumerate(rates, start=1):
        assert pilot == pytest.approx(linear_at(k), abs=1e-9)
        assert copilot == pytest.approx(cosine_at(k), abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_copilot_makes_exactly_its_steps_per_round_and_round_counts_rounds(steps):
    seen = []

    def note(trainer, module):
        pilot, copilot = (next(iter(optimizer.state.values()))["step"].item() for optimizer in trainer.optimizers)
        seen.append((module.round + 1, trainer.global_step, pilot, copilot, trainer.callback_metrics["round"].item()))

    trained("llama", batches_of("llama", 4), callbacks=[EachRound(note)], steps_per_round=steps)
    assert seen == [(k, k * (1 + steps), k, k * steps, k) for k in (1, 2, 3, 4)]


def test_every_copilot_step_draws_anew():
    class Counting(Fifo):
        asked = []

        def draw(self, log, records, generator):
            self.asked.append(records)
            return super().draw(log, records, generator)

    log = MistakeLog(policy=Counting())
    trained("llama", batches_of("llama", 3), log, steps_per_round=4, copilot_batch_size=6)
    assert Counting.asked == [6] * 12


# What is switched off ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", T5_FIRST)
def test_a_frozen_pilot_stays_as_it_is_while_its_copilot_learns(family):
    model = tiny_model(family, dropout=0.2)
    before = weights(model.pilot)
    modes = []
    watch = EachRound(
        lambda trainer, module: modes.append((module.model.pilot.training, module.model.copilot.training))
    )
    options = {"pilot": None, "copilot": learner(lr=2e-2), "steps_per_round": 2}
    losses, _ = trained(family, [random_batch(family)] * 30, model=model, callbacks=[watch], **options)
    assert same(before, weights(model.pilot))
    assert set(modes) == {(False, True)}
    assert len(set(losses.pilot)) == 1  # no dropout: the same batch gives the same loss each time
    assert losses.copilot[-1] < 0.8 * losses.copilot[0]


@pytest.mark.slow
def test_models_return_to_their_modes_after_validation():
    data = task_data("llama", rounds=4)
    modes = []
    watch = EachRound(
        lambda trainer, module: modes.append((module.model.pilot.training, module.model.copilot.training))
    )
    for pilot in (None, learner()):
        modes.clear()
        module = small_module(tiny_model("llama", vocab=vocabulary_size(data)), 4, pilot=pilot)
        module.model.pilot.eval()  # as from_pretrained leaves it
        trainer = trainer_for([watch], MistakeLog(), limit_val_batches=1, val_check_interval=1)
        trainer.fit(module, datamodule=data)
        assert modes == [(pilot is not None, True)] * 4


@pytest.mark.slow
@pytest.mark.parametrize("family", LLAMA_FIRST)
@pytest.mark.parametrize("built", [True, False])
def test_without_a_learner_for_the_copilot_training_is_plain_fine_tuning(family, built):
    log = MistakeLog()
    model = tiny_model(family, copilot=built)
    copilot = weights(model.copilot) if built else None
    batch = random_batch(family)
    losses, _ = trained(family, [batch] * 20, log, model, copilot=None, steps_per_round=4)
    assert len(log) == 0
    assert losses.copilot == []
    assert losses.pilot[-1] < 0.7 * losses.pilot[0]
    assert not built or same(copilot, weights(model.copilot))

    reference = tiny_pilot(family)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        cross_entropy(family, reference, batch).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
    assert losses.pilot[5] == pytest.approx(cross_entropy(family, reference, batch).item(), rel=1e-3)


# Options -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", LLAMA_FIRST)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_training_on_own_outputs_changes_what_the_copilot_reads(family, share):
    torch.manual_seed(1)
    batches = batches_of(family, 6, targets=[4, 5, 6, 3])
    teacher, _ = trained(family, batches)
    own, _ = trained(family, batches, own_feedback=share)
    assert own.pilot == teacher.pilot
    assert all(math.isfinite(loss) for loss in own.copilot)
    assert max(abs(a - b) for a, b in zip(own.copilot, teacher.copilot, strict=True)) > 1e-4


def test_own_outputs_can_be_mixed_in_more_and_more_over_the_run():
    torch.manual_seed(1)
    batches = batches_of("llama", 4, targets=[4, 5, 6, 3])
    teacher, _ = trained("llama", batches, steps_per_round=1)
    mixed, _ = trained("llama", batches, steps_per_round=1, own_feedback=(0.0, 1.0))
    assert mixed.copilot[0] == teacher.copilot[0]
    assert abs(mixed.copilot[-1] - teacher.copilot[-1]) > 1e-5


def test_training_on_own_outputs_reads_the_outputs_of_the_teacher_forced_pass():
    batch = random_batch("llama", rows=5, seed=7, targets=[4, 5, 6, 3, 2])
    log = MistakeLog(policy=InOrder())
    losses, _ = trained("llama", [batch], log, own_feedback=1.0)
    copilot, record = tiny_model("llama", head_std=0.1).copilot, log.sample(5)
    memory = record.source_BMP, record.source_mask_BM, record.states_BNP
    log_probs = record.probs_BNV.log()
    own = copilot.correct(copilot(copilot.inputs(record.errors_BNV[:, :-1]), *memory)[0], log_probs)
    corrections = copilot.correct(copilot(copilot.inputs(own[:, :-1]), *memory)[0], log_probs)
    squares = (corrections - record.errors_BNV).square().sum(-1)[record.target_mask_BN]
    assert losses.copilot == pytest.approx([squares.mean().sqrt().item()], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", LLAMA_FIRST)
@pytest.mark.parametrize("own_feedback", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_bf16_mixed_trains_close_to_full_precision(family, own_feedback):
    batches = [random_batch(family, seed=s % 2, targets=[2, 3, 4, 5]) for s in range(8)]
    options = {"steps_per_round": 2, "own_feedback": own_feedback}
    full, _ = trained(family, batches, **options)
    mixed, model = trained(family, batches, trainer={"precision": "bf16-mixed"}, **options)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert mixed.pilot == pytest.approx(full.pilot, rel=0.05)
    assert mixed.copilot == pytest.approx(full.copilot, rel=0.05)
    assert mixed.pilot != full.pilot
    assert mixed.copilot[-1] < mixed.copilot[0]


@pytest.mark.parametrize("family", T5_FIRST)
def test_bf16_mixed_gives_every_copilot_weight_its_gradient_when_training_on_own_outputs(family):
    moved = []
    for precision in ("32-true", "bf16-mixed"):
        model = tiny_model(family, head_std=0.1)
        before = weights(model.copilot)
        trained(family, batches_of(family, 2), model=model, own_feedback=1.0, trainer={"precision": precision})
        after = weights(model.copilot)
        moved.append({name for name in before if not torch.equal(before[name], after[name])})
    assert moved[0] == moved[1] != set()


@pytest.mark.slow
@pytest.mark.parametrize("family", T5_FIRST)
def test_gradient_checkpointing_gives_the_same_losses(family):
    batches = batches_of(family, 4)
    plain, _ = trained(family, batches)
    saving = tiny_model(family, head_std=0.1)
    saving.pilot.gradient_checkpointing_enable({"use_reentrant": False})
    saving.copilot.body.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    hook = next(m for m in saving.copilot.body.modules() if isinstance(m, nn.Linear)).register_forward_hook(
        lambda *args: runs.append(1)
    )
    checkpointed, _ = trained(family, batches, model=saving)
    hook.remove()
    assert len(runs) == 2 * 4  # each layer runs again in the backward pass
    assert checkpointed.pilot == pytest.approx(plain.pilot, rel=1e-5)
    assert checkpointed.copilot == pytest.approx(plain.copilot, rel=1e-5)


# Divergence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "policy"),
    [
        ("pilot", InOrder),
        ("copilot", Prioritised),
        pytest.param("pilot", Prioritised, marks=pytest.mark.slow),
        pytest.param("copilot", InOrder, marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_is_not_finite_stops_training_before_any_update(part, policy):
    model = tiny_model("llama", head_std=0.1)
    poisoned = {}

    def poison(trainer, module):
        if module.round == 1:
            with torch.no_grad():
                next(getattr(model, part).parameters())[:] = float("nan")
            poisoned.update(weights(model))

    with pytest.raises(TrainingDivergedError, match=f"round 3: .*{part} loss nan.*No update") as caught:
        trained("llama", batches_of("llama", 4), MistakeLog(policy=policy()), model, callbacks=[EachRound(poison)])
    assert "pilot loss" in str(caught.value)
    assert "copilot loss" in str(caught.value)
    assert f"{part}.optimizer.lr" in str(caught.value)
    after = weights(model)
    assert poisoned
    assert all(torch.equal(poisoned[name].nan_to_num(7.0), after[name].nan_to_num(7.0)) for name in after)


def test_an_extra_copilot_step_that_is_not_finite_stops_training_too():
    huge = learner(lr=1e30, clip=None, optimizer=torch.optim.SGD)
    with pytest.raises(TrainingDivergedError, match=r"round 1: pilot loss \d.*, copilot loss nan"):
        trained("llama", batches_of("llama", 1), copilot=huge, steps_per_round=4)


@pytest.mark.parametrize("who", ["pilot", "copilot"])
def test_a_gradient_that_is_not_finite_stops_training_before_the_weights_are_not_either(who):
    model, said = tiny_model("llama", head_std=0.1), rf"{who} loss \d.*, {who} gradient norm nan.*No update"
    with pytest.raises(TrainingDivergedError, match=said):
        trained("llama", batches_of("llama", 6), model=model, **{who: learner(lr=1000.0)})
    assert all(weight.isfinite().all() for weight in model.parameters())


# Learning ------------------------------------------------------------------------------------------------------------


def task_run(family, rounds, callbacks=()):
    data = task_data(family, rounds, batch_size=16, rows=20 * rounds)
    model = tiny_model(family, vocab=vocabulary_size(data), width=32)
    rates = {"pilot": learner(1e-3), "copilot": learner(3e-3)}
    module = small_module(model, rounds, copilot_batch_size=64, steps_per_round=4, **rates)
    trainer = trainer_for(callbacks, MistakeLog(capacity_rounds=16), limit_val_batches=2, val_check_interval=rounds)
    trainer.fit(module, datamodule=data)
    return trainer, module, data


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_hundred_rounds_the_copilot_knows_part_of_the_pilots_error_on_new_rows(family):
    losses = Losses()
    trainer, _, _ = task_run(family, 100, [losses])
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert sum(losses.pilot[-10:]) < 0.6 * sum(losses.pilot[:10])
    assert metrics["val/error_ratio"] < 0.95
    assert metrics["val/cosine"] > 0.2
    assert metrics["val/best_weight"] > 0
    assert metrics["val/fused_nll"] < metrics["val/pilot_nll"]


@pytest.mark.parametrize("family", LLAMA_FIRST)
def test_validation_reports_what_a_computation_by_hand_gives(family):
    trainer, module, data = task_run(family, 12)
    reported = {name.removeprefix("val/"): value.item() for name, value in trainer.callback_metrics.items()}
    model = module.model.eval()
    sums = dict.fromkeys(("tokens", "nll", "fused", "error", "correction", "inner"), 0.0)
    for number, batch in enumerate(data.val_dataloader()):
        if number == 2:
            break
        with torch.no_grad():
            states = trace_pilot(model.pilot, batch, model.copilot.pooler)
            log_probs = states.logits_BNV.double().log_softmax(-1)
            corrections, _ = correct_text(
                model.copilot, "observed", log_probs.float(), batch.target_ids_BN[:, :-1], states.source_BMP,
                states.source_mask_BM, states.states_BNP,
            )  # fmt: skip
        for row, position in batch.target_mask_BN.nonzero().tolist():
            p, f, y = (
                log_probs[row, position].exp(),
                corrections[row, position].double(),
                states.targets_BN[row, position],
            )
            error = nn.functional.one_hot(y, len(p)) - p
            fused = torch.maximum(p + f, 0.05 * p)
            sums["tokens"] += 1
            sums["nll"] -= p[y].log().item()
            sums["fused"] -= (fused[y] / fused.sum()).log().item()
            sums["error"] += error.square().sum().item()
            sums["correction"] += f.square().sum().item()
            sums["inner"] += (error @ f).item()
    n, error, correction, inner = (sums[name] for name in ("tokens", "error", "correction", "inner"))
    assert reported["pilot_nll"] == pytest.approx(sums["nll"] / n, rel=1e-4)
    assert reported["fused_nll"] == pytest.approx(sums["fused"] / n, rel=1e-4)
    assert reported["error_energy"] == pytest.approx(error / n, rel=1e-4)
    assert reported["correction_energy"] == pytest.approx(correction / n, rel=1e-4)
    assert reported["error_ratio"] == pytest.approx((error - 2 * inner + correction) / error, rel=1e-4)
    assert reported["cosine"] == pytest.approx(inner / math.sqrt(error * correction), rel=1e-3)
    assert reported["best_weight"] == pytest.approx(max(inner / correction, 0), rel=1e-3)


def test_validation_of_a_bare_pilot_reports_its_error_and_no_correction():
    data = task_data("llama", 3)
    module = small_module(tiny_model("llama", copilot=False, vocab=vocabulary_size(data)), 3, copilot=None)
    trainer = trainer_for(limit_val_batches=2, val_check_interval=3)
    trainer.fit(module, datamodule=data)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["val/fused_nll"] == pytest.approx(metrics["val/pilot_nll"])
    assert metrics["val/error_ratio"] == 1
    assert metrics["val/cosine"] == metrics["val/best_weight"] == metrics["val/correction_energy"] == 0


def test_validation_sees_all_benchmarks_alike_and_reports_each():
    tasks = {
        name: GeneratedTask(name=name, kind="multiple_choice", train=40, validation=rows, test=8, seed=rows)
        for name, rows in (("many", 24), ("few", 8))
    }
    data = TCopilotDataModule(tasks, batch_size=8, eval_batch_size=8, rounds=2)
    data.prepare(word_tokenizer(data.vocabulary), "left")
    batches = list(data.val_dataloader())
    assert [batch.benchmark_B.bincount().tolist() for batch in batches] == [[6, 2]] * 4
    assert sorted(id for batch in batches for id in batch.ids_B.tolist()) == sorted(
        row["id"] for name in tasks for row in data.evaluation_rows("validation", name)
    )
    module = small_module(tiny_model("llama", head_std=0.1, vocab=vocabulary_size(data)), 2)
    trainer = trainer_for(log=MistakeLog(), limit_val_batches=2, val_check_interval=2)
    trainer.fit(module, datamodule=data)
    reported = {name: value.item() for name, value in trainer.callback_metrics.items()}
    for number, name in enumerate(tasks):
        expected = ErrorStatistics([1.0])
        for batch in batches[:2]:
            rows = batch.benchmark_B == number
            log_probs, corrections = correct_targets(module.model.eval(), batch)
            expected.update(log_probs[rows], corrections[rows], batch.target_ids_BN[rows], batch.target_mask_BN[rows])
        for figure in ("pilot_nll", "fused_nll", "error_ratio", "best_weight"):
            assert reported[f"val/{name}/{figure}"] == pytest.approx(expected.summary()[figure], rel=1e-4, abs=1e-6)
    assert min(reported["val/many/pilot_nll"], reported["val/few/pilot_nll"]) < reported["val/pilot_nll"]
