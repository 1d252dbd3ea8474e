import math
import weakref

import pytest
import torch

from tcopilot import Copilot
from tcopilot.functional import token_errors
from tcopilot.mistake_log.log import MistakeRecord
from tcopilot.training import chunked_loss
from tcopilot.training.objectives import (
    CrossEntropy,
    KullbackLeibler,
    MeanSquaredError,
    RootMeanSquaredError,
    objective_sum,
)

OBJECTIVES = [RootMeanSquaredError, MeanSquaredError, KullbackLeibler, CrossEntropy]
PROBS = torch.tensor([[0.7, 0.2, 0.1]])
TARGET = torch.tensor([1])
ERROR = torch.tensor([[-0.7, 0.8, -0.1]])


@pytest.mark.parametrize("objective", [RootMeanSquaredError(), MeanSquaredError(), KullbackLeibler()])
def test_the_true_error_has_loss_zero(objective):
    torch.testing.assert_close(objective.row_losses(ERROR, PROBS, TARGET), torch.zeros(1), atol=1e-6, rtol=0)


def test_the_squared_error_sums_over_the_vocabulary():
    loss = MeanSquaredError().row_losses(torch.tensor([[-0.7, 0.5, 0.3]]), PROBS, TARGET)
    torch.testing.assert_close(loss, torch.tensor([0.09 + 0.16]))


def test_rmse_is_the_root_of_the_mean_and_mse_the_mean():
    total = torch.tensor(18.0)
    assert MeanSquaredError().reduce(total, 2).item() == 9.0
    assert RootMeanSquaredError().reduce(total, 2).item() == pytest.approx(3.0)
    assert KullbackLeibler().reduce(total, 2).item() == 9.0
    assert CrossEntropy().reduce(total, 2).item() == 9.0


def test_kl_goes_from_the_error_to_its_estimate():
    target = [math.exp(x) for x in (-0.7, 0.8, -0.1)]
    target = [x / sum(target) for x in target]
    expected = sum(p * math.log(p / (1 / 3)) for p in target)
    loss = KullbackLeibler().row_losses(torch.zeros(1, 3), PROBS, TARGET)
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_cross_entropy_is_that_of_the_distribution_fused_at_weight_one():
    loss = CrossEntropy().row_losses(torch.tensor([[-0.2, 0.3, -0.1]]), PROBS, TARGET)
    torch.testing.assert_close(loss, torch.tensor([-math.log(0.5 / (0.5 + 0.5 + 0.05 * 0.1))]))


def test_rmse_has_a_finite_gradient_at_an_exact_match():
    corrections = ERROR.clone().requires_grad_()
    objective = RootMeanSquaredError()
    objective.reduce(objective.row_losses(corrections, PROBS, TARGET).sum(), 1).backward()
    assert corrections.grad.isfinite().all()


@pytest.fixture
def case(tiny_pilot, randomise):
    """A Copilot, a record of 3 rows with 5, 3 and 4 targets, and hidden states that require a gradient."""

    def build(head):
        options = {"head": head, "train_error_input": False}
        copilot = randomise(Copilot.from_pilot(tiny_pilot("llama"), layers=2, **options)).eval()
        generator = torch.Generator().manual_seed(0)
        mask = torch.arange(5) < torch.tensor([[5], [3], [4]])
        record = MistakeRecord(
            source_BMP=torch.zeros(3, 1, 32),
            source_mask_BM=torch.ones(3, 1, dtype=torch.bool),
            states_BNP=torch.zeros(3, 5, 32),
            probs_BNV=torch.randn(3, 5, 56, generator=generator).softmax(-1),
            targets_BN=torch.randint(0, 56, (3, 5), generator=generator),
            target_mask_BN=mask,
            tokens_R=mask.flatten().nonzero().squeeze(-1),
            importance_B=torch.ones(3),
        )
        return copilot, record, torch.randn(3, 5, 32, generator=generator, requires_grad=True)

    return build


def naive_loss(objective, copilot, record, hidden):
    """The loss written token by token, with everything in memory."""
    corrections = copilot.correct(hidden, record.probs_BNV.log())
    losses = [
        objective.row_losses(corrections[b, i][None], record.probs_BNV[b, i][None], record.targets_BN[b, i][None])[0]
        for b, i in record.target_mask_BN.nonzero().tolist()
    ]
    return objective.reduce(torch.stack(losses).sum(), len(losses))


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 12])
@pytest.mark.parametrize("head", ["linear", "soft"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_chunked_loss_equals_the_naive_one_in_value_and_gradients(
    case, monkeypatch, objective, head, rows_per_chunk
):
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", rows_per_chunk * 56)
    copilot, record, hidden = case(head)
    wanted = [hidden, *copilot.head.parameters()]
    expected = naive_loss(objective(), copilot, record, hidden)
    expected_grads = torch.autograd.grad(expected, wanted)
    loss = objective().reduce(objective_sum(objective(), copilot, record, hidden), record.target_mask_BN.sum())
    grads = torch.autograd.grad(loss, wanted)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, expected_grads, atol=1e-6, rtol=1e-4)
    assert all(grad.abs().max() > 1e-4 for grad in grads)


@pytest.mark.parametrize("reduced", [lambda losses: losses, lambda losses: losses.mean()])
def test_an_objective_must_return_one_loss_for_each_token(case, reduced):
    class Own(MeanSquaredError):
        def row_losses(self, corrections_RV, probs_RV, targets_R):
            return reduced(corrections_RV - token_errors(probs_RV, targets_R))

    with pytest.raises(
        ValueError, match=r"Own.row_losses returned .* for 12 tokens; return one loss for each, \[12\]"
    ):
        objective_sum(Own(), *case("linear"))


@pytest.mark.parametrize("rows_per_chunk", [5, 100])
@pytest.mark.parametrize("padded", [True, False])
def test_the_importance_of_a_record_multiplies_its_losses(case, monkeypatch, padded, rows_per_chunk):
    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", rows_per_chunk * 56)
    copilot, record, hidden = case("linear")
    if not padded:
        record = record._replace(target_mask_BN=torch.ones(3, 5, dtype=torch.bool), tokens_R=torch.arange(15))
    of_rows = []
    for row in range(3):
        alone = {
            name: value[row : row + 1] for name, value in record._asdict().items() if name.endswith(("BN", "BNV"))
        }
        alone |= {"tokens_R": record.target_mask_BN[row].nonzero().squeeze(-1), "importance_B": torch.ones(1)}
        of_rows.append(objective_sum(MeanSquaredError(), copilot, record._replace(**alone), hidden[row : row + 1]))
    weighed = record._replace(importance_B=torch.tensor([0.5, 3.0, 1.5]))
    expected = 0.5 * of_rows[0] + 3 * of_rows[1] + 1.5 * of_rows[2]
    torch.testing.assert_close(objective_sum(MeanSquaredError(), copilot, weighed, hidden), expected)


def test_padding_has_no_part_in_the_loss(case):
    copilot, record, hidden = case("linear")
    before = objective_sum(MeanSquaredError(), copilot, record, hidden)
    padding = ~record.target_mask_BN
    record.probs_BNV[padding] = 1 / 56
    record.targets_BN[padding] = 0
    with torch.no_grad():
        hidden[padding] = 100.0
    after = objective_sum(MeanSquaredError(), copilot, record, hidden)
    torch.testing.assert_close(after, before)
    assert torch.autograd.grad(after, hidden)[0][padding].abs().max() == 0


def test_the_squared_error_of_a_copilot_that_outputs_zero_is_the_energy_of_the_errors(tiny_pilot, case):
    _, record, hidden = case("linear")
    fresh = Copilot.from_pilot(tiny_pilot("llama"), layers=2)
    errors = token_errors(record.probs_BNV, record.targets_BN)[record.target_mask_BN]
    torch.testing.assert_close(objective_sum(MeanSquaredError(), fresh, record, hidden), errors.square().sum())


class Saved:
    """A tensor that autograd saved for the backward pass; it lives as long as the graph that needs it."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_rows(compute):
    """Rows of width V in the largest tensor that autograd saves at all, and in all that are still kept at the end."""
    kept, sizes = weakref.WeakSet(), [0]

    def pack(tensor):
        saved = Saved(tensor)
        if tensor.shape[-1:] == (56,) and tensor.shape[0] != 32:  # [32, 56] is the head's matrix
            kept.add(saved)
            sizes.append(tensor.numel() // 56)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = compute()
    assert loss.requires_grad
    return max(sizes), sum(saved.tensor.numel() // 56 for saved in kept)


@pytest.mark.parametrize("head", ["linear", "soft"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_second_tensor_of_rows_times_vocabulary_is_kept(case, monkeypatch, objective, head):
    copilot, record, hidden = case(head)
    mask = record.target_mask_BN

    def plain():
        corrections = copilot.correct(hidden[mask], record.probs_BNV[mask].log())
        return objective().row_losses(corrections, record.probs_BNV[mask], record.targets_BN[mask]).sum()

    monkeypatch.setattr(chunked_loss, "CHUNK_ELEMENTS", 2 * 56)
    assert saved_rows(plain)[1] >= mask.sum()
    assert saved_rows(lambda: objective_sum(objective(), copilot, record, hidden)) == (2, 0)
