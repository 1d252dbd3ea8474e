"""What a trace says of target positions agrees with the models, in every family."""

from dataclasses import replace

import pytest
import torch
from family_models import EVERY_FAMILY

from tcopilot.data.batch import PromptTargetCollator
from tcopilot.evaluation.trace import CANDIDATES, positions, trace_targets
from tcopilot.functional import token_errors
from tcopilot.models.gates import build_gate
from tcopilot.models.modeling import fused_class
from tcopilot.training.error_statistics import correct_targets


@pytest.fixture
def fused(tiny_pilot, randomise):
    """A fused model of a family whose corrections are not zero."""

    def build(family: str, **options):
        pilot = tiny_pilot(family)
        model = fused_class(pilot.config.is_encoder_decoder).from_pilot(pilot, layers=2, **options)
        randomise(model.copilot)
        return model.eval()

    return build


@pytest.mark.parametrize("gate", [None, {"per": "token", "coefficients": [0.5, -1.0, 0.3, 2.0]}])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_last_layer_of_each_lens_is_the_model_itself(fused, make_batch, family, gate):
    model = fused(family)
    model.set_gate(build_gate(gate))
    batch = make_batch(model.pilot)
    trace = trace_targets(model, batch)
    log_probs_BNV, corrections_BNV = correct_targets(model, batch)
    torch.testing.assert_close(trace.log_probs_BNV, log_probs_BNV)
    torch.testing.assert_close(trace.corrections["observed"], corrections_BNV)
    for lens, wanted_BNV in ((trace.pilot_lens, log_probs_BNV), (trace.copilot_lens, corrections_BNV)):
        values_BN, ids_BN = lens[-1]
        torch.testing.assert_close(values_BN, wanted_BNV.amax(-1), atol=1e-4, rtol=1e-4)
        assert torch.equal(ids_BN, wanted_BNV.argmax(-1))
    assert (len(trace.pilot_lens), len(trace.copilot_lens)) == (4, 2)
    assert any(not torch.equal(ids, log_probs_BNV.argmax(-1)) for _, ids in trace.pilot_lens[:-1])


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_lens_follows_own_feedback_token_by_token(fused, make_batch, family):
    model = fused(family, feedback="own")
    trace = trace_targets(model, make_batch(model.pilot), ("observed",))
    own_BNV, observed_BNV = trace.corrections["own"], trace.corrections["observed"]
    torch.testing.assert_close(trace.copilot_lens[-1][0], own_BNV.amax(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(own_BNV[:, 0], observed_BNV[:, 0], atol=1e-5, rtol=1e-4)  # nothing was fed back yet
    assert not torch.allclose(own_BNV[:, 1:], observed_BNV[:, 1:], atol=1e-3)


def test_rows_that_begin_alike_have_every_lens(fused):
    """A batch whose prompts share 32 tokens or more, such as shots, is marked as sharing a prefix."""
    model = fused("llama")
    rows = [
        {"source_ids": [*range(3, 43), *[5 + row] * (1 + row)], "target_ids": [9, 8, 7], "id": row, "benchmark": 0}
        for row in range(3)
    ]
    batch = PromptTargetCollator(0, "left")(rows)
    assert batch.prefix == 40
    found, expected = trace_targets(model, batch), trace_targets(model, replace(batch, prefix=0))
    for lens, wanted in zip(found.pilot_lens, expected.pilot_lens, strict=True):
        torch.testing.assert_close(lens, wanted, atol=1e-4, rtol=1e-4)
    assert [len(row) for row in positions(found, batch, str)] == [3, 3, 3]


def test_positions_are_those_of_the_models(fused, make_batch):
    model = fused("llama", weight=0.7)
    batch = make_batch(model.pilot)
    trace = trace_targets(model, batch, ("own",))
    rows = positions(trace, batch, str)
    assert [len(row) for row in rows] == batch.target_mask_BN.sum(-1).tolist()
    row, i = 1, 2
    here, target = rows[row][i], batch.target_ids_BN[row, i]
    p_V, f_V, fused_V = (t[row, i] for t in (trace.log_probs_BNV, trace.corrections["observed"], trace.fused_BNV))
    best = p_V.exp().topk(CANDIDATES)
    assert here["token"] == str(int(target))
    assert [token for token, _ in here["before"]] == list(map(str, best.indices.tolist()))
    assert [p for _, p in here["before"]] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert [abs(f) for _, f in here["correction"]] == pytest.approx(
        f_V.abs().topk(CANDIDATES).values.tolist(), rel=1e-4
    )
    assert here["nll"] == pytest.approx([-p_V[target].item(), -fused_V[target].item()], rel=1e-4)
    assert here["right"] == [bool(p_V.argmax() == target), bool(fused_V.argmax() == target)]
    error_V = token_errors(p_V.exp()[None, None], target[None, None])[0, 0]
    assert here["feedback"]["observed"] == pytest.approx(
        [f_V.norm().item(), torch.cosine_similarity(f_V, error_V, dim=0).item()], rel=1e-3
    )
    shift = (0.5 * (p_V.exp() + fused_V.exp()) * (fused_V - p_V).abs()).sum()
    assert here["shift"] == pytest.approx(shift.item(), rel=1e-4)
    assert here["range"] == pytest.approx((p_V.max() - p_V.min()).item(), rel=1e-4)


def test_at_weight_0_nothing_moves(fused, make_batch):
    model = fused("t5", weight=0.0)
    batch = make_batch(model.pilot)
    for position in (p for row in positions(trace_targets(model, batch), batch, str) for p in row):
        assert position["after"] == position["before"]
        assert position["shift"] == 0
        assert position["nll"][0] == position["nll"][1]
        assert position["feedback"]["observed"][0] > 0  # the Copilot still speaks, nobody listens
