"""Confidence intervals against scipy's."""

import numpy as np
import pytest
from scipy import stats

from train import intervals


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (1, 1), (7, 20), (499, 660)])
def test_wilson_is_scipys(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    found = intervals.wilson(right, n)
    np.testing.assert_allclose(found, (right / n, expected.low, expected.high), atol=1e-6)
    assert found == intervals.mean(np.arange(n) < right, np.ones(n))
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_bootstrap_of_a_mean_is_scipys():
    rng = np.random.default_rng(1)
    losses, tokens = rng.gamma(2.0, 5.0, 80), rng.integers(1, 20, 80).astype(float)

    def ratio(losses, tokens, axis):
        return losses.sum(axis) / tokens.sum(axis)

    expected = stats.bootstrap(
        (losses, tokens), ratio, paired=True, vectorized=True, method="percentile", n_resamples=20000, rng=rng
    ).confidence_interval
    found = intervals.mean(losses, tokens)
    np.testing.assert_allclose(found.value, losses.sum() / tokens.sum())
    np.testing.assert_allclose(found[1:], (expected.low, expected.high), rtol=0.02)


def test_a_difference_is_paired():
    """What is hard for both does not blur it; the same examples in another order would."""
    rng = np.random.default_rng(2)
    hard, ones = rng.normal(0, 5, 200), np.ones(200)
    one, other = hard + rng.normal(0.2, 0.5, 200), hard
    expected = stats.bootstrap((one - other,), np.mean, method="percentile", n_resamples=20000, rng=rng)
    found = intervals.difference(one, other, ones)
    np.testing.assert_allclose(found.value, (one - other).mean())
    np.testing.assert_allclose(found[1:], expected.confidence_interval, atol=0.01)
    assert found.low > 0
    blurred = intervals.difference(one, np.roll(other, 1), ones)
    assert blurred.high - blurred.low > 5 * (found.high - found.low)
    assert intervals.difference(one, one, ones) == (0, 0, 0)
