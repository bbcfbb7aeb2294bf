"""How sure a number measured on N examples is: 95% confidence intervals.

Shapes: N examples, R resamples.
"""

import math
from typing import NamedTuple

import numpy as np

Z = 1.959964  # of the normal distribution's 97.5%
RESAMPLES, SEED = 4000, 0


class Interval(NamedTuple):
    """A number, and where it would be but for chance."""

    value: float
    low: float
    high: float


def wilson(right: int, n: int) -> Interval:
    """A proportion k/n and its interval (k/n + z²/2n ± z √(k/n (1 - k/n)/n + z²/4n²)) / (1 + z²/n).

    Args:
      right: k.
      n: how many, at least 1.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    p, shrink = right / n, 1 + Z**2 / n
    middle, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    # At 0 and n the formula ends there, but for rounding.
    low, high = (middle - half) / shrink, (middle + half) / shrink
    return Interval(p, 0.0 if right == 0 else low, 1.0 if right == n else high)


def mean(values_N: np.ndarray, weights_N: np.ndarray) -> Interval:
    """Σ values / Σ weights: of plain zeros and ones with Wilson's interval, else with the bootstrap's.

    Args:
      values_N: a number for each example, such as the sum of its tokens' losses.
      weights_N: what it is a sum over, such as its tokens; ones for a plain mean.
    """
    if np.isin(values_N, (0, 1)).all() and (weights_N == 1).all():
        return wilson(int(values_N.sum()), len(values_N))
    drawn_RN = _resampled(len(values_N))
    means_R = (drawn_RN @ values_N) / (drawn_RN @ weights_N)
    return Interval(float(values_N.sum() / weights_N.sum()), *_middle(means_R))


def difference(values_N: np.ndarray, others_N: np.ndarray, weights_N: np.ndarray) -> Interval:
    """The difference of two such means on the same examples, by the paired bootstrap.

    Every resample has the same examples for both, so that what is hard for both does not blur the difference.

    Args:
      values_N: of the one.
      others_N: of the other.
      weights_N: of both.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", the percentile interval.
    """
    drawn_RN = _resampled(len(values_N))
    gaps_N = values_N - others_N
    gaps_R = (drawn_RN @ gaps_N) / (drawn_RN @ weights_N)
    return Interval(float(gaps_N.sum() / weights_N.sum()), *_middle(gaps_R))


def _resampled(n: int) -> np.ndarray:
    """How often each of n examples is drawn in every one of R draws of n."""
    return np.random.default_rng(SEED).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)


def _middle(values_R: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values_R, (0.025, 0.975))
    return float(low), float(high)
