# ruff: noqa: F722
"""Grid alignment, and windows cut from series on a grid."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from numpy.typing import NDArray

from tsdiff.types import FloatArray


def to_grid(
    timestamps_ms: NDArray[np.int64], values: FloatArray, period_ms: int, longest_gap: int
) -> tuple[NDArray[np.int64], FloatArray]:
    """Readings (N, D), sorted by time -> slot numbers (M,) and one row a slot (M, D), gaps as NaN.

    Slot = floor(timestamp / period). Of several readings of one slot the last one that holds a
    channel gives that channel. A silence of more than `longest_gap` slots is cut to that length
    (no window sees across it), so that a year's pause costs no memory.
    """
    slots = timestamps_ms // period_ms
    if len(slots) == 0:
        return slots, values.astype(np.float32)
    first = np.concatenate([[True], np.diff(slots) > 0])
    index = np.cumsum(first) - 1
    unique = slots[first]
    merged = np.full((len(unique), values.shape[1]), np.nan, np.float32)
    if len(unique) == len(slots):
        merged[:] = values
    else:
        for rank in range(int(np.bincount(index).max())):
            # One pass per reading of a slot, in the order of time: later readings overwrite.
            start = np.flatnonzero(first)
            size = np.diff(np.append(start, len(slots)))
            slot = np.flatnonzero(size > rank)
            reading = values[start[slot] + rank]
            merged[slot] = np.where(np.isnan(reading), merged[slot], reading)
    step = np.minimum(np.diff(unique), longest_gap + 1)
    position = np.concatenate([[0], np.cumsum(step)])
    grid = np.full((int(position[-1]) + 1, values.shape[1]), np.nan, np.float32)
    grid[position] = merged
    row = np.arange(len(grid))
    before = np.searchsorted(position, row, side="right") - 1
    numbers = unique[before] + row - position[before]
    return numbers, grid


def extended(numbers: NDArray[np.int64], before: int, after: int = 0) -> NDArray[np.int64]:
    """Slot numbers (N,) with so many that go before and come after them."""
    return np.concatenate(
        [numbers[0] + np.arange(-before, 0), numbers, numbers[-1] + np.arange(1, after + 1)]
    )


def sliding(values: FloatArray, length: int, stride: int = 1) -> FloatArray:
    """Every window of `length` slots, (N, D) -> (ceil((N-length+1)/stride), length, D), a view."""
    view = np.lib.stride_tricks.sliding_window_view(values, length, axis=0)
    return view[::stride].transpose(0, 2, 1)


def gather(
    series: Float[Array, "E M D"], entity: Int[Array, " B"], first: Int[Array, " B"], length: int
) -> Float[Array, "B L D"]:
    """Windows of `length` slots beginning at slot `first` of `entity`."""
    slot = first[:, None] + jnp.arange(length)
    return series[entity[:, None], slot]
