"""What is made of held-out data beside the tails: bands."""

import jax.numpy as jnp
import numpy as np
import pytest

from train.calibrate import _fit_bands, _HeldOut
from tsdiff.scorers import Readings


def held_out(slots: int, spread: float, seed: int) -> _HeldOut:
    """Readings of two channels, the second never seen; a standard deviation of 1 is told."""
    z = np.random.default_rng(seed).normal(0.0, spread, (slots, 2)).astype(np.float32)
    z[:, 1] = np.nan
    nothing, told = jnp.zeros((slots, 4)), jnp.zeros((slots, 2))
    return _HeldOut(Readings(nothing, nothing + 1.0, told, told + 1.0, told), z)


def test_bands_are_those_of_each_entity_where_it_has_readings() -> None:
    scales, covered = _fit_bands([held_out(20_000, 0.5, 0), held_out(20_000, 2.0, 1)], 10)
    assert scales[:, 0] == pytest.approx([0.5, 2.0, 1.25], rel=0.03)
    assert scales[:, 1] == pytest.approx([1.0] * 3)
    assert covered == pytest.approx(0.9, abs=0.005)


def test_an_entity_with_a_long_history_does_not_narrow_the_bands_of_short_ones() -> None:
    parts = [held_out(5000, 0.5, 0), *(held_out(110, 1.0, seed) for seed in range(1, 21))]
    scales, _ = _fit_bands(parts, 10)
    # 200 cells of the long one against 20 times 100.
    assert scales[-1, 0] == pytest.approx((200 * 0.5 + 2000 * 1.0) / 2200, rel=0.05)
    inside = [
        float((np.abs(part.z[10:, 0]) <= 1.645 * scale).mean())
        for part, scale in zip(parts[1:], scales[1:-1, 0], strict=True)
    ]
    assert 0.87 < np.mean(inside) < 0.93
