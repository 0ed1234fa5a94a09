"""Gaussian windows, whose ideal denoiser and every law are known in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tsdiff.anchor import Anchor, negative_log_likelihood, posterior

CELLS, RANK = 8, 3
# c conditioned, # target, . missing: neither
WINDOWS = np.array([list("cc##c#.#"), list("########")])
CONDITIONED, TARGET = WINDOWS == "c", WINDOWS == "#"

rng = np.random.default_rng(0)
MEAN, LOADINGS = rng.normal(size=CELLS), rng.normal(size=(CELLS, RANK))
NOISE = rng.uniform(0.1, 0.6, CELLS)
COVARIANCE = LOADINGS @ LOADINGS.T + np.diag(NOISE)
X = np.where(WINDOWS == ".", np.nan, rng.normal(size=WINDOWS.shape)).astype(np.float32)

ANCHOR = Anchor(*(jnp.asarray(part, jnp.float32) for part in (MEAN, LOADINGS, NOISE)))
denoise = partial(posterior, ANCHOR)


def law(window: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a window's targets given its conditioned cells."""
    c, t = CONDITIONED[window], TARGET[window]
    gain = COVARIANCE[np.ix_(t, c)] @ np.linalg.inv(COVARIANCE[np.ix_(c, c)])
    return MEAN[t] + gain @ (X[window] - MEAN)[c], (
        COVARIANCE[np.ix_(t, t)] - gain @ COVARIANCE[np.ix_(c, t)]
    )


def exact_log_likelihood(sigma: float) -> np.ndarray:
    """The density of targets + sigma n given conditioned cells: one closed form less another."""
    given = np.where(CONDITIONED, 0.0, np.inf)
    both = np.where(TARGET, sigma**2, given)
    x = jnp.nan_to_num(jnp.asarray(X))
    joint, marginal = (
        negative_log_likelihood(ANCHOR, x, jnp.asarray(part, jnp.float32)) for part in (both, given)
    )
    return np.asarray(marginal - joint)


# Cells that have nothing to do with one another, of mean 0.
VARIANCE = np.array([0.1, 0.3, 1.0, 3.0])
EVERYTHING = np.ones((1, len(VARIANCE)), bool)


def denoise_independent(x: Array, noise_variance: Array) -> tuple[Array, Array]:
    """Wiener's filter, cell by cell."""
    kept = VARIANCE / (VARIANCE + noise_variance)
    return kept * x, jnp.sqrt(noise_variance * kept)


def key(seed: int = 0) -> Array:
    """A cheap one: threefry takes long to compile inside of loops."""
    return jax.random.key(seed, impl="rbg")
