"""Intervals of shares: published examples, a bootstrap, and how often they hold the truth."""

import numpy as np
import pytest

from utils.evaluation.intervals import newcombe, wilson


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Two models' judgements: right both, only the first, only the second, neither."""
    counts = (both, first, second, neither)
    return np.repeat([True, True, False, False], counts), np.repeat(
        [True, False, True, False], counts
    )


# The examples of Newcombe (1998, Statistics in Medicine 17, 857-872) for Wilson's interval.
@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


# Of the first less the second: examples of Newcombe (1998, 2635-2650) and Altman et al. (2000, Statistics with Confidence).
@pytest.mark.parametrize(
    "counts, low, high", [((36, 12, 2, 0), 0.0569, 0.3404), ((14, 5, 0, 22), 0.011, 0.226)]
)
def test_newcombe_as_published(counts, low, high):
    first, second = outcomes(*counts)
    assert newcombe(second, first) == pytest.approx((low, high), abs=5e-4)
    assert newcombe(first, second) == pytest.approx((-high, -low), abs=5e-4)


@pytest.mark.parametrize("counts", [(60, 10, 40, 90), (5, 20, 80, 95), (100, 30, 35, 35)])
def test_newcombe_is_near_a_bootstrap_over_problems(counts):
    first, second = outcomes(*counts)
    rng, n = np.random.default_rng(0), len(first)
    drawn = rng.integers(0, n, (20_000, n))
    differences = second[drawn].mean(1) - first[drawn].mean(1)
    assert newcombe(first, second) == pytest.approx(
        np.quantile(differences, [0.025, 0.975]), abs=0.012
    )


def test_pairs_tell_more_than_shares_side_by_side():
    first, second = outcomes(50, 2, 14, 34)
    low, high = newcombe(first, second)
    assert low > 0
    assert wilson(second.sum(), 100)[0] < wilson(first.sum(), 100)[1]  # the two intervals overlap
    shuffled = np.random.default_rng(0).permutation(first)
    assert np.diff(newcombe(shuffled, second)) > high - low


@pytest.mark.parametrize(
    "counts", [(9, 0, 0, 0), (0, 0, 0, 9), (5, 0, 0, 5), (0, 9, 0, 0), (0, 0, 1, 0), (1, 0, 0, 0)]
)
def test_at_the_edges(counts):
    first, second = outcomes(*counts)
    low, high = newcombe(first, second)
    assert -1 <= low <= second.mean() - first.mean() <= high <= 1 and low < high


def test_both_hold_the_truth_95_times_in_100():
    rng, n, inside = np.random.default_rng(1), 80, np.zeros(2)
    for _ in range(2_000):
        kind = rng.choice(4, n, p=[0.3, 0.1, 0.25, 0.35])
        first, second = kind <= 1, (kind == 0) | (kind == 2)
        (low, high), (w_low, w_high) = newcombe(first, second), wilson(int(first.sum()), n)
        inside += low <= 0.15 <= high, w_low <= 0.4 <= w_high
    assert ((inside / 2_000 > 0.935) & (inside / 2_000 < 0.975)).all(), inside / 2_000
