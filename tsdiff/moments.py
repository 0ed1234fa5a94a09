# ruff: noqa: F722
"""Second moments of a series by lag: all that the Gaussian anchor is made of.

A window's covariance depends on how far apart two slots are and not on where they stand in the
window, so L matrices of D x D say what L^2 of them would: at 16 slots of 38 channels 92 KB instead
of 1.5 MB, from L times as many pairs each.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tsdiff.types import DoubleArray, FloatArray

# Rows whose products are summed in float32 before they are added up in float64.
_CHUNK = 4096


class Moments(NamedTuple):
    """Means (D,) and E[x_t x_(t-l)'] (L, D, D), l = 0 to L-1, in normalised units."""

    mean: DoubleArray
    lags: DoubleArray

    def leaning_on(self, other: "Moments", weight: float) -> "Moments":
        """Mix with others', which weigh `weight` of the whole."""
        return Moments(
            *(
                (1.0 - weight) * mine + weight * theirs
                for mine, theirs in zip(self, other, strict=True)
            )
        )

    def covariance(self) -> DoubleArray:
        """Of a window of L slots, flattened slot-major, (L D, L D): block Toeplitz."""
        length, channels = self.lags.shape[:2]
        # About the mean: in normalised units it is small and nothing cancels.
        about = self.lags - np.outer(self.mean, self.mean)
        signed = np.concatenate([about[:0:-1].transpose(0, 2, 1), about])
        apart = np.subtract.outer(np.arange(length), np.arange(length)) + length - 1
        blocks = signed[apart].transpose(0, 2, 1, 3)
        covariance = np.array(blocks.reshape((length * channels,) * 2), np.float64)
        np.fill_diagonal(covariance, np.maximum(np.diag(covariance), 0.0))
        return covariance


class Sums(NamedTuple):
    """Weighted sums over slots: total and number (D,), products and pairs (L, D, D)."""

    total: DoubleArray
    number: DoubleArray
    products: DoubleArray
    pairs: DoubleArray

    def plus(self, other: "Sums") -> "Sums":
        """Of both."""
        return Sums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def moments(self) -> Moments:
        """As means; a pair hardly ever seen together says nothing about how the two go together."""
        mean = self.total / np.maximum(self.number, 1)
        seldom = self.pairs < 0.01 * self.pairs[0].max()
        expected = self.products / np.maximum(self.pairs, 1)
        return Moments(mean, np.where(seldom, np.outer(mean, mean), expected))


def lag_sums(
    values: Float[FloatArray, "M D"], length: int, weights: Float[FloatArray, " M"]
) -> Sums:
    """Weighted sums over slots, each with the `length` - 1 slots before it, NaN left out."""
    observed = np.isfinite(values).astype(np.float32)
    filled = np.where(observed > 0, values, np.float32(0))
    new, seen = filled * weights[:, None], observed * weights[:, None]
    channels = values.shape[1]
    products, pairs = np.zeros((2, length, channels, channels))
    for lag in range(min(length, len(values))):
        for start in range(lag, len(values), _CHUNK):
            now = slice(start, start + _CHUNK)
            before = slice(start - lag, min(start + _CHUNK, len(values)) - lag)
            products[lag] += new[now].T @ filled[before]
            pairs[lag] += seen[now].T @ observed[before]
    return Sums(new.sum(0, np.float64), seen.sum(0, np.float64), products, pairs)
