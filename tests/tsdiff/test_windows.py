"""Grid alignment and the mask bank, drawn as pictures."""

import jax.numpy as jnp
import numpy as np

from tsdiff.windows import gather, sliding, to_grid


def test_gaps_become_missing_rows_and_the_last_reading_of_a_slot_wins() -> None:
    """Period 10, times on top.

    time:           0  3  | 10 | (20 silent) | 31

    channel a:      1  2  |  - |             |  5
    channel b:      7  -  |  8 |             |  9
    """
    nan = np.nan
    slots, grid = to_grid(
        np.array([0, 3, 10, 31]), np.array([[1, 7], [2, nan], [nan, 8], [5, 9]], np.float32), 10, 99
    )
    np.testing.assert_array_equal(slots, [0, 1, 2, 3])
    np.testing.assert_array_equal(grid, [[2, 7], [nan, 8], [nan, nan], [5, 9]])


def test_negative_times_fall_into_the_slot_that_holds_them() -> None:
    slots, _ = to_grid(np.array([-1, 0]), np.zeros((2, 1), np.float32), 10, 99)
    np.testing.assert_array_equal(slots, [-1, 0])


def test_a_long_silence_is_cut() -> None:
    slots, grid = to_grid(np.array([0, 10**12]), np.ones((2, 1), np.float32), 1000, 4)
    assert len(grid) == 6
    assert np.isnan(grid[1:5]).all()
    assert slots[-1] == 10**9


def test_windows_are_cut_alike_by_numpy_and_jax() -> None:
    series = np.arange(24, dtype=np.float32).reshape(12, 2)
    cut = gather(jnp.asarray(series)[None], jnp.zeros(4, int), jnp.asarray([0, 3, 6, 9]), 3)
    np.testing.assert_array_equal(sliding(series, 3, stride=3), cut)
