"""Noise processes against their closed forms; everything derived is checked by another route."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from tsdiff import sde
from tsdiff.anchor import Anchor, negative_log_likelihood, posterior
from tsdiff.errors import ConfigError
from tsdiff.sde import EDM, VE, CosineVP, LinearVP, Process, SubVP

PROCESSES: list[Process] = [LinearVP(), CosineVP(), SubVP(), SubVP(CosineVP()), VE(), EDM()]
BETA_MIN, BETA_MAX = 0.1, 20.0


def name(value: object) -> str:
    """A test's id: the class of a process, within that of a process made from it."""
    base = f"({name(value.base)})" if isinstance(value, SubVP) else ""
    return getattr(value, "__name__", type(value).__name__) + base


each_process = pytest.mark.parametrize("process", PROCESSES, ids=name)


def times(process: Process, steps: int = 50) -> Array:
    return jnp.linspace(process.t_min, process.t_max, steps + 1)[1:]


def linear_beta(t: Array) -> Array:
    return BETA_MIN + t * (BETA_MAX - BETA_MIN)


def linear_alpha(t: Array) -> Array:
    """Song et al. 2021, eq. 33, as printed."""
    return jnp.exp(-0.25 * t**2 * (BETA_MAX - BETA_MIN) - 0.5 * t * BETA_MIN)


@each_process
def test_sigma_and_log_snr_round_trip(process: Process) -> None:
    t = times(process)
    np.testing.assert_allclose(process.time(process.sigma(t)), t, rtol=2e-4)
    np.testing.assert_allclose(sde.time_of_log_snr(process, sde.log_snr(process, t)), t, rtol=2e-4)
    assert np.all(np.diff(process.sigma(t)) > 0)


@each_process
def test_log_snr_is_signal_to_noise(process: Process) -> None:
    t = times(process)
    ratio = np.asarray(process.scale(t), np.float64) ** 2 / np.asarray(sde.std(process, t)) ** 2
    np.testing.assert_allclose(sde.log_snr(process, t), np.log(ratio), atol=1e-5)


@pytest.mark.parametrize("process", [LinearVP(), CosineVP()], ids=name)
def test_vp_preserves_variance(process: Process) -> None:
    t = times(process)
    np.testing.assert_allclose(process.scale(t) ** 2 + sde.std(process, t) ** 2, 1.0, atol=2e-6)


@pytest.mark.parametrize(
    ("process", "scale", "std"),
    [
        (LinearVP(), linear_alpha, lambda t: jnp.sqrt(1 - linear_alpha(t) ** 2)),
        (SubVP(), linear_alpha, lambda t: 1 - linear_alpha(t) ** 2),
        (VE(), jnp.ones_like, lambda t: 0.01 * 5000.0**t),
        (EDM(), jnp.ones_like, lambda t: t),
        (
            CosineVP(),
            lambda t: (
                jnp.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.004 / 1.008 * math.pi)
            ),
            None,
        ),
    ],
    ids=name,
)
def test_marginals_are_the_papers(
    process: Process,
    scale: Callable[[Array], Array],
    std: Callable[[Array], Array] | None,
) -> None:
    t = times(process)
    np.testing.assert_allclose(process.scale(t), scale(t), rtol=1e-4)
    if std is not None:
        np.testing.assert_allclose(sde.std(process, t), std(t), rtol=1e-4)


@pytest.mark.parametrize(
    ("process", "rate", "squared_diffusion"),
    [
        (LinearVP(), lambda t: -0.5 * linear_beta(t), linear_beta),
        (
            SubVP(),
            lambda t: -0.5 * linear_beta(t),
            lambda t: linear_beta(t) * (1 - linear_alpha(t) ** 4),  # Song et al. 2021, eq. 12
        ),
        (
            VE(),
            jnp.zeros_like,
            lambda t: (0.01 * 5000.0**t) ** 2 * 2 * math.log(5000.0),  # eq. 30
        ),
        (EDM(), jnp.zeros_like, lambda t: 2 * t),
        (
            CosineVP(),
            lambda t: -math.pi / 2.016 * jnp.tan((t + 0.008) / 1.008 * math.pi / 2),
            lambda t: math.pi / 1.008 * jnp.tan((t + 0.008) / 1.008 * math.pi / 2),
        ),
    ],
    ids=name,
)
def test_drift_and_diffusion_are_the_papers(
    process: Process,
    rate: Callable[[Array], Array],
    squared_diffusion: Callable[[Array], Array],
) -> None:
    t = times(process)
    x = jnp.linspace(-2.0, 3.0, len(t))
    np.testing.assert_allclose(sde.drift(process, x, t), rate(t) * x, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(sde.diffusion(process, t) ** 2, squared_diffusion(t), rtol=1e-3)


@each_process
def test_the_sde_has_the_marginals(process: Process) -> None:
    """For data of variance c: the flow carries x along with the standard deviation of p_t.

    Its drift is x d log sd / dt, which holds if and only if d var / dt = 2 f var + g^2.
    """
    c = 0.7

    def variance(t: Array) -> Array:
        return process.scale(t) ** 2 * (c + process.sigma(t) ** 2)

    t = times(process)
    change = jax.vmap(jax.grad(variance))(t)
    x = jnp.sqrt(variance(t))
    score = -x / variance(t)
    flow = sde.flow_drift(process, x, t, score)
    size = jnp.abs(sde.drift(process, x, t)) + sde.diffusion(process, t) ** 2 / x
    assert np.all(np.abs(flow - 0.5 * change / x) < 1e-5 * size)
    reverse = sde.reverse_drift(process, x, t, score)
    half = 0.5 * sde.diffusion(process, t) ** 2 * score
    np.testing.assert_allclose(reverse + half, flow, atol=1e-6 * float(size.max()))


@each_process
def test_prior(process: Process) -> None:
    drawn = sde.prior_sample(process, jax.random.key(0), (100, 100))
    expected = process.scale(jnp.float32(process.t_max)) * process.sigma(jnp.float32(process.t_max))
    np.testing.assert_allclose(sde.prior_std(process), expected, rtol=1e-6)
    np.testing.assert_allclose(drawn.std(), expected, rtol=0.03)  # 4 standard errors
    assert drawn.shape == (100, 100)


def test_karras_levels() -> None:
    np.testing.assert_allclose(
        sde.karras_levels(EDM(1.0, 100.0), 3, rho=2.0), [100.0, 30.25, 1.0], rtol=1e-6
    )


def test_other_levels() -> None:
    np.testing.assert_allclose(sde.log_snr_levels(EDM(1.0, 100.0), 3), [100, 10, 1], rtol=1e-5)
    np.testing.assert_allclose(sde.time_levels(EDM(1.0, 100.0), 4), [100, 67, 34, 1], rtol=1e-6)
    # VE is geometric in t:
    np.testing.assert_allclose(sde.time_levels(VE(), 9), sde.log_snr_levels(VE(), 9), rtol=1e-4)


@each_process
@pytest.mark.parametrize("grid", [sde.karras_levels, sde.time_levels, sde.log_snr_levels])
def test_levels_fall_from_end_to_end(
    process: Process, grid: Callable[[Process, int], Array]
) -> None:
    levels = grid(process, 20)
    ends = process.sigma(jnp.array([process.t_max, process.t_min]))
    assert levels.shape == (20,)
    assert levels.dtype == jnp.float32
    assert np.all(np.diff(levels) < 0)
    np.testing.assert_allclose(levels[jnp.array([0, -1])], ends, rtol=1e-4)


def test_ddpm_betas() -> None:
    """Ho et al. 2020, section 4: 1e-4 to 0.02 in a thousand steps."""
    betas = sde.linear_betas(1000)
    np.testing.assert_allclose(betas[jnp.array([0, -1])], [1e-4, 0.02], rtol=1e-6)
    np.testing.assert_allclose(sde.beta_levels(betas)[-1], math.sqrt(1 / (1 - 1e-4) - 1), rtol=1e-4)


@pytest.mark.parametrize("steps", [1000, 4000])
def test_ddpm_betas_have_the_continuous_limit(steps: int) -> None:
    """N beta_i -> beta(i / N) and the discrete sigma_i -> sigma(i / N), as 1 / N."""

    @jax.jit
    def evaluate(t: Array) -> tuple[Array, ...]:
        linear, exact = sde.linear_betas(steps), sde.discrete_betas(LinearVP(), steps)
        levels = sde.beta_levels(linear), sde.beta_levels(exact)
        return linear, exact, *levels, LinearVP().sigma(t)[::-1]

    t = np.arange(1, steps + 1, dtype=np.float32) / steps
    near = (BETA_MAX - BETA_MIN) / steps
    linear, exact, linear_levels, exact_levels, sigma = map(np.asarray, evaluate(jnp.asarray(t)))
    np.testing.assert_allclose(steps * linear, BETA_MIN + t * near * steps, atol=1.01 * near)
    np.testing.assert_allclose(
        steps * exact, BETA_MIN + (t - 0.5 / steps) * near * steps, rtol=near
    )
    np.testing.assert_allclose(exact_levels, sigma, rtol=1e-3)
    late = t[::-1] > 0.1
    np.testing.assert_allclose(linear_levels[late], sigma[late], rtol=2 * near)


def test_cosine_betas() -> None:
    """Nichol & Dhariwal 2021, eq. 17 in float64, clipped at 0.999."""
    squared = np.cos((np.linspace(0, 1, 101) + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = sde.discrete_betas(CosineVP(), 100)
    np.testing.assert_allclose(
        betas, np.minimum(1 - squared[1:] / squared[:-1], 0.999), rtol=1e-4, atol=1e-6
    )
    assert betas[-1] == pytest.approx(0.999)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
@each_process
def test_parameterisations_are_mutually_inverse(process: Process, t: float) -> None:
    at = jnp.float32(process.t_min + t * (process.t_max - process.t_min))
    scale, std = process.scale(at), sde.std(process, at)
    key_x0, key_epsilon = jax.random.split(jax.random.key(1))
    x0, epsilon = jax.random.normal(key_x0, (7,)), jax.random.normal(key_epsilon, (7,))
    x = scale * x0 + std * epsilon
    near = 3e-6 * (1 + float(std / scale))  # x0 drowns in x as sigma grows
    v, score = scale * epsilon - std * x0, -epsilon / std
    np.testing.assert_allclose(sde.x0_from_epsilon(x, epsilon, scale, std), x0, atol=near)
    np.testing.assert_allclose(sde.x0_from_v(x, v, scale, std), x0, atol=near)
    np.testing.assert_allclose(sde.x0_from_score(x, score, scale, std), x0, atol=near)
    back = 3e-6 * (1 + float(scale / std))
    np.testing.assert_allclose(sde.epsilon_from_x0(x, x0, scale, std), epsilon, atol=back)
    near_v = 3e-6 * (1 + float(scale) ** 2 / float(std) + float(std))
    np.testing.assert_allclose(sde.v_from_x0(x, x0, scale, std), v, atol=near_v)
    np.testing.assert_allclose(sde.score_from_x0(x, x0, scale, std), score, atol=back / float(std))


def test_the_score_is_the_gradient_of_the_log_likelihood() -> None:
    """Karras et al. 2022, eq. 3, by automatic differentiation of the Gaussian likelihood."""
    rng = np.random.default_rng(0)
    anchor = Anchor(
        jnp.asarray(rng.normal(size=5), jnp.float32),
        jnp.asarray(rng.normal(size=(5, 2)), jnp.float32),
        jnp.asarray(rng.uniform(0.1, 0.6, 5), jnp.float32),
    )
    x, sigma = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32), jnp.array([0.5, 2.0])

    def log_p(x: Array) -> Array:
        variance = jnp.broadcast_to(sigma[:, None] ** 2, x.shape)
        return -negative_log_likelihood(anchor, x, variance).sum()

    found = jax.jit(sde.score_fn(partial(posterior, anchor)))(x, sigma)
    np.testing.assert_allclose(found, jax.jit(jax.grad(log_p))(x), atol=1e-4)


@pytest.mark.parametrize(
    "build",
    [
        lambda: LinearVP(beta_min=0.0),
        lambda: LinearVP(beta_min=2.0, beta_max=1.0),
        lambda: LinearVP(t_min=0.0),
        lambda: CosineVP(t_max=1.0),
        lambda: CosineVP(offset=-1.0),
        lambda: VE(sigma_min=0.0),
        lambda: VE(t_max=0.0),
        lambda: EDM(t_min=2.0, t_max=1.0),
        lambda: sde.linear_betas(20),
    ],
)
def test_bad_values_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        build()


def test_processes_are_values() -> None:
    """Equal by value, so that one can be a static argument of jit."""
    assert hash(SubVP()) == hash(SubVP(LinearVP()))
    assert LinearVP() != LinearVP(beta_max=10.0)
