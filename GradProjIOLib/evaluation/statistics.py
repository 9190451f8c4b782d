"""Summaries of measurements, and paired comparisons of two methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n − 1 in the denominator) of `count` finite or infinite values."""

    count: int
    mean: float
    standard_deviation: float


def summarize(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of `values`; NaN ones (not measured) are left out and not counted."""
    measured = np.asarray(values, dtype=np.float64)
    measured = measured[~np.isnan(measured)]
    if not len(measured):
        return Summary(0, np.nan, np.nan)
    finite = bool(np.isfinite(measured).all())
    spread = float(measured.std(ddof=1)) if finite and len(measured) > 1 else np.nan
    return Summary(len(measured), float(measured.mean()), spread)


@dataclass(frozen=True)
class PairedComparison:
    """`other` against `reference` on the same cases: mean of the differences (other − reference).

    `low` and `high` bound its 95 % confidence interval (Student's t), `p_value` is that of the two-sided
    Wilcoxon signed-rank test. They are NaN where there are too few cases (fewer than two).
    """

    count: int
    mean_difference: float
    low: float
    high: float
    p_value: float


def compare_paired(reference: Sequence[float], other: Sequence[float]) -> PairedComparison:
    """Compare two lists of values of the same cases in the same order; cases not finite in both are left out.

    Wilcoxon, Individual comparisons by ranking methods, 1945, as in `scipy.stats.wilcoxon` (exact for few
    cases without ties). Where all differences are zero, p is 1.
    """
    pairs = np.array([reference, other], dtype=np.float64)
    first, second = pairs[:, np.isfinite(pairs).all(axis=0)]
    difference = second - first
    count = len(difference)
    mean = float(difference.mean()) if count else np.nan
    if count < 2:
        return PairedComparison(count, mean, np.nan, np.nan, np.nan)
    if not difference.any():
        return PairedComparison(count, 0.0, 0.0, 0.0, 1.0)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(difference))
    p_value = float(stats.wilcoxon(difference).pvalue)
    return PairedComparison(count, mean, mean - margin, mean + margin, p_value)
