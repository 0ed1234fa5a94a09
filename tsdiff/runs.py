"""Channels that fell silent or stand still, told by how long they do: no model is asked.

    reading    3.1  3.0  2.9  2.9  2.9   -    -   3.2
    still       1    1    1    2    3    3    3    1     readings in a row of one value
    gap         0    0    0    0    0    1    2    0     slots without one, while others had theirs

What is long is a matter of what training saw: a run twice as long as the longest there, and some
slots more, is one that nothing explains. A channel that mostly stood still in training may do so.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Counts = NDArray[np.int32]

NEVER: Final = 2**29
"""As a longest run: no run is too long."""
# A run over so much of all readings says that standing still is what this channel does.
_IDLE_SHARE: Final = 0.25


class Runs(NamedTuple):
    """Run lengths (*n, D) up to now, in slots, and the last reading (NaN: none yet)."""

    gap: Counts
    still: Counts
    last: Float32


def follow(runs: Runs, values: Float32, awaited: NDArray[np.bool_]) -> Runs:
    """Go on by one slot of raw `values` (*n, D), NaN missing.

    A slot without any reading changes nothing: it is the entity that is silent. Gaps of a channel
    that was never heard count only where it is `awaited` (broadcast to (*n, D)).
    """
    given = ~np.isnan(values)
    missed = ~given & given.any(-1, keepdims=True) & (awaited | ~np.isnan(runs.last))
    repeated = values == runs.last
    return Runs(
        np.where(given, 0, runs.gap + missed).astype(np.int32),
        np.where(given, np.where(repeated, runs.still + 1, 1), runs.still).astype(np.int32),
        np.where(given, values, runs.last),
    )


def longest_runs(values: Float32) -> Counts:
    """Longest gap and longest standstill (2, D) in a series (N, D); `NEVER` for idle channels."""
    heard = values[~np.isnan(values).all(1)]
    given = ~np.isnan(heard)
    at = np.arange(len(heard))[:, None]
    last = np.maximum.accumulate(np.where(given, at, -1), axis=0)
    gap = (at - last).max(0, initial=0)
    still = np.zeros(values.shape[1], np.int64)
    for channel in range(values.shape[1]):
        readings = heard[given[:, channel], channel]
        if not len(readings):
            continue
        changes = np.flatnonzero(readings[1:] != readings[:-1])
        longest = int(np.diff(np.r_[-1, changes, len(readings) - 1]).max())
        still[channel] = NEVER if longest > _IDLE_SHARE * len(readings) else longest
    return np.stack([np.minimum(gap, NEVER), still]).astype(np.int32)


def ever_read(longest: Counts) -> NDArray[np.bool_]:
    """Which channels (*n, D) had any reading where `longest` (*n, 2, D) was taken; all if none."""
    read: NDArray[np.bool_] = longest[..., 1, :] > 0
    return read | ~read.any(-1, keepdims=True)


def too_long(longest: Counts, patience: int) -> Counts:
    """Runs from which on a channel is dead (gap) or stuck (standstill): as `longest`, in slots."""
    limits: Counts = 2 * longest + patience
    return limits
