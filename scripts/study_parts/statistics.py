"""Paired differences of two methods over seeds: bootstrap intervals, Holm's correction, equivalence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from scipy import stats

Key = TypeVar("Key")


@dataclass(frozen=True)
class Difference:
    """Of paired values: the mean, a 95% bootstrap interval, and p of a paired t-test that it is 0."""

    mean: float
    low: float
    high: float
    p: float
    equivalence_p: float
    """Of two one-sided paired t-tests that it lies within the margin; small where the two are equivalent."""

    @property
    def is_equivalent(self) -> str:
        """As tables have it."""
        return "yes" if self.equivalence_p < 0.05 else "no"


def paired(one: Sequence[float], other: Sequence[float], margin: float) -> Difference:
    """one - other, value by value: the same seeds in the same order; `margin` is what would not matter.

    The interval is of percentiles that are expanded for few values (Hesterberg 2015, arXiv 1411.5279, 4.1): plain ones
    of 5 values hold the mean in 84% of cases, these in 93%, and never lie beyond the values.
    """
    difference = np.asarray(one) - np.asarray(other)
    mean, n = float(difference.mean()), len(difference)
    if np.ptp(difference) == 0:
        p = 1.0 if mean == 0 else 0.0
        return Difference(mean, mean, mean, p, 0.0 if abs(mean) < margin else 1.0)
    outside = 2 * stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1))
    resampled = stats.bootstrap(
        (difference,),
        np.mean,
        confidence_level=1 - float(outside),
        n_resamples=99_999,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    p = _p_value(difference, 0, "two-sided")
    above = _p_value(difference, -margin, "greater")
    below = _p_value(difference, margin, "less")
    return Difference(mean, float(resampled.low), float(resampled.high), p, max(above, below))


def corrected(family: Mapping[Key, Difference]) -> dict[Key, Difference]:
    """Both p values of every member after Holm's correction."""
    p, equivalence_p = (
        holm({key: getattr(one, name) for key, one in family.items()}) for name in ("p", "equivalence_p")
    )
    return {key: replace(one, p=p[key], equivalence_p=equivalence_p[key]) for key, one in family.items()}


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's adjusted p values of one family of tests."""
    adjusted, largest = {}, 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def _p_value(values: np.ndarray, mean: float, alternative: str) -> float:
    result: Any = stats.ttest_1samp(values, mean, alternative=alternative)
    return float(result.pvalue)
