"""Fusion rules: how a correction changes the Pilot's distribution before decoding (Eq. 8).

A rule of your own is one class derived from `FusionRule` and one YAML in `configs/fusion` (docs/extending.md).

Shapes: B batch, N target length, V vocabulary.
"""

import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from tcopilot.functional import fuse_logits, fuse_probabilities
from tcopilot.settings import Rule


class FusionRule(ABC):
    """How a correction changes the Pilot's distribution. λ = 0 gives the Pilot under every rule.

    A rule with settings takes them as keyword arguments and keeps them as attributes of the same names.

    Attributes:
        has_closed_form: λ* of Theorem 4.1 minimises the squared error of this rule, so `fusion.weight=auto` works.
        takes_gates: a gate that is fitted to the squared error (`fusion.per=position` or `token`) suits this rule.
        correction_unit: unit of f^C in the labels of figures: `probability` or `logits`.
        usual_weight: λ where there are no rows to choose it on.
    """

    has_closed_form: ClassVar[bool] = False
    takes_gates: ClassVar[bool] = False
    correction_unit: ClassVar[str] = "probability"
    usual_weight: ClassVar[float] = 1.0

    @abstractmethod
    def __call__(self, log_probs_BNV: Tensor, corrections_BNV: Tensor, weight: float | Tensor) -> Tensor:
        """Return log p̃ [B, N, V], float32, from log p̂, f^C and λ, which is a number or [B, 1, 1]."""

    def fuse(
        self,
        log_probs_BNV: Tensor,
        corrections_BNV: Tensor | None,
        weight: float | Tensor,
        pilot_BNV: Tensor | None = None,
    ) -> Tensor:
        """Return log p̃ [B, N, V]; where λ or all of f^C is 0, `pilot_BNV` to the bit (log p̂ unless given).

        λ is a number, or one number for each row [B]. Without a Copilot f^C is None.
        """
        pilot_BNV = log_probs_BNV if pilot_BNV is None else pilot_BNV
        if corrections_BNV is None or (not isinstance(weight, Tensor) and weight == 0):
            return pilot_BNV
        unchanged_BN1 = (corrections_BNV == 0).all(-1, keepdim=True)
        if isinstance(weight, Tensor):
            weight = weight.to(log_probs_BNV.device).view(-1, 1, 1)
            unchanged_BN1 = unchanged_BN1 | (weight == 0)
        return torch.where(unchanged_BN1, pilot_BNV, self(log_probs_BNV, corrections_BNV, weight))

    def largest_weight(self, is_difference: bool) -> float:
        """The largest λ to try, given whether f^C is a difference of two distributions; by default there is none."""
        return math.inf

    def settings(self) -> dict[str, Any]:
        """The class and its settings as plain values, from which `build_fusion` makes the rule again."""
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}", **vars(self)}


class ProbabilityFusion(FusionRule):
    """p̃ = p̂ + λ f^C, the paper's Eq. 8. λ of about 1 is the natural scale.

    E‖ℓ − λ f^C‖² is a parabola in λ, so λ = 0.5 brings at least three quarters of its largest gain wherever λ* lies
    between 1/3 and 1.
    """

    has_closed_form = True
    takes_gates = True
    usual_weight = 0.5

    def __call__(self, log_probs_BNV, corrections_BNV, weight) -> Tensor:
        """Return log p̃."""
        return fuse_probabilities(log_probs_BNV, corrections_BNV, weight)

    def largest_weight(self, is_difference: bool) -> float:
        """Return 1 for a difference of two distributions, since p̃ is then sure to be one as well."""
        return 1.0 if is_difference else math.inf


class LogitFusion(FusionRule):
    """p̃ = softmax(f^P + λ f^C). λ lives on another scale: 4 to 16 for small models."""

    correction_unit = "logits"
    usual_weight = 4.0

    def __call__(self, log_probs_BNV, corrections_BNV, weight) -> Tensor:
        """Return log p̃."""
        return fuse_logits(log_probs_BNV, corrections_BNV, weight)


def build_fusion(settings: Mapping[str, Any] | None, may_import: bool = False) -> FusionRule:
    """Make a rule from `_target_`, the dotted path of its class, and its settings.

    The path may come from the `config.json` of a model that somebody else made. Such a file must not choose which code
    runs, so by default a class is only looked up in modules that are imported already, and only a class derived from
    `FusionRule` is called. To load a model with a rule of your own, import the rule's module first. Configs that the
    user composed (`train.py`, `eval.py`) may import it.
    """
    if not isinstance(settings, Mapping) or not isinstance(settings.get("_target_"), str):
        raise ValueError(
            f"fusion.rule={settings}: names no class; choose fusion=probability, fusion=logits or another file of "
            f"configs/fusion, where rule._target_ is the dotted path of a fusion rule"
        )
    path = settings["_target_"]
    module_name, _, name = path.rpartition(".")
    if may_import:
        try:
            importlib.import_module(module_name)
        except (ImportError, ValueError) as error:
            raise ValueError(f"fusion.rule._target_={path}: cannot be imported ({error})") from error
    module = sys.modules.get(module_name)
    if module is None:
        raise ValueError(
            f"fusion.rule._target_={path}: a model's files do not choose which code is imported; "
            f"if you trust that module, import {module_name or path} before the model is loaded"
        )
    rule = vars(module).get(name)
    if not (isinstance(rule, type) and issubclass(rule, FusionRule)):
        raise ValueError(f"fusion.rule._target_={path}: is no class derived from {__name__}.FusionRule")
    try:
        return rule(**{key: value for key, value in settings.items() if key != "_target_"})
    except (TypeError, ValueError) as error:
        raise ValueError(f"fusion.rule={dict(settings)}: {error}") from error


def breach(rule: FusionRule) -> str | None:
    """Say where a rule of the user's does on a small example what `FusionRule` forbids; None if it does not."""
    log_probs_BNV = torch.log_softmax(3 * torch.arange(24.0).sin().view(2, 3, 4), dim=-1)
    errors_BNV = torch.eye(4)[:3] - log_probs_BNV.exp()
    weight = min(rule.usual_weight, rule.largest_weight(True))
    try:
        fused_BNV, same_BNV = (rule(log_probs_BNV, f_BNV, weight) for f_BNV in (errors_BNV, 0 * errors_BNV))
    except Exception:  # perhaps the example does not suit it, such as a rule for single tokens
        return None
    if not fused_BNV.isfinite().all():
        return f"at λ = {weight:g} its log p̃ is not finite everywhere; floor p̃ before taking the logarithm"
    if not torch.allclose(total := fused_BNV.exp().sum(-1), torch.ones(2, 3), atol=1e-3):
        return f"at λ = {weight:g} its p̃ sums to {total[0, 0]:.3f}, not to 1; return log_softmax of it"
    if not torch.allclose(same_BNV, log_probs_BNV, atol=1e-3):
        return "f^C = 0 does not give log p̂ back; make it do so"
    return None


def _is_weight(value: Any) -> bool:
    is_number = isinstance(value, Real | Tensor) and not isinstance(value, bool)
    return is_number and bool(0 <= value <= torch.finfo(torch.float32).max)  # beyond it, p̃ would be computed with ∞


WEIGHT = Rule(_is_weight, "λ must be 0 (the Pilot) or positive: give a number")


def check_weight(value: Any, key: str = "weight") -> float:
    """Return λ as a number.

    Raises:
        ValueError: if the value that was given for `key` is no λ.
    """
    if not WEIGHT.allows(value):
        raise ValueError(f"{key}={value!r}: {WEIGHT.mend}")
    return float(value)
