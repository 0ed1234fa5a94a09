"""Dead and stuck channels: how long runs are, and when one is too long."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from tsdiff.runs import NEVER, Runs, follow, longest_runs, too_long

NAN = np.nan
SERIES = st_np.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.integers(1, 4)),
    elements=st.sampled_from([NAN, NAN, 0.0, 1.0, 2.5]),
)


def none_yet(channels: int) -> Runs:
    zero = np.zeros(channels, np.int32)
    return Runs(zero, zero, np.full(channels, NAN, np.float32))


def along(values: list[list[float]], awaited: bool = True) -> tuple[list[int], list[int]]:
    """Gap and standstill of channel 0 after each slot."""
    runs, gaps, stills = none_yet(len(values[0])), [], []
    for row in values:
        runs = follow(runs, np.array(row, np.float32), np.array([awaited]))
        gaps.append(int(runs.gap[0]))
        stills.append(int(runs.still[0]))
    return gaps, stills


def test_runs_as_in_the_picture() -> None:
    readings = [3.1, 3.0, 2.9, 2.9, 2.9, NAN, NAN, 3.2]
    gaps, stills = along([[value, 0.0] for value in readings])
    assert gaps == [0, 0, 0, 0, 0, 1, 2, 0]
    assert stills == [1, 1, 1, 2, 3, 3, 3, 1]


def test_a_silent_entity_has_no_dead_channels() -> None:
    gaps, stills = along([[1, 1], [NAN, 1], [NAN, NAN], [NAN, NAN], [NAN, 1], [1, 1]])
    assert gaps == [0, 1, 1, 1, 2, 0]
    assert stills[-1] == 2


def test_a_channel_that_an_entity_never_had_is_not_missed_unless_training_knew_it() -> None:
    assert along([[NAN, 1]] * 3, awaited=False)[0] == [0, 0, 0]
    assert along([[NAN, 1]] * 3, awaited=True)[0] == [1, 2, 3]


@given(SERIES)
@settings(max_examples=200, deadline=None)
def test_the_longest_runs_are_what_following_would_have_seen(values: np.ndarray) -> None:
    runs = none_yet(values.shape[1])
    gap, still = runs.gap, runs.still
    for row in values:
        runs = follow(runs, row, np.array([True]))
        gap, still = np.maximum(gap, runs.gap), np.maximum(still, runs.still)
    count = (~np.isnan(values)).sum(0)
    longest = longest_runs(values)
    np.testing.assert_array_equal(longest[0], gap)
    np.testing.assert_array_equal(longest[1], np.where(still > count / 4, NEVER, still))


def test_too_long_is_twice_what_training_saw_and_some_patience() -> None:
    values = np.arange(400, dtype=np.float32).repeat(3)[:, None]
    values[600:610] = NAN
    limits = too_long(longest_runs(np.hstack([values, np.zeros_like(values)])), 5)
    assert limits[:, 0].tolist() == [2 * 10 + 5, 2 * 3 + 5]
    assert limits[1, 1] > 2**30  # a channel that never moved may go on so
