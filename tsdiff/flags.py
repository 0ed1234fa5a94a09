"""Channels that are on or off: commands, set points, states.

What such a channel does is seldom more than what was asked for, and being rare it is always far
from its mean: a hundred of them would drown the one sensor that they stand beside. So all flags of
an entity together count as one channel, where a slot's readings are judged; where a whole window
is, not at all. What they say of the other channels is used as it is.
"""

from collections.abc import Sequence

import numpy as np

from tsdiff.types import BoolArray, FloatArray

Flags = tuple[bool, ...]
"""Which of the D channels are flags. Not an array, since functions are compiled for each."""


def find_flags(series: Sequence[FloatArray]) -> Flags:
    """Channels that took two values, no more and no fewer, in all series (N_e, D) together.

    NaN is no value. A channel that never moved is no flag: its first move is news. Where nothing
    moves but flags, they are what is to be judged: then there are none.
    """
    least, most = (by.reduce([by.reduce(each) for each in series]) for by in (np.fmin, np.fmax))
    moves = least < most
    between = [((each > least) & (each < most)).any(0) for each in series]
    flags = moves & ~np.any(between, axis=0)
    if (moves == flags).all():
        flags[:] = False
    return tuple(flags.tolist())


def sensors(flags: Flags, slots: int = 1) -> BoolArray:
    """Cells (slots * D,) of the channels that are no flags."""
    return ~np.tile(np.asarray(flags, np.bool_), slots)


def weights(flags: Flags) -> FloatArray:
    """How much each channel counts (D,): 1, all flags together 1 as well."""
    share = 1.0 / max(sum(flags), 1)
    return np.where(flags, share, 1.0).astype(np.float32)
