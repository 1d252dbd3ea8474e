"""Fusion rules: what they say of themselves, and which classes a model's config may name."""

import json
import re
import sys
from types import ModuleType

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from tcopilot import TCopilotForCausalLM
from tcopilot.app.checks.config import fusion_rule
from tcopilot.app.checks.problems import ConfigError
from tcopilot.functional import fuse_probabilities
from tcopilot.models.fusion import FusionRule, LogitFusion, ProbabilityFusion, breach, build_fusion


class Tempered(FusionRule):
    """A rule with a setting, of a module outside the package."""

    correction_unit = "logits"

    def __init__(self, temperature=1.0):
        if temperature <= 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        self.temperature = temperature

    def __call__(self, log_probs_BNV, corrections_BNV, weight):
        return torch.log_softmax(log_probs_BNV + weight * corrections_BNV / self.temperature, dim=-1)


PATH = f"{Tempered.__module__}.Tempered"


@pytest.mark.parametrize(
    ("rule", "closed_form", "gates", "unit"),
    [(ProbabilityFusion(), True, True, "probability"), (LogitFusion(), False, False, "logits")],
)
def test_a_rule_says_what_it_can(rule, closed_form, gates, unit):
    assert (rule.has_closed_form, rule.takes_gates, rule.correction_unit) == (closed_form, gates, unit)


class Unfloored(FusionRule):
    def __call__(self, log_probs_BNV, corrections_BNV, weight):
        return (log_probs_BNV.exp() + weight * corrections_BNV).log()


class Unnormalised(FusionRule):
    def __call__(self, log_probs_BNV, corrections_BNV, weight):
        return log_probs_BNV + weight * corrections_BNV


class Sharpened(FusionRule):
    def __call__(self, log_probs_BNV, corrections_BNV, weight):
        return torch.log_softmax(2 * log_probs_BNV + corrections_BNV, dim=-1)


class OfOneToken(FusionRule):
    def __call__(self, log_probs_BNV, corrections_BNV, weight):
        return fuse_probabilities(log_probs_BNV, corrections_BNV * (log_probs_BNV[..., 30:31] < -1), weight)


@pytest.mark.parametrize(
    ("rule", "said"),
    [(Unfloored, "not finite everywhere"), (Unnormalised, "p̃ sums to"), (Sharpened, "does not give log p̂ back")],
)
def test_a_rule_of_ones_own_that_gives_no_distribution_is_refused(rule, said):
    with pytest.raises(ConfigError, match=rf"fusion\.rule\._target_=.*{rule.__name__}: .*{said}"):
        fusion_rule(OmegaConf.create({"rule": {"_target_": f"{__name__}.{rule.__name__}"}}))


@pytest.mark.parametrize("rule", [ProbabilityFusion(), LogitFusion(), Tempered(1.0), OfOneToken()])
def test_a_rule_that_gives_a_distribution_is_taken(rule):
    assert breach(rule) is None


@pytest.mark.parametrize("rule", [ProbabilityFusion(), LogitFusion(), Tempered(2.0)])
def test_a_rule_is_built_again_from_its_settings(rule):
    again = build_fusion(json.loads(json.dumps(rule.settings())))
    assert type(again) is type(rule)
    assert vars(again) == vars(rule)


def test_a_rule_of_ones_own_travels_with_the_export(tiny_pilot, prompts, randomise, tmp_path):
    model = TCopilotForCausalLM.from_pilot(tiny_pilot("llama"), layers=2, fusion=Tempered(0.5), weight=4.0).eval()
    randomise(model.copilot)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["fusion"] == {"_target_": PATH, "temperature": 0.5}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.fusion.temperature == 0.5
    tokens = prompts(model.pilot)
    assert torch.equal(loaded.generate(**tokens, max_new_tokens=6), model.generate(**tokens, max_new_tokens=6))


def test_an_export_does_not_choose_which_code_is_imported(tiny_pilot, tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('this ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = TCopilotForCausalLM.from_pilot(tiny_pilot("llama"), layers=2)
    model.config.fusion = {"_target_": "hostile.Rule"}
    model.save_pretrained(tmp_path / "export")
    with pytest.raises(ValueError, match=r"fusion\.rule\._target_=hostile\.Rule: .* import hostile before"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert "hostile" not in sys.modules


def test_the_lookup_runs_no_code_of_the_module_that_it_looks_into(monkeypatch):
    module = ModuleType("lazy")
    module.__getattr__ = lambda name: pytest.fail("the module was asked to make an attribute")
    monkeypatch.setitem(sys.modules, "lazy", module)
    with pytest.raises(ValueError, match=r"lazy\.Rule: is no class derived from tcopilot\.models\.fusion\.FusionRule"):
        build_fusion({"_target_": "lazy.Rule"})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (None, "fusion.rule=None: names no class; choose fusion=probability, fusion=logits"),
        ("probability", "fusion.rule=probability: names no class"),
        ({"_target_": 3}, "names no class"),
        ({"_target_": "os.system"}, "os.system: is no class derived from"),
        ({"_target_": "builtins.dict"}, "builtins.dict: is no class derived from"),
        ({"_target_": "collections.OrderedDict"}, "is no class derived from"),
        ({"_target_": "tcopilot.models.fusion.FusionRule"}, "abstract"),
        ({"_target_": "tcopilot.models.fusion.Product"}, "Product: is no class derived from"),
        ({"_target_": "product"}, "import product before"),
        ({"_target_": PATH, "scale": 2}, "scale"),
        ({"_target_": PATH, "temperature": 0}, "temperature=0: must be above 0"),
    ],
)
def test_what_is_no_rule_is_refused_with_its_path(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        build_fusion(settings)


@pytest.mark.parametrize("path", ["no_such_module.Rule", "tcopilot.nothing.Rule", "Rule", ".Rule"])
def test_a_config_of_the_user_may_import_but_must_name_a_module(path):
    with pytest.raises(ValueError, match="cannot be imported") as refused:
        build_fusion({"_target_": path}, may_import=True)
    assert f"fusion.rule._target_={path}:" in str(refused.value)
