"""Fusion rules: how a correction changes the Pilot's distribution before decoding (Eq. 8).

Adding a rule is one class here, an entry in `FUSIONS` and one YAML in `configs/fusion`.
"""

from torch import Tensor

from tcopilot.functional import fuse_logits, fuse_probabilities


class ProbabilityFusion:
    """p̃ = p̂ + λ f^C, the paper's Eq. 8. λ of about 1 is the natural scale."""

    def __call__(self, log_probs_BNV: Tensor, corrections_BNV: Tensor, weight: float) -> Tensor:
        """Return log p̃ [B, N, V], float32."""
        return fuse_probabilities(log_probs_BNV, corrections_BNV, weight)


class LogitFusion:
    """p̃ = softmax(f^P + λ f^C). λ lives on another scale: 4 to 16 for small models."""

    def __call__(self, log_probs_BNV: Tensor, corrections_BNV: Tensor, weight: float) -> Tensor:
        """Return log p̃ [B, N, V], float32."""
        return fuse_logits(log_probs_BNV, corrections_BNV, weight)


FUSIONS = {"probability": ProbabilityFusion, "logits": LogitFusion}


def build_fusion(name: str) -> ProbabilityFusion | LogitFusion:
    """Return the rule of that name.

    Raises:
        ValueError: naming the rules that exist.
    """
    if name not in FUSIONS:
        raise ValueError(f"fusion.space={name!r} is not one of {', '.join(FUSIONS)}")
    return FUSIONS[name]()
