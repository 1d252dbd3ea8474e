import pytest
import torch

from tcopilot.functional import (
    best_weight,
    fuse_logits,
    fuse_probabilities,
    pool_states,
    root_mean_square,
    shift_right,
    token_errors,
)
from tcopilot.models.fusion import LogitFusion, ProbabilityFusion
from tcopilot.models.heads import SoftHead

PROBS = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]])


def test_the_error_is_one_minus_p_at_the_target_and_minus_p_elsewhere():
    errors = token_errors(PROBS, torch.tensor([[1, 2]]))
    torch.testing.assert_close(errors, torch.tensor([[[-0.7, 0.8, -0.1], [-0.1, -0.1, 0.2]]]))


def test_errors_sum_to_zero_and_leave_the_probabilities_untouched():
    before = PROBS.clone()
    errors = token_errors(PROBS, torch.tensor([[0, 0]]))
    torch.testing.assert_close(errors.sum(-1), torch.zeros(1, 2))
    assert torch.equal(PROBS, before)


def test_position_i_reads_the_errors_before_it_and_the_first_reads_the_start():
    past = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    shifted = shift_right(past, torch.tensor([9.0, -9.0]))
    assert shifted.tolist() == [[[9, -9], [1, 2], [3, 4]], [[9, -9], [5, 6], [7, 8]]]


def test_without_a_past_there_is_the_start_alone():
    assert shift_right(torch.zeros(2, 0, 1), torch.tensor([3.0])).tolist() == [[[3.0]], [[3.0]]]


@pytest.mark.parametrize(
    ("pooling", "layer_range", "expected"),
    [
        ("mean", "all", [4.0, -1.0]),
        ("sum", "all", [20.0, -5.0]),
        ("max", "all", [9.0, 2.0]),
        ("sum", "first_half", [3.0, 1.0]),
        ("sum", "second_half", [17.0, -6.0]),
        ("mean", "first_half", [1.5, 0.5]),
        ("max", "second_half", [9.0, 0.0]),
    ],
)
def test_states_are_pooled_over_the_chosen_layers(pooling, layer_range, expected):
    layers = [torch.tensor([[row]]) for row in ([1.0, 2.0], [2.0, -1.0], [3.0, -3.0], [9.0, -3.0], [5.0, 0.0])]
    assert pool_states(layers, pooling, layer_range).flatten().tolist() == expected


@pytest.mark.parametrize("layer_range", ["all", "first_half", "second_half"])
def test_one_layer_is_its_own_pool(layer_range):
    assert pool_states([torch.tensor([[[7.0]]])], "mean", layer_range).item() == 7.0


def test_the_mean_of_many_float16_layers_stays_in_their_range():
    pooled = pool_states([torch.full((1, 1, 1), 4000.0, dtype=torch.float16)] * 32)
    assert (pooled.item(), pooled.dtype) == (4000.0, torch.float16)


def test_pooling_leaves_the_layers_untouched():
    layers = [torch.ones(1, 1, 2), torch.ones(1, 1, 2)]
    pool_states(layers, "sum")
    assert torch.equal(layers[0], torch.ones(1, 1, 2))


def test_the_root_stands_outside_the_mean_over_tokens():
    per_token = torch.tensor([1.0, 9.0, 14.0])
    loss = root_mean_square(per_token.sum(), 3)
    assert loss.item() == pytest.approx(8**0.5)
    assert loss.item() != pytest.approx(per_token.sqrt().mean().item(), rel=1e-2)


def test_the_loss_has_a_finite_gradient_at_an_exact_match():
    residual = torch.zeros(4, requires_grad=True)
    root_mean_square(residual.square().sum(), 2).backward()
    assert torch.equal(residual.grad, torch.zeros(4))


def test_probability_fusion_adds_the_weighted_correction():
    correction = torch.tensor([[[-0.4, 0.3, 0.1], [0.2, 0.0, -0.2]]])
    fused = fuse_probabilities(PROBS.log(), correction, 0.5).exp()
    torch.testing.assert_close(fused, torch.tensor([[[0.5, 0.35, 0.15], [0.2, 0.1, 0.7]]]))


def test_a_correction_leaves_every_token_a_share_of_its_probability():
    fused = fuse_probabilities(torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[-1.0, 0.475]]]), 1.0).exp()
    torch.testing.assert_close(fused, torch.tensor([[[0.025, 0.975]]]))


def test_fused_rows_that_do_not_sum_to_one_are_renormalised():
    fused = fuse_probabilities(torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.5, 0.5]]]), 1.0).exp()
    torch.testing.assert_close(fused, torch.tensor([[[0.5, 0.5]]]))


def test_logit_fusion_adds_the_weighted_correction_to_the_logits():
    logits = torch.tensor([[[2.0, -1.0, 0.5]]])
    correction = torch.tensor([[[-1.0, 0.5, 0.5]]])
    expected = torch.softmax(torch.tensor([[[-2.0, 1.0, 2.5]]]), -1)
    torch.testing.assert_close(fuse_logits(logits.log_softmax(-1), correction, 4.0).exp(), expected)


@pytest.mark.parametrize("rule", [ProbabilityFusion(), LogitFusion()])
@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_distribution_is_finite_and_sums_to_one_for_extreme_logits(rule, weight, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 50, generator=generator)
    logits[0] *= 1e4
    logits[1, :, 7] = 1e4
    logits[2, :, :49] = -1e4
    corrections = torch.rand(4, 6, 50, generator=generator) * 2 - 1
    corrections[:, 0] = -1.0
    corrections[:, 1] = 1.0
    corrections[:, 2] = 0.0
    log_probs = torch.log_softmax(logits.to(dtype).float(), -1)
    fused = rule(log_probs, corrections.to(dtype), weight)
    assert fused.dtype == torch.float32
    assert fused.isfinite().all()
    torch.testing.assert_close(fused.exp().sum(-1), torch.ones(4, 6), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rule", [ProbabilityFusion(), LogitFusion()])
def test_weight_zero_and_a_zero_correction_leave_the_distribution_as_it_is(rule):
    log_probs = PROBS.log()
    torch.testing.assert_close(rule(log_probs, torch.rand(1, 2, 3), 0.0), log_probs)
    torch.testing.assert_close(rule(log_probs, torch.zeros(1, 2, 3), 1.0), log_probs)


def test_the_best_weight_is_the_minimum_of_the_squared_error():
    generator = torch.Generator().manual_seed(0)
    errors = torch.randn(200, generator=generator)
    corrections = 0.4 * errors + 0.3 * torch.randn(200, generator=generator)
    best = best_weight((errors @ corrections).item(), (corrections @ corrections).item())

    def squared_error(weight: float) -> float:
        return (errors - weight * corrections).square().sum().item()

    assert best > 0.1
    assert squared_error(best) < min(squared_error(0.98 * best), squared_error(1.02 * best))
    assert squared_error(1.98 * best) < squared_error(0.0) < squared_error(2.02 * best)


@pytest.mark.parametrize(("inner", "energy"), [(0.5, 0.0), (-0.5, 1.0), (0.0, 1.0), (1e-7, 1e-13)])
def test_the_best_weight_of_a_useless_copilot_is_zero(inner, energy):
    assert best_weight(inner, energy) == 0.0


@pytest.fixture
def soft_case():
    torch.manual_seed(0)
    head = SoftHead(8, 50)
    torch.nn.init.normal_(head.map.weight)
    log_probs = torch.log_softmax(3 * torch.randn(2, 5, 50), -1)
    return log_probs, head(torch.randn(2, 5, 8), log_probs, torch.randn(50, 8))


def test_corrections_of_the_soft_head_sum_to_zero_and_are_not_zero(soft_case):
    _, corrections = soft_case
    assert corrections.abs().sum(-1).min() > 0.1
    torch.testing.assert_close(corrections.sum(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
def test_the_soft_head_never_leaves_the_simplex_for_weights_up_to_one(soft_case, weight):
    log_probs, corrections = soft_case
    moved = log_probs.exp() + weight * corrections
    assert moved.min() >= -1e-6
    torch.testing.assert_close(moved.sum(-1), torch.ones(2, 5), atol=1e-5, rtol=0)


def test_the_soft_head_can_leave_the_simplex_beyond_one(soft_case):
    log_probs, corrections = soft_case
    assert (log_probs.exp() + 3 * corrections).min() < -1e-3
