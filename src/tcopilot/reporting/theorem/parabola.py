"""E‖p − p̂ − λ f^C‖² as a function of λ: a parabola for every vocabulary entry, and one for their sum.

For one entry D(λ) = A − 2λB + λ²C with A = E ℓ², B = E ℓ f, C = E f², so three sums determine D at every λ. It is
least at λ* = B / C and returns to the Pilot's A at the zero crossing 2B / C. Theorem 4.1 is about A, B and C.

Shapes: R target tokens, V vocabulary, K kinds of sums.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor, bincount, stack

from tcopilot.functional import ROUNDING_ENERGY, best_weight

Floats = NDArray[np.float64]
QUANTILES = (5, 25, 50, 75, 95)  # percent
RESAMPLES = 1000


class Parabola(NamedTuple):
    """D(λ) = error − 2λ · inner + λ² · correction: A, B and C, per target token."""

    error: float
    inner: float
    correction: float

    def distance(self, weight: float) -> float:
        """D(λ)."""
        return self.error - 2 * weight * self.inner + weight**2 * self.correction

    @property
    def best_weight(self) -> float:
        """λ*, not below 0."""
        return best_weight(self.inner, self.correction)

    @property
    def corrects(self) -> bool:
        """Whether f^C is more than rounding errors, see `best_weight`."""
        return self.correction > ROUNDING_ENERGY

    @property
    def zero_crossing(self) -> float | None:
        """2B / C: any λ between 0 and this has D(λ) < D(0). If it is not positive, no λ > 0 has; None if f^C is 0."""
        return 2 * self.inner / self.correction if self.corrects else None

    def split_copilot_error(self) -> tuple[float, float]:
        """Split E‖f^C − ℓ‖² = D(1) into ε_C², the part along ℓ, and σ_C², the part that is uncorrelated with ℓ.

        Of all splits that the proof allows, this one makes its inequalities equalities and so gives the largest λ0.
        """
        if self.error == 0:
            return 0.0, self.correction
        epsilon = (self.error - self.inner) ** 2 / self.error
        return epsilon, max(self.correction - self.inner**2 / self.error, 0.0)

    @property
    def promised_weight(self) -> float | None:
        """The λ0 of Theorem 4.1 under the split of `split_copilot_error`."""
        return promised_weight(self.error, *self.split_copilot_error()) if self.corrects else None

    def figures(self) -> dict[str, float | None]:
        """Return the figures of a parabola for `theorem.json`."""
        return {
            "pilot_error_sq": self.error, "copilot_error_sq": self.distance(1.0), "lambda_star": self.best_weight,
            "lambda_0": self.promised_weight, "zero_crossing": self.zero_crossing,
        }  # fmt: skip


def promised_weight(pilot_error: float, epsilon: float, sigma: float) -> float | None:
    """Return λ0 = min(1, 2S(S − ε_C) / ((S − ε_C)² + σ_C²)) of Theorem 4.1, or None if ε_C < S does not hold.

    The arguments are the squares S² = ε_P² + σ_P², ε_C² and σ_C².

    >>> promised_weight(1.0, 0.25, 0.75), promised_weight(1.0, 0.25, 0.0), promised_weight(1.0, 1.0, 0.0)
    (1.0, 1.0, None)
    >>> promised_weight(1.0, 0.25, 1.75)
    0.5
    """
    left = math.sqrt(pilot_error) - math.sqrt(epsilon)
    return min(1.0, 2 * math.sqrt(pilot_error) * left / (left**2 + sigma)) if left > 0 else None


def products(errors_RV: Tensor, corrections_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ℓ², ℓf and f², whose means are A, B and C."""
    return errors_RV.square(), errors_RV * corrections_RV, corrections_RV.square()


class EntrySums:
    """Sums over target tokens, for each vocabulary entry, in float64.

    Attributes:
        tokens: number of target tokens in the sums.
        sums_KV: for each entry how often it is the target, Σℓ, Σℓ², Σℓf and Σf².
    """

    def __init__(self, vocabulary: int) -> None:
        self.tokens = 0
        self.sums_KV: Floats = np.zeros((5, vocabulary))

    def add(self, errors_RV: Tensor, corrections_RV: Tensor, targets_R: Tensor) -> None:
        """Add target tokens, with errors and corrections in float64."""
        count_V = bincount(targets_R, minlength=errors_RV.shape[1]).double()
        kinds = (errors_RV, *products(errors_RV, corrections_RV))
        self.sums_KV += stack([count_V, *(kind_RV.sum(0) for kind_RV in kinds)]).cpu().numpy()
        self.tokens += len(targets_R)

    @classmethod
    def of(cls, parts: "Sequence[EntrySums]") -> "EntrySums":
        """Add up sums over disjoint sets of tokens."""
        whole = cls(parts[0].sums_KV.shape[1])
        whole.tokens = sum(part.tokens for part in parts)
        whole.sums_KV = sum(part.sums_KV for part in parts)
        return whole

    @property
    def total(self) -> Parabola:
        """The parabola of the distance per target token, summed over entries."""
        return Parabola(*(self.sums_KV[2:].sum(1) / self.tokens).tolist())

    def distances_V(self, weight: float) -> Floats:
        """D_v(λ) per target token; over all entries it adds up to `total.distance(λ)`."""
        _, _, error_V, inner_V, correction_V = self.sums_KV
        return (error_V - 2 * weight * inner_V + weight**2 * correction_V) / self.tokens

    @property
    def corrected_V(self) -> NDArray[np.bool_]:
        """For which entries f^C is not always 0; for none if all of it is rounding errors."""
        correction_V = self.sums_KV[4]
        return (correction_V > 0) & (correction_V.sum() > ROUNDING_ENERGY * self.tokens)

    def best_weights_V(self) -> Floats:
        """λ*_v = B_v / C_v, not below 0; 0 where f^C_v is always 0."""
        inner_V, correction_V = self.sums_KV[3:]
        return np.divide(inner_V.clip(0), correction_V, out=np.zeros_like(inner_V), where=self.corrected_V)

    def removed(self, weights: float | Floats) -> float:
        """Share of the error energy that is removed by λ, or by one λ for each entry; negative if the error grows."""
        error, inner_V, correction_V = self.sums_KV[2].sum(), *self.sums_KV[3:]
        return float((2 * weights * inner_V - weights**2 * correction_V).sum() / error) if error else 0.0


def served_entries(sums: EntrySums, weight: float) -> dict[str, Any]:
    """Measure which vocabulary entries a common λ, usually λ*, harms, and what a separate λ for each would bring.

    Returns:
        `harmed`: entries with D_v(λ) > D_v(0), as shares of all `entries`, of target `occurrences` and of the error
        `energy`, and the `increase` of their distance as a share of all error energy. `never`: the same shares for
        entries that no λ > 0 helps, because their zero crossing is not positive. `common_zero_crossing`: the smallest
        of all entries, below which every λ > 0 helps each entry. `best_weight_quantiles`: quantiles of λ*_v, weighted
        by error energy. `removed_single` and `removed_per_entry`: shares of the error energy that λ and the best
        λ_v ≥ 0 remove; the second is an upper bound, because λ_v is chosen on the same tokens.
    """
    count_V, _, error_V, inner_V, correction_V = sums.sums_KV
    added_V = sums.tokens * (sums.distances_V(weight) - sums.distances_V(0.0))
    active_V, best_V = sums.corrected_V, sums.best_weights_V()
    crossings = 2 * inner_V[active_V] / correction_V[active_V]
    harmed_V = active_V & (weight > 0) & (weight * correction_V > 2 * inner_V)

    def shares(chosen_V: NDArray[np.bool_]) -> dict[str, float]:
        weighted = {"entries": np.ones_like(count_V), "occurrences": count_V, "energy": error_V}
        return {name: float(v[chosen_V].sum() / v.sum()) if v.sum() else 0.0 for name, v in weighted.items()}

    increase = float(added_V[harmed_V].sum() / error_V.sum()) if error_V.any() else 0.0
    return {
        "harmed": shares(harmed_V) | {"increase": increase},
        "never": shares(active_V & (inner_V <= 0)),
        "common_zero_crossing": float(crossings.min()) if len(crossings) else None,
        "best_weight_quantiles": weighted_quantiles(best_V, error_V),
        "removed_single": sums.removed(weight),
        "removed_per_entry": sums.removed(best_V),
    }


def weighted_quantiles(values: Floats, weights: Floats) -> dict[str, float]:
    """Return weighted quantiles of some values, by percent.

    >>> weighted_quantiles(np.array([3.0, 1.0]), np.array([1.0, 9.0]))
    {'5': 1.0, '25': 1.0, '50': 1.0, '75': 1.0, '95': 3.0}
    """
    points, known = np.array(QUANTILES) / 100, weights if weights.any() else np.ones_like(weights)
    found = np.quantile(values, points, weights=known, method="inverted_cdf").tolist()
    return dict(zip(map(str, QUANTILES), found, strict=True))


def row_intervals(rows_R4: Floats) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals by the percentile bootstrap over examples, because tokens of an example are correlated.

    Args:
        rows_R4: for each example Σℓ², Σℓf, Σf² and its number of target tokens.

    Returns:
        Intervals of `pilot_error_sq`, `copilot_error_sq`, `lambda_star` and `zero_crossing`; empty if f^C is 0
        in some resample.
    """
    random, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        *sums, tokens = rows_R4[random.integers(len(rows_R4), size=len(rows_R4))].sum(0).tolist()
        found.append(Parabola(*(value / tokens for value in sums)).figures())
    drawn = pd.DataFrame(found).drop(columns="lambda_0").astype(float)
    return {} if drawn.isna().any(axis=None) else {name: tuple(drawn[name].quantile([0.025, 0.975])) for name in drawn}
