"""Evidence on Gaussian windows, where all that it estimates is known in closed form."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.scipy.stats import norm

from tests.tsdiff.gaussian import (
    ANCHOR,
    CELLS,
    CONDITIONED,
    COVARIANCE,
    MEAN,
    TARGET,
    WINDOWS,
    X,
    denoise,
    exact_log_likelihood,
    key,
    law,
)
from tsdiff import anchor, evidence, sde
from tsdiff.errors import ConfigError
from tsdiff.evidence import Reconstruction, antithetic
from tsdiff.samplers import DDIM, DPMSolver2M
from tsdiff.sde import EDM

reconstruct = jax.jit(
    evidence.reconstruct, static_argnames=("denoise", "process", "method", "samples")
)
denoising_bound, denoising_errors, score_norms, surprisal = (
    jax.jit(function, static_argnames="denoise")
    for function in (
        evidence.denoising_bound,
        evidence.denoising_errors,
        evidence.score_norms,
        evidence.surprisal,
    )
)

# 2n points of mean 0 and unit covariance: expectations of quadratic functions are exact.
CUBATURE = math.sqrt(CELLS) * np.concatenate([np.eye(CELLS), -np.eye(CELLS)]).astype(np.float32)
# n orthogonal signs (Hadamard): Hutchinson's estimate is the trace, and cell by cell the diagonal.
SIGNS = np.array([[1.0]], np.float32)
while len(SIGNS) < CELLS:
    SIGNS = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]], np.float32), SIGNS)

# Windows that together have the data's mean and covariance, every cell a target.
LIKE_DATA = (MEAN + CUBATURE @ np.linalg.cholesky(COVARIANCE).T).astype(np.float32)
NONE, ALL = np.zeros(LIKE_DATA.shape, bool), np.ones(LIKE_DATA.shape, bool)


def powers(covariance: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A function of a symmetric matrix."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * function(values)) @ vectors.T)


# ---- CRPS ----


def crps_of_normal(z: np.ndarray) -> np.ndarray:
    """Of z against N(0, 1): Gneiting et al. 2005 (Monthly Weather Review 133), eq. 5."""
    return np.asarray(z * (2.0 * norm.cdf(z) - 1.0) + 2.0 * norm.pdf(z) - 1.0 / math.sqrt(math.pi))


def draw_noise(x: Array, noise_variance: Array) -> tuple[Array, Array]:
    """From one level alone, samples that are exactly N(0, 1)."""
    return x / jnp.sqrt(noise_variance), x


def against_noise(x: np.ndarray, samples: int) -> Reconstruction:
    none, every = np.zeros(x.shape, bool), np.ones(x.shape, bool)
    one = jnp.ones(1)
    found: Reconstruction = reconstruct(
        draw_noise, EDM(), DDIM(), x, none, every, key(), one, samples=samples
    )
    return found


@pytest.mark.parametrize("samples", [2, 3, 19])
def test_crps_is_that_of_the_law_however_few_the_samples(samples: int) -> None:
    """Not "fair", it would be too large by 1 / (sqrt(pi) samples); four standard errors allowed."""
    z = np.repeat(np.array([[-2.0], [0.0], [0.7]], np.float32), 40_000, 1)
    found = np.asarray(against_noise(z, samples).evidence, np.float64)
    error = found.mean(1) - crps_of_normal(z[:, 0])
    tolerance = 4.0 * found.std(1) / 200.0
    assert np.all(tolerance < 0.25 / (math.sqrt(math.pi) * samples))
    assert np.all(np.abs(error) < tolerance)


@pytest.mark.parametrize(("samples", "held"), [(8, 7 / 9), (19, 0.9), (45, 0.9)])
def test_band_holds_what_it_says(samples: int, held: float) -> None:
    """Of 80,000 cells; the standard error is .0011 to .0015. Definition 7 holds .83 for 19."""
    x = np.random.default_rng(1).normal(size=(1, 80_000)).astype(np.float32)
    found = against_noise(x, samples)
    inside = (found.lower <= x) & (x <= found.upper)
    assert float(inside.mean()) == pytest.approx(held, abs=0.006)


@pytest.mark.parametrize(("steps", "tolerance", "band"), [(8, 0.08, 0.24), (24, 0.05, 0.09)])
def test_reconstruction_is_that_of_the_exact_conditional_law(
    steps: int, tolerance: float, band: float
) -> None:
    """6,000 samples, in units of the standard deviation.

    Three standard errors are .04 for mean and CRPS and .08 for the band; the rest is for the steps.
    """
    levels = sde.karras_levels(EDM(0.05, 80.0), steps)
    found = reconstruct(
        denoise, EDM(), DPMSolver2M(), X, CONDITIONED, TARGET, key(), levels, samples=6000
    )
    for window, targets in enumerate(TARGET):
        mean, covariance = law(window)
        sd = np.sqrt(np.diag(covariance))
        z, expected, lower, upper = (
            (np.asarray(part)[window, targets] - mean) / sd
            for part in (X, found.expected, found.lower, found.upper)
        )
        assert np.all(np.abs(found.evidence[window, targets] / sd - crps_of_normal(z)) < tolerance)
        assert np.all(np.abs(expected) < tolerance)
        assert np.all(np.abs(lower + 1.645) < band)
        assert np.all(np.abs(upper - 1.645) < band)
    np.testing.assert_array_equal(found.lower[CONDITIONED], X[CONDITIONED])


def test_one_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2 samples"):
        against_noise(np.zeros((1, 1), np.float32), 1)


# ---- Denoising errors and score norms ----


@pytest.mark.parametrize("noisy", [True, False], ids=["errors", "norms"])
def test_errors_and_norms_are_exact_in_every_cell(noisy: bool) -> None:
    """X - D = (I - K)(x - mean) - sigma K n with K = C (C + sigma^2)^-1."""
    levels = jnp.array([20.0, 1.0, 0.2])
    given = (denoise, X, CONDITIONED, TARGET)
    found = denoising_errors(*given, CUBATURE, levels) if noisy else score_norms(*given, levels)
    assert found.shape == (3, *X.shape)
    for level, window in itertools.product(range(3), range(len(WINDOWS))):
        mean, covariance = law(window)
        sigma, targets = float(levels[level]), TARGET[window]
        gain = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(len(mean)))
        x = X[window, targets] - mean
        exact = ((x - gain @ x) / sigma) ** 2 + (gain**2).sum(1) * noisy
        np.testing.assert_allclose(found[level, window, targets], exact, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.2, 1.0, 20.0])
def test_score_norm_has_its_expectation(sigma: float) -> None:
    """E (sigma score(x))^2 = diag of sigma^2 (C + sigma^2)^-1 C (C + sigma^2)^-1."""
    found = score_norms(denoise, LIKE_DATA, NONE, ALL, jnp.array([sigma]))[0].mean(0)
    exact = np.diag(powers(COVARIANCE, lambda c: sigma**2 * c / (c + sigma**2) ** 2))
    np.testing.assert_allclose(found, exact, rtol=1e-3)


# ---- The bound ----


def negative_elbo(
    x: np.ndarray, conditioned: np.ndarray, target: np.ndarray, sigma: float, steps: int
) -> np.ndarray:
    """With the ideal denoiser and exact noise, from sigma = 300 down."""
    levels = sde.log_snr_levels(EDM(sigma, 300.0), steps)
    cells = denoising_bound(denoise, x, conditioned, target, CUBATURE, levels)
    constant = 0.5 * math.log(2.0 * math.pi * math.e * sigma**2)
    return np.asarray(cells.sum(1) + constant * target.sum(1), np.float64)


def exact_gap(sigma: float) -> np.ndarray:
    """Log p(x; s) - E log p(x + s n; s) = tr s^2 (C + s^2)^-1 / 2, for Gaussian data."""
    traces = [(sigma**2 / (sigma**2 + np.linalg.eigvalsh(law(w)[1]))).sum() for w in (0, 1)]
    return 0.5 * np.asarray(traces)


@pytest.mark.parametrize("sigma", [0.3, 0.1, 0.03])
def test_the_bound_holds_and_its_gap_is_known(sigma: float) -> None:
    found = negative_elbo(X, CONDITIONED, TARGET, sigma, 400)
    np.testing.assert_allclose(found, exact_gap(sigma) - exact_log_likelihood(sigma), atol=2e-3)
    assert np.all(found > -exact_log_likelihood(math.sqrt(2.0) * sigma) - 2e-3)


def test_the_bound_tends_to_the_likelihood() -> None:
    """The distance from log p(x) itself is of the order of sigma^2."""
    distance = [
        np.abs(negative_elbo(X, CONDITIONED, TARGET, sigma, 400) + exact_log_likelihood(0.0))
        for sigma in (0.2, 0.1, 0.05)
    ]
    assert np.all(distance[1] < distance[0] / 2.5)
    assert np.all(distance[2] < distance[1] / 2.5)


def test_order_of_the_quadrature() -> None:
    exact = exact_gap(0.3) - exact_log_likelihood(0.3)
    coarse, fine = (
        np.abs(negative_elbo(X, CONDITIONED, TARGET, 0.3, steps) - exact) for steps in (21, 41)
    )
    np.testing.assert_allclose(np.log2(coarse / fine), 2.0, atol=0.1)


def test_above_the_first_level_noise_alone_is_the_prediction() -> None:
    """The "prior loss" of Kingma et al. 2021, KL(N(x, sigma^2) || N(0, sigma^2))."""
    found = denoising_bound(denoise, X, CONDITIONED, TARGET, CUBATURE, jnp.array([2.0]))
    np.testing.assert_allclose(found, np.where(TARGET, X**2 / 8.0, 0.0), rtol=1e-6)


def test_a_wrong_model_pays_its_divergence() -> None:
    """Its mean bound exceeds the ideal one's by KL(p_s || its p_s), s the last level."""
    sigma, shift = 0.1, 0.5
    wrong = anchor.Anchor(ANCHOR.mean + shift, ANCHOR.loadings, 2.0 * ANCHOR.noise)
    levels = sde.log_snr_levels(EDM(sigma, 300.0), 200)

    def mean_bound(model: anchor.Anchor) -> float:
        def denoise_as_model(x: Array, noise_variance: Array) -> tuple[Array, Array]:
            return anchor.posterior(model, x, noise_variance)

        cells = denoising_bound(denoise_as_model, LIKE_DATA, NONE, ALL, CUBATURE, levels)
        return float(cells.sum(1).mean())

    true = COVARIANCE + sigma**2 * np.eye(CELLS)
    other = true + np.diag(ANCHOR.noise)
    quadratic = shift**2 * np.linalg.inv(other).sum()
    log_ratio = np.linalg.slogdet(other)[1] - np.linalg.slogdet(true)[1]
    divergence = 0.5 * (np.trace(np.linalg.solve(other, true)) - CELLS + quadratic + log_ratio)
    assert divergence > 1.0
    assert mean_bound(wrong) - mean_bound(ANCHOR) == pytest.approx(divergence, rel=2e-3)


def test_antithetic_noise_does_not_move_windows_against_one_another() -> None:
    levels = sde.log_snr_levels(EDM(0.1, 300.0), 12)

    def wavering(first: Array, second: Array) -> float:
        bounds = (
            denoising_bound(denoise, LIKE_DATA, NONE, ALL, noise, levels).sum(1)
            for noise in (first, second)
        )
        return float((next(bounds) - next(bounds)).std())

    pairs = [antithetic(key(seed), 4, CELLS) for seed in (0, 1)]
    assert pairs[0].shape == (8, CELLS)
    plain = [jax.random.normal(key(seed), (8, CELLS)) for seed in (0, 1)]
    assert wavering(*pairs) < 1e-3
    assert wavering(*plain) > 0.1


# ---- The likelihood ----


def flow(window: int, first: float, last: float) -> np.ndarray:
    """Surprisal of each target cell by the exact flow from sigma = `last` up to `first`.

    y - mean is stretched by ((C + first^2) / (C + last^2))^1/2 (Karras et al. 2022, eq. 1), and
    counts as N(0, first^2) there.
    """
    mean, covariance = law(window)
    stretch = powers(covariance, lambda c: np.sqrt((c + first**2) / (c + last**2)))
    grown = powers(covariance, lambda c: 0.5 * np.log((c + first**2) / (c + last**2)))
    y = mean + stretch @ (X[window, TARGET[window]] - mean)
    density = -0.5 * (y / first) ** 2 - 0.5 * math.log(2.0 * math.pi * first**2)
    return np.asarray(-density - np.diag(grown))


def surprise(probes: np.ndarray, sigma: float, first: float, steps: int) -> np.ndarray:
    levels = sde.karras_levels(EDM(sigma, first), steps)
    found = surprisal(denoise, X, CONDITIONED, TARGET, probes, levels)
    return np.asarray(found, np.float64)


@pytest.mark.parametrize("sigma", [0.05, 0.5])
def test_surprisal_is_exact_in_every_cell_and_in_sum(sigma: float) -> None:
    """60 levels. In sum it is the Gaussian's, but for the mean's share of sigma_max = 3,000."""
    found = surprise(SIGNS, sigma, 3000.0, 60)
    for window in range(len(WINDOWS)):
        exact = flow(window, 3000.0, sigma)
        np.testing.assert_allclose(found[window, TARGET[window]], exact, atol=2e-3)
    np.testing.assert_allclose(found.sum(1), -exact_log_likelihood(sigma), atol=1e-2)


def test_order_of_the_flow() -> None:
    errors = []
    for steps in (8, 15):  # 7 and 14 intervals
        found = surprise(SIGNS, 0.5, 80.0, steps)
        errors.append(
            max(
                float(np.abs(found[window, TARGET[window]] - flow(window, 80.0, 0.5)).max())
                for window in range(len(WINDOWS))
            )
        )
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4.0, abs=0.5)


def test_hutchinsons_estimate_is_unbiased() -> None:
    """Its mean over every vector of signs there is: that of basis vectors, the trace itself."""
    every = np.array(list(itertools.product([1.0, -1.0], repeat=CELLS)), np.float32)
    one = np.ones((CELLS, CELLS), np.float32)  # again and again
    basis = math.sqrt(CELLS) * np.eye(CELLS, dtype=np.float32)
    whole, signs, mean, single = (
        surprise(probes, 0.5, 80.0, 15) for probes in (basis, SIGNS, every, one)
    )
    np.testing.assert_allclose(signs, whole, atol=1e-4)
    np.testing.assert_allclose(mean, whole, atol=1e-4)
    assert np.all(np.abs(single - whole).max(1) > 0.1)


# ---- What they have in common ----

LEVELS = sde.log_snr_levels(EDM(0.1, 80.0), 12)


def crps(x: np.ndarray, conditioned: np.ndarray, target: np.ndarray) -> np.ndarray:
    drawn = reconstruct(
        denoise, EDM(), DPMSolver2M(), x, conditioned, target, key(), LEVELS, samples=400
    )
    return np.asarray(drawn.evidence)


def bound(x: np.ndarray, conditioned: np.ndarray, target: np.ndarray) -> np.ndarray:
    noise = antithetic(key(), 4, CELLS)
    return np.asarray(denoising_bound(denoise, x, conditioned, target, noise, LEVELS))


def norms(x: np.ndarray, conditioned: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.asarray(score_norms(denoise, x, conditioned, target, LEVELS).mean(0))


def minus_log_p(x: np.ndarray, conditioned: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.asarray(surprisal(denoise, x, conditioned, target, SIGNS, LEVELS))


Reading = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
each_reading = pytest.mark.parametrize("reading", [crps, bound, norms, minus_log_p])


@each_reading
def test_only_observed_targets_have_evidence_and_nothing_else_is_read(reading: Reading) -> None:
    found = reading(X, CONDITIONED, TARGET)
    assert found.shape == X.shape
    assert np.all(found[~TARGET] == 0.0)
    assert np.all(found[TARGET] != 0.0)
    neither = ~CONDITIONED & ~TARGET
    assert neither.any()
    for junk in (0.0, 1e6):
        again = reading(np.where(neither, junk, X).astype(np.float32), CONDITIONED, TARGET)
        np.testing.assert_array_equal(again, found)
    both = reading(X, CONDITIONED, TARGET | CONDITIONED)
    np.testing.assert_array_equal(both, found)


@each_reading
def test_a_missing_target_changes_nothing(reading: Reading) -> None:
    """But for the CRPS's samples, which are others: within four of their standard errors."""
    found, again = (reading(X, CONDITIONED, target) for target in (TARGET, TARGET | np.isnan(X)))
    assert np.all(again[~TARGET] == 0.0)
    np.testing.assert_allclose(again, found, atol=0.2 if reading is crps else 0.0, rtol=0.0)


@each_reading
def test_a_fault_shows_in_its_own_cell(reading: Reading) -> None:
    cell = 5
    spoiled = X.copy()
    spoiled[:, cell] += 6.0
    before, after = (reading(x, CONDITIONED, TARGET) for x in (X, spoiled))
    np.testing.assert_array_equal((after - before).argmax(1), cell)


@pytest.mark.parametrize("reading", [bound, norms, minus_log_p])
def test_a_window_does_not_see_its_neighbours(reading: Reading) -> None:
    together = reading(X, CONDITIONED, TARGET)
    for window in range(len(WINDOWS)):
        own = slice(window, window + 1)
        alone = reading(X[own], CONDITIONED[own], TARGET[own])
        np.testing.assert_allclose(alone, together[own], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reading", [bound, norms])
def test_shares_are_not_negative(reading: Reading) -> None:
    assert np.all(reading(LIKE_DATA, NONE, ALL) > 0.0)
