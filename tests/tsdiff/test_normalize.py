"""Statistics and their use."""

import jax.numpy as jnp
import numpy as np
import pytest

from tsdiff.normalize import denormalize, fit_statistics, normalize, running_statistics


def test_round_trip_also_beyond_the_clip() -> None:
    values = jnp.asarray([[-1e5, -30.0, -2.0, 0.0, 0.5, 29.0, 4e6]]).T
    mean, scale = jnp.asarray([1.0]), jnp.asarray([2.0])
    z = normalize(values, mean, scale, 10.0)
    assert float(jnp.abs(z).max()) < 150.0
    np.testing.assert_allclose(denormalize(z, mean, scale, 10.0), values, rtol=1e-4, atol=1e-5)


def test_beyond_the_clip_ten_times_as_far_counts_a_little_more() -> None:
    z = normalize(
        jnp.asarray([[9.0, 10.0, 10.01, 100.0, -1000.0]]).T, jnp.zeros(1), jnp.ones(1), 10.0
    )
    wanted = [9.0, 10.0, 10.01, 10.0 * (1.0 + np.log(10.0)), -10.0 * (1.0 + np.log(100.0))]
    np.testing.assert_allclose(z[:, 0], wanted, atol=1e-4)


def test_missing_stays_missing() -> None:
    z = normalize(jnp.asarray([[jnp.nan, 1.0]]), jnp.zeros(2), jnp.ones(2), 10.0)
    np.testing.assert_array_equal(np.isnan(z), [[True, False]])


def test_statistics_skip_missing_cells() -> None:
    values = np.array([[1.0, np.nan], [3.0, 5.0], [np.nan, 7.0]], np.float32)
    found = fit_statistics([values], 0.05)
    np.testing.assert_allclose(found.mean[0], [2.0, 6.0])
    np.testing.assert_allclose(found.scale[0], [1.0, 1.0])
    np.testing.assert_array_equal(found.mean[0], found.mean[-1])


def test_a_rare_blip_does_not_make_a_channel_sensitive() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(10_000, 3)).astype(np.float32)
    values[:, 1] = 0.0
    values[77, 1] = 0.5
    assert fit_statistics([values], 0.05).scale[0, 1] == pytest.approx(0.025, rel=0.1)


def test_small_units_are_not_drowned_by_large_ones() -> None:
    """A ratio beside two counters of bytes keeps its own scale."""
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(1000, 3)) * [0.01, 1e6, 1e9]).astype(np.float32)
    np.testing.assert_allclose(fit_statistics([values], 0.05).scale[0], [0.01, 1e6, 1e9], rtol=0.1)


def test_a_channel_without_any_reading_has_finite_statistics() -> None:
    values = np.full((100, 2), np.nan, np.float32)
    found = fit_statistics([values], 0.05)
    assert np.isfinite(found.mean).all()
    assert (found.scale > 0).all()


def test_a_new_entity_begins_with_the_pooled_statistics_and_ends_with_its_own() -> None:
    rng = np.random.default_rng(1)
    pooled = fit_statistics(
        [(level + rng.normal(size=(500, 1))).astype(np.float32) for level in (0.0, 4.0, 8.0)], 0.05
    )
    zero = np.zeros(1)
    mean, scale = running_statistics(zero, zero, zero, pooled, 0.05)
    np.testing.assert_allclose((mean, scale), (pooled.mean[-1], pooled.scale[-1]), rtol=1e-5)
    own = 50.0 + 3.0 * rng.normal(size=100_000)
    count, total, total_sq = (np.array([x]) for x in (len(own), own.sum(), (own**2).sum()))
    mean, scale = running_statistics(count, total, total_sq, pooled, 0.05)
    np.testing.assert_allclose((mean[0], scale[0]), (50.0, 3.0), rtol=0.02)
