import math

import pytest
import torch

from tcopilot.functional import token_errors
from tcopilot.models.fusion import LogitFusion
from tcopilot.training.error_statistics import ErrorStatistics

LOG_PROBS = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]]).log()
TARGETS = torch.tensor([[1, 2, 0]])
MASK = torch.tensor([[True, True, False]])
ERRORS = token_errors(LOG_PROBS.exp(), TARGETS)
ENERGY = (0.49 + 0.64 + 0.01 + 0.01 + 0.01 + 0.04) / 2


def statistics(corrections, weights=(0.0, 1.0), fusion=None):
    result = ErrorStatistics(weights, fusion)
    result.update(LOG_PROBS, corrections, TARGETS, MASK)
    return result


def test_a_copilot_that_knows_the_error_has_ratio_zero_cosine_one_and_best_weight_one():
    summary = statistics(ERRORS).summary()
    assert summary["error_ratio"] == pytest.approx(0.0, abs=1e-6)
    assert summary["cosine"] == pytest.approx(1.0)
    assert summary["best_weight"] == pytest.approx(1.0)
    assert summary["error_energy"] == pytest.approx(ENERGY)
    assert summary["correction_energy"] == pytest.approx(ENERGY)


def test_a_new_soft_head_whose_corrections_are_rounding_gets_weight_zero():
    torch.manual_seed(0)
    for _ in range(8):  # of which some point to the error and some away
        log_probs = torch.randn(1, 3, 50_000).log_softmax(-1)
        corrections = torch.softmax(log_probs, dim=-1) - log_probs.exp()
        assert corrections.any()
        found = ErrorStatistics((0.0, 1.0))
        found.update(log_probs, corrections, TARGETS, MASK)
        assert found.best_weight == 0.0


def test_half_the_error_has_a_quarter_of_its_ratio_and_best_weight_two():
    summary = statistics(ERRORS / 2).summary()
    assert summary["error_ratio"] == pytest.approx(0.25)
    assert summary["best_weight"] == pytest.approx(2.0)
    assert summary["cosine"] == pytest.approx(1.0)


def test_a_copilot_that_points_away_is_worse_than_none_and_gets_weight_zero():
    summary = statistics(-ERRORS).summary()
    assert summary["error_ratio"] == pytest.approx(4.0)
    assert summary["cosine"] == pytest.approx(-1.0)
    assert summary["best_weight"] == 0.0


@pytest.mark.parametrize("corrections", [None, torch.zeros(1, 3, 3)])
def test_no_copilot_and_a_silent_one_have_ratio_one_and_the_pilots_likelihood(corrections):
    result = statistics(corrections)
    summary = result.summary()
    assert summary["error_ratio"] == 1.0
    assert (summary["cosine"], summary["best_weight"], summary["correction_energy"]) == (0.0, 0.0, 0.0)
    pilot = -(math.log(0.2) + math.log(0.8)) / 2
    assert summary["pilot_nll"] == pytest.approx(pilot)
    assert result.nll() == {0.0: pytest.approx(pilot), 1.0: pytest.approx(pilot)}


def test_the_likelihood_is_reported_for_every_weight():
    corrections = torch.tensor([[[-0.4, 0.4, 0.0], [0.0, 0.1, -0.1], [0.0, 0.0, 0.0]]])
    result = statistics(corrections, weights=(1.0, 0.5, 0.0))
    nll = result.nll()
    assert nll[1.0] == pytest.approx(-(math.log(0.6) + math.log(0.7)) / 2)
    assert nll[0.5] == pytest.approx(-(math.log(0.4) + math.log(0.75)) / 2)
    assert nll[0.0] == pytest.approx(-(math.log(0.2) + math.log(0.8)) / 2)
    assert result.summary()["fused_nll"] == nll[1.0]


def test_the_fusion_space_decides_the_fused_likelihood():
    corrections = torch.tensor([[[0.0, 1.0, 0.0]] * 3])
    fused = statistics(corrections, (2.0,), LogitFusion()).nll()[2.0]
    rows = [(0.7, 0.2, 0.1), (0.1, 0.1, 0.8)]
    by_hand = [[p * math.exp(2 * (k == 1)) for k, p in enumerate(row)] for row in rows]
    expected = -(math.log(by_hand[0][1] / sum(by_hand[0])) + math.log(by_hand[1][2] / sum(by_hand[1]))) / 2
    assert fused == pytest.approx(expected)


def test_padding_counts_for_nothing():
    loud = ERRORS.clone()
    loud[0, 2] = 100.0
    assert statistics(loud).summary() == statistics(ERRORS).summary()


@pytest.mark.slow
def test_quantiles_are_those_of_ever_so_many_tokens():
    result, shape = statistics(ERRORS), (1, 2**24)  # torch.quantile takes no more tokens than these
    result._norms.append((torch.full((2, *shape), 0.5), torch.ones(shape, dtype=torch.bool)))
    assert result.summary()["error_norm_p50"] == 0.5


def test_batches_and_ranks_add_up_to_one_pass_over_all_rows():
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(4, 3, 5, generator=generator).log_softmax(-1)
    corrections = 0.3 * torch.randn(4, 3, 5, generator=generator)
    targets = torch.randint(0, 5, (4, 3), generator=generator)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()

    def over(*parts):
        result = ErrorStatistics([0.5])
        for part in parts:
            result.update(log_probs[part], corrections[part], targets[part], mask[part])
        return result

    whole = over(slice(0, 4)).summary()
    assert over(slice(0, 1), slice(1, 4)).summary() == pytest.approx(whole)
    first, second = over(slice(0, 2)), over(slice(2, 4))
    own = first.summary()
    first.reduce(lambda sums: sums + second._sums)
    reduced = first.summary()
    quantiles = {name for name in whole if "_norm_p" in name}
    assert len(quantiles) == 6
    for name in whole:  # sums are exact over ranks, quantiles are of a rank's own rows
        assert reduced[name] == pytest.approx(own[name] if name in quantiles else whole[name])


def test_the_best_weight_minimises_the_squared_error_left():
    generator = torch.Generator().manual_seed(1)
    corrections = ERRORS + 0.5 * torch.randn(1, 3, 3, generator=generator)
    best = statistics(corrections).best_weight
    ratios = [statistics(weight * corrections).summary()["error_ratio"] for weight in (0.95 * best, best, 1.05 * best)]
    assert best > 0
    assert ratios[1] < min(ratios[0], ratios[2])
    assert ratios[1] < 1


def test_the_interval_of_the_likelihood_is_the_normal_one_over_target_tokens():
    result = statistics(ERRORS)
    values = -LOG_PROBS[0, :2].gather(-1, TARGETS[0, :2, None]).squeeze(-1).double()
    assert result.nll_intervals()[0.0] == pytest.approx((values.mean().item(),) * 2)  # one row has no spread


def test_the_interval_of_the_likelihood_takes_a_rows_tokens_together():
    generator = torch.Generator().manual_seed(0)
    level_R1 = 1.5 * torch.randn(400, 1, generator=generator)  # rows are easy or hard as a whole
    logits_RNV = torch.stack([level_R1.expand(400, 6), torch.zeros(400, 6)], dim=-1)
    mask_RN = torch.arange(6) < torch.randint(1, 7, (400, 1), generator=generator)
    log_probs_RNV, targets_RN = logits_RNV.log_softmax(-1), torch.zeros(400, 6, dtype=torch.long)
    result = ErrorStatistics([0.0])
    for part in (slice(0, 150), slice(150, 400)):
        result.update(log_probs_RNV[part], None, targets_RN[part], mask_RN[part])
    low, high = result.nll_intervals()[0.0]
    nll_RN = (-log_probs_RNV[..., 0] * mask_RN).double()
    draws = torch.randint(0, 400, (2000, 400), generator=generator)
    means = nll_RN.sum(1)[draws].sum(1) / mask_RN.sum(1)[draws].sum(1)
    assert (high - low) / 2 == pytest.approx(1.96 * means.std().item(), rel=0.06)
    assert (low + high) / 2 == pytest.approx(nll_RN.sum().item() / mask_RN.sum().item())
    tokens = nll_RN[mask_RN]
    assert (high - low) / 2 > 1.8 * 1.96 * tokens.std().item() / math.sqrt(len(tokens))  # as if they were rows


def test_sizes_of_errors_and_corrections_are_kept_for_every_target_token_and_none_of_the_padding():
    result = statistics(ERRORS / 2)
    norms = result.norms()
    expected = ERRORS[0, :2].norm(dim=-1)
    torch.testing.assert_close(norms["error_norm"], expected)
    torch.testing.assert_close(norms["correction_norm"], expected / 2)
    low, high = sorted(expected.tolist())
    summary = result.summary()
    for percent in (10, 50, 90):
        value = low + percent / 100 * (high - low)
        assert summary[f"error_norm_p{percent}"] == pytest.approx(value)
        assert summary[f"correction_norm_p{percent}"] == pytest.approx(value / 2)


def test_a_rank_without_rows_has_no_quantiles_but_the_sums_of_all():
    idle, busy = ErrorStatistics([0.0, 1.0]), statistics(ERRORS)
    idle.reduce(lambda sums: sums + busy._sums)
    summary = idle.summary()
    assert summary["error_energy"] == pytest.approx(ENERGY)
    assert not [name for name in summary if "_norm_p" in name]
    assert len(idle.norms()["error_norm"]) == 0
