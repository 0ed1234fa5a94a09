# ruff: noqa: F722
"""How channels go with the time of day: taken out before anything else looks at them.

A channel's season is a sum of harmonics of the UTC day (harmonic regression, "Fourier terms" in
Hyndman & Athanasopoulos, Forecasting: Principles and Practice, 3rd ed., section 7.4):

    s(t) = sum over k of  a_k cos(2 pi k t) + b_k sin(2 pi k t),    t = share of the day gone by

in normalised units, about the channel's mean. A window of minutes cannot know what hour it is; what
is left once the hour is taken out is what windows are about. Channels keep a season only where it
told something about days it had not seen.
"""

from typing import Any, Final, TypeVar

import numpy as np
from jax import Array
from jaxtyping import Float
from numpy.typing import NDArray

from tsdiff.types import DoubleArray, FloatArray

_Either = TypeVar("_Either", Array, FloatArray)

DAY_MS: Final = 86_400_000
_HARMONICS: Final = 6
# Days that a season is fitted to and judged by.
_FITTED_DAYS: Final = 3.0
_JUDGED_DAYS: Final = 1.0
# Share of a channel's held-out variance that may be left once its season is taken out.
_MOST_LEFT: Final = 0.8
# Standard deviations: a wild reading is no matter of the hour.
_TAME: Final = 5.0
_RIDGE: Final = 1e-3  # of a unit variance a slot
_HOURS: Final = 24


def harmonics(slots: NDArray[np.int64], period_ms: int, terms: int) -> FloatArray:
    """Cosine and sine of `terms` / 2 harmonics at slots (*n), (*n, terms): cos 1, sin 1, cos 2 ...

    Equal slots give equal bits, wherever they stand.
    """
    if not terms:
        return np.zeros((*slots.shape, 0), np.float32)
    unique, inverse = np.unique(slots, return_inverse=True)
    share = unique * period_ms % DAY_MS / DAY_MS
    angle = 2.0 * np.pi * share[:, None] * np.arange(1, terms // 2 + 1)
    basis = np.stack([np.cos(angle), np.sin(angle)], -1).reshape(len(unique), terms)
    return basis.astype(np.float32)[inverse.reshape(slots.shape)]


def season(weights: _Either, basis: _Either) -> _Either:
    """The season (*n, M, D) in normalised units of weights (*n, K, D) at harmonics (*n, M, K).

    Term by term, so that a slot's sum does not depend on how many stand beside it.
    """
    xp: Any = basis.__array_namespace__()
    total: _Either = xp.zeros((*basis.shape[:-1], weights.shape[-1]), weights.dtype)
    for k in range(weights.shape[-2]):
        total = total + basis[..., k, None] * weights[..., None, k, :]
    return total


def means_of_slots(mean: _Either, scale: _Either, weights: _Either, basis: _Either) -> _Either:
    """Mean of every slot (*n, M, D), raw, of mean and scale (*n, D) and a season as in `season`."""
    means: _Either = mean[..., None, :] + scale[..., None, :] * season(weights, basis)
    return means


def fit_season(
    z: Float[FloatArray, "N D"], slots: NDArray[np.int64], split: int, period_ms: int
) -> Float[FloatArray, "K D"]:
    """Weights of the season of each channel of an entity; 0 where it has none, K = 0: too short.

    `z` is in normalised units, NaN missing; rows before `split` are fitted to, the others judge.
    There must be days enough of both, and readings at every hour: what is not known of the night
    may not be made up from the day.
    """
    channels = z.shape[1]
    a_day = DAY_MS // period_ms
    # Beyond half of a day's slots harmonics repeat the slower ones.
    terms = 2 * min(_HARMONICS, max(a_day - 1, 0) // 2)
    long = min(split / _FITTED_DAYS, (len(z) - split) / _JUDGED_DAYS) * period_ms >= DAY_MS
    if not (terms and long):
        return np.zeros((0, channels), np.float32)
    basis = harmonics(slots, period_ms, terms).astype(np.float64)
    seen = np.isfinite(z)
    tame = np.where(seen, np.clip(z, -_TAME, _TAME), 0.0).astype(np.float64)
    bins = min(_HOURS, a_day)
    hour = slots * period_ms % DAY_MS * bins // DAY_MS
    weights = np.zeros((terms, channels))
    for channel in range(channels):
        own, at = tame[:, channel], np.flatnonzero(seen[:, channel])
        fit, judge = at[at < split], at[at >= split]
        if np.bincount(hour[fit], minlength=bins).min() and 2 * len(judge) >= len(z) - split:
            found = _regress(basis[fit], own[fit])
            if np.var(own[judge] - basis[judge] @ found) < _MOST_LEFT * np.var(own[judge]):
                weights[:, channel] = found
    return weights.astype(np.float32)


def _regress(basis: DoubleArray, target: DoubleArray) -> DoubleArray:
    """Least squares with a free intercept, which is left out."""
    centred = basis - basis.mean(0)
    gram = centred.T @ centred + _RIDGE * len(basis) * np.eye(basis.shape[1])
    return np.asarray(np.linalg.solve(gram, centred.T @ (target - target.mean())))
