"""The slower readings as detectors: they find what is broken, and whose it is, causally."""

from functools import cache

import numpy as np
import pytest

from train.baselines import Judged
from train.readings import READINGS, Reading
from tsdiff.types import FloatArray

SLOTS, BROKEN, CHANNEL = 120, 60, 2


def series(slots: int, seed: int) -> FloatArray:
    """Four channels that share one slow wave, and noise."""
    rng = np.random.default_rng(seed)
    wave = np.sin(np.arange(slots) / 5.0 + rng.uniform(0, 6))
    return np.asarray(wave[:, None] + 0.2 * rng.standard_normal((slots, 4)), np.float32)


@cache
def fitted(name: str) -> Reading:
    reading = READINGS[name]()
    assert isinstance(reading, Reading)
    reading.fit(series(2000, 0), 0)
    return reading


def judged(name: str, z: FloatArray) -> Judged:
    return fitted(name).score(z)


@pytest.mark.parametrize("name", READINGS)
def test_a_broken_reading_is_strangest_and_its_channel_is_blamed(name: str) -> None:
    z = series(SLOTS, 1)
    z[BROKEN, CHANNEL] += 3.0
    deviation, cells = judged(name, z)
    assert deviation.shape == (SLOTS,)
    assert np.argmax(deviation) == BROKEN
    assert cells is not None
    assert np.argmax(cells[BROKEN]) == CHANNEL
    assert (deviation >= 0).all()


@pytest.mark.parametrize("name", READINGS)
def test_what_comes_later_changes_nothing(name: str) -> None:
    z = series(SLOTS, 2)
    whole = judged(name, z)[0]
    cut = judged(name, z[:BROKEN])[0]
    np.testing.assert_allclose(cut, whole[:BROKEN], rtol=1e-4, atol=1e-5)


def test_bound_and_flow_of_a_gaussian_rank_alike() -> None:
    """Both are the likelihood then, but for the hidden cells' dependence on one another."""
    z = series(400, 3)
    bound, flow = (
        np.argsort(np.argsort(judged(name, z)[0][20:])) for name in ("tsdiff-elbo", "tsdiff-flow")
    )
    assert np.corrcoef(bound, flow)[0, 1] > 0.9
