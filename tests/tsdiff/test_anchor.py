"""The anchor against brute-force conditioning of a Gaussian."""

import jax.numpy as jnp
import numpy as np
import pytest

from tsdiff.anchor import (
    Anchor,
    fit_anchor,
    gram,
    latent_variance,
    mahalanobis,
    masked_reading,
    negative_log_likelihood,
    posterior,
    solve,
    whiten,
)
from tsdiff.config import ModelConfig
from tsdiff.flags import sensors
from tsdiff.linalg import invert
from tsdiff.reading import whitenings

LENGTH, CHANNELS, RANK, HIDDEN = 6, 5, 7, 3
NO_FLAGS = (False,) * CHANNELS
CELLS = LENGTH * CHANNELS


def random_anchor(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=CELLS),
        rng.normal(size=(CELLS, RANK)),
        rng.uniform(0.1, 0.6, CELLS),
    )


def as_anchor(parts: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Anchor:
    return Anchor(*(jnp.asarray(part, jnp.float32) for part in parts))


def brute_force(
    parts: tuple[np.ndarray, np.ndarray, np.ndarray], x: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of x given x + sqrt(variance) * n in the cells of finite variance."""
    mean, loadings, noise = parts
    covariance = loadings @ loadings.T + np.diag(noise)
    known = np.flatnonzero(np.isfinite(variance))
    gain = covariance[:, known] @ np.linalg.inv(
        covariance[np.ix_(known, known)] + np.diag(variance[known])
    )
    left = covariance - gain @ covariance[known]
    return mean + gain @ (x - mean)[known], np.sqrt(np.maximum(np.diag(left), 0))


def variances() -> dict[str, np.ndarray]:
    """Noise variance per cell for several masks and noise levels."""
    rng = np.random.default_rng(1)
    last = np.zeros((LENGTH, CHANNELS))
    last[-HIDDEN:] = np.inf
    group = np.zeros((LENGTH, CHANNELS))
    group[:, :2] = 0.7**2
    random = np.where(rng.uniform(size=(LENGTH, CHANNELS)) < 0.3, np.inf, 0.25)
    return {
        "none, sigma .5": np.full((LENGTH, CHANNELS), 0.25),
        "last, sigma inf": last,
        "group, sigma .7": group,
        "random missing, sigma .5": random,
        "nothing known": np.full((LENGTH, CHANNELS), np.inf),
        "everything clean": np.zeros((LENGTH, CHANNELS)),
    }


@pytest.mark.parametrize("mask", variances())
def test_posterior_is_gaussian_conditioning(mask: str) -> None:
    parts = random_anchor()
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, CELLS))
    variance = variances()[mask].reshape(-1)
    batched = jnp.asarray(np.tile(variance, (3, 1)), jnp.float32)
    mean, sd = posterior(as_anchor(parts), jnp.asarray(x, jnp.float32), batched)
    for row in range(3):
        expected_mean, expected_sd = brute_force(parts, x[row], variance)
        np.testing.assert_allclose(mean[row], expected_mean, atol=2e-4)
        np.testing.assert_allclose(sd[row], expected_sd, atol=2e-3)


def test_the_score_is_the_gradient_of_the_log_likelihood() -> None:
    """(D(x) - x) / sigma^2 = d log p(x; sigma) / dx  (Karras et al. 2022, eq. 3)."""
    mean, loadings, noise = random_anchor()
    sigma = 0.5
    x = np.random.default_rng(3).normal(size=CELLS)
    covariance = loadings @ loadings.T + np.diag(noise + sigma**2)
    score = -np.linalg.solve(covariance, x - mean)
    denoised, _ = posterior(
        as_anchor((mean, loadings, noise)),
        jnp.asarray(x[None], jnp.float32),
        jnp.full((1, CELLS), sigma**2),
    )
    np.testing.assert_allclose((denoised[0] - x) / sigma**2, score, atol=1e-3)


@pytest.mark.parametrize("missing_cells", [0, 4, 17])
def test_likelihood_is_the_formula(missing_cells: int) -> None:
    mean, loadings, noise = random_anchor()
    rng = np.random.default_rng(4)
    x = rng.normal(size=CELLS)
    variance = np.full(CELLS, 0.25)
    variance[rng.permutation(CELLS)[:missing_cells]] = np.inf
    known = np.isfinite(variance)
    covariance = (loadings @ loadings.T + np.diag(noise + 0.25))[np.ix_(known, known)]
    y = (x - mean)[known]
    direct = 0.5 * (
        y @ np.linalg.solve(covariance, y)
        + np.linalg.slogdet(covariance)[1]
        + known.sum() * np.log(2 * np.pi)
    )
    found = negative_log_likelihood(
        as_anchor((mean, loadings, noise)),
        jnp.asarray(x[None], jnp.float32),
        jnp.asarray(variance[None], jnp.float32),
    )
    np.testing.assert_allclose(found[0], direct, rtol=1e-4)


@pytest.mark.parametrize("missing_cells", [0, 1, 5, 20, CELLS])
def test_every_way_of_solving_agrees(missing_cells: int) -> None:
    parts = random_anchor()
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4, CELLS))
    observed = np.ones((4, CELLS), bool)
    for row in observed:
        row[rng.permutation(CELLS)[:missing_cells]] = False
    whitened = whiten(*parts, sigma=0.5)
    ways: list[int | None] = [None, CELLS]
    if missing_cells <= 5:
        ways.append(5)
    if missing_cells == 0:
        ways.append(0)
    rows = whitened.loadings[-CHANNELS:]
    mean, loadings, noise = parts
    for way in ways:
        solved = solve(whitened, jnp.asarray(x, jnp.float32), jnp.asarray(observed), missing=way)
        distance = mahalanobis(whitened, solved, jnp.asarray(observed))
        spread = jnp.broadcast_to(latent_variance(solved, rows), (4, CHANNELS))
        for number in range(4):
            o = observed[number]
            covariance = (loadings @ loadings.T + np.diag(noise + 0.25))[np.ix_(o, o)]
            y = (x[number] - mean)[o]
            np.testing.assert_allclose(
                distance[number], y @ np.linalg.solve(covariance, y), rtol=1e-3, atol=1e-3
            )
            precision = np.eye(RANK) + loadings[o].T @ (loadings[o] / (noise[o] + 0.25)[:, None])
            scaled = loadings[-CHANNELS:] / np.sqrt(noise[-CHANNELS:] + 0.25)[:, None]
            direct = np.einsum("ck,kl,cl->c", scaled, np.linalg.inv(precision), scaled)
            np.testing.assert_allclose(spread[number], direct, rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize("windows", [1, 40])
@pytest.mark.parametrize("reading", ["noisy", "without flags", "head"])
def test_further_readings_share_the_loadings_of_the_first(reading: str, windows: int) -> None:
    mean, loadings, noise = random_anchor()
    visible = CELLS - HIDDEN * CHANNELS
    config = ModelConfig(window=LENGTH, rank=RANK, sigma=0.5, hidden=HIDDEN)
    flags = tuple(channel == 1 and reading == "without flags" for channel in range(CHANNELS))
    anchors = whitenings(mean, loadings, noise, flags, config)
    seen = np.arange(CELLS) < visible if reading == "head" else sensors(flags, LENGTH)
    sigma = 0.0 if reading == "head" else 0.5
    found = anchors.head(CHANNELS, HIDDEN) if reading == "head" else anchors.noisy(sigma, flags)
    alone = whiten(mean[seen], loadings[seen], noise[seen], sigma)
    own = np.zeros((CELLS, RANK))
    own[seen] = alone.loadings

    rng = np.random.default_rng(7)
    residual = rng.normal(size=(windows, CELLS))
    observed = rng.random((windows, CELLS)) < 0.8
    index = rng.integers(0, CELLS, (windows, 3))
    lost = np.einsum("bn,nk,nl->bkl", ~observed, own, own)
    np.testing.assert_allclose(found.scale[seen], alone.scale, rtol=1e-6)
    np.testing.assert_allclose(found.last(CELLS), own, atol=1e-5)
    np.testing.assert_allclose(found.of(jnp.asarray(index)), own[index], atol=1e-5)
    np.testing.assert_allclose(
        found.project(jnp.asarray(residual, jnp.float32)), residual @ own, atol=1e-4
    )
    np.testing.assert_allclose(found.lost(jnp.asarray(observed)), lost, atol=1e-5)


def test_distance_of_wild_readings_that_explain_one_another() -> None:
    """Far along the loadings, close to them: the distance is a small part of the residuals."""
    mean, loadings, noise = random_anchor()
    rng = np.random.default_rng(8)
    x = mean + 300.0 * (loadings @ rng.normal(size=(RANK, 3))).T + rng.normal(size=(3, CELLS))
    x = x.astype(np.float32)
    config = ModelConfig(window=LENGTH, rank=RANK, sigma=0.5)
    noisy = whitenings(mean, loadings, noise, NO_FLAGS, config).noisy(0.5, NO_FLAGS)
    observed = jnp.ones(x.shape, bool)
    solved = solve(noisy, jnp.asarray(x), observed, missing=0)
    found = mahalanobis(noisy, solved, observed)
    covariance = loadings @ loadings.T + np.diag(noise + 0.25)
    direct = [y @ np.linalg.solve(covariance, y) for y in x.astype(np.float64) - mean]
    np.testing.assert_allclose(found, direct, rtol=2e-6)


SLOT = tuple((LENGTH - 1, channel) for channel in range(CHANNELS))


@pytest.mark.parametrize("missing", [(), ((5, 1),), ((5, 0), (4, 0), (3, 2), (0, 0)), SLOT])
def test_masked_reading_hides_each_channels_own_last_cells(
    missing: tuple[tuple[int, int], ...],
) -> None:
    """Channel c: its last 3 slots hidden (#), other channels and slots as they came.

    c = 1, L = 6:  ......
                   ...###   -> the expected value of the last #
                   ......
    """
    parts = random_anchor()
    x = np.random.default_rng(6).normal(size=(LENGTH, CHANNELS))
    observed = np.ones((LENGTH, CHANNELS), bool)
    for slot, channel in missing:
        observed[slot, channel] = False
    whitened = whiten(*parts, sigma=0.0)
    for way in (None, CHANNELS) + ((0,) if observed.all() else ()):
        solved = solve(
            whitened,
            jnp.asarray(x.reshape(1, -1), jnp.float32),
            jnp.asarray(observed.reshape(1, -1)),
            missing=way,
        )
        products = gram(whitened.loadings, CHANNELS, HIDDEN)
        found = masked_reading(whitened, products, solved, jnp.asarray(observed.reshape(1, -1)))
        for channel in range(CHANNELS):
            variance = np.where(observed, 0.0, np.inf)
            variance[-HIDDEN:, channel] = np.inf
            mean, sd = brute_force(parts, x.reshape(-1), variance.reshape(-1))
            cell = CELLS - CHANNELS + channel
            np.testing.assert_allclose(found.expected[0, channel], mean[cell], atol=2e-3)
            np.testing.assert_allclose(found.sd[0, channel], sd[cell], atol=2e-3)


@pytest.mark.parametrize("size", [1, 3, 8, 13])
def test_invert(size: int) -> None:
    rng = np.random.default_rng(size)
    root = rng.normal(size=(5, size, size))
    a = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(size)
    found = invert(jnp.asarray(a.transpose(1, 2, 0), jnp.float32))
    np.testing.assert_allclose(
        np.asarray(found).transpose(2, 0, 1) @ a, np.tile(np.eye(size), (5, 1, 1)), atol=1e-3
    )


def test_fit_recovers_a_low_rank_covariance() -> None:
    mean, loadings, noise = random_anchor()
    covariance = loadings @ loadings.T + np.diag(noise)
    _, found, left = fit_anchor(mean, covariance, RANK, 0.05, rounds=200)
    np.testing.assert_allclose(found @ found.T + np.diag(left), covariance, atol=0.02)


def test_noise_has_a_floor() -> None:
    _, _, noise = fit_anchor(np.zeros(4), np.zeros((4, 4)), 2, 0.1)
    np.testing.assert_array_equal(noise, 0.1)
