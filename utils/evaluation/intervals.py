"""How far can a share of a sample be from the truth? Intervals that hold it 95 times in 100.

30 right answers of 100 do not make a model that answers 30% of all such problems: with 100 others
it might be 25 or 36 (`wilson`). Two models that answer the same problems are compared problem by
problem (`newcombe`): those that are easy or hard for both do not tell the models apart.
"""

import math

import numpy as np
from jaxtyping import Bool
from scipy.stats import binomtest


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share of which a sample of n shows `right`, 0 to n (Wilson 1927)."""
    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def newcombe(first: Bool[np.ndarray, "N"], second: Bool[np.ndarray, "N"]) -> tuple[float, float]:
    """The 95% interval of the share of `second` less that of `first`, of the same N problems.

    Method 10 of Newcombe (1998, Statistics in Medicine 17, 2635-2650): Wilson's intervals, put
    together with the correlation of the two shares, which a continuity correction makes smaller.
    """
    n = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    p, q = float(second.mean()), float(first.mean())
    (p_low, p_high), (q_low, q_high) = (wilson(int(x.sum()), n) for x in (second, first))
    excess = both * neither - int((second & ~first).sum()) * int((first & ~second).sum())
    excess = max(excess - n / 2, 0) if excess > 0 else excess
    product = n**4 * p * (1 - p) * q * (1 - q)
    phi = excess / math.sqrt(product) if product else 0.0

    def length(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a**2 - 2 * phi * a * b + b**2))

    return p - q - length(p - p_low, q_high - q), p - q + length(p_high - p, q - q_low)
