"""Moments by lag, against sums written out and a process whose moments are known."""

import numpy as np
import pytest

from tsdiff.moments import lag_sums

LENGTH, CHANNELS = 4, 3


def series(slots: int, missing: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(slots, CHANNELS)).astype(np.float32)
    values[rng.random(values.shape) < missing] = np.nan
    return values


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_sums_are_those_written_out(missing: float) -> None:
    values = series(40, missing)
    weights = (np.arange(40) % 3 / 2).astype(np.float32)
    sums = lag_sums(values, LENGTH, weights)
    products, pairs = np.zeros((2, LENGTH, CHANNELS, CHANNELS))
    for t, weight in enumerate(weights.tolist()):
        for lag in range(min(LENGTH, t + 1)):
            product = np.outer(values[t], values[t - lag])
            seen = np.isfinite(product)
            products[lag][seen] += weight * product[seen]
            pairs[lag] += weight * seen
    np.testing.assert_allclose(sums.products, products, atol=1e-5)
    np.testing.assert_array_equal(sums.pairs, pairs)
    np.testing.assert_allclose(sums.total, np.nansum(weights[:, None] * values, 0), atol=1e-5)
    np.testing.assert_array_equal(sums.number, weights @ np.isfinite(values))


def test_sums_do_not_depend_on_how_a_long_series_is_cut() -> None:
    values = series(9000, 0.1)
    whole = lag_sums(values, LENGTH, np.ones(9000, np.float32))
    parts = [
        lag_sums(
            values[max(start - LENGTH + 1, 0) : start + 3000],
            LENGTH,
            np.repeat([0.0, 1.0], [min(start, LENGTH - 1), 3000]).astype(np.float32),
        )
        for start in (0, 3000, 6000)
    ]
    joined = parts[0].plus(parts[1]).plus(parts[2])
    for one, other in zip(whole, joined, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-2)


def test_the_covariance_of_an_autoregression_is_the_known_one() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=60_000) * np.sqrt(1 - 0.8**2)
    x = np.zeros(60_000)
    for t in range(1, len(x)):
        x[t] = 0.8 * x[t - 1] + noise[t]
    # The second channel is the first one, three slots earlier: lags have a direction.
    values = np.stack([x[3:], x[:-3]], 1).astype(np.float32) + np.float32(2.0)
    moments = lag_sums(values, LENGTH, np.ones(len(values), np.float32)).moments()
    slot, channel = (grid.ravel() for grid in np.meshgrid(range(LENGTH), (0, 1), indexing="ij"))
    when = slot - 3 * channel
    known = 0.8 ** np.abs(np.subtract.outer(when, when))
    np.testing.assert_allclose(moments.mean, 2.0, atol=0.05)
    np.testing.assert_allclose(moments.covariance(), known, atol=0.05)


def test_what_is_never_seen_together_is_taken_for_unrelated() -> None:
    values = series(500)
    values[:, 1] = values[:, 0] + 1
    values[::2, 0] = np.nan
    values[1::2, 1] = np.nan
    moments = lag_sums(values, 1, np.ones(500, np.float32)).moments()
    assert moments.covariance()[0, 1] == pytest.approx(0.0)
    assert moments.covariance()[0, 0] == pytest.approx(1.0, abs=0.2)


def test_moments_lean_by_weight() -> None:
    one, other = (
        lag_sums(series(90, seed=s), 2, np.ones(90, np.float32)).moments() for s in (0, 1)
    )
    np.testing.assert_array_equal(one.leaning_on(other, 0.0).lags, one.lags)
    halfway = one.leaning_on(other, 0.5)
    np.testing.assert_allclose(halfway.lags, (one.lags + other.lags) / 2)
    np.testing.assert_allclose(halfway.mean, (one.mean + other.mean) / 2)
