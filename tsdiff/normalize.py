# ruff: noqa: F722
"""Per-channel statistics: fitted in NumPy, applied and inverted inside the compiled function.

Readings are also normalised outside of it, to learn from them: what is given as NumPy arrays comes
back as such, by the same formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from tsdiff.types import DoubleArray, FloatArray

_Either = TypeVar("_Either", Array, FloatArray)

# exp(20) times the clip: no reading is further away, and float32 does not overflow there.
_LONGEST_LOG = 20.0


def soft_clip(z: _Either, clip: float) -> _Either:
    """The identity up to `clip`, then as its logarithm: one wild reading may not drown a window.

    Beyond it the slope is `clip` / |z|, which goes on from 1: ten times as far counts `clip` ln 10
    more.
    """
    xp: Any = z.__array_namespace__()
    size = xp.abs(z)
    beyond = xp.sign(z) * clip * (1.0 + xp.log(xp.maximum(size, clip) / clip))
    clipped: _Either = xp.where(size <= clip, z, beyond)
    return clipped


def soft_unclip(z: Array, clip: float) -> Array:
    """The inverse of `soft_clip`."""
    size = jnp.abs(z)
    beyond = jnp.sign(z) * clip * jnp.exp(jnp.clip(size / clip - 1.0, 0.0, _LONGEST_LOG))
    return jnp.where(size <= clip, z, beyond)


def normalize(values: _Either, mean: _Either, scale: _Either, clip: float) -> _Either:
    """Raw units (*n, D) -> normalised units (NaN stays NaN); `mean`, `scale` broadcast."""
    return soft_clip((values - mean) / scale, clip)


def denormalize(
    z: Float[Array, "*n D"], mean: Float[Array, "*#n D"], scale: Float[Array, "*#n D"], clip: float
) -> Float[Array, "*n D"]:
    """Normalised units -> raw units."""
    return soft_unclip(z, clip) * scale + mean


@dataclass(frozen=True)
class Statistics:
    """Mean and scale per row and channel, (R+1, D) float32: R entities, then the pooled row.

    `spread` (D,) is the standard deviation of the entities' means: how far a new entity's level
    may lie from the pooled one.
    """

    mean: FloatArray
    scale: FloatArray
    spread: FloatArray


def _moments(values: FloatArray) -> tuple[DoubleArray, DoubleArray, DoubleArray]:
    """Mean, standard deviation and range per channel, NaN skipped; zeros for an empty channel."""
    observed = np.isfinite(values)
    count = np.maximum(observed.sum(0), 1)
    filled = np.where(observed, values, 0).astype(np.float64)
    mean = filled.sum(0) / count
    deviation = np.where(observed, values - mean, 0.0)
    std = np.sqrt((deviation**2).sum(0) / count)
    return mean, std, np.abs(deviation).max(0, initial=0.0)


def _typical(values: DoubleArray, axis: int) -> DoubleArray:
    """The median of the positive entries along `axis` (0 where there is none)."""
    positive = np.where(values > 0, values, np.nan)
    empty = ~np.isfinite(positive).any(axis)
    if empty.ndim == 0:
        return np.asarray(0.0 if empty else np.nanmedian(positive))
    result = np.zeros(empty.shape)
    kept = np.flatnonzero(~empty)
    if len(kept):
        result[kept] = np.nanmedian(np.take(positive, kept, axis=1 - axis), axis=axis)
    return result


def fit_statistics(series: Sequence[FloatArray], scale_floor: float) -> Statistics:
    """Statistics of every entity's series (N_e, D), raw units, NaN missing.

    A channel that hardly moved in training must not turn its first small move into thousands of
    standard deviations, so the scale has a floor: `scale_floor` times the typical standard
    deviation of the entity's channels, but, since channels have different units, no more than the
    same share of what this channel itself was seen to move. A channel that never moved at all
    borrows: from the same channel of other entities, from its own level, from other channels.
    """
    moments = [_moments(values) for values in series]
    mean = np.stack([m for m, _, _ in moments])
    std = np.stack([s for _, s, _ in moments])
    reach = np.stack([r for _, _, r in moments])
    same_channel = _typical(std, 0)
    same_entity = _typical(std, 1)
    own = np.where(reach > 0, reach, same_channel)
    own = np.where(own > 0, own, np.abs(mean))
    typical = np.where(same_entity[:, None] > 0, same_entity[:, None], own)
    own = np.where(own > 0, own, typical)
    scale = np.maximum(std, scale_floor * np.minimum(typical, own))
    scale = np.where(scale > 0, scale, 1.0)
    pooled_mean = np.median(mean, 0)
    pooled_scale = np.median(scale, 0)
    spread = np.sqrt(np.mean((mean - pooled_mean) ** 2, 0))
    return Statistics(
        np.vstack([mean, pooled_mean]).astype(np.float32),
        np.vstack([scale, pooled_scale]).astype(np.float32),
        spread.astype(np.float32),
    )


def running_statistics(
    count: DoubleArray,
    total: DoubleArray,
    total_sq: DoubleArray,
    statistics: Statistics,
    scale_floor: float,
) -> tuple[FloatArray, FloatArray]:
    """Mean and scale (D,) of a never-seen entity from running sums (D,) of its raw readings.

    Shrunk to the pooled row while little has been seen: the mean as a normal prior with the
    entities' own spread would (readings of one hour are no independent draws: 16 count as one),
    the variance as if 64 readings of pooled variance had come first.
    """
    mean0 = statistics.mean[-1].astype(np.float64)
    scale0 = statistics.scale[-1].astype(np.float64)
    seen = np.maximum(count, 1.0)
    mean = np.where(count > 0, total / seen, mean0)
    variance = np.where(count > 0, np.maximum(total_sq / seen - mean**2, 0.0), scale0**2)
    # A bundle of one entity says nothing about how entities differ: take one scale.
    spread = np.maximum(statistics.spread, scale0)
    independent = count / 16.0
    weight = independent / (independent + (scale0 / spread) ** 2)
    shrunk_mean = weight * mean + (1.0 - weight) * mean0
    shrunk = np.sqrt((count * variance + 64.0 * scale0**2) / (count + 64.0))
    scale = np.maximum(shrunk, scale_floor * scale0)
    return shrunk_mean.astype(np.float32), scale.astype(np.float32)
