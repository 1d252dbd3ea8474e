"""λ beyond a constant: what is fitted, and that a gate acts alike wherever corrections are used."""

import json

import composed
import pytest
import torch
from family_models import of_families

from tcopilot.app.checks.config import config_problems
from tcopilot.evaluation.evaluate import PER
from tcopilot.functional import best_weight
from tcopilot.models.gates import EDGES, GATES, LEAST_TOKENS, Observations, PositionGate, TokenGate, build_gate
from tcopilot.models.modeling import fused_class

SETTINGS = {
    "position": {"per": "position", "values": [0.5, 1.5, 0.25, 1.0, 2.0, 1.0, 1.0, 1.0]},
    "token": {"per": "token", "coefficients": [0.5, -1.0, 0.3, 2.0]},
}
FAMILIES = of_families("t5", "bart", "llama", "qwen2")
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.fixture
def fuse(tiny_pilot, randomise):
    """A fused model in float64, where no tie turns on rounding, with a gate."""

    def build(family, per="token", **options):
        pilot = tiny_pilot(family)
        model = fused_class(pilot.config.is_encoder_decoder).from_pilot(pilot, layers=2, **options).eval()
        randomise(model.copilot)
        model.set_gate(build_gate(SETTINGS[per]))
        return model.double()

    return build


def observations(tokens=400, seed=0) -> Observations:
    """Corrections that are right where their norm is small and wrong where it is large."""
    generator = torch.Generator().manual_seed(seed)
    energy_T = torch.rand(tokens, generator=generator, dtype=torch.float64)
    norm_T = energy_T.sqrt()
    inner_T = energy_T * torch.where(norm_T < 0.5, 1.5, 0.1)
    ones_T = torch.ones_like(norm_T)
    features_TF = torch.stack([ones_T, 0.5 * ones_T, ones_T, norm_T], dim=-1)
    return Observations(inner_T, energy_T, torch.arange(tokens) % 6, features_TF)


def squared_error(gate_T, seen: Observations) -> float:
    return (gate_T**2 * seen.energy_T - 2 * gate_T * seen.inner_T).sum().item()


def test_rounding_errors_of_ever_so_many_tokens_are_no_corrections():
    seen = observations(200_000)
    seen.energy_T, seen.inner_T = 1e-15 * seen.energy_T, 1e-9 * seen.inner_T
    assert PositionGate.fit(seen).values == [0.0] * (len(EDGES) + 1)


def test_a_bucket_of_positions_has_its_own_closed_form():
    seen = observations()
    gate = PositionGate.fit(seen)
    of_all = best_weight(seen.inner_T.sum().item(), seen.energy_T.sum().item())
    third = (seen.positions_T == 2) | (seen.positions_T == 3)
    expected = best_weight(seen.inner_T[third].sum().item(), seen.energy_T[third].sum().item())
    assert gate.values[2] == pytest.approx(expected, abs=1e-4) != pytest.approx(of_all, abs=1e-4)
    assert len(gate.values) == len(EDGES) + 1
    assert gate.values[4:] == pytest.approx([of_all] * 4, abs=1e-4)  # no token at position 8 or later
    values_BN = gate(None, torch.zeros(1, 9, 2), torch.arange(9)[None]).squeeze(-1)
    assert values_BN[0].tolist() == pytest.approx([gate.values[i] for i in (0, 1, 2, 2, 3, 3, 3, 3, 4)])


def test_a_bucket_of_few_tokens_takes_the_value_of_all():
    seen = observations(tokens=6 * LEAST_TOKENS - 1)  # position 5 has one too few
    seen.positions_T[seen.positions_T == 4] = 0
    of_all = best_weight(seen.inner_T.sum().item(), seen.energy_T.sum().item())
    assert PositionGate.fit(seen).values[3] == pytest.approx(of_all, abs=1e-4)


def test_a_gate_by_token_beats_every_constant_where_the_norm_tells_right_from_wrong():
    seen = observations()
    gate = TokenGate.fit(seen)
    coefficients_F = torch.tensor(gate.coefficients, dtype=torch.float64)
    fitted = squared_error(2 * torch.sigmoid(seen.features_TF @ coefficients_F), seen)
    constant = best_weight(seen.inner_T.sum().item(), seen.energy_T.sum().item())
    assert fitted < 1.5 * squared_error(torch.full_like(seen.energy_T, constant), seen) < 0
    assert gate == TokenGate.fit(seen)


def test_a_copilot_that_says_nothing_gets_a_gate_of_one():
    seen = observations()
    seen.inner_T.zero_(), seen.energy_T.zero_()
    assert TokenGate.fit(seen).coefficients == [0.0] * 4
    assert set(PositionGate.fit(seen).values) == {0.0}


def test_observations_are_the_sums_that_the_gate_is_fitted_on():
    torch.manual_seed(0)
    log_probs_BNV, corrections_BNV = torch.randn(2, 3, 5).log_softmax(-1), 0.1 * torch.randn(2, 3, 5)
    targets_BN, mask_BN = torch.randint(5, (2, 3)), torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    seen = Observations.of(log_probs_BNV, corrections_BNV, targets_BN, mask_BN)
    assert seen.positions_T.tolist() == [0, 1, 0, 1, 2]
    error_V = torch.nn.functional.one_hot(targets_BN[1, 2], 5) - log_probs_BNV[1, 2].exp()
    assert seen.inner_T[-1].item() == pytest.approx((error_V * corrections_BNV[1, 2]).sum().item(), abs=1e-6)
    assert seen.features_TF[-1, 1].item() == pytest.approx(log_probs_BNV[1, 2].exp().max().item())
    joined = Observations.joined([seen, seen])
    assert len(joined.energy_T) == 10


@pytest.mark.parametrize("context", composed.some_fast(["strict", "inclusive"], "strict".__eq__))
@pytest.mark.parametrize("feedback", ["observed", "own"])
@pytest.mark.parametrize("per", GATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_acts_alike_in_one_pass_and_step_by_step(fuse, prompts, family, per, feedback, context):
    model = fuse(family, per, feedback=feedback, context=context)
    tokens = prompts(model.pilot, padded=False)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**tokens, **options, **wanted)
    plain = model.generate(**tokens, **options, **wanted, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), atol=1e-9, rtol=1e-7)
    assert torch.equal(model.generate(**tokens, **options, **STATIC), cached.sequences)
    model.set_gate(None)
    ungated = model.generate(**tokens, **options, **wanted)
    assert not torch.allclose(ungated.logits[0], cached.logits[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_scales_the_correction_and_nothing_else(fuse, prompts, family):
    model = fuse(family, "position", feedback="observed")
    tokens = prompts(model.pilot, padded=False)
    ids = tokens["input_ids"]
    start = ids.shape[1] - 3
    given = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {"target_start": start}
    with torch.no_grad():
        gated = model(**tokens, **given, output_corrections=True)
        model.set_gate(None)
        plain = model(**tokens, **given, output_corrections=True)
    factors = torch.tensor([SETTINGS["position"]["values"][i] for i in (0, 1, 2, 2)])[:, None]
    torch.testing.assert_close(gated.corrections, factors * plain.corrections)
    torch.testing.assert_close(gated.pilot_log_probs, plain.pilot_log_probs, rtol=0, atol=0)


@pytest.mark.parametrize("per", GATES)
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_pilot_stays_the_pilot_and_a_gate_survives_saving(fuse, prompts, family, per, tmp_path):
    model = fuse(family, per)
    tokens = prompts(model.pilot)
    options = {"do_sample": False, "max_new_tokens": 5}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.copilot.gate == model.copilot.gate == build_gate(SETTINGS[per])
    assert torch.equal(again.generate(**tokens, **options), model.generate(**tokens, **options))
    beams = {"num_beams": 3, **options}
    assert torch.equal(again.generate(**tokens, **beams), model.generate(**tokens, **beams, use_cache=False))
    model.weight = 0.0
    assert torch.equal(model.generate(**tokens, **options), model.pilot.generate(**tokens, **options))


def test_a_gate_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="'layer' is not one of position, token"):
        build_gate({"per": "layer"})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["fusion.per=token", "fusion=logits"], ["fusion.per=token", "fusion=probability"]),
        (["fusion.per=layer"], ["fusion.per=layer", ", ".join(PER)]),
    ],
)
def test_a_gate_that_cannot_be_fitted_is_refused_with_the_way_out(overrides, words):
    (problem,) = config_problems(composed.compose_config(*overrides, "paths.run_dir=/tmp/none"))
    assert all(word in problem for word in words)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_run_fits_its_gate_and_exports_it(family, tmp_path):
    overrides = [*composed.SMALL, "fusion.weight=[0,1]", "fusion.per=token"]
    overrides += ["experiment=demo_decoder_only"] if family == "llama" else []
    folder = composed.train(tmp_path / "run", *overrides)
    config = json.loads((folder / "export" / "config.json").read_text())
    fitted = config["copilot"]["gate"]
    assert fitted["per"] == "token"
    assert any(fitted["coefficients"])
    again = composed.evaluate(folder, tmp_path / "again", "fusion.weight=[0,1]")
    assert composed.results(again)["rows"] == composed.results(folder)["rows"]
    plain = composed.evaluate(folder, tmp_path / "plain", "fusion.per=all")
    of_pilot = [[row for row in composed.results(each)["rows"] if not row["weight"]] for each in (folder, plain)]
    assert of_pilot[0] == of_pilot[1]
    at_one = [[row for row in composed.results(each)["rows"] if row["weight"] == 1] for each in (folder, plain)]
    assert at_one[0] != at_one[1]


@pytest.mark.slow
def test_an_evaluation_of_bfloat16_weights_repeats_the_figures_of_the_run(tmp_path):
    given = [*composed.SMALL, "pilot=tiny_llama", "adapter@pilot.adapter=lora", "pilot.dtype=bfloat16"]
    folder = composed.train(tmp_path / "run", *given, "copilot.head=soft", "fusion.weight=[0,1]")
    again = composed.evaluate(folder, tmp_path / "again", "fusion.weight=[0,1]")
    assert composed.results(again)["rows"] == composed.results(folder)["rows"]
