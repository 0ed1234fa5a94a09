"""The streams' long time scale, on series whose averages are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from tsdiff import scorers
from tsdiff.calibration import LAGS
from tsdiff.config import ModelConfig
from tsdiff.scorers import Scales, Smoothing

NEUTRAL, USUAL = 1.0, 2.0


def smoothed(values: np.ndarray, by: Smoothing) -> np.ndarray:
    """Long scale of one stream (M,) of one entity, (T,)."""
    return at_scales(values, Scales((by,)))[:, 1]


def at_scales(values: np.ndarray, by: Scales) -> np.ndarray:
    """One stream (M,) of one entity at all scales, (T, C)."""
    neutral, usual = jnp.full((1, 1), NEUTRAL), jnp.full((1, 1), USUAL)
    streams = jnp.asarray(values, jnp.float32)[None, :, None]
    found: np.ndarray = np.asarray(scorers.at_scales(streams, neutral, usual, by))
    return np.asarray(found[0])


def test_weights_halve_and_add_up_to_one() -> None:
    by = Smoothing(behind=9, ahead=0, half_life=3.0, ceiling=3.0)
    spike = np.zeros(40)
    spike[20] = USUAL
    found = smoothed(spike, by)
    at = 20 - by.behind
    assert found[:at].tolist() == [0.0] * at
    assert found[at + 3] == pytest.approx(found[at] / 2, rel=1e-6)
    assert found[at : at + by.behind + 1].sum() == pytest.approx(USUAL, rel=1e-6)
    assert found[at + by.behind + 1 :].max() == 0.0
    assert smoothed(np.full(40, 1.7), by) == pytest.approx(np.full(31, 1.7), rel=1e-6)


def test_however_wild_a_slot_counts_as_the_ceiling() -> None:
    by = Smoothing(behind=9, ahead=0, half_life=3.0, ceiling=3.0)
    wild, ceiling = np.zeros(40), np.zeros(40)
    wild[20], ceiling[20] = 1e6, 3.0 * USUAL
    assert smoothed(wild, by).tolist() == smoothed(ceiling, by).tolist()
    # So it takes several slots to be remembered as an event is.
    event = np.zeros(40)
    event[18:23] = 3.0 * USUAL
    assert smoothed(event, by).max() > 2.5 * smoothed(wild, by).max()


def test_what_is_not_known_is_neutral() -> None:
    by = Smoothing(behind=3, ahead=2, half_life=2.0, ceiling=3.0)
    gap = np.where(np.arange(30) % 3 > 0, np.nan, NEUTRAL)
    assert smoothed(gap, by) == pytest.approx(np.full(25, NEUTRAL), rel=1e-6)


@pytest.mark.parametrize("lag", LAGS)
def test_slots_before_count_and_those_to_come_where_there_are_any(lag: int) -> None:
    """Slots at which each scale sees a spike: the slot itself, those after it, those before it."""
    config = ModelConfig()
    by = scorers.scales(config, lag)
    spike = np.zeros(80)
    spike[40] = USUAL
    found = at_scales(spike, by)
    assert len(found) == 80 - by.behind - by.ahead
    seen = [np.flatnonzero(column) + by.behind for column in found.T]
    wanted = [(40, 40), (40, 40 + config.smoothing - 1)] + [(40 - lag, 40)] * (lag > 0)
    assert [(slots.min(), slots.max()) for slots in seen] == wanted
