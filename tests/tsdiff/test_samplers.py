"""Samplers on Gaussian data, where the ideal denoiser and every law are known in closed form."""

import math
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from tests.tsdiff.gaussian import (
    CONDITIONED,
    EVERYTHING,
    TARGET,
    VARIANCE,
    WINDOWS,
    X,
    denoise,
    denoise_independent,
    exact_log_likelihood,
    key,
    law,
)
from tsdiff import sde
from tsdiff.errors import ConfigError
from tsdiff.samplers import (
    DDIM,
    METHODS,
    Ancestral,
    DPMSolver2M,
    EulerMaruyama,
    Heun,
    Method,
    PredictorCorrector,
    Step,
    log_likelihood,
    sample,
)
from tsdiff.sde import EDM, VE, CosineVP, LinearVP, Process, SubVP

SAMPLES = 4000
run = jax.jit(sample, static_argnames=("denoise", "process", "method", "samples"))


def draw_independent(method: Method, process: Process, levels: Array, samples: int) -> np.ndarray:
    x, none = jnp.zeros(EVERYTHING.shape), jnp.zeros_like(EVERYTHING)
    drawn = run(
        denoise_independent, process, method, x, none, EVERYTHING, key(), levels, samples=samples
    )
    return np.asarray(drawn[:, 0], np.float64)


def start(level: float) -> np.ndarray:
    """Where 64 samples of `draw_independent` set out."""
    noise = jax.random.normal(jax.random.split(key())[0], (64, *EVERYTHING.shape))
    return level * np.asarray(noise[:, 0], np.float64)


def draw(method: Method, process: Process, levels: Array, samples: int = SAMPLES) -> np.ndarray:
    return np.asarray(
        run(denoise, process, method, X, CONDITIONED, TARGET, key(), levels, samples=samples)
    )


@cache
def draw_many(method: Method, process: Process, steps: int) -> np.ndarray:
    return draw(method, process, sde.karras_levels(process, steps))


def name(value: object) -> str | None:
    """A test's id: what differs from the default is of no use there."""
    return None if isinstance(value, int) else type(value).__name__


each_case = pytest.mark.parametrize(
    ("method", "process", "steps"),
    [
        (Ancestral(), LinearVP(), 200),
        (DDIM(), CosineVP(), 200),
        (EulerMaruyama(), SubVP(), 200),
        (PredictorCorrector(), VE(), 60),
        (Heun(), EDM(), 40),
        (Heun(churn=0.1, churn_range=(0.05, 20.0)), EDM(), 40),
        (DPMSolver2M(), LinearVP(), 40),
    ],
    ids=name,
)


@each_case
def test_samples_follow_the_exact_conditional_law(
    method: Method, process: Process, steps: int
) -> None:
    """4,000 samples: standard errors are .016 of a standard deviation and .022 of a variance.

    Allowed are four of them, and .03 and .05 for discretisation.
    """
    drawn = draw_many(method, process, steps)
    for window in range(len(WINDOWS)):
        mean, covariance = law(window)
        sd = np.sqrt(np.diag(covariance))
        found = drawn[:, window, TARGET[window]].astype(np.float64)
        assert np.all(np.abs(found.mean(0) - mean) / sd < 0.063 + 0.03)
        error = np.abs(np.cov(found.T) - covariance) / np.outer(sd, sd)
        assert np.all(error < 0.089 + 0.05)


@each_case
def test_only_targets_are_drawn(method: Method, process: Process, steps: int) -> None:
    """Conditioned and missing cells come back as they were, missing ones as NaN."""
    drawn = draw_many(method, process, steps)
    assert drawn.shape == (SAMPLES, *X.shape)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn[:, ~TARGET], np.tile(X[~TARGET], (SAMPLES, 1)))
    assert np.all(np.isfinite(drawn[:, TARGET]))


def test_every_method_has_a_case_and_a_name() -> None:
    tried = {case[0] for case in each_case.args[1]}
    assert set(METHODS.values()) <= tried | {PredictorCorrector()}
    assert {type(method) for method in tried} == {type(method) for method in METHODS.values()}


def test_a_cell_that_is_both_is_conditioned() -> None:
    levels = sde.karras_levels(EDM(), 40)
    both = TARGET | CONDITIONED
    drawn = run(denoise, EDM(), Heun(), X, CONDITIONED, both, key(), levels, samples=SAMPLES)
    np.testing.assert_array_equal(drawn, draw_many(Heun(), EDM(), 40))


def test_one_level_is_one_call_of_the_denoiser() -> None:
    level = 2.0
    drawn = draw_independent(Heun(), EDM(), jnp.array([level]), 64)
    np.testing.assert_allclose(drawn, VARIANCE / (VARIANCE + level**2) * start(level), rtol=1e-5)


@cache
def flow_error(method: Method, grid: Callable[[Process, int], Array], steps: int) -> float:
    """RMS distance of a deterministic sampler from the exact flow, in standard deviations.

    The probability flow of a cell of variance c is y ~ sqrt(c + sigma^2) (Karras et al. 2022,
    eq. 1), and the last step takes the mean given y.
    """
    levels = grid(EDM(), steps)
    found = draw_independent(method, EDM(), levels, 64)
    first, last = float(levels[0]), float(levels[-1])
    shrunk = np.sqrt((VARIANCE + last**2) / (VARIANCE + first**2))
    exact = start(first) * shrunk * VARIANCE / (VARIANCE + last**2)
    return float(np.sqrt(((found - exact) ** 2 / VARIANCE).mean()))


@pytest.mark.parametrize("grid", [sde.karras_levels, sde.log_snr_levels])
@pytest.mark.parametrize(("method", "order"), [(DDIM(), 1), (Heun(), 2), (DPMSolver2M(), 2)])
def test_order_of_convergence(
    method: Method, order: int, grid: Callable[[Process, int], Array]
) -> None:
    coarse, fine = (flow_error(method, grid, steps) for steps in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_what_a_step_buys() -> None:
    """Error in standard deviations after n steps on Karras' grid of EDM.

    | n  | DDIM | DPM-Solver++(2M) | Heun, two calls a step |
    | -- | ---- | ---------------- | ---------------------- |
    | 32 | .079 | .0145            | .0134                  |
    | 64 | .040 | .0033            | .0031                  |
    """
    methods = (DDIM(), DPMSolver2M(), Heun())
    table = [[flow_error(m, sde.karras_levels, n) for m in methods] for n in (32, 64)]
    expected = [[0.079, 0.0145, 0.0134], [0.040, 0.0033, 0.0031]]
    np.testing.assert_allclose(table, expected, rtol=0.1)
    ddim, multistep, heun = np.transpose(table)
    assert 2.5 * heun[0] < ddim[1]  # for the same number of calls
    assert np.all(multistep < 1.2 * heun)  # for half as many


def scalar_moments(
    method: Method, process: Process, grids: list[Array]
) -> list[tuple[float, float]]:
    """Errors of mean and variance of y at the last level, for a cell of N(0.8, 0.7); no sampling.

    The denoiser is affine, so a step is y -> a y + k + b z: its coefficients are read from what
    it does to two values of y and to the draws z of its own key, and moments follow them.
    """
    mean, c, shape = 0.8, 0.7, (64, 1, 1)
    z = jax.random.normal(key(), shape)[:, 0, 0]
    low, high = int(z.argmin()), int(z.argmax())

    def ideal(y: Array, sigma: Array) -> Array:
        return mean + c / (c + sigma**2) * (y - mean)

    def coefficients(now: Array, after: Array) -> tuple[Array, Array, Array]:
        def out(y: Array | float) -> Array:
            at = jnp.full(shape, y)
            step = Step(ideal, process, at, at, jnp.full((), jnp.inf), now, after, key())
            return method(step)[0][:, 0, 0]

        still = out(0.0)
        b = (still[high] - still[low]) / (z[high] - z[low])
        return (out(now)[low] - still[low]) / now, still[low] - b * z[low], b

    now = jnp.concatenate([levels[:-1] for levels in grids])
    after = jnp.concatenate([levels[1:] for levels in grids])
    steps = np.stack(jax.jit(jax.vmap(coefficients))(now, after), -1).astype(np.float64)
    errors = []
    for levels in grids:
        own, steps = steps[: len(levels) - 1], steps[len(levels) - 1 :]
        first, variance = mean, c + float(levels[0]) ** 2
        for a, k, b in own:
            first, variance = a * first + k, a * a * variance + b * b
        errors.append((abs(first - mean), abs(variance - c - float(levels[-1]) ** 2)))
    return errors


@pytest.mark.parametrize(
    ("method", "process", "order"),
    [
        *((EulerMaruyama(), process, 1) for process in (EDM(), LinearVP(), CosineVP())),
        (Ancestral(), LinearVP(), 1),
        (DDIM(eta=0.5), LinearVP(), 1),
        (Heun(), LinearVP(), 2),
    ],
    ids=name,
)
def test_weak_order_of_convergence(method: Method, process: Process, order: int) -> None:
    grids = [sde.karras_levels(process, steps) for steps in (64, 128, 256)]
    means, variances = zip(*scalar_moments(method, process, grids), strict=True)
    np.testing.assert_allclose(np.log2(np.divide(variances[:-1], variances[1:])), order, atol=0.1)
    if means[0] > 1e-3:  # else the mean is exact but for rounding
        np.testing.assert_allclose(np.log2(np.divide(means[:-1], means[1:])), order, atol=0.1)


def test_ancestral_sampling_is_ddpms_algorithm_2() -> None:
    """Ho et al. 2020, eq. 6-7, in their own coordinates, discrete betas and all, in float64.

    And so is DDIM with eta = 1.
    """
    levels = sde.beta_levels(sde.linear_betas(50))
    betas = np.asarray(sde.linear_betas(50), np.float64)
    alpha_bar = np.cumprod(1 - betas)
    x = start(math.sqrt(1 - alpha_bar[-1]))
    keys = jax.random.split(jax.random.split(key())[1], 49)
    z = np.asarray(jax.lax.map(lambda key: jax.random.normal(key, x.shape), keys))
    for i in range(49, -1, -1):
        before = alpha_bar[i - 1] if i else 1.0
        x0 = np.sqrt(alpha_bar[i]) * VARIANCE / (alpha_bar[i] * VARIANCE + 1 - alpha_bar[i]) * x
        mean = np.sqrt(before) * betas[i] * x0 + np.sqrt(1 - betas[i]) * (1 - before) * x
        x = mean / (1 - alpha_bar[i])
        if i:
            spread = np.sqrt((1 - before) / (1 - alpha_bar[i]) * betas[i])
            x = x + spread * z[49 - i]
    for method in (Ancestral(), DDIM(eta=1.0)):
        found = draw_independent(method, LinearVP(), levels, 64)
        np.testing.assert_allclose(found, x, atol=1e-4)


def test_the_corrector_mends_what_the_predictor_leaves() -> None:
    """Variances after a dozen levels are nearer to the truth with Langevin steps between."""
    levels = sde.karras_levels(EDM(), 12)
    plain, corrected = (
        np.abs(draw_independent(method, EDM(), levels, SAMPLES).var(0) / VARIANCE - 1).mean()
        for method in (EulerMaruyama(), PredictorCorrector(corrections=8))
    )
    assert corrected < 0.8 * plain


def test_one_trace_for_all_windows_and_masks() -> None:
    traces = []

    def counted(x: Array, noise_variance: Array) -> tuple[Array, Array]:
        traces.append(x.shape)
        return jnp.where(jnp.isfinite(noise_variance), x, 0.0), x

    def again(seed: int, steps: int) -> int:
        method = Heun(churn=0.1)  # a new value, but an equal one
        masks = (np.roll(mask, seed, 1) for mask in (CONDITIONED, TARGET))
        run(counted, LinearVP(), method, X + seed, *masks, key(seed), levels[steps], samples=2)
        return len(traces)

    levels = {steps: sde.karras_levels(LinearVP(), steps) for steps in (5, 50)}
    first = again(0, 5)
    assert again(1, 5) == first
    assert again(2, 50) == 2 * first  # a shape of its own, but loops are not unrolled
    assert set(traces) == {X.shape}  # as DenoiseFn says, whatever the number of samples


evaluate = jax.jit(log_likelihood, static_argnames=("denoise", "probes"))


@pytest.mark.parametrize("sigma", [0.01, 0.5])
def test_likelihood_is_the_gaussians(sigma: float) -> None:
    """The probes leave standard errors of .01 and .06 nats; four of them are allowed."""
    levels = sde.log_snr_levels(EDM(sigma, 300.0), 40)
    found = evaluate(denoise, X, CONDITIONED, TARGET, key(), levels, probes=2048)
    assert found.shape == (2,)
    assert np.all(np.abs(found - exact_log_likelihood(sigma)) < [0.04, 0.24])


def test_likelihood_is_exact_and_of_fourth_order_for_independent_cells() -> None:
    """A diagonal Jacobian leaves nothing to Hutchinson's estimator: one probe will do.

    What is left is Runge-Kutta's error and, at sigma_max, that of taking y for noise alone.
    """
    sigma, x = 0.05, jnp.array([[0.2, -1.0, 1.5, 0.0]])
    none = jnp.zeros_like(EVERYTHING)
    total = VARIANCE + sigma**2
    exact = -0.5 * (np.asarray(x) ** 2 / total + np.log(2 * math.pi * total)).sum(1)
    errors = []
    for steps in (21, 41):  # 20 and 40 intervals
        levels = sde.log_snr_levels(EDM(sigma, 300.0), steps)
        found = evaluate(denoise_independent, x, none, EVERYTHING, key(), levels)
        errors.append(float(np.abs(found - exact).max()))
    assert errors[1] < min(errors[0] / 12, 2e-3)


@pytest.mark.parametrize(
    "build",
    [
        lambda: DDIM(eta=1.5),
        lambda: Heun(churn=0.5),
        lambda: PredictorCorrector(corrections=0),
        lambda: PredictorCorrector(snr=1.0),
    ],
)
def test_bad_values_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        build()
